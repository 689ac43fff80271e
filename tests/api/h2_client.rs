//! Calls by the h2 crate, which lets a test do what generated clients do not let one do.

use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use prost::Message;
use tokio::{net::TcpStream, task::JoinHandle};

use crate::harness::Tracker;

/// The room for an answer with which a connection begins, as HTTP/2 has it.
const WINDOW_BYTES: u32 = 65_535;

/// A connection of a client that leaves everything to the test.
pub struct Raw {
    pub requests: SendRequest<Bytes>,
    /// Ends with the connection.
    pub connection: JoinHandle<()>,
}

impl Raw {
    pub async fn open(tracker: &Tracker) -> Self {
        Self::open_with(tracker, WINDOW_BYTES).await.unwrap()
    }

    /// With so much room for each answer.
    pub async fn open_with(tracker: &Tracker, window_bytes: u32) -> Result<Self, h2::Error> {
        let tcp = TcpStream::connect(&tracker.address).await.unwrap();
        let mut builder = h2::client::Builder::new();
        let (requests, connection) = builder.initial_window_size(window_bytes).handshake(tcp).await?;
        // How it ends is seen by its calls.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Self { requests, connection })
    }

    /// Begins a call of the member's; what is sent of it, the caller says.
    pub async fn begin(
        &mut self,
        tracker: &Tracker,
        method: &str,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), h2::Error> {
        let request = request(tracker, &format!("/issuetracker.v1.{method}"));
        self.requests.clone().ready().await?.send_request(request, false)
    }
}

/// The head of a well-made call of the member's.
pub fn request(tracker: &Tracker, path: &str) -> http::Request<()> {
    http::Request::post(format!("http://{}{path}", tracker.address))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", tracker.member.token))
        .body(())
        .unwrap()
}

/// A message as it goes over the wire.
pub fn framed(message: &impl Message) -> Bytes {
    framed_bytes(&message.encode_to_vec())
}

pub fn framed_bytes(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len() as u32);
    framed.put_slice(message);
    framed.freeze()
}
