//! Migrates the schema, and grants the privileges on it.

use std::error::Error;

use anyhow::{Context, anyhow, bail};
use refinery::{Migration, Runner};
use tokio::time::timeout;
use tokio_postgres::{Client, error::SqlState};
use tokio_util::task::AbortOnDropHandle;

use super::{
    connection_string::ConnectionString,
    timeouts::{CONNECT_TIMEOUT, set_timeouts},
};
use crate::error::{is_unavailable, refusals::cause};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// The key of the advisory lock that serializes migrations of replicas that start together: "issuetra" in ASCII.
const MIGRATION_LOCK_KEY: i64 = 0x6973_7375_6574_7261;
/// The oldest supported version of PostgreSQL.
const SERVER_VERSION_MIN: i32 = 150_000;
const CANNOT_CONNECT: &str = "cannot connect to the database";

/// Applies the missing migrations. If none is missing, the role only needs to read.
///
/// Fails if the server is older than PostgreSQL 15, if the schema is newer than this program, or if an applied migration
/// differs from the one in this program.
pub async fn migrate(database: impl Into<ConnectionString>) -> anyhow::Result<()> {
    with_client(database.into(), migrate_with).await
}

/// Returns the cause of a failed migration if the database was unavailable: it cannot be reached, refuses connections for
/// now, or accepts no writes. Returns `None` if a retry fails in the same way.
pub fn unavailability(error: &anyhow::Error) -> Option<String> {
    if error.is::<NoResponse>() {
        return Some("timeout".to_owned());
    }
    let error = error.chain().find_map(|cause| cause.downcast_ref::<tokio_postgres::Error>())?;
    is_unavailable(error).then(|| cause(error))
}

/// Grants the role the privileges that serving needs, and revokes all others: see `rights.sql`. Requires the owner of the
/// tables.
pub async fn grant_rights(database: impl Into<ConnectionString>, role: &str) -> anyhow::Result<()> {
    with_client(database.into(), async |client| {
        lock(client).await?;
        client.execute("SELECT set_config('issue_tracker.role', $1, false)", &[&role]).await?;
        client
            .batch_execute(include_str!("rights.sql"))
            .await
            .with_context(|| format!("cannot grant rights to the role {role}"))
    })
    .await
}

/// Works on a connection of its own. Closing it releases the lock.
async fn with_client(
    database: ConnectionString,
    work: impl AsyncFnOnce(&mut Client) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    // The driver limits the time of the TCP connection only.
    let connected = timeout(CONNECT_TIMEOUT, connect(database)).await.map_err(|_| NoResponse);
    let (mut client, connection) = connected.context(CANNOT_CONNECT)??;
    let result = work(&mut client).await;
    drop(client);
    let _ = connection.await;
    result
}

/// The server did not respond in time, although it may have accepted the connection.
#[derive(Debug, thiserror::Error)]
#[error("the server does not respond")]
struct NoResponse;

/// The task that reads and writes a connection.
type ConnectionTask = AbortOnDropHandle<Result<(), tokio_postgres::Error>>;

/// Connects, and checks that the server responds and has a supported version.
async fn connect(database: ConnectionString) -> anyhow::Result<(Client, ConnectionTask)> {
    let ConnectionString { mut config, connector } = database;
    set_timeouts(&mut config);
    let (client, connection) = config.connect(connector).await.context(CANNOT_CONNECT)?;
    let connection = AbortOnDropHandle::new(tokio::spawn(connection));
    let version: i32 = client.query_one("SELECT current_setting('server_version_num')::int4", &[]).await?.get(0);
    if version < SERVER_VERSION_MIN {
        bail!("the server is PostgreSQL {}; expected 15 or newer", version / 10_000);
    }
    Ok((client, connection))
}

/// Locks until the connection is closed.
async fn lock(client: &Client) -> anyhow::Result<()> {
    client.execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK_KEY]).await?;
    // A migration that waits for a lock blocks all statements that need a conflicting lock after it.
    client.batch_execute("SET lock_timeout = '10s'").await?;
    Ok(())
}

async fn migrate_with(client: &mut Client) -> anyhow::Result<()> {
    let runner = migrations::migrations::runner().set_abort_divergent(true).set_abort_missing(true);
    // Only missing migrations need more than the privilege to read.
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

/// Returns the first migration that is not applied. Those that are applied must equal the ones in this program.
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
                "the schema of the database is newer than this program: it has migration {} ({}), which this program does not \
                 have; run a newer program",
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
