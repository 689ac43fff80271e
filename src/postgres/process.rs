//! The user that PostgreSQL's processes run as, and how they are started and awaited.

use std::ffi::CStr;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// Polling interval.
pub(super) const TICK: Duration = Duration::from_millis(20);
/// Maximum time of `postgres --version`, which takes milliseconds unless the machine swaps.
const PROBE_MAX: Duration = Duration::from_secs(20);
/// PostgreSQL refuses to run as root: root starts it as the first of these users that exists.
const ACCOUNTS: [&CStr; 2] = [c"postgres", c"nobody"];
/// Far more than one line of the password file.
const PASSWD_ENTRY_BYTES_MAX: usize = 16 * 1024;
/// Environment variables that PostgreSQL inherits. The service's own may be secrets, and those of PostgreSQL (`PGPORT`,
/// `PGDATA`, …) would change its behaviour.
const ENVIRONMENT_KEPT: [&str; 3] = ["PATH", "LD_LIBRARY_PATH", "TMPDIR"];

/// The user that PostgreSQL's processes run as and its files belong to.
#[derive(Clone, Debug)]
pub(super) enum RunAs {
    Ourselves,
    /// Only root can do this.
    Account {
        name: String,
        uid: u32,
        gid: u32,
    },
}

impl RunAs {
    /// Returns the user for a new cluster.
    pub(super) fn for_new_cluster() -> anyhow::Result<RunAs> {
        if !is_root() {
            return Ok(RunAs::Ourselves);
        }
        for name in ACCOUNTS {
            if let Some((uid, gid)) = look_up(name).context("cannot look up users")? {
                let name = name.to_string_lossy().into_owned();
                return Ok(RunAs::Account { name, uid, gid });
            }
        }
        bail!(
            "postgres does not run as root, and neither the user postgres nor nobody exists: create one \
             (useradd --system postgres) or start as an ordinary user"
        )
    }

    /// Returns the user for an existing cluster: PostgreSQL accepts only the owner of its files.
    pub(super) fn owner_of(cluster: &Path) -> anyhow::Result<RunAs> {
        let path = cluster.display();
        let found = cluster.metadata().with_context(|| format!("cannot read the metadata of {path}"))?;
        let (uid, gid) = (found.uid(), found.gid());
        match (is_root(), uid) {
            (true, 0) => bail!(
                "the cluster {path} belongs to root, and postgres does not run as root: change its owner \
                 (chown -R postgres: {path})"
            ),
            (true, _) => {
                let name = format!("uid {uid}");
                Ok(RunAs::Account { name, uid, gid })
            }
            (false, _) if uid == effective_uid() => Ok(RunAs::Ourselves),
            (false, _) => {
                bail!("the cluster {path} belongs to uid {uid}: start as that user or as root")
            }
        }
    }

    /// Returns a command that runs as this user in `dir`, in its own process group: a terminal's Ctrl-C reaches only the
    /// service, which then shuts PostgreSQL down.
    pub(super) fn command(&self, program: &Path, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("LC_ALL", "C");
        for name in ENVIRONMENT_KEPT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        // For root, setting a uid also drops the supplementary groups. The directory is entered after that, as the user.
        if let RunAs::Account { uid, gid, .. } = self {
            command.uid(*uid).gid(*gid);
        }
        command.current_dir(dir).stdin(Stdio::null()).process_group(0);
        command
    }

    /// Makes this user the owner of a path that root has just created. Does not follow symlinks.
    pub(super) fn own(&self, path: &Path) -> io::Result<()> {
        match self {
            RunAs::Ourselves => Ok(()),
            RunAs::Account { uid, gid, .. } => lchown(path, Some(*uid), Some(*gid)),
        }
    }

    /// Returns whether this user can enter `dir`. Runs a program there, as file modes do not show ACLs and mounts.
    pub(super) fn can_enter(&self, dir: &Path, bin_dir: &Path) -> anyhow::Result<bool> {
        if matches!(self, RunAs::Ourselves) {
            return Ok(true);
        }
        let mut probe = self.command(&bin_dir.join("postgres"), dir);
        probe.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        match run(&mut probe, PROBE_MAX) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
            Err(error) => Err(error)
                .with_context(|| format!("cannot run {} as {}", bin_dir.join("postgres").display(), self.name())),
        }
    }

    pub(super) fn name(&self) -> &str {
        match self {
            RunAs::Ourselves => "this user",
            RunAs::Account { name, .. } => name,
        }
    }
}

/// Has the kernel send `signal` to the process when the thread that spawns it ends for any reason.
pub(super) fn die_with_parent(command: &mut Command, signal: libc::c_int) {
    let parent = std::process::id();
    // SAFETY: the closure makes only async-signal-safe calls and allocates nothing. It runs after the change of user, which
    // would clear the setting.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) != 0 {
                return Err(io::Error::last_os_error());
            }
            // A parent that died before the prctl call causes no signal.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

/// Runs a command. Kills it after `max` and returns `TimedOut`.
pub(super) fn run(command: &mut Command, max: Duration) -> io::Result<ExitStatus> {
    let mut child = command.spawn()?;
    if let Some(status) = wait_at_most(&mut child, max)? {
        return Ok(status);
    }
    child.kill()?;
    child.wait()?;
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done after {} s", max.as_secs())))
}

/// Waits for the process; `None` if it is still running after `max`.
pub(super) fn wait_at_most(child: &mut Child, max: Duration) -> io::Result<Option<ExitStatus>> {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if began.elapsed() >= max {
            return Ok(None);
        }
        std::thread::sleep(TICK);
    }
}

pub(super) fn is_root() -> bool {
    effective_uid() == 0
}

fn effective_uid() -> u32 {
    // SAFETY: reads a number and cannot fail.
    unsafe { libc::geteuid() }
}

/// Returns the user's uid and primary gid.
fn look_up(name: &CStr) -> io::Result<Option<(u32, u32)>> {
    let mut buffer = vec![0; PASSWD_ENTRY_BYTES_MAX];
    let mut found = std::ptr::null_mut();
    // SAFETY: a passwd is numbers and pointers, for all of which zero is a value; the call writes at most the given
    // length into the buffer, and `found` is null or points at `entry`.
    unsafe {
        let mut entry: libc::passwd = std::mem::zeroed();
        let (text, length) = (buffer.as_mut_ptr(), buffer.len());
        match libc::getpwnam_r(name.as_ptr(), &mut entry, text, length, &mut found) {
            // Some systems report a missing user by one of these codes, others by a null pointer alone.
            0 | libc::ENOENT | libc::ESRCH if found.is_null() => Ok(None),
            0 => Ok(Some((entry.pw_uid, entry.pw_gid))),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}
