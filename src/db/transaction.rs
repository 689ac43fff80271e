//! Transactions.

use std::ops::Deref;

use super::{
    conn::{CommitMode, Conn, Params},
    pool::Db,
    row_locks::LockWait,
};
use crate::error::{Error, Result};

/// Mutations find their rows by keys. A plan that was cached while a table was small must not scan it sequentially when it
/// has grown.
const BEGIN: &str = "BEGIN; SET LOCAL enable_seqscan = off";
/// As [`BEGIN`], with [`LockWait::Brief`].
const BEGIN_BRIEF: &str = "BEGIN; SET LOCAL enable_seqscan = off; SET LOCAL lock_timeout = 1";

impl Db {
    /// Begins a transaction.
    pub async fn begin(&self) -> Result<Tx> {
        Tx::on(self.conn().await?, BEGIN)
    }

    /// Begins the transaction of a mutation.
    pub(super) async fn begin_mutation(&self, lock_wait: LockWait) -> Result<Tx> {
        let begin = match lock_wait {
            LockWait::Brief => BEGIN_BRIEF,
            LockWait::Full => BEGIN,
        };
        Tx::on(self.mutation_conn(CommitMode::Explicit, lock_wait).await?, begin)
    }
}

/// A transaction at isolation level READ COMMITTED. Dropped without [`Tx::commit`], it is rolled back.
pub struct Tx {
    conn: Conn,
    begin: &'static str,
    open: bool,
}

impl Tx {
    fn on(conn: Conn, begin: &'static str) -> Result<Self> {
        conn.enqueue(begin)?;
        Ok(Self { conn, begin, open: true })
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
        self.conn.execute_command("ROLLBACK").await?;
        self.open = false;
        Ok(())
    }

    /// Rolls back and begins a new transaction on the same connection.
    pub fn restart(&self) -> Result<()> {
        self.conn.enqueue("ROLLBACK")?;
        self.conn.enqueue(self.begin)
    }

    /// Executes a last statement and commits, in one round trip.
    pub async fn commit_after(mut self, sql: &str, params: Params<'_>) -> Result<()> {
        // Prepared first, so that nothing delays the statement when the COMMIT is sent.
        let statement = self.conn.statement(sql).await?;
        let conn = &self.conn;
        let written = conn.run_statement(&statement, conn.client().execute(&*statement, params));
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

/// Makes the statements of a session wait for locks as [`LockWait::Brief`] says, until it is dropped.
///
/// Both commands are sent with the statement, and cost no round trip. The second one is sent also if the statement was
/// abandoned, so that the next caller of the session waits as usual.
pub(super) struct BriefLockWaits<'a>(&'a Conn);

impl<'a> BriefLockWaits<'a> {
    pub(super) fn on(conn: &'a Conn) -> Result<Self> {
        conn.enqueue("SET lock_timeout = 1")?;
        Ok(Self(conn))
    }
}

impl Drop for BriefLockWaits<'_> {
    fn drop(&mut self) {
        // A closed connection has no next caller.
        let _ = self.0.enqueue("RESET lock_timeout");
    }
}
