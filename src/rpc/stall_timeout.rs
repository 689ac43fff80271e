//! Bounds how long a stream lasts and how long it waits for its client, because it holds a permit, a connection, and maybe a
//! snapshot.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::{Error, Result};

/// How long a stream waits for the client to send or to read one message.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// The rate at which the client of a stream must send or read, averaged over the time that the stream waits for it.
#[derive(Debug)]
pub struct MinimumRate {
    /// How long the stream waits in total for each `bytes` of the file. Empty messages keep it alive only up to this limit.
    pub waited_max: Duration,
    pub bytes: u64,
    /// The reason of the error.
    pub reason: &'static str,
    /// What the client has not done with the bytes: `received` or `read`.
    pub missing: &'static str,
    /// What the client can do instead.
    pub advice: &'static str,
}

/// Tracks the time spent waiting for the client; the service's own work does not count.
pub struct StallTimeout {
    rate: &'static MinimumRate,
    waited: Duration,
    bytes: u64,
}

impl StallTimeout {
    pub fn new(rate: &'static MinimumRate) -> Self {
        Self { rate, waited: Duration::ZERO, bytes: 0 }
    }

    /// Waits for the client. Fails with a `Timeout` that names `missing`, what the client has not done.
    pub async fn wait<T>(&mut self, client: impl Future<Output = T>, missing: &str) -> Result<T> {
        let remaining = self.rate.waited_max.saturating_sub(self.waited);
        let began = Instant::now();
        let done = timeout(remaining.min(IDLE_MAX), client).await;
        self.waited += began.elapsed();
        done.map_err(|_| match remaining < IDLE_MAX {
            true => self.rate.too_slow(),
            false => self.rate.idle(missing),
        })
    }

    /// Counts bytes of the file; the total wait starts anew whenever there are [`MinimumRate::bytes`].
    pub fn add_bytes(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= self.rate.bytes {
            *self = Self::new(self.rate);
        }
    }
}

/// Runs the producer of a stream for at most `duration_max`. Then it is dropped, and the stream fails with a `Timeout` of
/// this reason. `advice`: what the client can do.
pub async fn limit_duration(
    duration_max: Duration,
    reason: &'static str,
    advice: &str,
    producer: impl Future<Output = Result<()>>,
) -> Result<()> {
    timeout(duration_max, producer).await.unwrap_or_else(|_| {
        let message = format!("stream: not complete after {} s; {advice}", duration_max.as_secs());
        Err(Error::Timeout { reason, message })
    })
}

impl MinimumRate {
    fn idle(&self, missing: &str) -> Error {
        self.timeout(&format!("{missing} for {} s", IDLE_MAX.as_secs()))
    }

    fn too_slow(&self) -> Error {
        let (kib, seconds) = (self.bytes / 1024, self.waited_max.as_secs());
        self.timeout(&format!("fewer than {kib} KiB {} in {seconds} s of waiting", self.missing))
    }

    fn timeout(&self, problem: &str) -> Error {
        Error::Timeout { reason: self.reason, message: format!("stream: {problem}; {}", self.advice) }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    /// 1 KiB/s.
    const RATE: MinimumRate = MinimumRate {
        waited_max: Duration::from_secs(600),
        bytes: 600 * 1024,
        reason: "IMPORT_IDLE",
        missing: "received",
        advice: "send it again",
    };

    /// Returns when a stream ends whose client sends `bytes` after every `pause`, and its error; `None` after a day.
    async fn waited_for(bytes: u64, pause: Duration) -> Option<(Duration, String)> {
        let (mut stall_timeout, began) = (StallTimeout::new(&RATE), Instant::now());
        while began.elapsed() < 24 * 3_600 * SECOND {
            match stall_timeout.wait(sleep(pause), "no message received").await {
                Ok(()) => stall_timeout.add_bytes(bytes),
                Err(Error::Timeout { reason: "IMPORT_IDLE", message }) => return Some((began.elapsed(), message)),
                Err(other) => panic!("{other:?}"),
            }
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_times_out_after_60_s() {
        let (waited, message) = waited_for(1024 * 1024, 61 * SECOND).await.unwrap();
        assert!((60 * SECOND..61 * SECOND).contains(&waited), "{waited:?}");
        assert_eq!(message, "stream: no message received for 60 s; send it again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_below_the_minimum_rate_times_out_after_600_s() {
        for (bytes, pause) in
            [(0, 59 * SECOND), (1, 59 * SECOND), (0, SECOND / 10), (1_000, SECOND), (58 * 1024, 59 * SECOND)]
        {
            let (waited, message) = waited_for(bytes, pause).await.unwrap();
            assert!((600 * SECOND..603 * SECOND).contains(&waited), "{bytes} in {pause:?}: {waited:?}");
            assert_eq!(message, "stream: fewer than 600 KiB received in 600 s of waiting; send it again");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn bursts_below_the_minimum_rate_time_out() {
        let (mut stall_timeout, began) = (StallTimeout::new(&RATE), Instant::now());
        let mut result = Ok(());
        while result.is_ok() {
            assert!(began.elapsed() < 3_600 * SECOND);
            // 64 KiB every 7 minutes, and an empty message every 30 s.
            for _ in 0..14 {
                if result.is_ok() {
                    result = stall_timeout.wait(sleep(30 * SECOND), "no message received").await;
                }
            }
            stall_timeout.add_bytes(64 * 1024);
        }
        assert!((600 * SECOND..603 * SECOND).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_at_the_minimum_rate_does_not_time_out() {
        for (bytes, pause) in
            [(256 * 1024, 59 * SECOND), (64 * 1024, 59 * SECOND), (1_100, SECOND), (700 * 1024, 59 * SECOND)]
        {
            assert_eq!(waited_for(bytes, pause).await, None, "{bytes} in {pause:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_between_waits_does_not_count() {
        let mut stall_timeout = StallTimeout::new(&RATE);
        for _ in 0..100 {
            stall_timeout.wait(sleep(SECOND), "no message received").await.unwrap();
            sleep(3_600 * SECOND).await;
        }
        stall_timeout.wait(sleep(59 * SECOND), "no message received").await.unwrap();
    }
}
