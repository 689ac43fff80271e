//! The threads that check and hash passwords, and the lanes in front of them.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::{
    error::{Error, Result},
    fairness::{Refusal, RefusalCounters},
};

/// How long a password waits for a thread.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// How many passwords may wait per thread: as many as one thread checks in that time, at 250 ms each.
///
/// The lanes have separate limits, and per thread only one password of the unrecognized lane is ever ahead of the
/// recognized lane, however long a check takes.
const UNRECOGNIZED_WAITING_PER_THREAD_MAX: usize = 8;
const RECOGNIZED_WAITING_PER_THREAD_MAX: usize = 12;

/// Where a password waits for a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// For callers that are authenticated, or have signed in from the same address recently.
    Recognized,
    /// For all other callers.
    Unrecognized,
}

/// Runs bcrypt on a limited number of threads.
pub struct Passwords {
    threads: Arc<Semaphore>,
    /// Acquired by the unrecognized lane before a thread, and held as long as the thread.
    unrecognized: Arc<Semaphore>,
    recognized_waiting: Semaphore,
    unrecognized_waiting: Semaphore,
    refusals: RefusalCounters,
}

impl Passwords {
    pub fn new(threads_max: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads_max)),
            unrecognized: Arc::new(Semaphore::new(threads_max)),
            recognized_waiting: Semaphore::new(threads_max * RECOGNIZED_WAITING_PER_THREAD_MAX),
            unrecognized_waiting: Semaphore::new(threads_max * UNRECOGNIZED_WAITING_PER_THREAD_MAX),
            refusals: RefusalCounters::new("password threads"),
        }
    }

    /// Runs `work` on a thread and returns its result.
    ///
    /// Fails with `Exhausted` if too many passwords wait in the lane, or no thread is free within 5 s.
    pub async fn on_thread<T: Send + 'static>(
        &self,
        lane: Lane,
        work: impl FnOnce() -> Result<T, bcrypt::BcryptError> + Send + 'static,
    ) -> Result<T> {
        let busy = |refusal| {
            self.refusals.count(refusal);
            Error::Exhausted("too many concurrent password checks; try again".to_owned())
        };
        let waiting = match lane {
            Lane::Recognized => &self.recognized_waiting,
            Lane::Unrecognized => &self.unrecognized_waiting,
        };
        let _waiting = waiting.try_acquire().map_err(|_| busy(Refusal::Total))?;
        let permits = async {
            let of_lane = match lane {
                Lane::Recognized => None,
                Lane::Unrecognized => Some(Arc::clone(&self.unrecognized).acquire_owned().await),
            };
            (of_lane, Arc::clone(&self.threads).acquire_owned().await)
        };
        let permits = timeout(WAIT_MAX, permits).await.map_err(|_| busy(Refusal::Wait))?;
        tokio::task::spawn_blocking(move || {
            // The work continues if its caller disconnects, so it keeps the permits.
            let _permits = permits;
            work()
        })
        .await
        .map_err(|_| Error::Internal("the password thread panicked"))?
        .map_err(|_| Error::Internal("bcrypt"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;

    #[tokio::test]
    async fn recognized_lane_waits_for_one_password_of_a_full_unrecognized_lane() {
        let passwords = Arc::new(Passwords::new(1));
        let done = Arc::new(Mutex::new(Vec::new()));
        let (finish, finished) = mpsc::channel();
        let finished = Arc::new(Mutex::new(finished));
        let begin = |lane| {
            let (passwords, done, finished) = (Arc::clone(&passwords), Arc::clone(&done), Arc::clone(&finished));
            tokio::spawn(async move {
                let work = move || {
                    finished.lock().unwrap().recv().unwrap();
                    done.lock().unwrap().push(lane);
                    Ok(())
                };
                passwords.on_thread(lane, work).await
            })
        };
        let mut checks: Vec<_> = (0..UNRECOGNIZED_WAITING_PER_THREAD_MAX).map(|_| begin(Lane::Unrecognized)).collect();
        while passwords.unrecognized_waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = begin(Lane::Unrecognized).await.unwrap();
        assert!(matches!(refused, Err(Error::Exhausted(_))), "{refused:?}");
        checks.push(begin(Lane::Recognized));
        while passwords.recognized_waiting.available_permits() == RECOGNIZED_WAITING_PER_THREAD_MAX {
            tokio::task::yield_now().await;
        }

        checks.iter().for_each(|_| finish.send(()).unwrap());
        for check in checks {
            check.await.unwrap().unwrap();
        }

        let done = done.lock().unwrap();
        assert_eq!(done.iter().position(|lane| *lane == Lane::Recognized), Some(1), "{done:?}");
    }
}
