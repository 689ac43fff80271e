//! Users.

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds, audit::By, tokens};
use crate::{
    error::{Error, Result},
    pb::{Role, User},
    request::timestamp,
};

/// The columns of [`from_row`].
macro_rules! user_columns {
    () => {
        "id, username, role, disabled, create_time, update_time"
    };
}

/// The same, with the table's name.
macro_rules! u_user_columns {
    () => {
        "u.id, u.username, u.role, u.disabled, u.create_time, u.update_time"
    };
}

/// Roles as events tell them, in the order of their numbers.
macro_rules! role_names {
    () => {
        "ARRAY['VIEWER', 'MEMBER', 'ADMIN']"
    };
}

/// A user who signs in, disabled or not.
pub struct Credentials {
    pub user: User,
    pub user_id: Uuid,
    pub password_hash: SecretString,
}

/// A user to be made.
pub struct NewUser<'a> {
    pub username: &'a str,
    pub role: Role,
    pub disabled: bool,
    pub password_hash: &'a SecretString,
}

pub async fn create(db: &Conn, new: NewUser<'_>, by: By) -> Result<User> {
    const SQL: &str = concat!(
        "-- create_user
        WITH made AS (
            INSERT INTO users (id, username, role, disabled, password_hash) VALUES ($1, $2, $3, $4, $5) RETURNING ",
        user_columns!(),
        "
        ), event AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, new_value)
            SELECT 'USER_CREATED', $6::uuid, $7::text::inet, id, (",
        role_names!(),
        ")[role] FROM made
            UNION ALL SELECT 'USER_DISABLED', $6::uuid, $7::text::inet, id, NULL FROM made WHERE disabled
        )
        SELECT ",
        user_columns!(),
        " FROM made"
    );
    let NewUser { username, role, disabled, password_hash } = new;
    let (id, role, hash) = (Uuid::now_v7(), role as i16, password_hash.expose_secret());
    let row = db.query_one(SQL, &[&id, &username, &role, &disabled, &hash, &by.actor_id(), &by.address()]).await;
    row.map(|row| from_row(&row)).map_err(|error| {
        error.on_constraint("users_username_key", || {
            Error::already_exists("user", "username", "user.username", username)
        })
    })
}

pub async fn get(db: &Conn, id: Uuid) -> Result<User> {
    const SQL: &str = concat!("-- get_user\nSELECT ", user_columns!(), " FROM users WHERE id = $1");
    let row = db.query_opt(SQL, &[&id]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "id", id))
}

/// As [`get`]; until the transaction ends nobody else changes the user, or counts what belongs to him.
pub async fn lock(db: &Conn, id: Uuid) -> Result<User> {
    const SQL: &str = concat!("-- lock_user\nSELECT ", user_columns!(), " FROM users WHERE id = $1 FOR NO KEY UPDATE");
    let row = db.query_opt(SQL, &[&id]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "id", id))
}

pub async fn get_by_username(db: &Conn, username: &str) -> Result<User> {
    const SQL: &str =
        concat!("-- get_user_by_username\nSELECT ", user_columns!(), " FROM users WHERE lower(username) = lower($1)");
    let row = db.query_opt(SQL, &[&username]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "username", username))
}

/// A user, disabled or not, and his password's hash.
pub async fn find_credentials(db: &Conn, username: &str) -> Result<Option<Credentials>> {
    const SQL: &str = concat!(
        "-- find_credentials\nSELECT ",
        user_columns!(),
        ", password_hash FROM users WHERE lower(username) = lower($1)"
    );
    let row = db.query_opt(SQL, &[&username]).await?;
    Ok(row.map(|row| Credentials {
        user: from_row(&row),
        user_id: row.get(0),
        password_hash: row.get::<_, String>(6).into(),
    }))
}

pub async fn password_hash(db: &Conn, id: Uuid) -> Result<SecretString> {
    const SQL: &str = "-- password_hash\nSELECT password_hash FROM users WHERE id = $1";
    Ok(db.query_one(SQL, &[&id]).await?.get::<_, String>(0).into())
}

/// Whether the password's hash was still `old_hash`; if not, nothing is changed.
pub async fn change_password_hash(
    db: &Conn,
    id: Uuid,
    old_hash: &SecretString,
    new_hash: &SecretString,
    by: By,
) -> Result<bool> {
    const SQL: &str = "-- change_password_hash
        WITH changed AS (
            UPDATE users SET password_hash = $3, update_time = now() WHERE id = $1 AND password_hash = $2 RETURNING id
        )
        INSERT INTO audit_events (action, actor_id, address, user_id)
        SELECT 'PASSWORD_CHANGED', $4, $5::text::inet, id FROM changed";
    let (old_hash, new_hash) = (old_hash.expose_secret(), new_hash.expose_secret());
    Ok(db.execute(SQL, &[&id, &old_hash, &new_hash, &by.actor_id(), &by.address()]).await? == 1)
}

