//! A connection with its prepared statements.

use std::{
    collections::HashMap,
    future::Future,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::Poll,
};

use futures_util::TryStreamExt;
use tokio_postgres::{Client, CopyInSink, Row, Statement, types::ToSql};

use super::tls::Connector;
use crate::error::{Error, Result};

/// Statements kept prepared with each connection. Only the shapes of a filter can be more than a few dozen; past the bound
/// any one makes room for a new one.
const STATEMENTS_PER_CONNECTION_MAX: usize = 256;

/// A connection with its prepared statements. Statements whose futures are polled together go out together.
pub struct Conn {
    pub(super) client: Client,
    /// What the connection was made with, for what is said beside it.
    connector: Connector,
    statements: Mutex<HashMap<String, Statement>>,
    /// Statements whose answer is waited for; at rest, those whose caller has given up.
    unanswered: AtomicU32,
    discard: AtomicBool,
    /// Whether each statement is committed by itself, and what it writes with it.
    autocommits: AtomicBool,
}

pub type Params<'a> = &'a [&'a (dyn ToSql + Sync)];

impl Conn {
    pub(super) fn new(client: Client, connector: Connector) -> Self {
        Self {
            client,
            connector,
            statements: Mutex::default(),
            unanswered: AtomicU32::new(0),
            discard: AtomicBool::new(false),
            autocommits: AtomicBool::new(false),
        }
    }

    pub async fn query(&self, sql: &str, params: Params<'_>) -> Result<Vec<Row>> {
        let statement = self.statement(sql).await?;
        self.watch(self.client.query(&statement, params)).await
    }

    /// Exactly one row.
    pub async fn query_one(&self, sql: &str, params: Params<'_>) -> Result<Row> {
        let statement = self.statement(sql).await?;
        self.watch(self.client.query_one(&statement, params)).await
    }

    /// One row or none.
    pub async fn query_opt(&self, sql: &str, params: Params<'_>) -> Result<Option<Row>> {
        let statement = self.statement(sql).await?;
        self.watch(self.client.query_opt(&statement, params)).await
    }

    /// How many rows were touched.
    pub async fn execute(&self, sql: &str, params: Params<'_>) -> Result<u64> {
        let statement = self.statement(sql).await?;
        self.watch(self.client.execute(&statement, params)).await
    }

    /// Reads rows until there are `rows_max`, or their sizes add up to `bytes_max`; at least one if there is one. The
    /// statement should ask for one row more than `rows_max`, so that it is known whether there are more.
    pub async fn query_page<T>(
        &self,
        sql: &str,
        params: Params<'_>,
        bounds: PageBounds,
        from_row: impl Fn(&Row) -> Result<T>,
        size: impl Fn(&T) -> usize,
    ) -> Result<Page<T>> {
        let statement = self.statement(sql).await?;
        let read = async {
            let mut rows = pin!(self.client.query_raw(&statement, params.iter().copied()).await?);
            let mut items = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.try_next().await? {
                let item = from_row(&row)?;
                bytes += size(&item);
                let has_room = items.len() < bounds.rows_max;
                let fits = has_room && bytes <= bounds.bytes_max;
                if !items.is_empty() && !fits {
                    // What else the statement asks for is not to be waited for by whoever comes next.
                    self.set_discard(has_room);
                    return Ok::<_, Error>(Page { items, more: true });
                }
                items.push(item);
            }
            Ok(Page { items, more: false })
        };
        self.watch(read).await
    }

    /// Prepares statements, so that they reach the server in the order in which they are polled.
    pub async fn prepare(&self, statements: &[&str]) -> Result<()> {
        for sql in statements {
            self.statement(sql).await?;
        }
        Ok(())
    }

    /// Commits what was begun. If the connection is lost meanwhile, whether it was committed is not known.
    pub(super) async fn commit(&self) -> Result<()> {
        if self.client.is_closed() {
            return Err(Error::ConnectionLost);
        }
        self.watch(self.client.batch_execute("COMMIT")).await.map_err(Error::in_commit)
    }

    /// A sink for rows in COPY's format.
    pub async fn copy_in(&self, sql: &str) -> Result<CopyInSink<bytes::Bytes>> {
        let statement = self.statement(sql).await?;
        Ok(self.client.copy_in(&statement).await?)
    }

    /// Waits for a statement's answer. A caller that gives up (its deadline has passed, its client is gone) drops this
    /// half-way, and is noticed by the count that stays.
    pub(super) async fn watch<T, E: Into<Error>>(&self, answer: impl Future<Output = Result<T, E>>) -> Result<T> {
        if self.client.is_closed() {
            // Nothing was sent.
            return Err(Error::ConnectionLost);
        }
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        let answer = answer.await;
        self.unanswered.fetch_sub(1, Ordering::Relaxed);
        answer.map_err(|error| match self.autocommits.load(Ordering::Relaxed) {
            true => error.into().in_commit(),
            false => error.into(),
        })
    }

    pub(super) fn set_autocommits(&self, autocommits: bool) {
        self.autocommits.store(autocommits, Ordering::Relaxed);
    }

    pub(super) async fn statement(&self, sql: &str) -> Result<Statement> {
        let kept = self.lock_statements().get(sql).cloned();
        if let Some(statement) = kept {
            return Ok(statement);
        }
        // Left half-way, it may be waiting for a lock as any statement.
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        let statement = self.client.prepare(sql).await;
        self.unanswered.fetch_sub(1, Ordering::Relaxed);
        let statement = statement?;
        let mut statements = self.lock_statements();
        if statements.len() >= STATEMENTS_PER_CONNECTION_MAX
            && let Some(any) = statements.keys().next().cloned()
        {
            statements.remove(&any);
        }
        statements.insert(sql.to_owned(), statement.clone());
        Ok(statement)
    }

    fn lock_statements(&self) -> std::sync::MutexGuard<'_, HashMap<String, Statement>> {
        // The map is whole whatever happened to a holder of the lock.
        self.statements.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the connection is to be closed instead of going back to the pool. Closing it ends whatever it holds: a
    /// transaction, locks.
    pub(super) fn set_discard(&self, discard: bool) {
        self.discard.store(discard, Ordering::Relaxed);
    }

    /// Whether something may still be running on the connection, for nobody. What comes next would wait behind it.
    pub(super) fn is_left_busy(&self) -> bool {
        self.discard.load(Ordering::Relaxed) || self.unanswered.load(Ordering::Relaxed) > 0
    }

    /// Sends a command ahead of whatever is sent next on this connection, without waiting for its answer: its first poll
    /// puts it in the connection's queue.
    pub(super) fn enqueue(&self, command: &str) -> Result<()> {
        let mut sending = pin!(self.client.batch_execute(command));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match sending.as_mut().poll(&mut context) {
            Poll::Ready(result) => Ok(result?),
            Poll::Pending => Ok(()),
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        // The server notices that its client is gone only when it next reads or writes, which may be long after: it is
        // told, so that it rolls back and frees its locks now.
        if self.is_left_busy()
            && !self.client.is_closed()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let running = self.client.cancel_token();
            let connector = self.connector.clone();
            runtime.spawn(async move { running.cancel_query(connector).await });
        }
    }
}

/// How much [`Conn::query_page`] reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageBounds {
    pub rows_max: usize,
    pub bytes_max: usize,
}

/// Some rows, and whether there are more.
#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub more: bool,
}
