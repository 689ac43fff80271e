//! The cluster's directory and the directory of its socket.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use tracing::{info, warn};
use uuid::Uuid;

use super::process::{self, RunAs, TICK};
use super::server::last_lines;
use super::settings::{Durability, PORT};

/// Directory of clusters whose owner could not reach them inside the data directory.
const CLUSTERS_DIR: &str = "/var/lib/issue-tracker";
const CLUSTER: &str = "cluster";
/// Prefix of the cluster (or of the symlink to it) until initdb has completed it.
const UNFINISHED_PREFIX: &str = "cluster.new-";
const SHORT_SOCKETS_DIR: &str = "/tmp";
const SHORT_SOCKET_PREFIX: &str = "issue-tracker-";
/// `sockaddr_un` has 108 bytes, the last of them zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Maximum time of initdb, which usually takes less than a second, most of it in fsync.
const INITDB_MAX: Duration = Duration::from_secs(180);
/// Maximum time to retry a removal: an initdb whose service was killed may create files until its next step.
const UNFINISHED_REMOVAL_MAX: Duration = Duration::from_secs(10);

/// Returns the major version of the data directory's cluster. `None` if there is no cluster yet.
pub(super) fn cluster_version(data_dir: &Path) -> anyhow::Result<Option<String>> {
    let path = data_dir.join(CLUSTER).join("PG_VERSION");
    match fs::read_to_string(&path) {
        Ok(version) => Ok(Some(version.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Returns the directory of the socket of the data directory's server, if the server has a socket there.
pub(super) fn running_socket_dir(data_dir: &Path) -> Option<PathBuf> {
    let beside = socket_dir_beside(&data_dir.join(CLUSTER).canonicalize().ok()?).canonicalize().ok()?;
    beside.join(socket_name()).exists().then_some(beside)
}

/// Returns the cluster of `data_dir`, without symlinks in its path, and the user that runs it. Creates a missing cluster.
pub(super) fn find_or_create_cluster(
    data_dir: &Path,
    bin_dir: &Path,
    durability: Durability,
) -> anyhow::Result<(PathBuf, RunAs)> {
    remove_unfinished(data_dir)?;
    let path = data_dir.join(CLUSTER);
    // An empty directory is no cluster; remove_dir leaves any other alone.
    let _ = fs::remove_dir(&path);
    if path.symlink_metadata().is_err() {
        create_cluster(data_dir, bin_dir, durability)?;
    }
    let cluster = path.canonicalize().with_context(|| {
        format!(
            "cannot follow {}: bring back what it points to, or remove it to start with an empty database",
            path.display()
        )
    })?;
    ensure!(
        cluster.join("PG_VERSION").is_file(),
        "{} is not a PostgreSQL cluster: move it away to start with an empty database",
        cluster.display()
    );
    let run_as = RunAs::owner_of(&cluster)?;
    check_binaries(&run_as, bin_dir)?;
    ensure!(
        run_as.can_enter(&cluster, bin_dir)?,
        "{}, which the cluster {} belongs to, cannot reach it: give it access to the directories above",
        run_as.name(),
        cluster.display()
    );
    Ok((cluster, run_as))
}

fn check_binaries(run_as: &RunAs, bin_dir: &Path) -> anyhow::Result<()> {
    ensure!(
        run_as.can_enter(Path::new("/"), bin_dir)?,
        "{} may not run the programs in {}: give it access, or set PG_BINDIR to another directory",
        run_as.name(),
        bin_dir.display()
    );
    Ok(())
}

/// Creates the cluster under a temporary name and renames it, so that a cluster is either complete or absent.
fn create_cluster(data_dir: &Path, bin_dir: &Path, durability: Durability) -> anyhow::Result<()> {
    let run_as = RunAs::for_new_cluster()?;
    check_binaries(&run_as, bin_dir)?;
    let id = Uuid::new_v4();
    let unfinished = data_dir.join(format!("{UNFINISHED_PREFIX}{id}"));
    let created = if run_as.can_enter(data_dir, bin_dir)? {
        create_in(&unfinished, data_dir, &run_as, bin_dir, durability)
    } else {
        create_elsewhere(&unfinished, id, &run_as, bin_dir).and_then(|elsewhere| {
            create_in(&elsewhere, data_dir, &run_as, bin_dir, durability)?;
            sync_dir(Path::new(CLUSTERS_DIR))
        })
    };
    created
        .and_then(|()| {
            let path = data_dir.join(CLUSTER);
            fs::rename(&unfinished, &path).with_context(|| format!("cannot create {}", path.display()))?;
            sync_dir(data_dir)
        })
        .inspect_err(|_| {
            // The first error explains the failure; the next start retries the removal.
            let _ = remove_unfinished(data_dir);
        })
}

/// Creates the symlink first: through it, the next start finds an unfinished cluster.
fn create_elsewhere(link: &Path, id: Uuid, run_as: &RunAs, bin_dir: &Path) -> anyhow::Result<PathBuf> {
    let clusters = Path::new(CLUSTERS_DIR);
    match DirBuilder::new().mode(0o711).create(clusters) {
        // Regardless of the umask: the users that run the clusters must be able to enter.
        Ok(()) => fs::set_permissions(clusters, Permissions::from_mode(0o711))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot create {CLUSTERS_DIR}"));
        }
    }
    let name = run_as.name();
    ensure!(
        run_as.can_enter(clusters, bin_dir)?,
        "the user {name} reaches neither the data directory nor {CLUSTERS_DIR}: give it access to one of them"
    );
    let elsewhere = clusters.join(id.to_string());
    symlink(&elsewhere, link).with_context(|| format!("cannot create {}", link.display()))?;
    info!(cluster = %elsewhere.display(), user = name, "cluster placed outside the data directory, which its user cannot reach");
    Ok(elsewhere)
}

fn create_in(
    cluster: &Path,
    data_dir: &Path,
    run_as: &RunAs,
    bin_dir: &Path,
    durability: Durability,
) -> anyhow::Result<()> {
    create_private_dir(cluster, run_as)?;
    let output_path = data_dir.join("initdb.log");
    let output = File::create(&output_path).with_context(|| format!("cannot write {}", output_path.display()))?;
    let mut initdb = run_as.command(&bin_dir.join("initdb"), cluster);
    initdb
        .args(["-U", "postgres", "-A", "trust", "-E", "UTF8"])
        .args(["--locale=C.UTF-8", "--no-instructions", "-D"])
        .arg(cluster)
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output));
    if durability == Durability::Throwaway {
        initdb.arg("--no-sync");
    }
    process::die_with_parent(&mut initdb, libc::SIGTERM);
    let status = process::run(&mut initdb, INITDB_MAX).context("cannot run initdb")?;
    if !status.success() {
        bail!("initdb failed ({status}):\n{}", last_lines(&output_path, 0));
    }
    fs::remove_file(&output_path).with_context(|| format!("cannot remove {}", output_path.display()))
}

fn create_private_dir(dir: &Path, run_as: &RunAs) -> anyhow::Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .and_then(|()| run_as.own(dir))
        .with_context(|| format!("cannot create {}", dir.display()))
}

