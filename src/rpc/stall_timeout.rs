//! Bounds how long an import waits for its client, because it holds a permit, a connection and maybe a transaction.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::{Error, Result};

/// How long an import waits for the client to send a message or to read a response.
const IMPORT_IDLE_MAX: Duration = Duration::from_secs(60);
/// How long it waits in total while fewer than [`IMPORT_STALL_BYTES`] of the file arrive. Empty chunks keep an import with
/// a slow source alive only up to this limit.
const IMPORT_STALL_MAX: Duration = Duration::from_secs(600);
const IMPORT_STALL_BYTES: u64 = 64 * 1024;

/// Tracks the time spent waiting for the client; the service's own work does not count.
#[derive(Default)]
pub(super) struct StallTimeout {
    waited: Duration,
    bytes: u64,
}

impl StallTimeout {
    /// Waits for the client. Fails with a `Timeout` that names `missing`, what the client has not done.
    pub async fn wait<T>(&mut self, client: impl Future<Output = T>, missing: &str) -> Result<T> {
        let remaining = IMPORT_STALL_MAX.saturating_sub(self.waited);
        let began = Instant::now();
        let done = timeout(remaining.min(IMPORT_IDLE_MAX), client).await;
        self.waited += began.elapsed();
        done.map_err(|_| match remaining < IMPORT_IDLE_MAX {
            true => stalled(),
            false => idle(missing),
        })
    }

    /// Counts bytes of the file; the total wait starts anew at every [`IMPORT_STALL_BYTES`].
    pub fn add_bytes(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= IMPORT_STALL_BYTES {
            *self = Self::default();
        }
    }
}

fn idle(missing: &str) -> Error {
    let message =
        format!("stream: {missing} for {} s; send the file again with the same import_id", IMPORT_IDLE_MAX.as_secs());
    Error::Timeout { reason: "IMPORT_IDLE", message }
}

fn stalled() -> Error {
    let (seconds, kib) = (IMPORT_STALL_MAX.as_secs(), IMPORT_STALL_BYTES / 1024);
    let message = format!(
        "stream: fewer than {kib} KiB received in {seconds} s of waiting; send the file again with the same import_id"
    );
    Error::Timeout { reason: "IMPORT_IDLE", message }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Returns when an import ends whose client sends `bytes` after every `pause`, and its error; `None` after a day.
    async fn waited_for(bytes: u64, pause: Duration) -> Option<(Duration, String)> {
        let (mut stall_timeout, began) = (StallTimeout::default(), Instant::now());
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
        assert_eq!(message, "stream: no message received for 60 s; send the file again with the same import_id");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_trickles_times_out_after_600_s() {
        for (bytes, pause) in
            [(0, 59 * SECOND), (1, 59 * SECOND), (0, SECOND / 10), (109, SECOND), (6_000, 55 * SECOND)]
        {
            let (waited, message) = waited_for(bytes, pause).await.unwrap();
            assert!((600 * SECOND..603 * SECOND).contains(&waited), "{bytes} in {pause:?}: {waited:?}");
            assert!(message.contains("fewer than 64 KiB received in 600 s"), "{message}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_does_not_time_out() {
        for (bytes, pause) in
            [(256 * 1024, 59 * SECOND), (256 * 1024, 30 * SECOND), (120, SECOND), (7_000, 59 * SECOND)]
        {
            assert_eq!(waited_for(bytes, pause).await, None, "{bytes} in {pause:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_between_waits_does_not_count() {
        let mut stall_timeout = StallTimeout::default();
        for _ in 0..100 {
            stall_timeout.wait(sleep(SECOND), "no message received").await.unwrap();
            sleep(3_600 * SECOND).await;
        }
        stall_timeout.wait(sleep(59 * SECOND), "no message received").await.unwrap();
    }
}
