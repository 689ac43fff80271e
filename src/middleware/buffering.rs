//! Buffers the messages of requests and responses within a memory budget.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use tokio::time::timeout;
use tonic::Status;
use tower::{Layer, Service};

use super::{
    RequestLimits,
    body::{PolledFrame, RequestBody, UncutBody},
    compression::{ENCODING, MESSAGE_PREFIX_BYTES, is_gzip, take_accepts_gzip, unzip, zip},
    deadline,
    memory_budget::{MemoryBudget, Permits},
    method_policy::CallPolicy,
};
use crate::error::{Error, Result};

/// Memory for the requests and responses of authenticated callers, beyond the first bytes of each.
const BUDGET_KIB: usize = 256 * 1024;
/// The first bytes of each message, which are not counted.
const UNCOUNTED_BYTES: usize = 64 * 1024;
/// The same for unauthenticated requests. Names and passwords fit into the uncounted bytes: a budget that others have used
/// up keeps no user from signing in.
const UNAUTHENTICATED_BUDGET_KIB: usize = 16 * 1024;
const UNAUTHENTICATED_UNCOUNTED_BYTES: usize = 1024;
/// Maximum size of an unauthenticated request. Names and passwords are shorter.
pub const UNAUTHENTICATED_MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// Time allowed for the client to send an unauthenticated request.
const UNAUTHENTICATED_READ_MAX: Duration = Duration::from_secs(5);
/// How much of a response the connection gets at once.
const PIECE_BYTES: usize = 16 * 1024;

/// Buffers the request, unless its client streams, and the response, unless it is a stream.
///
/// Messages are counted until the response has been read. A request that exceeds the budget fails with `Exhausted`.
#[derive(Clone)]
pub struct BufferingLayer {
    buffers: Arc<Buffers>,
}

impl BufferingLayer {
    pub fn new(limits: RequestLimits) -> Self {
        let buffers = Buffers {
            limits,
            budget: MemoryBudget::new(UNCOUNTED_BYTES, BUDGET_KIB),
            unauthenticated_budget: MemoryBudget::new(UNAUTHENTICATED_UNCOUNTED_BYTES, UNAUTHENTICATED_BUDGET_KIB),
        };
        Self { buffers: Arc::new(buffers) }
    }
}

/// Reads messages within the budgets.
struct Buffers {
    limits: RequestLimits,
    budget: MemoryBudget,
    unauthenticated_budget: MemoryBudget,
}

impl Buffers {
    /// Returns the one message of a request with its prefix, decompressed, and the permits that it holds.
    async fn read_request<B>(&self, body: B, headers: &HeaderMap, policy: CallPolicy) -> Result<(Bytes, Permits)>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let message_bytes_max = self.limits.message_bytes_max;
        let (budget, bytes_max, read_max) = match policy.role() {
            None => (
                &self.unauthenticated_budget,
                UNAUTHENTICATED_MESSAGE_BYTES_MAX.min(message_bytes_max),
                UNAUTHENTICATED_READ_MAX,
            ),
            Some(_) => (&self.budget, message_bytes_max, self.limits.deadline_default),
        };
        let mut permits = Permits::default();
        let message = timeout(read_max, read_message(body, bytes_max, budget, &mut permits)).await;
        let message = message.unwrap_or_else(|_| Err(deadline::exceeded()))?;
        let message = if is_gzip(headers) { unzip(message, bytes_max, budget, &mut permits)? } else { message };
        Ok((message, permits))
    }

    /// Buffers the one message of a response.
    ///
    /// Mutations have been made by now, so their responses are not refused if they exceed the budget.
    async fn read_response<R>(&self, mut body: R, may_be_refused: bool, mut permits: Permits) -> Result<BufferedBody<R>>
    where
        R: Body<Data = Bytes> + Unpin,
    {
        let (mut data, mut trailers) = (None, None);
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            match frame.map_err(|_| Error::Internal("a response cannot be encoded"))?.into_data() {
                Ok(bytes) if data.is_none() => {
                    match self.budget.acquire(0, bytes.len()) {
                        Err(error) if may_be_refused => return Err(error),
                        acquired => permits.0.extend(acquired.ok().flatten()),
                    }
                    data = Some(bytes);
                }
                Ok(_) => return Err(Error::Internal("a response has more than one frame")),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        Ok(BufferedBody { content: Content::Message { data, trailers }, _permits: permits })
    }
}

