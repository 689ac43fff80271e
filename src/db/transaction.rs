//! Transactions.

use std::ops::Deref;

use super::{
    conn::{CommitMode, Conn, Params},
    pool::Db,
};
use crate::error::{Error, Result};

/// Mutations find their rows by keys. A plan that was cached while a table was small must not scan it sequentially when it
/// has grown.
const BEGIN: &str = "BEGIN; SET LOCAL enable_seqscan = off";

impl Db {
    /// Begins a transaction.
    pub async fn begin(&self) -> Result<Tx> {
        Tx::on(self.conn().await?)
    }

    /// Begins a transaction that can wait for row locks.
    pub(super) async fn begin_lock_waiting(&self) -> Result<Tx> {
        Tx::on(self.lock_waiting_conn(CommitMode::Explicit).await?)
    }
}

/// A transaction at isolation level READ COMMITTED. Dropped without [`Tx::commit`], it is rolled back.
pub struct Tx {
    conn: Conn,
    open: bool,
}

impl Tx {
    fn on(conn: Conn) -> Result<Self> {
        conn.enqueue(BEGIN)?;
        Ok(Self { conn, open: true })
    }

    /// Commits. If the connection is lost meanwhile, the error is `OutcomeUnknown`.
    ///
    /// After a statement has failed, PostgreSQL rolls back instead: return the error of the statement.
    pub async fn commit(mut self) -> Result<()> {
        self.conn.commit().await?;
        self.open = false;
        Ok(())
    }

    /// Rolls back, and waits until the locks are released.
    pub async fn rollback(mut self) -> Result<()> {
        self.conn.run(self.conn.client().batch_execute("ROLLBACK")).await?;
        self.open = false;
        Ok(())
    }

    /// Rolls back and begins a new transaction on the same connection.
    pub fn restart(&self) -> Result<()> {
        self.conn.enqueue("ROLLBACK")?;
        self.conn.enqueue(BEGIN)
    }

    /// Executes a last statement and commits, in one round trip.
    pub async fn commit_after(mut self, sql: &str, params: Params<'_>) -> Result<()> {
        // Prepared first, so that nothing delays the statement when the COMMIT is sent.
        let statement = self.conn.statement(sql).await?;
        let conn = &self.conn;
        let written = conn.run(conn.client().execute(&statement, params));
        let (written, committed) = tokio::join!(biased; written, conn.commit());
        // If the statement fails, the server rolls back at the COMMIT. If the connection is lost, the outcome depends on
        // whether the COMMIT was sent.
        match written {
            Ok(_) | Err(Error::ConnectionLost) => committed?,
            Err(error) => return Err(error),
        }
        self.open = false;
        Ok(())
    }
}

impl Deref for Tx {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.conn
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        // The connection returns to the pool with the rollback queued in front of the next statement. A closed connection
        // needs none: the server has rolled back.
        if self.open {
            let _ = self.conn.enqueue("ROLLBACK");
        }
    }
}
