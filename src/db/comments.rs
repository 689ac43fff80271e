//! Comments.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use prost::Message;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    conn::Conn,
    page::{Page, PageBounds},
    row_locks::RowLocks,
    time::timestamp,
};
use crate::{
    batching::coalescer::Outcome,
    error::{Error, Result},
    pb::Comment,
};

/// Returns the comment in a row that has its columns and `author_username`.
fn from_row(row: &Row) -> Result<Comment> {
    let time = |column: &str| row.get::<_, Option<DateTime<Utc>>>(column).map(timestamp);
    Ok(Comment {
        id: row.get::<_, Uuid>("id").to_string(),
        issue_id: row.get::<_, Uuid>("issue_id").to_string(),
        parent_id: row.get::<_, Option<Uuid>>("parent_id").map(|id| id.to_string()).unwrap_or_default(),
        author_id: row.get::<_, Uuid>("author_id").to_string(),
        author_username: row.get("author_username"),
        content: row.get("content"),
        create_time: time("create_time"),
        update_time: time("update_time"),
        delete_time: time("delete_time"),
    })
}

/// A comment to add.
#[derive(Clone, Debug)]
pub struct NewComment {
    pub author_id: Uuid,
    pub issue_id: Uuid,
    pub parent_id: Option<Uuid>,
    pub content: String,
}

/// Adds the comments whose issue and parent exist and are not deleted. Waits for locked issues.
const CREATE_COMMENTS: &str = "-- create_comments
    INSERT INTO comments (id, issue_id, parent_id, author_id, content)
    SELECT new.id, new.issue_id, new.parent_id, new.author_id, new.content
    FROM unnest(
        /* id */ $1::uuid[],
        /* issue_id */ $2::uuid[],
        /* parent_id */ $3::uuid[],
        /* author_id */ $4::uuid[],
        /* content */ $5::text[]
    ) AS new (id, issue_id, parent_id, author_id, content)
    CROSS JOIN LATERAL (
        SELECT FROM issues WHERE issues.id = new.issue_id AND issues.delete_time IS NULL FOR KEY SHARE
    ) issue
    WHERE new.parent_id IS NULL OR EXISTS (
        SELECT FROM comments parent
        WHERE parent.id = new.parent_id AND parent.issue_id = new.issue_id AND parent.delete_time IS NULL)
    RETURNING id, create_time, (SELECT username FROM users WHERE users.id = author_id) AS author_username";
/// As [`CREATE_COMMENTS`], without the comments of locked issues.
const CREATE_COMMENTS_NOT_LOCKED: &str = "-- create_comments_not_locked
    INSERT INTO comments (id, issue_id, parent_id, author_id, content)
    SELECT new.id, new.issue_id, new.parent_id, new.author_id, new.content
    FROM unnest(
        /* id */ $1::uuid[],
        /* issue_id */ $2::uuid[],
        /* parent_id */ $3::uuid[],
        /* author_id */ $4::uuid[],
        /* content */ $5::text[]
    ) AS new (id, issue_id, parent_id, author_id, content)
    CROSS JOIN LATERAL (
        SELECT FROM issues WHERE issues.id = new.issue_id AND issues.delete_time IS NULL FOR KEY SHARE SKIP LOCKED
    ) issue
    WHERE new.parent_id IS NULL OR EXISTS (
        SELECT FROM comments parent
        WHERE parent.id = new.parent_id AND parent.issue_id = new.issue_id AND parent.delete_time IS NULL)
    RETURNING id, create_time, (SELECT username FROM users WHERE users.id = author_id) AS author_username";

/// Adds comments independently of each other, in one statement. Returns the outcome of each, in order.
///
/// With [`RowLocks::Wait`], a comment that was not added has the reason as its outcome.
pub async fn create_many(db: &Conn, comments: &[NewComment], row_locks: RowLocks) -> Result<Vec<Outcome<Comment>>> {
    let sql = match row_locks {
        RowLocks::Wait => CREATE_COMMENTS,
        RowLocks::Skip => CREATE_COMMENTS_NOT_LOCKED,
    };
    let ids: Vec<Uuid> = comments.iter().map(|_| Uuid::now_v7()).collect();
    let issue_ids: Vec<Uuid> = comments.iter().map(|comment| comment.issue_id).collect();
    let parent_ids: Vec<Option<Uuid>> = comments.iter().map(|comment| comment.parent_id).collect();
    let author_ids: Vec<Uuid> = comments.iter().map(|comment| comment.author_id).collect();
    let contents: Vec<&str> = comments.iter().map(|comment| &*comment.content).collect();
    let rows = db.query(sql, &[&ids, &issue_ids, &parent_ids, &author_ids, &contents]).await?;
    let mut added: HashMap<Uuid, Row> = rows.into_iter().map(|row| (row.get("id"), row)).collect();
    let mut outcomes = Vec::with_capacity(comments.len());
    for (id, comment) in ids.iter().zip(comments) {
        outcomes.push(match (added.remove(id), row_locks) {
            (Some(row), _) => Outcome::Done(Ok(created(&row, comment))),
            (None, RowLocks::Skip) => Outcome::Individual,
            (None, RowLocks::Wait) => Outcome::Done(Err(not_created(db, comment).await?)),
        });
    }
    Ok(outcomes)
}

