//! Admission control for a bounded queue: a caller that would wait too long is rejected at once.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// A queue that admitted no caller for this long counts as slow as that wait. Longer than a busy machine takes to open the
/// first connections of a pool.
const STANDSTILL_MIN: Duration = Duration::from_secs(1);
/// The weight of the latest interval in the moving average: one in so many.
const INTERVALS_AVERAGED: u32 = 8;

/// Estimates the wait of a new caller: the number of waiters times the average interval between two admissions.
pub(super) struct AdmissionControl {
    /// How many callers are served concurrently.
    concurrency: u32,
    wait_max: Duration,
    state: Mutex<State>,
}

struct State {
    waiting: u32,
    /// The moving average of the time between two admissions while other callers waited.
    interval: Duration,
    /// When a caller was admitted last, or the first caller entered an empty queue.
    progress_time: Instant,
    /// Whether callers have waited for the whole time since `progress_time`.
    is_whole_interval: bool,
}

impl AdmissionControl {
    pub fn new(concurrency: u32, wait_max: Duration) -> Self {
        let state =
            State { waiting: 0, interval: Duration::ZERO, progress_time: Instant::now(), is_whole_interval: false };
        Self { concurrency: concurrency.max(1), wait_max, state: Mutex::new(state) }
    }

    /// Returns a waiter, or `None` if the estimated wait exceeds `wait_max`.
    pub fn enter(&self) -> Option<Waiter<'_>> {
        let now = Instant::now();
        let mut state = self.lock();
        let standstill = now.duration_since(state.progress_time);
        let interval = match state.waiting > 0 && standstill >= STANDSTILL_MIN {
            true => state.interval.max(standstill / self.concurrency),
            false => state.interval,
        };
        if interval.saturating_mul(state.waiting) > self.wait_max {
            return None;
        }
        if state.waiting == 0 {
            state.progress_time = now;
            state.is_whole_interval = false;
        }
        state.waiting += 1;
        Some(Waiter { admission: self })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of another holder leaves the state valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller in the queue. Dropped, it leaves the queue.
pub(super) struct Waiter<'a> {
    admission: &'a AdmissionControl,
}

impl Waiter<'_> {
    /// Leaves the queue because the caller is served now.
    pub fn admitted(self) {
        let now = Instant::now();
        let mut state = self.admission.lock();
        let interval = now.duration_since(state.progress_time);
        // The first caller of a queue has waited for a part of an interval only, which can show that intervals are
        // shorter than the average, and not that they are longer.
        if state.is_whole_interval || interval < state.interval {
            state.interval = (state.interval * (INTERVALS_AVERAGED - 1) + interval) / INTERVALS_AVERAGED;
        }
        state.progress_time = now;
        state.is_whole_interval = true;
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.admission.lock().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn burst_is_accepted_until_the_queue_stands_still() {
        let queue = AdmissionControl::new(2, 2 * SECOND);
        let mut waiters = Vec::new();
        for _ in 0..1_000 {
            waiters.push(queue.enter().expect("no interval is known yet"));
            advance(STANDSTILL_MIN / 1_001).await;
        }
        advance(STANDSTILL_MIN / 1_000).await;
        assert!(queue.enter().is_none(), "a thousand intervals of this length exceed the maximum wait");
    }

    #[tokio::test(start_paused = true)]
    async fn burst_is_accepted_as_far_as_it_is_served_in_time() {
        const INTERVAL: Duration = Duration::from_millis(1);
        let queue = AdmissionControl::new(2, 2 * SECOND);
        let mut waiters: VecDeque<_> = (0..200).map(|_| queue.enter().unwrap()).collect();
        while let Some(waiter) = waiters.pop_front() {
            advance(INTERVAL).await;
            waiter.admitted();
        }
        waiters.extend(std::iter::from_fn(|| queue.enter()).take(10_000));
        let accepted = u32::try_from(waiters.len()).unwrap();
        assert!((1_900..=2_100).contains(&accepted), "{accepted} intervals of a millisecond in two seconds");
        // A waiter that leaves makes room for another.
        drop(waiters.pop_back());
        let last = queue.enter().expect("there is room for as many waiters as before");
        assert!(queue.enter().is_none());
        drop(last);
    }

    #[tokio::test(start_paused = true)]
    async fn caller_is_rejected_only_if_its_estimated_wait_is_too_long() {
        let queue = AdmissionControl::new(2, 2 * SECOND);
        let mut waiters: Vec<_> = (0..100).map(|_| queue.enter().unwrap()).collect();
        // An interval takes 100 ms: 20 callers are served within two seconds.
        for _ in 0..60 {
            advance(SECOND / 10).await;
            waiters.pop().unwrap().admitted();
        }
        assert!(queue.enter().is_none());
        waiters.truncate(15);
        assert!(queue.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn queue_that_stands_still_counts_as_slow() {
        let queue = AdmissionControl::new(2, 2 * SECOND);
        let waiters: Vec<_> = (0..10).map(|_| queue.enter().unwrap()).collect();
        advance(SECOND / 5).await;
        assert!(queue.enter().is_some());
        advance(SECOND).await;
        assert!(queue.enter().is_none());
        drop(waiters);
        assert!(queue.enter().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn average_recovers_after_fast_admissions() {
        let queue = AdmissionControl::new(1, SECOND);
        let mut waiters: Vec<_> = (0..3).map(|_| queue.enter().unwrap()).collect();
        for _ in 0..3 {
            advance(5 * SECOND).await;
            waiters.pop().unwrap().admitted();
        }
        // The first caller of a queue is always accepted, and shortens the average.
        for _ in 0..100 {
            let first = queue.enter().unwrap();
            let second = queue.enter();
            advance(SECOND / 1_000).await;
            first.admitted();
            if let Some(second) = second {
                second.admitted();
            }
        }
        let _first = queue.enter().unwrap();
        assert!(queue.enter().is_some());
    }
}
