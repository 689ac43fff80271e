//! Limits calls that need no credentials: logins, health checks, reflection.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures_util::future::{Either, Ready, ready};
use http::{Request, Response};
use tower::{Layer, Service};

use super::{
    body::{Guard, GuardedBody, WrappedResponse},
    method_policy::CallPolicy,
};
use crate::{
    error::{Error, Result},
    fairness::{Refusal, RefusalCounters},
    transport::{activity::CallHandle, client_address::ClientAddress},
};

/// Concurrent unauthenticated streams of all clients.
const STREAMS_MAX: usize = 1_024;
/// Concurrent unauthenticated streams of one client. One address can have many replicas that watch the health of the service.
const STREAMS_PER_CLIENT_MAX: usize = 64;

/// Limits calls that need no credentials, per client and per connection, and their streams in total as well.
#[derive(Clone, Default)]
pub struct UnauthenticatedLimitsLayer {
    streams: Streams,
}

impl<S> Layer<S> for UnauthenticatedLimitsLayer {
    type Service = UnauthenticatedLimits<S>;

    fn layer(&self, inner: S) -> UnauthenticatedLimits<S> {
        UnauthenticatedLimits { streams: self.streams.clone(), inner }
    }
}

/// The service of [`UnauthenticatedLimitsLayer`].
#[derive(Clone)]
pub struct UnauthenticatedLimits<S> {
    streams: Streams,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for UnauthenticatedLimits<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<GuardedBody<R, Option<Stream>>>;
    type Error = Error;
    type Future = Either<Ready<Result<Self::Response>>, WrappedResponse<S::Future, Guard<Option<Stream>>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.streams.admit(&request) {
            Ok(held) => Either::Right(WrappedResponse::new(self.inner.call(request), Guard(held))),
            Err(error) => Either::Left(ready(Err(error))),
        }
    }
}

/// The unauthenticated streams in flight.
#[derive(Clone, Default)]
struct Streams(Arc<StreamCounts>);

struct StreamCounts {
    counts: Mutex<Counts>,
    refusals: RefusalCounters,
}

impl Default for StreamCounts {
    fn default() -> Self {
        Self { counts: Mutex::default(), refusals: RefusalCounters::new("unauthenticated calls") }
    }
}

#[derive(Default)]
struct Counts {
    all: usize,
    /// The streams of each client that has any.
    of_clients: HashMap<IpAddr, usize>,
}

impl Streams {
    /// Admits a call, or returns why it is refused. The result is held until the response has been read.
    fn admit<B>(&self, request: &Request<B>) -> Result<Option<Stream>> {
        let policy = CallPolicy::of(request);
        if policy.role().is_some() {
            return Ok(None);
        }
        let too_many = |refusal| {
            self.0.refusals.count(refusal);
            Error::Exhausted("too many concurrent calls without credentials; try again".to_owned())
        };
        let call =
            request.extensions().get::<CallHandle>().ok_or(Error::Internal("a request without a call handle"))?;
        if !call.try_enter_unauthenticated() {
            return Err(too_many(Refusal::Share));
        }
        if !policy.is_streaming() {
            return Ok(None);
        }
        self.try_enter(call.client_address()).map(Some).map_err(too_many)
    }

    /// Fails with `Share` if the client has 64 streams, and with `Total` if all clients together have 1,024.
    fn try_enter(&self, client: ClientAddress) -> Result<Stream, Refusal> {
        let client = client.network();
        let mut counts = self.lock();
        let of_client = counts.of_clients.get(&client).copied().unwrap_or(0);
        if of_client >= STREAMS_PER_CLIENT_MAX {
            return Err(Refusal::Share);
        }
        if counts.all >= STREAMS_MAX {
            return Err(Refusal::Total);
        }
        counts.all += 1;
        counts.of_clients.insert(client, of_client + 1);
        Ok(Stream { streams: self.clone(), client })
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // The counts are consistent even if a holder of the lock has panicked.
        self.0.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that is counted until this is dropped.
pub struct Stream {
    streams: Streams,
    client: IpAddr,
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut counts = self.streams.lock();
        counts.all -= 1;
        if let Some(count) = counts.of_clients.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.of_clients.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(streams: &Streams, address: &str) -> Result<Stream, Refusal> {
        streams.try_enter(ClientAddress(address.parse().unwrap()))
    }

    #[test]
    fn streams_are_counted_per_client_network_until_they_end() {
        let streams = Streams::default();
        let mut held: Vec<_> =
            (0..STREAMS_PER_CLIENT_MAX).map(|nth| enter(&streams, &format!("2001:db8::{nth}")).unwrap()).collect();
        assert!(enter(&streams, "2001:db8::ffff").is_err_and(|refusal| refusal == Refusal::Share));
        held.push(enter(&streams, "203.0.113.9").unwrap());
        held.remove(0);
        held.push(enter(&streams, "2001:db8::ffff").unwrap());
        assert!(enter(&streams, "2001:db8::ffff").is_err_and(|refusal| refusal == Refusal::Share));
        held.clear();
        assert!(streams.lock().of_clients.is_empty() && streams.lock().all == 0);
    }

    #[test]
    fn streams_of_all_clients_are_limited() {
        let streams = Streams::default();
        let mut held: Vec<_> =
            (0..STREAMS_MAX).map(|nth| enter(&streams, &format!("10.0.{}.{}", nth / 64, 1)).unwrap()).collect();
        assert!(enter(&streams, "10.1.0.1").is_err_and(|refusal| refusal == Refusal::Total));
        held.pop();
        held.push(enter(&streams, "10.1.0.1").unwrap());
        assert!(enter(&streams, "10.1.0.2").is_err());
    }
}
