//! A connection with its prepared statements.

use std::{future::Future, ops::Deref, pin::pin, sync::Arc, task::Poll};

use futures_util::TryStreamExt;
use tokio::{sync::oneshot, time::sleep};
use tokio_postgres::{Client, CopyInSink, Row, types::ToSql};

use super::{
    manager::Manager,
    page::{Page, PageBounds},
    session::{ABANDONED_MAX, PreparedStatement},
};
use crate::{
    error::{Error, Result},
    fairness::FairPermit,
    metrics::{self, Timer},
};

pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

/// A connection that is checked out of the pool.
///
/// Statements whose futures are polled together are pipelined: they go to the server in the order of their first polls.
pub struct Conn {
    checkout: Arc<Checkout>,
    commit_mode: CommitMode,
}

/// A session that is checked out of the pool. Shared with the task that waits for an abandoned statement.
struct Checkout {
    session: bb8::PooledConnection<'static, Manager>,
    /// Dropped after the session, so that the next holder of a permit finds it in the pool.
    _permits: [Option<FairPermit>; 2],
}

/// When a connection commits what its statements write. Fixed when the connection is checked out: it decides what a lost
/// connection means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CommitMode {
    /// With a COMMIT, or never because the statements only read. If the connection is lost before, nothing is written.
    Explicit,
    /// With each statement. If the connection is lost, the outcome of the statement is unknown.
    EachStatement,
}

impl CommitMode {
    fn classify(self, error: Error) -> Error {
        match self {
            Self::Explicit => error,
            Self::EachStatement => error.in_commit(),
        }
    }
}

impl Conn {
    pub(super) fn new(
        session: bb8::PooledConnection<'static, Manager>,
        commit_mode: CommitMode,
        permits: [Option<FairPermit>; 2],
    ) -> Self {
        Self { checkout: Arc::new(Checkout { session, _permits: permits }), commit_mode }
    }

    /// Returns all rows.
    pub async fn query(&self, sql: &str, params: Params<'_>) -> Result<Vec<Row>> {
        let statement = self.statement(sql).await?;
        self.run_statement(&statement, self.client().query(&*statement, params)).await
    }

    /// Returns the only row. Zero rows or several are an error.
    pub async fn query_one(&self, sql: &str, params: Params<'_>) -> Result<Row> {
        let statement = self.statement(sql).await?;
        self.run_statement(&statement, self.client().query_one(&*statement, params)).await
    }

    /// Returns the row, or `None` if there is none. Several rows are an error.
    pub async fn query_opt(&self, sql: &str, params: Params<'_>) -> Result<Option<Row>> {
        let statement = self.statement(sql).await?;
        self.run_statement(&statement, self.client().query_opt(&*statement, params)).await
    }

    /// Returns the number of affected rows.
    pub async fn execute(&self, sql: &str, params: Params<'_>) -> Result<u64> {
        let statement = self.statement(sql).await?;
        self.run_statement(&statement, self.client().execute(&*statement, params)).await
    }

    /// Reads rows until there are `rows_max` or their sizes exceed `bytes_max`; at least one row if there is any.
    ///
    /// The statement should select one row more than `rows_max`, so that `more` is known. A page that ends because of
    /// `bytes_max` abandons its statement.
    pub async fn query_page<T>(
        &self,
        sql: &str,
        params: Params<'_>,
        bounds: PageBounds,
        from_row: impl Fn(&Row) -> Result<T>,
        size: impl Fn(&T) -> usize,
    ) -> Result<Page<T>> {
        self.query_prepared_page(&self.statement(sql).await?, params, bounds, from_row, size).await
    }

    /// As [`Conn::query_page`], for a prepared statement.
    pub(super) async fn query_prepared_page<T>(
        &self,
        statement: &PreparedStatement,
        params: Params<'_>,
        bounds: PageBounds,
        from_row: impl Fn(&Row) -> Result<T>,
        size: impl Fn(&T) -> usize,
    ) -> Result<Page<T>> {
        let read = async {
            let mut rows = pin!(self.client().query_raw(&**statement, params.iter().copied()).await?);
            let mut items = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.try_next().await? {
                let item = from_row(&row)?;
                bytes += size(&item);
                let has_room = items.len() < bounds.rows_max;
                let fits = has_room && bytes <= bounds.bytes_max;
                if !items.is_empty() && !fits {
                    if has_room {
                        // The server may have many rows left to send, which the next statement would wait for.
                        self.checkout.session.begin_statement();
                    }
                    return Ok::<_, Error>(Page { items, more: true });
                }
                items.push(item);
            }
            Ok(Page { items, more: false })
        };
        self.run_statement(statement, read).await
    }

    /// Prepares statements, so that those that are polled together afterwards reach the server in that order.
    pub async fn prepare(&self, statements: &[&str]) -> Result<()> {
        for sql in statements {
            self.statement(sql).await?;
        }
        Ok(())
    }

    /// Returns a sink for rows in the format of COPY. Its duration is not measured: see [`Conn::start_timer`].
    pub async fn copy_in(&self, sql: &str) -> Result<CopyInSink<bytes::Bytes>> {
        let statement = self.statement(sql).await?;
        self.run(self.client().copy_in(&*statement)).await
    }

