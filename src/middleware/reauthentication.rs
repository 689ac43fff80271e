//! Ends streams whose caller could not begin them any more: the token was revoked or has expired, the user was disabled, or
//! its role has become too low.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::{BoxFuture, Either};
use http::{Request, Response, header::AUTHORIZATION};
use http_body::Body;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use tower::{Layer, Service};

use super::{
    admission::flow,
    authorization::authorize,
    body::{PolledFrame, WrapBody, WrappedResponse, error_trailers},
    method_policy::CallPolicy,
};
use crate::{
    auth::{Auth, bearer_sha256},
    error::{Error, Result},
    fairness::Flow,
    pb::Role,
};

/// How often the credentials of a stream are checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How old the look-up of the token may be. With the interval, a stream ends about 3 s after its credentials, on every
/// replica.
const LOOKUP_AGE_MAX: Duration = Duration::from_secs(2);
/// Time allowed for one look-up.
const LOOKUP_MAX: Duration = Duration::from_secs(5);
/// How long look-ups may fail, because the database is unavailable for example, until the stream ends.
const UNCHECKED_MAX: Duration = Duration::from_secs(30);

/// Checks the credentials of streams every second, also while a stream waits for its client.
///
/// A stream fails with the error that a new call would fail with: `Unauthenticated` or `PermissionDenied`. Its handler is
/// dropped with its response. If the credentials cannot be checked for 30 s, the stream fails with the error of the check.
#[derive(Clone)]
pub struct ReauthenticationLayer {
    auth: Arc<Auth>,
}

impl ReauthenticationLayer {
    pub fn new(auth: Auth) -> Self {
        Self { auth: Arc::new(auth) }
    }
}

impl<S> Layer<S> for ReauthenticationLayer {
    type Service = Reauthentication<S>;

    fn layer(&self, inner: S) -> Reauthentication<S> {
        Reauthentication { auth: Arc::clone(&self.auth), inner }
    }
}

/// The service of [`ReauthenticationLayer`].
#[derive(Clone)]
pub struct Reauthentication<S> {
    auth: Arc<Auth>,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Reauthentication<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error, Future: Send + 'static>,
    R: Send + 'static,
{
    type Response = Response<ReauthenticatedBody<R>>;
    type Error = Error;
    type Future = Either<WrappedResponse<S::Future, Unchecked>, BoxFuture<'static, Result<Self::Response>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let policy = CallPolicy::of(&request);
        let Some(required) = policy.role().filter(|_| policy.is_streaming()) else {
            return Either::Left(WrappedResponse::new(self.inner.call(request), Unchecked));
        };
        let token = request.headers().get(AUTHORIZATION).and_then(bearer_sha256);
        let flow = flow(request.extensions());
        let (auth, response) = (Arc::clone(&self.auth), self.inner.call(request));
        Either::Right(Box::pin(async move {
            let token = token.ok_or(Error::Internal("an authenticated stream without a token"))?;
            let mut denied: Denied = Box::pin(async move { until_denied(&auth, token, required, flow).await });
            // A client stream may send all of its messages before the response begins.
            let response = tokio::select! {
                response = response => response?,
                error = &mut denied => return Err(error),
            };
            Ok(response.map(|body| ReauthenticatedBody::checked(body, denied)))
        }))
    }
}

/// Ready with its error when the credentials of a stream no longer suffice.
type Denied = BoxFuture<'static, Error>;

async fn until_denied(auth: &Auth, token: [u8; 32], required: Role, flow: Flow) -> Error {
    let mut failing_since = None;
    loop {
        sleep(CHECK_INTERVAL).await;
        let caller = timeout(LOOKUP_MAX, auth.find_caller(token, LOOKUP_AGE_MAX, flow)).await;
        let error = match caller.unwrap_or(Err(Error::Unavailable)).and_then(|caller| authorize(&caller, required)) {
            Ok(()) => {
                failing_since = None;
                continue;
            }
            Err(error @ (Error::Unauthenticated(_) | Error::PermissionDenied(_))) => return error,
            Err(error) => error,
        };
        if failing_since.get_or_insert_with(Instant::now).elapsed() >= UNCHECKED_MAX {
            return error;
        }
    }
}

/// Leaves a response as it is.
pub struct Unchecked;

impl<R> WrapBody<R> for Unchecked {
    type Body = ReauthenticatedBody<R>;

    fn wrap(self, body: R) -> ReauthenticatedBody<R> {
        ReauthenticatedBody::Unchecked(body)
    }
}

/// A response body that ends with an error when the credentials of its caller no longer suffice.
pub enum ReauthenticatedBody<R> {
    /// The response of a call that is not a stream, or needs no credentials.
    Unchecked(R),
    Checked {
        /// `None` once the credentials no longer suffice.
        body: Arc<Mutex<Option<R>>>,
        /// Drops the body, whether or not the client reads, and returns the error.
        denied: AbortOnDropHandle<Error>,
    },
    Ended,
}

impl<R: Send + 'static> ReauthenticatedBody<R> {
    fn checked(body: R, denied: Denied) -> Self {
        let body = Arc::new(Mutex::new(Some(body)));
        // Weak: the body is dropped with the response, not when the task ends.
        let checked = Arc::downgrade(&body);
        let denied = tokio::spawn(async move {
            let error = denied.await;
            let body = checked.upgrade().and_then(|body| body.lock().unwrap_or_else(PoisonError::into_inner).take());
            drop(body);
            error
        });
        Self::Checked { body, denied: AbortOnDropHandle::new(denied) }
    }
}

impl<R: Body<Data = Bytes, Error = Status> + Unpin> Body for ReauthenticatedBody<R> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> PolledFrame {
        let (body, denied) = match &mut *self {
            Self::Unchecked(body) => return Pin::new(body).poll_frame(context),
            Self::Checked { body, denied } => (body, denied),
            Self::Ended => return Poll::Ready(None),
        };
        match Pin::new(denied).poll(context) {
            Poll::Ready(error) => {
                *self = Self::Ended;
                Poll::Ready(error_trailers(error.unwrap_or(Error::Internal("a check of credentials panicked"))))
            }
            Poll::Pending => match &mut *body.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(body) => Pin::new(body).poll_frame(context),
                // The error is about to be returned.
                None => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Unchecked(body) => body.is_end_stream(),
            Self::Checked { body, .. } => {
                body.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(Body::is_end_stream)
            }
            Self::Ended => true,
        }
    }
}
