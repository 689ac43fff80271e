//! Session and API tokens, by the SHA-256 of what the client has.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds};
use crate::{
    auth::Caller,
    error::{Error, Result},
    pb::{ApiToken, Role},
    request::timestamp,
};

/// Who a token belongs to, if it is valid and its user is not disabled.
pub async fn find_caller(db: &Conn, sha256: &[u8]) -> Result<Option<Caller>> {
    const SQL: &str = "-- find_caller
        SELECT u.id, u.role, t.id FROM tokens t JOIN users u ON u.id = t.user_id
        WHERE t.sha256 = $1 AND t.revoke_time IS NULL AND (t.expire_time IS NULL OR t.expire_time > now()) AND NOT u.disabled";
    let Some(row) = db.query_opt(SQL, &[&sha256]).await? else { return Ok(None) };
    let role = Role::try_from(i32::from(row.get::<_, i16>(1))).map_err(|_| Error::Internal("unknown role"))?;
    Ok(Some(Caller { user_id: row.get(0), role, token_id: row.get(2) }))
}

/// Keeps a session; answers when it expires. None: since the password was checked against the hash, the user was
/// disabled or has another password.
pub async fn create_session(
    db: &Conn,
    user_id: Uuid,
    password_hash: &str,
    sha256: &[u8],
    hours: i32,
) -> Result<Option<DateTime<Utc>>> {
    // The lock makes whoever changes the user and then ends his sessions wait, and so end this one too.
    const SQL: &str = "-- create_session
        INSERT INTO tokens (id, user_id, sha256, expire_time)
        SELECT $1, id, $4, now() + make_interval(hours => $5) FROM users
        WHERE id = $2 AND password_hash = $3 AND NOT disabled FOR SHARE
        RETURNING expire_time";
    let row = db.query_opt(SQL, &[&Uuid::now_v7(), &user_id, &password_hash, &sha256, &hours]).await?;
    Ok(row.map(|row| row.get(0)))
}

pub async fn create_api_token(db: &Conn, user_id: Uuid, sha256: &[u8], name: &str) -> Result<ApiToken> {
    const SQL: &str = "-- create_api_token
        INSERT INTO tokens (id, user_id, sha256, name) VALUES ($1, $2, $3, $4)
        RETURNING id, user_id, name, create_time, revoke_time";
    Ok(from_row(&db.query_one(SQL, &[&Uuid::now_v7(), &user_id, &sha256, &name]).await?))
}

/// A user's API tokens that are not revoked, newest first, behind the one with id `after`.
pub async fn list_api_tokens(
    db: &Conn,
    user_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<ApiToken>> {
    const SQL: &str = "-- list_api_tokens
        SELECT id, user_id, name, create_time, revoke_time FROM tokens
        WHERE user_id = $1 AND name IS NOT NULL AND revoke_time IS NULL AND ($2::uuid IS NULL OR id < $2)
        ORDER BY id DESC LIMIT $3";
    db.query_page(SQL, &[&user_id, &after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Revokes an API token: one of `owner`'s, or anybody's if there is no `owner`.
pub async fn revoke_api_token(db: &Conn, id: Uuid, owner: Option<Uuid>) -> Result<ApiToken> {
    const SQL: &str = "-- revoke_api_token
        UPDATE tokens SET revoke_time = coalesce(revoke_time, now())
        WHERE id = $1 AND name IS NOT NULL AND ($2::uuid IS NULL OR user_id = $2)
        RETURNING id, user_id, name, create_time, revoke_time";
    let row = db.query_opt(SQL, &[&id, &owner]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("api token", "id", id))
}

/// Ends a session, or revokes an API token.
pub async fn revoke(db: &Conn, id: Uuid) -> Result<()> {
    const SQL: &str = "-- revoke
        UPDATE tokens SET revoke_time = coalesce(revoke_time, now()) WHERE id = $1";
    db.execute(SQL, &[&id]).await.map(drop)
}

/// Ends a user's sessions, but for the one with the token `except`.
pub async fn end_sessions(db: &Conn, user_id: Uuid, except: Option<Uuid>) -> Result<()> {
    const SQL: &str = "-- end_sessions
        UPDATE tokens SET revoke_time = now()
        WHERE user_id = $1 AND expire_time IS NOT NULL AND revoke_time IS NULL AND id IS DISTINCT FROM $2";
    db.execute(SQL, &[&user_id, &except]).await.map(drop)
}

/// Forgets sessions that have expired.
pub async fn prune_sessions(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_sessions
        DELETE FROM tokens WHERE expire_time < now() - interval '1 day'";
    db.execute(SQL, &[]).await
}

fn from_row(row: &Row) -> ApiToken {
    ApiToken {
        id: row.get::<_, Uuid>(0).to_string(),
        user_id: row.get::<_, Uuid>(1).to_string(),
        name: row.get(2),
        create_time: Some(timestamp(row.get(3))),
        revoke_time: row.get::<_, Option<_>>(4).map(timestamp),
    }
}
