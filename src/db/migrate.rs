//! Brings the schema up to date, and the rights on it.

use std::error::Error;

use anyhow::{Context, anyhow, bail};
use refinery::{Migration, Runner};
use tokio_postgres::{Client, error::SqlState};

use super::Target;

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// Held while migrations run, so that replicas which start together take turns: "issuetra" in ASCII.
const MIGRATION_LOCK_KEY: i64 = 0x6973_7375_6574_7261;
/// The oldest PostgreSQL that the service is tested on.
const SERVER_VERSION_MIN: i32 = 150_000;

/// Applies the migrations that are missing, as a role that may; any role that may read will do where none is.
///
/// Refuses a server older than PostgreSQL 15, a schema newer than this binary, and one whose applied migrations are not
/// those of this binary.
pub async fn migrate(target: impl Into<Target>) -> anyhow::Result<()> {
    connected(target.into(), migrate_with).await
}

/// Gives the role what it needs to serve, and takes what it does not need: see `rights.sql`. As the tables' owner.
pub async fn grant_rights(target: impl Into<Target>, role: &str) -> anyhow::Result<()> {
    connected(target.into(), async |client| {
        lock(client).await?;
        client.execute("SELECT set_config('issue_tracker.role', $1, false)", &[&role]).await?;
        client
            .batch_execute(include_str!("rights.sql"))
            .await
            .with_context(|| format!("cannot grant rights to the role {role}"))
    })
    .await
}

/// On a connection of its own, whose end frees the lock.
async fn connected(target: Target, work: impl AsyncFnOnce(&mut Client) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let Target { config, connector } = target;
    let (mut client, connection) = config.connect(connector).await.context("cannot connect to the database")?;
    let connection = tokio::spawn(connection);
    let result = work(&mut client).await;
    drop(client);
    let _ = connection.await;
    result
}

/// Until the connection ends.
async fn lock(client: &Client) -> anyhow::Result<()> {
    client.execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK_KEY]).await?;
    // A change that waits for a long transaction holds up all that comes after it.
    client.batch_execute("SET lock_timeout = '10s'").await?;
    Ok(())
}

async fn migrate_with(client: &mut Client) -> anyhow::Result<()> {
    let version: i32 = client.query_one("SELECT current_setting('server_version_num')::int4", &[]).await?.get(0);
    if version < SERVER_VERSION_MIN {
        bail!("the server is PostgreSQL {}, 15 or newer is needed", version / 10_000);
    }
    let runner = migrations::migrations::runner().set_abort_divergent(true).set_abort_missing(true);
    // Only what is missing needs more rights than reading.
    if first_missing(client, &runner).await?.is_none() {
        return Ok(());
    }
    lock(client).await?;
    let Some(missing) = first_missing(client, &runner).await? else {
        return Ok(());
    };
    let report = runner.run_async(client).await.map_err(|error| explain(error, &missing))?;
    for migration in report.applied_migrations() {
        tracing::info!(version = %migration.version(), name = migration.name(), "applied migration");
    }
    Ok(())
}

/// The first migration that is not applied, if any. Those that are must be known, with the contents that they have here.
async fn first_missing(client: &mut Client, runner: &Runner) -> anyhow::Result<Option<Migration>> {
    let history = client.query_one("SELECT to_regclass('refinery_schema_history') IS NOT NULL", &[]).await?;
    let applied = match history.get(0) {
        true => {
            runner.get_applied_migrations_async(client).await.context("cannot read which migrations are applied")?
        }
        false => Vec::new(),
    };
    let known = runner.get_migrations();
    for migration in &applied {
        match known.iter().find(|known| known.version() == migration.version()) {
            None => bail!(
                "the database's schema is newer than this program: it has migration {} ({}), which this program does not \
                 know; run the newer program",
                migration.version(),
                migration.name()
            ),
            Some(known) if known != migration => bail!(
                "migration {} ({}) was applied to the database with other contents than this program has",
                migration.version(),
                migration.name()
            ),
            Some(_) => {}
        }
    }
    let missing = known.iter().filter(|known| !applied.iter().any(|applied| applied.version() == known.version()));
    Ok(missing.min_by_key(|missing| missing.version()).cloned())
}

fn explain(error: refinery::Error, missing: &Migration) -> anyhow::Error {
    let database_error = error.source().and_then(|source| source.downcast_ref::<tokio_postgres::Error>());
    if database_error.and_then(tokio_postgres::Error::code) == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return anyhow!(
            "the schema lacks migration {} ({}), and this role may not change it; run `issue-tracker migrate` as its owner",
            missing.version(),
            missing.name()
        );
    }
    anyhow!(error).context("cannot migrate the database")
}
