//! The private PostgreSQL: a cluster that the service creates, starts, supervises and stops.
//!
//! The server does not outlive the service: if the service is killed, the kernel sends the server SIGINT. A server that dies
//! is restarted, and a start waits for an earlier server that is still shutting down. The server does not listen on the
//! network: clients connect through a Unix socket in a directory that only its user and root can enter.
//!
//! In the data directory:
//! - `lock`: locked by the one process that uses the directory;
//! - `cluster`: PostgreSQL's data directory with its log `server.log`, or a symlink to one in `/var/lib/issue-tracker`
//!   if the service runs as root and the user that PostgreSQL runs as cannot enter the data directory;
//! - `cluster.socket` (beside the cluster): the directory of the socket, or a symlink to a shorter one in `/tmp`.

mod binaries;
mod data_directory;
mod process;
mod server;
mod settings;
mod stale_server;

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, anyhow};
use tracing::{error, info};

pub use settings::Durability;

use data_directory::SocketDir;
use server::{Server, Supervisor};
use settings::PORT;

/// A running server. Dropping stops it and logs errors. Methods block: call `start` and `stop` where that is allowed.
#[derive(Debug)]
pub struct Cluster {
    /// `None` only during `stop` and drop.
    supervisor: Option<Supervisor>,
    socket_dir: SocketDir,
    #[cfg(feature = "internals")]
    bin_dir: PathBuf,
    /// Last, so that the data directory is unlocked after everything above is dropped.
    _lock: DirectoryLock,
}

impl Cluster {
    /// Creates the cluster in `data_dir` if there is none, starts the server, and returns once it accepts connections. Waits
    /// for an earlier service's server that is still shutting down. Fails if another process uses `data_dir`.
    #[cfg(feature = "internals")]
    pub fn start(data_dir: &Path, durability: Durability) -> anyhow::Result<Cluster> {
        Cluster::start_unless(data_dir, durability, &|| false)?.context("the start was cancelled")
    }

    /// As [`Cluster::start`]; returns `None` once `is_cancelled`, which is polled until the server is ready. A running
    /// initdb completes first.
    pub fn start_unless(
        data_dir: &Path,
        durability: Durability,
        is_cancelled: &dyn Fn() -> bool,
    ) -> anyhow::Result<Option<Cluster>> {
        let data_dir = create_data_dir(data_dir)?;
        let lock = try_lock(&data_dir)?.ok_or_else(|| in_use(&data_dir))?;
        start_locked(&data_dir, lock, durability, is_cancelled)
    }

    /// As [`Cluster::start`]; if another process uses `data_dir`, returns how to reach its server. Fails if that server has
    /// no socket yet.
    pub fn start_or_find(data_dir: &Path, durability: Durability) -> anyhow::Result<StartedOrRunning> {
        let data_dir = create_data_dir(data_dir)?;
        if let Some(lock) = try_lock(&data_dir)? {
            let cluster = start_locked(&data_dir, lock, durability, &|| false)?.context("the start was cancelled")?;
            return Ok(StartedOrRunning::Started(cluster));
        }
        let socket_dir = data_directory::running_socket_dir(&data_dir).ok_or_else(|| in_use(&data_dir))?;
        Ok(StartedOrRunning::Running(RunningServer { socket_dir }))
    }

    /// Returns how to connect to the database `dbname` as the superuser.
    pub fn connect_config(&self, dbname: &str) -> tokio_postgres::Config {
        connect_config(self.socket_dir(), dbname)
    }

    /// Returns the host for PostgreSQL's client programs.
    pub fn socket_dir(&self) -> &Path {
        self.socket_dir.path()
    }

    /// Returns the directory of PostgreSQL's programs.
    #[cfg(feature = "internals")]
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// Returns the pid of the server's main process. It changes when the server dies and is restarted.
    #[cfg(feature = "internals")]
    pub fn server_pid(&self) -> u32 {
        self.supervisor.as_ref().map_or(0, Supervisor::pid)
    }

    /// Disconnects the clients and stops the server, in at most a minute.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.supervisor.take().map_or(Ok(()), Supervisor::stop)
    }
}

/// What [`Cluster::start_or_find`] found.
pub enum StartedOrRunning {
    Started(Cluster),
    Running(RunningServer),
}

/// A server that another process runs.
pub struct RunningServer {
    socket_dir: PathBuf,
}

impl RunningServer {
    /// Returns how to connect to the database `dbname` as the superuser.
    pub fn connect_config(&self, dbname: &str) -> tokio_postgres::Config {
        connect_config(&self.socket_dir, dbname)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.supervisor.take().map(Supervisor::stop) {
            error!(error = format!("{error:#}"), "postgres not stopped");
        }
    }
}

fn start_locked(
    data_dir: &Path,
    lock: DirectoryLock,
    durability: Durability,
    is_cancelled: &dyn Fn() -> bool,
) -> anyhow::Result<Option<Cluster>> {
    let bin_dir = binaries::find(data_directory::cluster_version(data_dir)?.as_deref())?;
    let (cluster, run_as) = data_directory::find_or_create_cluster(data_dir, &bin_dir, durability)?;
    let cleared = stale_server::clear(&cluster, &|pause| {
        thread::sleep(pause);
        is_cancelled()
    })?;
    if !cleared {
        return Ok(None);
    }
    let socket_dir = SocketDir::create(&cluster, &run_as)?;
    let server = Server {
        bin_dir: bin_dir.clone(),
        cluster: cluster.clone(),
        socket_dir: socket_dir.path().to_owned(),
        run_as,
        durability,
    };
    let Some(supervisor) = Supervisor::start(server, is_cancelled)? else {
        return Ok(None);
    };
    info!(pid = supervisor.pid(), cluster = %cluster.display(), "postgres started");
    Ok(Some(Cluster {
        supervisor: Some(supervisor),
        socket_dir,
        #[cfg(feature = "internals")]
        bin_dir,
        _lock: lock,
    }))
}

fn create_data_dir(data_dir: &Path) -> anyhow::Result<PathBuf> {
    std::fs::create_dir_all(data_dir)
        .and_then(|()| data_dir.canonicalize())
        .with_context(|| format!("cannot create the data directory {}", data_dir.display()))
}

fn connect_config(socket_dir: &Path, dbname: &str) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config.host_path(socket_dir).port(PORT).user("postgres").dbname(dbname);
    config
}

fn in_use(data_dir: &Path) -> anyhow::Error {
    anyhow!(
        "the data directory {} is in use by another issue-tracker: stop that one or choose another directory",
        data_dir.display()
    )
}

/// The file whose lock keeps other processes away from the data directory.
#[derive(Debug)]
struct DirectoryLock(File);

impl Drop for DirectoryLock {
    /// Closing the file is not enough: a child that another thread is starting shares it until it executes its program.
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            error!(%error, "data directory not unlocked");
        }
    }
}

/// Locks the data directory. The server does not inherit the file, as it is closed on exec. `None` if another process holds
/// the lock.
fn try_lock(data_dir: &Path) -> anyhow::Result<Option<DirectoryLock>> {
    let path = data_dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(DirectoryLock(file))),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", path.display())),
    }
}
