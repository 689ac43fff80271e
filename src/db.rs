//! The database: a pool of connections that keep their prepared statements, and transactions on them.
//!
//! A query is a free function in the file of its noun, over [`Conn`]; a [`Tx`] dereferences to [`Conn`], so the same
//! function serves both. Nothing here knows of gRPC.

pub mod audit;
pub mod comments;

mod admission;
pub mod batchers;
pub mod connection_string;
pub mod idempotency;
pub mod imports;
pub mod issues;
pub mod labels;
mod manager;
pub mod migrate;
pub mod reports;
mod tls;
pub mod tokens;
pub mod users;

use std::{
    collections::HashMap,
    future::Future,
    ops::Deref,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures_util::TryStreamExt;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_postgres::{Client, CopyInSink, Row, Statement, types::ToSql};

pub use self::connection_string::Target;
use self::{admission::Queue, manager::Manager, tls::Connector};
use crate::error::{Error, Result};

/// Statements kept prepared with each connection. Only the shapes of a filter can be more than a few dozen; past the bound
/// any one makes room for a new one.
const STATEMENTS_PER_CONNECTION_MAX: usize = 256;
/// How long a statement waits for what another transaction has locked.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a transaction may wait for its next statement.
const IDLE_IN_TRANSACTION_MAX: Duration = Duration::from_secs(60);
/// How long a database on the network may be silent when it should answer.
const NETWORK_SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a new connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Mutations find their rows by keys. Plans are kept with a connection: one that was made while a table was small would go
/// on to read all of it when it has grown.
const BEGIN: &str = "BEGIN; SET LOCAL enable_seqscan = off";
/// How many rows are pruned by one statement.
pub const PRUNED_AT_ONCE: i64 = 10_000;
/// Connections that only see who calls: they are not behind what else is asked for.
const AUTH_CONNECTIONS_MAX: u32 = 3;
/// How many connections, and how long things may take.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    pub connections_max: u32,
    /// How long a call waits for a free connection.
    pub wait_max: Duration,
    /// PostgreSQL's `statement_timeout`.
    pub statement_max: Duration,
}

impl PoolOptions {
    /// For a program that does one thing and ends.
    pub const SMALL: Self =
        Self { connections_max: 2, wait_max: Duration::from_secs(2), statement_max: Duration::from_secs(30) };
}

/// The pool. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    pool: bb8::Pool<Manager>,
    manager: Manager,
    /// Whether the database answers, and has done so for a moment.
    healthy: watch::Receiver<bool>,
    options: PoolOptions,
    lock_slots: Arc<Slots>,
    heavy_slots: Arc<Slots>,
    queue: Arc<Queue>,
}

pub type PooledConn = bb8::PooledConnection<'static, Manager>;

impl Db {
    /// Makes the pool, without waiting for the database to be there.
    pub fn new(target: impl Into<Target>, options: PoolOptions) -> Self {
        let Target { mut config, connector } = target.into();
        // jit compiles expensive-looking plans, which costs more than short statements ever gain.
        let settings = format!(
            "{} -c jit=off -c statement_timeout={} -c lock_timeout={} -c idle_in_transaction_session_timeout={}",
            config.get_options().unwrap_or_default(),
            options.statement_max.as_millis(),
            LOCK_WAIT_MAX.as_millis(),
            IDLE_IN_TRANSACTION_MAX.as_millis(),
        );
        config.options(settings.trim());
        config.application_name("issue-tracker");
        config.connect_timeout(CONNECT_TIMEOUT);
        // A server that is cut off without a word is noticed by what is sent to it, or by asking.
        config.tcp_user_timeout(NETWORK_SILENCE_MAX).keepalives_idle(NETWORK_SILENCE_MAX);

        let (manager, healthy) = Manager::start(config, connector);
        Self::with_manager(manager, healthy, options)
    }

    /// A pool of its own on the same database, for finding out who calls.
    pub fn for_auth(&self) -> Self {
        let options = PoolOptions { connections_max: AUTH_CONNECTIONS_MAX, ..self.options.clone() };
        Self::with_manager(self.manager.clone(), self.healthy.clone(), options)
    }

    fn with_manager(manager: Manager, healthy: watch::Receiver<bool>, options: PoolOptions) -> Self {
        let pool = bb8::Pool::builder()
            .max_size(options.connections_max)
            .connection_timeout(options.wait_max)
            // A round trip at every checkout would double the cost of a short call; dead connections are noticed by
            // `has_broken`, and a waiting call is told at once through `up`.
            .test_on_check_out(false)
            .retry_connection(false)
            .build_unchecked(manager.clone());
        let connections = options.connections_max;
        Self {
            pool,
            manager,
            healthy,
            lock_slots: Arc::new(Slots::new(connections / 2, options.wait_max)),
            heavy_slots: Arc::new(Slots::new(connections / 4, options.wait_max)),
            queue: Arc::new(Queue::new(connections, options.wait_max)),
            options,
        }
    }

