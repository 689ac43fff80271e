//! Exponential backoff and random jitter, for retries on both sides of the wire.

use std::time::Duration;

/// Delays between attempts that double from one failure to the next.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The delay without earlier failures.
    pub first: Duration,
    /// The longest delay.
    pub max: Duration,
}

impl Backoff {
    /// Returns the delay after `failures` earlier failures, shortened by up to half of it.
    ///
    /// `random` is from 0 (the full delay) to 1 (half of it). It spreads the retries of callers that failed together.
    pub fn delay(&self, failures: u32, random: f64) -> Duration {
        const DOUBLINGS_MAX: u32 = 16;
        let full = self.first.saturating_mul(1 << failures.min(DOUBLINGS_MAX)).min(self.max);
        full.mul_f64(1.0 - random / 2.0)
    }
}

/// Returns a random number from 0 to 1, for jitter. Returns 0.5 if the system has no source of randomness.
pub fn random() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff { first: Duration::from_millis(250), max: Duration::from_secs(15) };

    #[test]
    fn delays_double_up_to_the_maximum_and_jitter_removes_up_to_half() {
        let full: Vec<_> = (0..9).map(|failures| BACKOFF.delay(failures, 0.0).as_millis()).collect();
        assert_eq!(full, [250, 500, 1_000, 2_000, 4_000, 8_000, 15_000, 15_000, 15_000]);
        assert_eq!(BACKOFF.delay(2, 1.0), Duration::from_millis(500));
        assert_eq!(BACKOFF.delay(u32::MAX, 0.0), BACKOFF.max);
        assert!((0.0..=1.0).contains(&random()));
    }
}
