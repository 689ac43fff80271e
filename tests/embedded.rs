//! Tests the embedded PostgreSQL with real server processes: restarts, crashes and stale state.

#[path = "support"]
mod support {
    pub mod bounds;
    pub mod process;
    pub mod scratch;
}

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use issue_tracker::postgres::{Cluster, Durability};
use tokio_postgres::{NoTls, SimpleQueryMessage};

use support::{
    bounds::HANG,
    process::{Dir, signal, wait_until},
};

/// The environment variable that names the data directory to a process started by `spawn_test_process`.
const CHILD_DATA_DIR: &str = "EMBEDDED_TEST_DATA_DIR";

/// A data directory in a temporary directory.
struct DataDir {
    path: PathBuf,
    _dir: Dir,
}

impl DataDir {
    fn new() -> Self {
        let dir = Dir::new();
        let path = dir.path("data");
        fs::create_dir(&path).unwrap();
        Self { path, _dir: dir }
    }

    fn start(&self) -> Cluster {
        Cluster::start(&self.path, Durability::Throwaway).unwrap()
    }

    /// Starts a durable cluster. Tests that kill the server need it: a throwaway one may lose its last commits.
    fn start_durable(&self) -> Cluster {
        Cluster::start(&self.path, Durability::Durable).unwrap()
    }

    fn cluster(&self) -> PathBuf {
        self.path.join("cluster")
    }
}

fn try_sql(cluster: &Cluster, statements: &str) -> Result<Vec<String>, tokio_postgres::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = cluster.connect_config("postgres").connect(NoTls).await?;
        tokio::spawn(connection);
        let messages = client.simple_query(statements).await?;
        Ok(messages
            .into_iter()
            .filter_map(|message| match message {
                SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            })
            .collect())
    })
}

fn sql(cluster: &Cluster, statements: &str) -> Vec<String> {
    try_sql(cluster, statements).unwrap()
}

fn write_row(cluster: &Cluster) {
    sql(cluster, "CREATE TABLE kept (body text); INSERT INTO kept VALUES ('a row')");
}

fn assert_row_kept(cluster: &Cluster) {
    assert_eq!(sql(cluster, "SELECT body FROM kept"), ["a row"]);
}

