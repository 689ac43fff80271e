//! A PostgreSQL cluster that belongs to the service: made, started, kept running and stopped by it.
//!
//! The server's life hangs on the service's. A service that is killed takes it along (the kernel sends the server
//! SIGINT), a server that dies is started again, and a start waits for what is still shutting down. Nothing listens on
//! the network: the server is reached through a Unix socket in a directory that only its user and root can enter.
//!
//! In the data directory:
//! - `lock`: held by the one service that uses the directory;
//! - `cluster`: PostgreSQL's data directory with its log `server.log`, or a symlink to one in `/var/lib/issue-tracker`
//!   if the service runs as root and the user that it lends to PostgreSQL cannot get here;
//! - `cluster.socket` (beside the cluster): the directory of the socket, or a symlink to a shorter one in `/tmp`.

mod data_directory;
mod process;
mod server;
mod stale_server;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, bail};
use tracing::{error, info};

use data_directory::SocketDir;
use server::{Server, Supervisor};

/// Part of the socket's name; no port is opened.
const PORT: u16 = 5432;

/// Whether commits have to survive the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    Durable,
    /// For tests: a power failure may cost the whole cluster, a killed server the commits of its last second. A killed
    /// service costs nothing, as the server then shuts down properly.
    Throwaway,
}

/// A running server. Its methods block; on an async runtime call `start` and `stop` where blocking is allowed.
#[derive(Debug)]
pub struct Cluster {
    /// Taken by `stop`, absent only while that or the drop is at work.
    supervisor: Option<Supervisor>,
    socket_dir: SocketDir,
    bin_dir: PathBuf,
    /// Last, so that the data directory is free only when all the above is gone.
    _lock: File,
}

impl Cluster {
    /// Makes the cluster in `data_dir` if there is none, starts it, returns once it accepts connections. If an earlier
    /// service's server is still shutting down, waits for it; if another service uses `data_dir`, fails at once.
    pub fn start(data_dir: &Path, durability: Durability) -> anyhow::Result<Cluster> {
        Cluster::start_unless(data_dir, durability, &|| false)?.context("the start was given up")
    }

    /// The same; `None` when it was given up, which is asked again and again while the server gets ready. A cluster that is
    /// being made is finished first.
    pub fn start_unless(
        data_dir: &Path,
        durability: Durability,
        given_up: &dyn Fn() -> bool,
    ) -> anyhow::Result<Option<Cluster>> {
        std::fs::create_dir_all(data_dir)
            .and_then(|()| data_dir.canonicalize())
            .with_context(|| format!("cannot make the data directory {}", data_dir.display()))
            .and_then(|data_dir| start_in(&data_dir, durability, given_up))
    }

    /// How to reach database `dbname`, as its superuser.
    pub fn connect_config(&self, dbname: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.socket_dir()).port(PORT).user("postgres").dbname(dbname);
        config
    }

    /// What PostgreSQL's own programs take as the host.
    pub fn socket_dir(&self) -> &Path {
        self.socket_dir.path()
    }

    /// Where PostgreSQL's own programs are.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    /// The server's main process. Another one after the server died; until that is up, still the dead one.
    pub fn server_pid(&self) -> u32 {
        self.supervisor.as_ref().map_or(0, Supervisor::pid)
    }

    /// Disconnects the clients and stops the server, within a minute. Dropping does the same, and logs errors.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.supervisor.take().map_or(Ok(()), Supervisor::stop)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.supervisor.take().map(Supervisor::stop) {
            error!("postgres was not stopped: {error:#}");
        }
    }
}

fn start_in(data_dir: &Path, durability: Durability, given_up: &dyn Fn() -> bool) -> anyhow::Result<Option<Cluster>> {
    let lock = lock(data_dir)?;
    let bin_dir = data_directory::find_bin_dir()?;
    let (cluster, run_as) = data_directory::find_or_make_cluster(data_dir, &bin_dir, durability)?;
    let cleared = stale_server::clear(&cluster, &|pause| {
        thread::sleep(pause);
        given_up()
    })?;
    if !cleared {
        return Ok(None);
    }
    let socket_dir = SocketDir::make(&cluster, &run_as)?;
    let server = Server {
        bin_dir: bin_dir.clone(),
        cluster: cluster.clone(),
        socket_dir: socket_dir.path().to_owned(),
        run_as,
        durability,
    };
    let Some(supervisor) = Supervisor::start(server, given_up)? else {
        return Ok(None);
    };
    let pid = supervisor.pid();
    info!(pid, cluster = %cluster.display(), "postgres is up");
    Ok(Some(Cluster { supervisor: Some(supervisor), socket_dir, bin_dir, _lock: lock }))
}

/// Held as long as the file is open; like all files it is closed on exec, so the server doesn't inherit it.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let path = data_dir.join("lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    // SAFETY: flock takes two numbers, and the descriptor is open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(file);
    }
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::WouldBlock {
        bail!(
            "the data directory {} is in use by another issue-tracker: stop that one or choose another directory",
            data_dir.display()
        );
    }
    Err(error).with_context(|| format!("cannot lock {}", path.display()))
}
