//! When to try again, and when to give up.

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

const BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(15) };

/// Waits longer and longer between tries that bring nothing, and gives up after too long without progress. Progress is
/// what was never reached before: work that is only done again and again does not count, but is not waiting either.
pub struct Retries {
    limit: Duration,
    best_offset: u64,
    /// Where the present try is.
    offset: Option<u64>,
    /// Tries since there was progress.
    failures: u32,
    /// Time since there was progress in which no server had answered, up to `since`.
    waited: Duration,
    since: Instant,
}

impl Retries {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, best_offset: 0, offset: None, failures: 0, waited: Duration::ZERO, since: now }
    }

    /// The present try is at this offset.
    pub fn reached(&mut self, offset: u64, now: Instant) {
        if self.offset.is_some_and(|before| offset > before) {
            self.since = now;
            if offset > self.best_offset {
                self.best_offset = offset;
                self.waited = Duration::ZERO;
                self.failures = 0;
            }
        }
        self.offset = Some(offset);
    }

    /// The present try has failed: how long to wait before the next, at least `asked`; `None` is to give up. `random` is
    /// between 0 and 1.
    pub fn next_delay(&mut self, asked: Option<Duration>, random: f64, now: Instant) -> Option<Duration> {
        // A server that has answered is not waited for, however long it takes for the next rows.
        if self.offset.take().is_none() {
            self.waited += now.saturating_duration_since(self.since);
        }
        let left = self.limit.checked_sub(self.waited).filter(|left| !left.is_zero())?;
        let delay = BACKOFF.delay(self.failures, random).max(asked.unwrap_or_default()).min(left);
        self.failures = self.failures.saturating_add(1);
        self.waited += delay;
        self.since = now + delay;
        Some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_servers_wish_is_heard_when_it_is_longer() {
        let now = Instant::now();
        let mut retries = Retries::new(100 * SECOND, now);
        assert_eq!(retries.next_delay(Some(3 * SECOND), 0.0, now), Some(3 * SECOND));
        assert_eq!(retries.next_delay(Some(Duration::from_millis(1)), 0.0, now), Some(Duration::from_millis(500)));
    }

    #[test]
    fn it_gives_up_when_the_time_is_used_up_and_the_last_wait_ends_with_it() {
        let mut now = Instant::now();
        let begin = now;
        let mut retries = Retries::new(20 * SECOND, now);
        let mut tries = 0;
        while let Some(delay) = retries.next_delay(None, 0.0, now) {
            now += delay;
            tries += 1;
        }
        assert_eq!((now - begin, tries), (20 * SECOND, 7));
        assert_eq!(Retries::new(Duration::ZERO, now).next_delay(None, 0.0, now), None);
    }

    #[test]
    fn progress_begins_the_time_anew_but_the_same_work_again_does_not() {
        let mut now = Instant::now();
        let mut retries = Retries::new(20 * SECOND, now);
        // Two hours of work, then a cut: only the wait counts.
        retries.reached(0, now);
        now += 7_200 * SECOND;
        retries.reached(1_000, now);
        assert_eq!(retries.next_delay(None, 0.0, now), Some(BACKOFF.first));
        let mut tries = 1;
        loop {
            // From the start again, and cut where it was before.
            retries.reached(0, now);
            now += 7_200 * SECOND;
            retries.reached(1_000, now);
            match retries.next_delay(None, 0.0, now) {
                Some(delay) => now += delay,
                None => break,
            }
            tries += 1;
        }
        assert_eq!(tries, 7);

        let mut retries = Retries::new(20 * SECOND, now);
        for step in 1..100 {
            retries.reached(0, now);
            retries.reached(step, now);
            assert_eq!(retries.next_delay(None, 0.0, now), Some(BACKOFF.first), "further than ever");
        }
    }
}
