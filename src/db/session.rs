//! The state of a pooled connection between checkouts.

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::timeout;
use tokio_postgres::{Client, Statement};

use super::{
    activity::{Awaited, SessionActivity},
    availability::Availability,
    cancellation::Canceller,
};
use crate::{
    error::Result,
    metrics::{self, Histogram, Timer},
};

/// Maximum prepared statements of a connection. Only the shapes of filters are more than a few dozen; past the bound, an
/// arbitrary statement makes room for a new one.
const STATEMENTS_PER_CONNECTION_MAX: usize = 256;

/// How long a statement may run on whose caller has stopped waiting.
const ABANDONED_STATEMENT_MAX: Duration = Duration::from_millis(100);
/// How long its cancellation may take before the session is closed.
const CANCELLATION_MAX: Duration = Duration::from_secs(1);
/// How long the session waits for the end of a statement whose caller has stopped waiting.
pub(super) const ABANDONED_MAX: Duration = ABANDONED_STATEMENT_MAX.saturating_add(CANCELLATION_MAX);
/// A cancel request can reach the command with which a caller leaves the session as it found it.
const AFTER_CANCELLATION: &str = "-- after_cancellation\nRESET lock_timeout";

/// Time allowed for the response of a suspect session.
const VALIDATION_MAX: Duration = Duration::from_secs(1);

/// A prepared statement, with the histogram of its durations if metrics are enabled.
#[derive(Clone)]
pub(super) struct PreparedStatement {
    statement: Statement,
    duration: Option<Histogram>,
}

impl PreparedStatement {
    /// Measures the duration of the statement until the result is dropped.
    pub(super) fn start_timer(&self) -> Timer {
        Timer::start(self.duration.clone())
    }
}

impl Deref for PreparedStatement {
    type Target = Statement;

    fn deref(&self) -> &Statement {
        &self.statement
    }
}

/// A connection to the server with its prepared statements.
pub struct Session {
    client: Client,
    canceller: Canceller,
    statements: Mutex<HashMap<String, PreparedStatement>>,
    /// Statements that were sent and whose response has not arrived. After the checkout has ended: statements whose
    /// callers have stopped waiting.
    statements_in_flight: AtomicU32,
    activity: Arc<SessionActivity>,
    availability: Arc<Availability>,
    /// See [`Availability::generation`].
    generation: u32,
    /// Whether it refused a write while new sessions can write.
    is_read_only: AtomicBool,
    /// Whether it has state that the next caller must not meet: an open transaction, an advisory lock, a half-read result.
    is_stateful: AtomicBool,
}

impl Session {
    pub(super) fn new(
        client: Client,
        canceller: Canceller,
        activity: SessionActivity,
        availability: Arc<Availability>,
        generation: u32,
    ) -> Self {
        let activity = Arc::new(activity);
        availability.register(&activity);
        Self {
            client,
            canceller,
            statements: Mutex::default(),
            statements_in_flight: AtomicU32::new(0),
            activity,
            availability,
            generation,
            is_read_only: AtomicBool::new(false),
            is_stateful: AtomicBool::new(false),
        }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Counts a statement as in flight.
    pub(super) fn begin_statement(&self) {
        self.statements_in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends what [`Session::begin_statement`] has counted, unless [`Session::end_abandoned_statements`] has.
    pub(super) fn end_statement(&self) {
        let less_one = |count: u32| count.checked_sub(1);
        let _ = self.statements_in_flight.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less_one);
        self.activity.count_response();
    }

    /// Counts a caller as waiting for a response until the guard is dropped.
    pub(super) fn await_response(&self) -> Awaited<'_> {
        self.activity.await_response()
    }

    /// Waits for the end of statements whose callers have stopped waiting, and cancels them after [`ABANDONED_STATEMENT_MAX`]:
    /// calls with short deadlines would otherwise cost a new session each. A session on which that fails cannot be used again.
    pub(super) async fn end_abandoned_statements(&self) {
        // Sent after the statements, and after the ROLLBACK of their transaction.
        let ended = match timeout(ABANDONED_STATEMENT_MAX, self.client.batch_execute("")).await {
            Ok(ended) => ended.is_ok(),
            Err(_) => timeout(CANCELLATION_MAX, self.cancel_statements()).await.unwrap_or(false),
        };
        if ended {
            self.statements_in_flight.store(0, Ordering::Relaxed);
        }
    }

