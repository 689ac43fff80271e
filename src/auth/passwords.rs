//! The threads that check and hash passwords, and the lines in front of them.

use std::{sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::timeout};

use crate::error::{Error, Result};

/// How long a password waits to be checked.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// How many may wait for each that is checked: what can be done with in that time, at a quarter of a second each.
/// Strangers do not take the places of those who have signed in; and however long a check takes, only one stranger for
/// each thread is ever in front of them.
const STRANGERS_WAITING_PER_THREAD_MAX: usize = 8;
const KNOWN_WAITING_PER_THREAD_MAX: usize = 12;

/// Where a password waits to be checked or hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// Of those who have signed in, now or lately.
    Known,
    /// Of everybody else.
    Strangers,
}

pub struct Passwords {
    threads: Arc<Semaphore>,
    /// Taken by strangers before they wait for a thread with the others, and kept as long as they have it.
    strangers: Arc<Semaphore>,
    known_waiting: Semaphore,
    strangers_waiting: Semaphore,
}

impl Passwords {
    pub fn new(threads_max: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads_max)),
            strangers: Arc::new(Semaphore::new(threads_max)),
            known_waiting: Semaphore::new(threads_max * KNOWN_WAITING_PER_THREAD_MAX),
            strangers_waiting: Semaphore::new(threads_max * STRANGERS_WAITING_PER_THREAD_MAX),
        }
    }

    /// `Exhausted`: too many wait in this line already, or its turn does not come in time.
    pub async fn on_thread<T: Send + 'static>(
        &self,
        line: Line,
        work: impl FnOnce() -> Result<T, bcrypt::BcryptError> + Send + 'static,
    ) -> Result<T> {
        let busy = || Error::Exhausted("too many passwords are being checked; try again".to_owned());
        let waiting = match line {
            Line::Known => &self.known_waiting,
            Line::Strangers => &self.strangers_waiting,
        };
        let _waiting = waiting.try_acquire().map_err(|_| busy())?;
        let turn = async {
            let stranger = match line {
                Line::Known => None,
                Line::Strangers => Some(Arc::clone(&self.strangers).acquire_owned().await),
            };
            (stranger, Arc::clone(&self.threads).acquire_owned().await)
        };
        let turn = timeout(WAIT_MAX, turn).await.map_err(|_| busy())?;
        tokio::task::spawn_blocking(move || {
            // The work goes on when its caller has gone away, and so does its turn.
            let _turn = turn;
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
    async fn strangers_who_fill_their_line_are_ahead_of_the_known_with_one_only() {
        let passwords = Arc::new(Passwords::new(1));
        let done = Arc::new(Mutex::new(Vec::new()));
        let (finish, finished) = mpsc::channel();
        let finished = Arc::new(Mutex::new(finished));
        let begin = |line| {
            let (passwords, done, finished) = (Arc::clone(&passwords), Arc::clone(&done), Arc::clone(&finished));
            tokio::spawn(async move {
                let work = move || {
                    finished.lock().unwrap().recv().unwrap();
                    done.lock().unwrap().push(line);
                    Ok(())
                };
                passwords.on_thread(line, work).await
            })
        };
        let mut checks: Vec<_> = (0..STRANGERS_WAITING_PER_THREAD_MAX).map(|_| begin(Line::Strangers)).collect();
        while passwords.strangers_waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let refused = begin(Line::Strangers).await.unwrap();
        assert!(matches!(refused, Err(Error::Exhausted(_))), "{refused:?}");
        checks.push(begin(Line::Known));
        while passwords.known_waiting.available_permits() == KNOWN_WAITING_PER_THREAD_MAX {
            tokio::task::yield_now().await;
        }

        checks.iter().for_each(|_| finish.send(()).unwrap());
        for check in checks {
            check.await.unwrap().unwrap();
        }

        let done = done.lock().unwrap();
        assert_eq!(done.iter().position(|line| *line == Line::Known), Some(1), "{done:?}");
    }
}
