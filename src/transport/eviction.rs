//! The connections that are open, and which of them close when a new one finds no capacity.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};

use super::activity::{Activity, State};

/// How long a new connection waits for an evicted one to close.
const CAPACITY_WAIT_MAX: Duration = Duration::from_secs(1);
/// The part of the evictable connections that one eviction closes.
const EVICTED_PERCENT: usize = 10;
/// A connection is evictable once it has been idle for this long…
pub(super) const EVICTABLE_IDLE_MIN: Duration = Duration::from_secs(1);
/// …or without an authenticated call for this long, which is longer than a login takes. However often unauthenticated
/// calls begin and end, they do not keep a connection.
pub(super) const EVICTABLE_UNAUTHENTICATED_MIN: Duration = Duration::from_secs(10);

/// The open connections, up to a maximum.
pub(super) struct ConnectionRegistry {
    permits: Arc<Semaphore>,
    connections: Mutex<HashMap<u64, Arc<Activity>>>,
    next_id: AtomicU64,
}

impl ConnectionRegistry {
    pub fn new(connections_max: usize) -> Self {
        Self {
            permits: Arc::new(Semaphore::new(connections_max)),
            connections: Mutex::default(),
            next_id: AtomicU64::new(0),
        }
    }

    /// Returns a permit for one more connection, and evicts connections if there is none.
    ///
    /// Returns `None` if no permit is returned within 1 s.
    pub async fn acquire_permit(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.permits).try_acquire_owned() {
            return Some(permit);
        }
        self.evict();
        timeout(CAPACITY_WAIT_MAX, Arc::clone(&self.permits).acquire_owned()).await.ok()?.ok()
    }

    /// Evicts 10 % of the evictable connections, at least one: those that have been evictable for longest.
    pub fn evict(&self) {
        let now = Instant::now();
        let mut evictable: Vec<(Instant, Arc<Activity>)> = self
            .lock()
            .values()
            .filter_map(|activity| Some((evictable_since(activity, now)?, Arc::clone(activity))))
            .collect();
        evictable.sort_unstable_by_key(|(since, _)| *since);
        let count = (evictable.len() * EVICTED_PERCENT).div_ceil(100);
        evictable.into_iter().take(count).for_each(|(_, activity)| activity.evicted.notify_one());
    }

    /// Registers a connection until the result is dropped.
    pub fn register(&self, activity: Activity) -> RegisteredConnection<'_> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let activity = Arc::new(activity);
        self.lock().insert(id, Arc::clone(&activity));
        RegisteredConnection { registry: self, id, activity }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Activity>>> {
        // The map is consistent even if a holder of the lock has panicked.
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns since when the connection has been idle or without an authenticated call, or `None` if that is too short for it
/// to be evictable.
pub(super) fn evictable_since(activity: &Activity, now: Instant) -> Option<Instant> {
    let unauthenticated_since = activity.unauthenticated_since(now);
    if now.duration_since(unauthenticated_since) >= EVICTABLE_UNAUTHENTICATED_MIN {
        return Some(unauthenticated_since);
    }
    match activity.state() {
        State::Idle(since) => (now.duration_since(since) >= EVICTABLE_IDLE_MIN).then_some(since),
        State::Busy(_) => None,
    }
}

/// A connection that is registered until this is dropped.
pub(super) struct RegisteredConnection<'a> {
    registry: &'a ConnectionRegistry,
    id: u64,
    pub activity: Arc<Activity>,
}

impl Drop for RegisteredConnection<'_> {
    fn drop(&mut self) {
        self.registry.lock().remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::time::sleep;

    use super::*;
    use crate::transport::{activity::UNAUTHENTICATED_CALLS_PER_CLIENT_MAX, client_address::ClientAddress};

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_not_evictable_during_and_shortly_after_its_authenticated_calls() {
        let activity = Arc::new(Activity::new(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX));
        let begin = || activity.begin(ClientAddress(Ipv4Addr::LOCALHOST.into()));
        let is_evictable = || evictable_since(&activity, Instant::now()).is_some();
        let call = begin();
        call.handle().mark_authenticated();
        sleep(2 * EVICTABLE_UNAUTHENTICATED_MIN).await;
        assert!(!is_evictable());
        drop(call);
        assert!(!is_evictable(), "the call has just ended");
        sleep(EVICTABLE_IDLE_MIN).await;
        assert!(is_evictable());

        // Unauthenticated calls, one after another.
        let began = Instant::now();
        while began.elapsed() < EVICTABLE_UNAUTHENTICATED_MIN - EVICTABLE_IDLE_MIN {
            drop(begin());
            assert!(!is_evictable(), "{:?}", began.elapsed());
            sleep(EVICTABLE_IDLE_MIN / 2).await;
        }
        sleep(EVICTABLE_IDLE_MIN / 2).await;
        drop(begin());
        assert!(is_evictable());
        let _unauthenticated = begin();
        assert!(is_evictable());
    }
}
