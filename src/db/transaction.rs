//! Transactions.

use std::ops::Deref;

use super::{Conn, Db, Params, PooledConn};
use crate::error::{Error, Result};

/// Mutations find their rows by keys. Plans are kept with a connection: one that was made while a table was small would go
/// on to read all of it when it has grown.
const BEGIN: &str = "BEGIN; SET LOCAL enable_seqscan = off";

impl Db {
    /// Begins a transaction. It is rolled back unless it is committed.
    pub async fn begin(&self) -> Result<Tx> {
        let conn = self.conn().await?;
        conn.enqueue(BEGIN)?;
        Ok(Tx { conn, open: true })
    }
}

/// A transaction (READ COMMITTED). Dropped without [`Tx::commit`], it is rolled back.
pub struct Tx {
    conn: PooledConn,
    open: bool,
}

impl Tx {
    /// After an error of a statement there is nothing to commit: return it instead.
    pub async fn commit(mut self) -> Result<()> {
        self.conn.commit().await?;
        self.open = false;
        Ok(())
    }

    /// Rolls back, and waits for it: what was locked is free then.
    pub async fn rollback(mut self) -> Result<()> {
        self.conn.watch(self.conn.client.batch_execute("ROLLBACK")).await?;
        self.open = false;
        Ok(())
    }

    /// Rolls back what was done, and begins anew.
    pub fn restart(&self) -> Result<()> {
        self.conn.enqueue("ROLLBACK")?;
        self.conn.enqueue(BEGIN)
    }

    /// Commits behind a last statement, without waiting for its answer in between.
    pub async fn commit_after(mut self, sql: &str, params: Params<'_>) -> Result<()> {
        // Prepared first: nothing may hold it up when the COMMIT is sent.
        let statement = self.conn.statement(sql).await?;
        let conn = &*self.conn;
        let written = conn.watch(conn.client.execute(&statement, params));
        let (written, committed) = tokio::join!(biased; written, conn.commit());
        // If it fails, so does the transaction: the server takes its COMMIT for a ROLLBACK. If the connection was lost,
        // whether the COMMIT was sent is what counts.
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
        // The connection goes back to the pool with the rollback queued in front of whatever comes next. If it is closed,
        // the server has rolled back and the pool drops it.
        if self.open {
            let _ = self.conn.enqueue("ROLLBACK");
        }
    }
}
