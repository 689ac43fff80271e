//! Equal reads at the same time, made once: those that come while one is under way share the next.
//!
//! They do not share the one that is under way, which may not have what their callers have just written.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Reads what a key stands for.
pub type Read<K, V> = Box<dyn Fn(K) -> BoxFuture<'static, Result<V>> + Send + Sync>;

type Waiting<V> = Vec<oneshot::Sender<Result<V>>>;

/// Puts equal reads together. How many may wait is bounded by who calls.
pub struct Flights<K, V> {
    shared: Arc<Shared<K, V>>,
}

struct Shared<K, V> {
    read: Read<K, V>,
    /// The keys that are being read, each with those who want it read again.
    flying: Mutex<HashMap<K, Waiting<V>>>,
}

impl<K, V> Shared<K, V> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Waiting<V>>> {
        // The map is whole whatever happened to a holder of the lock.
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    pub fn new(read: Read<K, V>) -> Self {
        Self { shared: Arc::new(Shared { read, flying: Mutex::default() }) }
    }

    /// What the key stands for, at some time after the call.
    pub async fn read(&self, key: K) -> Result<V> {
        let outcome = match self.shared.lock().entry(key.clone()) {
            Entry::Occupied(mut flying) => {
                let (sender, outcome) = oneshot::channel();
                flying.get_mut().push(sender);
                Some(outcome)
            }
            Entry::Vacant(idle) => {
                idle.insert(Waiting::new());
                None
            }
        };
        match outcome {
            Some(outcome) => outcome.await.map_err(|_| Error::Internal("a read ended without an outcome"))?,
            None => Flight { shared: Arc::clone(&self.shared), key }.read().await,
        }
    }
}

/// A read under way. When it ends, or its caller goes away, those who have come meanwhile get theirs.
struct Flight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    shared: Arc<Shared<K, V>>,
    key: K,
}

impl<K, V> Flight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    async fn read(self) -> Result<V> {
        (self.shared.read)(self.key.clone()).await
    }

    /// As long as one of them waits for it.
    async fn read_for(self, mut callers: Waiting<V>) {
        let outcome = {
            let mut gone = pin!(join_all(callers.iter_mut().map(oneshot::Sender::closed)));
            tokio::select! {
                outcome = self.read() => outcome,
                _ = &mut gone => return,
            }
        };
        let last = callers.pop();
        // A caller that has gone away needs no answer.
        for caller in callers {
            let _ = caller.send(outcome.clone());
        }
        if let Some(caller) = last {
            let _ = caller.send(outcome);
        }
    }
}

impl<K, V> Drop for Flight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    fn drop(&mut self) {
        let mut flying = self.shared.lock();
        let mut callers = flying.get_mut(&self.key).map(std::mem::take).unwrap_or_default();
        callers.retain(|caller| !caller.is_closed());
        // Without a runtime it ends, and nobody waits any more.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !callers.is_empty() => {
                // A runtime that is ending drops what it is given at once, which comes back to here.
                drop(flying);
                let next = Self { shared: Arc::clone(&self.shared), key: self.key.clone() };
                runtime.spawn(next.read_for(callers));
            }
            Ok(_) | Err(_) => drop(flying.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;

    const READ: Duration = Duration::from_secs(1);

    /// Answers the number of the read, after a second; key 13 panics, key 14 fails.
    fn counting() -> (Arc<AtomicUsize>, Arc<Flights<u32, usize>>) {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        let flights = Flights::new(Box::new(move |key| {
            let nth = counter.fetch_add(1, Ordering::SeqCst) + 1;
            Box::pin(async move {
                tokio::time::sleep(READ).await;
                assert_ne!(key, 13, "a read panics");
                if key == 14 { Err(Error::Unavailable) } else { Ok(nth) }
            })
        }));
        (count, Arc::new(flights))
    }

    fn spawn(flights: &Arc<Flights<u32, usize>>, key: u32) -> tokio::task::JoinHandle<Result<usize>> {
        let flights = Arc::clone(flights);
        tokio::spawn(async move { flights.read(key).await })
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_during_a_read_shares_the_next_and_never_the_one_under_way() {
        let (count, flights) = counting();
        let first = spawn(&flights, 1);
        tokio::time::sleep(READ / 2).await;
        let later: Vec<_> = (0..10).map(|_| spawn(&flights, 1)).collect();
        assert_eq!(first.await.unwrap().unwrap(), 1);
        for caller in later {
            assert_eq!(caller.await.unwrap().unwrap(), 2);
        }
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn different_keys_do_not_wait_for_each_other() {
        let (_, flights) = counting();
        let started = tokio::time::Instant::now();
        let callers: Vec<_> = (20..30).map(|key| spawn(&flights, key)).collect();
        for caller in callers {
            caller.await.unwrap().unwrap();
        }
        assert_eq!(started.elapsed(), READ);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_who_goes_away_takes_nobody_along() {
        let (_, flights) = counting();
        let first = spawn(&flights, 1);
        tokio::time::sleep(READ / 2).await;
        let (gone, second) = (spawn(&flights, 1), spawn(&flights, 1));
        tokio::task::yield_now().await;
        first.abort();
        gone.abort();
        assert_eq!(second.await.unwrap().unwrap(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_read_for_nobody_and_nothing_is_remembered() {
        let (count, flights) = counting();
        let first = spawn(&flights, 1);
        tokio::time::sleep(READ / 2).await;
        let gone = spawn(&flights, 1);
        tokio::task::yield_now().await;
        gone.abort();
        assert_eq!(first.await.unwrap().unwrap(), 1);
        tokio::time::sleep(READ * 3).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        assert!(flights.shared.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_shared_read_ends_when_the_last_of_its_callers_goes_away() {
        let (_, flights) = counting();
        let first = spawn(&flights, 1);
        tokio::time::sleep(READ / 2).await;
        let shared = [spawn(&flights, 1), spawn(&flights, 1)];
        first.await.unwrap().unwrap();
        tokio::time::sleep(READ / 2).await;
        shared.iter().for_each(tokio::task::JoinHandle::abort);
        tokio::time::sleep(READ / 4).await;
        assert!(flights.shared.lock().is_empty(), "the read has ended before its time");
    }

    #[test]
    fn a_runtime_that_ends_does_not_wait_for_those_who_wait() {
        let (_, flights) = counting();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let (_first, _second) = (spawn(&flights, 1), spawn(&flights, 1));
            tokio::time::sleep(READ / 10).await;
        });
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            drop(runtime);
            sender.send(()).unwrap();
        });
        ended.recv_timeout(READ * 10).expect("the runtime has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_and_a_panic_are_told_and_the_next_read_is_a_new_one() {
        let (_, flights) = counting();
        for key in [13, 14] {
            let first = spawn(&flights, key);
            tokio::time::sleep(READ / 2).await;
            let second = spawn(&flights, key);
            assert!(!matches!(first.await, Ok(Ok(_))));
            assert!(second.await.unwrap().is_err());
            assert!(flights.shared.lock().is_empty());
        }
    }
}
