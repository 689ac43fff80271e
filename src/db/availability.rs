//! What is known of the database's availability. The probe and the pools share it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tokio::sync::{Notify, watch};

/// What works, according to the latest probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// The database answers.
    pub reads: bool,
    /// The database answers and accepts writes.
    pub writes: bool,
}

/// The state that the probe and the pools share.
#[derive(Debug)]
pub(super) struct Availability {
    /// Whether connections can be made.
    up: watch::Sender<bool>,
    /// Notified when the next probe is to run at once.
    probe_now: Notify,
    /// Whether the latest write probe succeeded.
    writable: AtomicBool,
    /// Whether a session has failed as read-only since the last write probe.
    read_only_reported: AtomicBool,
    /// Sessions of earlier generations are closed instead of used.
    generation: AtomicU32,
}

impl Default for Availability {
    fn default() -> Self {
        Self {
            up: watch::Sender::new(true),
            probe_now: Notify::new(),
            writable: AtomicBool::new(true),
            read_only_reported: AtomicBool::new(false),
            generation: AtomicU32::new(0),
        }
    }
}

impl Availability {
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
        self.request_probe();
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
}
