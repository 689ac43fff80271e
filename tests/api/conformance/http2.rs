//! HTTP/2 on the wire: calls by the h2 crate, which permits more than a gRPC library, and hand-made frames, which can
//! violate the protocol.

use std::time::Duration;

use bytes::Bytes;
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, Request};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

pub use crate::h2_client::{framed_bytes as framed, request};

use super::{HANG, Target};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const REFUSED_STREAM: u32 = 7;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEADER_BYTES: usize = 9;

/// The outcome of a call.
#[derive(Debug)]
pub enum Outcome {
    /// The HTTP status, and the gRPC status from the headers or the trailers.
    Status { http: u16, grpc: Option<i32> },
    /// The stream was reset, or its connection was closed.
    Reset(h2::Error),
}

impl Outcome {
    #[track_caller]
    pub fn assert_grpc(&self, code: tonic::Code) {
        assert!(matches!(self, Self::Status { http: 200, grpc: Some(grpc) } if *grpc == code as i32), "{self:?}");
    }
}

pub async fn connect(target: &Target) -> SendRequest<Bytes> {
    crate::h2_client::H2Client::open(target).await.requests
}

/// Sends the headers of a call on a new connection.
pub async fn begin(target: &Target, path: &str) -> (ResponseFuture, SendStream<Bytes>) {
    connect(target).await.ready().await.unwrap().send_request(request(target, path), false).unwrap()
}

/// Makes a call on a new connection, with the body in one piece.
pub async fn call(target: &Target, request: Request<()>, body: Bytes) -> Outcome {
    let requests = connect(target).await;
    timeout(HANG, call_on(requests, request, body)).await.expect("the call hangs")
}

pub async fn call_on(requests: SendRequest<Bytes>, request: Request<()>, body: Bytes) -> Outcome {
    let outcome = async {
        let (response, mut stream) = requests.ready().await?.send_request(request, false)?;
        // The service may have refused the call already, and then does not accept the body.
        let _ = stream.send_data(body, true);
        read_response(response).await
    };
    outcome.await.unwrap_or_else(Outcome::Reset)
}

pub async fn read_response(response: ResponseFuture) -> Result<Outcome, h2::Error> {
    let (head, mut body) = response.await?.into_parts();
    while let Some(data) = body.data().await {
        let count = data?.len();
        body.flow_control().release_capacity(count)?;
    }
    let trailers = body.trailers().await?.unwrap_or_default();
    let status = |headers: &HeaderMap| headers.get("grpc-status")?.to_str().ok()?.parse().ok();
    Ok(Outcome::Status { http: head.status.as_u16(), grpc: status(&trailers).or_else(|| status(&head.headers)) })
}

pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Encodes headers in HPACK, as literals without indexing.
pub fn block(headers: &[(&str, &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for part in [name.as_bytes(), value] {
            assert!(part.len() < 127, "longer strings are encoded differently");
            block.push(part.len() as u8);
            block.extend(part);
        }
    }
    block
}

/// Encodes the headers of a valid call.
pub fn call_block(target: &Target, path: &str) -> Vec<u8> {
    block(&[
        (":method", b"POST"),
        (":scheme", b"http"),
        (":path", path.as_bytes()),
        (":authority", b"tracker"),
        ("content-type", b"application/grpc"),
        ("te", b"trailers"),
        ("authorization", format!("Bearer {}", target.member.token).as_bytes()),
    ])
}

/// A TCP connection on which the test writes every byte.
pub struct RawConnection(pub TcpStream);

impl RawConnection {
    /// Connects without sending anything.
    pub async fn connect(target: &Target) -> Self {
        Self(TcpStream::connect(&target.address).await.unwrap())
    }

    /// Connects, and sends the preface and these settings.
    pub async fn begin(target: &Target, settings: &[u8]) -> Self {
        let mut raw = Self::connect(target).await;
        raw.send(PREFACE).await;
        raw.send(&frame(SETTINGS, 0, 0, settings)).await;
        raw
    }

    /// Sends bytes. Returns false if the service has closed the connection, or has not read them all within 1 s.
    pub async fn send(&mut self, bytes: &[u8]) -> bool {
        matches!(timeout(Duration::from_secs(1), self.0.write_all(bytes)).await, Ok(Ok(())))
    }

    /// Reads until the service closes the connection. Panics if it does not.
    pub async fn until_closed(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // A TCP reset counts as closed.
        let _ = timeout(HANG, self.0.read_to_end(&mut bytes)).await.expect("the connection stays open");
        bytes
    }

    /// Reads the next frame. Returns None if the connection is closed.
    pub async fn next(&mut self) -> Option<Frame> {
        let read = async {
            let mut header = [0; FRAME_HEADER_BYTES];
            self.0.read_exact(&mut header).await.ok()?;
            let mut payload = vec![0; u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize];
            self.0.read_exact(&mut payload).await.ok()?;
            let [_, _, _, kind, flags, stream @ ..] = header;
            Some(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload })
        };
        timeout(HANG, read).await.expect("no frame arrives")
    }

    /// Reads frames up to the next one of this kind. Returns None if the connection is closed before.
    pub async fn next_of(&mut self, kind: u8) -> Option<Frame> {
        loop {
            let frame = self.next().await?;
            if frame.kind == kind {
                return Some(frame);
            }
        }
    }
}
