//! Refuses calls whose metadata is too large.
//!
//! The transport accepts more than this limit: HTTP/2 itself would respond with the HTTP status 431, which clients report as
//! UNKNOWN.

use std::task::{Context, Poll};

use futures_util::future::{Either, Ready, ready};
use http::{HeaderMap, Request, Response, Uri};
use tower::{Layer, Service};

use crate::error::{Error, Result};

/// What HTTP/2 adds to the length of each header for the size of the list (RFC 9113, section 6.5.2).
const HEADER_OVERHEAD_BYTES: usize = 32;

/// Limits the size of a call's metadata.
#[derive(Clone, Copy, Debug)]
pub struct MetadataLimitLayer {
    bytes_max: usize,
}

impl MetadataLimitLayer {
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max }
    }
}

impl<S> Layer<S> for MetadataLimitLayer {
    type Service = MetadataLimit<S>;

    fn layer(&self, inner: S) -> MetadataLimit<S> {
        MetadataLimit { bytes_max: self.bytes_max, inner }
    }
}

/// The service of [`MetadataLimitLayer`].
#[derive(Clone)]
pub struct MetadataLimit<S> {
    bytes_max: usize,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for MetadataLimit<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<R>;
    type Error = Error;
    type Future = Either<Ready<Result<Response<R>>>, S::Future>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if metadata_bytes(request.headers(), request.uri()) > self.bytes_max {
            return Either::Left(ready(Err(Error::MetadataTooLarge { bytes_max: self.bytes_max })));
        }
        Either::Right(self.inner.call(request))
    }
}

/// Returns the size of the headers and the path, as HTTP/2 counts them.
pub(super) fn metadata_bytes(headers: &HeaderMap, uri: &Uri) -> usize {
    let header = |name: &str, value: &[u8]| name.len() + value.len() + HEADER_OVERHEAD_BYTES;
    let all: usize = headers.iter().map(|(name, value)| header(name.as_str(), value.as_bytes())).sum();
    all + header(":path", uri.path().as_bytes())
}
