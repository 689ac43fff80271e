//! A semaphore whose permits are shared by flows.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{
    flow::{Flow, SharePercent},
    refusals::{Refusal, RefusalLog},
};
use crate::metrics::{self, ResourceUsage};

/// If no waiter was granted a permit for this long, the interval between two grants is taken to be at least that time divided
/// by the number of permits. Longer than a busy machine takes to open the first connections of a pool.
const STANDSTILL_MIN: Duration = Duration::from_secs(1);
/// A flow may begin to wait behind so many flows for each permit, whatever the average interval: it includes the intervals of
/// flows that wait for their own permits only.
const SHORT_QUEUE_PER_PERMIT: u32 = 2;
/// The weight of the latest interval in the moving average is one in this number.
const INTERVALS_AVERAGED: u32 = 8;

/// Permits that are shared by flows, and by clones of the semaphore.
///
/// A permit that becomes free goes to the waiting flow that holds the fewest. One flow holds no more than its share, even
/// if no other flow waits.
#[derive(Clone)]
pub struct FairSemaphore {
    inner: Arc<Inner>,
}

struct Inner {
    permits: u32,
    share_max: u32,
    refusals: RefusalLog,
    state: Mutex<State>,
}

struct State {
    free: u32,
    /// The permits that each flow holds, if any.
    held: HashMap<Flow, u32>,
    /// The flows that wait.
    waiting: HashMap<Flow, WaitingFlow>,
    /// Numbers waiters and turns.
    next_number: u64,
    progress: Progress,
}

struct WaitingFlow {
    /// The number of the last grant, or of the first waiter: of flows that hold equally many permits, the one with the
    /// lowest is next.
    turn: u64,
    /// At least one, in order of arrival.
    waiters: VecDeque<Waiter>,
}

struct Waiter {
    number: u64,
    permit: oneshot::Sender<FairPermit>,
}

/// How fast waiters are granted permits.
struct Progress {
    /// The moving average of the time between two grants while others waited.
    interval: Duration,
    /// When a waiter was granted a permit last, or the first one began to wait.
    time: Instant,
    /// Whether a flow has waited for the whole time since `time`.
    is_whole_interval: bool,
}

impl FairSemaphore {
    /// `resource`: its name in log lines and metrics.
    pub fn new(resource: &'static str, permits: u32, share: SharePercent) -> Self {
        let permits = permits.max(1);
        let state = State {
            free: permits,
            held: HashMap::new(),
            waiting: HashMap::new(),
            next_number: 0,
            progress: Progress { interval: Duration::ZERO, time: Instant::now(), is_whole_interval: false },
        };
        let (share_max, refusals) = (share.of(permits), RefusalLog::new(resource));
        let inner = Arc::new(Inner { permits, share_max, refusals, state: Mutex::new(state) });
        if let Some(metrics) = metrics::get() {
            let observed = Arc::downgrade(&inner);
            metrics.resources.observe(resource, permits, move || Some(observed.upgrade()?.usage()));
        }
        Self { inner }
    }

    /// Returns how many calls wait for a permit.
    pub fn waiting_count(&self) -> usize {
        self.inner.usage().waiting
    }

    /// Returns how many permits one flow may hold.
    pub fn share_max(&self) -> u32 {
        self.inner.share_max
    }

    pub fn has_free(&self) -> bool {
        self.inner.lock().free > 0
    }

    /// Takes all of `count` permits without waiting, or none.
    pub fn try_acquire(&self, flow: Flow, count: u32) -> Result<FairPermit, Refusal> {
        let refusal = {
            let mut state = self.inner.lock();
            match state.refusal(&self.inner, flow, count) {
                None => return Ok(state.grant(&self.inner, flow, count)),
                Some(refusal) => refusal,
            }
        };
        self.record_refusal(flow, refusal);
        Err(refusal)
    }

    /// Logs that the flow was refused a permit, at most once a minute for each flow.
    pub fn record_refusal(&self, flow: Flow, refusal: Refusal) {
        self.inner.refusals.record(flow, refusal);
    }

