//! Runs `issue-tracker import` and `export` while the service is killed.

use std::{
    collections::HashSet,
    fs,
    io::Read,
    process::{Child, Command, Stdio},
    time::Duration,
};

use issue_tracker::postgres::Durability;
use tokio_postgres::Client;

use crate::{
    harness::{Settings, create_callers},
    support::{
        database::session,
        external::External,
        ports::unused_port,
        process::signal,
        service::{Service, finished, program},
    },
};

const ROWS: usize = 8_000;
/// One of this many rows of a file is invalid, if any are.
const INVALID_ONCE_IN: usize = 100;
/// More than the pipe and all buffers between the client and the database hold.
const DESCRIPTION_BYTES: usize = 400;

/// A service that keeps its address when it is killed and started again.
struct Fixture {
    external: External,
    service: Service,
    port: u16,
    rng: fastrand::Rng,
}

impl Fixture {
    async fn start(rng: fastrand::Rng) -> Self {
        let external = External::start(Durability::Throwaway);
        let port = unused_port();
        let service = start_service(&external, port);
        let token = create_callers(&external.config(), 1).await.remove(0).token;
        fs::write(external.dir.path("token"), token).unwrap();
        Self { external, service, port, rng }
    }

    /// Kills the service, waits for a moment, and starts it again.
    fn restart(&mut self) {
        self.service.kill();
        std::thread::sleep(Duration::from_millis(self.rng.u64(..300)));
        self.service = start_service(&self.external, self.port);
    }

    /// Writes a CSV file and returns its path.
    fn file(&self, name: &str, has_invalid_rows: bool) -> String {
        let description = "x".repeat(DESCRIPTION_BYTES);
        let mut file = "title,external_id,priority,description\n".to_owned();
        for n in 0..ROWS {
            let priority = if has_invalid_rows && n % INVALID_ONCE_IN == 0 { "no" } else { "low" };
            file += &format!("{name} {n},{name}-{n},{priority},{description}\n");
        }
        fs::write(self.external.dir.path(name), file).unwrap();
        self.external.dir.text(name)
    }

    /// Returns a command that calls the service.
    fn client(&self, args: &[&str]) -> Command {
        let (server, token) = (format!("127.0.0.1:{}", self.port), self.external.dir.text("token"));
        program(&[args, &["--server", &server, "--token-file", &token]].concat())
    }
}

fn start_service(external: &External, port: u16) -> Service {
    let listen = format!("127.0.0.1:{port}");
    Service::start(&external.dir, program(&["--listen", &listen, "--database-url", &external.url()]))
}

