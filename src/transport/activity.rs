//! The calls that are in flight on a connection, and since when it has had none.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::client_address::ClientAddress;

/// Concurrent unauthenticated calls of one client on one connection: logins, health checks, reflection.
///
/// Where a proxy puts many clients on one connection, no client uses up the calls of the others.
pub(super) const UNAUTHENTICATED_CALLS_PER_CLIENT_MAX: usize = 16;
/// How long a call may take to report by when it makes progress.
pub(super) const CALL_REPORT_MAX: Duration = Duration::from_secs(5);
/// Longer than the process runs, and short enough to be added to the clock.
const UNBOUNDED: Duration = Duration::from_secs(30 * 365 * 24 * 3_600);

/// The calls of one connection.
pub(super) struct Activity {
    calls: Mutex<Calls>,
    /// Notified when the connection must close to make room for another one.
    pub evicted: Notify,
    /// Notified when a call has ended.
    pub call_ended: Notify,
}

struct Calls {
    next_id: u64,
    /// When each call in flight must have ended or made progress.
    progress_deadlines: HashMap<u64, Instant>,
    /// When the last call ended or the connection was opened.
    idle_since: Instant,
    authenticated: HashSet<u64>,
    /// When the last authenticated call ended or the connection was opened.
    unauthenticated_since: Instant,
    /// The clients of the unauthenticated calls in flight.
    unauthenticated: HashMap<u64, IpAddr>,
    unauthenticated_max: usize,
}

/// Whether a connection has calls in flight.
pub(super) enum State {
    /// None since this time.
    Idle(Instant),
    /// Some, the first of which must have ended or made progress by this time.
    Busy(Instant),
}

impl Activity {
    /// Returns the activity of a connection that was opened now. All clients on it together may have
    /// `unauthenticated_max` concurrent unauthenticated calls.
    pub fn new(unauthenticated_max: usize) -> Self {
        let now = Instant::now();
        let calls = Calls {
            next_id: 0,
            progress_deadlines: HashMap::new(),
            idle_since: now,
            authenticated: HashSet::new(),
            unauthenticated_since: now,
            unauthenticated: HashMap::new(),
            unauthenticated_max,
        };
        Self { calls: Mutex::new(calls), evicted: Notify::new(), call_ended: Notify::new() }
    }

    /// Begins a call. It ends when the guard is dropped.
    pub fn begin(self: &Arc<Self>, client: ClientAddress) -> CallGuard {
        let mut calls = self.lock();
        let id = calls.next_id;
        calls.next_id += 1;
        calls.progress_deadlines.insert(id, Instant::now() + CALL_REPORT_MAX);
        CallGuard(CallHandle { activity: Arc::clone(self), id, client })
    }

    pub fn state(&self) -> State {
        let calls = self.lock();
        calls.progress_deadlines.values().min().map_or(State::Idle(calls.idle_since), |first| State::Busy(*first))
    }

    /// Returns when the last of the calls in flight must have ended or made progress.
    pub fn last_progress_deadline(&self) -> Option<Instant> {
        self.lock().progress_deadlines.values().max().copied()
    }

    /// Returns since when the connection has had no authenticated call: `now` if one is in flight.
    pub fn unauthenticated_since(&self, now: Instant) -> Instant {
        let calls = self.lock();
        if calls.authenticated.is_empty() { calls.unauthenticated_since } else { now }
    }

    fn lock(&self) -> MutexGuard<'_, Calls> {
        // Each critical section leaves the state consistent, even if it panics.
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is in flight until this is dropped.
pub(super) struct CallGuard(CallHandle);

impl CallGuard {
    pub fn handle(&self) -> &CallHandle {
        &self.0
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        let CallHandle { activity, id, .. } = &self.0;
        let mut calls = activity.lock();
        calls.progress_deadlines.remove(id);
        calls.unauthenticated.remove(id);
        if calls.authenticated.remove(id) {
            calls.unauthenticated_since = Instant::now();
        }
        if calls.progress_deadlines.is_empty() {
            calls.idle_since = Instant::now();
        }
        drop(calls);
        activity.call_ended.notify_one();
    }
}

/// One call of a connection, from the first header of the request to the last byte of the response.
///
/// The extensions of each request contain one. It has no effect once the call has ended.
#[derive(Clone)]
pub struct CallHandle {
    activity: Arc<Activity>,
    id: u64,
    client: ClientAddress,
}

impl CallHandle {
    /// Returns the address of the client that makes the call.
    pub fn client_address(&self) -> ClientAddress {
        self.client
    }

    /// Counts the call as an unauthenticated one until it ends.
    ///
    /// Returns `false` and does not count it if its client has 16 such calls on this connection, or if all clients of the
    /// connection together have as many as the connection allows.
    pub fn try_enter_unauthenticated(&self) -> bool {
        let client = self.client.network();
        let mut calls = self.activity.lock();
        let of_client = calls.unauthenticated.values().filter(|other| **other == client).count();
        let is_below_limits =
            of_client < UNAUTHENTICATED_CALLS_PER_CLIENT_MAX && calls.unauthenticated.len() < calls.unauthenticated_max;
        if is_below_limits && calls.progress_deadlines.contains_key(&self.id) {
            calls.unauthenticated.insert(self.id, client);
        }
        is_below_limits
    }

    /// Reports that the call has valid credentials: connections with such calls are not evicted.
    pub fn mark_authenticated(&self) {
        let mut calls = self.activity.lock();
        if calls.progress_deadlines.contains_key(&self.id) {
            calls.authenticated.insert(self.id);
        }
    }

    /// Sets when the call must have ended or reported again. After this its client is considered to not read the response,
    /// and the connection is closed.
    pub fn expect_progress_by(&self, deadline: Instant) {
        if let Some(progress_deadline) = self.activity.lock().progress_deadlines.get_mut(&self.id) {
            *progress_deadline = deadline;
        }
    }

    /// Reports that the call waits for the server, for an unlimited time.
    pub fn expect_no_progress(&self) {
        self.expect_progress_by(Instant::now() + UNBOUNDED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unauthenticated_calls_are_limited_per_client_network_and_per_connection() {
        let activity = Arc::new(Activity::new(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX + 2));
        let enter = |address: &str| {
            let call = activity.begin(ClientAddress(address.parse().unwrap()));
            call.handle().try_enter_unauthenticated().then_some(call)
        };
        let mut held: Vec<CallGuard> =
            (0..UNAUTHENTICATED_CALLS_PER_CLIENT_MAX).map(|nth| enter(&format!("2001:db8::{nth}")).unwrap()).collect();
        assert!(enter("2001:db8::ffff").is_none());
        held.push(enter("203.0.113.9").unwrap());
        held.push(enter("2001:db8:0:1::").unwrap());
        assert!(enter("203.0.113.10").is_none(), "the limit of the connection");
        held.remove(0);
        assert!(enter("2001:db8::ffff").is_some());
        held.clear();
        assert!(activity.lock().unauthenticated.is_empty());
    }

    #[test]
    fn a_handle_of_an_ended_call_has_no_effect() {
        let activity = Arc::new(Activity::new(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX));
        let call = activity.begin(ClientAddress("203.0.113.9".parse().unwrap()));
        let handle = call.handle().clone();
        drop(call);
        handle.expect_no_progress();
        handle.mark_authenticated();
        handle.try_enter_unauthenticated();
        assert!(matches!(activity.state(), State::Idle(_)));
        let calls = activity.lock();
        assert!(calls.authenticated.is_empty() && calls.unauthenticated.is_empty());
    }
}
