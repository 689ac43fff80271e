//! Bodies that layers share: responses that carry a guard or end early, and requests whose stream must not be cut short.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body, Frame};
use pin_project_lite::pin_project;
use tonic::Status;

use crate::error::{Error, Result};

/// A frame of a response body.
pub type PolledFrame = Poll<Option<Result<Frame<Bytes>, Status>>>;

/// Wraps the body of a response in another one.
pub trait WrapBody<R> {
    type Body;

    fn wrap(self, body: R) -> Self::Body;
}

pin_project! {
    /// The future of a response whose body is wrapped.
    pub struct WrappedResponse<F, W> {
        #[pin]
        response: F,
        wrapper: Option<W>,
    }
}

impl<F, W> WrappedResponse<F, W> {
    pub fn new(response: F, wrapper: W) -> Self {
        Self { response, wrapper: Some(wrapper) }
    }
}

impl<F, R, W> Future for WrappedResponse<F, W>
where
    F: Future<Output = Result<Response<R>>>,
    W: WrapBody<R>,
{
    type Output = Result<Response<W::Body>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.response.poll(context))?;
        let wrapper = this.wrapper.take().ok_or(Error::Internal("a response was polled after it was ready"))?;
        Poll::Ready(Ok(response.map(|body| wrapper.wrap(body))))
    }
}

/// Something that a response holds until its body is dropped: a request slot, or a place among a client's streams.
pub struct Guard<G>(pub G);

impl<R, G> WrapBody<R> for Guard<G> {
    type Body = GuardedBody<R, G>;

    fn wrap(self, body: R) -> GuardedBody<R, G> {
        GuardedBody { body, _guard: self.0 }
    }
}

/// A response body that keeps a guard until it is dropped.
pub struct GuardedBody<R, G> {
    body: R,
    _guard: G,
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin, G: Unpin> Body for GuardedBody<R, G> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// A response body that a layer can end early.
pub enum EndableBody<R> {
    Open(R),
    Ended,
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> EndableBody<R> {
    pub fn poll(&mut self, context: &mut Context<'_>) -> PolledFrame {
        match self {
            Self::Open(body) => Pin::new(body).poll_frame(context),
            Self::Ended => Poll::Ready(None),
        }
    }

    /// Drops the body and returns the trailers of the error.
    pub fn end(&mut self, error: Error) -> PolledFrame {
        *self = Self::Ended;
        Poll::Ready(error_trailers(error))
    }

    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::Open(body) => body.is_end_stream(),
            Self::Ended => true,
        }
    }
}

/// Returns the last frame of a response that ends with an error.
pub fn error_trailers(error: Error) -> Option<Result<Frame<Bytes>, Status>> {
    let mut trailers = HeaderMap::new();
    let added = Status::from(error).add_header(&mut trailers);
    added.ok().map(|()| Ok(Frame::trailers(trailers)))
}

/// A response body, or none where a status without a body is returned instead.
pub struct OptionalBody<R>(pub Option<R>);

impl<R> Default for OptionalBody<R> {
    fn default() -> Self {
        Self(None)
    }
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for OptionalBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        match &mut self.0 {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Body::is_end_stream)
    }
}

/// A request body that fails when the client resets its stream.
///
/// tonic and hyper take a reset for the end of the body: half a file would pass for a whole one.
pub struct UncutBody<B>(pub B);

impl<B: Body<Data = Bytes> + Unpin> Body for UncutBody<B> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let cut = || {
            let message = "the client reset the stream before its end".to_owned();
            Some(Err(Status::from(Error::Aborted { reason: "STREAM_CUT", message })))
        };
        match ready!(Pin::new(&mut self.0).poll_frame(context)) {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            None if self.0.is_end_stream() => Poll::Ready(None),
            Some(Err(_)) | None => Poll::Ready(cut()),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

/// The body of a request as [`super::buffering`] passes it on.
pub enum RequestBody<B> {
    /// The one message of the request, with its prefix.
    Message(Bytes),
    /// The messages that the client streams.
    Stream(UncutBody<B>),
}
