//! Backs up the database under load with the scripts of `deploy/backup/`, destroys it, restores it, and compares the rows with
//! the responses that the clients received.

use std::{
    collections::HashSet,
    fs,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use issue_tracker::{
    pb::{CreateIssueRequest, Issue},
    postgres::{Cluster, Durability},
};
use prost::Message;
use tokio::{sync::watch, task::block_in_place};
use tokio_postgres::Config;
use tonic::transport::Channel;
use uuid::Uuid;

use crate::{
    harness::{Settings, call},
    load::{CompletedMutation, Load},
    support::{
        database::session,
        eventually::eventually,
        external::External,
        process::{Dir, signal},
        service::{Service, finished, program},
    },
    verify::verify,
};

const CLIENTS: usize = 12;
/// Mutations that are acknowledged before the backup, during it, and after it.
const PHASE: u64 = 100;
const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");
/// The database and the roles of `deploy/postgresql/roles.sql`.
const DATABASE: &str = "tracker";
const OWNER: &str = "tracker_owner";
const SERVICE_ROLE: &str = "tracker";

/// A directory for backups, with the scripts. The user of PostgreSQL owns it and can execute them.
struct Store {
    dir: Dir,
    owner: (u32, u32),
}

impl Store {
    fn new(external: &External) -> Self {
        let cluster = fs::metadata(external.dir.path("external/cluster")).unwrap();
        let store = Self { dir: Dir::new(), owner: (cluster.uid(), cluster.gid()) };
        store.own(&store.dir);
        for script in fs::read_dir(format!("{DEPLOY}/backup")).unwrap() {
            let script = script.unwrap();
            fs::copy(script.path(), store.dir.path(script.file_name().to_str().unwrap())).unwrap();
        }
        store
    }

    fn own(&self, path: &Path) {
        chown(path, Some(self.owner.0), Some(self.owner.1)).unwrap();
    }

    /// Returns a command that runs a script, or a program of PostgreSQL, as the user of PostgreSQL on a database.
    fn command(&self, program: PathBuf, external: &External, user: &str, database: &str) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", format!("{}:{path}", external.cluster.bin_dir().display()))
            .env("PGHOST", external.cluster.socket_dir())
            .env("PGUSER", user)
            .env("PGDATABASE", database)
            .current_dir(&*self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: geteuid has no arguments and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            command.uid(self.owner.0).gid(self.owner.1);
        }
        command
    }

    /// Runs a script of `deploy/backup/` as the role `user` on a database.
    fn run(&self, script: &str, args: &[&str], external: &External, user: &str, database: &str) {
        let mut command = self.command(self.dir.path(script), external, user, database);
        let output = block_in_place(|| finished(command.args(args).spawn().unwrap()));
        assert!(output.status.success(), "{script}: {output:?}");
    }
}

/// Creates the database and the roles, as `docs/operations.md` says.
fn create_roles(store: &Store, external: &External) {
    let mut psql = store.command("psql".into(), external, "postgres", "postgres");
    psql.env("OWNER_PASSWORD", "it's secret").env("SERVICE_PASSWORD", "another secret");
    // From standard input: the user of PostgreSQL may not be able to read the repository.
    psql.arg("-X").stdin(fs::File::open(format!("{DEPLOY}/postgresql/roles.sql")).unwrap());
    let output = block_in_place(|| finished(psql.spawn().unwrap()));
    assert!(output.status.success(), "{output:?}");
}

fn url(external: &External, user: &str) -> String {
    format!("host={} user={user} dbname={DATABASE}", external.cluster.socket_dir().display())
}

/// Applies the migrations as the owner, and starts the service with the other role.
fn migrate_and_serve(external: &External) -> Service {
    let migrate =
        program(&["migrate", "--grant-to", SERVICE_ROLE, "--database-url", &url(external, OWNER)]).spawn().unwrap();
    let migrated = block_in_place(|| finished(migrate));
    assert!(migrated.status.success(), "{migrated:?}");
    block_in_place(|| Service::start(&external.dir, program(&["--database-url", &url(external, SERVICE_ROLE)])))
}

/// Connects as superuser.
fn database(external: &External) -> Config {
    external.cluster.connect_config(DATABASE)
}

