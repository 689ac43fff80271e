//! The listening socket: accepts connections, and tracks those that must finish before the process ends.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::body::Incoming;
use tokio::{
    net::TcpListener,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{BoxError, Service};

use super::{
    connection::{CLOSE_GRACE, ConnectionLimits, ConnectionServer},
    tls,
};
use crate::metrics;

/// How long the server waits after a failed accept, for example when the process has no free file descriptor.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);

/// Where clients connect, with or without TLS.
#[derive(Debug)]
pub struct Listener {
    pub tcp: TcpListener,
    pub tls: Option<tls::Acceptor>,
}

/// Listens without TLS.
impl From<TcpListener> for Listener {
    fn from(tcp: TcpListener) -> Self {
        Self { tcp, tls: None }
    }
}

/// The connections that are open. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct ConnectionTrackers {
    /// Connections accepted before the shutdown. Their calls in flight may finish.
    before_shutdown: TaskTracker,
    /// Connections accepted during the shutdown. Their clients only learn that the server is stopping.
    during_shutdown: TaskTracker,
}

impl ConnectionTrackers {
    /// Waits until the connections from before the shutdown have closed. Returns `false` if some are open after `max`.
    pub async fn drain(&self, max: Duration) -> bool {
        self.before_shutdown.close();
        timeout(max, self.before_shutdown.wait()).await.is_ok()
    }

    /// Waits up to 0.5 s for the connections accepted during the shutdown. Call this once no more are accepted.
    pub async fn close(&self) {
        self.during_shutdown.close();
        let _ = timeout(CLOSE_GRACE, self.during_shutdown.wait()).await;
    }
}

/// Accepts connections and serves them with `service`, until the future is dropped.
///
/// From `shutdown` on, clients are asked to close their connections. New connections are still served, so that the
/// service can say that it is stopping.
pub async fn serve<S, B>(
    listener: Listener,
    service: S,
    limits: ConnectionLimits,
    shutdown: CancellationToken,
    trackers: ConnectionTrackers,
) -> Infallible
where
    S: Service<http::Request<Incoming>, Response = http::Response<B>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    let Listener { tcp, tls } = listener;
    let reload_certificates = async {
        match tls.clone() {
            Some(tls) => tls.reload_on_change().await,
            None => std::future::pending().await,
        }
    };
    let server = Arc::new(ConnectionServer::new(service, limits, tls.clone(), shutdown.clone()));
    let accept = async {
        loop {
            let (stream, peer) = match tcp.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(kind = ?error.kind(), "accept failed");
                    metrics::count(|metrics| &metrics.connections.refused_accept);
                    // Without free file descriptors, capacity ends before the maximum of connections is reached.
                    server.evict();
                    sleep(ACCEPT_RETRY_DELAY).await;
                    continue;
                }
            };
            // Without capacity nothing more is accepted: further connections wait in the kernel.
            let Some(permit) = server.acquire_permit().await else {
                metrics::count(|metrics| &metrics.connections.refused_limit);
                continue;
            };
            metrics::count(|metrics| &metrics.connections.accepted);
            let is_late = shutdown.is_cancelled();
            let tracker = if is_late { &trackers.during_shutdown } else { &trackers.before_shutdown };
            let server = Arc::clone(&server);
            tracker.spawn(async move {
                tracing::debug!(%peer, "connection accepted");
                server.serve(stream, peer.ip(), permit, is_late).await;
                tracing::debug!(%peer, "connection closed");
            });
        }
    };
    tokio::select! {
        never = accept => never,
        never = reload_certificates => never,
    }
}
