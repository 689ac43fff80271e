//! The `issue-tracker` binary: its commands, and `serve` as a child process.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc::{self, Receiver},
    time::Duration,
};

use tokio_postgres::Config;
use tonic::transport::{Channel, Endpoint};

use super::{
    bounds::HANG,
    process::{Dir, signal, wait_until},
};

pub const TOKEN_FILE: &str = "data/admin.token";
const LOG: &str = "service.log";
/// The number of lines that a service with an embedded database prints after its address.
const LINES_AFTER_ADDRESS: usize = 3;

/// Returns a command that runs the binary without configuration from the environment.
pub fn program(args: &[&str]) -> Command {
    program_at(Path::new(env!("CARGO_BIN_EXE_issue-tracker")), args)
}

/// As [`program`], with another binary, such as that of another version.
pub fn program_at(binary: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("ISSUE_TRACKER_") || name == "DATABASE_URL" || name == "RUST_LOG" {
            command.env_remove(&*name);
        }
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for a process and returns its output. Kills the process and panics after [`HANG`].
pub fn finished(child: Child) -> Output {
    let pid = child.id();
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    let output = is_done.recv_timeout(HANG).unwrap_or_else(|_| {
        let _ = signal(pid, libc::SIGKILL);
        panic!("the process does not end");
    });
    output.unwrap()
}

/// Returns the lines of a stream as they arrive.
pub fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    lines
}

impl Dir {
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Returns the path of the service's data directory.
    pub fn data(&self) -> String {
        self.text("data")
    }

    /// Connects to the service's embedded database as superuser.
    pub fn database(&self) -> Config {
        let mut config = Config::new();
        config.host_path(self.path("data/cluster.socket")).port(5432).user("postgres").dbname("issue_tracker");
        config.connect_timeout(Duration::from_secs(2));
        config
    }
}

/// A running service, killed on drop.
pub struct Service {
    pub child: Child,
    lines: Receiver<String>,
    /// The lines that it prints until it is ready.
    pub stdout: Vec<String>,
    pub address: String,
    pub dir: PathBuf,
}

impl Service {
    /// Starts a service and waits until it is ready. It listens on a free port, unless the command has `--listen`.
    pub fn start(dir: &Dir, command: Command) -> Self {
        let has_database = command.get_args().any(|arg| arg == "--data-dir");
        let mut service = Self::spawn(dir, command);
        while service.address.is_empty() {
            let line = service.line();
            service.address = line.strip_prefix("listening on ").unwrap_or_default().to_owned();
            service.stdout.push(line);
        }
        for _ in 0..if has_database { LINES_AFTER_ADDRESS } else { 0 } {
            let line = service.line();
            service.stdout.push(line);
        }
        service
    }

    /// Starts a service without waiting until it is ready.
    pub fn spawn(dir: &Dir, mut command: Command) -> Self {
        let log = File::options().create(true).append(true).open(dir.path(LOG)).unwrap();
        if !command.get_args().any(|arg| arg == "--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        let mut child = command.stderr(log).spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        Self { child, lines, stdout: Vec::new(), address: String::new(), dir: dir.to_path_buf() }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(HANG).unwrap_or_else(|_| panic!("no more output; the log: {}", self.log()))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join(LOG)).unwrap()
    }

    /// Reads the token of the first administrator, which a service with an embedded database writes to a file.
    pub fn admin_token(&self) -> String {
        fs::read_to_string(self.dir.join(TOKEN_FILE)).unwrap().trim_end().to_owned()
    }

    pub fn channel(&self) -> Channel {
        channel(&self.address)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, number: i32) {
        assert!(signal(self.pid(), number));
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the service ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn stop(&mut self) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait()
    }

    /// Kills the service, as a crash would.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.wait();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn channel(address: &str) -> Channel {
    Endpoint::try_from(format!("http://{address}")).unwrap().connect_lazy()
}
