//! Logs each call at the level debug: method, code, and time until the response or its first message.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::future::Either;
use http::{Request, Response};
use tokio::time::Instant;
use tonic::Code;
use tower::{Layer, Service};
use tracing::Level;

use super::method_table::METHODS;
use crate::error::{Error, Result};

/// Logs calls. Without the level debug it costs one check of the level per call.
#[derive(Clone, Copy, Debug)]
pub struct CallLogLayer;

impl<S> Layer<S> for CallLogLayer {
    type Service = CallLog<S>;

    fn layer(&self, inner: S) -> CallLog<S> {
        CallLog { inner }
    }
}

/// The service of [`CallLogLayer`].
#[derive(Clone)]
pub struct CallLog<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for CallLog<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Response<R>;
    type Error = Error;
    type Future = Either<S::Future, Pin<Box<dyn Future<Output = Result<Response<R>>> + Send>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if !tracing::enabled!(Level::DEBUG) {
            return Either::Left(self.inner.call(request));
        }
        // The path comes from the client: only a declared one is logged.
        let declared = METHODS.iter().find(|method| method.path == request.uri().path());
        let method = declared.map_or("other", |method| method.path);
        let began = Instant::now();
        let response = self.inner.call(request);
        Either::Right(Box::pin(async move {
            let result = response.await;
            let code = match &result {
                Ok(response) => {
                    response.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
                }
                Err(error) => error.code(),
            };
            tracing::debug!(method, ?code, duration_ms = began.elapsed().as_millis() as u64, "call finished");
            result
        }))
    }
}
