//! The life of a connection: TLS handshake, HTTP/2, and when it is closed.

use std::{
    convert::Infallible,
    net::IpAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::{BoxError, Service, ServiceExt};

use super::{
    activity::{Activity, CALL_REPORT_MAX, CallGuard, State, UNAUTHENTICATED_CALLS_PER_CLIENT_MAX},
    client_address::TrustedProxies,
    eviction::ConnectionRegistry,
    tls,
};
use crate::{backoff::random, metrics};

/// Time allowed for the TLS handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time allowed for a client to close its connection after the server has asked it to (GOAWAY).
pub(super) const CLOSE_GRACE: Duration = Duration::from_millis(500);
/// Time allowed for unauthenticated calls on a connection that is closing but not evicted: longer than a login takes.
/// Health watches do not end by themselves; their clients start them again elsewhere.
const UNAUTHENTICATED_GRACE: Duration = Duration::from_secs(30);
/// Time allowed for the other calls of a connection once one is stalled: behind a proxy they may be those of other clients.
const STALLED_GRACE: Duration = Duration::from_secs(30);
/// The part of the concurrent calls of a connection that may be unauthenticated. The rest is left to authenticated callers.
const UNAUTHENTICATED_CALLS_PERCENT_MAX: usize = 50;
/// The part of the maximum age that is random, so that connections opened together do not close together.
const AGE_JITTER: f64 = 0.1;
/// How often the activity of a connection is checked.
const CHECK_INTERVAL: Duration = CALL_REPORT_MAX;
/// How much of a stream a client may send before the server has read it: for imports, most of their memory.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// The limits of connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Maximum number of connections. A new connection evicts idle and unauthenticated ones; if there is none, it is
    /// closed.
    pub connections_max: usize,
    /// How long a connection may be without a call.
    pub idle_max: Duration,
    /// After this age the client is asked to reconnect, so that a load balancer can spread connections.
    pub age_max: Duration,
    /// Time allowed for the calls in flight from then on. Unauthenticated calls have at most 30 s.
    pub age_grace: Duration,
    /// How often the server pings a silent client.
    pub keepalive_interval: Duration,
    /// How long the client may take to acknowledge a ping.
    pub keepalive_timeout: Duration,
    /// Maximum number of concurrent calls of one connection. Clients queue further ones.
    pub streams_max: u32,
    /// Maximum size of the headers of a call that are decoded. A call with more receives the HTTP status 431.
    pub header_bytes_max: u32,
    /// The proxies whose `x-forwarded-for` is trusted.
    pub trusted_proxies: TrustedProxies,
}

/// Serves connections with the service `S`.
pub(super) struct ConnectionServer<S> {
    service: S,
    limits: ConnectionLimits,
    http2: http2::Builder<TokioExecutor>,
    tls: Option<tls::Acceptor>,
    shutdown: CancellationToken,
    registry: ConnectionRegistry,
}

