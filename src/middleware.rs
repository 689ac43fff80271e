//! What every request goes through: admission, the caller's identity, a deadline, tries that are made again, and the
//! bounds on what requests and answers hold in memory.

mod body;
pub mod method_table;
mod unauthenticated_streams;

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::future::poll_fn;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header::CONTENT_TYPE};
use http_body::Body as _;
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, service::Routes};
use tower::Service;

pub use self::body::Answer;
use self::{
    body::{Content, Held, STREAM_STILL_MAX, Uncut},
    unauthenticated_streams::OpenStreams,
};
use crate::{
    auth::{Auth, Caller},
    error::{Error, RETRY_DELAY, Result, Retry},
    transport::client_address::ClientAddress,
    transport::connection::{Call, random},
};

/// What begins the path of our own RPCs; health and reflection need no token.
const OWN_PATHS: &str = "/issuetracker.";
/// The RPC that needs no token. It has bounds of its own, so that it goes on under load.
const LOGIN_PATH: &str = "/issuetracker.v1.AuthService/Login";
/// The RPC with a stream of the client's, whose end means something.
const IMPORT_PATH: &str = "/issuetracker.v1.ImportService/ImportIssues";
/// The RPC that answers with a stream.
const EXPORT_PATH: &str = "/issuetracker.v1.IssueService/ExportIssues";
/// The RPC that may take as long as an import.
const REVERT_PATH: &str = "/issuetracker.v1.ImportService/RevertImport";
const HEALTH_CHECK_PATH: &str = "/grpc.health.v1.Health/Check";

/// What a request without credentials may hold: names and passwords are shorter.
pub const OPEN_REQUEST_BYTES_MAX: usize = 16 * 1024;
/// Streams of health and reflection at once, which nobody has to sign in for.
const OPEN_STREAMS_MAX: usize = 1_024;
/// What requests and answers at hand may hold in memory, beyond the first bytes of each.
const PAYLOAD_KIB_MAX: usize = 256 * 1024;
const PAYLOAD_FREE_BYTES: usize = 64 * 1024;
/// The same for requests without credentials. Names and passwords are within the first bytes: what others fill does not
/// keep anybody from signing in.
const OPEN_PAYLOAD_KIB_MAX: usize = 16 * 1024;
const OPEN_PAYLOAD_FREE_BYTES: usize = 1024;
/// How long a request without credentials may take to be sent.
const OPEN_READ_MAX: Duration = Duration::from_secs(5);
/// The longest deadline of a call that is no stream, whatever the client asks for.
const DEADLINE_MAX: Duration = Duration::from_secs(600);
/// What a client has to read the end of an answer whose deadline has passed.
const READ_GRACE: Duration = Duration::from_secs(20);
/// So many refusals in a second cost next to nothing.
const REFUSALS_CHEAP: f64 = 500.0;
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// How often a call is made that has got in the way of others, or whose connection to the database was lost.
const TRIES_MAX: u32 = 4;
/// How long it is asked what became of a mutation, by its request id.
const LOOKUP_MAX: Duration = Duration::from_secs(5);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// The bounds of requests.
#[derive(Clone, Copy, Debug)]
pub struct RequestLimits {
    /// Requests at once.
    pub requests_max: usize,
    /// One message.
    pub message_bytes_max: usize,
    /// How long a call may take whose client does not say it.
    pub deadline_default: Duration,
}

/// The way to the RPCs.
pub struct Gate {
    auth: Auth,
    routes: Routes,
    limits: RequestLimits,
    slots: Arc<Semaphore>,
    open_streams: Arc<Semaphore>,
    open_streams_of_clients: OpenStreams,
    payload: Payload,
    open_payload: Payload,
    refusals: Mutex<Refusals>,
    stopping: CancellationToken,
}

/// How a request is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// One message, one answer.
    Unary,
    Login,
    Import,
    Export,
    HealthCheck,
    /// Health's and reflection's streams.
    OpenStream,
}

