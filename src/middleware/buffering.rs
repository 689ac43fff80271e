//! Buffers the messages of requests and responses within a memory budget.

use std::{
    future::poll_fn,
    num::NonZero,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, request::Parts};
use http_body::Body;
use tokio::time::{Instant, timeout};
use tonic::Status;
use tower::{Layer, Service};

use super::{
    RequestLimits,
    admission::flow,
    body::{PolledFrame, RequestBody, UncutBody},
    compression::{ENCODING, MESSAGE_PREFIX_BYTES, is_gzip, take_accepts_gzip, unzip, zip},
    deadline::{self, READ_GRACE},
    memory_budget::{CallMemory, MemoryBudget},
    metadata_limit::metadata_bytes,
    method_policy::CallPolicy,
    unread::{Remaining, UnreadResponse},
};
use crate::{
    error::{Error, Result},
    fairness::FairSemaphore,
    transport::activity::CallHandle,
};

/// Memory for the requests and responses of authenticated callers.
pub const MESSAGE_MEMORY_KIB: u32 = 256 * 1024;
/// The same for unauthenticated requests, which client addresses share. A usual login, with its metadata, fits into the bytes
/// that are not counted: users can sign in even if others, also from the same address, have used up the budget.
const UNAUTHENTICATED_MEMORY_KIB: u32 = 16 * 1024;
const UNAUTHENTICATED_UNCOUNTED_BYTES: usize = 4 * 1024;
/// What a call takes beside its message: its stream, its task and usual metadata.
const CALL_BYTES: usize = 4 * 1024;
/// A response of up to this size is copied: tonic encodes it into a buffer of 8 KiB.
const COPIED_RESPONSE_BYTES_MAX: usize = 4 * 1024;
/// Maximum size of an unauthenticated request. Names and passwords are shorter.
pub const UNAUTHENTICATED_MESSAGE_BYTES_MAX: usize = 16 * 1024;
/// How long a request waits for its decompression.
const DECOMPRESSION_WAIT_MAX: Duration = Duration::from_secs(5);
/// Time allowed for the client to send an unauthenticated request.
const UNAUTHENTICATED_READ_MAX: Duration = Duration::from_secs(5);

/// Buffers the request, unless its client streams, and the response, unless it is a stream.
///
/// A request is counted until its response is ready, and a response until it has been read. What exceeds the budget fails
/// with `Exhausted`. Before a mutation, memory is reserved for the largest response that it can have.
#[derive(Clone)]
pub struct BufferingLayer {
    buffers: Arc<Buffers>,
}

impl BufferingLayer {
    pub fn new(limits: RequestLimits) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get) as u32;
        let buffers = Buffers {
            limits,
            decompressions: FairSemaphore::new("decompressions", processors, limits.share),
            budget: MemoryBudget::new("message memory", 0, MESSAGE_MEMORY_KIB, limits.share),
            unauthenticated_budget: MemoryBudget::new(
                "message memory without credentials",
                UNAUTHENTICATED_UNCOUNTED_BYTES,
                UNAUTHENTICATED_MEMORY_KIB,
                limits.share,
            ),
        };
        Self { buffers: Arc::new(buffers) }
    }
}

/// Reads messages within the budgets.
struct Buffers {
    limits: RequestLimits,
    /// Requests that are decompressed at the same time: as many as there are processors.
    decompressions: FairSemaphore,
    budget: MemoryBudget,
    unauthenticated_budget: MemoryBudget,
}

impl Buffers {
    fn budget_of(&self, policy: CallPolicy) -> &MemoryBudget {
        if policy.role().is_some() { &self.budget } else { &self.unauthenticated_budget }
    }

    /// Returns the one message of a request with its prefix, decompressed.
    async fn read_request<B>(
        &self,
        body: B,
        parts: &Parts,
        policy: CallPolicy,
        memory: &mut CallMemory,
    ) -> Result<Bytes>
    where
        B: Body<Data = Bytes> + Unpin,
    {
        let (budget, message_bytes_max) = (self.budget_of(policy), self.limits.message_bytes_max);
        let metadata_bytes = metadata_bytes(&parts.headers, &parts.uri);
        let (call_bytes, bytes_max, read_max) = match policy.role() {
            None => {
                (metadata_bytes, UNAUTHENTICATED_MESSAGE_BYTES_MAX.min(message_bytes_max), UNAUTHENTICATED_READ_MAX)
            }
            Some(_) => (metadata_bytes.max(CALL_BYTES), message_bytes_max, self.limits.deadline_default),
        };
        // A client that begins calls and sends no message takes memory too.
        budget.add(memory, call_bytes)?;
        let message = timeout(read_max, read_message(body, bytes_max, budget, memory)).await;
        let message = message.unwrap_or_else(|_| Err(deadline::exceeded()))?;
        if !is_gzip(&parts.headers) {
            return Ok(message);
        }
        let turn = self.decompressions.acquire(memory.flow(), DECOMPRESSION_WAIT_MAX).await;
        let _turn =
            turn.map_err(|_| Error::Exhausted("too many requests wait for decompression; try again".to_owned()))?;
        // Boxed: compressed requests are rare and must not enlarge the future of every call.
        Box::pin(unzip(message, bytes_max, budget, memory)).await
    }

