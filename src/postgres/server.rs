//! The server process and its supervisor, which restarts it when it dies.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use tracing::{error, info, warn};

use super::process::{self, RunAs, TICK};
use super::{
    settings::{DURABLE_SETTINGS, Durability, PORT, SETTINGS, THROWAWAY_SETTINGS},
    stale_server,
};

/// Maximum time until the server is ready: enough to recover from `max_wal_size` of WAL.
const READY_AFTER_MAX: Duration = Duration::from_secs(600);
/// Maximum time of each way to stop the server: fast shutdown, immediate shutdown, SIGKILL.
const FAST_SHUTDOWN_MAX: Duration = Duration::from_secs(30);
const IMMEDIATE_SHUTDOWN_MAX: Duration = Duration::from_secs(10);
const KILL_MAX: Duration = Duration::from_secs(10);
/// Interval of checks whether the server is alive.
const WATCH_TICK: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Uptime after which the restart pause is reset to its minimum.
const STEADY_AFTER: Duration = Duration::from_secs(30);

const LOG: &str = "server.log";
const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;
const LOG_QUOTE_BYTES_MAX: u64 = 4 * 1024;
const LOG_QUOTE_LINES_MAX: usize = 12;

/// Lines of `postmaster.pid`, counted from zero: the pid, and the state that `pg_ctl` waits for.
const PID_LINE: usize = 0;
const STATE_LINE: usize = 7;

/// The parameters of the server process.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) bin_dir: PathBuf,
    pub(super) cluster: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) run_as: RunAs,
    pub(super) durability: Durability,
}

