//! Where things are: the binaries, the cluster's directory, the directory of its socket.

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
use super::{Durability, PORT};

/// Where Debian's packages put each version's binaries.
const VERSIONS_DIR: &str = "/usr/lib/postgresql";
/// Where clusters go that the user they belong to could not reach inside the data directory.
const CLUSTERS_DIR: &str = "/var/lib/issue-tracker";
const CLUSTER: &str = "cluster";
/// The cluster (or the symlink to it) has a name of this kind until it's complete.
const UNFINISHED_PREFIX: &str = "cluster.new-";
const SHORT_SOCKETS_DIR: &str = "/tmp";
const SHORT_SOCKET_PREFIX: &str = "issue-tracker-";
/// `sockaddr_un` has 108 bytes, the last of them zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// initdb takes under a second, mostly spent in fsync.
const INITDB_MAX: Duration = Duration::from_secs(180);
/// An initdb whose service was killed ends at its next step, until when it may still make files.
const UNFINISHED_REMOVAL_MAX: Duration = Duration::from_secs(10);

/// `PG_BINDIR`, the highest version among Debian's, or what PATH has.
pub(super) fn find_bin_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("PG_BINDIR").filter(|dir| !dir.is_empty()) {
        let dir = PathBuf::from(dir);
        ensure!(
            has_server(&dir),
            "PG_BINDIR is {}, which holds no postgres and initdb: point it at a server's binaries or unset it; they \
             are in the package postgresql (apt-get install postgresql)",
            dir.display()
        );
        return dir.canonicalize().with_context(|| format!("cannot resolve PG_BINDIR={}", dir.display()));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    highest_version(Path::new(VERSIONS_DIR))
        .or_else(|| std::env::split_paths(&path).find(|dir| dir.is_absolute() && has_server(dir)))
        .with_context(|| {
            format!(
                "no PostgreSQL server found in PG_BINDIR, {VERSIONS_DIR} or PATH: install the package postgresql \
                 (apt-get install postgresql)"
            )
        })
}

fn highest_version(versions: &Path) -> Option<PathBuf> {
    fs::read_dir(versions)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let numbers = name.to_str()?.split('.').map(str::parse::<u32>);
            let version: Vec<u32> = numbers.collect::<Result<_, _>>().ok()?;
            Some((version, entry.path().join("bin")))
        })
        .filter(|(_, bin)| has_server(bin))
        .max()
        .map(|(_, bin)| bin)
}

/// A package of clients alone also makes such a directory.
fn has_server(dir: &Path) -> bool {
    ["postgres", "initdb"].iter().all(|name| dir.join(name).is_file())
}

/// The cluster of `data_dir`, made if there is none, without symlinks in its path; and who runs it.
pub(super) fn find_or_make_cluster(
    data_dir: &Path,
    bin_dir: &Path,
    durability: Durability,
) -> anyhow::Result<(PathBuf, RunAs)> {
    remove_unfinished(data_dir)?;
    let path = data_dir.join(CLUSTER);
    // An empty directory may be a mount point or a mistake, but is no cluster; any other is not removed by this.
    let _ = fs::remove_dir(&path);
    if path.symlink_metadata().is_err() {
        make_cluster(data_dir, bin_dir, durability)?;
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

/// Under another name first, so that a cluster is either complete or not there.
fn make_cluster(data_dir: &Path, bin_dir: &Path, durability: Durability) -> anyhow::Result<()> {
    let run_as = RunAs::for_new_cluster()?;
    check_binaries(&run_as, bin_dir)?;
    let id = Uuid::new_v4();
    let unfinished = data_dir.join(format!("{UNFINISHED_PREFIX}{id}"));
    let made = if run_as.can_enter(data_dir, bin_dir)? {
        make_in(&unfinished, data_dir, &run_as, bin_dir, durability)
    } else {
        make_elsewhere(&unfinished, id, &run_as, bin_dir).and_then(|elsewhere| {
            make_in(&elsewhere, data_dir, &run_as, bin_dir, durability)?;
            sync_dir(Path::new(CLUSTERS_DIR))
        })
    };
    made.and_then(|()| {
        let path = data_dir.join(CLUSTER);
        fs::rename(&unfinished, &path).with_context(|| format!("cannot make {}", path.display()))?;
        sync_dir(data_dir)
    })
    .inspect_err(|_| {
        // The error at hand says more than one about clearing up would; the next start tries that again.
        let _ = remove_unfinished(data_dir);
    })
}

/// Makes the symlink first: through it, the next start finds what this one leaves unfinished.
fn make_elsewhere(link: &Path, id: Uuid, run_as: &RunAs, bin_dir: &Path) -> anyhow::Result<PathBuf> {
    let clusters = Path::new(CLUSTERS_DIR);
    match DirBuilder::new().mode(0o711).create(clusters) {
        // Whatever the umask, those who run the clusters have to pass.
        Ok(()) => fs::set_permissions(clusters, Permissions::from_mode(0o711))?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("cannot make {CLUSTERS_DIR}"));
        }
    }
    let name = run_as.name();
    ensure!(
        run_as.can_enter(clusters, bin_dir)?,
        "the user {name} reaches neither the data directory nor {CLUSTERS_DIR}: give it access to one of them"
    );
    let elsewhere = clusters.join(id.to_string());
    symlink(&elsewhere, link).with_context(|| format!("cannot make {}", link.display()))?;
    info!("the user {name} cannot reach the data directory, so the cluster goes to {}", elsewhere.display());
    Ok(elsewhere)
}

