//! What an earlier service left of its server: one that is still shutting down, or a `postmaster.pid` of the dead.
//!
//! PostgreSQL guards a cluster by that file and by a shared memory segment. It recovers by itself unless the pid in the
//! file has meanwhile gone to another process of the same user, or to a zombie; then it refuses to start for ever.

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

/// A server whose service was killed gets SIGINT from the kernel, so at first it is only waited for.
const FAST_AFTER: Duration = Duration::from_secs(3);
/// A fast shutdown writes a checkpoint; after this long it's left to recovery.
const IMMEDIATE_AFTER: Duration = Duration::from_secs(12);
const GONE_AFTER_MAX: Duration = Duration::from_secs(30);
/// Every process of a server runs this program.
const PROGRAM: &str = "postgres";

/// What the process with a given pid is to a cluster.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// A postgres that works in the cluster's directory.
    Ours,
    /// Anything else, and a zombie, which holds nothing any more.
    Foreign,
    Gone,
}

/// Waits until no process of an earlier server is at work in the cluster, with signals after a while, then removes its
/// `postmaster.pid` where PostgreSQL would stumble over it. `pause` waits so long and tells whether to give up; the
/// result is false in that case.
pub(super) fn clear(cluster: &Path, pause: &dyn Fn(Duration) -> bool) -> anyhow::Result<bool> {
    let began = Instant::now();
    let mut sent = None;
    loop {
        let main = main_process(cluster);
        let running = processes_of(cluster)?;
        let Some(pid) = running.first() else { break };
        if began.elapsed() > GONE_AFTER_MAX {
            bail!(
                "an earlier postgres (pid {pid}) is still at work in {} after {} s: stop it (kill -QUIT {pid}) and \
                 start again",
                cluster.display(),
                GONE_AFTER_MAX.as_secs()
            );
        }
        let due = signal_due(&running, main, began.elapsed());
        if due != sent {
            if let Some((signal, targets)) = &due {
                info!(signal, ?targets, "stopping an earlier postgres");
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

/// The main process is asked, and looks after the others. Where it's dead they leave by themselves once they notice,
/// which in the middle of a long query can take as long as the query; there is nobody left to take its result.
fn signal_due(running: &[u32], main: Option<u32>, waited: Duration) -> Option<(libc::c_int, Vec<u32>)> {
    let main = main.filter(|pid| running.contains(pid));
    match main {
        _ if waited < FAST_AFTER => None,
        None => Some((libc::SIGQUIT, running.to_vec())),
        Some(pid) if waited < IMMEDIATE_AFTER => Some((libc::SIGINT, vec![pid])),
        Some(pid) => Some((libc::SIGQUIT, vec![pid])),
    }
}

/// The pid that `postmaster.pid` names, dead or alive. A single-user server writes it with a minus.
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
    // What doesn't show itself to the cluster's owner is another user's, whom PostgreSQL would not let in.
    seen.unwrap_or(Standing::Foreign)
}

/// Looks with the eyes of the user that the server runs as. The kernel shows a process's directory to its own user, but
/// to root only with CAP_SYS_PTRACE, which is missing in many containers.
fn as_owner(cluster: &Path, look: impl FnOnce() -> Option<Standing>) -> Option<Standing> {
    let owner = fs::metadata(cluster).ok()?;
    // SAFETY: these take a number, cannot fail in a way that matters here, and concern this thread alone.
    unsafe {
        libc::setfsgid(owner.gid());
        libc::setfsuid(owner.uid());
    }
    let standing = look();
    // SAFETY: as above. Zero is what both were, as only root comes here.
    unsafe {
        libc::setfsuid(0);
        libc::setfsgid(0);
    }
    standing
}

/// `None` if the kernel doesn't tell.
fn standing_as_seen(pid: u32, cluster: &Path) -> Option<Standing> {
    let process = Path::new("/proc").join(pid.to_string());
    let program = match fs::read_link(process.join("exe")) {
        Ok(program) => program,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return None,
        // A zombie and a thread of the kernel have no program.
        Err(_) if process.exists() => return Some(Standing::Foreign),
        Err(_) => return Some(Standing::Gone),
    };
    // After an upgrade of the package the kernel shows the old file as deleted.
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

/// Sends through a pidfd, taken before the last look at the process: its pid cannot go to another one in between.
fn send(pid: u32, signal: libc::c_int, cluster: &Path) {
    // SAFETY: pidfd_open takes two numbers and returns a descriptor or -1.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if opened < 0 {
        warn!(pid, error = %io::Error::last_os_error(), "cannot signal an earlier postgres");
        return;
    }
    // SAFETY: the descriptor was just opened, and nobody else has it.
    let process = unsafe { OwnedFd::from_raw_fd(opened as libc::c_int) };
    if standing(pid, cluster) != Standing::Ours {
        return;
    }
    let (fd, none) = (process.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
    // SAFETY: the descriptor is open, and a null siginfo asks for what kill(2) would send.
    if unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, none, 0) } != 0 {
        warn!(pid, error = %io::Error::last_os_error(), "cannot signal an earlier postgres");
    }
}

/// Called when nothing is at work in the cluster, as far as can be seen; were something hidden, PostgreSQL would still
/// find its shared memory in use. A pid that belongs to nobody is left for PostgreSQL, which then cleans up more.
fn remove_misleading_pid_file(cluster: &Path) -> anyhow::Result<()> {
    let path = cluster.join("postmaster.pid");
    if !path.exists() {
        return Ok(());
    }
    let misleading = match main_process(cluster) {
        Some(pid) => standing(pid, cluster) == Standing::Foreign,
        // A power failure can leave it empty.
        None => true,
    };
    if misleading {
        warn!(path = %path.display(), "removing the pid file of a postgres that is dead");
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
