//! Users.

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    audit::By,
    conn::Conn,
    page::{Page, PageBounds},
    time::timestamp,
    tokens,
};
use crate::{
    error::{Error, Result},
    pb::{Role, User},
};

/// A user, disabled or not, with the hash of the password.
pub struct Credentials {
    pub user: User,
    pub user_id: Uuid,
    pub password_hash: SecretString,
}

/// A user to create.
pub struct NewUser<'a> {
    pub username: &'a str,
    pub role: Role,
    pub disabled: bool,
    pub password_hash: &'a SecretString,
}

/// Returns the user in a row that has its columns.
pub(super) fn from_row(row: &Row) -> User {
    User {
        id: row.get::<_, Uuid>("id").to_string(),
        username: row.get("username"),
        role: i32::from(row.get::<_, i16>("role")),
        disabled: row.get("disabled"),
        create_time: Some(timestamp(row.get("create_time"))),
        update_time: Some(timestamp(row.get("update_time"))),
    }
}

/// Creates a user. `AlreadyExists` names `user.username`.
pub async fn create(db: &Conn, new: NewUser<'_>, by: By) -> Result<User> {
    const SQL: &str = "-- create_user
        WITH created AS (
            INSERT INTO users (id, username, role, disabled, password_hash)
            VALUES (/* id */ $1, /* username */ $2, /* role */ $3, /* disabled */ $4, /* password_hash */ $5)
            RETURNING id, username, role, disabled, create_time, update_time
        ), logged AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, new_value)
            SELECT 'USER_CREATED', /* actor_id */ $6::uuid, /* address */ $7::text::inet, id,
                (ARRAY['VIEWER', 'MEMBER', 'ADMIN'])[role]
            FROM created
            UNION ALL
            SELECT 'USER_DISABLED', /* actor_id */ $6::uuid, /* address */ $7::text::inet, id, NULL
            FROM created WHERE disabled
        )
        SELECT id, username, role, disabled, create_time, update_time FROM created";
    let NewUser { username, role, disabled, password_hash } = new;
    let (id, role, hash) = (Uuid::now_v7(), role as i16, password_hash.expose_secret());
    let row = db.query_one(SQL, &[&id, &username, &role, &disabled, &hash, &by.actor_id(), &by.address()]).await;
    row.map(|row| from_row(&row)).map_err(|error| {
        error.on_constraint("users_username_key", || {
            Error::already_exists("user", "username", "user.username", username)
        })
    })
}

/// Returns a user. `NotFound` names `id`.
pub async fn get(db: &Conn, id: Uuid) -> Result<User> {
    const SQL: &str = "-- get_user
        SELECT id, username, role, disabled, create_time, update_time FROM users WHERE id = $1";
    let row = db.query_opt(SQL, &[&id]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "id", id))
}

/// As [`get`]. Until the transaction ends, no other transaction changes the user or locks it.
pub async fn lock(db: &Conn, id: Uuid) -> Result<User> {
    const SQL: &str = "-- lock_user
        SELECT id, username, role, disabled, create_time, update_time FROM users WHERE id = $1 FOR NO KEY UPDATE";
    let row = db.query_opt(SQL, &[&id]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "id", id))
}

/// Returns a user. `NotFound` names `username`.
pub async fn get_by_username(db: &Conn, username: &str) -> Result<User> {
    const SQL: &str = "-- get_user_by_username
        SELECT id, username, role, disabled, create_time, update_time FROM users WHERE lower(username) = lower($1)";
    let row = db.query_opt(SQL, &[&username]).await?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "username", username))
}

/// Returns the user of this name, disabled or not, with the hash of the password.
pub async fn find_credentials(db: &Conn, username: &str) -> Result<Option<Credentials>> {
    const SQL: &str = "-- find_credentials
        SELECT id, username, role, disabled, create_time, update_time, password_hash
        FROM users WHERE lower(username) = lower($1)";
    let row = db.query_opt(SQL, &[&username]).await?;
    Ok(row.map(|row| Credentials {
        user: from_row(&row),
        user_id: row.get("id"),
        password_hash: row.get::<_, String>("password_hash").into(),
    }))
}

/// Returns the hash of the password of an existing user.
pub async fn password_hash(db: &Conn, id: Uuid) -> Result<SecretString> {
    const SQL: &str = "-- password_hash\nSELECT password_hash FROM users WHERE id = $1";
    Ok(db.query_one(SQL, &[&id]).await?.get::<_, String>("password_hash").into())
}

