//! gRPC calls by the h2 crate, which gives control over streams, flow-control windows and frames that generated clients
//! hide.

use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinHandle,
};

use crate::harness::Tracker;

/// HTTP/2's default flow-control window, in bytes.
const WINDOW_BYTES: u32 = 65_535;

/// A client connection whose streams the test controls.
pub struct H2Client {
    pub requests: SendRequest<Bytes>,
    /// Finishes when the connection is closed.
    pub connection: JoinHandle<()>,
}

impl H2Client {
    pub async fn open(tracker: &Tracker) -> Self {
        Self::open_with(tracker, WINDOW_BYTES).await.unwrap()
    }

    /// Opens a connection with this window for each response.
    pub async fn open_with(tracker: &Tracker, window_bytes: u32) -> Result<Self, h2::Error> {
        Self::over(TcpStream::connect(&tracker.address).await.unwrap(), window_bytes).await
    }

    /// Begins a connection on a stream. `window_bytes`: the window for each response.
    pub async fn over(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        window_bytes: u32,
    ) -> Result<Self, h2::Error> {
        let mut builder = h2::client::Builder::new();
        let (requests, connection) = builder.initial_window_size(window_bytes).handshake(stream).await?;
        // Calls on the connection return its error.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { requests, connection })
    }

    /// Sends the headers of a call by the member. The caller sends the messages.
    pub async fn begin(
        &mut self,
        tracker: &Tracker,
        method: &str,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let request = request(tracker, &format!("/issuetracker.v1.{method}"));
        self.requests.clone().ready().await?.send_request(request, false)
    }
}

/// Builds the headers of a valid call by the member.
pub fn request(tracker: &Tracker, path: &str) -> http::Request<()> {
    http::Request::post(format!("http://{}{path}", tracker.address))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", tracker.member.token))
        .body(())
        .unwrap()
}

/// Encodes a message with the gRPC length prefix.
pub fn framed(message: &impl Message) -> Bytes {
    framed_bytes(&message.encode_to_vec())
}

/// Adds the gRPC length prefix to an encoded message.
pub fn framed_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}
