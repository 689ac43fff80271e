//! Streams that nobody has to sign in for, by client: one may have no more on many connections than on a few.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::auth::throttle::subscriber;

/// Of one client at once. Behind one address there may be many replicas that watch our health.
const OPEN_STREAMS_PER_CLIENT_MAX: usize = 64;

/// How many each client has that has any.
#[derive(Clone, Default)]
pub(super) struct OpenStreams(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl OpenStreams {
    /// None: the client has as many as it may.
    pub fn enter(&self, client: IpAddr) -> Option<OpenStream> {
        let client = subscriber(client);
        let mut counts = self.lock();
        let count = counts.entry(client).or_default();
        if *count >= OPEN_STREAMS_PER_CLIENT_MAX {
            return None;
        }
        *count += 1;
        Some(OpenStream { all: self.clone(), client })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // The counts are whole whatever happened to a holder of the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One that is counted until it is dropped.
pub(super) struct OpenStream {
    all: OpenStreams,
    client: IpAddr,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut counts = self.all.lock();
        if let Some(count) = counts.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_counted_by_subscriber_and_nothing_is_kept_of_those_that_have_ended() {
        let streams = OpenStreams::default();
        let enter = |address: &str| streams.enter(address.parse().unwrap());
        let mut held: Vec<_> =
            (0..OPEN_STREAMS_PER_CLIENT_MAX).map(|nth| enter(&format!("2001:db8::{nth}")).unwrap()).collect();
        assert!(enter("2001:db8::ffff").is_none());
        held.push(enter("203.0.113.9").unwrap());
        held.remove(0);
        held.push(enter("2001:db8::ffff").unwrap());
        assert!(enter("2001:db8::ffff").is_none());
        held.clear();
        assert!(streams.lock().is_empty());
    }
}
