//! The pool of connections, which callers share, and permits for work that takes its connections for long.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use super::{
    availability::Health,
    conn::{CommitMode, Conn},
    connection_string::ConnectionString,
    manager::Manager,
    probe,
    row_locks::LockWait,
    timeouts::{NETWORK_SILENCE_MAX, set_timeouts},
};
use crate::{
    error::{Error, Result},
    fairness::{FairPermit, FairSemaphore, Flow, SharePercent},
    metrics::{self, PoolMetrics, PoolUsage},
};

/// How long a call waits before the pool looks again whether a new connection must be made. It does so only when a call begins
/// to wait: if connecting failed for one call, the others would wait for nothing.
const POOL_LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// PostgreSQL's `lock_timeout`: how long a statement waits for a lock that another transaction holds.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// PostgreSQL's `idle_in_transaction_session_timeout`: how long a transaction may wait for its next statement.
const IDLE_IN_TRANSACTION_TIMEOUT: Duration = Duration::from_secs(60);
/// When and how often the server probes a connection on which the service sends nothing.
const SERVER_KEEPALIVE_IDLE: Duration = Duration::from_secs(5);
const SERVER_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const SERVER_KEEPALIVE_COUNT: u32 = 3;
/// How often the server checks during a statement whether its connection is closed.
const CONNECTION_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Connections of the pool that authenticates callers. It is separate, so that authentication does not wait for
/// requests.
const AUTH_CONNECTIONS_MAX: u32 = 3;

/// The size and the timeouts of a pool.
#[derive(Clone, Debug)]
pub struct PoolOptions {
    pub connections_max: u32,
    /// How long a call waits for a free connection.
    pub wait_max: Duration,
    /// PostgreSQL's `statement_timeout`.
    pub statement_max: Duration,
    /// How much of the pool one user may hold.
    pub share: SharePercent,
}

impl PoolOptions {
    /// For a command that runs a few statements and exits.
    pub const SMALL: Self = Self {
        connections_max: 2,
        wait_max: Duration::from_secs(2),
        statement_max: Duration::from_secs(30),
        share: SharePercent(100),
    };
}

/// Limits on stored data.
#[derive(Clone, Copy, Debug)]
pub struct StorageLimits {
    /// How long the responses of mutations with a request id are stored at least.
    pub response_hours: i32,
    /// The bytes of large responses that are stored for a user in 24 hours.
    pub response_bytes_per_user_max: i64,
    pub labels_max: i64,
    /// The row errors of imports that are stored for a user.
    pub import_errors_per_user_max: i64,
    /// How long the row errors of an import are stored.
    pub import_error_days: i32,
    /// How long an import can be read and reverted.
    pub import_days: i32,
    /// How long audit events are stored.
    pub audit_days: i32,
}

impl StorageLimits {
    const NONE: Self = Self {
        response_hours: i32::MAX,
        response_bytes_per_user_max: i64::MAX,
        labels_max: i64::MAX - 1,
        import_errors_per_user_max: i64::MAX,
        import_error_days: i32::MAX,
        import_days: i32::MAX,
        audit_days: i32::MAX,
    };
}

/// The pool, as one flow uses it. Clones share it.
#[derive(Clone)]
pub struct Db {
    shared: Arc<Shared>,
    flow: Flow,
    storage_limits: StorageLimits,
}

struct Shared {
    pool: bb8::Pool<Manager>,
    manager: Manager,
    /// What works, according to the latest probes.
    health: watch::Receiver<Health>,
    options: PoolOptions,
    connections: FairSemaphore,
    work: WorkPermits,
    metrics: Option<PoolMetrics>,
}

impl Shared {
    fn usage(&self) -> PoolUsage {
        let bb8::State { connections, idle_connections, .. } = self.pool.state();
        let used = connections.saturating_sub(idle_connections);
        PoolUsage { idle: idle_connections, used, pending: self.connections.waiting_count() }
    }

    fn count_timeout(&self) {
        self.metrics.iter().for_each(|metrics| metrics.timeouts.inc());
    }
}

/// Permits for work that takes connections for long.
#[derive(Clone)]
struct WorkPermits {
    lock_waits: FairSemaphore,
    heavy_queries: FairSemaphore,
}

/// The names of a pool, in metrics, and of the permits for its connections, in log lines and metrics.
struct PoolNames {
    pool: &'static str,
    connections: &'static str,
}

impl Db {
    /// Returns a pool as [`Flow::Internal`] uses it. Connects in the background: the database need not be available yet.
    pub fn new(database: impl Into<ConnectionString>, options: PoolOptions) -> Self {
        Self::with_schema(database.into(), options, true)
    }

