//! `issue-tracker user`.

use std::io::{IsTerminal, Read};

use anyhow::{Context, anyhow, bail};
use secrecy::{ExposeSecret, SecretString};

use super::bootstrap::{PRIVATE_DATABASE, PRIVATE_ROLE, prepare_private_database};
use crate::{
    auth::{check_password, hash_password},
    config::{Database, ResetPasswordArgs, UserCreateArgs},
    db::{
        ConnectionString, Db, PoolOptions,
        audit::By,
        migrate::migrate,
        users::{self, NewUser},
    },
    postgres::{Cluster, Durability, StartedOrRunning},
    rpc::check_username,
};

/// Creates a user and prints its id.
pub async fn create_user(args: UserCreateArgs) -> anyhow::Result<()> {
    let username = check_username(args.username).map_err(|message| anyhow!("username: {message}"))?;
    let password = read_new_password()?;
    let password_hash = hash_password(&password, args.bcrypt.cost)?;
    let new = NewUser { username: &username, role: args.role.into(), disabled: false, password_hash: &password_hash };
    let user =
        with_database(&args.database, async |db| Ok(users::create(&db.conn().await?, new, By::COMMAND_LINE).await?))
            .await?;
    println!("{}", user.id);
    Ok(())
}

/// Sets a user's password and ends the user's sessions. A running service accepts the ended sessions for up to 5 s.
pub async fn reset_password(args: ResetPasswordArgs) -> anyhow::Result<()> {
    let password = read_new_password()?;
    let password_hash = hash_password(&password, args.bcrypt.cost)?;
    with_database(&args.database, async |db| {
        let tx = db.begin().await?;
        let user = users::get_by_username(&tx, &args.username).await?;
        users::reset_password(&tx, user.id.parse()?, &password_hash, By::COMMAND_LINE).await?;
        Ok(tx.commit().await?)
    })
    .await
}

/// Prompts twice without echo on a terminal; else reads standard input, without the line break at its end.
fn read_new_password() -> anyhow::Result<SecretString> {
    let mut stdin = std::io::stdin();
    let password = if stdin.is_terminal() {
        let password = SecretString::from(rpassword::prompt_password("New password: ")?);
        let repeated = SecretString::from(rpassword::prompt_password("Repeat the password: ")?);
        if password.expose_secret() != repeated.expose_secret() {
            bail!("the passwords differ");
        }
        password
    } else {
        let mut input = String::new();
        stdin.read_to_string(&mut input).context("cannot read the password from standard input")?;
        input.truncate(input.trim_end_matches(['\r', '\n']).len());
        SecretString::from(input)
    };
    check_password(&password).map_err(|message| anyhow!("the password {message}"))?;
    Ok(password)
}

/// Runs `work` on the database, with pending migrations applied. The private PostgreSQL is started for it and stopped
/// after it, unless a service is running it.
async fn with_database<T>(database: &Database, work: impl AsyncFnOnce(Db) -> anyhow::Result<T>) -> anyhow::Result<T> {
    if let Some(url) = &database.database_url {
        let connection_string: ConnectionString = url.expose_secret().parse()?;
        migrate(connection_string.clone()).await?;
        return work(Db::new(connection_string, PoolOptions::SMALL)).await;
    }
    let data_dir = database.data_dir.path()?;
    let opened = tokio::task::spawn_blocking(move || Cluster::start_or_find(&data_dir, Durability::Durable)).await??;
    match opened {
        StartedOrRunning::Started(cluster) => {
            let result = match prepare_private_database(&cluster).await {
                Ok(config) => work(Db::new(config, PoolOptions::SMALL)).await,
                Err(error) => Err(error),
            };
            let stopped = tokio::task::spawn_blocking(move || cluster.stop()).await?;
            result.and_then(|value| stopped.map(|()| value))
        }
        StartedOrRunning::Running(running) => {
            let mut config = running.connect_config(PRIVATE_DATABASE);
            config.user(PRIVATE_ROLE);
            work(Db::new(config, PoolOptions::SMALL)).await
        }
    }
}
