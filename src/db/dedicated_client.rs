//! A connection outside the pools, of which nothing is left when it is dropped.

use tokio_postgres::{Client, Error, Row, types::ToSql};
use tokio_util::task::AbortOnDropHandle;

use super::cancellation::Canceller;

/// A connection outside the pools. Dropped, it is closed at once, and its running statement is cancelled.
pub(super) struct DedicatedClient {
    client: Client,
    /// The task that reads and writes the connection.
    _connection: AbortOnDropHandle<()>,
    canceller: Canceller,
    /// Whether a statement was sent whose response has not arrived.
    is_busy: bool,
}

impl DedicatedClient {
    pub(super) fn new(client: Client, connection: AbortOnDropHandle<()>, canceller: Canceller) -> Self {
        Self { client, _connection: connection, canceller, is_busy: false }
    }

    /// Executes one or more statements without parameters.
    pub(super) async fn execute(&mut self, sql: &str) -> Result<(), Error> {
        self.is_busy = true;
        let executed = self.client.batch_execute(sql).await;
        self.is_busy = false;
        executed
    }

    pub(super) async fn query(&mut self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>, Error> {
        self.is_busy = true;
        let rows = self.client.query(sql, params).await;
        self.is_busy = false;
        rows
    }
}

impl Drop for DedicatedClient {
    fn drop(&mut self) {
        // PostgreSQL notices a closed connection only when it next reads or writes.
        if self.is_busy
            && !self.client.is_closed()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (canceller, statement) = (self.canceller.clone(), self.client.cancel_token());
            runtime.spawn(async move { canceller.request(statement).await });
        }
    }
}