    /// Waits for a permit. Fails if there is none within `wait_max`, or at once if the expected wait is longer. This is the
    /// number of waiters ahead, times the average interval between two grants.
    pub async fn acquire(&self, flow: Flow, wait_max: Duration) -> Result<FairPermit, Refusal> {
        let (refusal, waiting) = {
            let mut state = self.inner.lock();
            let refusal = match state.refusal(&self.inner, flow, 1) {
                None if !state.waiting.contains_key(&flow) => return Ok(state.grant(&self.inner, flow, 1)),
                Some(Refusal::Share) => Refusal::Share,
                _ => Refusal::Wait,
            };
            let is_short = state.estimated_wait(self.inner.permits, flow) <= wait_max;
            (refusal, is_short.then(|| state.enqueue(&self.inner, flow)))
        };
        if let Some(mut waiting) = waiting
            && let Ok(Ok(permit)) = timeout(wait_max, &mut waiting.permit).await
        {
            return Ok(permit);
        }
        self.record_refusal(flow, refusal);
        Err(refusal)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of another holder leaves the state valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usage(&self) -> ResourceUsage {
        let state = self.lock();
        let waiting = state.waiting.values().map(|flow| flow.waiters.len()).sum();
        ResourceUsage { in_use: self.permits - state.free, waiting }
    }
}

impl State {
    /// Returns why the flow cannot have `count` permits now.
    fn refusal(&self, inner: &Inner, flow: Flow, count: u32) -> Option<Refusal> {
        // Internal work leaves one permit to users.
        let share_max = if flow == Flow::Internal { inner.permits.max(2) - 1 } else { inner.share_max };
        if self.held_by(&flow).saturating_add(count) > share_max {
            return Some(Refusal::Share);
        }
        (self.free < count).then_some(Refusal::Total)
    }

    fn grant(&mut self, inner: &Arc<Inner>, flow: Flow, count: u32) -> FairPermit {
        self.free -= count;
        *self.held.entry(flow).or_default() += count;
        FairPermit { inner: Arc::clone(inner), flow, count }
    }

    fn give_back(&mut self, flow: Flow, count: u32) {
        self.free += count;
        if let Entry::Occupied(mut held) = self.held.entry(flow) {
            *held.get_mut() -= count;
            if *held.get() == 0 {
                held.remove();
            }
        }
    }

    fn enqueue(&mut self, inner: &Arc<Inner>, flow: Flow) -> Waiting {
        if self.waiting.is_empty() {
            self.progress.time = Instant::now();
            self.progress.is_whole_interval = false;
        }
        let number = self.next_number();
        let (sender, permit) = oneshot::channel();
        let of_flow =
            self.waiting.entry(flow).or_insert_with(|| WaitingFlow { turn: number, waiters: VecDeque::new() });
        of_flow.waiters.push_back(Waiter { number, permit: sender });
        Waiting { inner: Arc::clone(inner), flow, number, permit }
    }

    fn next_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// Returns the waiting flow that is next: one that has not used up its share, and holds the fewest permits.
    fn next_flow(&self, inner: &Inner) -> Option<Flow> {
        let candidates = self.waiting.iter().filter(|(flow, _)| self.refusal(inner, **flow, 1).is_none());
        let next =
            candidates.min_by_key(|(flow, waiting)| (**flow != Flow::Internal, self.held_by(flow), waiting.turn));
        next.map(|(flow, _)| *flow)
    }

    /// Grants the free permits to waiters.
    fn grant_to_waiters(&mut self, inner: &Arc<Inner>) {
        while self.free > 0
            && let Some(flow) = self.next_flow(inner)
        {
            let turn = self.next_number();
            let Entry::Occupied(mut waiting) = self.waiting.entry(flow) else { return };
            waiting.get_mut().turn = turn;
            let waiter = waiting.get_mut().waiters.pop_front();
            if waiting.get().waiters.is_empty() {
                waiting.remove();
            }
            let Some(waiter) = waiter else { continue };
            // Cannot fail: a waiter leaves the queue before its receiver is dropped.
            let sent = waiter.permit.send(self.grant(inner, flow, 1));
            debug_assert!(sent.is_ok());
            self.progress.advance();
        }
    }

