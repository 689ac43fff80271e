//! Connects for the pool, and detects broken connections.

use std::{
    error::Error as _,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bb8_postgres::PostgresConnectionManager;
use tokio::sync::watch;
use tokio_postgres::{Client, Config, error::DbError};

use super::{
    availability::{Availability, Health},
    probe,
    session::Session,
    tls::Connector,
};
use crate::backoff::{Backoff, random};

/// Minimum time between two log lines about refused connections.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How often a connection is made that closes before the server has answered.
const CONNECT_ATTEMPTS_MAX: u32 = 3;
const CONNECT_BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };

/// Opens connections for the pool, and detects broken ones.
#[derive(Clone)]
pub struct Manager {
    inner: PostgresConnectionManager<Connector>,
    connector: Connector,
    availability: Arc<Availability>,
    /// When a refused connection was logged last.
    refusal_logged: Arc<Mutex<Option<Instant>>>,
}

impl Manager {
    /// Starts the probes. Returns what works, as it changes.
    pub fn start(config: Config, connector: Connector) -> (Self, watch::Receiver<Health>) {
        let (health, watched) = watch::channel(Health { reads: true, writes: true });
        let manager = Self {
            inner: PostgresConnectionManager::new(config, connector.clone()),
            connector,
            availability: Arc::default(),
            refusal_logged: Arc::default(),
        };
        tokio::spawn(probe::run(manager.clone(), health));
        (manager, watched)
    }

    pub(super) fn availability(&self) -> &Availability {
        &self.availability
    }

    /// Opens a connection outside the pools.
    pub(super) async fn connect_client(&self) -> Result<Client, tokio_postgres::Error> {
        bb8::ManageConnection::connect(&self.inner).await
    }

    /// Logs that the server refuses connections: a wrong password, too many connections. PostgreSQL's message is not
    /// logged, because it can quote values.
    pub(super) fn log_refusal(&self, error: &DbError) {
        let now = Instant::now();
        let mut logged = self.refusal_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|logged| now.duration_since(logged) >= REFUSAL_LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(sqlstate = error.code().code(), "database refused connection");
        }
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Session;
    type Error = tokio_postgres::Error;

    async fn connect(&self) -> Result<Session, tokio_postgres::Error> {
        // Read first: a session that connects while sessions are retired may be one of them.
        let generation = self.availability.generation();
        let client =
            repeat_if_closed(|| self.inner.connect()).await.inspect_err(|error| match error.as_db_error() {
                // A server that refuses a connection is available. Of other errors the probe finds out the reason.
                Some(error) => self.log_refusal(error),
                None => self.availability.request_probe(),
            })?;
        self.availability.set_up(true);
        Ok(Session::new(client, self.connector.clone(), Arc::clone(&self.availability), generation))
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), tokio_postgres::Error> {
        session.client().batch_execute("").await
    }

    fn has_broken(&self, session: &mut Session) -> bool {
        session.is_broken()
    }
}

/// Makes a connection, again if it closes early. A connection that is cut while it is established says nothing about the
/// next one: without another attempt, callers would wait for it until their time is over.
pub(super) async fn repeat_if_closed<T, F>(mut connect: impl FnMut() -> F) -> Result<T, tokio_postgres::Error>
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
