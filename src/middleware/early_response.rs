//! Reads the rest of a request before a response that was made without it.
//!
//! HTTP/2 resets the stream of a request that is not read to its end. Clients that are still sending may report the reset
//! instead of the response; and h2 closes a connection after 1,024 messages that arrive for streams that it has reset.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures_util::future::BoxFuture;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use pin_project_lite::pin_project;
use tokio::time::timeout;
use tower::{Layer, Service};

/// How long a response waits for the rest of its request. Clients send small messages with the headers.
const REST_WAIT_MAX: Duration = Duration::from_millis(250);
/// The largest rest that is read.
const REST_BYTES_MAX: usize = 64 * 1024;

/// Delays responses until their request has been read, unless the rest is large or late.
#[derive(Clone, Copy, Debug)]
pub struct EarlyResponseLayer;

impl<S> Layer<S> for EarlyResponseLayer {
    type Service = EarlyResponses<S>;

    fn layer(&self, inner: S) -> EarlyResponses<S> {
        EarlyResponses { inner }
    }
}

/// The service of [`EarlyResponseLayer`].
#[derive(Clone)]
pub struct EarlyResponses<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for EarlyResponses<S>
where
    S: Service<Request<RecoverableBody<B>>, Response = Response<R>>,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = ResponseAfterRequest<S::Future, B, R>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let rest = Rest::default();
        let request = request.map(|body| RecoverableBody { body: Some(body), rest: Rest(Arc::clone(&rest.0)) });
        ResponseAfterRequest { response: self.inner.call(request), rest, early: None }
    }
}

/// A request body that was dropped before its end.
struct Rest<B>(Arc<Mutex<Option<B>>>);

impl<B> Default for Rest<B> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<B> Rest<B> {
    fn put(&self, body: B) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(body);
    }

    fn take(&self) -> Option<B> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A request body that can be recovered if it is dropped before its end.
pub struct RecoverableBody<B: Body> {
    /// `None` only while it is dropped.
    body: Option<B>,
    rest: Rest<B>,
}

impl<B: Body + Unpin> Body for RecoverableBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(SizeHint::default, Body::size_hint)
    }
}

impl<B: Body> Drop for RecoverableBody<B> {
    fn drop(&mut self) {
        if let Some(body) = self.body.take().filter(|body| !body.is_end_stream()) {
            self.rest.put(body);
        }
    }
}

pin_project! {
    /// The future of a response that waits for the rest of its request.
    pub struct ResponseAfterRequest<F, B, R> {
        #[pin]
        response: F,
        rest: Rest<B>,
        // Boxed: early responses are rare and must not enlarge the future of every call.
        early: Option<(Response<R>, BoxFuture<'static, ()>)>,
    }
}

impl<F, B, R, E> Future for ResponseAfterRequest<F, B, R>
where
    F: Future<Output = Result<Response<R>, E>>,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let (response, mut reading) = match this.early.take() {
            Some(early) => early,
            None => {
                let response = ready!(this.response.poll(context))?;
                let Some(rest) = this.rest.take() else { return Poll::Ready(Ok(response)) };
                let reading: BoxFuture<'static, ()> = Box::pin(read_rest(rest));
                (response, reading)
            }
        };
        if reading.as_mut().poll(context).is_ready() {
            return Poll::Ready(Ok(response));
        }
        *this.early = Some((response, reading));
        Poll::Pending
    }
}

/// Reads the body to its end and discards it. Stops when it fails, or is too large or too late.
async fn read_rest(mut body: impl Body<Data = Bytes> + Unpin) {
    let read = async {
        let mut bytes = 0;
        while bytes <= REST_BYTES_MAX
            && let Some(Ok(frame)) = body.frame().await
        {
            bytes += frame.data_ref().map_or(0, Buf::remaining);
        }
    };
    let _ = timeout(REST_WAIT_MAX, read).await;
}
