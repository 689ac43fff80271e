//! Repeats calls that failed for a transient reason, as long as nothing can happen twice.
//!
//! If a connection to the database breaks during the commit of a mutation with a request id, the mutation is repeated until
//! its stored response or a definite error shows the outcome.

use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header::CONTENT_TYPE};
use http_body_util::Full;
use tokio::time::{Instant, sleep};
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::body::RequestBody;
use crate::{
    auth::Caller,
    backoff::{Backoff, random},
    error::{Error, Result, Retry},
    metrics,
    transport::client_address::ClientAddress,
};

/// How often a call is made that conflicts with others or loses its connection to the database.
const ATTEMPTS_MAX: u32 = 4;
/// How long the outcome of a mutation is looked up by its request id.
const LOOKUP_MAX: Duration = Duration::from_secs(5);
const BACKOFF: Backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(500) };
/// The headers that tonic reads, besides the content type.
const ENCODING_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("grpc-encoding"), HeaderName::from_static("grpc-accept-encoding")];

/// Repeats calls whose request is buffered. Request streams are passed on as they are.
#[derive(Clone, Copy, Debug)]
pub struct RetryLayer;

impl<S> Layer<S> for RetryLayer {
    type Service = Retrying<S>;

    fn layer(&self, inner: S) -> Retrying<S> {
        Retrying { inner }
    }
}

/// The service of [`RetryLayer`].
#[derive(Clone)]
pub struct Retrying<S> {
    inner: S,
}

impl<S, B> Service<Request<RequestBody<B>>> for Retrying<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future: Send> + Clone + Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Response<Body>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody<B>>) -> Self::Future {
        let mut inner = self.inner.clone();
        let (parts, body) = request.into_parts();
        Box::pin(async move {
            match body {
                RequestBody::Stream(body) => {
                    let response = inner.call(Request::from_parts(parts, Body::new(body))).await;
                    Ok(response.unwrap_or_else(|never| match never {}))
                }
                RequestBody::Message(message) => {
                    let repeat = Repeat::of(&parts, message.clone());
                    call_with_retries(inner, Request::from_parts(parts, Body::new(Full::new(message))), repeat).await
                }
            }
        })
    }
}

async fn call_with_retries<S>(mut inner: S, mut request: Request<Body>, repeat: Repeat) -> Result<Response<Body>>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let mut attempts = Attempts::default();
    loop {
        let response = inner.call(request).await.unwrap_or_else(|never| match never {});
        let Some(error) = response.extensions().get::<Status>().and_then(Error::of_status) else { return Ok(response) };
        let Some(delay) = attempts.next_delay(error) else {
            return match attempts.unknown_since.is_some() && !error.is_decided() {
                true => Err(Error::OutcomeUnknown { has_request_id: true }),
                false => Ok(response),
            };
        };
        attempts.count_retry(error);
        sleep(delay).await;
        request = repeat.request();
    }
}

/// What is needed to make the call again.
struct Repeat {
    uri: Uri,
    encodings: [Option<HeaderValue>; 2],
    client: Option<ClientAddress>,
    caller: Option<Caller>,
    message: Bytes,
}

impl Repeat {
    fn of(parts: &http::request::Parts, message: Bytes) -> Self {
        Self {
            uri: parts.uri.clone(),
            encodings: ENCODING_HEADERS.map(|name| parts.headers.get(name).cloned()),
            client: parts.extensions.get().copied(),
            caller: parts.extensions.get().copied(),
            message,
        }
    }

    fn request(&self) -> Request<Body> {
        let mut request = Request::new(Body::new(Full::new(self.message.clone())));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.uri.clone();
        let headers: &mut HeaderMap = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        for (name, value) in ENCODING_HEADERS.into_iter().zip(&self.encodings) {
            headers.extend(value.clone().map(|value| (name, value)));
        }
        let extensions: &mut Extensions = request.extensions_mut();
        self.client.map(|client| extensions.insert(client));
        self.caller.map(|caller| extensions.insert(caller));
        request
    }
}