fn make_in(
    cluster: &Path,
    data_dir: &Path,
    run_as: &RunAs,
    bin_dir: &Path,
    durability: Durability,
) -> anyhow::Result<()> {
    make_private_dir(cluster, run_as)?;
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

fn make_private_dir(dir: &Path, run_as: &RunAs) -> anyhow::Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .and_then(|()| run_as.own(dir))
        .with_context(|| format!("cannot make {}", dir.display()))
}

fn sync_dir(dir: &Path) -> anyhow::Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).with_context(|| format!("cannot sync {}", dir.display()))
}

/// Removes what services left that were killed while they made a cluster.
fn remove_unfinished(data_dir: &Path) -> anyhow::Result<()> {
    let entries = fs::read_dir(data_dir).with_context(|| format!("cannot read {}", data_dir.display()))?;
    for entry in entries.flatten() {
        let is_unfinished = entry.file_name().to_string_lossy().starts_with(UNFINISHED_PREFIX);
        if !is_unfinished {
            continue;
        }
        let path = entry.path();
        warn!(path = %path.display(), "removing a cluster that was never finished");
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

/// Tries again for a while, as an initdb on its way out can add files behind the removal's back.
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

/// The directory of the server's socket: beside the cluster, where whoever reaches the cluster reaches it, or under
/// `/tmp` with a symlink beside the cluster, where the path would be too long for a socket. Removed on drop.
#[derive(Debug)]
pub(super) struct SocketDir {
    path: PathBuf,
    beside: PathBuf,
}

impl SocketDir {
    /// Call this when no server uses the directory any more: what an earlier one left is removed.
    pub(super) fn make(cluster: &Path, run_as: &RunAs) -> anyhow::Result<SocketDir> {
        let mut beside = OsString::from(cluster);
        beside.push(".socket");
        let beside = PathBuf::from(beside);
        remove_socket_dir(&beside).with_context(|| format!("cannot replace {}: move it away", beside.display()))?;
        let mut path = beside.clone();
        if path.join(socket_name()).as_os_str().as_bytes().len() > SOCKET_PATH_BYTES_MAX {
            let id = Uuid::new_v4().simple().to_string();
            path = Path::new(SHORT_SOCKETS_DIR).join(format!("{SHORT_SOCKET_PREFIX}{}", &id[..12]));
            symlink(&path, &beside).with_context(|| format!("cannot make {}", beside.display()))?;
        }
        make_private_dir(&path, run_as)?;
        Ok(SocketDir { path, beside })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        if let Err(error) = remove_socket_dir(&self.beside) {
            warn!(path = %self.path.display(), %error, "the socket's directory stays");
        }
    }
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

/// Removes only what PostgreSQL makes there, and so nothing of anyone's if the directory is another one.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn install(versions: &Path, version: &str, programs: &[&str]) {
        let bin = versions.join(version).join("bin");
        fs::create_dir_all(&bin).unwrap();
        for program in programs {
            fs::write(bin.join(program), "").unwrap();
        }
    }

    #[test]
    fn the_highest_version_with_a_server_is_taken() {
        let versions = std::env::temp_dir().join(format!("versions-{}", Uuid::new_v4()));
        assert_eq!(highest_version(&versions), None);

        install(&versions, "9.6", &["postgres", "initdb"]);
        install(&versions, "15", &["postgres", "initdb"]);
        install(&versions, "17", &["psql"]);
        install(&versions, "common", &["postgres", "initdb"]);
        let highest = highest_version(&versions);

        fs::remove_dir_all(&versions).unwrap();
        assert_eq!(highest, Some(versions.join("15/bin")));
    }
}
