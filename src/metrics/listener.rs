//! The listener from which Prometheus scrapes the metrics: `GET /metrics` over HTTP/1.1, without TLS and credentials.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use http::{
    Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::TEXT_FORMAT;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use super::get;

/// Maximum concurrent connections. Further ones wait in the kernel.
const CONNECTIONS_MAX: usize = 16;
/// Time allowed for a client to send the headers of its request.
const HEADER_READ_MAX: Duration = Duration::from_secs(2);
/// Time allowed for a connection, which serves one request: a client that hangs keeps others waiting no longer.
const CONNECTION_MAX: Duration = Duration::from_secs(5);
/// Maximum size of the headers of a request, with the buffer for them.
const HEADER_BYTES_MAX: usize = 16 * 1024;
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(50);
const PATH: &str = "/metrics";

/// Serves metrics until it is dropped.
pub struct MetricsListener {
    _serving: AbortOnDropHandle<()>,
}

impl MetricsListener {
    /// Listens on the address. Returns the address with the port.
    pub async fn start(address: SocketAddr) -> anyhow::Result<(Self, SocketAddr)> {
        let tcp = TcpListener::bind(address).await;
        let tcp = tcp.with_context(|| format!("--metrics-listen: cannot listen on {address}"))?;
        let address = tcp.local_addr()?;
        Ok((Self { _serving: AbortOnDropHandle::new(tokio::spawn(serve(tcp))) }, address))
    }
}

async fn serve(tcp: TcpListener) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped with this future, which ends the connections.
    let mut connections = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let Ok((stream, _)) = tcp.accept().await else {
            sleep(ACCEPT_RETRY_DELAY).await;
            continue;
        };
        while connections.try_join_next().is_some() {}
        connections.spawn(async move {
            let _permit = permit;
            // Errors of a connection concern its client only.
            let _ = timeout(CONNECTION_MAX, serve_connection(stream)).await;
        });
    }
}

async fn serve_connection(stream: TcpStream) -> hyper::Result<()> {
    let mut http1 = http1::Builder::new();
    http1
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .keep_alive(false);
    http1.serve_connection(TokioIo::new(stream), service_fn(respond)).await
}

async fn respond(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::new(Full::default());
    if request.uri().path() != PATH {
        *response.status_mut() = StatusCode::NOT_FOUND;
    } else if request.method() != Method::GET {
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
    } else {
        // Reads files of /proc.
        let encoded = tokio::task::spawn_blocking(|| get().and_then(|metrics| metrics.encode().ok())).await;
        match encoded.ok().flatten() {
            Some(text) => {
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT));
                *response.body_mut() = Full::new(Bytes::from(text));
            }
            None => *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
    Ok(response)
}
