//! Ends calls at their deadline, and reports to the connection how long the client may take to read the response.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tonic::Status;
use tower::{Layer, Service};

use super::{
    body::{EndableBody, PolledFrame},
    method_policy::CallPolicy,
};
use crate::{
    error::{Error, Result},
    transport::activity::CallHandle,
};

/// The longest deadline of a call that is not a stream.
const DEADLINE_MAX: Duration = Duration::from_secs(600);
/// Time allowed for the client beyond that: to read the rest of a response after the deadline, or one that is due.
pub(super) const READ_GRACE: Duration = Duration::from_secs(20);
/// Time allowed for the client of a stream to read what was sent: longer than imports and exports wait for it.
const STREAM_STALL_MAX: Duration = Duration::from_secs(120);

/// Limits how long calls take.
///
/// A stream has a deadline only if its client sets one. Other calls have a default deadline, and none is longer than 600 s.
/// The deadline of calls that need no credentials is at most the default.
#[derive(Clone, Copy, Debug)]
pub struct DeadlineLayer {
    default: Duration,
}

impl DeadlineLayer {
    /// `default`: the deadline of calls that set none and whose method declares none.
    pub fn new(default: Duration) -> Self {
        Self { default }
    }

    /// Returns how long the call may take, or `None` without a limit.
    fn duration(&self, policy: CallPolicy, headers: &HeaderMap) -> Option<Duration> {
        let requested = headers.get("grpc-timeout").and_then(|timeout| grpc_timeout(timeout.to_str().ok()?));
        if policy.is_streaming() {
            return requested;
        }
        let default = policy.default_deadline.unwrap_or(self.default);
        let max = if policy.role().is_some() { DEADLINE_MAX } else { default };
        Some(requested.unwrap_or(default).min(max))
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { layer: *self, inner }
    }
}

/// The service of [`DeadlineLayer`].
#[derive(Clone)]
pub struct Deadline<S> {
    layer: DeadlineLayer,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error, Future: Send + 'static>,
{
    type Response = Response<DeadlineBody<R>>;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Self::Response>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let is_streaming = CallPolicy::of(&request).is_streaming();
        let now = Instant::now();
        let duration = self.layer.duration(CallPolicy::of(&request), request.headers());
        let deadline = duration.and_then(|duration| now.checked_add(duration));
        let call = request.extensions().get::<CallHandle>().cloned();
        if let Some(call) = &call {
            call.expect_progress_by(deadline.unwrap_or(now + STREAM_STALL_MAX) + READ_GRACE);
        }
        // Otherwise a call that is ready immediately would succeed although its deadline has passed.
        let response = deadline.is_none_or(|deadline| deadline > now).then(|| self.inner.call(request));
        Box::pin(async move {
            let response = response.ok_or_else(exceeded)?;
            let response = match deadline {
                None => response.await?,
                Some(deadline) => timeout_at(deadline, response).await.unwrap_or_else(|_| Err(exceeded()))?,
            };
            Ok(response.map(|body| DeadlineBody {
                body: EndableBody::Open(body),
                deadline: deadline.filter(|_| is_streaming).map(|deadline| Box::pin(sleep_until(deadline))),
                stream: call.filter(|_| is_streaming),
            }))
        })
    }
}

/// Returns the error of a call whose deadline has passed.
pub fn exceeded() -> Error {
    Error::Timeout { reason: "DEADLINE", message: "the deadline of the request has passed".to_owned() }
}

/// A response body that ends at the deadline, if it is a stream.
///
/// A stream is stalled if its client does not read for 120 s. While the stream has nothing to send it is not.
pub struct DeadlineBody<R> {
    body: EndableBody<R>,
    deadline: Option<Pin<Box<Sleep>>>,
    stream: Option<CallHandle>,
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for DeadlineBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let this = &mut *self;
        let is_past_deadline =
            this.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(context).is_ready());
        let polled = if is_past_deadline {
            this.deadline = None;
            this.body.end(exceeded())
        } else {
            this.body.poll(context)
        };
        if let Some(stream) = &this.stream {
            match &polled {
                Poll::Pending => stream.expect_no_progress(),
                Poll::Ready(_) => stream.expect_progress_by(Instant::now() + STREAM_STALL_MAX),
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// Parses the value of `grpc-timeout`: one to eight digits and a unit. Returns `None` if it is malformed.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grpc_timeout_is_up_to_eight_digits_and_a_unit() {
        for (value, wanted) in [
            ("1H", Some(Duration::from_secs(3_600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("4m", Some(Duration::from_millis(4))),
            ("5u", Some(Duration::from_micros(5))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("0S", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            ("123456789S", None),
            ("1 S", None),
            ("1é", None),
        ] {
            assert_eq!(grpc_timeout(value), wanted, "{value}");
        }
    }
}