    /// Reserves memory for the response of a mutation: once it has been executed, its response must not be refused.
    fn reserve_response(&self, policy: CallPolicy, request_bytes: usize, memory: &mut CallMemory) -> Result<()> {
        if policy.only_reads || policy.server_streaming || policy.role().is_none() {
            return Ok(());
        }
        let bytes = memory.bytes().max(CALL_BYTES) + policy.response_size.max(request_bytes);
        self.budget.set(memory, bytes)
    }

    /// Buffers the one message of a response. Its memory replaces that of the request.
    async fn read_response<R>(&self, mut body: R, policy: CallPolicy, memory: CallMemory) -> Result<Remaining>
    where
        R: Body<Data = Bytes> + Unpin,
    {
        let mut response = Remaining::new(memory);
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            match frame.map_err(|_| Error::Internal("a response cannot be encoded"))?.into_data() {
                Ok(bytes) if response.data.is_none() => response.data = Some(exact(bytes)),
                Ok(_) => return Err(Error::Internal("a response has more than one frame")),
                Err(frame) => response.trailers = frame.into_trailers().ok(),
            }
        }
        let bytes = CALL_BYTES + response.bytes();
        if policy.only_reads {
            self.budget_of(policy).set(&mut response.memory, bytes)?;
        } else {
            // A declared size that is too small must not make an executed mutation fail.
            let reserved_bytes = response.memory.bytes();
            debug_assert!(policy.role().is_none() || bytes <= reserved_bytes, "{bytes} of {reserved_bytes} bytes");
            self.budget_of(policy).set(&mut response.memory, bytes.min(reserved_bytes))?;
        }
        Ok(response)
    }
}

/// Returns a message that does not keep a larger buffer in memory.
fn exact(message: Bytes) -> Bytes {
    if message.len() <= COPIED_RESPONSE_BYTES_MAX { Bytes::copy_from_slice(&message) } else { message }
}

/// Returns the whole body. `bytes_max` is that of the message without its prefix.
async fn read_message<B>(mut body: B, bytes_max: usize, budget: &MemoryBudget, memory: &mut CallMemory) -> Result<Bytes>
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
        budget.add(memory, data.len())?;
        if before == 0 {
            first = data;
            continue;
        }
        if all.is_empty() {
            // Growing step by step, a message would take up to twice its size. What is reserved and unused takes no memory.
            let bytes = announced_bytes(&first).clamp(before + data.len(), bytes_max + MESSAGE_PREFIX_BYTES);
            all.reserve(bytes);
        }
        all.extend_from_slice(&std::mem::take(&mut first));
        all.extend_from_slice(&data);
    }
    if !body.is_end_stream() {
        return Err(Error::Cancelled);
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// Returns the size of a message with its prefix, according to the prefix; 0 if its begin is shorter than that.
fn announced_bytes(begin: &[u8]) -> usize {
    let Some([_, length @ ..]) = begin.first_chunk::<MESSAGE_PREFIX_BYTES>() else { return 0 };
    (u32::from_be_bytes(*length) as usize).saturating_add(MESSAGE_PREFIX_BYTES)
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
            let (flow, call) = (flow(&parts.extensions), parts.extensions.get::<CallHandle>().cloned());
            let mut memory = CallMemory::of(flow);
            let (body, request_bytes) = if policy.client_streaming {
                (RequestBody::Stream(UncutBody(body)), 0)
            } else {
                let message = buffers.read_request(body, &parts, policy, &mut memory).await?;
                let bytes = message.len();
                (RequestBody::Message(message), bytes)
            };
            buffers.reserve_response(policy, request_bytes, &mut memory)?;
            let response = inner.call(Request::from_parts(parts, body)).await?;
            let (mut parts, body) = response.into_parts();
            if policy.server_streaming {
                return Ok(Response::from_parts(parts, BufferedBody::Stream(body)));
            }
            // The message of the request is dropped by now.
            let mut response = buffers.read_response(body, policy, memory).await?;
            if accepts_gzip && let Some(zipped) = response.data.as_deref().and_then(zip) {
                response.data = Some(zipped);
                parts.headers.insert(ENCODING, HeaderValue::from_static("gzip"));
            }
            if let Some(call) = call {
                call.expect_progress_by(Instant::now() + UnreadResponse::read_max(response.bytes()) + READ_GRACE);
            }
            Ok(Response::from_parts(parts, BufferedBody::Message(UnreadResponse::new(response))))
        })
    }
}

/// The body of a response: a message that is buffered, or a stream.
pub enum BufferedBody<R> {
    Message(UnreadResponse),
    Stream(R),
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for BufferedBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        match &mut *self {
            Self::Message(response) => Poll::Ready(response.next_frame().map(Ok)),
            Self::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Message(response) => response.is_end(),
            Self::Stream(body) => body.is_end_stream(),
        }
    }
}

#[cfg(test)]
mod tests;