/// Returns the titles that begin with a prefix.
async fn titles(rows: &Client, prefix: &str) -> Vec<String> {
    let sql = "SELECT title FROM issues WHERE title LIKE $1 || ' %'";
    rows.query(sql, &[&prefix]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

fn is_retrying(stderr: &[u8]) -> bool {
    String::from_utf8_lossy(stderr).contains("retrying in")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bundled_client_completes_over_kills_and_its_exit_code_is_the_outcome() {
    let settings = Settings::from_environment();
    let mut fixture = Fixture::start(settings.rng()).await;
    let rows = session(&fixture.external.config()).await;
    // No import is complete before the first kill.
    let locks = session(&fixture.external.config()).await;
    locks.batch_execute("BEGIN; LOCK TABLE issues IN SHARE ROW EXCLUSIVE MODE").await.unwrap();
    tokio::task::block_in_place(|| import_over_kills(&mut fixture, locks, settings.pick(3, 30)));
    for (prefix, expected) in [("atomic", ROWS), ("skipping", ROWS - ROWS / INVALID_ONCE_IN)] {
        let titles = titles(&rows, prefix).await;
        let distinct = titles.iter().collect::<HashSet<_>>().len();
        assert_eq!((titles.len(), distinct), (expected, expected), "{prefix}: rows, and distinct rows");
    }
    tokio::task::block_in_place(|| {
        for _ in 0..settings.pick(1, 10) {
            export_over_kills(&mut fixture);
        }
        assert_unreachable_service_is_a_failure(&mut fixture);
    });
    fixture.service.assert_no_internal_errors();
}

/// Runs two imports while the service is killed this many times. `locks` prevent changes of issues: they are held until the
/// first kill.
fn import_over_kills(fixture: &mut Fixture, locks: Client, kills: usize) {
    let (atomic, skipping) = (fixture.file("atomic", false), fixture.file("skipping", true));
    let spawn = |args: &[&str]| fixture.client(&[&["import", "--json"], args].concat()).spawn().unwrap();
    let clients = [spawn(&[&*atomic]), spawn(&[&*skipping, "--mode", "skip-invalid"])];
    let mut locks = Some(locks);
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(fixture.rng.u64(200..1_200)));
        fixture.restart();
        drop(locks.take());
    }
    let [atomic, skipping] = clients.map(finished);
    for output in [&atomic, &skipping] {
        assert!(is_retrying(&output.stderr), "no kill hit the client: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(atomic.status.code(), Some(0), "{atomic:?}");
    assert_eq!(skipping.status.code(), Some(1), "{skipping:?}");
    let summary = String::from_utf8_lossy(&skipping.stdout).lines().last().unwrap().to_owned();
    assert!(summary.contains(&format!("\"rejected_count\":{}", ROWS / INVALID_ONCE_IN)), "{summary}");
}

/// Exports to a file and to a pipe while the service is killed.
fn export_over_kills(fixture: &mut Fixture) {
    let whole = finished(fixture.client(&["export"]).spawn().unwrap());
    assert_eq!(whole.status.code(), Some(0));
    let path = fixture.external.dir.text("exported.csv");
    let to_file = fixture.client(&["export", &path]).spawn().unwrap();
    // It is not read, so it stays incomplete until it is.
    let mut to_pipe = fixture.client(&["export"]).spawn().unwrap();
    let mut first = [0; 1];
    to_pipe.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    fixture.restart();

    let to_file = finished(to_file);
    assert_eq!(to_file.status.code(), Some(0), "{to_file:?}");
    assert!(fs::read(&path).unwrap() == whole.stdout, "the file differs from an export without kills");
    fs::remove_file(&path).unwrap();
    let to_pipe = finished(to_pipe);
    assert_eq!(to_pipe.status.code(), Some(2), "{:?}", to_pipe.status);
    assert!(whole.stdout[1..].starts_with(&to_pipe.stdout) && to_pipe.stdout.len() + 1 < whole.stdout.len());
    assert!(
        String::from_utf8_lossy(&to_pipe.stderr).contains("incomplete"),
        "{}",
        String::from_utf8_lossy(&to_pipe.stderr)
    );
}

/// Kills the service during an import and an export, and does not start it again.
fn assert_unreachable_service_is_a_failure(fixture: &mut Fixture) {
    let file = fixture.file("unfinished", false);
    let path = fixture.external.dir.text("unfinished.csv");
    let mut pipe = fixture.client(&["import", "-", "--retry-seconds", "1"]);
    let mut import: Child = pipe.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = import.stdin.take().unwrap();
    // The end of the file is not sent before the kill.
    std::io::Write::write_all(&mut stdin, &fs::read(file).unwrap()).unwrap();
    let export = fixture.client(&["export", &path, "--retry-seconds", "1"]).spawn().unwrap();
    assert!(signal(export.id(), libc::SIGSTOP));
    fixture.service.kill();
    assert!(signal(export.id(), libc::SIGCONT));
    drop(stdin);

    let (import, export) = (finished(import), finished(export));
    assert_eq!(import.status.code(), Some(2), "{import:?}");
    assert!(String::from_utf8_lossy(&import.stderr).contains("gave up"), "{import:?}");
    assert_eq!(export.status.code(), Some(2), "{export:?}");
    assert!(!fs::exists(path).unwrap(), "an incomplete file was left");
}
