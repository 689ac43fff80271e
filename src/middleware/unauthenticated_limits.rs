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
    admission::{RequestSlots, flow},
    body::{Guard, GuardedBody, WrappedResponse},
    method_policy::CallPolicy,
};
use crate::{
    error::{Error, Result},
    fairness::{FairPermit, SharePercent},
    transport::{activity::CallHandle, client_address::ClientAddress},
};

/// Concurrent unauthenticated streams of all clients.
const STREAMS_MAX: u32 = 1_024;
/// Concurrent unauthenticated streams of one client. One address can have many replicas that watch the health of the service.
const STREAMS_PER_CLIENT_MAX: usize = 64;

/// Limits calls that need no credentials, per client and per connection, and their streams in total as well.
#[derive(Clone, Default)]
pub struct UnauthenticatedLimitsLayer {
    streams: Arc<Streams>,
}

/// The unauthenticated streams in flight.
struct Streams {
    slots: RequestSlots,
    of_clients: StreamsOfClients,
}

impl Default for Streams {
    fn default() -> Self {
        Self {
            slots: RequestSlots::new("streams without credentials", STREAMS_MAX, SharePercent(75)),
            of_clients: StreamsOfClients::default(),
        }
    }
}

impl Streams {
    /// Admits a call, or returns why it is refused. The result is held until the response has been read.
    fn admit<B>(&self, request: &Request<B>) -> Result<Option<HeldStream>> {
        let policy = CallPolicy::of(request);
        if policy.role().is_some() {
            return Ok(None);
        }
        let too_many = || Error::Exhausted("too many concurrent calls without credentials; try again".to_owned());
        let call =
            request.extensions().get::<CallHandle>().ok_or(Error::Internal("a request without a call handle"))?;
        if !call.try_enter_unauthenticated() {
            return Err(too_many());
        }
        if !policy.is_streaming() {
            return Ok(None);
        }
        let of_client = self.of_clients.try_enter(call.client_address()).ok_or_else(too_many)?;
        Ok(Some((of_client, self.slots.acquire(flow(request.extensions()))?)))
    }
}

type HeldStream = (StreamOfClient, FairPermit);

impl<S> Layer<S> for UnauthenticatedLimitsLayer {
    type Service = UnauthenticatedLimits<S>;

    fn layer(&self, inner: S) -> UnauthenticatedLimits<S> {
        UnauthenticatedLimits { streams: Arc::clone(&self.streams), inner }
    }
}

/// The service of [`UnauthenticatedLimitsLayer`].
#[derive(Clone)]
pub struct UnauthenticatedLimits<S> {
    streams: Arc<Streams>,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for UnauthenticatedLimits<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<GuardedBody<R, Option<HeldStream>>>;
    type Error = Error;
    type Future = Either<Ready<Result<Self::Response>>, WrappedResponse<S::Future, Guard<Option<HeldStream>>>>;

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

/// The number of streams of each client that has any.
#[derive(Clone, Default)]
struct StreamsOfClients(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl StreamsOfClients {
    /// Returns `None` if the client has 64 streams.
    fn try_enter(&self, client: ClientAddress) -> Option<StreamOfClient> {
        let client = client.network();
        let mut counts = self.lock();
        let count = counts.entry(client).or_default();
        if *count >= STREAMS_PER_CLIENT_MAX {
            return None;
        }
        *count += 1;
        Some(StreamOfClient { all: self.clone(), client })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // The counts are consistent even if a holder of the lock has panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream that is counted until this is dropped.
pub struct StreamOfClient {
    all: StreamsOfClients,
    client: IpAddr,
}

impl Drop for StreamOfClient {
    fn drop(&mut self) {
        let mut counts = self.all.lock();
        if let Some(count) = counts.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_per_client_network_until_they_end() {
        let streams = StreamsOfClients::default();
        let enter = |address: &str| streams.try_enter(ClientAddress(address.parse().unwrap()));
        let mut held: Vec<_> =
            (0..STREAMS_PER_CLIENT_MAX).map(|nth| enter(&format!("2001:db8::{nth}")).unwrap()).collect();
        assert!(enter("2001:db8::ffff").is_none());
        held.push(enter("203.0.113.9").unwrap());
        held.remove(0);
        held.push(enter("2001:db8::ffff").unwrap());
        assert!(enter("2001:db8::ffff").is_none());
        held.clear();
        assert!(streams.lock().is_empty());
    }
}
