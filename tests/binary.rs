//! Tests the binary: output, exit codes, signals, files on disk and logs.

#[path = "binary/command_line.rs"]
mod command_line;
#[path = "binary/configuration.rs"]
mod configuration;
#[path = "binary/database_wait.rs"]
mod database_wait;
#[path = "binary/deployment.rs"]
mod deployment;
#[path = "binary/documented_flags.rs"]
mod documented_flags;
#[path = "binary/file_descriptors.rs"]
mod file_descriptors;
#[path = "binary/import_recovery.rs"]
mod import_recovery;
#[path = "binary/metrics.rs"]
mod metrics;
#[path = "binary/private_database.rs"]
mod private_database;
#[path = "binary/retention.rs"]
mod retention;
#[path = "binary/roles.rs"]
mod roles;
#[path = "binary/shutdown.rs"]
mod shutdown;
#[path = "binary/startup.rs"]
mod startup;
#[path = "support"]
mod support {
    pub mod bounds;
    pub mod calls;
    pub mod certificates;
    pub mod database;
    pub mod eventually;
    pub mod external;
    pub mod ports;
    pub mod process;
    pub mod scratch;
    pub mod service;
    pub mod terminal;
}
#[path = "binary/tls.rs"]
mod tls;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Output, Stdio},
    time::{Duration, Instant},
};

