//! Session and API tokens, by the SHA-256 of what the client has. A session has no name.
//!
//! A token is found by the hash in an index, whose comparisons end at the first byte that differs. Their time tells
//! nothing that helps: who guesses tokens does not choose the bytes of their hashes, and from a hash that he knew he would
//! have no token. Nor is there anything to try out: a token is 256 random bits.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, PRUNED_AT_ONCE, Page, PageBounds, audit::By};
use crate::{
    auth::Caller,
    error::{Error, Result},
    pb::{ApiToken, Role},
    request::timestamp,
};

/// The columns of [`from_row`].
macro_rules! token_columns {
    () => {
        "id, user_id, name, create_time, revoke_time, expire_time"
    };
}

/// Who a valid token belongs to.
#[derive(Clone, Copy, Debug)]
pub struct FoundCaller {
    pub caller: Caller,
    /// For how long the token is valid still. None: it does not expire.
    pub valid_for: Option<Duration>,
}

/// Who tokens belong to, in order; none: it is not valid, or its user is disabled.
pub async fn find_callers(db: &Conn, sha256s: &[[u8; 32]]) -> Result<Vec<Result<Option<FoundCaller>>>> {
    // By the database's clock, as it is that which says when a token expires.
    const SQL: &str = "-- find_callers
        SELECT t.sha256, u.id, u.role, t.id, extract(epoch FROM t.expire_time - now())::float8
        FROM tokens t JOIN users u ON u.id = t.user_id
        WHERE t.sha256 = ANY ($1) AND t.revoke_time IS NULL AND (t.expire_time IS NULL OR t.expire_time > now())
            AND NOT u.disabled";
    let wanted: Vec<&[u8]> = sha256s.iter().map(|sha256| &sha256[..]).collect();
    let rows = db.query(SQL, &[&wanted]).await?;
    let found: HashMap<&[u8], &Row> = rows.iter().map(|row| (row.get(0), row)).collect();
    Ok(wanted.into_iter().map(|sha256| found.get(sha256).map(|row| found_caller(row)).transpose()).collect())
}

fn found_caller(row: &Row) -> Result<FoundCaller> {
    let role = Role::try_from(i32::from(row.get::<_, i16>(2))).map_err(|_| Error::Internal("unknown role"))?;
    let caller = Caller { user_id: row.get(1), role, token_id: row.get(3) };
    let valid_for =
        row.get::<_, Option<f64>>(4).map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default());
    Ok(FoundCaller { caller, valid_for })
}

/// A session to be kept.
pub struct NewSession<'a> {
    pub user_id: Uuid,
    /// What the password was checked against.
    pub password_hash: &'a SecretString,
    pub sha256: &'a [u8],
    pub hours: i32,
}

/// Keeps a session; answers when it expires. None: since the password was checked against the hash, the user was
/// disabled or has another password.
pub async fn create_session(db: &Conn, new: NewSession<'_>, by: By) -> Result<Option<DateTime<Utc>>> {
    // The lock makes whoever changes the user and then ends his sessions wait, and so end this one too.
    const SQL: &str = "-- create_session
        WITH made AS (
            INSERT INTO tokens (id, user_id, sha256, expire_time)
            SELECT $1, id, $4, now() + make_interval(hours => $5) FROM users
            WHERE id = $2 AND password_hash = $3 AND NOT disabled FOR SHARE
            RETURNING id, user_id, expire_time
        ), event AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id)
            SELECT 'LOGIN', user_id, $6::text::inet, user_id, id FROM made
        )
        SELECT expire_time FROM made";
    let NewSession { user_id, password_hash, sha256, hours } = new;
    let row = db
        .query_opt(SQL, &[&Uuid::now_v7(), &user_id, &password_hash.expose_secret(), &sha256, &hours, &by.address()])
        .await?;
    Ok(row.map(|row| row.get(0)))
}

/// None: the time at which it is to expire is not in the future.
pub async fn create_api_token(
    db: &Conn,
    user_id: Uuid,
    sha256: &[u8],
    name: &str,
    expire_time: Option<DateTime<Utc>>,
    by: By,
) -> Result<Option<ApiToken>> {
    const SQL: &str = concat!(
        "-- create_api_token
        WITH made AS (
            INSERT INTO tokens (id, user_id, sha256, name, expire_time)
            SELECT $1, $2, $3, $4, $5::timestamptz WHERE $5::timestamptz IS NULL OR $5::timestamptz > now()
            RETURNING ",
        token_columns!(),
        "
        ), event AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id, new_value)
            SELECT 'API_TOKEN_CREATED', $6, $7::text::inet, user_id, id, name FROM made
        )
        SELECT ",
        token_columns!(),
        " FROM made"
    );
    let id = Uuid::now_v7();
    let row = db.query_opt(SQL, &[&id, &user_id, &sha256, &name, &expire_time, &by.actor_id(), &by.address()]).await?;
    Ok(row.map(|row| from_row(&row)))
}

