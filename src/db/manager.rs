//! Connections made for the pool, and whether there is somebody to connect to.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bb8_postgres::PostgresConnectionManager;
use tokio::sync::{Notify, watch};
use tokio_postgres::{Client, Config, error::DbError};

use super::{Conn, tls::Connector};

/// How often the database is asked whether it is there, and how long it may take to answer: together less than two
/// seconds, so that health is not wrong for longer.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_200);
/// How often it is logged that the database refuses connections.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long a database must have been there to be taken for back.
const PROBE_STEADY: Duration = Duration::from_millis(200);

/// Makes and judges connections for the pool.
#[derive(Clone)]
pub struct Manager {
    inner: PostgresConnectionManager<Connector>,
    connector: Connector,
    up: Arc<watch::Sender<bool>>,
    /// Told when a connection could not be made.
    doubt: Arc<Notify>,
    /// When it was logged that the database refuses connections.
    refusal_logged: Arc<Mutex<Option<Instant>>>,
}

impl Manager {
    /// Begins to ask the database whether it is there; whether it answers, as that changes.
    pub fn start(config: Config, connector: Connector) -> (Self, watch::Receiver<bool>) {
        let (healthy, is_healthy) = watch::channel(true);
        let manager = Self {
            inner: PostgresConnectionManager::new(config, connector.clone()),
            connector,
            up: Arc::new(watch::Sender::new(true)),
            doubt: Arc::default(),
            refusal_logged: Arc::default(),
        };
        tokio::spawn(probe(manager.clone(), healthy));
        (manager, is_healthy)
    }

    /// Whether there is somebody to connect to, as that changes.
    pub fn watch_up(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }

    /// A wrong password, too many connections: what somebody has to put right. PostgreSQL's text is not for the log, as
    /// it may quote what was typed.
    fn log_refusal(&self, error: &DbError) {
        let now = Instant::now();
        let mut logged = self.refusal_logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.is_none_or(|logged| now.duration_since(logged) >= REFUSAL_LOG_INTERVAL) {
            *logged = Some(now);
            tracing::warn!(sqlstate = error.code().code(), "the database refuses a connection");
        }
    }

    fn set_up(&self, up: bool) {
        let changed = self.up.send_if_modified(|was| std::mem::replace(was, up) != up);
        match (changed, up) {
            (true, true) => tracing::info!("the database is back"),
            (true, false) => tracing::warn!("the database is away"),
            (false, _) => {}
        }
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Conn;
    type Error = tokio_postgres::Error;

    async fn connect(&self) -> Result<Conn, tokio_postgres::Error> {
        let client = self.inner.connect().await.inspect_err(|error| match error.as_db_error() {
            // A server that refuses this one connection is there; of one that breaks the probe finds out.
            Some(error) => self.log_refusal(error),
            None => self.doubt.notify_one(),
        })?;
        self.set_up(true);
        Ok(Conn::new(client, self.connector.clone()))
    }

    async fn is_valid(&self, conn: &mut Conn) -> Result<(), tokio_postgres::Error> {
        conn.client.batch_execute("").await
    }

    fn has_broken(&self, conn: &mut Conn) -> bool {
        conn.client.is_closed() || conn.is_left_busy()
    }
}

/// Asks the database again and again, on a connection of its own, so that a busy pool does not look like a dead database.
/// Ends when nobody wants to know.
async fn probe(manager: Manager, healthy: watch::Sender<bool>) {
    let mut client: Option<Client> = None;
    while !healthy.is_closed() {
        let answer = tokio::time::timeout(PROBE_TIMEOUT, async {
            if let Some(kept) = &client
                && kept.batch_execute("").await.is_ok()
            {
                return Ok(());
            }
            // A connection that died says nothing of the database.
            let connected = bb8::ManageConnection::connect(&manager.inner).await?;
            connected.batch_execute("").await?;
            if !*healthy.borrow() {
                // One that comes and goes is not back.
                tokio::time::sleep(PROBE_STEADY).await;
                connected.batch_execute("").await?;
            }
            client = Some(connected);
            Ok::<_, tokio_postgres::Error>(())
        });
        let answered = answer.await;
        match answered {
            Ok(Ok(())) => manager.set_up(true),
            Ok(Err(ref error)) => {
                error.as_db_error().inspect(|error| manager.log_refusal(error));
                manager.set_up(false);
            }
            // Somebody is there who hangs, or has too much to do: whoever waits may have more luck.
            Err(_) if *healthy.borrow() => tracing::warn!("the database does not answer in time"),
            Err(_) => {}
        }
        let is_healthy = matches!(answered, Ok(Ok(())));
        if !is_healthy {
            client = None;
        }
        healthy.send_if_modified(|was| std::mem::replace(was, is_healthy) != is_healthy);
        // Or as soon as there is reason to ask.
        let _ = tokio::time::timeout(PROBE_INTERVAL, manager.doubt.notified()).await;
    }
}
