//! What a session is doing, as its user and the probe of the database see it.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::task::AbortHandle;

/// How long a suspect session must have waited for a response before its backend is looked at.
const SUSPECT_WAIT_MIN: Duration = Duration::from_secs(2);

/// The activity of a session, and the means to close its connection.
#[derive(Debug)]
pub(super) struct SessionActivity {
    /// The process id of the backend.
    pub(super) pid: i32,
    /// When the server of the backend started. It distinguishes the servers of a connection string with several hosts.
    pub(super) server_start_time: SystemTime,
    /// The task that reads and writes the connection.
    connection: AbortHandle,
    /// Statements whose callers wait for the response now.
    awaited: AtomicU32,
    /// Responses received.
    responses: AtomicU32,
    /// The latest suspicion after which the connection has proved to work.
    suspicion: AtomicU32,
    /// The responses when the session was first seen to wait for the next one, and when that was.
    waiting: Mutex<Option<(u32, Instant)>>,
}

impl SessionActivity {
    pub(super) fn new(pid: i32, server_start_time: SystemTime, connection: AbortHandle, suspicion: u32) -> Self {
        Self {
            pid,
            server_start_time,
            connection,
            awaited: AtomicU32::new(0),
            responses: AtomicU32::new(0),
            suspicion: AtomicU32::new(suspicion),
            waiting: Mutex::default(),
        }
    }

    /// Counts a statement as awaited until the guard is dropped.
    pub(super) fn await_response(&self) -> Awaited<'_> {
        self.awaited.fetch_add(1, Ordering::Relaxed);
        Awaited(self)
    }

    pub(super) fn count_response(&self) {
        self.responses.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn responses(&self) -> u32 {
        self.responses.load(Ordering::Relaxed)
    }

    pub(super) fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Relaxed) > 0
    }

    /// Closes the connection at once. Statements in flight fail as those of a lost connection.
    pub(super) fn close(&self) {
        self.connection.abort();
    }

    pub(super) fn suspicion(&self) -> u32 {
        self.suspicion.load(Ordering::Relaxed)
    }

    /// Notes that the connection has worked since this suspicion.
    pub(super) fn trust(&self, suspicion: u32) {
        self.suspicion.store(suspicion, Ordering::Relaxed);
    }

    /// Returns whether the session has waited for the same response for 2 s, as seen by calls of this method.
    pub(super) fn has_waited_long(&self, now: Instant) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let responses = self.responses();
        if !self.is_awaited() {
            *waiting = None;
            return false;
        }
        match *waiting {
            Some((at, since)) if at == responses => now.duration_since(since) >= SUSPECT_WAIT_MIN,
            _ => {
                *waiting = Some((responses, now));
                false
            }
        }
    }
}

/// A statement whose caller waits for the response.
pub(super) struct Awaited<'a>(&'a SessionActivity);

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        self.0.awaited.fetch_sub(1, Ordering::Relaxed);
    }
}
