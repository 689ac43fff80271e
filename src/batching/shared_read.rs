//! Shared reads: concurrent reads of the same key are executed once, for all callers that wait for the next read.
//!
//! A caller never joins the read in flight, which may not see what the caller has just written.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::{BoxFuture, join_all};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Reads the value of a key.
pub type Read<K, V> = Box<dyn Fn(K) -> BoxFuture<'static, Result<V>> + Send + Sync>;

type Waiting<V> = Vec<oneshot::Sender<Result<V>>>;

/// Shares reads with keys `K` and values `V`. The number of waiting callers is bounded by the caller of this type.
pub struct SharedReads<K, V> {
    inner: Arc<Inner<K, V>>,
}

struct Inner<K, V> {
    read: Read<K, V>,
    /// The keys of the reads in flight, each with the callers that wait for the next read of the key.
    in_flight: Mutex<HashMap<K, Waiting<V>>>,
}

impl<K, V> Inner<K, V> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Waiting<V>>> {
        // A panic of another holder leaves the map valid.
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, V> SharedReads<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    pub fn new(read: Read<K, V>) -> Self {
        Self { inner: Arc::new(Inner { read, in_flight: Mutex::default() }) }
    }

    /// Returns the value of the key as of some time after the call.
    pub async fn read(&self, key: K) -> Result<V> {
        let outcome = match self.inner.lock().entry(key.clone()) {
            Entry::Occupied(mut waiting) => {
                let (sender, outcome) = oneshot::channel();
                waiting.get_mut().push(sender);
                Some(outcome)
            }
            Entry::Vacant(idle) => {
                idle.insert(Waiting::new());
                None
            }
        };
        match outcome {
            Some(outcome) => outcome.await.map_err(|_| Error::Internal("a read ended without an outcome"))?,
            None => ReadInFlight { inner: Arc::clone(&self.inner), key }.read().await,
        }
    }
}

/// A read in flight. When it ends or is cancelled, the callers that have arrived meanwhile share the next one.
struct ReadInFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    inner: Arc<Inner<K, V>>,
    key: K,
}

impl<K, V> ReadInFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    async fn read(self) -> Result<V> {
        (self.inner.read)(self.key.clone()).await
    }

    /// Reads for these callers. Cancelled when all of them have stopped waiting.
    async fn read_for(self, mut callers: Waiting<V>) {
        let outcome = {
            let mut all_gone = pin!(join_all(callers.iter_mut().map(oneshot::Sender::closed)));
            tokio::select! {
                outcome = self.read() => outcome,
                _ = &mut all_gone => return,
            }
        };
        let last = callers.pop();
        // Sending fails if the caller has stopped waiting.
        for caller in callers {
            let _ = caller.send(outcome.clone());
        }
        if let Some(caller) = last {
            let _ = caller.send(outcome);
        }
    }
}

impl<K, V> Drop for ReadInFlight<K, V>
where
    K: Clone + Eq + Hash + Send + 'static,
    V: Clone + Send + 'static,
{
    fn drop(&mut self) {
        let mut in_flight = self.inner.lock();
        let mut callers = in_flight.get_mut(&self.key).map(std::mem::take).unwrap_or_default();
        callers.retain(|caller| !caller.is_closed());
        // Without a runtime the process is ending, and no caller waits.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) if !callers.is_empty() => {
                // A runtime that is shutting down drops the spawned future at once, which calls this function again.
                drop(in_flight);
                let next = Self { inner: Arc::clone(&self.inner), key: self.key.clone() };
                runtime.spawn(next.read_for(callers));
            }
            Ok(_) | Err(_) => drop(in_flight.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests;
