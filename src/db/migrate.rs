//! Brings the schema up to date.

use anyhow::{Context, anyhow, bail};
use refinery::error::Kind;
use tokio_postgres::Client;

use super::Target;

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// Held while migrations run, so that replicas which start together take turns: "issuetra" in ASCII.
const MIGRATION_LOCK_KEY: i64 = 0x6973_7375_6574_7261;
/// The oldest PostgreSQL that the service is tested on.
const SERVER_VERSION_MIN: i32 = 150_000;

/// Applies the migrations that are missing.
///
/// Refuses a server older than PostgreSQL 15, a schema newer than this binary, and one whose applied migrations are not
/// those of this binary.
pub async fn migrate(target: impl Into<Target>) -> anyhow::Result<()> {
    let Target { config, connector } = target.into();
    let (mut client, connection) = config.connect(connector).await.context("cannot connect to the database")?;
    let connection = tokio::spawn(connection);
    let result = migrate_with(&mut client).await;
    // Closing the connection frees the lock.
    drop(client);
    let _ = connection.await;
    result
}

async fn migrate_with(client: &mut Client) -> anyhow::Result<()> {
    let version: i32 = client.query_one("SELECT current_setting('server_version_num')::int4", &[]).await?.get(0);
    if version < SERVER_VERSION_MIN {
        bail!("the server is PostgreSQL {}, 15 or newer is needed", version / 10_000);
    }
    client.execute("SELECT pg_advisory_lock($1)", &[&MIGRATION_LOCK_KEY]).await?;
    let report = migrations::migrations::runner()
        .set_abort_divergent(true)
        .set_abort_missing(true)
        .run_async(client)
        .await
        .map_err(explain)?;
    for migration in report.applied_migrations() {
        tracing::info!(version = %migration.version(), name = migration.name(), "applied migration");
    }
    Ok(())
}

fn explain(error: refinery::Error) -> anyhow::Error {
    match error.kind() {
        Kind::MissingVersion(migration) => anyhow!(
            "the database's schema is newer than this program: it has migration {} ({}), which this program does not know; \
             run the newer program",
            migration.version(),
            migration.name()
        ),
        Kind::DivergentVersion(applied, _) => anyhow!(
            "migration {} ({}) was applied to the database with other contents than this program has",
            applied.version(),
            applied.name()
        ),
        _ => anyhow!(error).context("cannot migrate the database"),
    }
}