/// Sets the hash of the password if it is still `old_hash`. Returns whether it was.
pub async fn change_password_hash(
    db: &Conn,
    id: Uuid,
    old_hash: &SecretString,
    new_hash: &SecretString,
    by: By,
) -> Result<bool> {
    const SQL: &str = "-- change_password_hash
        WITH changed AS (
            UPDATE users SET password_hash = /* new_hash */ $3, update_time = now()
            WHERE id = /* id */ $1 AND password_hash = /* old_hash */ $2 RETURNING id
        )
        INSERT INTO audit_events (action, actor_id, address, user_id)
        SELECT 'PASSWORD_CHANGED', /* actor_id */ $4, /* address */ $5::text::inet, id FROM changed";
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

/// Returns a page of users by username, after the user named `after`.
pub async fn list(db: &Conn, after: Option<&str>, limit: i64, bounds: PageBounds) -> Result<Page<User>> {
    const SQL: &str = "-- list_users
        SELECT id, username, role, disabled, create_time, update_time FROM users
        WHERE $1::text IS NULL OR lower(username) > lower($1) ORDER BY lower(username) LIMIT $2";
    db.query_page(SQL, &[&after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Changes the given values. `NotFound` and LAST_ADMINISTRATOR name `user.id`: one enabled administrator must remain.
///
/// Takes more than one statement: call it in a transaction.
pub async fn update(db: &Conn, id: Uuid, role: Option<Role>, disabled: Option<bool>, by: By) -> Result<User> {
    // Serializes changes of administrators, so that two of them cannot demote each other. Statements that refer to users,
    // such as imports and assignments, do not wait for this lock.
    const LOCK_ADMINISTRATORS: &str = "-- lock_administrators
        SELECT id FROM users WHERE role = 3 AND NOT disabled ORDER BY id FOR NO KEY UPDATE";
    const SQL: &str = "-- update_user
        WITH before AS (
            SELECT id, role, disabled FROM users WHERE id = /* id */ $1 FOR NO KEY UPDATE
        ), changed AS (
            UPDATE users SET
                role = coalesce(/* role */ $2, users.role),
                disabled = coalesce(/* disabled */ $3, users.disabled),
                update_time = CASE
                    WHEN users.role IS DISTINCT FROM coalesce(/* role */ $2, users.role)
                        OR users.disabled IS DISTINCT FROM coalesce(/* disabled */ $3, users.disabled) THEN now()
                    ELSE users.update_time
                END
            FROM before WHERE users.id = before.id
            RETURNING users.id, users.username, users.role, users.disabled, users.create_time, users.update_time,
                before.role AS role_before, before.disabled AS disabled_before
        ), logged AS (
            INSERT INTO audit_events (action, actor_id, address, user_id, old_value, new_value)
            SELECT 'ROLE_CHANGED', /* actor_id */ $4::uuid, /* address */ $5::text::inet, id,
                (ARRAY['VIEWER', 'MEMBER', 'ADMIN'])[role_before], (ARRAY['VIEWER', 'MEMBER', 'ADMIN'])[role]
            FROM changed WHERE role <> role_before
            UNION ALL
            SELECT CASE WHEN disabled THEN 'USER_DISABLED' ELSE 'USER_ENABLED' END,
                /* actor_id */ $4::uuid, /* address */ $5::text::inet, id, NULL, NULL
            FROM changed WHERE disabled <> disabled_before
        )
        SELECT id, username, role, disabled, create_time, update_time FROM changed";
    const ADMINISTRATOR_EXISTS: &str = "-- administrator_exists
        SELECT EXISTS (SELECT FROM users WHERE role = 3 AND NOT disabled) AS administrator_exists";
    db.query(LOCK_ADMINISTRATORS, &[]).await?;
    let role = role.map(|role| role as i16);
    let row = db.query_opt(SQL, &[&id, &role, &disabled, &by.actor_id(), &by.address()]).await?;
    let user = row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("user", "user.id", id))?;
    if !db.query_one(ADMINISTRATOR_EXISTS, &[]).await?.get::<_, bool>("administrator_exists") {
        return Err(Error::precondition(
            "LAST_ADMINISTRATOR",
            "user.id",
            format!("\"{}\" is the last administrator; make another one first", user.username),
        ));
    }
    Ok(user)
}

/// Returns whether any user exists.
pub async fn exist(db: &Conn) -> Result<bool> {
    const SQL: &str = "-- users_exist\nSELECT EXISTS (SELECT FROM users) AS users_exist";
    Ok(db.query_one(SQL, &[]).await?.get("users_exist"))
}
