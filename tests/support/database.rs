//! The database, past the service.

use tokio_postgres::{Client, Config, NoTls};

pub async fn session(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}
