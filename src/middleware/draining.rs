//! Refuses new calls while the server stops, and ends streams that would not end by themselves.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::{Either, Ready, ready};
use http::{Request, Response};
use http_body::Body;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::Status;
use tower::{Layer, Service};

use super::{
    body::{EndableBody, PolledFrame, WrapBody, WrappedResponse},
    method_policy::CallPolicy,
};
use crate::error::{Error, Result};

/// Refuses the calls of this service from the shutdown on. Health checks still receive a response.
///
/// Response streams end as soon as they have nothing to send. Calls whose client streams as well end by themselves: the
/// server first reports how much of the stream it has processed.
#[derive(Clone, Debug)]
pub struct DrainingLayer {
    /// Shared, as cloning a token takes a lock.
    shutdown: Arc<CancellationToken>,
}

impl DrainingLayer {
    pub fn new(shutdown: CancellationToken) -> Self {
        Self { shutdown: Arc::new(shutdown) }
    }
}

impl<S> Layer<S> for DrainingLayer {
    type Service = Draining<S>;

    fn layer(&self, inner: S) -> Draining<S> {
        Draining { shutdown: Arc::clone(&self.shutdown), inner }
    }
}

/// The service of [`DrainingLayer`].
#[derive(Clone)]
pub struct Draining<S> {
    shutdown: Arc<CancellationToken>,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Draining<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<DrainingBody<R>>;
    type Error = Error;
    type Future = Either<Ready<Result<Self::Response>>, WrappedResponse<S::Future, EndAtShutdown>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let policy = CallPolicy::of(&request);
        if policy.is_own && self.shutdown.is_cancelled() {
            return Either::Left(ready(Err(Error::Stopping)));
        }
        let ends_by_itself = !policy.is_streaming() || policy.is_own && policy.client_streaming;
        let shutdown = (!ends_by_itself).then(|| Box::pin(CancellationToken::clone(&self.shutdown).cancelled_owned()));
        Either::Right(WrappedResponse::new(self.inner.call(request), EndAtShutdown(shutdown)))
    }
}

/// Makes the body of a response end at the shutdown.
pub struct EndAtShutdown(Option<Pin<Box<WaitForCancellationFutureOwned>>>);

impl<R> WrapBody<R> for EndAtShutdown {
    type Body = DrainingBody<R>;

    fn wrap(self, body: R) -> DrainingBody<R> {
        DrainingBody { body: EndableBody::Open(body), shutdown: self.0 }
    }
}

/// A response body that ends with an error when the server stops and there is nothing to send.
pub struct DrainingBody<R> {
    body: EndableBody<R>,
    shutdown: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for DrainingBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let this = &mut *self;
        let polled = this.body.poll(context);
        if polled.is_pending()
            && let Some(shutdown) = &mut this.shutdown
            && shutdown.as_mut().poll(context).is_ready()
        {
            return this.body.end(Error::Stopping);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
