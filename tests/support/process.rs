//! Processes and what they leave on disk.

use std::{
    fs,
    ops::Deref,
    path::{Path, PathBuf},
    time::Instant,
};

use uuid::Uuid;

use super::bounds::{HANG, TICK};

/// Tells whether there was such a process.
#[must_use]
pub fn signal(pid: u32, signal: i32) -> bool {
    assert!(pid > 1);
    // SAFETY: kill takes two numbers; the pid is that of a process that the test started, or of one that this started.
    unsafe { libc::kill(pid as i32, signal) == 0 }
}

pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < HANG, "waited in vain until {what}");
        std::thread::sleep(TICK);
    }
}

/// A directory that goes away with the test, and with everything that a service's database in it has elsewhere.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("issue-tracker-test-{}", Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The main process of the service's database, if one is at work.
    pub fn server_pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.path("data/cluster/postmaster.pid")).ok()?;
        let pid = text.lines().next()?.parse().ok()?;
        // A dead one leaves its file, and its number may be somebody else's by now.
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
        // A server whose service was killed takes a moment to leave.
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
