//! `issue-tracker migrate`.

use secrecy::ExposeSecret;

use crate::{
    config::MigrateArgs,
    db::{ConnectionString, migrate as migrations},
};

/// Applies pending migrations, then grants the rights of the service to `--grant-to`.
pub async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    let connection_string: ConnectionString = args.database_url.expose_secret().parse()?;
    migrations::migrate(connection_string.clone()).await?;
    match args.grant_to {
        Some(role) => migrations::grant_rights(connection_string, &role).await,
        None => Ok(()),
    }
}
