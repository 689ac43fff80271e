//! Direct access to the database.

use tokio_postgres::{Client, Config, NoTls};

/// Opens a session that lives as long as the returned client.
pub async fn session(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}