    /// Commits the transaction that was begun with [`Conn::enqueue`]. If the connection is lost meanwhile, the outcome is
    /// unknown.
    pub(super) async fn commit(&self) -> Result<()> {
        if self.client().is_closed() {
            return Err(Error::ConnectionLost);
        }
        self.execute_command("COMMIT").await.map_err(Error::in_commit)
    }

    /// Executes a command that is not prepared, such as ROLLBACK.
    pub(super) async fn execute_command(&self, command: &str) -> Result<()> {
        self.run_with(self.start_timer(command), self.client().batch_execute(command)).await
    }

    /// Measures the duration of a statement until the result is dropped.
    pub(super) fn start_timer(&self, sql: &str) -> Timer {
        Timer::start(metrics::get().map(|metrics| metrics.database.statement_duration(sql)))
    }

    /// Waits for the response of a statement, or for a part of it: a row, or room for rows of COPY. Whatever is not awaited
    /// in this way is not ended when the database hangs.
    ///
    /// A caller that stops waiting (its deadline has passed, its client is gone) drops the future, and the statement
    /// stays counted as in flight until it has ended: see [`Conn::drop`].
    pub(super) fn run<T, E: Into<Error>>(
        &self,
        response: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T>> {
        self.run_with(Timer::none(), response)
    }

    /// As [`Conn::run`], for the whole response of a prepared statement. Measures the time from now.
    pub(super) fn run_statement<T, E: Into<Error>>(
        &self,
        statement: &PreparedStatement,
        response: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T>> {
        self.run_with(statement.start_timer(), response)
    }

    async fn run_with<T, E: Into<Error>>(
        &self,
        _timer: Timer,
        response: impl Future<Output = Result<T, E>>,
    ) -> Result<T> {
        if self.client().is_closed() {
            // The statement is not sent: nothing is written, whatever the commit mode.
            return Err(Error::ConnectionLost);
        }
        let _awaited = self.checkout.session.await_response();
        self.checkout.session.begin_statement();
        let response = response.await;
        self.checkout.session.end_statement();
        response.map_err(|error| self.explain(error.into()))
    }

    /// Returns what the error of a statement means on this connection.
    fn explain(&self, error: Error) -> Error {
        if matches!(error, Error::ReadOnly) {
            self.checkout.session.report_read_only();
        }
        self.commit_mode.classify(error)
    }

    /// Returns the prepared statement, and prepares it if this connection has not yet.
    pub(super) async fn statement(&self, sql: &str) -> Result<PreparedStatement> {
        match self.checkout.session.prepared(sql) {
            Some(statement) => Ok(statement),
            None => {
                let statement = self.statement_once(sql).await?;
                self.checkout.session.keep(sql, &statement);
                Ok(statement)
            }
        }
    }

    /// Prepares a statement that is not kept.
    ///
    /// In a task of its own: if it were abandoned halfway, the server would keep a statement that nothing closes.
    pub(super) async fn statement_once(&self, sql: &str) -> Result<PreparedStatement> {
        let (mut sender, prepared) = oneshot::channel();
        let (checkout, sql) = (Arc::clone(&self.checkout), sql.to_owned());
        tokio::spawn(async move {
            let abandoned = async {
                sender.closed().await;
                sleep(ABANDONED_MAX).await;
            };
            let statement = tokio::select! {
                statement = checkout.session.prepare(&sql) => statement,
                () = abandoned => return,
            };
            drop(checkout);
            let _ = sender.send(statement);
        });
        prepared.await.unwrap_or(Err(Error::ConnectionLost))
    }

    pub(super) fn client(&self) -> &Client {
        self.checkout.session.client()
    }

    /// Sends a command ahead of whatever is sent next on this connection, without waiting for its response: its first
    /// poll puts it into the queue of the connection.
    pub(super) fn enqueue(&self, command: &str) -> Result<()> {
        let mut sending = pin!(self.client().batch_execute(command));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match sending.as_mut().poll(&mut context) {
            Poll::Ready(result) => Ok(result?),
            Poll::Pending => Ok(()),
        }
    }

    /// Returns the connection as one that is closed on drop.
    pub(super) fn into_exclusive(self) -> ExclusiveConn {
        self.checkout.session.set_stateful(true);
        ExclusiveConn(self)
    }
}

impl Drop for Conn {
    /// Ends the statement that was abandoned, if any, before the session returns to the pool.
    fn drop(&mut self) {
        let session = &self.checkout.session;
        if session.has_statement_in_flight()
            && !session.is_closed_on_return()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let checkout = Arc::clone(&self.checkout);
            runtime.spawn(async move { checkout.session.end_abandoned_statements().await });
        }
    }
}

/// A connection with state of its own, such as an open transaction, an advisory lock or a half-read result. Dropped, it is
/// closed, and its running statement is cancelled. [`ExclusiveConn::release`] returns it to the pool.
pub(super) struct ExclusiveConn(Conn);

impl ExclusiveConn {
    /// Returns the connection to the pool. The caller has ended everything that it began on the connection.
    pub(super) fn release(self) {
        self.0.checkout.session.set_stateful(false);
    }
}

impl Deref for ExclusiveConn {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        &self.0
    }
}
