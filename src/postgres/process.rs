//! Who PostgreSQL's processes run as, and how they are started and waited for.

use std::ffi::CStr;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How often anything that has to be waited for is looked at.
pub(super) const TICK: Duration = Duration::from_millis(20);
/// `postgres --version` answers in milliseconds; this is for a machine that swaps.
const PROBE_MAX: Duration = Duration::from_secs(20);
/// PostgreSQL refuses to run as root, so root lends its processes the first of these that exists.
const ACCOUNTS: [&CStr; 2] = [c"postgres", c"nobody"];
/// An entry of the password file is a line; this is far more than one.
const PASSWD_ENTRY_BYTES_MAX: usize = 16 * 1024;
/// All else stays behind: the service's own variables may be secrets, and PostgreSQL's (`PGPORT`, `PGDATA`, …) would
/// change what it does.
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
    /// For a cluster that is about to be made.
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
            "postgres does not run as root, and there is neither a user postgres nor a user nobody: make one \
             (useradd --system postgres) or start as an ordinary user"
        )
    }

    /// For a cluster that is there: PostgreSQL accepts nobody but the owner of its files, whoever made them.
    pub(super) fn owner_of(cluster: &Path) -> anyhow::Result<RunAs> {
        let path = cluster.display();
        let found = cluster.metadata().with_context(|| format!("cannot look at {path}"))?;
        let (uid, gid) = (found.uid(), found.gid());
        match (is_root(), uid) {
            (true, 0) => bail!(
                "the cluster {path} belongs to root, but postgres does not run as root: give it to the user that it is \
                 to run as (chown -R postgres: {path})"
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

    /// A command that runs as this user in `dir`, in a process group of its own: a terminal's Ctrl-C is for the
    /// service, which then stops PostgreSQL in its own time.
    pub(super) fn command(&self, program: &Path, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("LC_ALL", "C");
        for name in ENVIRONMENT_KEPT {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        // As root, setting a uid also drops the supplementary groups; the directory is entered after that, as the user.
        if let RunAs::Account { uid, gid, .. } = self {
            command.uid(*uid).gid(*gid);
        }
        command.current_dir(dir).stdin(Stdio::null()).process_group(0);
        command
    }

    /// Hands a path that root has just made to this user; a symlink is not followed.
    pub(super) fn own(&self, path: &Path) -> io::Result<()> {
        match self {
            RunAs::Ourselves => Ok(()),
            RunAs::Account { uid, gid, .. } => lchown(path, Some(*uid), Some(*gid)),
        }
    }

    /// Whether this user gets into `dir`. Asked by going there: modes alone don't tell of ACLs and mounts.
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

/// Has the kernel send `signal` to the process when the thread that spawns it ends, however it ends.
pub(super) fn die_with_parent(command: &mut Command, signal: libc::c_int) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made, and nothing is allocated. This runs after
    // the change of user, which would clear the setting.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) != 0 {
                return Err(io::Error::last_os_error());
            }
            // A parent that died before the call above sends nothing any more.
            if libc::getppid() as u32 != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

/// Runs a command to its end, or kills it and returns `TimedOut`.
pub(super) fn run(command: &mut Command, max: Duration) -> io::Result<ExitStatus> {
    let mut child = command.spawn()?;
    if let Some(status) = wait_at_most(&mut child, max)? {
        return Ok(status);
    }
    child.kill()?;
    child.wait()?;
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("not done after {} s", max.as_secs())))
}

/// `None` if the process is still there after `max`.
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

/// The user's uid and primary gid.
fn look_up(name: &CStr) -> io::Result<Option<(u32, u32)>> {
    let mut buffer = vec![0; PASSWD_ENTRY_BYTES_MAX];
    let mut found = std::ptr::null_mut();
    // SAFETY: a passwd is numbers and pointers, for all of which zero is a value; the call writes at most the given
    // length into the buffer, and `found` is null or points at `entry`.
    unsafe {
        let mut entry: libc::passwd = std::mem::zeroed();
        let (text, length) = (buffer.as_mut_ptr(), buffer.len());
        match libc::getpwnam_r(name.as_ptr(), &mut entry, text, length, &mut found) {
            // Some systems say "no such user" with one of these instead of a null pointer.
            0 | libc::ENOENT | libc::ESRCH if found.is_null() => Ok(None),
            0 => Ok(Some((entry.pw_uid, entry.pw_gid))),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    }
}
