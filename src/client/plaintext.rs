//! Unencrypted connections, which recognise a server that requires TLS.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tower::Service;

/// The first byte of a TLS alert record (RFC 8446, section 5.1). An HTTP/2 server's first byte is 0, because its first frame
/// is a short SETTINGS frame.
const TLS_ALERT: u8 = 0x15;
/// The first byte of an HTTP/1 response. Some TLS servers send one to a plaintext client.
const HTTP1_RESPONSE: u8 = b'H';

/// Connects over TCP. Clones share what they have found out about the server.
#[derive(Clone, Default)]
pub struct PlaintextConnector {
    requires_tls: Arc<AtomicBool>,
}

impl PlaintextConnector {
    /// Returns whether the server has responded to plaintext as a TLS server does.
    pub fn requires_tls(&self) -> bool {
        self.requires_tls.load(Ordering::Relaxed)
    }
}

impl Service<Uri> for PlaintextConnector {
    type Response = TokioIo<PlaintextStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let requires_tls = Arc::clone(&self.requires_tls);
        Box::pin(async move {
            let host = server.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let tcp = TcpStream::connect((host, server.port_u16().unwrap_or(80))).await?;
            tcp.set_nodelay(true)?;
            Ok(TokioIo::new(PlaintextStream { tcp, is_first_read: true, requires_tls }))
        })
    }
}

/// A TCP connection that inspects the first byte received.
pub struct PlaintextStream {
    tcp: TcpStream,
    is_first_read: bool,
    requires_tls: Arc<AtomicBool>,
}

impl AsyncRead for PlaintextStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let filled = buf.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buf))?;
        if std::mem::take(&mut self.is_first_read)
            && let Some(&(TLS_ALERT | HTTP1_RESPONSE)) = buf.filled().get(filled)
        {
            self.requires_tls.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PlaintextStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }
}
