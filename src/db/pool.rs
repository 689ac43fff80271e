//! The pool of connections, and the shares of it that keep some of them free.

use std::{sync::Arc, time::Duration};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::{admission::Queue, connection_string::Target, manager::Manager};
use crate::error::{Error, Result};

/// How long a statement waits for what another transaction has locked.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a transaction may wait for its next statement.
const IDLE_IN_TRANSACTION_MAX: Duration = Duration::from_secs(60);
/// How long a database on the network may be silent when it should answer.
const NETWORK_SILENCE_MAX: Duration = Duration::from_secs(10);
/// How long a new connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
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