    /// Returns a pool on a database whose schema may be missing or outdated. Calls fail with `Unavailable` and health
    /// reports that nothing works until [`Db::set_prepared`].
    pub fn unprepared(database: impl Into<ConnectionString>, options: PoolOptions) -> Self {
        Self::with_schema(database.into(), options, false)
    }

    /// Allows calls: the schema is that of this program.
    pub fn set_prepared(&self) {
        self.shared.manager.availability().set_prepared();
    }

    fn with_schema(database: ConnectionString, options: PoolOptions, prepared: bool) -> Self {
        let ConnectionString { mut config, connector } = database;
        config.options(session_settings(config.get_options().unwrap_or_default(), &options));
        config.application_name("issue-tracker");
        set_timeouts(&mut config);

        let manager = Manager::new(config, connector, prepared);
        let (health_found, health) = watch::channel(Health { reads: prepared, writes: prepared });
        tokio::spawn(probe::run(manager.clone(), health_found));
        let (connections, share) = (options.connections_max, options.share);
        let work = WorkPermits {
            lock_waits: FairSemaphore::new("row lock waiters", connections / 2, share),
            heavy_queries: FairSemaphore::new("reports, searches and large batches", connections / 4, share),
        };
        let names = PoolNames { pool: "main", connections: "database connections" };
        let db = Self::with_manager(names, manager, health, options, work);
        if let Some(metrics) = metrics::get() {
            let observed = Arc::downgrade(&db.shared);
            metrics.database.observe_availability(move || {
                let Health { reads, writes } = *observed.upgrade()?.health.borrow();
                Some([reads, writes])
            });
        }
        db
    }

    /// Returns a separate pool on the same database, for authentication.
    pub fn for_auth(&self) -> Self {
        let options = PoolOptions { connections_max: AUTH_CONNECTIONS_MAX, ..self.shared.options.clone() };
        let Shared { manager, health, work, .. } = &*self.shared;
        let names = PoolNames { pool: "authentication", connections: "database connections for authentication" };
        Self::with_manager(names, manager.clone(), health.clone(), options, work.clone())
    }

    /// Returns the same pool as this flow uses it.
    pub fn for_flow(&self, flow: Flow) -> Self {
        Self { flow, ..self.clone() }
    }

    fn with_manager(
        names: PoolNames,
        manager: Manager,
        health: watch::Receiver<Health>,
        options: PoolOptions,
        work: WorkPermits,
    ) -> Self {
        let pool = bb8::Pool::builder()
            .max_size(options.connections_max)
            .connection_timeout(options.wait_max.min(POOL_LOOK_INTERVAL))
            // A round trip at every checkout would double the cost of a short call. `has_broken` finds dead connections, and
            // `up` ends the wait when the database becomes unavailable.
            .test_on_check_out(false)
            .retry_connection(true)
            .build_unchecked(manager.clone());
        let (connections, share) = (options.connections_max, options.share);
        let shared = Arc::new_cyclic(|shared: &Weak<Shared>| {
            let shared = Weak::clone(shared);
            let usage = move || Some(shared.upgrade()?.usage());
            let metrics = metrics::get().map(|metrics| metrics.database.observe_pool(names.pool, connections, usage));
            Shared {
                pool,
                manager,
                health,
                connections: FairSemaphore::new(names.connections, connections, share),
                work,
                options,
                metrics,
            }
        });
        Self { shared, flow: Flow::Internal, storage_limits: StorageLimits::NONE }
    }

    /// Returns the pool with limits on stored data. A new pool has none.
    pub fn with_storage_limits(self, storage_limits: StorageLimits) -> Self {
        Self { storage_limits, ..self }
    }

    pub fn storage_limits(&self) -> StorageLimits {
        self.storage_limits
    }

    /// Returns a connection for statements that only read.
    ///
    /// Fails with `Unavailable` at once if the database is unavailable; with `Exhausted` if no connection becomes free
    /// in time, or at once if the wait would be too long.
    pub async fn conn(&self) -> Result<Conn> {
        self.checkout(CommitMode::Explicit, None).await
    }

    /// Returns a connection for statements that write, each of which is a transaction of its own. If the connection is
    /// lost, the outcome of the statement is unknown.
    pub async fn autocommit_conn(&self) -> Result<Conn> {
        self.checkout(CommitMode::EachStatement, None).await
    }

    /// As [`Db::conn`], for a query that can run for seconds. Three quarters of the connections stay free for other work.
    pub async fn heavy_conn(&self) -> Result<Conn> {
        let refused = "too many concurrent reports, searches and reads of large batches; try again";
        let permit = self.acquire(&self.shared.work.heavy_queries, refused).await?;
        self.checkout(CommitMode::Explicit, Some(permit)).await
    }

