//! Turns errors of the layers below, and errors that tonic itself has made, into the statuses of the contract.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::Map};
use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};

use super::body::OptionalBody;
use crate::error::{Error, Result};

/// Maps errors to responses.
#[derive(Clone, Copy, Debug)]
pub struct ErrorMappingLayer;

impl<S> Layer<S> for ErrorMappingLayer {
    type Service = ErrorMapping<S>;

    fn layer(&self, inner: S) -> ErrorMapping<S> {
        ErrorMapping { inner }
    }
}

/// The service of [`ErrorMappingLayer`].
#[derive(Clone)]
pub struct ErrorMapping<S> {
    inner: S,
}

type Mapped<R> = Result<Response<OptionalBody<R>>, Infallible>;

impl<S, B, R> Service<Request<B>> for ErrorMapping<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<OptionalBody<R>>;
    type Error = Infallible;
    type Future = Map<S::Future, fn(Result<Response<R>>) -> Mapped<R>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        self.inner.call(request).map(into_response::<R> as fn(_) -> _)
    }
}

fn into_response<R>(result: Result<Response<R>>) -> Mapped<R> {
    let status = match result {
        Ok(response) => match explained(response.headers()) {
            None => return Ok(response.map(|body| OptionalBody(Some(body)))),
            Some(status) => status,
        },
        Err(error) => error.into(),
    };
    Ok(status.into_http())
}

/// Returns the status of the contract for one that tonic itself has made (for undecodable or oversized messages and unknown
/// methods), or `None` if the response stands as it is.
fn explained(headers: &HeaderMap) -> Option<Status> {
    let status = Status::from_header_map(headers)?;
    if !status.details().is_empty() || status.code() == Code::Ok {
        return None;
    }
    let mut explained = Status::from(Error::from_bare(&status)?);
    // Such as `grpc-accept-encoding`, which names what the client can send instead.
    *explained.metadata_mut() = status.metadata().clone();
    Some(explained)
}
