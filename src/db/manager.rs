//! Connects for the pool, and detects broken connections.

use std::{error::Error as _, io, sync::Arc, time::Duration};

use tokio::{task::AbortHandle, time::timeout};
use tokio_postgres::{Client, Config};

use super::{activity::SessionActivity, availability::Availability, session::Session, tls::Connector};
use crate::{
    backoff::{Backoff, random},
    error::{Error, refusals::count_refused_connection},
};

/// Time allowed for a new connection, the TLS handshake and authentication included.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a database server may not acknowledge data before its connections count as lost.
pub(super) const NETWORK_SILENCE_MAX: Duration = Duration::from_secs(10);
/// Maximum attempts to make a connection that closes before the server has responded.
const CONNECT_ATTEMPTS_MAX: u32 = 3;
const CONNECT_BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(100) };

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
    pub(super) async fn connect_client(&self) -> Result<Client, tokio_postgres::Error> {
        self.connect_with_handle().await.map(|(client, _)| client)
    }

    async fn connect_with_handle(&self) -> Result<(Client, AbortHandle), tokio_postgres::Error> {
        let (client, connection) = self.config.connect(self.connector.clone()).await?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok((client, connection.abort_handle()))
    }

    async fn connect_session(&self) -> Result<Session, tokio_postgres::Error> {
        // Read first: a session that connects while sessions are retired or become suspect may be one of them.
        let (generation, suspicion) = (self.availability.generation(), self.availability.suspicion());
        let (client, connection) = self.connect_with_handle().await?;
        let pid = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
        let activity = SessionActivity::new(pid, connection, suspicion);
        Ok(Session::new(client, self.connector.clone(), activity, Arc::clone(&self.availability), generation))
    }
}

impl bb8::ManageConnection for Manager {
    type Connection = Session;
    type Error = Error;

    async fn connect(&self) -> Result<Session, Error> {
        // The driver limits the time of the TCP connection only.
        let connected = timeout(CONNECT_TIMEOUT, repeat_if_closed(|| self.connect_session())).await;
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
