//! One server process after another: started, watched, started again when it dies, stopped.

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
use super::{Durability, PORT, stale_server};

/// Long enough for a recovery from all the WAL that `max_wal_size` lets pile up.
const READY_AFTER_MAX: Duration = Duration::from_secs(600);
const FAST_SHUTDOWN_MAX: Duration = Duration::from_secs(30);
const IMMEDIATE_SHUTDOWN_MAX: Duration = Duration::from_secs(10);
const KILL_MAX: Duration = Duration::from_secs(10);
/// How often a running server is looked at; a death is noticed this late at most.
const WATCH_TICK: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A server that ran this long is not one that dies at once.
const STEADY_AFTER: Duration = Duration::from_secs(30);

const LOG: &str = "server.log";
const LOG_BYTES_MAX: u64 = 10 * 1024 * 1024;
const LOG_QUOTE_BYTES_MAX: u64 = 4 * 1024;
const LOG_QUOTE_LINES_MAX: usize = 12;

/// Of `postmaster.pid`, counted from zero: its pid, and the state that `pg_ctl` waits for too.
const PID_LINE: usize = 0;
const STATE_LINE: usize = 7;

/// Statements and their values stay out of the log: the text of an ERROR may quote a row, and a LOG about a crash
/// quotes the statement, so the least that is logged is FATAL; no statement is added below PANIC.
const SETTINGS: [&str; 5] = [
    "timezone=UTC",
    "log_timezone=UTC",
    "log_min_messages=fatal",
    "log_min_error_statement=panic",
    "log_parameter_max_length_on_error=0",
];
const DURABLE_SETTINGS: [&str; 6] = [
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "shared_buffers=256MB",
    "max_wal_size=2GB",
    "max_connections=100",
];
/// Many tests share one server.
const THROWAWAY_SETTINGS: [&str; 4] =
    ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200"];

/// What it takes to start a server, again and again.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) bin_dir: PathBuf,
    pub(super) cluster: PathBuf,
    pub(super) socket_dir: PathBuf,
    pub(super) run_as: RunAs,
    pub(super) durability: Durability,
}

/// The thread that spawned the server, and with whose end the kernel would end the server.
#[derive(Debug)]
pub(super) struct Supervisor {
    pid: Arc<AtomicU32>,
    stop: Sender<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Supervisor {
    /// Returns once the server accepts connections; `None` when it was given up, and the server is stopped.
    pub(super) fn start(server: Server, given_up: &dyn Fn() -> bool) -> anyhow::Result<Option<Supervisor>> {
        let pid = Arc::new(AtomicU32::new(0));
        let (stop, stopped) = mpsc::channel();
        let (started, first_start) = mpsc::channel();
        let current = Arc::clone(&pid);
        let thread = thread::Builder::new()
            .name("postgres-supervisor".to_owned())
            .spawn(move || supervise(&server, &Stop(stopped), &current, &started))
            .context("cannot start the thread that looks after postgres")?;
        let supervisor = Supervisor { pid, stop, thread };
        // The wait is as bounded as the start itself.
        loop {
            match first_start.recv_timeout(TICK) {
                Ok(started) => return started.map(|()| Some(supervisor)),
                Err(RecvTimeoutError::Timeout) if given_up() => return supervisor.stop().map(|()| None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the thread that looks after postgres ended"),
            }
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.load(Ordering::Relaxed)
    }

    /// Fast, then immediate shutdown.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        drop(self.stop);
        self.thread.join().unwrap_or_else(|_| Err(anyhow!("the thread that looks after postgres panicked")))
    }
}

/// Asked for by dropping the other end.
struct Stop(Receiver<()>);

impl Stop {
    /// Waits so long for it, and tells whether it was asked for.
    fn asked_within(&self, pause: Duration) -> bool {
        self.0.recv_timeout(pause) != Err(RecvTimeoutError::Timeout)
    }
}

/// The supervisor's whole life. It alone reaps and signals the server, so no signal meets a pid that was reused.
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
            // Whoever waits for this is in `Supervisor::start`, and takes it.
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
        error!(pid = child.id(), %status, "postgres ended by itself; starting it again");
        if up_since.elapsed() >= STEADY_AFTER {
            pause = RESTART_PAUSE_MIN;
        }
        child = match server.launch_again(stop, &mut pause) {
            Some(child) => child,
            None => return Ok(()),
        };
        pid.store(child.id(), Ordering::Relaxed);
        info!(pid = child.id(), "postgres is up again");
    }
}

/// How the server ended, or `None` when it's to be stopped.
fn watch(child: &mut Child, stop: &Stop) -> anyhow::Result<Option<ExitStatus>> {
    loop {
        if stop.asked_within(WATCH_TICK) {
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
        // SAFETY: kill takes two numbers. Until try_wait reaps it, the pid is this child's, even if it has ended.
        unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        if process::wait_at_most(child, max).context("cannot wait for postgres")?.is_some() {
            return Ok(());
        }
        warn!(pid = child.id(), signal, after_s = max.as_secs(), "postgres did not stop");
    }
    bail!("postgres (pid {}) does not end even when killed", child.id())
}

impl Server {
    /// Tries until it works; `None` when the server is to be stopped.
    fn launch_again(&self, stop: &Stop, pause: &mut Duration) -> Option<Child> {
        loop {
            if stop.asked_within(*pause) {
                return None;
            }
            *pause = (*pause * 2).min(RESTART_PAUSE_MAX);
            match self.launch(stop) {
                Ok(child) => return child,
                Err(error) => error!("postgres does not start again: {error:#}"),
            }
        }
    }

    /// Returns a server that accepts connections, or `None` when it's to be stopped.
    fn launch(&self, stop: &Stop) -> anyhow::Result<Option<Child>> {
        // Of a server that was killed, single processes can go on for a while.
        if !stale_server::clear(&self.cluster, &|pause| stop.asked_within(pause))? {
            return Ok(None);
        }
        let log = self.open_log()?;
        let log_start = log.metadata().context("cannot look at the log")?.len();
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
                bail!("postgres did not start ({status}); {} says:\n{}", log.display(), quote());
            }
            if began.elapsed() > READY_AFTER_MAX {
                shut_down(&mut child)?;
                let seconds = READY_AFTER_MAX.as_secs();
                bail!("postgres was not ready after {seconds} s; its log says:\n{}", quote());
            }
            if stop.asked_within(TICK) {
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

    /// The directory is the server's, and root writes there: a symlink that it put in the way is not followed.
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

/// The end of what was written from byte `start` on, for an error message.
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
