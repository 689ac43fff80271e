//! Checks the caller's role against the one that the method requires.
//!
//! Rules that depend on the request, such as who may change a comment, are applied by the handlers and their statements.

use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http::Request;
use tower::{Layer, Service};

use super::method_policy::CallPolicy;
use crate::{
    auth::Caller,
    error::{Error, Result},
    pb::Role,
};

/// Fails with `PermissionDenied` if the caller's role is too low.
#[derive(Clone, Copy, Debug)]
pub struct AuthorizationLayer;

impl<S> Layer<S> for AuthorizationLayer {
    type Service = Authorization<S>;

    fn layer(&self, inner: S) -> Authorization<S> {
        Authorization { inner }
    }
}

/// The service of [`AuthorizationLayer`].
#[derive(Clone)]
pub struct Authorization<S> {
    inner: S,
}

impl<S, B> Service<Request<B>> for Authorization<S>
where
    S: Service<Request<B>, Error = Error>,
{
    type Response = S::Response;
    type Error = Error;
    type Future = Either<Ready<Result<S::Response>>, S::Future>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match check(&request) {
            Ok(()) => Either::Right(self.inner.call(request)),
            Err(error) => Either::Left(ready(Err(error))),
        }
    }
}

fn check<B>(request: &Request<B>) -> Result<()> {
    let Some(required) = CallPolicy::of(request).role() else { return Ok(()) };
    authorize(request.extensions().get::<Caller>().ok_or(Error::Internal("a request without a caller"))?, required)
}

/// Fails with `PermissionDenied` if the caller's role is lower than the required one.
pub(super) fn authorize(caller: &Caller, required: Role) -> Result<()> {
    if caller.role < required {
        return Err(Error::PermissionDenied(format!(
            "the method requires {}, the caller has {}",
            required.as_str_name(),
            caller.role.as_str_name()
        )));
    }
    Ok(())
}
