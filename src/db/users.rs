//! Users.

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds};
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

/// A user who signs in.
pub struct Credentials {
    pub user: User,
    pub user_id: Uuid,
    pub password_hash: String,
}

pub async fn create(db: &Conn, username: &str, role: Role, password_hash: &str) -> Result<User> {
    const SQL: &str = concat!(
        "-- create_user
        INSERT INTO users (id, username, role, password_hash) VALUES ($1, $2, $3, $4) RETURNING ",
        user_columns!()
    );
    let row = db.query_one(SQL, &[&Uuid::now_v7(), &username, &(role as i16), &password_hash]).await;
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

pub async fn get_by_username(db: &Conn, username: &str) -> Result<User> {
    const SQL: &str =
        concat!("-- get_user_by_username\nSELECT ", user_columns!(), " FROM users WHERE lower(username) = lower($1)");
    let row = db.query_opt(SQL, &[&username]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "username", username))
}

/// An enabled user and his password's hash.
pub async fn find_credentials(db: &Conn, username: &str) -> Result<Option<Credentials>> {
    const SQL: &str = concat!(
        "-- find_credentials\nSELECT ",
        user_columns!(),
        ", password_hash FROM users WHERE lower(username) = lower($1) AND NOT disabled"
    );
    let row = db.query_opt(SQL, &[&username]).await?;
    Ok(row.map(|row| Credentials { user: from_row(&row), user_id: row.get(0), password_hash: row.get(6) }))
}

pub async fn password_hash(db: &Conn, id: Uuid) -> Result<String> {
    const SQL: &str = "-- password_hash\nSELECT password_hash FROM users WHERE id = $1";
    Ok(db.query_one(SQL, &[&id]).await?.get(0))
}

/// Whether the password's hash was still `old_hash`; if not, nothing is changed.
pub async fn change_password_hash(db: &Conn, id: Uuid, old_hash: &str, new_hash: &str) -> Result<bool> {
    const SQL: &str = "-- change_password_hash
        UPDATE users SET password_hash = $3, update_time = now() WHERE id = $1 AND password_hash = $2";
    Ok(db.execute(SQL, &[&id, &old_hash, &new_hash]).await? == 1)
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
pub async fn update(db: &Conn, id: Uuid, role: Option<Role>, disabled: Option<bool>) -> Result<User> {
    // Changes of administrators take turns, so that two of them cannot demote each other. Imports and assignments, which
    // refer to users, are not held up by this lock.
    const LOCK: &str = "-- lock_administrators
        SELECT id FROM users WHERE role = 3 AND NOT disabled ORDER BY id FOR NO KEY UPDATE";
    const SQL: &str = concat!(
        "-- update_user
        UPDATE users SET role = coalesce($2, role), disabled = coalesce($3, disabled),
            update_time = CASE WHEN role IS DISTINCT FROM coalesce($2, role) OR disabled IS DISTINCT FROM coalesce($3, disabled)
                THEN now() ELSE update_time END
        WHERE id = $1
        RETURNING ",
        user_columns!()
    );
    const LEFT: &str = "-- administrators_left
        SELECT EXISTS (SELECT FROM users WHERE role = 3 AND NOT disabled)";
    db.query(LOCK, &[]).await?;
    let role = role.map(|role| role as i16);
    let row = db.query_opt(SQL, &[&id, &role, &disabled]).await?;
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