fn created(row: &Row, comment: &NewComment) -> Comment {
    let create_time = Some(timestamp(row.get("create_time")));
    Comment {
        id: row.get::<_, Uuid>("id").to_string(),
        issue_id: comment.issue_id.to_string(),
        parent_id: comment.parent_id.map(|id| id.to_string()).unwrap_or_default(),
        author_id: comment.author_id.to_string(),
        author_username: row.get("author_username"),
        content: comment.content.clone(),
        create_time,
        update_time: create_time,
        delete_time: None,
    }
}

/// Returns why a comment was not added.
async fn not_created(db: &Conn, comment: &NewComment) -> Result<Error> {
    const SQL: &str = "-- why_comment_is_not_created
        SELECT
            issue.id IS NULL AS issue_is_missing,
            issue.delete_time IS NOT NULL AS issue_is_deleted,
            parent.id IS NULL AS parent_is_missing,
            parent.issue_id <> new.issue_id AS parent_is_elsewhere,
            parent.delete_time IS NOT NULL AS parent_is_deleted
        FROM (VALUES ($1::uuid, $2::uuid)) AS new (issue_id, parent_id)
        LEFT JOIN issues issue ON issue.id = new.issue_id
        LEFT JOIN comments parent ON parent.id = new.parent_id";
    let row = db.query_one(SQL, &[&comment.issue_id, &comment.parent_id]).await?;
    let is = |column: &str| row.get::<_, Option<bool>>(column).unwrap_or_default();
    if is("issue_is_missing") {
        return Ok(Error::not_found("issue", "comment.issue_id", comment.issue_id));
    }
    if is("issue_is_deleted") {
        return Ok(issue_deleted("comment.issue_id", comment.issue_id));
    }
    Ok(match comment.parent_id {
        Some(parent) if is("parent_is_missing") => Error::not_found("comment", "comment.parent_id", parent),
        Some(parent) if is("parent_is_elsewhere") => Error::invalid(
            "comment.parent_id",
            format!("comment \"{parent}\" is on another issue; expected one on the same issue"),
        ),
        Some(parent) if is("parent_is_deleted") => Error::precondition(
            "COMMENT_DELETED",
            "comment.parent_id",
            format!("comment \"{parent}\" is deleted and accepts no replies"),
        ),
        Some(_) | None => Error::Aborted {
            reason: "CONFLICT",
            message: "the issue or the parent comment was changed concurrently; try again".to_owned(),
        },
    })
}

/// Adds the same comment to each of these issues, which this transaction has locked.
pub async fn create_on_each(db: &Conn, author_id: Uuid, issue_ids: &[Uuid], content: &str) -> Result<()> {
    const SQL: &str = "-- create_comment_on_each
        INSERT INTO comments (id, issue_id, author_id, content)
        SELECT id, issue_id, $3, $4 FROM unnest($1::uuid[], $2::uuid[]) AS new (id, issue_id)";
    let ids: Vec<Uuid> = issue_ids.iter().map(|_| Uuid::now_v7()).collect();
    db.execute(SQL, &[&ids, &issue_ids, &author_id, &content]).await.map(drop)
}