/// The attempts of a call.
#[derive(Default)]
pub struct Attempts {
    count: u32,
    /// Since when it has not been known whether one of them was committed.
    unknown_since: Option<Instant>,
}

impl Attempts {
    /// Returns how long to wait before the next attempt, or `None` if the error is final.
    pub fn next_delay(&mut self, error: &Error) -> Option<Duration> {
        self.count += 1;
        if error.retry() == Retry::Lookup {
            self.unknown_since.get_or_insert_with(Instant::now);
        }
        let is_retried = match self.unknown_since {
            // Any transient error is waited out: the request id will show the outcome.
            Some(since) => error.is_passing() && since.elapsed() < LOOKUP_MAX,
            None => error.retry() == Retry::Again && self.count < ATTEMPTS_MAX,
        };
        is_retried.then(|| BACKOFF.delay(self.count, random()))
    }

    /// Counts the retry after `error` for the metrics.
    fn count_retry(&self, error: &Error) {
        metrics::count(|metrics| match error {
            _ if self.unknown_since.is_some() => &metrics.retries.outcome_unknown,
            Error::Conflict(_) => &metrics.retries.conflict,
            Error::ReadOnly => &metrics.retries.read_only,
            _ => &metrics.retries.connection_lost,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::middleware::deadline;

    #[test]
    fn transient_errors_are_retried_up_to_a_limit_and_others_never() {
        let attempts_of = |error: Error| {
            let mut attempts = Attempts::default();
            (1..).take_while(|_| attempts.next_delay(&error).is_some()).count() as u32 + 1
        };
        assert_eq!(attempts_of(Error::ConnectionLost), ATTEMPTS_MAX);
        assert_eq!(attempts_of(Error::ReadOnly), ATTEMPTS_MAX);
        assert_eq!(attempts_of(Error::Conflict("they met")), ATTEMPTS_MAX);
        for error in [
            Error::Unavailable,
            Error::Exhausted(String::new()),
            Error::OutcomeUnknown { has_request_id: false },
            Error::Aborted { reason: "CONFLICT", message: String::new() },
            deadline::exceeded(),
            Error::Internal("a fault"),
        ] {
            assert_eq!(attempts_of(error.clone()), 1, "{error:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_outcome_with_a_request_id_is_looked_up_until_it_is_known_or_too_late() {
        let began = Instant::now();
        let mut attempts = Attempts::default();
        let mut delay = attempts.next_delay(&Error::OutcomeUnknown { has_request_id: true });
        while let Some(time) = delay {
            assert!(time <= BACKOFF.max);
            sleep(time).await;
            delay = attempts.next_delay(&Error::Unavailable);
        }
        assert!(began.elapsed() >= LOOKUP_MAX && began.elapsed() < LOOKUP_MAX + 2 * BACKOFF.max);
        assert!(attempts.unknown_since.is_some());

        // The last error either shows the outcome, or it is still unknown.
        let locked = Error::Aborted { reason: "CONFLICT", message: "nothing was written".to_owned() };
        let stale = Error::Aborted { reason: "IMPORT_RUNNING", message: String::new() };
        for (error, is_retried, is_decided) in [
            (Error::invalid("id", "is wrong"), false, true),
            (Error::not_found("issue", "id", "x"), false, true),
            (stale, false, true),
            (locked, false, false),
            (deadline::exceeded(), false, false),
            (Error::Unavailable, true, false),
            (Error::Internal("a fault"), false, false),
        ] {
            let mut attempts = Attempts::default();
            assert!(attempts.next_delay(&Error::OutcomeUnknown { has_request_id: true }).is_some());
            assert_eq!(attempts.next_delay(&error).is_some(), is_retried, "{error:?}");
            assert_eq!(error.is_decided(), is_decided, "{error:?}");
        }
    }
}
