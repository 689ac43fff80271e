//! How long an import waits for its client. Meanwhile it holds a place, a connection and maybe a transaction.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::error::{Error, Result};

/// How long an import waits for one message of its client, or for one to be read.
pub(super) const IMPORT_IDLE_MAX: Duration = Duration::from_secs(60);
/// How long it waits in all until [`IMPORT_PROGRESS_BYTES`] more of the file have come: a client whose own source is slow
/// says so by empty chunks, which makes it last, but not for ever.
const IMPORT_STALL_MAX: Duration = Duration::from_secs(600);
const IMPORT_PROGRESS_BYTES: u64 = 64 * 1024;

/// What is left of it. Only the time of waiting counts, not what the service needs itself.
#[derive(Default)]
pub(super) struct Patience {
    waited: Duration,
    bytes: u64,
}

impl Patience {
    /// Waits for the client; `failing` is what it has not done if that takes too long.
    pub async fn wait<T>(&mut self, client: impl Future<Output = T>, failing: &str) -> Result<T> {
        let left = IMPORT_STALL_MAX.saturating_sub(self.waited);
        let began = Instant::now();
        let done = timeout(left.min(IMPORT_IDLE_MAX), client).await;
        self.waited += began.elapsed();
        done.map_err(|_| match left < IMPORT_IDLE_MAX {
            true => stalled(),
            false => idle(failing),
        })
    }

    /// So much of the file has come.
    pub fn progressed(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes >= IMPORT_PROGRESS_BYTES {
            *self = Self::default();
        }
    }
}

fn idle(failing: &str) -> Error {
    let message = format!("{failing} for {} s; nothing more is written", IMPORT_IDLE_MAX.as_secs());
    Error::Timeout { reason: "IMPORT_IDLE", message }
}

fn stalled() -> Error {
    let (seconds, kib) = (IMPORT_STALL_MAX.as_secs(), IMPORT_PROGRESS_BYTES / 1024);
    let message =
        format!("the client was waited for {seconds} s in which less than {kib} KiB came; nothing more is written");
    Error::Timeout { reason: "IMPORT_IDLE", message }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How long a client is waited for that sends so much each time it has waited so long, up to a day, and what it is told.
    async fn waited_for(bytes: u64, pause: Duration) -> Option<(Duration, String)> {
        let (mut patience, began) = (Patience::default(), Instant::now());
        while began.elapsed() < 24 * 3_600 * SECOND {
            match patience.wait(sleep(pause), "nothing was sent").await {
                Ok(()) => patience.progressed(bytes),
                Err(Error::Timeout { reason: "IMPORT_IDLE", message }) => return Some((began.elapsed(), message)),
                Err(other) => panic!("{other:?}"),
            }
        }
        None
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_waited_for_a_minute() {
        let (waited, message) = waited_for(1024 * 1024, 61 * SECOND).await.unwrap();
        assert!((60 * SECOND..61 * SECOND).contains(&waited), "{waited:?}");
        assert_eq!(message, "nothing was sent for 60 s; nothing more is written");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_trickles_is_waited_for_ten_minutes() {
        for (bytes, pause) in
            [(0, 59 * SECOND), (1, 59 * SECOND), (0, SECOND / 10), (109, SECOND), (6_000, 55 * SECOND)]
        {
            let (waited, message) = waited_for(bytes, pause).await.unwrap();
            assert!((600 * SECOND..603 * SECOND).contains(&waited), "{bytes} in {pause:?}: {waited:?}");
            assert!(message.contains("600 s in which less than 64 KiB came"), "{message}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_slow_is_waited_for() {
        for (bytes, pause) in
            [(256 * 1024, 59 * SECOND), (256 * 1024, 30 * SECOND), (120, SECOND), (7_000, 59 * SECOND)]
        {
            assert_eq!(waited_for(bytes, pause).await, None, "{bytes} in {pause:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_service_needs_itself_is_no_waiting() {
        let mut patience = Patience::default();
        for _ in 0..100 {
            patience.wait(sleep(SECOND), "nothing was sent").await.unwrap();
            sleep(3_600 * SECOND).await;
        }
        patience.wait(sleep(59 * SECOND), "nothing was sent").await.unwrap();
    }
}