fn kill(pid: u32) {
    assert!(signal(pid, libc::SIGKILL));
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Runs `test` of this file in a separate process, which the caller can kill.
fn spawn_test_process(test: &str, data_dir: &DataDir) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test])
        .env(CHILD_DATA_DIR, &data_dir.path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// In a process started by `spawn_test_process`: starts a cluster with one row in it and waits to be killed. Elsewhere:
/// does nothing.
fn serve_if_test_process() {
    let Some(data_dir) = std::env::var_os(CHILD_DATA_DIR) else {
        return;
    };
    let data_dir = PathBuf::from(data_dir);
    let cluster = Cluster::start(&data_dir, Durability::Durable).unwrap();
    write_row(&cluster);
    fs::write(data_dir.join("pid"), cluster.server_pid().to_string()).unwrap();
    fs::rename(data_dir.join("pid"), data_dir.join("serving")).unwrap();
    std::thread::sleep(HANG);
    std::process::exit(1);
}

fn server_pid_of_child(data_dir: &DataDir) -> u32 {
    let path = data_dir.path.join("serving");
    wait_until("the child serves", || path.exists());
    fs::read_to_string(path).unwrap().parse().unwrap()
}

/// Stops a process, so that it cannot restart its server.
fn freeze(pid: u32) {
    assert!(signal(pid, libc::SIGSTOP));
}

/// Retries the start: the kernel takes a moment to release the lock of a killed process.
fn wait_for_start(data_dir: &DataDir) -> Cluster {
    let mut started = None;
    wait_until("the dead service's lock is free", || {
        started = Cluster::start(&data_dir.path, Durability::Throwaway).ok();
        started.is_some()
    });
    started.unwrap()
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn restart_keeps_the_data() {
    let data_dir = DataDir::new();
    let nested = data_dir.path.join("not/yet/there");
    let cluster = Cluster::start(&nested, Durability::Durable).unwrap();
    write_row(&cluster);
    cluster.stop().unwrap();

    let cluster = Cluster::start(&nested, Durability::Durable).unwrap();
    assert_row_kept(&cluster);
    drop(cluster);
    assert_eq!(names_in(&nested), ["cluster", "lock"]);
}

#[test]
fn durable_mode_syncs_to_disk_and_logs_no_statements() {
    let data_dir = DataDir::new();
    let cluster = data_dir.start_durable();
    let settings = "SELECT setting FROM pg_settings WHERE name IN \
        ('fsync', 'full_page_writes', 'listen_addresses', 'synchronous_commit', 'TimeZone') \
        ORDER BY name COLLATE \"C\"";
    assert_eq!(sql(&cluster, settings), ["UTC", "on", "on", "", "on"]);

    try_sql(&cluster, "SELECT 'a secret'::int").unwrap_err();
    assert!(cluster.bin_dir().join("psql").exists());
    cluster.stop().unwrap();
    let log = fs::read_to_string(data_dir.cluster().join("server.log")).unwrap();
    assert!(!log.contains("a secret"), "{log}");
}

#[test]
fn data_dir_in_use_is_rejected() {
    let data_dir = DataDir::new();
    let cluster = data_dir.start();

    let error = Cluster::start(&data_dir.path, Durability::Throwaway).unwrap_err();

    let text = format!("{error:#}");
    assert!(text.contains("in use by another issue-tracker"), "{text}");
    write_row(&cluster);
    cluster.stop().unwrap();
    assert_row_kept(&data_dir.start());
}

#[test]
fn killed_server_is_restarted() {
    let data_dir = DataDir::new();
    let cluster = data_dir.start_durable();
    write_row(&cluster);
    for _ in 0..2 {
        let killed = cluster.server_pid();
        kill(killed);
        wait_until("the server is restarted", || cluster.server_pid() != killed);
        assert_row_kept(&cluster);
    }
}

#[test]
fn query_of_a_killed_server_does_not_block_the_restart() {
    let data_dir = DataDir::new();
    let cluster = data_dir.start_durable();
    write_row(&cluster);
    std::thread::scope(|scope| {
        // A busy backend does not notice that the postmaster is dead.
        let query = scope.spawn(|| try_sql(&cluster, "DO 'BEGIN LOOP NULL; END LOOP; END'"));
        let running = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'DO %'";
        wait_until("the query runs", || !sql(&cluster, running).is_empty());

        let killed = cluster.server_pid();
        kill(killed);
        wait_until("the server is restarted", || cluster.server_pid() != killed);

        query.join().unwrap().unwrap_err();
        assert_row_kept(&cluster);
    });
}

#[test]
fn root_can_use_a_data_dir_that_the_postgres_user_cannot_access() {
    let data_dir = DataDir::new();
    fs::set_permissions(&data_dir.path, fs::Permissions::from_mode(0o700)).unwrap();
    let cluster = data_dir.start();
    write_row(&cluster);
    cluster.stop().unwrap();

    assert_row_kept(&data_dir.start());
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(&data_dir.path), 0o700);
    assert_eq!(mode(&data_dir.cluster()), 0o700);
    if is_root() {
        let elsewhere = fs::read_link(data_dir.cluster()).unwrap();
        assert!(elsewhere.starts_with("/var/lib/issue-tracker"));
        assert_ne!(fs::metadata(&elsewhere).unwrap().uid(), 0);
    }
}

#[test]
fn dangling_cluster_symlink_is_not_replaced_by_an_empty_cluster() {
    let data_dir = DataDir::new();
    std::os::unix::fs::symlink("/var/lib/issue-tracker/not-mounted", data_dir.cluster()).unwrap();

    let error = Cluster::start(&data_dir.path, Durability::Throwaway).unwrap_err();

    let text = format!("{error:#}");
    assert!(text.contains("bring back what it points to"), "{text}");
}

#[test]
fn data_dir_path_may_be_longer_than_a_socket_path() {
    let data_dir = DataDir::new();
    let long = data_dir.path.join("long".repeat(30));
    let cluster = Cluster::start(&long, Durability::Throwaway).unwrap();
    let socket_dir = cluster.socket_dir().to_owned();
    write_row(&cluster);
    assert!(socket_dir.starts_with("/tmp"));

    cluster.stop().unwrap();
    assert!(!socket_dir.exists());
    assert_eq!(names_in(&long), ["cluster", "lock"]);
}

#[test]
fn incomplete_cluster_is_replaced() {
    let data_dir = DataDir::new();
    let incomplete = data_dir.path.join("cluster.new-0");
    fs::create_dir(&incomplete).unwrap();
    fs::write(incomplete.join("PG_VERSION"), "15\n").unwrap();
    fs::create_dir(data_dir.cluster()).unwrap();

    let cluster = data_dir.start();
    write_row(&cluster);
    cluster.stop().unwrap();
    assert_eq!(names_in(&data_dir.path), ["cluster", "lock"]);
}

#[test]
fn start_recovers_from_a_service_killed_during_initdb() {
    serve_if_test_process();
    let data_dir = DataDir::new();
    let mut child = spawn_test_process("start_recovers_from_a_service_killed_during_initdb", &data_dir);
    wait_until("the child creates the cluster", || {
        names_in(&data_dir.path).iter().any(|name| name.starts_with("cluster"))
    });
    kill(child.id());
    child.wait().unwrap();

    let cluster = wait_for_start(&data_dir);
    write_row(&cluster);
    cluster.stop().unwrap();
    let names = names_in(&data_dir.path);
    assert!(!names.iter().any(|name| name.starts_with("cluster.new-")));
}

#[test]
fn rows_survive_a_killed_service() {
    serve_if_test_process();
    let data_dir = DataDir::new();
    let mut child = spawn_test_process("rows_survive_a_killed_service", &data_dir);
    server_pid_of_child(&data_dir);
    kill(child.id());
    // The start must succeed even while the killed child and its server are still exiting.
    let cluster = wait_for_start(&data_dir);
    child.wait().unwrap();
    assert_row_kept(&cluster);
}

#[test]
fn rows_survive_a_service_killed_with_its_server() {
    serve_if_test_process();
    let data_dir = DataDir::new();
    let name = "rows_survive_a_service_killed_with_its_server";
    let mut child = spawn_test_process(name, &data_dir);
    let server = server_pid_of_child(&data_dir);
    freeze(child.id());
    kill(server);
    kill(child.id());
    child.wait().unwrap();

    let cluster = data_dir.start();
    assert_row_kept(&cluster);
}

#[test]
fn stale_pid_file_is_replaced_and_the_process_it_names_keeps_running() {
    let data_dir = DataDir::new();
    let cluster = data_dir.start();
    write_row(&cluster);
    cluster.stop().unwrap();
    // The process has the user of the server. PostgreSQL itself detects a stale pid file of another user's process.
    let owner = fs::metadata(data_dir.cluster()).unwrap();
    let mut command = Command::new("sleep");
    command.arg("600");
    if is_root() {
        use std::os::unix::process::CommandExt;
        command.uid(owner.uid()).gid(owner.gid());
    }
    let mut other = command.spawn().unwrap();
    let path = data_dir.cluster().canonicalize().unwrap();
    let pid_file = format!("{}\n{}\n1700000000\n5432\n", other.id(), path.display());
    fs::write(path.join("postmaster.pid"), pid_file).unwrap();

    let cluster = data_dir.start();

    assert_row_kept(&cluster);
    assert!(other.try_wait().unwrap().is_none());
    cluster.stop().unwrap();
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn failed_start_quotes_the_postgres_log() {
    let data_dir = DataDir::new();
    data_dir.start().stop().unwrap();
    fs::write(data_dir.cluster().join("postgresql.conf"), "no such setting\n").unwrap();

    let error = Cluster::start(&data_dir.path, Durability::Throwaway).unwrap_err();

    let text = format!("{error:#}");
    assert!(text.contains("contains errors"), "{text}");
}
