//! The program as people start it: its output, exit codes, signals, and what it leaves on disk and in logs.

#[path = "certificates/mod.rs"]
mod certificates;
#[path = "binary/kills.rs"]
mod kills;
#[path = "binary/roles.rs"]
mod roles;
#[path = "binary/start.rs"]
mod start;
#[path = "binary/stop.rs"]
mod stop;
#[path = "binary/tls.rs"]
mod tls;

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use issue_tracker::{
    db::embedded::{Cluster, Durability},
    pb::{
        CreateIssueRequest, CreateUserRequest, GetIssueRequest, Issue, ListIssuesRequest, LoginRequest, Role,
        UpdateIssueRequest, User, auth_service_client::AuthServiceClient, issue_service_client::IssueServiceClient,
        user_service_client::UserServiceClient,
    },
};
use tokio_postgres::NoTls;
use tonic::{
    Code, Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

/// A test that waits longer than this hangs.
const HANG: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(20);
const SECRET: &str = "sesame-open-17";

/// A directory that goes away with the test.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("binary-test-{}", Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The data directory of a service.
    fn data(&self) -> String {
        self.path("data").display().to_string()
    }

    fn server_pid(&self) -> u32 {
        let text = fs::read_to_string(self.path("data/cluster/postmaster.pid")).unwrap();
        text.lines().next().unwrap().parse().unwrap()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // A server whose service was killed takes a moment to leave.
        for _ in 0..500 {
            if !self.path("data/cluster/postmaster.pid").exists() {
                break;
            }
            std::thread::sleep(TICK);
        }
        let _ = fs::remove_dir_all(self.path("data/cluster").canonicalize().unwrap_or_default());
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program, without whatever the environment says of it.
fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_issue-tracker"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("ISSUE_TRACKER_") || name == "DATABASE_URL" || name == "RUST_LOG" {
            command.env_remove(&*name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    finished(program(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// The output of a program that ends by itself, killed if it does not.
fn finished(child: Child) -> Output {
    let pid = child.id();
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    is_done
        .recv_timeout(HANG)
        .unwrap_or_else(|_| {
            signal(pid, libc::SIGKILL);
            panic!("the program does not end");
        })
        .unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Failed by itself, and said why.
#[track_caller]
fn assert_refused(output: &Output, why: &str) {
    assert!(output.status.code().is_some_and(|code| code != 0), "{output:?}");
    assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
}

fn signal(pid: u32, signal: i32) {
    assert!(pid > 1);
    // SAFETY: kill takes two numbers; the pid is that of a process that the test started.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

fn is_running(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < HANG, "waited in vain until {what}");
        std::thread::sleep(TICK);
    }
}

/// A service, killed when the test ends in whatever way.
struct Service {
    child: Child,
    lines: Receiver<String>,
    /// What it has printed up to the line with its address, and the three lines behind it if it runs its own database.
    stdout: Vec<String>,
    address: String,
    log: PathBuf,
}

impl Service {
    /// With a database of its own.
    fn embedded(dir: &Dir) -> Self {
        let mut service = Self::start(dir, &["--data-dir", &dir.data()]);
        for _ in 0..3 {
            let line = service.line();
            service.stdout.push(line);
        }
        service
    }

    fn start(dir: &Dir, args: &[&str]) -> Self {
        let log = dir.path("service.log");
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        let listen = if args.contains(&"--listen") { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        let mut child = program(listen).args(args).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let _ = sender.send(line.unwrap());
            }
        });
        let mut service = Self { child, lines, stdout: Vec::new(), address: String::new(), log };
        while service.address.is_empty() {
            let line = service.line();
            service.address = line.strip_prefix("listening on ").unwrap_or_default().to_owned();
            service.stdout.push(line);
        }
        service
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(HANG).unwrap_or_else(|_| panic!("no more output; the log says: {}", self.log()))
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn channel(&self) -> Channel {
        Endpoint::try_from(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    fn issues(&self) -> IssueServiceClient<Channel> {
        IssueServiceClient::new(self.channel())
    }

    fn signal(&self, number: i32) {
        signal(self.child.id(), number);
    }

    fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the service ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    fn stop(&mut self) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn admin_token(dir: &Dir) -> String {
    fs::read_to_string(dir.path("data/admin.token")).unwrap().trim_end().to_owned()
}

fn with_token<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", MetadataValue::try_from(format!("Bearer {token}")).unwrap());
    request
}

async fn file(service: &Service, token: &str, title: &str) -> Issue {
    let issue = Issue { title: title.to_owned(), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    service.issues().create_issue(with_token(token, request)).await.unwrap().into_inner()
}

async fn titles(service: &Service, token: &str) -> Vec<String> {
    let listed = service.issues().list_issues(with_token(token, ListIssuesRequest::default())).await.unwrap();
    listed.into_inner().issues.into_iter().map(|issue| issue.title).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn first_start_prints_how_to_reach_it_and_later_ones_keep_all_and_print_no_password() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let lines = &service.stdout;
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert!(lines[0].contains("the user \"admin\" with the password "), "{lines:?}");
    let token_file = dir.path("data/admin.token");
    assert_eq!(lines[2], format!("TOKEN=$(cat {})", token_file.display()));
    for line in &lines[3..] {
        assert!(line.starts_with("grpcurl -plaintext -H \"authorization: Bearer $TOKEN\" "), "{line}");
        assert!(line.contains(&format!(" {} issuetracker.v1.IssueService/", service.address)), "{line}");
    }
    assert_eq!(fs::metadata(&token_file).unwrap().permissions().mode() & 0o777, 0o600);
    let token = admin_token(&dir);
    file(&service, &token, "kept").await;
    let password = lines[0].split("with the password ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let login = LoginRequest { username: "admin".to_owned(), password, ..Default::default() };
    let login = AuthServiceClient::new(service.channel()).login(login).await.unwrap().into_inner();
    assert_eq!(login.user.unwrap().role(), Role::Admin);

    assert_eq!(service.stop().code(), Some(0));
    let mut again = Service::embedded(&dir);

    assert_eq!(again.stdout.len(), 4, "{:?}", again.stdout);
    assert!(!again.stdout.concat().contains("password"), "{:?}", again.stdout);
    assert_eq!(admin_token(&dir), token);
    assert_eq!(titles(&again, &token).await, ["kept"]);
    again.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_the_service_and_its_database_and_health_tells() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let server = dir.server_pid();
    assert!(is_running(server));
    let health = run(&["health", "--listen", &service.address]);
    assert_eq!((health.status.code(), text(&health.stdout)), (Some(0), "SERVING\n"));

    let status = service.stop();

    assert_eq!(status.code(), Some(0), "{}", service.log());
    assert!(!is_running(server), "postgres is left behind");
    let health = run(&["health", "--listen", &service.address]);
    assert_refused(&health, "nothing answers on");
    assert_eq!(text(&health.stdout), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_service_has_all_that_it_acknowledged_when_it_starts_again() {
    let dir = Dir::new();
    let service = Service::embedded(&dir);
    let token = admin_token(&dir);
    for n in 0..20 {
        file(&service, &token, &format!("issue {n}")).await;
    }
    service.signal(libc::SIGKILL);
    drop(service);

    let mut again = Service::embedded(&dir);

    let titles = titles(&again, &token).await;
    assert_eq!(titles, (0..20).rev().map(|n| format!("issue {n}")).collect::<Vec<_>>());
    assert_eq!(again.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_service_on_the_same_directory_or_port_is_refused_and_the_first_goes_on() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let other = Dir::new();

    let same_dir = run(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    let same_port = run(&["--listen", &service.address, "--data-dir", &other.data()]);

    assert_refused(&same_dir, "is in use by another issue-tracker");
    assert_refused(&same_port, &format!("cannot listen on {}", service.address));
    assert_eq!((same_dir.stdout.len(), same_port.stdout.len()), (0, 0));
    assert!(!other.path("data").exists(), "nothing is made for a service that cannot serve");
    file(&service, &admin_token(&dir), "still there").await;
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn flags_that_make_no_sense_are_refused_before_anything_starts() {
    let dir = Dir::new();
    for (args, why) in [
        (&["--imports", "5", "--pool-connections", "5"][..], "must be less than --pool-connections"),
        (&["--imports", "3", "--exports", "2", "--pool-connections", "5"], "must be less than --pool-connections"),
        (&["--imports", "0"], "--imports"),
        (&["--exports", "0"], "--exports"),
        (&["--pool-connections", "1"], "--pool-connections"),
        (&["--bcrypt-cost", "3"], "--bcrypt-cost"),
        (&["--listen", "localhost"], "--listen"),
        (&["--colour", "red"], "--colour"),
    ] {
        let output = run(&[&["--data-dir", &dir.data()], args].concat());
        assert_refused(&output, why);
        assert!(!dir.path("data").exists(), "{args:?}");
    }
}

#[test]
fn a_missing_postgresql_is_told_with_the_package_to_install() {
    let dir = Dir::new();
    let nowhere = dir.path("nowhere");
    let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    command.env("PG_BINDIR", &nowhere).stdout(Stdio::piped()).stderr(Stdio::piped());

    let output = finished(command.spawn().unwrap());

    assert_refused(&output, &nowhere.display().to_string());
    assert_refused(&output, "apt-get install postgresql");
}

#[test]
fn a_database_url_that_cannot_be_read_or_reached_is_told_without_its_password() {
    let unreadable = format!("postgresql://me:{SECRET}@host:port/tracker");
    let unreachable = format!("postgresql://me:{SECRET}@127.0.0.1:1/tracker");
    for url in [&unreadable, &unreachable] {
        for args in [&["--listen", "127.0.0.1:0"][..], &["migrate"]] {
            let output = run(&[args, &["--database-url", url]].concat());
            assert_refused(&output, "database");
            assert!(!text(&output.stderr).contains(SECRET), "{}", text(&output.stderr));
        }
    }
}

/// A database server that is not the service's own.
struct External {
    cluster: Option<Cluster>,
    dir: Dir,
}

impl External {
    fn start() -> Self {
        Self::start_as(Durability::Throwaway)
    }

    fn start_as(durability: Durability) -> Self {
        let dir = Dir::new();
        let cluster = Cluster::start(&dir.path("external"), durability).unwrap();
        Self { cluster: Some(cluster), dir }
    }

    fn config(&self) -> tokio_postgres::Config {
        self.cluster.as_ref().unwrap().connect_config("postgres")
    }

    /// As the command line takes it.
    fn url(&self) -> String {
        let socket = self.cluster.as_ref().unwrap().socket_dir().display();
        format!("host={socket} user=postgres dbname=postgres password={SECRET}")
    }

    async fn sql(&self) -> tokio_postgres::Client {
        let (client, connection) = self.config().connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

impl Drop for External {
    fn drop(&mut self) {
        drop(self.cluster.take());
    }
}

fn create_user(url: &str, args: &[&str], password: &str) -> Output {
    let mut command = program(&["user", "create", "--database-url", url]);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // One that does not read it has failed, and is asserted on by its output.
    let _ = child.stdin.take().unwrap().write_all(password.as_bytes());
    finished(child)
}

async fn login(service: &Service, username: &str, password: &str) -> Result<String, tonic::Status> {
    let request = LoginRequest { username: username.to_owned(), password: password.to_owned(), ..Default::default() };
    Ok(AuthServiceClient::new(service.channel()).login(request).await?.into_inner().access_token)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_external_database_is_migrated_given_an_administrator_and_served() {
    let external = External::start();
    let url = external.url();
    for _ in 0..2 {
        let migrated = run(&["migrate", "--database-url", &url]);
        assert!(migrated.status.success(), "{migrated:?}");
    }
    let created = create_user(&url, &["--role", "admin", "ada"], &format!("{SECRET}\n"));
    assert!(created.status.success(), "{created:?}");
    let id = text(&created.stdout).trim_end().to_owned();

    assert_refused(&create_user(&url, &["--role", "admin", "Ada"], SECRET), "taken");
    assert_refused(&create_user(&url, &["--role", "admin", "bob"], "short"), "password");
    assert_refused(&create_user(&url, &["--role", "admin", "not a name"], SECRET), "username");
    assert_refused(&create_user(&url, &["--role", "king", "bob"], SECRET), "king");

    let mut service = Service::start(&external.dir, &["--database-url", &url]);
    let token = login(&service, "ada", SECRET).await.unwrap();
    let issue = file(&service, &token, "first").await;
    assert_eq!(issue.reporter_id, id);
    assert_eq!(service.stdout, [format!("listening on {}", service.address)]);
    assert_eq!(service.stop().code(), Some(0));
    let sql = external.sql().await;
    assert_eq!(sql.query("SELECT FROM users", &[]).await.unwrap().len(), 1);
    let told = "SELECT FROM audit_events WHERE action = 'USER_CREATED' AND actor_id IS NULL AND user_id::text = $1";
    assert_eq!(sql.query(told, &[&id]).await.unwrap().len(), 1);
}

/// Calls that fail in the service and in the database, with a mark in everything that the client sends.
async fn a_session_with_errors(service: &Service, token: &str) {
    let issue = Issue { title: SECRET.to_owned(), external_id: SECRET.to_owned(), ..Issue::default() };
    let create = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    let mut issues = service.issues();
    issues.create_issue(with_token(token, create.clone())).await.unwrap();
    let taken = issues.create_issue(with_token(token, create.clone())).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
    assert!(login(service, "admin", SECRET).await.is_err());
    assert!(login(service, SECRET, SECRET).await.is_err());
    let get = GetIssueRequest { id: SECRET.to_owned(), ..Default::default() };
    assert!(issues.get_issue(with_token(token, get)).await.is_err());
    let list = ListIssuesRequest { filter: format!("label = {SECRET}-1 OR x"), ..Default::default() };
    assert!(issues.list_issues(with_token(token, list)).await.is_err());
    assert!(issues.create_issue(with_token(&format!("itk_{SECRET}"), create)).await.is_err());
    let user = User { username: "bob".to_owned(), role: Role::Member.into(), ..User::default() };
    for _ in 0..2 {
        let request = CreateUserRequest { user: Some(user.clone()), password: SECRET.to_owned(), ..Default::default() };
        let _ = UserServiceClient::new(service.channel()).create_user(with_token(token, request)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_clients_send_is_in_the_logs_even_when_the_database_crashes() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let token = admin_token(&dir);
    a_session_with_errors(&service, &token).await;
    signal(dir.server_pid(), libc::SIGKILL);
    let list = async || service.issues().list_issues(with_token(&token, ListIssuesRequest::default())).await;
    let began = Instant::now();
    while list().await.is_err() || !service.log().contains("up again") {
        assert!(began.elapsed() < HANG, "{}", service.log());
        tokio::time::sleep(TICK).await;
    }
    a_database_error(&service, &token).await;
    service.stop();

    let mut logs = service.log();
    File::open(dir.path("data/cluster/server.log")).unwrap().read_to_string(&mut logs).unwrap();
    assert!(logs.contains("postgres is up"), "{logs}");
    assert!(!logs.contains(SECRET), "{logs}");
    assert!(!logs.contains(&token), "{logs}");
}

/// Another issue with an external id that is taken.
async fn a_database_error(service: &Service, token: &str) {
    let issue = Issue { title: "x".to_owned(), external_id: SECRET.to_owned(), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    let taken = service.issues().create_issue(with_token(token, request)).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
}
