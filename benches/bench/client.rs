//! A gRPC client with little CPU overhead, built on h2 and prost.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{
    HeaderMap, HeaderValue, Request, Uri,
    uri::{Authority, Scheme},
};
use prost::Message;
use tokio::net::TcpStream;
use tonic_types::StatusExt;

/// Large enough that a response never waits for a window update.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// The gRPC message prefix: one byte for compression, four for the length.
const PREFIX_BYTES: usize = 5;

/// A connection. Clones share it.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
    authority: Authority,
    authorization: HeaderValue,
}

impl Connection {
    pub async fn open(address: &str, token: &str) -> anyhow::Result<Self> {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        let (requests, connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .handshake(tcp)
            .await?;
        // If the connection breaks, the calls on it fail.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { requests, authority: address.parse()?, authorization: format!("Bearer {token}").parse()? })
    }

    /// Calls `/package.Service/Method`. Any status other than OK is an error.
    pub async fn call<A: Message + Default>(&mut self, method: &str, message: &impl Message) -> anyhow::Result<A> {
        let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
        frame.put_u8(0);
        frame.put_u32(message.encoded_len() as u32);
        message.encode(&mut frame)?;
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone()).path_and_query(method);
        let request = Request::post(uri.build()?)
            .header("content-type", HeaderValue::from_static("application/grpc"))
            .header("te", HeaderValue::from_static("trailers"))
            .header("authorization", self.authorization.clone())
            .body(())?;

        std::future::poll_fn(|context| self.requests.poll_ready(context)).await?;
        let (response, mut body) = self.requests.send_request(request, false)?;
        body.send_data(frame.freeze(), true)?;
        let (head, mut body) = response.await?.into_parts();
        let mut response_body = BytesMut::new();
        while let Some(data) = body.data().await {
            let data = data?;
            body.flow_control().release_capacity(data.len())?;
            response_body.extend_from_slice(&data);
        }
        // A trailers-only response has its status in the headers.
        check_status(&body.trailers().await?.unwrap_or(head.headers))?;
        ensure!(response_body.len() >= PREFIX_BYTES, "status OK without a message");
        ensure!(response_body.get_u8() == 0, "the response is compressed");
        ensure!(response_body.get_u32() as usize == response_body.len(), "the response is not exactly one message");
        Ok(A::decode(response_body)?)
    }
}

/// The service rejected the call with RESOURCE_EXHAUSTED.
#[derive(Debug, thiserror::Error)]
#[error("the call was rejected")]
pub struct Rejected {
    pub retry_after: Duration,
}

fn check_status(headers: &HeaderMap) -> anyhow::Result<()> {
    let status = headers.get("grpc-status").context("a response without a status")?;
    if status == "8" {
        let status = tonic::Status::from_header_map(headers).context("a status that cannot be read")?;
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        return Err(Rejected { retry_after: retry.context("RESOURCE_EXHAUSTED without RetryInfo")? }.into());
    }
    if status != "0" {
        bail!("status {status:?}: {:?}", headers.get("grpc-message"));
    }
    Ok(())
}