impl Kind {
    fn of(path: &str) -> Self {
        match path {
            LOGIN_PATH => Self::Login,
            IMPORT_PATH => Self::Import,
            EXPORT_PATH => Self::Export,
            HEALTH_CHECK_PATH => Self::HealthCheck,
            path if path.starts_with(OWN_PATHS) => Self::Unary,
            _ => Self::OpenStream,
        }
    }

    fn is_own(self) -> bool {
        !matches!(self, Self::HealthCheck | Self::OpenStream)
    }

    fn answers_with_stream(self) -> bool {
        matches!(self, Self::Import | Self::Export | Self::OpenStream)
    }
}

impl Gate {
    /// From `stopping` on, our own RPCs are refused.
    pub fn new(auth: Auth, routes: Routes, limits: RequestLimits, stopping: CancellationToken) -> Self {
        Self {
            auth,
            routes: routes.prepare(),
            limits,
            slots: Arc::new(Semaphore::new(limits.requests_max)),
            open_streams: Arc::new(Semaphore::new(OPEN_STREAMS_MAX)),
            open_streams_of_clients: OpenStreams::default(),
            payload: Payload::new(PAYLOAD_FREE_BYTES, PAYLOAD_KIB_MAX),
            open_payload: Payload::new(OPEN_PAYLOAD_FREE_BYTES, OPEN_PAYLOAD_KIB_MAX),
            refusals: Mutex::new(Refusals::new(Instant::now())),
            stopping,
        }
    }

    /// Answers a request; what goes wrong is told as the contract has it.
    pub async fn answer(&self, request: http::Request<Incoming>, call: Call) -> http::Response<Answer> {
        if let Some(status) = not_grpc(&request) {
            let mut response = http::Response::new(Answer::empty(call));
            *response.status_mut() = status;
            return response;
        }
        let kind = Kind::of(request.uri().path());
        let deadline = self.deadline(kind, &request);
        // A stream says later how it goes on.
        call.lasts_until(deadline.unwrap_or(Instant::now() + STREAM_STILL_MAX) + READ_GRACE);
        let mut held = Held::default();
        let answered = match deadline {
            None => self.admitted(request, kind, &call, &mut held).await,
            // What is ready at once would still be done.
            Some(deadline) if deadline <= Instant::now() => Err(deadline_passed()),
            Some(deadline) => timeout_at(deadline, self.admitted(request, kind, &call, &mut held))
                .await
                .unwrap_or_else(|_| Err(deadline_passed())),
        };
        let (parts, content) = answered.unwrap_or_else(refusal);
        let deadline = deadline.filter(|_| kind.answers_with_stream());
        // Our own streams end by themselves, when they have told how far they came.
        let stop = (kind == Kind::OpenStream).then(|| Box::pin(self.stopping.clone().cancelled_owned()));
        let deadline = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        http::Response::from_parts(parts, Answer { content, deadline, stop, call, _held: held })
    }

    /// Streams have a deadline only if their client says so.
    fn deadline<B>(&self, kind: Kind, request: &http::Request<B>) -> Option<Instant> {
        let default = if request.uri().path() == REVERT_PATH { DEADLINE_MAX } else { self.limits.deadline_default };
        let asked = request.headers().get("grpc-timeout").and_then(|timeout| grpc_timeout(timeout.to_str().ok()?));
        let lasts = match kind {
            Kind::Import | Kind::Export | Kind::OpenStream => asked?,
            Kind::Login | Kind::HealthCheck => asked.unwrap_or(default).min(default),
            Kind::Unary => asked.unwrap_or(default).min(DEADLINE_MAX),
        };
        Instant::now().checked_add(lasts)
    }