    /// Cancels what the session is executing. Returns whether it can be used again: the next statement must not be cancelled
    /// instead, or meet an open transaction.
    async fn cancel_statements(&self) -> bool {
        if self.canceller.cancel(&self.client.cancel_token()).await.is_err() {
            return false;
        }
        // Fails in a transaction that has failed: then its ROLLBACK was cancelled.
        self.client.batch_execute(AFTER_CANCELLATION).await.is_ok()
    }

    fn is_stateful(&self) -> bool {
        self.is_stateful.load(Ordering::Relaxed)
    }

    pub(super) fn set_stateful(&self, is_stateful: bool) {
        self.is_stateful.store(is_stateful, Ordering::Relaxed);
    }

    /// Returns whether the session cannot be used again: it is closed, has state or is outdated, or a statement may still be
    /// running, which the next one would wait for.
    pub(super) fn is_broken(&self) -> bool {
        self.is_closed_on_return() || self.has_statement_in_flight()
    }

    /// Returns whether the session cannot be used again, whatever the outcome of its statements.
    pub(super) fn is_closed_on_return(&self) -> bool {
        self.client.is_closed() || self.is_stateful() || self.is_outdated()
    }

    /// Returns whether a new session may be able to write and this one is not.
    pub(super) fn is_outdated(&self) -> bool {
        self.generation != self.availability.generation() || self.is_read_only.load(Ordering::Relaxed)
    }

    /// Returns whether the connection may be lost without being closed, because another one was lost.
    pub(super) fn is_suspect(&self) -> bool {
        self.activity.suspicion() != self.availability.suspicion()
    }

    /// Returns whether a suspect session responds within 1 s. If it does not, it is closed and all others are retired.
    pub(super) async fn validate(&self) -> bool {
        let suspicion = self.availability.suspicion();
        match timeout(VALIDATION_MAX, self.client.batch_execute("")).await {
            Ok(Ok(())) => {
                self.activity.trust(suspicion);
                return true;
            }
            Ok(Err(_)) => {}
            Err(_) => self.availability.retire_sessions(),
        }
        self.activity.close();
        // The connection closes when its task next runs. Until then the session must not be used.
        self.begin_statement();
        false
    }

    /// Reports that the server refused a write because the session is read-only.
    ///
    /// The session is kept if new ones are read-only too: reads need it.
    pub(super) fn report_read_only(&self) {
        if self.availability.is_writable() {
            self.is_read_only.store(true, Ordering::Relaxed);
            self.availability.report_read_only();
        }
    }

    pub(super) fn has_statement_in_flight(&self) -> bool {
        self.statements_in_flight.load(Ordering::Relaxed) > 0
    }

    /// Returns the statement if it is prepared and kept.
    pub(super) fn prepared(&self, sql: &str) -> Option<PreparedStatement> {
        self.lock_statements().get(sql).cloned()
    }

    /// Keeps a prepared statement.
    pub(super) fn keep(&self, sql: &str, statement: &PreparedStatement) {
        let mut statements = self.lock_statements();
        if statements.len() >= STATEMENTS_PER_CONNECTION_MAX
            && let Some(any) = statements.keys().next().cloned()
        {
            statements.remove(&any);
        }
        statements.insert(sql.to_owned(), statement.clone());
    }

    /// Prepares a statement that lives as long as the result.
    pub(super) async fn prepare(&self, sql: &str) -> Result<PreparedStatement> {
        // Preparing can wait for a lock on a table, too.
        let _awaited = self.await_response();
        self.begin_statement();
        let statement = self.client.prepare(sql).await;
        self.end_statement();
        let duration = metrics::get().map(|metrics| metrics.database.statement_duration(sql));
        Ok(PreparedStatement { statement: statement?, duration })
    }

    fn lock_statements(&self) -> MutexGuard<'_, HashMap<String, PreparedStatement>> {
        // A panic of another holder leaves the map valid.
        self.statements.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.availability.unregister(&self.activity);
        // PostgreSQL notices a closed connection only when it next reads or writes. A cancel request makes it roll back
        // and release its locks now.
        if (self.has_statement_in_flight() || self.is_stateful())
            && !self.client.is_closed()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (canceller, statement) = (self.canceller.clone(), self.client.cancel_token());
            runtime.spawn(async move { canceller.request(statement).await });
        }
    }
}
