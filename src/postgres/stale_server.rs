//! The server of an earlier service: one that is still shutting down, or a stale `postmaster.pid`.
//!
//! PostgreSQL guards a cluster by that file and by a shared memory segment. It recovers by itself unless another process of
//! the same user, or a zombie, has the pid in the file; then it would refuse to start until the file is removed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tracing::{info, warn};

use super::process::{self, TICK};

/// Time before the first signal: the kernel sends SIGINT to a server whose service was killed.
const FAST_AFTER: Duration = Duration::from_secs(3);
/// Time before an immediate shutdown, which skips the checkpoint of a fast one and leaves the rest to recovery.
const IMMEDIATE_AFTER: Duration = Duration::from_secs(12);
const GONE_AFTER_MAX: Duration = Duration::from_secs(30);
/// Program of every process of a server.
const PROGRAM: &str = "postgres";

/// How a process relates to a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// A postgres whose working directory is the cluster.
    Ours,
    /// Any other process, or a zombie, which holds no resources.
    Foreign,
    Gone,
}

/// Waits until no process of an earlier server uses the cluster, sends signals after [`FAST_AFTER`], then removes a
/// misleading `postmaster.pid`. `pause` waits and returns whether to cancel; the result is then false. Fails after
/// [`GONE_AFTER_MAX`].
pub(super) fn clear(cluster: &Path, pause: &dyn Fn(Duration) -> bool) -> anyhow::Result<bool> {
    let began = Instant::now();
    let mut sent = None;
    loop {
        let main = main_process(cluster);
        let running = processes_of(cluster)?;
        let Some(pid) = running.first() else { break };
        if began.elapsed() > GONE_AFTER_MAX {
            bail!(
                "an earlier postgres (pid {pid}) is still running in {} after {} s: stop it (kill -QUIT {pid}) and \
                 retry",
                cluster.display(),
                GONE_AFTER_MAX.as_secs()
            );
        }
        let due = signal_due(&running, main, began.elapsed());
        if due != sent {
            if let Some((signal, targets)) = &due {
                info!(signal, ?targets, "earlier postgres signalled");
                targets.iter().for_each(|pid| send(*pid, *signal, cluster));
            }
            sent = due;
        }
        if pause(TICK) {
            return Ok(false);
        }
    }
    remove_misleading_pid_file(cluster)?;
    Ok(true)
}

/// Returns the signal to send and its targets: the main process, which stops the others, or all of them if it is dead.
/// Without the main process, the others end only when they notice it, which can take as long as their query.
fn signal_due(running: &[u32], main: Option<u32>, waited: Duration) -> Option<(libc::c_int, Vec<u32>)> {
    let main = main.filter(|pid| running.contains(pid));
    match main {
        _ if waited < FAST_AFTER => None,
        None => Some((libc::SIGQUIT, running.to_vec())),
        Some(pid) if waited < IMMEDIATE_AFTER => Some((libc::SIGINT, vec![pid])),
        Some(pid) => Some((libc::SIGQUIT, vec![pid])),
    }
}

/// Returns the pid in `postmaster.pid`, of a live or dead process. A single-user server writes it with a minus sign.
fn main_process(cluster: &Path) -> Option<u32> {
    let text = fs::read_to_string(cluster.join("postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse::<i32>().ok()?;
    Some(pid.unsigned_abs()).filter(|pid| *pid > 0)
}

fn processes_of(cluster: &Path) -> anyhow::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc").context("cannot read /proc")?;
    Ok(entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| standing(*pid, cluster) == Standing::Ours)
        .collect())
}

fn standing(pid: u32, cluster: &Path) -> Standing {
    let seen = standing_as_seen(pid, cluster);
    let seen = match seen {
        None if process::is_root() => as_owner(cluster, || standing_as_seen(pid, cluster)),
        seen => seen,
    };
    // A process that the cluster's owner cannot see belongs to another user, whom PostgreSQL would refuse.
    seen.unwrap_or(Standing::Foreign)
}

/// Runs `look` as the server's user. The kernel shows a process's working directory to its own user, but to root only with
/// CAP_SYS_PTRACE, which many containers lack.
fn as_owner(cluster: &Path, look: impl FnOnce() -> Option<Standing>) -> Option<Standing> {
    let owner = fs::metadata(cluster).ok()?;
    // SAFETY: the calls take a number and affect only this thread; if one fails, `look` sees less.
    unsafe {
        libc::setfsgid(owner.gid());
        libc::setfsuid(owner.uid());
    }
    let standing = look();
    // SAFETY: as above. Both were zero, as only root calls this.
    unsafe {
        libc::setfsuid(0);
        libc::setfsgid(0);
    }
    standing
}

/// Returns `None` if the kernel denies access.
fn standing_as_seen(pid: u32, cluster: &Path) -> Option<Standing> {
    let process = Path::new("/proc").join(pid.to_string());
    let program = match fs::read_link(process.join("exe")) {
        Ok(program) => program,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
        // Zombies and kernel threads have no program.
        Err(_) if process.exists() => return Some(Standing::Foreign),
        Err(_) => return Some(Standing::Gone),
    };
    // After a package upgrade the kernel marks the old file as deleted.
    let program = program.to_string_lossy();
    let program = Path::new(program.trim_end_matches(" (deleted)"));
    if program.file_name() != Some(OsStr::new(PROGRAM)) {
        return Some(Standing::Foreign);
    }
    match (fs::metadata(process.join("cwd")), fs::metadata(cluster)) {
        (Ok(at), Ok(cluster)) if (at.dev(), at.ino()) == (cluster.dev(), cluster.ino()) => Some(Standing::Ours),
        _ => Some(Standing::Foreign),
    }
}

/// Sends a signal through a pidfd opened before the last check of the process, so that it cannot reach a reused pid.
fn send(pid: u32, signal: libc::c_int, cluster: &Path) {
    // SAFETY: pidfd_open takes two numbers and returns a descriptor or -1.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if opened < 0 {
        warn!(pid, error = %io::Error::last_os_error(), "cannot signal earlier postgres");
        return;
    }
    // SAFETY: the descriptor was just opened and has no other owner.
    let process = unsafe { OwnedFd::from_raw_fd(opened as libc::c_int) };
    if standing(pid, cluster) != Standing::Ours {
        return;
    }
    let (fd, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the descriptor is open, and a null siginfo asks for what kill(2) would send.
    if unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) } != 0 {
        warn!(pid, error = %io::Error::last_os_error(), "cannot signal earlier postgres");
    }
}

/// Called when nothing is at work in the cluster, as far as can be seen; were something hidden, PostgreSQL would still
/// find its shared memory in use. The pid of no process is left to PostgreSQL, which then cleans up more.
fn remove_misleading_pid_file(cluster: &Path) -> anyhow::Result<()> {
    let path = cluster.join("postmaster.pid");
    if !path.exists() {
        return Ok(());
    }
    let misleading = match main_process(cluster) {
        Some(pid) => standing(pid, cluster) == Standing::Foreign,
        // A power failure can leave the file empty.
        None => true,
    };
    if misleading {
        warn!(path = %path.display(), "stale pid file removed");
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