/// Returns a page of the comments of an issue, oldest first, after the comment with id `after`. A missing issue has none.
pub async fn list(
    db: &Conn,
    issue_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<Comment>> {
    const SQL: &str = "-- list_comments
        SELECT comment.id, comment.issue_id, comment.parent_id, comment.author_id, author.username AS author_username,
            comment.content, comment.create_time, comment.update_time, comment.delete_time
        FROM comments comment JOIN users author ON author.id = comment.author_id
        WHERE comment.issue_id = $1 AND ($2::uuid IS NULL OR comment.id > $2) ORDER BY comment.id LIMIT $3";
    db.query_page(SQL, &[&issue_id, &after, &limit], bounds, from_row, Message::encoded_len).await
}

/// Returns the first `limit` comments of each of these issues, oldest first, with the ids of their issues. `more` if they
/// exceed `bytes_max`.
pub async fn first_of_each(
    db: &Conn,
    issue_ids: &[Uuid],
    limit: i64,
    bytes_max: usize,
) -> Result<Page<(Uuid, Comment)>> {
    // OFFSET 0 keeps the planner from joining all comments with a hash of the users before it returns the first row.
    const SQL: &str = "-- first_comments_of_issues
        SELECT comment.id, comment.issue_id, comment.parent_id, comment.author_id, author.username AS author_username,
            comment.content, comment.create_time, comment.update_time, comment.delete_time
        FROM unnest($1::uuid[]) AS requested (id)
        CROSS JOIN LATERAL (SELECT * FROM comments WHERE issue_id = requested.id ORDER BY id LIMIT $2) comment
        CROSS JOIN LATERAL (SELECT username FROM users WHERE users.id = comment.author_id OFFSET 0) author";
    if issue_ids.is_empty() {
        return Ok(Page { items: Vec::new(), more: false });
    }
    let bounds = PageBounds { rows_max: usize::MAX, bytes_max };
    let with_issue = |row: &Row| Ok((row.get("issue_id"), from_row(row)?));
    let size = |(_, comment): &(Uuid, Comment)| comment.encoded_len();
    let mut page = db.query_page(SQL, &[&issue_ids, &limit], bounds, with_issue, size).await?;
    // Not sorted by the statement, which would then read all rows before it returns the first.
    page.items.sort_by(|(_, left), (_, right)| left.id.cmp(&right.id));
    Ok(page)
}

/// Returns whether the issue exists, deleted or not.
pub async fn issue_exists(db: &Conn, issue_id: Uuid) -> Result<bool> {
    const SQL: &str = "-- issue_exists\nSELECT EXISTS (SELECT FROM issues WHERE id = $1) AS issue_exists";
    Ok(db.query_one(SQL, &[&issue_id]).await?.get("issue_exists"))
}

/// What [`change`] does to a comment.
#[derive(Clone, Copy, Debug)]
pub enum CommentChange<'a> {
    SetContent(&'a str),
    Delete,
}

/// Changes a comment. With `required_author`, only one by this author. `field` names its id in errors.
pub async fn change(
    db: &Conn,
    id: Uuid,
    required_author: Option<Uuid>,
    change: CommentChange<'_>,
    field: &str,
) -> Result<Comment> {
    const SQL: &str = "-- change_comment
        WITH locked AS (
            SELECT * FROM comments WHERE id = $1 FOR NO KEY UPDATE
        ), judged AS (
            SELECT locked.issue_id, CASE
                WHEN $2 <> locked.author_id THEN 'other author'
                WHEN locked.delete_time IS NOT NULL THEN 'deleted'
                WHEN issue.delete_time IS NOT NULL THEN 'issue deleted'
            END AS problem
            FROM locked JOIN issues issue ON issue.id = locked.issue_id
        ), changed AS (
            UPDATE comments comment SET
                content = coalesce($3, ''),
                update_time = CASE WHEN comment.content = $3 THEN comment.update_time ELSE now() END,
                delete_time = CASE WHEN $3 IS NULL THEN now() END
            FROM judged WHERE comment.id = $1 AND judged.problem IS NULL RETURNING comment.*
        )
        SELECT judged.problem, judged.issue_id AS judged_issue_id,
            changed.id, changed.issue_id, changed.parent_id, changed.author_id, author.username AS author_username,
            changed.content, changed.create_time, changed.update_time, changed.delete_time
        FROM judged LEFT JOIN changed ON true LEFT JOIN users author ON author.id = changed.author_id";
    let content = match change {
        CommentChange::SetContent(content) => Some(content),
        CommentChange::Delete => None,
    };
    let Some(row) = db.query_opt(SQL, &[&id, &required_author, &content]).await? else {
        return Err(Error::not_found("comment", field, id));
    };
    match row.get::<_, Option<&str>>("problem") {
        None => from_row(&row),
        Some("other author") => {
            Err(Error::PermissionDenied("only its author and administrators may change a comment".to_owned()))
        }
        Some("deleted") => Err(Error::precondition("COMMENT_DELETED", field, format!("comment \"{id}\" is deleted"))),
        Some(_) => Err(issue_deleted(field, row.get("judged_issue_id"))),
    }
}

fn issue_deleted(field: &str, id: Uuid) -> Error {
    Error::precondition("ISSUE_STATE", field, format!("issue \"{id}\" is deleted"))
}
