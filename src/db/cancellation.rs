//! Cancels statements, and finds out when a cancel request can no longer reach a later statement.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_postgres::{CancelToken, Config, config::Host, tls::MakeTlsConnect};

use super::{timeouts::CONNECT_TIMEOUT, tls::Connector};

/// The port of PostgreSQL where a connection string has none.
const DEFAULT_PORT: u16 = 5432;

/// Sends cancel requests, each on a connection of its own.
#[derive(Clone)]
pub(super) struct Canceller {
    config: Arc<Config>,
    connector: Connector,
}

impl Canceller {
    pub(super) fn new(config: Arc<Config>, connector: Connector) -> Self {
        Self { config, connector }
    }

    /// Requests that a statement be cancelled. The request may take effect after this has returned.
    pub(super) async fn request(&self, statement: CancelToken) {
        let _ = timeout(CONNECT_TIMEOUT, statement.cancel_query(self.connector.clone())).await;
    }

    /// Cancels what a session is executing, if anything. Returns once the server has handled the request: it does not cancel
    /// what the session is sent from then on.
    ///
    /// Fails if the connection string names several hosts: a session does not show with which one it is connected.
    pub(super) async fn cancel(&self, statement: &CancelToken) -> io::Result<()> {
        let ([host], [] | [_]) = (self.config.get_hosts(), self.config.get_hostaddrs()) else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let port = self.config.get_ports().first().copied().unwrap_or(DEFAULT_PORT);
        match (host, self.config.get_hostaddrs().first()) {
            (Host::Tcp(name), Some(address)) => {
                self.send(statement, name, TcpStream::connect((*address, port)).await?).await
            }
            (Host::Tcp(name), None) => {
                self.send(statement, name, TcpStream::connect((name.as_str(), port)).await?).await
            }
            (Host::Unix(directory), _) => {
                let socket = directory.join(format!(".s.PGSQL.{port}"));
                self.send(statement, "", UnixStream::connect(socket).await?).await
            }
        }
    }

    async fn send<S>(&self, statement: &CancelToken, host: &str, stream: S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Ok(tls) = MakeTlsConnect::<UntilClosed<S>>::make_tls_connect(&mut self.connector.clone(), host);
        // The server signals the backend before it closes the connection of the request.
        statement.cancel_query_raw(UntilClosed(stream), tls).await.map_err(io::Error::other)
    }
}

/// A stream whose shutdown waits until the peer has closed it.
struct UntilClosed<S>(S);

impl<S: AsyncRead + Unpin> AsyncRead for UntilClosed<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, read: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for UntilClosed<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; 64];
        loop {
            let mut read = ReadBuf::new(&mut bytes);
            match ready!(Pin::new(&mut self.0).poll_read(context, &mut read)) {
                Ok(()) if read.filled().is_empty() => return Poll::Ready(Ok(())),
                Ok(()) => {}
                // The server closes without reading what TLS has sent after the request.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Poll::Ready(Ok(())),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}
