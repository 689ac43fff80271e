//! The connections of the client that abuses the service, and what it sends and receives on them.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tonic::transport::Endpoint;

use crate::{
    h2_client::H2Client,
    harness::{Client, Tracker},
};

/// What has been sent and received on all connections.
#[derive(Debug, Default)]
pub struct Traffic {
    opened: AtomicU64,
    closed: AtomicU64,
    calls: AtomicU64,
    sent_bytes: AtomicU64,
    received_bytes: AtomicU64,
}

/// The values of [`Traffic`] at one time.
#[derive(Clone, Copy, Debug, Default)]
pub struct TrafficCounts {
    pub opened: u64,
    pub open: u64,
    pub calls: u64,
    pub sent_bytes: u64,
    pub received_bytes: u64,
}

impl Traffic {
    pub fn counts(&self) -> TrafficCounts {
        let opened = self.opened.load(Relaxed);
        TrafficCounts {
            opened,
            open: opened.saturating_sub(self.closed.load(Relaxed)),
            calls: self.calls.load(Relaxed),
            sent_bytes: self.sent_bytes.load(Relaxed),
            received_bytes: self.received_bytes.load(Relaxed),
        }
    }
}

/// Opens counted connections. Clones share the counts.
#[derive(Clone)]
pub struct Connector {
    address: String,
    traffic: Arc<Traffic>,
}

impl Connector {
    pub fn new(address: &str) -> Self {
        Self { address: address.to_owned(), traffic: Arc::default() }
    }

    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    pub async fn open(&self) -> io::Result<Counted> {
        let tcp = TcpStream::connect(&self.address).await?;
        tcp.set_nodelay(true)?;
        self.traffic.opened.fetch_add(1, Relaxed);
        Ok(Counted { tcp, traffic: Arc::clone(&self.traffic), frames: FrameHeaders::after_preface() })
    }

    /// Opens a connection whose streams the test controls, with this window for each response.
    pub async fn open_h2(&self, window_bytes: u32) -> H2Client {
        H2Client::over(self.open().await.unwrap(), window_bytes).await.unwrap()
    }

    /// Returns a client that has a connection of its own. An empty token means no credentials.
    pub fn client(&self, token: &str) -> Client {
        let connector = self.clone();
        let connect = tower::service_fn(move |_: http::Uri| {
            let connector = connector.clone();
            async move { connector.open().await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::try_from(format!("http://{}", self.address)).unwrap();
        Tracker::client_on(endpoint.connect_with_connector_lazy(connect), token)
    }
}

/// A connection whose traffic is counted.
pub struct Counted {
    tcp: TcpStream,
    traffic: Arc<Traffic>,
    frames: FrameHeaders,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.traffic.closed.fetch_add(1, Relaxed);
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = Pin::new(&mut self.tcp).poll_read(context, buffer);
        self.traffic.received_bytes.fetch_add((buffer.filled().len() - before) as u64, Relaxed);
        outcome
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.tcp).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = outcome {
            let calls = self.frames.calls(&bytes[..count]);
            self.traffic.calls.fetch_add(calls, Relaxed);
            self.traffic.sent_bytes.fetch_add(count as u64, Relaxed);
        }
        outcome
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}

/// Finds the HTTP/2 frames that a client sends. A gRPC client sends one HEADERS frame per call.
struct FrameHeaders {
    /// Bytes until the next header.
    skipped_bytes: usize,
    header: [u8; 9],
    header_bytes: usize,
}

impl FrameHeaders {
    fn after_preface() -> Self {
        Self { skipped_bytes: 24, header: [0; 9], header_bytes: 0 }
    }

    /// Returns how many calls begin in the next bytes.
    fn calls(&mut self, mut bytes: &[u8]) -> u64 {
        const HEADERS: u8 = 1;
        let mut calls = 0;
        while !bytes.is_empty() {
            let skipped = self.skipped_bytes.min(bytes.len());
            (self.skipped_bytes, bytes) = (self.skipped_bytes - skipped, &bytes[skipped..]);
            let taken = bytes.len().min(self.header.len() - self.header_bytes);
            self.header[self.header_bytes..][..taken].copy_from_slice(&bytes[..taken]);
            (self.header_bytes, bytes) = (self.header_bytes + taken, &bytes[taken..]);
            if self.header_bytes == self.header.len() {
                let [high, middle, low, kind, ..] = self.header;
                self.skipped_bytes = u32::from_be_bytes([0, high, middle, low]) as usize;
                self.header_bytes = 0;
                calls += u64::from(kind == HEADERS);
            }
        }
        calls
    }
}
