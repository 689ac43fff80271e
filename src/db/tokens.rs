//! Session and API tokens, by the SHA-256 of what the client has. A session has no name.
//!
//! The look-up compares hashes in an index, and its time depends on the first byte that differs. That reveals nothing
//! useful: a guesser does not choose the bytes of the hashes, and a hash does not reveal its token, which is 256 random
//! bits.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    PRUNE_BATCH_ROWS,
    audit::By,
    conn::Conn,
    page::{Page, PageBounds},
    time::timestamp,
};
use crate::{
    error::{Error, Result},
    pb::{ApiToken, Role},
};

/// The owner of a valid token.
#[derive(Clone, Copy, Debug)]
pub struct TokenOwner {
    pub token_id: Uuid,
    pub user_id: Uuid,
    pub role: Role,
    /// How long the token is still valid. `None`: it does not expire.
    pub valid_for: Option<Duration>,
}

/// Returns the owners of tokens, in order. `None`: the token is not valid, or its user is disabled.
pub async fn find_owners(db: &Conn, sha256s: &[[u8; 32]]) -> Result<Vec<Result<Option<TokenOwner>>>> {
    // The clock of the database decides when a token expires.
    const SQL: &str = "-- find_callers
        SELECT token.sha256, owner.id AS user_id, owner.role, token.id AS token_id,
            extract(epoch FROM token.expire_time - now())::float8 AS valid_for_seconds
        FROM tokens token JOIN users owner ON owner.id = token.user_id
        WHERE token.sha256 = ANY ($1) AND token.revoke_time IS NULL
            AND (token.expire_time IS NULL OR token.expire_time > now()) AND NOT owner.disabled";
    let requested: Vec<&[u8]> = sha256s.iter().map(|sha256| &sha256[..]).collect();
    let rows = db.query(SQL, &[&requested]).await?;
    let found: HashMap<&[u8], &Row> = rows.iter().map(|row| (row.get("sha256"), row)).collect();
    Ok(requested.into_iter().map(|sha256| found.get(sha256).map(|row| owner_from_row(row)).transpose()).collect())
}

fn owner_from_row(row: &Row) -> Result<TokenOwner> {
    let seconds: Option<f64> = row.get("valid_for_seconds");
    Ok(TokenOwner {
        token_id: row.get("token_id"),
        user_id: row.get("user_id"),
        role: Role::try_from(i32::from(row.get::<_, i16>("role"))).map_err(|_| Error::Internal("unknown role"))?,
        valid_for: seconds.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default()),
    })
}

/// A session to create.
pub struct NewSession<'a> {
    pub user_id: Uuid,
    /// The hash that the password was checked against.
    pub password_hash: &'a SecretString,
    pub sha256: &'a [u8],
    pub hours: i32,
}

/// Creates a session, and returns when it expires. `None`: since the password was checked, the user was disabled or has
/// another password.
pub async fn create_session(db: &Conn, new: NewSession<'_>, by: By) -> Result<Option<Timestamp>> {
    // FOR SHARE: a transaction that changes the user and then ends the sessions waits, and ends this one too.
    const SQL: &str = "-- create_session
        WITH created AS (
            INSERT INTO tokens (id, user_id, sha256, expire_time)
            SELECT /* id */ $1, id, /* sha256 */ $4, now() + make_interval(hours => /* hours */ $5) FROM users
            WHERE id = /* user_id */ $2 AND password_hash = /* password_hash */ $3 AND NOT disabled FOR SHARE
            RETURNING id, user_id, expire_time
        ), logged AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id)
            SELECT 'LOGIN', user_id, /* address */ $6::text::inet, user_id, id FROM created
        )
        SELECT expire_time FROM created";
    let NewSession { user_id, password_hash, sha256, hours } = new;
    let row = db
        .query_opt(SQL, &[&Uuid::now_v7(), &user_id, &password_hash.expose_secret(), &sha256, &hours, &by.address()])
        .await?;
    Ok(row.map(|row| timestamp(row.get("expire_time"))))
}