    async fn admitted(
        &self,
        mut request: http::Request<Incoming>,
        kind: Kind,
        call: &Call,
        held: &mut Held,
    ) -> Result<(http::response::Parts, Content)> {
        let caller = self.admit(&request, kind, call, held).await?;
        if let Some(caller) = caller {
            request.extensions_mut().insert(caller);
        }
        request.extensions_mut().insert(call.client());
        let may_be_refused = only_reads(request.uri().path());
        let response = match kind {
            Kind::Import => self.call(request.map(|body| Body::new(Uncut(body)))).await,
            Kind::OpenStream => self.call(request.map(Body::new)).await,
            Kind::Unary | Kind::Login | Kind::Export | Kind::HealthCheck => {
                let (parts, body) = request.into_parts();
                let read_max = match kind {
                    Kind::Login | Kind::HealthCheck => OPEN_READ_MAX,
                    _ => self.limits.deadline_default,
                };
                let message = timeout(read_max, self.read(body, kind, held)).await;
                let message = message.unwrap_or_else(|_| Err(deadline_passed()))?;
                self.call_with_retries(parts, message, caller, call.client()).await
            }
        };
        let (parts, body) = explain_bare_errors(response).into_parts();
        let content = match kind.answers_with_stream() {
            true => Content::Stream(body),
            false => self.read_answer(body, may_be_refused, held).await?,
        };
        Ok((parts, content))
    }

    /// Lets a request in, and finds out who makes it.
    async fn admit(
        &self,
        request: &http::Request<Incoming>,
        kind: Kind,
        call: &Call,
        held: &mut Held,
    ) -> Result<Option<Caller>> {
        if kind.is_own() && self.stopping.is_cancelled() {
            return Err(Error::Stopping);
        }
        if matches!(kind, Kind::HealthCheck | Kind::Login | Kind::OpenStream) && !call.enter_open() {
            return Err(too_many_open());
        }
        let (caller, slots, count) = match kind {
            Kind::HealthCheck | Kind::Login => return Ok(None),
            Kind::OpenStream => {
                let counted = self.open_streams_of_clients.enter(call.client().0);
                held._open_stream = Some(counted.ok_or_else(too_many_open)?);
                (None, &self.open_streams, OPEN_STREAMS_MAX)
            }
            Kind::Unary | Kind::Import | Kind::Export => {
                if self.slots.available_permits() == 0 {
                    return Err(self.overloaded(self.limits.requests_max));
                }
                // Before there is a slot: tokens that nobody has are to take none of them.
                let caller = self.authenticate(request.headers()).await?;
                call.signed_in();
                (Some(caller), &self.slots, self.limits.requests_max)
            }
        };
        let slot = Arc::clone(slots).try_acquire_owned().map_err(|_| self.overloaded(count))?;
        held._slot = Some(slot);
        Ok(caller)
    }

    fn overloaded(&self, requests_max: usize) -> Error {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        // Some sooner and some later, so that they do not come back together.
        let delay = refusals.delay(Instant::now()).mul_f64(0.75 + random() / 2.0);
        Error::Overloaded { requests_max, delay }
    }

    async fn authenticate(&self, headers: &HeaderMap) -> Result<Caller> {
        let mut tries = Tries::default();
        loop {
            let error = match self.auth.authenticate(headers).await {
                Ok(caller) => return Ok(caller),
                Err(error) => error,
            };
            match tries.pause_after(&error) {
                Some(pause) => sleep(pause).await,
                None => return Err(error),
            }
        }
    }