fn sync_dir(dir: &Path) -> anyhow::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("cannot sync {}", dir.display()))
}

/// Removes unfinished clusters of services that were killed during initdb.
fn remove_unfinished(data_dir: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(data_dir).with_context(|| format!("cannot read {}", data_dir.display()))?;
    for entry in entries.flatten() {
        let is_unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED_PREFIX);
        if !is_unfinished {
            continue;
        }
        let path = entry.path();
        warn!(path = %path.display(), "unfinished cluster found");
        let Ok(target) = fs::read_link(&path) else {
            remove_tree(&path)?;
            continue;
        };
        if target.parent() == Some(Path::new(CLUSTERS_DIR)) {
            remove_tree(&target)?;
        }
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Retries for [`UNFINISHED_REMOVAL_MAX`], as an initdb that is ending can still create files.
fn remove_tree(path: &Path) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match fs::remove_dir_all(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => {
                return Ok(());
            }
            Err(error) if began.elapsed() > UNFINISHED_REMOVAL_MAX => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

/// The directory of the server's socket: beside the cluster, or under `/tmp` with a symlink beside the cluster if the path
/// would be too long for a socket. Removed on drop.
#[derive(Debug)]
pub(super) struct SocketDir {
    path: PathBuf,
    beside: PathBuf,
}

impl SocketDir {
    /// Creates the directory and removes that of an earlier server. No server may be using it.
    pub(super) fn create(cluster: &Path, run_as: &RunAs) -> anyhow::Result<SocketDir> {
        let beside = socket_dir_beside(cluster);
        remove_socket_dir(&beside).with_context(|| format!("cannot replace {}: move it away", beside.display()))?;
        let mut path = beside.clone();
        if path.join(socket_name()).as_os_str().as_bytes().len() > SOCKET_PATH_BYTES_MAX {
            let id = Uuid::new_v4().simple().to_string();
            path = Path::new(SHORT_SOCKETS_DIR).join(format!("{SHORT_SOCKET_PREFIX}{}", &id[..12]));
            symlink(&path, &beside).with_context(|| format!("cannot create {}", beside.display()))?;
        }
        create_private_dir(&path, run_as)?;
        Ok(SocketDir { path, beside })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        if let Err(error) = remove_socket_dir(&self.beside) {
            warn!(path = %self.path.display(), %error, "socket directory not removed");
        }
    }
}

fn socket_dir_beside(cluster: &Path) -> PathBuf {
    let mut beside = OsString::from(cluster);
    beside.push(".socket");
    beside.into()
}

fn remove_socket_dir(beside: &Path) -> io::Result<()> {
    let Ok(target) = fs::read_link(beside) else {
        return remove_sockets(beside);
    };
    let name = target.file_name().unwrap_or_default();
    let is_ours = target.parent() == Some(Path::new(SHORT_SOCKETS_DIR))
        && name.as_bytes().starts_with(SHORT_SOCKET_PREFIX.as_bytes());
    if is_ours {
        remove_sockets(&target)?;
    }
    fs::remove_file(beside)
}

/// Removes only the files that PostgreSQL creates there, so that a wrong directory loses nothing else.
fn remove_sockets(dir: &Path) -> io::Result<()> {
    let socket = dir.join(socket_name());
    let lock = dir.join(format!("{}.lock", socket_name()));
    for removed in [fs::remove_file(socket), fs::remove_file(lock), fs::remove_dir(dir)] {
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn socket_name() -> String {
    format!(".s.PGSQL.{PORT}")
}
