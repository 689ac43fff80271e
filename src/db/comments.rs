//! Comments.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use prost::Message;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds, batchers::Locked};
use crate::{
    batching::coalescer::Outcome,
    error::{Error, Result},
    pb::Comment,
    request::timestamp,
};

/// The columns of [`from_row`], of a comment `c` by the user `u`.
macro_rules! comment_columns {
    () => {
        "c.id, c.issue_id, c.parent_id, c.author_id, u.username, c.content, c.create_time, c.update_time, c.delete_time"
    };
}

/// Columns as in `comment_columns!`.
fn from_row(row: &Row) -> Result<Comment> {
    let time = |index: usize| row.get::<_, Option<DateTime<Utc>>>(index).map(timestamp);
    Ok(Comment {
        id: row.get::<_, Uuid>(0).to_string(),
        issue_id: row.get::<_, Uuid>(1).to_string(),
        parent_id: row.get::<_, Option<Uuid>>(2).map(|id| id.to_string()).unwrap_or_default(),
        author_id: row.get::<_, Uuid>(3).to_string(),
        author_username: row.get(4),
        content: row.get(5),
        create_time: time(6),
        update_time: time(7),
        delete_time: time(8),
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

/// Adds comments. The issue and the parent of each must be there and not deleted.
macro_rules! create_comments {
    ($name:literal, $lock:literal) => {
        concat!(
            "-- ",
            $name,
            "
        INSERT INTO comments (id, issue_id, parent_id, author_id, content)
        SELECT n.id, n.issue_id, n.parent_id, n.author_id, n.content
        FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[]) AS n (id, issue_id, parent_id, author_id, content)
        CROSS JOIN LATERAL (
            SELECT FROM issues i WHERE i.id = n.issue_id AND i.delete_time IS NULL FOR KEY SHARE",
            $lock,
            "
        ) i
        WHERE n.parent_id IS NULL OR EXISTS (
            SELECT FROM comments p WHERE p.id = n.parent_id AND p.issue_id = n.issue_id AND p.delete_time IS NULL)
        RETURNING id, create_time, (SELECT username FROM users u WHERE u.id = author_id)"
        )
    };
}

/// Adds comments independently of each other, in one statement. If that does not wait for locks, those that it has not
/// added are to be added alone; else it is told why they cannot be.
pub async fn create_many(db: &Conn, comments: &[NewComment], locked: Locked) -> Result<Vec<Outcome<Comment>>> {
    let sql = match locked {
        Locked::Wait => create_comments!("create_comments", ""),
        Locked::Skip => create_comments!("create_comments_not_locked", " SKIP LOCKED"),
    };
    let ids: Vec<Uuid> = comments.iter().map(|_| Uuid::now_v7()).collect();
    let issue_ids: Vec<Uuid> = comments.iter().map(|comment| comment.issue_id).collect();
    let parent_ids: Vec<Option<Uuid>> = comments.iter().map(|comment| comment.parent_id).collect();
    let author_ids: Vec<Uuid> = comments.iter().map(|comment| comment.author_id).collect();
    let contents: Vec<&str> = comments.iter().map(|comment| &*comment.content).collect();
    let rows = db.query(sql, &[&ids, &issue_ids, &parent_ids, &author_ids, &contents]).await?;
    let mut added: HashMap<Uuid, Row> = rows.into_iter().map(|row| (row.get(0), row)).collect();
    let mut outcomes = Vec::with_capacity(comments.len());
    for (id, comment) in ids.iter().zip(comments) {
        outcomes.push(match (added.remove(id), locked) {
            (Some(row), _) => Outcome::Done(Ok(created(&row, comment))),
            (None, Locked::Skip) => Outcome::Alone,
            (None, Locked::Wait) => Outcome::Done(Err(not_created(db, comment).await?)),
        });
    }
    Ok(outcomes)
}

fn created(row: &Row, comment: &NewComment) -> Comment {
    let create_time = Some(timestamp(row.get(1)));
    Comment {
        id: row.get::<_, Uuid>(0).to_string(),
        issue_id: comment.issue_id.to_string(),
        parent_id: comment.parent_id.map(|id| id.to_string()).unwrap_or_default(),
        author_id: comment.author_id.to_string(),
        author_username: row.get(2),
        content: comment.content.clone(),
        create_time,
        update_time: create_time,
        delete_time: None,
    }
}

/// Why a comment was not added.
async fn not_created(db: &Conn, comment: &NewComment) -> Result<Error> {
    const SQL: &str = "-- why_comment_is_not_created
        SELECT i.id IS NULL, i.delete_time IS NOT NULL, p.id IS NULL, p.issue_id <> n.issue_id, p.delete_time IS NOT NULL
        FROM (VALUES ($1::uuid, $2::uuid)) AS n (issue_id, parent_id)
        LEFT JOIN issues i ON i.id = n.issue_id LEFT JOIN comments p ON p.id = n.parent_id";
    let row = db.query_one(SQL, &[&comment.issue_id, &comment.parent_id]).await?;
    let is = |index: usize| row.get::<_, Option<bool>>(index).unwrap_or_default();
    if is(0) {
        return Ok(Error::not_found("issue", "comment.issue_id", comment.issue_id));
    }
    if is(1) {
        return Ok(issue_deleted("comment.issue_id", comment.issue_id));
    }
    Ok(match comment.parent_id {
        Some(parent) if is(2) => Error::not_found("comment", "comment.parent_id", parent),
        Some(parent) if is(3) => {
            Error::invalid("comment.parent_id", format!("comment \"{parent}\" is on another issue"))
        }
        Some(parent) if is(4) => Error::precondition(
            "COMMENT_DELETED",
            "comment.parent_id",
            format!("comment \"{parent}\" is deleted and takes no replies"),
        ),
        Some(_) | None => Error::Aborted {
            reason: "CONFLICT",
            message: "the issue or the parent was changed at this moment; try again".to_owned(),
        },
    })
}

/// Adds the same comment to each of these issues, which the caller has just changed in this transaction.
pub async fn create_on_each(db: &Conn, author_id: Uuid, issue_ids: &[Uuid], content: &str) -> Result<()> {
    const SQL: &str = "-- create_comment_on_each
        INSERT INTO comments (id, issue_id, author_id, content)
        SELECT id, issue_id, $3, $4 FROM unnest($1::uuid[], $2::uuid[]) AS n (id, issue_id)";
    let ids: Vec<Uuid> = issue_ids.iter().map(|_| Uuid::now_v7()).collect();
    db.execute(SQL, &[&ids, &issue_ids, &author_id, &content]).await.map(drop)
}

/// An issue's comments, oldest first, behind the one with id `after`. A missing issue has none.
pub async fn list(
    db: &Conn,
    issue_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<Comment>> {
    const SQL: &str = concat!(
        "-- list_comments\nSELECT ",
        comment_columns!(),
        " FROM comments c JOIN users u ON u.id = c.author_id
        WHERE c.issue_id = $1 AND ($2::uuid IS NULL OR c.id > $2) ORDER BY c.id LIMIT $3"
    );
    db.query_page(SQL, &[&issue_id, &after, &limit], bounds, from_row, Message::encoded_len).await
}

/// The first `limit` comments of each of these issues, oldest first, with the ids of their issues; `more` if they do not
/// fit into so many bytes.
pub async fn first_of_each(
    db: &Conn,
    issue_ids: &[Uuid],
    limit: i64,
    bytes_max: usize,
) -> Result<Page<(Uuid, Comment)>> {
    // Behind the fence (OFFSET 0) users are looked up row by row, so that the first comments come at once.
    const SQL: &str = concat!(
        "-- first_comments_of_issues\nSELECT ",
        comment_columns!(),
        " FROM unnest($1::uuid[]) AS wanted (id)
        CROSS JOIN LATERAL (SELECT * FROM comments WHERE issue_id = wanted.id ORDER BY id LIMIT $2) c
        CROSS JOIN LATERAL (SELECT username FROM users WHERE users.id = c.author_id OFFSET 0) u"
    );
    if issue_ids.is_empty() {
        return Ok(Page { items: Vec::new(), more: false });
    }
    let bounds = PageBounds { rows_max: usize::MAX, bytes_max };
    let with_issue = |row: &Row| Ok((row.get(1), from_row(row)?));
    let size = |(_, comment): &(Uuid, Comment)| comment.encoded_len();
    let mut page = db.query_page(SQL, &[&issue_ids, &limit], bounds, with_issue, size).await?;
    // Not by the statement, which would read all of them before it answers one.
    page.items.sort_by(|(_, left), (_, right)| left.id.cmp(&right.id));
    Ok(page)
}

/// Whether there is such an issue, deleted or not.
pub async fn issue_exists(db: &Conn, issue_id: Uuid) -> Result<bool> {
    const SQL: &str = "-- issue_exists\nSELECT EXISTS (SELECT FROM issues WHERE id = $1)";
    Ok(db.query_one(SQL, &[&issue_id]).await?.get(0))
}

/// What [`change`] does to a comment.
#[derive(Clone, Copy, Debug)]
pub enum CommentChange<'a> {
    SetContent(&'a str),
    Delete,
}

/// Changes a comment: one of `author`'s, or anybody's if there is no `author`. `field` names its id in errors.
pub async fn change(
    db: &Conn,
    id: Uuid,
    author: Option<Uuid>,
    change: CommentChange<'_>,
    field: &str,
) -> Result<Comment> {
    const SQL: &str = concat!(
        "-- change_comment
        WITH old AS (SELECT * FROM comments WHERE id = $1 FOR NO KEY UPDATE),
        judged AS (
            SELECT CASE
                WHEN $2 <> o.author_id THEN 'not yours'
                WHEN o.delete_time IS NOT NULL THEN 'deleted'
                WHEN i.delete_time IS NOT NULL THEN 'issue deleted'
            END AS problem, o.issue_id
            FROM old o JOIN issues i ON i.id = o.issue_id
        ), c AS (
            UPDATE comments c SET
                content = coalesce($3, ''),
                update_time = CASE WHEN content = $3 THEN c.update_time ELSE now() END,
                delete_time = CASE WHEN $3 IS NULL THEN now() END
            FROM judged WHERE c.id = $1 AND judged.problem IS NULL RETURNING c.*
        )
        SELECT ",
        comment_columns!(),
        ", judged.problem, judged.issue_id FROM judged LEFT JOIN c ON true LEFT JOIN users u ON u.id = c.author_id"
    );
    let content = match change {
        CommentChange::SetContent(content) => Some(content),
        CommentChange::Delete => None,
    };
    let Some(row) = db.query_opt(SQL, &[&id, &author, &content]).await? else {
        return Err(Error::not_found("comment", field, id));
    };
    match row.get::<_, Option<&str>>(9) {
        None => from_row(&row),
        Some("not yours") => {
            Err(Error::PermissionDenied("only its author and administrators may change a comment".to_owned()))
        }
        Some("deleted") => Err(Error::precondition("COMMENT_DELETED", field, format!("comment \"{id}\" is deleted"))),
        Some(_) => Err(issue_deleted(field, row.get(10))),
    }
}

fn issue_deleted(field: &str, id: Uuid) -> Error {
    Error::precondition("ISSUE_STATE", field, format!("issue \"{id}\" is deleted"))
}