    /// As [`Db::conn`] or [`Db::autocommit_conn`], for a mutation. While mutations wait for locks, half of the connections stay
    /// free for other work.
    pub(super) async fn mutation_conn(&self, commit_mode: CommitMode, lock_wait: LockWait) -> Result<Conn> {
        let permit = match lock_wait {
            LockWait::Brief => None,
            LockWait::Full => {
                let refused = "too many requests wait for row locks; try again";
                Some(self.acquire(&self.shared.work.lock_waits, refused).await?)
            }
        };
        self.checkout(commit_mode, permit).await
    }

    async fn acquire(&self, permits: &FairSemaphore, refused: &str) -> Result<FairPermit> {
        let permit = permits.acquire(self.flow, self.shared.options.wait_max).await;
        permit.map_err(|_| Error::Exhausted(refused.to_owned()))
    }

    /// `of_work`: the permit for the kind of work, which is held until the session has returned to the pool.
    async fn checkout(&self, commit_mode: CommitMode, of_work: Option<FairPermit>) -> Result<Conn> {
        let Shared { pool, manager, connections, options, metrics, .. } = &*self.shared;
        if !manager.availability().is_prepared() {
            return Err(Error::Unavailable);
        }
        let (mut up, mut waited) = (manager.availability().watch_up(), Duration::ZERO);
        let began = Instant::now();
        let refused = "too many requests wait for a database connection; try again";
        let permit = tokio::select! {
            biased;
            permit = self.acquire(connections, refused) => permit.inspect_err(|_| self.shared.count_timeout())?,
            Ok(_) = up.wait_for(|up| !up) => return Err(Error::Unavailable),
        };
        waited += began.elapsed();
        loop {
            let began = Instant::now();
            let session = tokio::select! {
                biased;
                session = pool.get_owned() => session,
                Ok(_) = up.wait_for(|up| !up) => return Err(Error::Unavailable),
            };
            waited += began.elapsed();
            match session {
                // It was closed or retired while it was idle. Dropping it makes room for a new one.
                Ok(session) if session.client().is_closed() || session.is_outdated() => continue,
                // Another connection was lost without being closed: this one may be lost too.
                Ok(session) if session.is_suspect() && !session.validate().await => continue,
                Ok(session) => {
                    metrics.iter().for_each(|metrics| metrics.wait_time.observe(waited.as_secs_f64()));
                    return Ok(Conn::new(session, commit_mode, [Some(permit), of_work]));
                }
                // No connection could be made, although this caller has a permit for one and the database is not known to be
                // unavailable.
                Err(bb8::RunError::TimedOut) if waited < options.wait_max => continue,
                Err(bb8::RunError::TimedOut) => {
                    self.shared.count_timeout();
                    return Err(Error::Unavailable);
                }
                Err(bb8::RunError::User(error)) => return Err(error),
            }
        }
    }

    /// Returns what works, as it changes.
    pub fn watch_health(&self) -> watch::Receiver<Health> {
        self.shared.health.clone()
    }
}

/// Returns the settings of a session, after those of the connection string.
fn session_settings(own: &str, options: &PoolOptions) -> String {
    let milliseconds = |time: Duration| time.as_millis();
    let settings = [
        // Just-in-time compilation costs short statements more than it saves.
        "jit=off".to_owned(),
        format!("statement_timeout={}", milliseconds(options.statement_max)),
        format!("lock_timeout={}", milliseconds(LOCK_TIMEOUT)),
        format!("idle_in_transaction_session_timeout={}", milliseconds(IDLE_IN_TRANSACTION_TIMEOUT)),
        // Without these, the server keeps the locks of a replica that vanished for up to two hours. On Unix sockets they
        // are without effect.
        format!("tcp_user_timeout={}", milliseconds(NETWORK_SILENCE_MAX)),
        format!("tcp_keepalives_idle={}", SERVER_KEEPALIVE_IDLE.as_secs()),
        format!("tcp_keepalives_interval={}", SERVER_KEEPALIVE_INTERVAL.as_secs()),
        format!("tcp_keepalives_count={SERVER_KEEPALIVE_COUNT}"),
        // A server that runs a statement or waits for a lock does not read: it must look for a closed connection.
        format!("client_connection_check_interval={}", milliseconds(CONNECTION_CHECK_INTERVAL)),
    ];
    settings.iter().fold(own.to_owned(), |all, setting| format!("{all} -c {setting}")).trim().to_owned()
}
