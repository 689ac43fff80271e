//! First start: the private database, its role, and the first administrator.

use std::{
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use anyhow::Context;
use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::{Config, NoTls};

use crate::{
    auth::{hash_password, new_token},
    db::{
        Conn, Db,
        audit::By,
        migrate::{grant_rights, migrate},
        tokens,
        users::{self, NewUser},
    },
    error::Error,
    pb::{Role, User},
    postgres::Cluster,
};

pub const PRIVATE_DATABASE: &str = "issue_tracker";
/// The role that the service connects as.
pub const PRIVATE_ROLE: &str = "issue_tracker";
const FIRST_ADMINISTRATOR: &str = "admin";
const FIRST_TOKEN_NAME: &str = "admin.token";

/// Creates the database and the role where they are missing, applies pending migrations and grants the role its rights.
/// Returns how the service connects.
pub async fn prepare_private_database(cluster: &Cluster) -> anyhow::Result<Config> {
    create_database_and_role(&cluster.connect_config("postgres")).await?;
    let mut config = cluster.connect_config(PRIVATE_DATABASE);
    migrate(&config).await?;
    grant_rights(&config, PRIVATE_ROLE).await?;
    config.user(PRIVATE_ROLE);
    Ok(config)
}

async fn create_database_and_role(config: &Config) -> anyhow::Result<()> {
    let (client, connection) = config.connect(NoTls).await.context("cannot connect to the private PostgreSQL")?;
    let connection = tokio::spawn(connection);
    if client.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&PRIVATE_DATABASE]).await?.is_none() {
        client.batch_execute(&format!("CREATE DATABASE {PRIVATE_DATABASE}")).await?;
    }
    if client.query_opt("SELECT FROM pg_roles WHERE rolname = $1", &[&PRIVATE_ROLE]).await?.is_none() {
        client.batch_execute(&format!("CREATE ROLE {PRIVATE_ROLE} LOGIN")).await?;
    }
    drop(client);
    connection.await??;
    Ok(())
}

/// Creates the user `admin` where it is missing, prints its password, and writes a token of it to `token_file`. A start that
/// was killed halfway is completed by the next one.
pub async fn create_first_administrator(db: &Db, bcrypt_cost: u32, token_file: &Path) -> anyhow::Result<()> {
    let tx = db.begin().await?;
    let existing = users::get_by_username(&tx, FIRST_ADMINISTRATOR).await;
    if existing.is_ok() && token_file.exists() {
        return Ok(());
    }
    let user = match existing {
        Ok(user) => user,
        Err(Error::NotFound(_)) => create_administrator(&tx, bcrypt_cost).await?,
        Err(error) => return Err(error.into()),
    };
    let (token, sha256) = new_token()?;
    tokens::create_api_token(&tx, user.id.parse()?, &sha256, FIRST_TOKEN_NAME, None, By::COMMAND_LINE).await?;
    tx.commit().await?;
    // Last: a start that finds the file assumes that everything above is committed.
    write_secret(token_file, &token).with_context(|| format!("cannot write {}", token_file.display()))?;
    Ok(())
}

async fn create_administrator(tx: &Conn, bcrypt_cost: u32) -> anyhow::Result<User> {
    let (password, _) = new_token()?;
    let password = SecretString::from(password);
    let to_hash = password.clone();
    let password_hash = &tokio::task::spawn_blocking(move || hash_password(&to_hash, bcrypt_cost)).await??;
    let new = NewUser { username: FIRST_ADMINISTRATOR, role: Role::Admin, disabled: false, password_hash };
    let user = users::create(tx, new, By::COMMAND_LINE).await?;
    // Printed before the commit: a process killed between the two would otherwise leave a password that no user has seen. If
    // the commit fails, the printed password is void, and the next start prints another.
    println!(
        "created the user \"{FIRST_ADMINISTRATOR}\" with the password {} (it is not shown again)",
        password.expose_secret()
    );
    Ok(user)
}

/// Writes the file completely or not at all, readable by its owner only.
fn write_secret(path: &Path, secret: &str) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    writeln!(file, "{secret}")?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    Ok(())
}