    /// Returns how many permits are granted before a new waiter of this flow gets one.
    fn waiters_ahead(&self, flow: Flow) -> usize {
        match (self.waiting.get(&flow), flow) {
            // Internal work does not take turns with others.
            (of_flow, Flow::Internal) => of_flow.map_or(0, |waiting| waiting.waiters.len()),
            (Some(of_flow), _) => of_flow.waiters.len() * self.waiting.len(),
            // Flows that hold more have to wait until this one has its first permit.
            (None, _) => {
                let is_ahead = |other: &&Flow| **other == Flow::Internal || self.held_by(other) <= self.held_by(&flow);
                self.waiting.keys().filter(is_ahead).count()
            }
        }
    }

    fn held_by(&self, flow: &Flow) -> u32 {
        self.held.get(flow).copied().unwrap_or(0)
    }

    fn estimated_wait(&self, permits: u32, flow: Flow) -> Duration {
        let ahead = u32::try_from(self.waiters_ahead(flow)).unwrap_or(u32::MAX);
        if !self.waiting.contains_key(&flow) && ahead <= permits.saturating_mul(SHORT_QUEUE_PER_PERMIT) {
            return Duration::ZERO;
        }
        let standstill = self.progress.time.elapsed();
        let interval = match !self.waiting.is_empty() && standstill >= STANDSTILL_MIN {
            true => self.progress.interval.max(standstill / permits),
            false => self.progress.interval,
        };
        interval.saturating_mul(ahead)
    }
}

impl Progress {
    /// Counts a grant.
    fn advance(&mut self) {
        let now = Instant::now();
        let interval = now.duration_since(self.time);
        // The first waiter has waited for a part of an interval only, which can show that intervals are shorter than the
        // average, and not that they are longer.
        if self.is_whole_interval || interval < self.interval {
            self.interval = (self.interval * (INTERVALS_AVERAGED - 1) + interval) / INTERVALS_AVERAGED;
        }
        self.time = now;
        self.is_whole_interval = true;
    }
}

/// One or more permits of a flow, until this is dropped.
#[derive(Debug)]
pub struct FairPermit {
    inner: Arc<Inner>,
    flow: Flow,
    /// 0 if they were given back.
    count: u32,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("FairSemaphore").finish_non_exhaustive()
    }
}

impl FairPermit {
    /// Returns the number of permits.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Adds the permits of another one, of the same semaphore and flow.
    pub fn merge(&mut self, mut other: Self) {
        debug_assert_eq!(self.flow, other.flow);
        self.count += std::mem::take(&mut other.count);
    }

    /// Gives back `count` of the permits, or all if there are fewer.
    pub fn give_back(&mut self, count: u32) {
        let count = count.min(self.count);
        if count > 0 {
            self.count -= count;
            let mut state = self.inner.lock();
            state.give_back(self.flow, count);
            state.grant_to_waiters(&self.inner);
        }
    }
}

impl Drop for FairPermit {
    fn drop(&mut self) {
        self.give_back(self.count);
    }
}

/// A waiter in the queue. Dropping it removes the waiter; a permit that was granted meanwhile goes to the next one.
struct Waiting {
    inner: Arc<Inner>,
    flow: Flow,
    number: u64,
    permit: oneshot::Receiver<FairPermit>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        let Entry::Occupied(mut waiting) = state.waiting.entry(self.flow) else { return };
        let waiters = &mut waiting.get_mut().waiters;
        if let Ok(place) = waiters.binary_search_by_key(&self.number, |waiter| waiter.number) {
            waiters.remove(place);
        }
        if waiters.is_empty() {
            waiting.remove();
        }
    }
}

#[cfg(test)]
mod tests;