    /// The one message of a request, with its prefix.
    async fn read(&self, mut body: Incoming, kind: Kind, held: &mut Held) -> Result<Bytes> {
        let message_bytes_max = self.limits.message_bytes_max;
        let (payload, message_bytes_max) = match kind {
            Kind::Login | Kind::HealthCheck => (&self.open_payload, OPEN_REQUEST_BYTES_MAX.min(message_bytes_max)),
            _ => (&self.payload, message_bytes_max),
        };
        let bytes_max = message_bytes_max + MESSAGE_PREFIX_BYTES;
        let mut message = Bytes::new();
        let mut more = BytesMut::new();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            // The client has gone away.
            let Ok(data) = frame.map_err(|_| Error::Cancelled)?.into_data() else { continue };
            if message.len() + more.len() + data.len() > bytes_max {
                return Err(Error::too_large(message_bytes_max));
            }
            held.payload.extend(payload.take(message.len() + more.len(), data.len())?);
            if message.is_empty() && more.is_empty() {
                message = data;
            } else {
                more.extend_from_slice(&std::mem::take(&mut message));
                more.extend_from_slice(&data);
            }
        }
        if !body.is_end_stream() {
            return Err(Error::Cancelled);
        }
        Ok(if more.is_empty() { message } else { more.freeze() })
    }

    async fn call(&self, request: http::Request<Body>) -> http::Response<Body> {
        let mut routes = self.routes.clone();
        // It is always ready, and its error is that there is none.
        routes.call(request).await.unwrap_or_else(|never| match never {})
    }

    /// Makes a call again that has failed for a passing reason, as long as nothing can be done twice by it.
    async fn call_with_retries(
        &self,
        mut parts: http::request::Parts,
        message: Bytes,
        caller: Option<Caller>,
        client: ClientAddress,
    ) -> http::Response<Body> {
        let uri = parts.uri.clone();
        let mut tries = Tries::default();
        loop {
            let body = Body::new(Full::new(message.clone()));
            let response = self.call(http::Request::from_parts(parts, body)).await;
            let Some(error) = response.extensions().get::<Status>().and_then(Error::behind) else { return response };
            let Some(pause) = tries.pause_after(error) else {
                return match tries.unknown_since.is_some() && !error.is_decided() {
                    true => Status::from(Error::OutcomeUnknown { has_request_id: true }).into_http(),
                    false => response,
                };
            };
            sleep(pause).await;
            let mut again = http::Request::new(());
            *again.method_mut() = Method::POST;
            *again.uri_mut() = uri.clone();
            again.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            again.extensions_mut().insert(client);
            if let Some(caller) = caller {
                again.extensions_mut().insert(caller);
            }
            (parts, ()) = again.into_parts();
        }
    }

    /// The one message of an answer, as it goes out. What a mutation answers is never refused: it has been made by now.
    async fn read_answer(&self, mut body: Body, may_be_refused: bool, held: &mut Held) -> Result<Content> {
        let (mut data, mut trailers) = (None, None);
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            match frame.map_err(|_| Error::Internal("an answer cannot be encoded"))?.into_data() {
                Ok(bytes) if data.is_none() => {
                    match self.payload.take(0, bytes.len()) {
                        Err(error) if may_be_refused => return Err(error),
                        room => held.payload.extend(room.ok().flatten()),
                    }
                    data = Some(bytes);
                }
                Ok(_) => return Err(Error::Internal("an answer has more than one frame")),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        Ok(Content::Unary { data, trailers })
    }
}

/// The flag and the length before each message.
const MESSAGE_PREFIX_BYTES: usize = 5;

/// Whether a method has no side effects. Health checks are the only such methods that are not in the table.
fn only_reads(path: &str) -> bool {
    path == HEALTH_CHECK_PATH || method_table::find(path).is_some_and(|policy| policy.only_reads)
}

/// What is told to a client that does not speak gRPC, as its specification has it.
fn not_grpc<B>(request: &http::Request<B>) -> Option<StatusCode> {
    let content_type = request.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if request.method() != Method::POST {
        Some(StatusCode::METHOD_NOT_ALLOWED)
    } else if !matches!(content_type.strip_prefix(b"application/grpc"), Some([] | [b'+' | b';', ..])) {
        Some(StatusCode::UNSUPPORTED_MEDIA_TYPE)
    } else {
        None
    }
}

fn deadline_passed() -> Error {
    Error::Timeout { reason: "DEADLINE", message: "the deadline of the request has passed".to_owned() }
}