/// The thread that spawns and watches the server. The kernel stops the server when this thread ends.
#[derive(Debug)]
pub(super) struct Supervisor {
    pid: Arc<AtomicU32>,
    stop: Sender<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Supervisor {
    /// Returns once the server accepts connections. If `is_cancelled`, stops the server and returns `None`.
    pub(super) fn start(server: Server, is_cancelled: &dyn Fn() -> bool) -> anyhow::Result<Option<Supervisor>> {
        let pid = Arc::new(AtomicU32::new(0));
        let (stop, stopped) = mpsc::channel();
        let (started, first_start) = mpsc::channel();
        let current = Arc::clone(&pid);
        let thread = thread::Builder::new()
            .name("postgres-supervisor".to_owned())
            .spawn(move || supervise(&server, &Stop(stopped), &current, &started))
            .context("cannot start the supervisor thread of postgres")?;
        let supervisor = Supervisor { pid, stop, thread };
        // Bounded, as the supervisor's first start is.
        loop {
            match first_start.recv_timeout(TICK) {
                Ok(started) => return started.map(|()| Some(supervisor)),
                Err(RecvTimeoutError::Timeout) if is_cancelled() => return supervisor.stop().map(|()| None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the supervisor thread of postgres ended"),
            }
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Stops the server: by a fast shutdown, then an immediate one, then SIGKILL.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        drop(self.stop);
        self.thread.join().unwrap_or_else(|_| Err(anyhow!("the supervisor thread of postgres panicked")))
    }
}

/// The receiving end of a stop request, which is made by dropping the sender.
struct Stop(Receiver<()>);

impl Stop {
    /// Waits up to `pause` and returns whether a stop was requested.
    fn requested_within(&self, pause: Duration) -> bool {
        self.0.recv_timeout(pause) != Err(RecvTimeoutError::Timeout)
    }
}

/// Runs the supervisor. Only this thread reaps and signals the server, so no signal reaches a reused pid.
fn supervise(
    server: &Server,
    stop: &Stop,
    pid: &AtomicU32,
    started: &Sender<anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let mut child = match server.launch(stop) {
        Ok(Some(child)) => child,
        Ok(None) => return Ok(()),
        Err(error) => {
            // `Supervisor::start` is waiting for it.
            let _ = started.send(Err(error));
            return Ok(());
        }
    };
    pid.store(child.id(), Ordering::Relaxed);
    let _ = started.send(Ok(()));
    let mut pause = RESTART_PAUSE_MIN;
    loop {
        let up_since = Instant::now();
        let Some(status) = watch(&mut child, stop)? else {
            return shut_down(&mut child);
        };
        error!(pid = child.id(), %status, "postgres died; restarting");
        if up_since.elapsed() >= STEADY_AFTER {
            pause = RESTART_PAUSE_MIN;
        }
        child = match server.relaunch(stop, &mut pause) {
            Some(child) => child,
            None => return Ok(()),
        };
        pid.store(child.id(), Ordering::Relaxed);
        info!(pid = child.id(), "postgres restarted");
    }
}

/// Returns the exit status of a server that died, or `None` once a stop is requested.
fn watch(child: &mut Child, stop: &Stop) -> anyhow::Result<Option<ExitStatus>> {
    loop {
        if stop.requested_within(WATCH_TICK) {
            return Ok(None);
        }
        if let Some(status) = child.try_wait().context("cannot watch postgres")? {
            return Ok(Some(status));
        }
    }
}

fn shut_down(child: &mut Child) -> anyhow::Result<()> {
    for (signal, max) in
        [(libc::SIGINT, FAST_SHUTDOWN_MAX), (libc::SIGQUIT, IMMEDIATE_SHUTDOWN_MAX), (libc::SIGKILL, KILL_MAX)]
    {
        // SAFETY: kill takes two numbers. The pid is this child's until try_wait reaps it, even after it has ended.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        if process::wait_at_most(child, max).context("cannot wait for postgres")?.is_some() {
            return Ok(());
        }
        warn!(pid = child.id(), signal, after_s = max.as_secs(), "postgres did not stop in time");
    }
    bail!("postgres (pid {}) survived SIGKILL", child.id())
}

impl Server {
    /// Retries with exponential backoff until the server starts; `None` once a stop is requested.
    fn relaunch(&self, stop: &Stop, pause: &mut Duration) -> Option<Child> {
        loop {
            if stop.requested_within(*pause) {
                return None;
            }
            *pause = (*pause * 2).min(RESTART_PAUSE_MAX);
            match self.launch(stop) {
                Ok(child) => return child,
                Err(error) => error!(error = format!("{error:#}"), "postgres restart failed"),
            }
        }
    }

    /// Starts a server and waits until it accepts connections; `None` once a stop is requested.
    fn launch(&self, stop: &Stop) -> anyhow::Result<Option<Child>> {
        // Single processes of a killed server can continue for a while.
        if !stale_server::clear(&self.cluster, &|pause| stop.requested_within(pause))? {
            return Ok(None);
        }
        let log = self.open_log()?;
        let log_start = log.metadata().context("cannot read the metadata of the log")?.len();
        let mut child = self.spawn(log)?;
        let began = Instant::now();
        loop {
            if self.is_ready(child.id()) {
                return Ok(Some(child));
            }
            let ended = child.try_wait().context("cannot watch postgres")?;
            let quote = || last_lines(&self.log_path(), log_start);
            if let Some(status) = ended {
                let log = self.log_path();
                bail!("postgres did not start ({status}); end of {}:\n{}", log.display(), quote());
            }
            if began.elapsed() > READY_AFTER_MAX {
                shut_down(&mut child)?;
                let seconds = READY_AFTER_MAX.as_secs();
                bail!("postgres was not ready after {seconds} s; end of its log:\n{}", quote());
            }
            if stop.requested_within(TICK) {
                shut_down(&mut child)?;
                return Ok(None);
            }
        }
    }

    fn spawn(&self, log: File) -> anyhow::Result<Child> {
        let program = self.bin_dir.join("postgres");
        let mut command = self.run_as.command(&program, &self.cluster);
        command.arg("-D").arg(&self.cluster);
        command.arg("-k").arg(&self.socket_dir);
        command.args(["-p", &PORT.to_string(), "-c", "listen_addresses="]);
        let more: &[&str] = match self.durability {
            Durability::Durable => &DURABLE_SETTINGS,
            Durability::Throwaway => &THROWAWAY_SETTINGS,
        };
        for setting in SETTINGS.iter().chain(more) {
            command.args(["-c", setting]);
        }
        let stderr = log.try_clone().context("cannot share the log")?;
        command.stdout(Stdio::from(log)).stderr(Stdio::from(stderr));
        process::die_with_parent(&mut command, libc::SIGINT);
        command.spawn().with_context(|| format!("cannot run {}", program.display()))
    }

    fn is_ready(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(self.cluster.join("postmaster.pid")) else {
            return false;
        };
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        lines.get(PID_LINE).and_then(|line| line.parse().ok()) == Some(pid)
            && matches!(lines.get(STATE_LINE), Some(&("ready" | "standby")))
    }

    fn log_path(&self) -> PathBuf {
        self.cluster.join(LOG)
    }

    /// Opens the log without following symlinks: root writes to a directory that the server's user controls.
    fn open_log(&self) -> anyhow::Result<File> {
        let path = self.log_path();
        let open = || {
            let log =
                OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path)?;
            self.run_as.own(&path)?;
            if log.metadata()?.len() > LOG_BYTES_MAX {
                log.set_len(0)?;
            }
            Ok::<File, std::io::Error>(log)
        };
        open().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Returns the last lines of the file that begin at byte `start` or later, for an error message.
pub(super) fn last_lines(path: &Path, start: u64) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let from = start.max(length.saturating_sub(LOG_QUOTE_BYTES_MAX));
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(LOG_QUOTE_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok::<Vec<u8>, std::io::Error>(bytes)
    };
    let Ok(bytes) = read() else {
        return "(nothing)".to_owned();
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(LOG_QUOTE_LINES_MAX)..].join("\n")
}
