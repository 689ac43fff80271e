//! Comments.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds};
use crate::{
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
pub struct NewComment<'a> {
    pub issue_id: Uuid,
    pub parent_id: Option<Uuid>,
    pub content: &'a str,
}

/// Adds a comment, in one statement. The issue and the parent must be there and not deleted.
pub async fn create(db: &Conn, author_id: Uuid, comment: &NewComment<'_>) -> Result<Comment> {
    const SQL: &str = concat!(
        "-- create_comment
        WITH issue AS (SELECT delete_time FROM issues WHERE id = $2),
        parent AS (SELECT issue_id, delete_time FROM comments WHERE id = $3),
        judged AS (
            SELECT CASE
                WHEN NOT EXISTS (SELECT FROM issue) THEN 'no issue'
                WHEN (SELECT delete_time FROM issue) IS NOT NULL THEN 'issue deleted'
                WHEN $3 IS NULL THEN NULL
                WHEN NOT EXISTS (SELECT FROM parent) THEN 'no parent'
                WHEN (SELECT issue_id FROM parent) <> $2 THEN 'parent elsewhere'
                WHEN (SELECT delete_time FROM parent) IS NOT NULL THEN 'parent deleted'
            END AS problem
        ), c AS (
            INSERT INTO comments (id, issue_id, parent_id, author_id, content)
            SELECT $1, $2, $3, $4, $5 FROM judged WHERE problem IS NULL RETURNING *
        )
        SELECT ",
        comment_columns!(),
        ", judged.problem FROM judged LEFT JOIN c ON true LEFT JOIN users u ON u.id = c.author_id"
    );
    let NewComment { issue_id, parent_id, content } = comment;
    let row = db.query_one(SQL, &[&Uuid::now_v7(), issue_id, parent_id, &author_id, content]).await?;
    let parent = parent_id.unwrap_or_default();
    match row.get::<_, Option<&str>>(9) {
        None => from_row(&row),
        Some("no issue") => Err(Error::not_found("issue", "comment.issue_id", issue_id)),
        Some("issue deleted") => Err(issue_deleted("comment.issue_id", *issue_id)),
        Some("no parent") => Err(Error::not_found("comment", "comment.parent_id", parent)),
        Some("parent elsewhere") => {
            Err(Error::invalid("comment.parent_id", format!("comment \"{parent}\" is on another issue")))
        }
        Some(_) => Err(Error::precondition(
            "COMMENT_DELETED",
            "comment.parent_id",
            format!("comment \"{parent}\" is deleted and takes no replies"),
        )),
    }
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
    db.query_page(SQL, &[&issue_id, &after, &limit], bounds, from_row, prost::Message::encoded_len).await
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