/// Returns the request ids of the committed mutations.
async fn committed(external: &External) -> HashSet<Uuid> {
    let rows = session(&database(external)).await.query("SELECT request_id FROM requests", &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Asserts that the restored database has the mutations in `before`, and of all mutations exactly those whose response it
/// stores; that a retry returns this response and writes nothing; and that the service continues.
async fn assert_restored(external: &External, before: &HashSet<Uuid>, mut mutations: Vec<CompletedMutation>) {
    let restored = committed(external).await;
    let lost: Vec<_> = before.difference(&restored).collect();
    assert!(lost.is_empty(), "{} of {} mutations before the backup are lost: {lost:?}", lost.len(), before.len());
    let acknowledged = mutations.iter().filter(|mutation| mutation.response.is_some()).count();
    println!("{acknowledged} mutations, {} of them before the backup, {} restored", before.len(), restored.len());
    assert!(restored.len() < acknowledged, "no mutation after the backup was lost: the database was not destroyed");
    mutations.retain(|mutation| mutation.response.is_none() || restored.contains(&mutation.request_id));

    let mut service = migrate_and_serve(external);
    let token = mutations[0].token.clone();
    verify(&database(external), &service.channel(), mutations).await;
    create_issue(&service.channel(), &token).await;
    assert_eq!(committed(external).await.len(), restored.len() + 1);
    assert_eq!(service.stop().code(), Some(0));
    service.assert_no_internal_errors();
}

async fn create_issue(channel: &Channel, token: &str) {
    let issue = Some(Issue { title: "after the restoration".to_owned(), ..Issue::default() });
    let request_id = Uuid::new_v4().to_string();
    let request = CreateIssueRequest { issue, request_id, ..Default::default() };
    call(channel, token, "IssueService/CreateIssue", &request.encode_to_vec()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dump_restores_every_write_acknowledged_before_it_once() {
    let mut rng = Settings::from_environment().rng();
    let external = External::start(Durability::Throwaway);
    let store = Store::new(&external);
    let file = store.dir.text("tracker.dump");
    create_roles(&store, &external);
    let mut service = migrate_and_serve(&external);
    let addresses = watch::Sender::new(service.address.clone());
    let load = Load::start(&database(&external), addresses.subscribe(), CLIENTS, &mut rng).await;
    load.wait_for_acknowledged(PHASE).await;

    let before = committed(&external).await;
    store.run("dump.sh", &[&file], &external, OWNER, DATABASE);
    load.wait_for_acknowledged(PHASE).await;
    let mutations = load.finish().await;
    assert_eq!(service.stop().code(), Some(0));
    drop(external);

    let external = External::start(Durability::Throwaway);
    create_roles(&store, &external);
    store.run("restore-dump.sh", &[&file], &external, OWNER, DATABASE);
    assert_restored(&external, &before, mutations).await;
}

/// Restarts a server so that it archives its log.
async fn archive_wal(external: External, store: &Store, archive: &str) -> External {
    fs::create_dir(archive).unwrap();
    store.own(Path::new(archive));
    let admin = session(&external.config()).await;
    let command = format!("{} {archive} \"%p\" %f", store.dir.text("archive-wal.sh"));
    admin.batch_execute("ALTER SYSTEM SET archive_mode = on").await.unwrap();
    admin.batch_execute(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await.unwrap();
    let External { cluster, dir } = external;
    let cluster = block_in_place(|| {
        cluster.stop().unwrap();
        Cluster::start(&dir.path("external"), Durability::Durable).unwrap()
    });
    External { cluster, dir }
}

/// Ends the current segment of the log, and waits until it is archived.
async fn wait_until_archived(external: &External) {
    let admin = session(&external.config()).await;
    let segment = "SELECT pg_walfile_name(pg_current_wal_insert_lsn())";
    let segment: String = admin.query_one(segment, &[]).await.unwrap().get(0);
    admin.execute("SELECT pg_switch_wal()", &[]).await.unwrap();
    let archived = "SELECT coalesce(last_archived_wal >= $1, false) FROM pg_stat_archiver";
    eventually("the log is archived", async || admin.query_one(archived, &[&segment]).await.unwrap().get(0)).await;
}

/// Restores a base backup and its archive into a new server, and waits until it has replayed the archive.
async fn restore_base(store: &Store, backup: &str, archive: &str, external: External) -> External {
    let dir = Dir::new();
    let data_dir = dir.path("external");
    fs::create_dir(&data_dir).unwrap();
    store.own(&data_dir);
    let cluster = data_dir.join("cluster").display().to_string();
    store.run("restore-base.sh", &[backup, archive, &cluster], &external, "postgres", "postgres");
    drop(external);
    let cluster = block_in_place(|| Cluster::start(&data_dir, Durability::Durable).unwrap());
    let restored = External { cluster, dir };
    let admin = session(&restored.config()).await;
    let is_writable = "SELECT NOT pg_is_in_recovery()";
    eventually("the server has recovered", async || admin.query_one(is_writable, &[]).await.unwrap().get(0)).await;
    restored
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn base_backup_and_archived_log_restore_every_write_acknowledged_before_the_last_segment_once() {
    let mut rng = Settings::from_environment().rng();
    // The server is killed: what it has acknowledged must be in its log.
    let external = External::start(Durability::Durable);
    let store = Store::new(&external);
    let (archive, backup) = (store.dir.text("wal"), store.dir.text("base"));
    let external = archive_wal(external, &store, &archive).await;
    create_roles(&store, &external);
    let mut service = migrate_and_serve(&external);
    let addresses = watch::Sender::new(service.address.clone());
    let load = Load::start(&database(&external), addresses.subscribe(), CLIENTS, &mut rng).await;
    load.wait_for_acknowledged(PHASE).await;
    store.run("base-backup.sh", &[&backup], &external, "postgres", "postgres");
    load.wait_for_acknowledged(PHASE).await;

    let before = committed(&external).await;
    wait_until_archived(&external).await;
    load.wait_for_acknowledged(PHASE).await;
    let mutations = load.finish().await;
    // What is not archived yet is lost: a server that shuts down would archive it.
    let kept = store.dir.text("wal-of-another-machine");
    fs::rename(&archive, &kept).unwrap();
    assert!(signal(external.cluster.server_pid(), libc::SIGKILL));
    service.kill();

    let external = restore_base(&store, &backup, &kept, external).await;
    // The restored server archives its log as the other did.
    fs::create_dir(&archive).unwrap();
    store.own(Path::new(&archive));
    assert_restored(&external, &before, mutations).await;
}
