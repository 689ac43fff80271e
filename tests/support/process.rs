//! Processes and their directories.

use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    time::Instant,
};

use uuid::Uuid;

use super::{
    bounds::{HANG, TICK},
    scratch::scratch_dir,
};

/// Sends a signal. Returns whether the process exists.
#[must_use]
pub fn signal(pid: u32, signal: i32) -> bool {
    assert!(pid > 1);
    // SAFETY: kill takes two numbers. The process was started by the test, or by a process that the test started.
    unsafe { libc::kill(pid as i32, signal) == 0 }
}

/// Polls a condition until it holds. Panics after [`HANG`]; `what` describes the condition.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < HANG, "timed out waiting until {what}");
        std::thread::sleep(TICK);
    }
}

/// A temporary directory. Dropping it also removes the cluster of a service in it, which may be stored elsewhere.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        let dir = scratch_dir().join(format!("issue-tracker-test-{}", Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Returns the pid of the embedded PostgreSQL's main process, if it is running.
    pub fn server_pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.path("data/cluster/postmaster.pid")).ok()?;
        let pid = text.lines().next()?.parse().ok()?;
        // A killed server leaves its pid file, and another process may have the pid now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let cluster = self.path("data/cluster").canonicalize().ok()?;
        String::from_utf8_lossy(&command).contains(cluster.to_str()?).then_some(pid)
    }
}

impl Deref for Dir {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // The PostgreSQL of a killed service stops shortly after it.
        for _ in 0..500 {
            if self.server_pid().is_none() {
                break;
            }
            std::thread::sleep(TICK);
        }
        let _ = fs::remove_dir_all(self.path("data/cluster").canonicalize().unwrap_or_default());
        let _ = fs::remove_dir_all(&self.0);
    }
}
