//! When to retry, and when to stop.

use std::time::{Duration, Instant};

use crate::backoff::Backoff;

const BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(15) };
/// How long to retry until the server has responded once: long enough for a service that is starting, short for a wrong
/// address.
const FIRST_CONNECT_MAX: Duration = Duration::from_secs(5);

/// Exponential backoff with jitter, which ends after a time without progress. Progress means an offset never reached
/// before. The time of an attempt that repeats earlier work counts neither as progress nor as waiting.
pub struct Retries {
    /// The maximum time without progress once the server has responded.
    limit: Duration,
    is_connected: bool,
    best_offset: u64,
    /// The offset of the current attempt; `None` until the server has responded to it.
    offset: Option<u64>,
    /// Failed attempts since the last progress.
    failures: u32,
    /// Time without progress and without a response of a server, up to `since`.
    waited: Duration,
    since: Instant,
}

impl Retries {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            is_connected: false,
            best_offset: 0,
            offset: None,
            failures: 0,
            waited: Duration::ZERO,
            since: now,
        }
    }

    /// Records that the server has responded to a connection: from now on, retries continue up to the whole limit.
    pub fn connected(&mut self) {
        self.is_connected = true;
    }

    /// Returns how long to retry without progress.
    pub fn limit(&self) -> Duration {
        if self.is_connected { self.limit } else { self.limit.min(FIRST_CONNECT_MAX) }
    }

    /// Records the offset of the current attempt.
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

    /// Records that the current attempt has failed. Returns the delay before the next, at least `asked`; `None` means to
    /// stop. `random` is between 0 and 1.
    pub fn next_delay(&mut self, asked: Option<Duration>, random: f64, now: Instant) -> Option<Duration> {
        // Once a server has responded to an attempt, its time counts as work, not as waiting.
        if self.offset.take().is_none() {
            self.waited += now.saturating_duration_since(self.since);
        }
        let left = self.limit().checked_sub(self.waited).filter(|left| !left.is_zero())?;
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

    /// Returns the retries of a client whose server has responded once.
    fn connected(limit: Duration, now: Instant) -> Retries {
        let mut retries = Retries::new(limit, now);
        retries.connected();
        retries
    }

    #[test]
    fn until_the_first_connection_retries_end_after_5_s() {
        for (limit, connected, expected) in
            [(300 * SECOND, false, 5 * SECOND), (2 * SECOND, false, 2 * SECOND), (300 * SECOND, true, 300 * SECOND)]
        {
            let begin = Instant::now();
            let (mut retries, mut now) = (Retries::new(limit, begin), begin);
            if connected {
                retries.connected();
            }
            while let Some(delay) = retries.next_delay(None, 0.0, now) {
                now += delay;
            }
            assert_eq!((now - begin, retries.limit()), (expected, expected));
        }
    }

    #[test]
    fn a_longer_delay_asked_by_the_server_is_used() {
        let now = Instant::now();
        let mut retries = connected(100 * SECOND, now);
        assert_eq!(retries.next_delay(Some(3 * SECOND), 0.0, now), Some(3 * SECOND));
        assert_eq!(retries.next_delay(Some(Duration::from_millis(1)), 0.0, now), Some(Duration::from_millis(500)));
    }

    #[test]
    fn retries_end_when_the_limit_has_passed() {
        let mut now = Instant::now();
        let begin = now;
        let mut retries = connected(20 * SECOND, now);
        let mut tries = 0;
        while let Some(delay) = retries.next_delay(None, 0.0, now) {
            now += delay;
            tries += 1;
        }
        assert_eq!((now - begin, tries), (20 * SECOND, 7));
        assert_eq!(Retries::new(Duration::ZERO, now).next_delay(None, 0.0, now), None);
    }

    #[test]
    fn progress_restarts_the_limit_but_repeated_work_does_not() {
        let mut now = Instant::now();
        let mut retries = connected(20 * SECOND, now);
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

        let mut retries = connected(20 * SECOND, now);
        for step in 1..100 {
            retries.reached(0, now);
            retries.reached(step, now);
            assert_eq!(retries.next_delay(None, 0.0, now), Some(BACKOFF.first), "a new offset");
        }
    }
}
