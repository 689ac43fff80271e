//! Unencrypted connections. A connection is open once the server has sent HTTP/2; other protocols are recognised.

use std::time::Duration;

use http::Uri;
use hyper_util::{
    client::legacy::connect::{HttpConnector, dns::GaiResolver},
    rt::TokioIo,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
    time::timeout,
};
use tokio_util::io::InspectReader;
use tonic::transport::{self, Channel, Endpoint};
use tower::{BoxError, ServiceExt, service_fn};

/// The first byte of an HTTP/2 server, whose first frame is a SETTINGS frame of less than 64 KiB (RFC 9113, section 4.1).
const HTTP2: u8 = 0;
/// The first byte of a TLS alert record (RFC 8446, section 5.1).
const TLS_ALERT: u8 = 0x15;
/// A TLS record with an empty ClientHello. A TLS server rejects it with an alert.
const EMPTY_CLIENT_HELLO: [u8; 9] = [0x16, 0x03, 0x01, 0x00, 0x04, 0x01, 0x00, 0x00, 0x00];
/// Time allowed for that alert.
const TLS_ALERT_MAX: Duration = Duration::from_secs(2);
/// The length of `HTTP/1.1`, which starts an HTTP/1 response.
const HTTP1_VERSION_BYTES: usize = 8;

/// Why there is no HTTP/2 connection.
#[derive(Debug)]
pub enum ConnectError {
    /// TCP failed, or the server has not responded. A retry can succeed.
    Unreachable(BoxError),
    RequiresTls,
    /// The server speaks this protocol instead.
    OtherProtocol(String),
}

/// Opens a connection and waits for the server's first bytes. Fails if either takes longer than `connect_max`.
pub async fn connect(endpoint: &Endpoint, connect_max: Duration) -> Result<Channel, ConnectError> {
    let tcp = tcp_connector(GaiResolver::new(), connect_max);
    let opened = open(endpoint, tcp.clone()).await;
    let (channel, first_bytes) = opened.map_err(|error| ConnectError::Unreachable(error.into()))?;
    let (bytes, why) = match timeout(connect_max, first_bytes).await {
        Ok(Ok(bytes)) if bytes.first() == Some(&HTTP2) => return Ok(channel),
        Ok(Ok(bytes)) => (bytes, "the server closed the connection without a response"),
        // The connection was reset.
        Ok(Err(_)) => (Vec::new(), "the server closed the connection without a response"),
        Err(_) => (Vec::new(), "the server did not respond"),
    };
    // Some TLS servers respond to plaintext with HTTP/1, or not at all.
    if bytes.first() == Some(&TLS_ALERT) || speaks_tls(tcp, endpoint.uri().clone()).await {
        return Err(ConnectError::RequiresTls);
    }
    Err(match &*bytes {
        [] => ConnectError::Unreachable(why.into()),
        response if response.starts_with(b"HTTP/") => {
            let version = &response[..response.len().min(HTTP1_VERSION_BYTES)];
            ConnectError::OtherProtocol(String::from_utf8_lossy(version).into_owned())
        }
        _ => ConnectError::OtherProtocol("an unknown protocol".to_owned()),
    })
}

/// Returns a connector that tries all addresses of a host within `connect_max`, IPv6 and IPv4 concurrently (RFC 8305).
fn tcp_connector<R>(resolver: R, connect_max: Duration) -> HttpConnector<R> {
    let mut connector = HttpConnector::new_with_resolver(resolver);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(connect_max));
    connector
}

/// Opens a connection, which the channel does not replace when it is lost. The receiver gets the first bytes of the server:
/// none if the server closes the connection, an error if it resets the connection.
async fn open(
    endpoint: &Endpoint,
    tcp: HttpConnector,
) -> Result<(Channel, oneshot::Receiver<Vec<u8>>), transport::Error> {
    let (sender, first_bytes) = oneshot::channel();
    let mut sender = Some(sender);
    let connector = service_fn(move |server: Uri| {
        let opened = tcp.clone().oneshot(server);
        let mut sender = sender.take();
        async move {
            // A channel reconnects without end while a server closes its connections at once.
            if sender.is_none() {
                return Err(BoxError::from("the server closed the connection"));
            }
            let inspect = move |bytes: &[u8]| {
                if let Some(sender) = sender.take() {
                    // The receiver is gone if the server has responded too late.
                    let _ = sender.send(bytes.to_vec());
                }
            };
            Ok(TokioIo::new(InspectReader::new(opened.await?.into_inner(), inspect)))
        }
    });
    Ok((endpoint.connect_with_connector(connector).await?, first_bytes))
}

/// Returns whether the server responds to a TLS record with an alert, on a new connection.
async fn speaks_tls(tcp: HttpConnector, server: Uri) -> bool {
    let Ok(stream) = tcp.oneshot(server).await else {
        return false;
    };
    let mut stream = stream.into_inner();
    let first_byte = async {
        stream.write_all(&EMPTY_CLIENT_HELLO).await?;
        // So that a server which waits for the end of a line does not wait. Fails if the server has already responded and
        // closed the connection.
        let _ = stream.shutdown().await;
        stream.read_u8().await
    };
    matches!(timeout(TLS_ALERT_MAX, first_byte).await, Ok(Ok(TLS_ALERT)))
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::ready, net::SocketAddr};

    use tokio::net::{TcpSocket, TcpStream};

    use super::*;

    /// Returns a socket that does not respond to new connections, as its backlog is full.
    async fn black_hole(address: SocketAddr) -> (TcpStream, tokio::net::TcpListener) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(address).unwrap();
        let listener = socket.listen(0).unwrap();
        (TcpStream::connect(listener.local_addr().unwrap()).await.unwrap(), listener)
    }

    #[tokio::test]
    async fn address_that_does_not_respond_leaves_time_for_the_next() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let reachable = listener.local_addr().unwrap();
        let unreachable = SocketAddr::from(([127, 0, 0, 2], reachable.port()));
        let _full = black_hole(unreachable).await;
        let resolver = service_fn(move |_| ready(Ok::<_, Infallible>([unreachable, reachable].into_iter())));
        let connector = tcp_connector(resolver, Duration::from_secs(2));
        let server: Uri = format!("http://tracker.example:{}", reachable.port()).parse().unwrap();
        let connected = timeout(Duration::from_secs(60), connector.oneshot(server)).await.unwrap().unwrap();
        assert_eq!(connected.inner().peer_addr().unwrap(), reachable);
    }
}