impl<S, B> ConnectionServer<S>
where
    S: Service<http::Request<Incoming>, Response = http::Response<B>, Error = Infallible, Future: Send>
        + Clone
        + Send
        + Sync
        + 'static,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    pub fn new(service: S, limits: ConnectionLimits, tls: Option<tls::Acceptor>, shutdown: CancellationToken) -> Self {
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_max)
            .max_header_list_size(limits.header_bytes_max)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(limits.keepalive_interval)
            .keep_alive_timeout(limits.keepalive_timeout);
        let registry = ConnectionRegistry::new(limits.connections_max);
        Self { service, limits, http2, tls, shutdown, registry }
    }

    /// Returns a permit for one more connection; see [`ConnectionRegistry::acquire_permit`].
    pub async fn acquire_permit(&self) -> Option<OwnedSemaphorePermit> {
        self.registry.acquire_permit().await
    }

    /// Evicts connections; see [`ConnectionRegistry::evict`].
    pub fn evict(&self) {
        self.registry.evict();
    }

    /// Serves one connection until it is closed. `is_late`: it was accepted during the shutdown.
    pub async fn serve(self: Arc<Self>, stream: TcpStream, peer: IpAddr, _permit: OwnedSemaphorePermit, is_late: bool) {
        // Small responses are sent at once instead of waiting for more.
        let _ = stream.set_nodelay(true);
        let unauthenticated_max = self.limits.streams_max as usize * UNAUTHENTICATED_CALLS_PERCENT_MAX / 100;
        let activity = Activity::new(unauthenticated_max.max(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX));
        let registered = self.registry.register(activity);
        let activity = Arc::clone(&registered.activity);
        let _open = metrics::in_progress(|metrics| &metrics.connections.open);
        let Some(tls) = &self.tls else {
            return self.serve_http2(stream, peer, activity, is_late).await;
        };
        // TLS itself reports certificates that either side refuses.
        let accepted = tokio::select! {
            accepted = timeout(HANDSHAKE_MAX, tls.accept(stream)) => accepted,
            () = activity.evicted.notified() => {
                metrics::count(|metrics| &metrics.connections.evicted);
                return;
            }
        };
        match accepted {
            Ok(Ok(stream)) => self.serve_http2(stream, peer, activity, is_late).await,
            Ok(Err(_)) | Err(_) => metrics::count(|metrics| &metrics.connections.refused_tls),
        }
    }

    async fn serve_http2(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: IpAddr,
        activity: Arc<Activity>,
        is_late: bool,
    ) {
        let service = service_fn(|mut request: http::Request<Incoming>| {
            let client = self.limits.trusted_proxies.client(peer, request.headers());
            let call = activity.begin(client);
            request.extensions_mut().insert(client);
            request.extensions_mut().insert(call.handle().clone());
            let response = self.service.clone().oneshot(request);
            async move { response.await.map(|response| response.map(|body| CallBody { body, _call: call })) }
        });
        let mut connection = pin!(self.http2.serve_connection(TokioIo::new(stream), service));
        // Errors of a connection concern its client only.
        let is_evicted = tokio::select! {
            _ = &mut connection => return,
            () = self.until_old_or_shutdown(&activity, is_late) => false,
            () = activity.evicted.notified() => true,
            _ = until_inactive(&activity, self.limits.idle_max) => false,
        };
        if is_evicted {
            metrics::count(|metrics| &metrics.connections.evicted);
        }
        connection.as_mut().graceful_shutdown();
        // Calls in flight may finish. How long a shutdown may take is up to the caller of `serve`.
        tokio::select! {
            _ = connection => {}
            () = until_finished(&activity) => {}
            () = until_unauthenticated(&activity, is_evicted) => {}
            () = sleep(self.limits.age_grace) => {}
        }
    }

    async fn until_old_or_shutdown(&self, activity: &Activity, is_late: bool) {
        let age_max = sleep(self.limits.age_max.mul_f64(1.0 - AGE_JITTER * random()));
        tokio::select! {
            () = age_max => return,
            () = self.shutdown.cancelled() => {}
        }
        if is_late {
            // A client that is asked to close before its first response would take the server for broken.
            activity.call_ended.notified().await;
        }
    }
}

/// Why a connection is inactive.
enum Inactive {
    /// It has no calls.
    Idle,
    /// The client of a call does not read the response.
    Stalled,
}

/// Waits until there has been no call for `idle_max` from now on, or one is stalled.
async fn until_inactive(activity: &Activity, idle_max: Duration) -> Inactive {
    let began = Instant::now();
    loop {
        let now = Instant::now();
        let next = match activity.state() {
            State::Idle(since) => since.max(began) + idle_max,
            State::Busy(until) if until <= now => return Inactive::Stalled,
            State::Busy(until) => until,
        };
        if next <= now {
            return Inactive::Idle;
        }
        // A call may begin meanwhile.
        sleep_until(next.min(now + CHECK_INTERVAL)).await;
    }
}

/// Waits until no call is in flight. If one is stalled, waits for the others for 30 s at most.
async fn until_finished(activity: &Activity) {
    if let Inactive::Idle = until_inactive(activity, CLOSE_GRACE).await {
        return;
    }
    let others = async {
        while let Some(until) = activity.last_progress_deadline()
            && until > Instant::now()
        {
            sleep_until(until.min(Instant::now() + CHECK_INTERVAL)).await;
        }
    };
    let _ = timeout(STALLED_GRACE, others).await;
}

/// Waits until a closing connection has had no authenticated call for 30 s, or 0.5 s if it is evicted.
///
/// Until the client acknowledges that the connection is closing, which it may never do, it may begin calls.
async fn until_unauthenticated(activity: &Activity, mut is_evicted: bool) {
    let began = Instant::now();
    loop {
        let now = Instant::now();
        let grace = if is_evicted { CLOSE_GRACE } else { UNAUTHENTICATED_GRACE };
        let end = activity.unauthenticated_since(now).max(began) + grace;
        if end <= now {
            return;
        }
        tokio::select! {
            () = sleep_until(end) => {}
            () = activity.evicted.notified() => is_evicted = true,
        }
    }
}

/// The body of a response, whose call is in flight until it is dropped.
struct CallBody<B> {
    body: B,
    _call: CallGuard,
}

impl<B: http_body::Body + Unpin> http_body::Body for CallBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