/// How many API tokens of a user are valid.
pub async fn count_api_tokens(db: &Conn, user_id: Uuid) -> Result<i64> {
    const SQL: &str = "-- count_api_tokens
        SELECT count(*) FROM tokens
        WHERE user_id = $1 AND name IS NOT NULL AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > now())";
    Ok(db.query_one(SQL, &[&user_id]).await?.get(0))
}

/// A user's API tokens that are not revoked, newest first, behind the one with id `after`.
pub async fn list_api_tokens(
    db: &Conn,
    user_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<ApiToken>> {
    const SQL: &str = concat!(
        "-- list_api_tokens\nSELECT ",
        token_columns!(),
        " FROM tokens
        WHERE user_id = $1 AND name IS NOT NULL AND revoke_time IS NULL AND ($2::uuid IS NULL OR id < $2)
        ORDER BY id DESC LIMIT $3"
    );
    db.query_page(SQL, &[&user_id, &after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Revokes an API token: one of `owner`'s, or anybody's if there is no `owner`. One that is revoked stays as it is, and it
/// is told whether this one was.
pub async fn revoke_api_token(db: &Conn, id: Uuid, owner: Option<Uuid>, by: By) -> Result<(ApiToken, bool)> {
    const SQL: &str = "-- revoke_api_token
        WITH found AS (
            SELECT id, user_id, name, create_time, revoke_time, expire_time FROM tokens
            WHERE id = $1 AND name IS NOT NULL AND ($2::uuid IS NULL OR user_id = $2) FOR NO KEY UPDATE
        ), revoked AS (
            UPDATE tokens t SET revoke_time = now() FROM found
            WHERE t.id = found.id AND found.revoke_time IS NULL
            RETURNING t.id, t.user_id, t.name, t.revoke_time
        ), event AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id, old_value)
            SELECT 'API_TOKEN_REVOKED', $3, $4::text::inet, user_id, id, name FROM revoked
        )
        SELECT f.id, f.user_id, f.name, f.create_time, coalesce(r.revoke_time, f.revoke_time), f.expire_time,
            r.id IS NOT NULL
        FROM found f LEFT JOIN revoked r ON r.id = f.id";
    let row = db.query_opt(SQL, &[&id, &owner, &by.actor_id(), &by.address()]).await?;
    row.map(|row| (from_row(&row), row.get(6))).ok_or_else(|| Error::not_found("api token", "id", id))
}

/// Ends a session, or revokes an API token.
pub async fn revoke(db: &Conn, id: Uuid, by: By) -> Result<()> {
    const SQL: &str = "-- revoke
        WITH ended AS (
            UPDATE tokens SET revoke_time = now() WHERE id = $1 AND revoke_time IS NULL RETURNING id, user_id, name
        )
        INSERT INTO audit_events (action, actor_id, address, user_id, token_id, old_value)
        SELECT CASE WHEN name IS NULL THEN 'LOGOUT' ELSE 'API_TOKEN_REVOKED' END, $2, $3::text::inet, user_id, id, name
        FROM ended";
    db.execute(SQL, &[&id, &by.actor_id(), &by.address()]).await.map(drop)
}

/// Ends a user's sessions, but for the one with the token `except`.
pub async fn end_sessions(db: &Conn, user_id: Uuid, except: Option<Uuid>, by: By) -> Result<()> {
    const SQL: &str = "-- end_sessions
        WITH ended AS (
            UPDATE tokens SET revoke_time = now()
            WHERE user_id = $1 AND name IS NULL AND revoke_time IS NULL AND expire_time > now() AND id IS DISTINCT FROM $2
            RETURNING id, user_id
        )
        INSERT INTO audit_events (action, actor_id, address, user_id, token_id)
        SELECT 'SESSION_ENDED', $3, $4::text::inet, user_id, id FROM ended";
    db.execute(SQL, &[&user_id, &except, &by.actor_id(), &by.address()]).await.map(drop)
}

/// Forgets sessions that have expired more than a day ago and API tokens that have ended more than 30 days ago, and how many
/// these were.
pub async fn prune_tokens(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_tokens
        DELETE FROM tokens WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM tokens
            WHERE CASE WHEN name IS NULL THEN expire_time < now() - interval '1 day'
                ELSE least(expire_time, revoke_time) < now() - interval '30 days' END
            LIMIT $1))";
    db.execute(SQL, &[&PRUNED_AT_ONCE]).await
}

/// Columns as in `token_columns!`.
fn from_row(row: &Row) -> ApiToken {
    ApiToken {
        id: row.get::<_, Uuid>(0).to_string(),
        user_id: row.get::<_, Uuid>(1).to_string(),
        name: row.get(2),
        create_time: Some(timestamp(row.get(3))),
        revoke_time: row.get::<_, Option<_>>(4).map(timestamp),
        expire_time: row.get::<_, Option<_>>(5).map(timestamp),
    }
}