/// Creates an API token. `None`: `expire_time` is not in the future.
pub async fn create_api_token(
    db: &Conn,
    user_id: Uuid,
    sha256: &[u8],
    name: &str,
    expire_time: Option<DateTime<Utc>>,
    by: By,
) -> Result<Option<ApiToken>> {
    const SQL: &str = "-- create_api_token
        WITH created AS (
            INSERT INTO tokens (id, user_id, sha256, name, expire_time)
            SELECT /* id */ $1, /* user_id */ $2, /* sha256 */ $3, /* name */ $4, /* expire_time */ $5::timestamptz
            WHERE /* expire_time */ $5::timestamptz IS NULL OR /* expire_time */ $5::timestamptz > now()
            RETURNING id, user_id, name, create_time, revoke_time, expire_time
        ), logged AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id, new_value)
            SELECT 'API_TOKEN_CREATED', /* actor_id */ $6, /* address */ $7::text::inet, user_id, id, name FROM created
        )
        SELECT id, user_id, name, create_time, revoke_time, expire_time FROM created";
    let id = Uuid::now_v7();
    let row = db.query_opt(SQL, &[&id, &user_id, &sha256, &name, &expire_time, &by.actor_id(), &by.address()]).await?;
    Ok(row.map(|row| from_row(&row)))
}

/// Returns the number of valid API tokens of a user.
pub async fn count_api_tokens(db: &Conn, user_id: Uuid) -> Result<i64> {
    const SQL: &str = "-- count_api_tokens
        SELECT count(*) AS token_count FROM tokens
        WHERE user_id = $1 AND name IS NOT NULL AND revoke_time IS NULL AND (expire_time IS NULL OR expire_time > now())";
    Ok(db.query_one(SQL, &[&user_id]).await?.get("token_count"))
}

/// Returns a page of the API tokens of a user that are not revoked, newest first, after the one with id `after`.
pub async fn list_api_tokens(
    db: &Conn,
    user_id: Uuid,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<ApiToken>> {
    const SQL: &str = "-- list_api_tokens
        SELECT id, user_id, name, create_time, revoke_time, expire_time FROM tokens
        WHERE user_id = $1 AND name IS NOT NULL AND revoke_time IS NULL AND ($2::uuid IS NULL OR id < $2)
        ORDER BY id DESC LIMIT $3";
    db.query_page(SQL, &[&user_id, &after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Revokes an API token. With `owner`, only one of this user. A revoked token stays as it is. Returns the token and whether
/// it was revoked by this call.
pub async fn revoke_api_token(db: &Conn, id: Uuid, owner: Option<Uuid>, by: By) -> Result<(ApiToken, bool)> {
    const SQL: &str = "-- revoke_api_token
        WITH found AS (
            SELECT id, user_id, name, create_time, revoke_time, expire_time FROM tokens
            WHERE id = $1 AND name IS NOT NULL AND ($2::uuid IS NULL OR user_id = $2) FOR NO KEY UPDATE
        ), revoked AS (
            UPDATE tokens SET revoke_time = now() FROM found
            WHERE tokens.id = found.id AND found.revoke_time IS NULL
            RETURNING tokens.id, tokens.user_id, tokens.name, tokens.revoke_time
        ), logged AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, token_id, old_value)
            SELECT 'API_TOKEN_REVOKED', $3, $4::text::inet, user_id, id, name FROM revoked
        )
        SELECT found.id, found.user_id, found.name, found.create_time,
            coalesce(revoked.revoke_time, found.revoke_time) AS revoke_time, found.expire_time,
            revoked.id IS NOT NULL AS is_revoked_now
        FROM found LEFT JOIN revoked ON revoked.id = found.id";
    let row = db.query_opt(SQL, &[&id, &owner, &by.actor_id(), &by.address()]).await?;
    row.map(|row| (from_row(&row), row.get("is_revoked_now"))).ok_or_else(|| Error::not_found("api token", "id", id))
}

/// Ends a session or revokes an API token.
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

/// Ends the sessions of a user, except the one with the token `except`.
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

/// Deletes up to [`PRUNE_BATCH_ROWS`] sessions that expired more than a day ago and API tokens that expired or were revoked
/// more than 30 days ago. Returns how many.
pub async fn prune_tokens(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_tokens
        DELETE FROM tokens WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM tokens
            WHERE CASE WHEN name IS NULL THEN expire_time < now() - interval '1 day'
                ELSE least(expire_time, revoke_time) < now() - interval '30 days' END
            LIMIT $1))";
    db.execute(SQL, &[&PRUNE_BATCH_ROWS]).await
}

/// Returns the API token in a row that has its columns.
fn from_row(row: &Row) -> ApiToken {
    ApiToken {
        id: row.get::<_, Uuid>("id").to_string(),
        user_id: row.get::<_, Uuid>("user_id").to_string(),
        name: row.get("name"),
        create_time: Some(timestamp(row.get("create_time"))),
        revoke_time: row.get::<_, Option<_>>("revoke_time").map(timestamp),
        expire_time: row.get::<_, Option<_>>("expire_time").map(timestamp),
    }
}
