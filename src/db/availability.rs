//! What is known of the database's availability. The probe and the pools share it.

use std::{
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::sync::{Notify, watch};

use super::activity::SessionActivity;

/// What works, according to the latest probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// The database responds.
    pub reads: bool,
    /// The database responds and accepts writes.
    pub writes: bool,
}

/// The state that the probe and the pools share.
#[derive(Debug)]
pub(super) struct Availability {
    /// Whether connections can be made.
    up: watch::Sender<bool>,
    /// Whether the schema is known to be that of this program. Until then, no call gets a connection.
    prepared: AtomicBool,
    /// Notified when the next probe is to run at once.
    probe_now: Notify,
    /// The same for write probes.
    write_probe_now: Notify,
    /// Whether the latest write probe succeeded.
    writable: AtomicBool,
    /// Whether a session has failed as read-only since the last write probe.
    read_only_reported: AtomicBool,
    /// Sessions of earlier generations are closed instead of used.
    generation: AtomicU32,
    /// Incremented when a lost connection makes others suspect: they may be lost as well.
    suspicion: AtomicU32,
    /// The sessions of all pools.
    sessions: Mutex<Vec<Weak<SessionActivity>>>,
    /// Responses that sessions received which are closed now.
    past_responses: AtomicU64,
}

impl Availability {
    pub(super) fn new(prepared: bool) -> Self {
        Self {
            up: watch::Sender::new(true),
            prepared: AtomicBool::new(prepared),
            probe_now: Notify::new(),
            write_probe_now: Notify::new(),
            writable: AtomicBool::new(true),
            read_only_reported: AtomicBool::new(false),
            generation: AtomicU32::new(0),
            suspicion: AtomicU32::new(0),
            sessions: Mutex::default(),
            past_responses: AtomicU64::new(0),
        }
    }

    pub(super) fn is_prepared(&self) -> bool {
        self.prepared.load(Ordering::Relaxed)
    }

    pub(super) fn set_prepared(&self) {
        self.prepared.store(true, Ordering::Relaxed);
        self.probe_now.notify_one();
        self.write_probe_now.notify_one();
    }

    /// Returns whether connections can be made, as it changes.
    pub(super) fn watch_up(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }

    pub(super) fn set_up(&self, up: bool) {
        let changed = self.up.send_if_modified(|was| std::mem::replace(was, up) != up);
        match (changed, up) {
            (true, true) => tracing::info!("database became available"),
            (true, false) => tracing::warn!("database became unavailable"),
            (false, _) => {}
        }
    }

    /// Runs the next probe at once.
    pub(super) fn request_probe(&self) {
        self.probe_now.notify_one();
    }

    pub(super) async fn probe_requested(&self) {
        self.probe_now.notified().await;
    }

    pub(super) async fn write_probe_requested(&self) {
        self.write_probe_now.notified().await;
    }

    /// Returns whether the latest write probe succeeded.
    pub(super) fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }

    pub(super) fn set_writable(&self, writable: bool) {
        self.writable.store(writable, Ordering::Relaxed);
    }

    /// Requests a write probe: a session has failed as read-only.
    pub(super) fn report_read_only(&self) {
        self.read_only_reported.store(true, Ordering::Relaxed);
        self.write_probe_now.notify_one();
    }

    pub(super) fn has_read_only_report(&self) -> bool {
        self.read_only_reported.load(Ordering::Relaxed)
    }

    pub(super) fn clear_read_only_report(&self) {
        self.read_only_reported.store(false, Ordering::Relaxed);
    }

    /// Returns the generation of sessions that are made now.
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Retires all sessions that exist: pools close them instead of using them again.
    pub(super) fn retire_sessions(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    /// Adds a session of a pool.
    pub(super) fn register(&self, session: &Arc<SessionActivity>) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(session));
    }

    /// Keeps the count of a session that is closed.
    pub(super) fn unregister(&self, session: &SessionActivity) {
        self.past_responses.fetch_add(session.responses().into(), Ordering::Relaxed);
    }

    fn sessions(&self) -> Vec<Arc<SessionActivity>> {
        let sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.iter().filter_map(Weak::upgrade).collect()
    }

    /// Returns how many responses all sessions have received.
    pub(super) fn response_count(&self) -> u64 {
        let open: u64 = self.sessions().iter().map(|session| u64::from(session.responses())).sum();
        open + self.past_responses.load(Ordering::Relaxed)
    }

    /// Returns the latest suspicion. A session that has proved to work since then is not suspect.
    pub(super) fn suspicion(&self) -> u32 {
        self.suspicion.load(Ordering::Relaxed)
    }

    /// Makes all sessions suspect: pools validate them before they use them again.
    pub(super) fn suspect_sessions(&self) {
        self.suspicion.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the suspect sessions that have waited for the same response for 2 s, as seen by calls of this method.
    pub(super) fn waiting_suspects(&self) -> Vec<Arc<SessionActivity>> {
        let (now, suspicion) = (Instant::now(), self.suspicion());
        let mut sessions = self.sessions();
        sessions.retain(|session| session.suspicion() != suspicion && session.has_waited_long(now));
        sessions
    }

    /// Closes all sessions that wait for a response, and retires the others.
    pub(super) fn close_waiting_sessions(&self) {
        self.retire_sessions();
        self.sessions().iter().filter(|session| session.is_awaited()).for_each(|session| session.close());
    }
}