fn too_many_open() -> Error {
    Error::Exhausted("too many calls without credentials are under way; try again".to_owned())
}

fn refusal(error: Error) -> (http::response::Parts, Content) {
    let (parts, ()) = Status::from(error).into_http::<()>().into_parts();
    (parts, Content::Unary { data: None, trailers: None })
}

/// How many requests were refused of late. The more there are, the longer they are asked to stay away: what refusing costs
/// is missing to those that are taken.
struct Refusals {
    second: Instant,
    in_this: u32,
    in_the_last: u32,
}

impl Refusals {
    fn new(now: Instant) -> Self {
        Self { second: now, in_this: 0, in_the_last: 0 }
    }

    /// Of one more.
    fn delay(&mut self, now: Instant) -> Duration {
        let passed = now.duration_since(self.second).as_secs();
        if passed > 0 {
            self.in_the_last = if passed == 1 { self.in_this } else { 0 };
            (self.second, self.in_this) = (now, 0);
        }
        self.in_this += 1;
        let count = self.in_this.max(self.in_the_last);
        RETRY_DELAY.mul_f64(1.0 + f64::from(count) / REFUSALS_CHEAP).min(RETRY_DELAY_MAX)
    }
}

/// The memory that requests and answers may take together.
struct Payload {
    /// Not counted of each.
    free_bytes: usize,
    room: Arc<Semaphore>,
}

impl Payload {
    fn new(free_bytes: usize, kib_max: usize) -> Self {
        Self { free_bytes, room: Arc::new(Semaphore::new(kib_max)) }
    }

    /// Counts bytes that are kept for a message which has some already; the first ones of each are free.
    fn take(&self, before: usize, bytes: usize) -> Result<Option<OwnedSemaphorePermit>> {
        let beyond_free = |bytes: usize| bytes.saturating_sub(self.free_bytes).div_ceil(1024);
        let kib = beyond_free(before + bytes) - beyond_free(before);
        if kib == 0 {
            return Ok(None);
        }
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.room).try_acquire_many_owned(kib);
        permit.map(Some).map_err(|_| {
            Error::Exhausted("the large requests and answers under way are as many as are taken; try again".to_owned())
        })
    }
}

/// The tries of a call.
#[derive(Default)]
struct Tries {
    count: u32,
    /// Since when it is not known whether one of them was made.
    unknown_since: Option<Instant>,
}

impl Tries {
    /// How long to wait before the next try. None: it stands as it is.
    fn pause_after(&mut self, error: &Error) -> Option<Duration> {
        self.count += 1;
        if error.retry() == Retry::Lookup {
            self.unknown_since.get_or_insert_with(Instant::now);
        }
        let again = match self.unknown_since {
            // Whatever is passing is waited for: the request id will tell.
            Some(since) => error.is_passing() && since.elapsed() < LOOKUP_MAX,
            None => error.retry() == Retry::Again && self.count < TRIES_MAX,
        };
        again.then(|| pause(self.count))
    }
}

/// Doubles from try to try; half of it is left to chance, so that calls which met once do not meet again.
fn pause(count: u32) -> Duration {
    let full = PAUSE_FIRST.saturating_mul(1 << count.min(10)).min(PAUSE_MAX);
    full.mul_f64(1.0 - random() / 2.0)
}

/// The value of `grpc-timeout`: up to eight digits and a unit.
pub fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3_600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// Errors of tonic itself (undecodable or oversized messages, unknown methods) as the contract has them.
fn explain_bare_errors(response: http::Response<Body>) -> http::Response<Body> {
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    if !status.details().is_empty() || status.code() == tonic::Code::Ok {
        return response;
    }
    let Some(error) = Error::from_bare(&status) else { return response };
    let mut explained = Status::from(error);
    // Such as `grpc-accept-encoding`, which tells the client how to go on.
    *explained.metadata_mut() = status.metadata().clone();
    explained.into_http()
}

#[cfg(test)]
mod tests;
