//! Refuses requests that are not gRPC with an HTTP status, as the gRPC specification requires.

use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use tower::{Layer, Service};

/// Lets only gRPC requests through.
#[derive(Clone, Copy, Debug)]
pub struct ProtocolLayer;

impl<S> Layer<S> for ProtocolLayer {
    type Service = Protocol<S>;

    fn layer(&self, inner: S) -> Protocol<S> {
        Protocol { inner }
    }
}

/// The service of [`ProtocolLayer`].
#[derive(Clone)]
pub struct Protocol<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Protocol<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Default,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Response<R>, S::Error>>, S::Future>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Some(status) = refusal(&request) else { return Either::Right(self.inner.call(request)) };
        let mut response = Response::new(R::default());
        *response.status_mut() = status;
        Either::Left(ready(Ok(response)))
    }
}

fn refusal<B>(request: &Request<B>) -> Option<StatusCode> {
    let content_type = request.headers().get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if request.method() != Method::POST {
        Some(StatusCode::METHOD_NOT_ALLOWED)
    } else if !matches!(content_type.strip_prefix(b"application/grpc"), Some([] | [b'+' | b';', ..])) {
        Some(StatusCode::UNSUPPORTED_MEDIA_TYPE)
    } else {
        None
    }
}