    /// Taken by what may wait for others' locks, so that half of the connections stay for what does not.
    pub async fn lock_slot(&self) -> Result<OwnedSemaphorePermit> {
        self.lock_slots.take("too many requests wait for what others are changing; try again").await
    }

    /// Taken by what keeps the database at work for long, so that most of the connections stay for what does not.
    pub async fn heavy_slot(&self) -> Result<OwnedSemaphorePermit> {
        self.heavy_slots.take("too many reports and searches are under way; try again").await
    }

    /// A connection for statements that only read.
    ///
    /// `Unavailable` at once when the database is away, `Exhausted` when no connection became free in time, and at once
    /// when none will.
    pub async fn conn(&self) -> Result<PooledConn> {
        let conn = self.checkout().await?;
        conn.set_autocommits(false);
        Ok(conn)
    }

    /// A connection for single statements that write, each of which is its own transaction. If it is lost, whether the
    /// statement was executed is not known.
    pub async fn autocommit_conn(&self) -> Result<PooledConn> {
        let conn = self.checkout().await?;
        conn.set_autocommits(true);
        Ok(conn)
    }

    async fn checkout(&self) -> Result<PooledConn> {
        let place = self.queue.join().ok_or_else(|| {
            Error::Exhausted("too many requests wait for a database connection already; try again".to_owned())
        })?;
        let mut up = self.manager.watch_up();
        loop {
            let conn = tokio::select! {
                biased;
                conn = self.pool.get_owned() => conn,
                Ok(_) = up.wait_for(|up| !up) => return Err(Error::Unavailable),
            };
            match conn {
                // It died while idle; dropping it makes room for a new one.
                Ok(conn) if conn.client.is_closed() => continue,
                Ok(conn) => {
                    place.served();
                    return Ok(conn);
                }
                // None could be made.
                Err(bb8::RunError::TimedOut) if self.pool.state().connections == 0 => return Err(Error::Unavailable),
                Err(bb8::RunError::TimedOut) => {
                    return Err(Error::Exhausted(format!(
                        "all {} database connections were busy for {} ms",
                        self.options.connections_max,
                        self.options.wait_max.as_millis()
                    )));
                }
                Err(bb8::RunError::User(error)) => return Err(error.into()),
            }
        }
    }

    /// Begins a transaction. It is rolled back unless it is committed.
    pub async fn begin(&self) -> Result<Tx> {
        let conn = self.conn().await?;
        conn.enqueue(BEGIN)?;
        Ok(Tx { conn, open: true })
    }

    /// Whether the database answers, as it changes.
    pub fn watch_health(&self) -> watch::Receiver<bool> {
        self.healthy.clone()
    }
}

/// A share of the connections: who does not get one in time is told so, and at once if too many wait.
struct Slots {
    free: Arc<Semaphore>,
    queue: Queue,
    wait_max: Duration,
}

impl Slots {
    /// At least one.
    fn new(count: u32, wait_max: Duration) -> Self {
        let count = count.max(1);
        Self { free: Arc::new(Semaphore::new(count as usize)), queue: Queue::new(count, wait_max), wait_max }
    }

    async fn take(&self, busy: &str) -> Result<OwnedSemaphorePermit> {
        let busy = || Error::Exhausted(busy.to_owned());
        let place = self.queue.join().ok_or_else(busy)?;
        let slot = tokio::time::timeout(self.wait_max, Arc::clone(&self.free).acquire_owned()).await;
        let slot = slot.map_err(|_| busy())?.map_err(|_| busy())?;
        place.served();
        Ok(slot)
    }
}

/// A connection with its prepared statements. Statements whose futures are polled together go out together.
pub struct Conn {
    client: Client,
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
    fn new(client: Client, connector: Connector) -> Self {
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
    async fn commit(&self) -> Result<()> {
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
    async fn watch<T, E: Into<Error>>(&self, answer: impl Future<Output = Result<T, E>>) -> Result<T> {
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

    fn set_autocommits(&self, autocommits: bool) {
        self.autocommits.store(autocommits, Ordering::Relaxed);
    }

    async fn statement(&self, sql: &str) -> Result<Statement> {
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
    fn set_discard(&self, discard: bool) {
        self.discard.store(discard, Ordering::Relaxed);
    }

    /// Whether something may still be running on the connection, for nobody. What comes next would wait behind it.
    fn is_left_busy(&self) -> bool {
        self.discard.load(Ordering::Relaxed) || self.unanswered.load(Ordering::Relaxed) > 0
    }

    /// Sends a command ahead of whatever is sent next on this connection, without waiting for its answer: its first poll
    /// puts it in the connection's queue.
    fn enqueue(&self, command: &str) -> Result<()> {
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
