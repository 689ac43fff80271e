//! Connects for the pool, and probes whether the database is available.

use std::{
    error::Error as _,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bb8_postgres::PostgresConnectionManager;
use tokio::sync::{Notify, watch};
use tokio_postgres::{Client, Config, error::DbError};

use super::{session::Session, tls::Connector};
use crate::backoff::{Backoff, random};

/// The interval of probes and the time allowed for one. Together less than two seconds: health is not outdated for longer.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_200);
/// Minimum time between two log lines about refused connections.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long a database must respond after an outage before it counts as healthy.
const PROBE_STEADY: Duration = Duration::from_millis(200);
/// How often a connection is made that closes before the server has answered.
const CONNECT_ATTEMPTS_MAX: u32 = 3;
const CONNECT_BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };

/// Opens connections for the pool, and detects broken ones.
#[derive(Clone)]
pub struct Manager {
    inner: PostgresConnectionManager<Connector>,
    connector: Connector,
    up: Arc<watch::Sender<bool>>,
    /// Notified when a connection could not be made: the next probe runs at once.
    probe_now: Arc<Notify>,
    /// When a refused connection was logged last.
    refusal_logged: Arc<Mutex<Option<Instant>>>,
}

impl Manager {
    /// Starts the probes. Returns whether the database responds, as it changes.
    pub fn start(config: Config, connector: Connector) -> (Self, watch::Receiver<bool>) {
        let (healthy, is_healthy) = watch::channel(true);
        let manager = Self {
            inner: PostgresConnectionManager::new(config, connector.clone()),
            connector,
            up: Arc::new(watch::Sender::new(true)),
            probe_now: Arc::default(),
            refusal_logged: Arc::default(),
        };
        tokio::spawn(probe(manager.clone(), healthy));
        (manager, is_healthy)
    }

    /// Returns whether connections can be made, as it changes.
    pub fn watch_up(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }

    /// Logs that the server refuses connections: a wrong password, too many connections. PostgreSQL's message is not
    /// logged, because it can quote values.
    fn log_refusal(&self, error: &DbError) {
        let now = Instant::now();
        let mut logged = self.refusal_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|logged| now.duration_since(logged) >= REFUSAL_LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(sqlstate = error.code().code(), "database refused connection");
        }
    }

    fn set_up(&self, up: bool) {
        let changed = self.up.send_if_modified(|was| std::mem::replace(was, up) != up);
        match (changed, up) {
            (true, true) => tracing::info!("database became available"),
            (true, false) => tracing::warn!("database became unavailable"),
            (false, _) => {}
        }
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Session;
    type Error = tokio_postgres::Error;

    async fn connect(&self) -> Result<Session, tokio_postgres::Error> {
        let client =
            repeat_if_closed(|| self.inner.connect()).await.inspect_err(|error| match error.as_db_error() {
                // A server that refuses a connection is available. Of other errors the probe finds out the reason.
                Some(error) => self.log_refusal(error),
                None => self.probe_now.notify_one(),
            })?;
        self.set_up(true);
        Ok(Session::new(client, self.connector.clone()))
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), tokio_postgres::Error> {
        session.client().batch_execute("").await
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}

/// Probes the database until all receivers are dropped. Uses a connection of its own, so that a busy pool does not look
/// like an unavailable database.
async fn probe(manager: Manager, healthy: watch::Sender<bool>) {
    let mut client: Option<Client> = None;
    while !healthy.is_closed() {
        let response = tokio::time::timeout(PROBE_TIMEOUT, async {
            if let Some(kept) = &client
                && kept.batch_execute("").await.is_ok()
            {
                return Ok(());
            }
            // A lost connection does not mean that the database is unavailable.
            let was_healthy = *healthy.borrow();
            let connected = repeat_if_closed(|| async {
                let connected = bb8::ManageConnection::connect(&manager.inner).await?;
                connected.batch_execute("").await?;
                if !was_healthy {
                    // A server that restarts again at once is not healthy.
                    tokio::time::sleep(PROBE_STEADY).await;
                    connected.batch_execute("").await?;
                }
                Ok(connected)
            });
            client = Some(connected.await?);
            Ok::<_, tokio_postgres::Error>(())
        });
        let outcome = response.await;
        match outcome {
            Ok(Ok(())) => manager.set_up(true),
            Ok(Err(ref error)) => {
                error.as_db_error().inspect(|error| manager.log_refusal(error));
                manager.set_up(false);
            }
            // The server hangs or is overloaded. Calls that wait for it may still succeed.
            Err(_) if *healthy.borrow() => tracing::warn!("database probe timed out"),
            Err(_) => {}
        }
        let is_healthy = matches!(outcome, Ok(Ok(())));
        if !is_healthy {
            client = None;
        }
        healthy.send_if_modified(|was| std::mem::replace(was, is_healthy) != is_healthy);
        let _ = tokio::time::timeout(PROBE_INTERVAL, manager.probe_now.notified()).await;
    }
}

/// Makes a connection, again if it closes early. A connection that is cut while it is established says nothing about the
/// next one: without another attempt, callers would wait for it until their time is over.
async fn repeat_if_closed<T, F>(mut connect: impl FnMut() -> F) -> Result<T, tokio_postgres::Error>
where
    F: Future<Output = Result<T, tokio_postgres::Error>>,
{
    let mut failures = 0;
    loop {
        match connect().await {
            Err(error) if is_closed(&error) && failures + 1 < CONNECT_ATTEMPTS_MAX => {
                tokio::time::sleep(CONNECT_BACKOFF.delay(failures, random())).await;
                failures += 1;
            }
            outcome => return outcome,
        }
    }
}

/// Returns whether the connection was accepted, and closed before an answer.
fn is_closed(error: &tokio_postgres::Error) -> bool {
    let io_error = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    error.is_closed()
        || io_error.is_some_and(|error| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
        })
}
