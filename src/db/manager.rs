//! Connects for the pool, and detects broken connections.

use std::{error::Error as _, io, sync::Arc, time::Duration};

use tokio::time::timeout;
use tokio_postgres::{Client, Config};
use tokio_util::task::AbortOnDropHandle;

use super::{
    activity::SessionActivity, availability::Availability, cancellation::Canceller, dedicated_client::DedicatedClient,
    session::Session, timeouts::CONNECT_TIMEOUT, tls::Connector,
};
use crate::{
    backoff::{Backoff, random},
    error::{Error, refusals::count_refused_connection},
    metrics,
};

/// Time allowed for the first attempt. What is sent on a new connection can be lost; a busy server needs longer for one.
const FIRST_ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// Maximum attempts to make a connection that closes before the server has responded.
const CONNECT_ATTEMPTS_MAX: u32 = 3;
const CONNECT_BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };

const BACKEND: &str = "-- backend
    SELECT pg_backend_pid() AS pid, pg_postmaster_start_time() AS server_start_time";

/// Opens connections for the pool, and detects broken ones.
#[derive(Clone)]
pub struct Manager {
    config: Arc<Config>,
    connector: Connector,
    availability: Arc<Availability>,
}

impl Manager {
    /// `prepared`: the schema is known to be that of this program.
    pub(super) fn new(config: Config, connector: Connector, prepared: bool) -> Self {
        Self { config: Arc::new(config), connector, availability: Arc::new(Availability::new(prepared)) }
    }

    pub(super) fn availability(&self) -> &Availability {
        &self.availability
    }

    /// Opens a connection outside the pools.
    pub(super) async fn connect_dedicated(&self) -> Result<DedicatedClient, tokio_postgres::Error> {
        let (client, connection) = self.connect_with_task().await?;
        Ok(DedicatedClient::new(client, connection, self.canceller()))
    }

    fn canceller(&self) -> Canceller {
        Canceller::new(Arc::clone(&self.config), self.connector.clone())
    }

    /// Returns the task of the connection, too. Without it, the connection of a client that is dropped would stay open until
    /// the response of the last statement arrives.
    async fn connect_with_task(&self) -> Result<(Client, AbortOnDropHandle<()>), tokio_postgres::Error> {
        let (client, connection) = self.config.connect(self.connector.clone()).await?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok((client, AbortOnDropHandle::new(connection)))
    }

    async fn connect_session(&self) -> Result<Session, tokio_postgres::Error> {
        // Read first: a session that connects while sessions are retired or become suspect may be one of them.
        let (generation, suspicion) = (self.availability.generation(), self.availability.suspicion());
        let (client, connection) = self.connect_with_task().await?;
        let backend = client.query_one(BACKEND, &[]).await?;
        let (pid, server_start_time) = (backend.get("pid"), backend.get("server_start_time"));
        let activity = SessionActivity::new(pid, server_start_time, connection.detach().abort_handle(), suspicion);
        Ok(Session::new(client, self.canceller(), activity, Arc::clone(&self.availability), generation))
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Session;
    type Error = Error;

    async fn connect(&self) -> Result<Session, Error> {
        // The driver limits the time of the TCP connection only.
        let connect = || repeat_if_closed(|| self.connect_session());
        let connected = match timeout(FIRST_ATTEMPT_MAX, connect()).await {
            Err(_) => timeout(CONNECT_TIMEOUT - FIRST_ATTEMPT_MAX, connect()).await,
            connected => connected,
        };
        let connected = connected.inspect_err(|_| self.availability.request_probe()).map_err(|_| Error::Unavailable)?;
        let session = connected.inspect_err(|error| {
            count_refused_connection(error);
            // A server that refuses a connection is available. Of other errors the probe finds out the reason.
            if error.as_db_error().is_none() {
                self.availability.request_probe();
            }
        })?;
        self.availability.set_up(true);
        Ok(session)
    }

    async fn is_valid(&self, session: &mut Session) -> Result<(), Error> {
        Ok(session.client().batch_execute("").await?)
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
                metrics::count(|metrics| &metrics.retries.connection_closed);
                tokio::time::sleep(CONNECT_BACKOFF.delay(failures, random())).await;
                failures += 1;
            }
            outcome => return outcome,
        }
    }
}

/// Returns whether the connection was accepted, and closed before a response.
fn is_closed(error: &tokio_postgres::Error) -> bool {
    let io_error = error.source().and_then(|source| source.downcast_ref::<io::Error>());
    error.is_closed()
        || io_error.is_some_and(|error| {
            use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
            matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
        })
}
