//! Request slots: how many calls may be in flight, and after which delay refused clients are asked to retry.

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::{Either, Ready, ready};
use http::{Extensions, Request, Response};
use tokio::time::Instant;
use tower::{Layer, Service};

use super::{
    body::{Guard, GuardedBody, WrappedResponse},
    method_policy::CallPolicy,
};
use crate::{
    auth::Caller,
    backoff::random,
    error::{Error, RETRY_DELAY, Result},
    fairness::{FairPermit, FairSemaphore, Flow, Refusal, SharePercent},
    transport::client_address::ClientAddress,
};

/// Refusals per second that cost next to nothing.
const CHEAP_REFUSALS_PER_SECOND: f64 = 500.0;
/// The longest delay after which a refused client is asked to retry.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);

/// A limited number of concurrent calls.
pub struct RequestSlots {
    slots: FairSemaphore,
    max: u32,
    refusals: Mutex<Refusals>,
}

impl RequestSlots {
    /// `name`: the name of the slots in log lines. `max`: how many calls may be in flight, of which one caller has a share.
    pub fn new(name: &'static str, max: u32, share: SharePercent) -> Self {
        Self { slots: FairSemaphore::new(name, max, share), max, refusals: Mutex::new(Refusals::new(Instant::now())) }
    }

    /// Takes a slot until the result is dropped. Fails with `Overloaded` if none is free, or the flow has used up its share.
    pub fn acquire(&self, flow: Flow) -> Result<FairPermit> {
        self.slots.try_acquire(flow, 1).map_err(|refusal| match refusal {
            Refusal::Share => self.overloaded(self.slots.share_max()),
            Refusal::Total | Refusal::Wait => self.overloaded(self.max),
        })
    }

    fn has_free(&self) -> bool {
        self.slots.has_free()
    }

    fn overloaded(&self, requests_max: u32) -> Error {
        let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        // The jitter spreads the retries of clients that were refused together.
        let delay = refusals.next_delay(Instant::now()).mul_f64(0.75 + random() / 2.0);
        Error::Overloaded { requests_max, delay }
    }
}

/// Counts recent refusals. The more there are, the longer the delay until a retry: refusals take time from the calls that
/// are admitted.
struct Refusals {
    second_began: Instant,
    in_this_second: u32,
    in_last_second: u32,
}

impl Refusals {
    fn new(now: Instant) -> Self {
        Self { second_began: now, in_this_second: 0, in_last_second: 0 }
    }

    /// Counts one more refusal and returns its delay.
    fn next_delay(&mut self, now: Instant) -> Duration {
        let passed = now.duration_since(self.second_began).as_secs();
        if passed > 0 {
            self.in_last_second = if passed == 1 { self.in_this_second } else { 0 };
            (self.second_began, self.in_this_second) = (now, 0);
        }
        self.in_this_second += 1;
        let count = self.in_this_second.max(self.in_last_second);
        RETRY_DELAY.mul_f64(1.0 + f64::from(count) / CHEAP_REFUSALS_PER_SECOND).min(RETRY_DELAY_MAX)
    }
}

/// Refuses calls that need credentials while no slot is free, without taking one.
#[derive(Clone)]
pub struct LoadSheddingLayer(pub Arc<RequestSlots>);

impl<S> Layer<S> for LoadSheddingLayer {
    type Service = LoadShedding<S>;

    fn layer(&self, inner: S) -> LoadShedding<S> {
        LoadShedding { slots: Arc::clone(&self.0), inner }
    }
}

/// The service of [`LoadSheddingLayer`].
#[derive(Clone)]
pub struct LoadShedding<S> {
    slots: Arc<RequestSlots>,
    inner: S,
}

impl<S, B> Service<Request<B>> for LoadShedding<S>
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
        if CallPolicy::of(&request).role().is_some() && !self.slots.has_free() {
            self.slots.slots.record_refusal(flow(request.extensions()), Refusal::Total);
            return Either::Left(ready(Err(self.slots.overloaded(self.slots.max))));
        }
        Either::Right(self.inner.call(request))
    }
}

/// Takes a slot for each call that needs credentials, until its response body is dropped.
#[derive(Clone)]
pub struct AdmissionLayer(pub Arc<RequestSlots>);

impl<S> Layer<S> for AdmissionLayer {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission { slots: Arc::clone(&self.0), inner }
    }
}

/// The service of [`AdmissionLayer`].
#[derive(Clone)]
pub struct Admission<S> {
    slots: Arc<RequestSlots>,
    inner: S,
}

impl<S, B, R> Service<Request<B>> for Admission<S>
where
    S: Service<Request<B>, Response = Response<R>, Error = Error>,
{
    type Response = Response<GuardedBody<R, Option<FairPermit>>>;
    type Error = Error;
    type Future = Either<Ready<Result<Self::Response>>, WrappedResponse<S::Future, Guard<Option<FairPermit>>>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let slot = CallPolicy::of(&request).role().map(|_| self.slots.acquire(flow(request.extensions()))).transpose();
        match slot {
            Ok(slot) => Either::Right(WrappedResponse::new(self.inner.call(request), Guard(slot))),
            Err(error) => Either::Left(ready(Err(error))),
        }
    }
}

/// Returns the flow of a request: its caller, or the client that has not been authenticated.
pub fn flow(extensions: &Extensions) -> Flow {
    match (extensions.get::<Caller>(), extensions.get::<ClientAddress>()) {
        (Some(caller), _) => caller.flow(),
        (None, Some(client)) => Flow::Address(client.network()),
        (None, None) => Flow::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_with_the_refusals_of_this_and_the_last_second() {
        let began = Instant::now();
        let mut refusals = Refusals::new(began);
        let few = refusals.next_delay(began);
        assert!(few >= RETRY_DELAY && few < RETRY_DELAY.mul_f64(1.1));
        let many = (0..2_000).map(|_| refusals.next_delay(began)).last().unwrap();
        assert!(many > 4 * RETRY_DELAY && many <= RETRY_DELAY_MAX);
        assert!(refusals.next_delay(began + Duration::from_secs(1)) > 4 * RETRY_DELAY);
        assert!(refusals.next_delay(began + Duration::from_secs(4)) < RETRY_DELAY.mul_f64(1.1));
        let most = (0..100_000).map(|_| refusals.next_delay(began + Duration::from_secs(4))).last();
        assert_eq!(most, Some(RETRY_DELAY_MAX));
    }
}