use issue_tracker::{
    pb::{
        CreateIssueRequest, CreateUserRequest, GetIssueRequest, Issue, ListIssuesRequest, LoginRequest, Role,
        UpdateIssueRequest, User, auth_service_client::AuthServiceClient, issue_service_client::IssueServiceClient,
        user_service_client::UserServiceClient,
    },
    postgres::Durability,
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use uuid::Uuid;

use support::{
    bounds::{HANG, TICK},
    calls::{titles, with_token},
    database::session,
    eventually::eventually,
    external::External,
    ports::unused_port,
    process::{Dir, signal, wait_until},
    service::{Service, TOKEN_FILE, finished, program},
};

const SECRET: &str = "sesame-open-17";

fn run(args: &[&str]) -> Output {
    finished(program(args).spawn().unwrap())
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Asserts that the program exited with a nonzero code and that its error output contains `why`.
#[track_caller]
fn assert_refused(output: &Output, why: &str) {
    assert!(output.status.code().is_some_and(|code| code != 0), "{output:?}");
    assert!(text(&output.stderr).contains(why), "{}", text(&output.stderr));
}

fn is_running(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

impl Service {
    /// Starts the service on its embedded database.
    fn embedded(dir: &Dir) -> Self {
        Self::start(dir, program(&["--data-dir", &dir.data(), "--bcrypt-cost", "4"]))
    }

    /// Starts the service on an external database.
    fn on(external: &External, args: &[&str]) -> Self {
        Self::start(&external.dir, program(&[&["--database-url", &external.url()], args].concat()))
    }

    fn issues(&self) -> IssueServiceClient<Channel> {
        IssueServiceClient::new(self.channel())
    }
}

async fn create_issue(service: &Service, token: &str, title: &str) -> Issue {
    let issue = Issue { title: title.to_owned(), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    service.issues().create_issue(with_token(token, request)).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn first_start_prints_credentials_and_later_starts_keep_data_and_print_no_password() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let lines = &service.stdout;
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert!(lines[0].contains("the user \"admin\" with the password "), "{lines:?}");
    let token_file = dir.path(TOKEN_FILE);
    assert_eq!(lines[2], format!("TOKEN=$(cat {})", token_file.display()));
    for line in &lines[3..] {
        assert!(line.starts_with("grpcurl -plaintext -H \"authorization: Bearer $TOKEN\" "), "{line}");
        assert!(line.contains(&format!(" {} issuetracker.v1.IssueService/", service.address)), "{line}");
    }
    assert_eq!(fs::metadata(&token_file).unwrap().permissions().mode() & 0o777, 0o600);
    let token = service.admin_token();
    create_issue(&service, &token, "kept").await;
    let password = lines[0].split("with the password ").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    let login = LoginRequest { username: "admin".to_owned(), password, ..Default::default() };
    let login = AuthServiceClient::new(service.channel()).login(login).await.unwrap().into_inner();
    assert_eq!(login.user.unwrap().role(), Role::Admin);

    assert_eq!(service.stop().code(), Some(0));
    let mut again = Service::embedded(&dir);

    assert_eq!(again.stdout.len(), 4, "{:?}", again.stdout);
    assert!(!again.stdout.concat().contains("password"), "{:?}", again.stdout);
    assert_eq!(again.admin_token(), token);
    assert_eq!(titles(&again, &token).await, ["kept"]);
    again.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_stops_the_service_and_its_database_and_health_fails() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let server = dir.server_pid().unwrap();
    assert!(is_running(server));
    let health = run(&["health", "--listen", &service.address]);
    assert_eq!((health.status.code(), text(&health.stdout)), (Some(0), "SERVING\n"));

    let status = service.stop();

    assert_eq!(status.code(), Some(0), "{}", service.log());
    assert!(!is_running(server), "postgres still runs");
    let health = run(&["health", "--listen", &service.address]);
    assert_refused(&health, "cannot connect to");
    assert_eq!(text(&health.stdout), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn restart_after_sigkill_keeps_every_acknowledged_write() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let token = service.admin_token();
    for n in 0..20 {
        create_issue(&service, &token, &format!("issue {n}")).await;
    }
    service.kill();

    let mut again = Service::embedded(&dir);

    let titles = titles(&again, &token).await;
    assert_eq!(titles, (0..20).rev().map(|n| format!("issue {n}")).collect::<Vec<_>>());
    assert_eq!(again.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn second_service_on_the_same_data_dir_or_port_fails_and_the_first_keeps_serving() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    let other = Dir::new();

    let same_dir = run(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    let same_port = run(&["--listen", &service.address, "--data-dir", &other.data()]);

    assert_refused(&same_dir, "is in use by another issue-tracker");
    assert_refused(&same_port, &format!("cannot listen on {}", service.address));
    assert_eq!((same_dir.stdout.len(), same_port.stdout.len()), (0, 0));
    assert!(!other.path("data").exists(), "a service that cannot listen must not create its data directory");
    create_issue(&service, &service.admin_token(), "still there").await;
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn missing_postgresql_is_reported_with_the_package_to_install() {
    let dir = Dir::new();
    let nowhere = dir.path("nowhere");
    let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);

    let output = finished(command.env("PG_BINDIR", &nowhere).spawn().unwrap());

    assert_refused(&output, &nowhere.display().to_string());
    assert_refused(&output, "apt-get install postgresql");
}

#[test]
fn invalid_or_unreachable_database_url_is_reported_without_its_password() {
    let unreadable = format!("postgresql://me:{SECRET}@host:port/tracker");
    let unreachable = format!("postgresql://me:{SECRET}@127.0.0.1:1/tracker");
    for url in [&unreadable, &unreachable] {
        for args in [&["--listen", "127.0.0.1:0", "--wait-for-database", "0"][..], &["migrate"]] {
            let output = run(&[args, &["--database-url", url]].concat());
            assert_refused(&output, "database");
            assert!(!text(&output.stderr).contains(SECRET), "{}", text(&output.stderr));
        }
    }
}

fn create_user(url: &str, args: &[&str], password: &str) -> Output {
    let mut command = program(&["user", "create", "--database-url", url]);
    let mut child = command.args(args).stdin(Stdio::piped()).spawn().unwrap();
    // The write fails when the program exits without reading; callers assert on its output.
    let _ = child.stdin.take().unwrap().write_all(password.as_bytes());
    finished(child)
}

async fn login(service: &Service, username: &str, password: &str) -> Result<String, tonic::Status> {
    let request = LoginRequest { username: username.to_owned(), password: password.to_owned(), ..Default::default() };
    Ok(AuthServiceClient::new(service.channel()).login(request).await?.into_inner().access_token)
}

#[tokio::test(flavor = "multi_thread")]
async fn external_database_is_migrated_gets_an_administrator_and_is_served() {
    let external = External::start(Durability::Throwaway);
    let url = format!("{} password={SECRET}", external.url());
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

    let mut service = Service::start(&external.dir, program(&["--database-url", &url]));
    let token = login(&service, "ada", SECRET).await.unwrap();
    let issue = create_issue(&service, &token, "first").await;
    assert_eq!(issue.reporter_id, id);
    assert_eq!(service.stdout, [format!("listening on {}", service.address)]);
    assert_eq!(service.stop().code(), Some(0));
    assert!(!service.log().contains(SECRET), "{}", service.log());
    let sql = session(&external.config()).await;
    assert_eq!(sql.query("SELECT FROM users", &[]).await.unwrap().len(), 1);
    let audited = "SELECT FROM audit_events WHERE action = 'USER_CREATED' AND actor_id IS NULL AND user_id::text = $1";
    assert_eq!(sql.query(audited, &[&id]).await.unwrap().len(), 1);
}

/// Makes calls that fail in the service and in the database, with [`SECRET`] in every value that the client sends.
async fn run_failing_calls(service: &Service, token: &str) {
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
async fn logs_contain_no_client_data_even_after_a_database_crash() {
    let dir = Dir::new();
    // At the most verbose level that the command line documents.
    let mut service = Service::start(&dir, program(&["--data-dir", &dir.data(), "--log-level", "debug"]));
    let token = service.admin_token();
    run_failing_calls(&service, &token).await;
    assert!(signal(dir.server_pid().unwrap(), libc::SIGKILL));
    let list = async || service.issues().list_issues(with_token(&token, ListIssuesRequest::default())).await;
    eventually("the database is available again", async || {
        list().await.is_ok() && service.log().contains("postgres restarted")
    })
    .await;
    create_duplicate(&service, &token).await;
    service.stop();

    let mut logs = service.log();
    File::open(dir.path("data/cluster/server.log")).unwrap().read_to_string(&mut logs).unwrap();
    assert!(logs.contains("postgres started"), "{logs}");
    assert!(
        logs.contains("call finished method=\"/issuetracker.v1.IssueService/CreateIssue\" code=AlreadyExists"),
        "{logs}"
    );
    assert!(!logs.contains(SECRET), "{logs}");
    assert!(!logs.contains(&token), "{logs}");
}

/// Creates an issue whose external id exists, which fails in the database.
async fn create_duplicate(service: &Service, token: &str) {
    let issue = Issue { title: "x".to_owned(), external_id: SECRET.to_owned(), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    let taken = service.issues().create_issue(with_token(token, request)).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists);
}
