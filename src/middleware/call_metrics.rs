//! Records the duration and the status code of each call, until its response has ended. Also of calls that other layers refuse.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;
use pin_project_lite::pin_project;
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::{body::PolledFrame, method_policy::CallPolicy};
use crate::metrics::{self, CallTimer};

/// Records calls. If metrics are not enabled, it costs one atomic load per call.
#[derive(Clone, Copy, Debug)]
pub struct CallMetricsLayer;

impl<S> Layer<S> for CallMetricsLayer {
    type Service = CallMetrics<S>;

    fn layer(&self, inner: S) -> CallMetrics<S> {
        CallMetrics { inner }
    }
}

/// The service of [`CallMetricsLayer`].
#[derive(Clone)]
pub struct CallMetrics<S> {
    inner: S,
}

impl<S, B, R> Service<Request<B>> for CallMetrics<S>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Response = Response<MeasuredBody<R>>;
    type Error = S::Error;
    type Future = MeasuredResponse<S::Future>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let timer = metrics::get().and_then(|metrics| metrics.calls.begin(CallPolicy::of(&request).method));
        MeasuredResponse { response: self.inner.call(request), timer }
    }
}

pin_project! {
    /// The future of a response whose call is recorded.
    pub struct MeasuredResponse<F> {
        #[pin]
        response: F,
        timer: Option<CallTimer>,
    }
}

impl<F, R, E> Future for MeasuredResponse<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<MeasuredBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.response.poll(context))?;
        let mut timer = this.timer.take();
        if let Some(timer) = &mut timer {
            match code(response.headers()) {
                Some(code) => timer.set_code(code.into()),
                // What clients make of an HTTP status that is not 200.
                None if response.status() != StatusCode::OK => timer.set_code(Code::Unknown.into()),
                None => {}
            }
        }
        Poll::Ready(Ok(response.map(|body| MeasuredBody { body, timer })))
    }
}

/// Returns the status code in the headers or trailers of a response.
fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// The body of a response whose call is recorded when it ends or is dropped.
pub struct MeasuredBody<R> {
    body: R,
    timer: Option<CallTimer>,
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for MeasuredBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(timer) = &mut self.timer {
            match &frame {
                Some(Ok(frame)) => {
                    if let Some(code) = frame.trailers_ref().and_then(code) {
                        timer.set_code(code.into());
                    }
                }
                Some(Err(status)) => timer.set_code(status.code().into()),
                None => self.timer = None,
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