/// Sets a user's password hash and revokes all sessions of the user. API tokens stay valid. `NotFound` names `user_id`.
///
/// Takes two statements: call it in a transaction.
pub async fn reset_password(db: &Conn, id: Uuid, new_hash: &SecretString, by: By) -> Result<()> {
    const SQL: &str = "-- reset_password
        WITH changed AS (
            UPDATE users SET password_hash = $2, update_time = now() WHERE id = $1 RETURNING id
        )
        INSERT INTO audit_events (action, actor_id, address, user_id)
        SELECT 'PASSWORD_CHANGED', $3, $4::text::inet, id FROM changed";
    if db.execute(SQL, &[&id, &new_hash.expose_secret(), &by.actor_id(), &by.address()]).await? == 0 {
        return Err(Error::not_found("user", "user_id", id));
    }
    // In a statement of its own: it must see the sessions of logins that the update waited for.
    tokens::end_sessions(db, id, None, by).await
}

/// By username, behind the user named `after`.
pub async fn list(db: &Conn, after: Option<&str>, limit: i64, bounds: PageBounds) -> Result<Page<User>> {
    const SQL: &str = concat!(
        "-- list_users\nSELECT ",
        user_columns!(),
        " FROM users WHERE $1::text IS NULL OR lower(username) > lower($1) ORDER BY lower(username) LIMIT $2"
    );
    db.query_page(SQL, &[&after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Sets what is given. At least one enabled administrator is left, or it is a failed precondition.
///
/// Takes more than one statement: call it in a transaction.
pub async fn update(db: &Conn, id: Uuid, role: Option<Role>, disabled: Option<bool>, by: By) -> Result<User> {
    // Changes of administrators take turns, so that two of them cannot demote each other. Imports and assignments, which
    // refer to users, are not held up by this lock.
    const LOCK: &str = "-- lock_administrators
        SELECT id FROM users WHERE role = 3 AND NOT disabled ORDER BY id FOR NO KEY UPDATE";
    const SQL: &str = concat!(
        "-- update_user
        WITH before AS (
            SELECT id, role, disabled FROM users WHERE id = $1 FOR NO KEY UPDATE
        ), changed AS (
            UPDATE users u SET role = coalesce($2, u.role), disabled = coalesce($3, u.disabled),
                update_time = CASE WHEN u.role IS DISTINCT FROM coalesce($2, u.role)
                    OR u.disabled IS DISTINCT FROM coalesce($3, u.disabled) THEN now() ELSE u.update_time END
            FROM before WHERE u.id = before.id
            RETURNING ",
        u_user_columns!(),
        ", before.role AS role_before, before.disabled AS disabled_before
        ), event AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, old_value, new_value)
            SELECT 'ROLE_CHANGED', $4::uuid, $5::text::inet, id, (",
        role_names!(),
        ")[role_before], (",
        role_names!(),
        ")[role] FROM changed WHERE role <> role_before
            UNION ALL
            SELECT CASE WHEN disabled THEN 'USER_DISABLED' ELSE 'USER_ENABLED' END, $4::uuid, $5::text::inet, id, NULL, NULL
            FROM changed WHERE disabled <> disabled_before
        )
        SELECT ",
        user_columns!(),
        " FROM changed"
    );
    const LEFT: &str = "-- administrators_left
        SELECT EXISTS (SELECT FROM users WHERE role = 3 AND NOT disabled)";
    db.query(LOCK, &[]).await?;
    let role = role.map(|role| role as i16);
    let row = db.query_opt(SQL, &[&id, &role, &disabled, &by.actor_id(), &by.address()]).await?;
    let user = row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "user.id", id))?;
    if !db.query_one(LEFT, &[]).await?.get::<_, bool>(0) {
        return Err(Error::precondition(
            "LAST_ADMINISTRATOR",
            "user.id",
            format!("\"{}\" is the last administrator; make another one first", user.username),
        ));
    }
    Ok(user)
}

/// Whether there is any user yet.
pub async fn exist(db: &Conn) -> Result<bool> {
    Ok(db.query_one("-- users_exist\nSELECT EXISTS (SELECT FROM users)", &[]).await?.get(0))
}

/// Columns as in `user_columns!`.
fn from_row(row: &Row) -> User {
    User {
        id: row.get::<_, Uuid>(0).to_string(),
        username: row.get(1),
        role: i32::from(row.get::<_, i16>(2)),
        disabled: row.get(3),
        create_time: Some(timestamp(row.get(4))),
        update_time: Some(timestamp(row.get(5))),
    }
}