/// Returns the whole body. `bytes_max` is that of the message without its prefix.
async fn read_message<B>(mut body: B, bytes_max: usize, budget: &MemoryBudget, permits: &mut Permits) -> Result<Bytes>
where
    B: Body<Data = Bytes> + Unpin,
{
    // The body of a small request is one frame, which is not copied.
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        // The client has disconnected.
        let Ok(data) = frame.map_err(|_| Error::Cancelled)?.into_data() else { continue };
        let before = first.len() + all.len();
        if before + data.len() > bytes_max + MESSAGE_PREFIX_BYTES {
            return Err(Error::too_large(bytes_max));
        }
        permits.0.extend(budget.acquire(before, data.len())?);
        if before == 0 {
            first = data;
        } else {
            all.extend_from_slice(&std::mem::take(&mut first));
            all.extend_from_slice(&data);
        }
    }
    if !body.is_end_stream() {
        return Err(Error::Cancelled);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

impl<S> Layer<S> for BufferingLayer {
    type Service = Buffering<S>;

    fn layer(&self, inner: S) -> Buffering<S> {
        Buffering { buffers: Arc::clone(&self.buffers), inner }
    }
}

/// The service of [`BufferingLayer`].
#[derive(Clone)]
pub struct Buffering<S> {
    buffers: Arc<Buffers>,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Buffering<S>
where
    S: Service<Request<RequestBody<B>>, Response = Response<R>, Error = Error, Future: Send> + Clone + Send + 'static,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    R: Body<Data = Bytes> + Send + Unpin,
{
    type Response = Response<BufferedBody<R>>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Self::Response>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let policy = CallPolicy::of(&request);
        let (buffers, mut inner) = (Arc::clone(&self.buffers), self.inner.clone());
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            let accepts_gzip = !policy.server_streaming && take_accepts_gzip(&mut parts.headers);
            let (body, permits) = if policy.client_streaming {
                (RequestBody::Stream(UncutBody(body)), Permits::default())
            } else {
                let (message, permits) = buffers.read_request(body, &parts.headers, policy).await?;
                (RequestBody::Message(message), permits)
            };
            let response = inner.call(Request::from_parts(parts, body)).await?;
            let (mut parts, body) = response.into_parts();
            let mut body = match policy.server_streaming {
                true => BufferedBody { content: Content::Stream(body), _permits: permits },
                false => buffers.read_response(body, policy.only_reads, permits).await?,
            };
            if accepts_gzip && body.compress() {
                parts.headers.insert(ENCODING, HeaderValue::from_static("gzip"));
            }
            Ok(Response::from_parts(parts, body))
        })
    }
}

/// A response body with the permits that the request and the response hold until it has been read.
pub struct BufferedBody<R> {
    content: Content<R>,
    _permits: Permits,
}

impl<R> BufferedBody<R> {
    /// Compresses the message if that makes it smaller, and returns whether it has.
    fn compress(&mut self) -> bool {
        let Content::Message { data: Some(message), .. } = &mut self.content else { return false };
        let Some(zipped) = zip(message) else { return false };
        *message = zipped;
        true
    }
}

enum Content<R> {
    Message { data: Option<Bytes>, trailers: Option<HeaderMap> },
    Stream(R),
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for BufferedBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        match &mut self.content {
            Content::Message { data, trailers } => {
                let piece = next_piece(data).map(Frame::data);
                let frame = piece.or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Content::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Message { data, trailers } => data.is_none() && trailers.is_none(),
            Content::Stream(body) => body.is_end_stream(),
        }
    }
}

/// Takes the next piece of a message.
///
/// hyper takes a whole frame as soon as the client has window for one byte, and asks for the next one when it is sent. In
/// pieces, a client that does not read leaves little memory uncounted.
fn next_piece(data: &mut Option<Bytes>) -> Option<Bytes> {
    let bytes = data.as_mut()?;
    let piece = bytes.split_to(bytes.len().min(PIECE_BYTES));
    if bytes.is_empty() {
        *data = None;
    }
    Some(piece)
}
