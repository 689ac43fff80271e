//! The layer around all services: what every request goes through before it reaches its RPC.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;
use tonic::{Status, body::Body};

use crate::{
    auth::Auth,
    error::{Error, Result},
};

/// The RPCs that need no token; those of health and reflection are no `issuetracker` services.
const LOGIN_PATH: &str = "/issuetracker.v1.AuthService/Login";

/// The RPC with a stream of the client's, whose end means something.
const STREAMED_PATH: &str = "/issuetracker.v1.ImportService/ImportIssues";

/// Bounds the requests at once, finds the caller, and sees to it that every error carries an `ErrorInfo`.
#[derive(Clone)]
pub struct Gate {
    auth: Auth,
    slots: Arc<Semaphore>,
    requests_max: usize,
}

impl Gate {
    pub fn new(auth: Auth, requests_max: usize) -> Self {
        Self { auth, slots: Arc::new(Semaphore::new(requests_max)), requests_max }
    }

    async fn admit(&self, request: &mut http::Request<Body>) -> Result<Option<tokio::sync::OwnedSemaphorePermit>> {
        if !request.uri().path().starts_with("/issuetracker.") {
            return Ok(None);
        }
        let slot = Arc::clone(&self.slots).try_acquire_owned().map_err(|_| {
            Error::Exhausted(format!(
                "{} requests are under way, which is as many as are taken at once",
                self.requests_max
            ))
        })?;
        if request.uri().path() != LOGIN_PATH {
            let caller = self.auth.authenticate(request.headers()).await?;
            request.extensions_mut().insert(caller);
        }
        Ok(Some(slot))
    }
}

impl<S> tower::Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { gate: self.clone(), inner }
    }
}

#[derive(Clone)]
pub struct Gated<S> {
    gate: Gate,
    inner: S,
}

impl<S> tower::Service<http::Request<Body>> for Gated<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Self::Response, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let gate = self.gate.clone();
        // The service that was polled ready is the one that is called.
        let fresh = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, fresh);
        let deadline = request.headers().get("grpc-timeout").and_then(|timeout| grpc_timeout(timeout.to_str().ok()?));
        let answer: Self::Future = Box::pin(async move {
            match gate.admit(&mut request).await {
                Ok(_slot) => {
                    if request.uri().path() == STREAMED_PATH {
                        request = request.map(|body| Body::new(Uncut(body)));
                    }
                    inner.call(request).await.map(explain_bare_errors)
                }
                Err(error) => Ok(Status::from(error).into_http()),
            }
        });
        let Some(deadline) = deadline else { return answer };
        Box::pin(async move {
            // tonic would notice it too, but outside of this layer, and tell CANCELLED.
            tokio::time::timeout(deadline, answer).await.unwrap_or_else(|_| {
                let message = "the deadline of the request has passed".to_owned();
                Ok(Status::from(Error::Timeout { reason: "DEADLINE", message }).into_http())
            })
        })
    }
}

/// A body that fails when the client resets its stream, which tonic and hyper take for its proper end: half a file would
/// pass for a whole one.
struct Uncut(Body);

impl http_body::Body for Uncut {
    type Data = bytes::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Status>>> {
        let cut = || {
            let message = "the stream was cut".to_owned();
            Some(Err(Status::from(Error::Aborted { reason: "STREAM_CUT", message })))
        };
        match ready!(Pin::new(&mut self.0).poll_frame(context)) {
            Some(Err(status)) if status.code() == tonic::Code::Cancelled => Poll::Ready(cut()),
            None if !self.0.is_end_stream() => Poll::Ready(cut()),
            frame => Poll::Ready(frame),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
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
