//! Tests the metrics: their values, their listener, and that `docs/operations.md` lists them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{TcpListener, TcpStream},
};

use http::uri::PathAndQuery;
use issue_tracker::pb::{
    ExportIssuesRequest, ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportMode, ImportOptions,
    import_issues_request, import_issues_response, import_service_client::ImportServiceClient,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, client::Grpc};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;
use tower::ServiceExt;

use super::*;

const ADA: &str = "ada";
const FILE: &str = "title\nfirst\nsecond\n";

/// Starts a service with metrics on a database that has an administrator.
fn start(external: &External, args: &[&str]) -> Service {
    let created = create_user(&external.url(), &["--role", "admin", "--bcrypt-cost", "4", ADA], SECRET);
    assert!(created.status.success(), "{created:?}");
    Service::on(external, &[&["--metrics-listen", "127.0.0.1:0", "--bcrypt-cost", "4"], args].concat())
}

/// Returns the address of the metrics.
fn metrics_address(service: &Service) -> String {
    let address = service.stdout.iter().find_map(|line| line.strip_prefix("metrics on http://"));
    address.unwrap().strip_suffix("/metrics").unwrap().to_owned()
}

/// Sends the head of a request, and returns the whole response.
fn respond(address: &str, head: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(HANG)).unwrap();
    stream.write_all(format!("{head}\r\nHost: {address}\r\n\r\n").as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

/// A value with its labels.
type Sample = (BTreeMap<String, String>, f64);

/// The metrics of a service at one time.
struct Scrape {
    types: BTreeMap<String, String>,
    /// By name; those of histograms end with `_bucket`, `_sum` and `_count`.
    samples: BTreeMap<String, Vec<Sample>>,
}

impl Scrape {
    fn of(service: &Service) -> Self {
        let response = respond(&metrics_address(service), "GET /metrics HTTP/1.1");
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("\r\ncontent-type: text/plain; version=0.0.4"), "{head}");
        let mut scrape = Self { types: BTreeMap::new(), samples: BTreeMap::new() };
        for line in body.lines() {
            if let Some(name_and_type) = line.strip_prefix("# TYPE ") {
                let (name, kind) = name_and_type.split_once(' ').unwrap();
                assert!(scrape.types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} occurs twice");
            } else if !line.starts_with('#') {
                let (name, sample) = parse_sample(line);
                scrape.samples.entry(name.to_owned()).or_default().push(sample);
            }
        }
        scrape
    }

    /// Returns the sum of the samples that have these labels, or `None` if there is none.
    fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let has_labels = |(found, _): &&Sample| {
            labels.iter().all(|(name, value)| found.get(*name).is_some_and(|found| found == value))
        };
        let found: Vec<f64> = self.samples.get(name)?.iter().filter(has_labels).map(|(_, value)| *value).collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }

    #[track_caller]
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).unwrap_or_else(|| panic!("{name} {labels:?} in {:?}", self.samples.get(name)))
    }

    /// Returns how many calls of a method have ended with a code.
    fn calls(&self, method: &str, code: &str) -> f64 {
        let labels = [("rpc_method", method), ("rpc_response_status_code", code)];
        self.find("rpc_server_call_duration_seconds_count", &labels).unwrap_or(0.0)
    }

    /// Returns the values of a label in all samples.
    fn label_values(&self, label: &str) -> BTreeSet<&str> {
        let samples = self.samples.values().flatten();
        samples.filter_map(|(labels, _)| labels.get(label)).map(String::as_str).collect()
    }

    /// Returns all combinations of names and labels.
    fn series(&self) -> BTreeSet<String> {
        let of = |(name, samples): (&String, &Vec<Sample>)| {
            samples.iter().map(|(labels, _)| format!("{name} {labels:?}")).collect::<Vec<_>>()
        };
        self.samples.iter().flat_map(of).collect()
    }
}

fn parse_sample(line: &str) -> (&str, Sample) {
    let (name_and_labels, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = name_and_labels.split_once('{').unwrap_or((name_and_labels, "}"));
    let labels = labels.strip_suffix('}').unwrap();
    let label = |label: &str| {
        let (name, value) = label.split_once("=\"").unwrap();
        (name.to_owned(), value.trim_end_matches('"').to_owned())
    };
    let labels = labels.split("\",").filter(|label| !label.is_empty()).map(label).collect();
    (name, (labels, value.parse().unwrap()))
}

/// Scrapes until the condition holds: a call is recorded when its response has ended, which its client may notice before.
async fn scrape_until(service: &Service, what: &str, condition: impl Fn(&Scrape) -> bool) -> Scrape {
    let mut scrape = Scrape::of(service);
    eventually(what, async || {
        scrape = Scrape::of(service);
        condition(&scrape)
    })
    .await;
    scrape
}

const CREATE: &str = "issuetracker.v1.IssueService/CreateIssue";
const GET: &str = "issuetracker.v1.IssueService/GetIssue";
const LOGIN: &str = "issuetracker.v1.AuthService/Login";
const IMPORT: &str = "issuetracker.v1.ImportService/ImportIssues";
const EXPORT: &str = "issuetracker.v1.IssueService/ExportIssues";
const WATCH: &str = "grpc.health.v1.Health/Watch";

fn import_request(message: import_issues_request::Message) -> ImportIssuesRequest {
    ImportIssuesRequest { message: Some(message) }
}

struct OpenImport {
    requests: tokio::sync::mpsc::Sender<ImportIssuesRequest>,
    responses: Streaming<ImportIssuesResponse>,
}

/// Starts an import, and sends a part of the file.
async fn begin_import(service: &Service, token: &str, begin: &str) -> Result<OpenImport, tonic::Status> {
    let (requests, stream) = tokio::sync::mpsc::channel(16);
    let mode = ImportMode::SkipInvalid.into();
    let options = ImportOptions { import_id: Uuid::now_v7().to_string(), mode, ..Default::default() };
    requests.send(import_request(import_issues_request::Message::Options(options))).await.unwrap();
    let chunk = ImportChunk { offset: 0, data: begin.to_owned().into() };
    requests.send(import_request(import_issues_request::Message::Chunk(chunk))).await.unwrap();
    let mut client = ImportServiceClient::new(service.channel());
    let mut responses = client.import_issues(with_token(token, ReceiverStream::new(stream))).await?.into_inner();
    responses.message().await?;
    Ok(OpenImport { requests, responses })
}

impl OpenImport {
    async fn finish(mut self) {
        drop(self.requests);
        while let Some(response) = self.responses.message().await.unwrap() {
            if let Some(import_issues_response::Message::Summary(summary)) = response.message {
                assert_eq!(summary.created_count, 2);
            }
        }
    }
}

/// Makes a call of a method that does not exist.
async fn call_unknown_method(service: &Service, path: &str, metadata: &str) -> tonic::Status {
    let mut grpc = Grpc::new(service.channel());
    grpc.ready().await.unwrap();
    let mut request = Request::new(GetIssueRequest::default());
    request.metadata_mut().insert("x-request-id", metadata.parse().unwrap());
    let codec = ProstCodec::<GetIssueRequest, Issue>::default();
    grpc.unary(request, PathAndQuery::try_from(path).unwrap(), codec).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_recorded_with_the_status_that_the_client_receives() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external, &[]);
    let token = login(&service, ADA, SECRET).await.unwrap();
    let mut last = Issue::default();
    for n in 0..3 {
        last = create_issue(&service, &token, &format!("issue {n}")).await;
    }
    let get = async |token: &str, id: &str| {
        let request = GetIssueRequest { id: id.to_owned(), ..Default::default() };
        service.issues().get_issue(with_token(token, request)).await.map_or_else(|status| status.code(), |_| Code::Ok)
    };
    assert_eq!(get(&token, &last.id).await, Code::Ok);
    assert_eq!(get(&token, &Uuid::nil().to_string()).await, Code::NotFound);
    assert_eq!(get(&token, SECRET).await, Code::InvalidArgument);
    assert_eq!(get("itk_wrong", &last.id).await, Code::Unauthenticated);
    let unknown = call_unknown_method(&service, "/some.Service/Get", SECRET).await;
    assert_eq!(unknown.code(), Code::Unimplemented, "{unknown:?}");
    let request = http::Request::get(format!("http://{}/{GET}", service.address)).body(tonic::body::Body::empty());
    let not_grpc = service.channel().oneshot(request.unwrap()).await.unwrap();
    assert_eq!(not_grpc.status(), http::StatusCode::METHOD_NOT_ALLOWED);
    let mut health = HealthClient::new(service.channel());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap();

    let scrape = scrape_until(&service, "all calls are recorded", |scrape| {
        scrape.calls(CREATE, "OK") == 3.0 && scrape.calls(GET, "UNKNOWN") == 1.0
    })
    .await;
    for code in ["OK", "NOT_FOUND", "INVALID_ARGUMENT", "UNAUTHENTICATED", "UNKNOWN"] {
        assert_eq!(scrape.calls(GET, code), 1.0, "{code}");
    }
    assert_eq!(scrape.calls("_OTHER", "UNIMPLEMENTED"), 1.0);
    assert_eq!(scrape.calls(LOGIN, "OK"), 1.0);
    for (reason, count) in [("NOT_FOUND", 1.0), ("UNAUTHENTICATED", 1.0), ("INVALID", 1.0)] {
        assert_eq!(scrape.value("issue_tracker_errors_total", &[("reason", reason)]), count, "{reason}");
    }
    assert_eq!(scrape.value("issue_tracker_calls_in_flight", &[("rpc_method", WATCH)]), 1.0);
    assert_eq!(scrape.value("issue_tracker_calls_in_flight", &[("rpc_method", GET)]), 0.0);
    let seconds = scrape.value("rpc_server_call_duration_seconds_sum", &[("rpc_method", CREATE)]);
    assert!(seconds > 0.0);

    drop((watch, health));
    let scrape =
        scrape_until(&service, "the watch is cancelled", |scrape| scrape.calls(WATCH, "CANCELLED") == 1.0).await;
    assert_eq!(scrape.value("issue_tracker_calls_in_flight", &[("rpc_method", WATCH)]), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_batches_and_connections_are_recorded() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external, &["--pool-connections", "16"]);
    let token = login(&service, ADA, SECRET).await.unwrap();
    for _ in 0..3 {
        create_issue(&service, &token, "an issue").await;
    }

    let is_recorded = |scrape: &Scrape| {
        let [open, accepted] = ["open", "accepted_total"]
            .map(|connections| scrape.value(&format!("issue_tracker_connections_{connections}"), &[]));
        scrape.calls(CREATE, "OK") == 3.0 && accepted >= 4.0 && open < accepted
    };
    let scrape = scrape_until(&service, "calls and closed connections are recorded", is_recorded).await;
    let statement = "db_client_operation_duration_seconds_count";
    assert_eq!(scrape.value(statement, &[("db_query_summary", "create_issues")]), 3.0);
    assert!(scrape.value(statement, &[("db_query_summary", "find_credentials")]) >= 1.0);
    assert_eq!(scrape.value("issue_tracker_batch_size_sum", &[("batch", "create_issue")]), 3.0);
    assert_eq!(scrape.value("issue_tracker_batch_duration_seconds_count", &[("batch", "create_issue")]), 3.0);
    let main = ("db_client_connection_pool_name", "main");
    assert_eq!(scrape.value("db_client_connection_max", &[main]), 16.0);
    assert!(scrape.value("db_client_connection_count", &[main]) >= 1.0);
    assert_eq!(scrape.value("db_client_connection_pending_requests", &[main]), 0.0);
    assert!(scrape.value("db_client_connection_wait_time_seconds_count", &[main]) >= 3.0);
    assert_eq!(scrape.value("db_client_connection_timeouts_total", &[main]), 0.0);
    for access in ["read", "write"] {
        assert_eq!(scrape.value("issue_tracker_database_available", &[("access", access)]), 1.0, "{access}");
    }
    assert_eq!(scrape.value("issue_tracker_resource_limit", &[("resource", "request slots")]), 1_024.0);
    assert!(scrape.value("process_resident_memory_bytes", &[]) > 1e6);
    assert!(scrape.value("process_open_fds", &[]) > 3.0);
    assert_eq!(scrape.value("issue_tracker_build_info", &[("version", env!("CARGO_PKG_VERSION"))]), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_exports_and_refusals_are_recorded() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external, &["--imports", "1"]);
    let token = login(&service, ADA, SECRET).await.unwrap();

    let import = begin_import(&service, &token, FILE).await.unwrap();
    let refused = begin_import(&service, &token, FILE).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);

    let imports = [("resource", "imports")];
    let scrape = scrape_until(&service, "the bytes have arrived", |scrape| {
        scrape.value("issue_tracker_import_bytes_total", &[]) == FILE.len() as f64
    })
    .await;
    assert_eq!(scrape.value("issue_tracker_imports_in_progress", &[]), 1.0);
    assert_eq!(scrape.value("issue_tracker_resource_in_use", &imports), 1.0);
    assert_eq!(scrape.value("issue_tracker_resource_refusals_total", &imports), 1.0);
    assert_eq!(scrape.value("issue_tracker_errors_total", &[("reason", "OVERLOADED")]), 1.0);
    import.finish().await;
    let mut chunks =
        service.issues().export_issues(with_token(&token, ExportIssuesRequest::default())).await.unwrap().into_inner();
    let mut bytes = 0;
    while let Some(chunk) = chunks.message().await.unwrap() {
        bytes += chunk.data.len();
    }

    let scrape = scrape_until(&service, "both have ended", |scrape| {
        scrape.calls(EXPORT, "OK") == 1.0 && scrape.calls(IMPORT, "OK") == 1.0
    })
    .await;
    assert_eq!(scrape.value("issue_tracker_imports_in_progress", &[]), 0.0);
    assert_eq!(scrape.value("issue_tracker_import_rows_total", &[]), 2.0);
    assert_eq!(scrape.value("issue_tracker_exports_in_progress", &[]), 0.0);
    assert_eq!(scrape.value("issue_tracker_export_rows_total", &[]), 2.0);
    assert_eq!(scrape.value("issue_tracker_export_bytes_total", &[]), bytes as f64);
    assert_eq!(scrape.value("issue_tracker_resource_in_use", &imports), 0.0);
    assert_eq!(scrape.calls(IMPORT, "RESOURCE_EXHAUSTED"), 1.0);
    assert_eq!(
        scrape.value("db_client_operation_duration_seconds_count", &[("db_query_summary", "export_issues")]),
        1.0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn lock_waits_password_checks_and_pruned_rows_are_recorded() {
    let external = External::start(Durability::Throwaway);
    assert!(run(&["migrate", "--database-url", &external.url()]).status.success());
    let sql = session(&external.config()).await;
    let old = "INSERT INTO audit_events (action, create_time) VALUES ('LOGOUT', now() - interval '1000 days')";
    sql.batch_execute(old).await.unwrap();
    let service = start(&external, &["--login-failures", "2"]);
    let token = login(&service, ADA, SECRET).await.unwrap();
    let issue = create_issue(&service, &token, "locked").await;

    sql.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
    let update = async {
        let changed = Issue { id: issue.id.clone(), title: "changed".to_owned(), ..Issue::default() };
        let request = UpdateIssueRequest { issue: Some(changed), ..Default::default() };
        service.issues().update_issue(with_token(&token, request)).await.unwrap();
    };
    let unlock = async {
        let waits = |scrape: &Scrape| {
            scrape.value("issue_tracker_retries_total", &[("cause", "lock_wait")]) == 1.0
                && scrape.value("issue_tracker_resource_in_use", &[("resource", "row lock waiters")]) == 1.0
        };
        let scrape = scrape_until(&service, "the call waits for the lock", waits).await;
        assert_eq!(scrape.value("issue_tracker_retries_total", &[("cause", "batch_left")]), 1.0);
        sql.batch_execute("COMMIT").await.unwrap();
    };
    tokio::join!(update, unlock);
    for _ in 0..3 {
        assert!(login(&service, "bob", "a wrong password").await.is_err());
    }

    let scrape = scrape_until(&service, "old rows are pruned", |scrape| {
        scrape.find("issue_tracker_pruned_rows_total", &[("data", "audit events")]) == Some(1.0)
    })
    .await;
    assert_eq!(scrape.value("issue_tracker_pruned_rows_total", &[("data", "tokens")]), 0.0);
    assert_eq!(scrape.value("issue_tracker_prune_failures_total", &[]), 0.0);
    for (outcome, count) in [("correct", 1.0), ("wrong", 2.0), ("throttled", 1.0), ("concurrent", 0.0)] {
        assert_eq!(scrape.value("issue_tracker_password_checks_total", &[("outcome", outcome)]), count, "{outcome}");
    }
}

/// Returns the names of all statements in the source.
fn statement_names() -> BTreeSet<String> {
    fn read(dir: &Path, names: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, names);
                continue;
            }
            let source = fs::read_to_string(&path).unwrap();
            let after = source.split("\"-- ").skip(1);
            names.extend(after.map(|text| text.chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect()));
        }
    }
    let mut names = BTreeSet::new();
    read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/db")), &mut names);
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_add_no_series() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external, &[]);
    let token = login(&service, ADA, SECRET).await.unwrap();
    let call = async |nth: u32| {
        let id = Uuid::from_u128(nth.into()).to_string();
        for path in [format!("/some.Service{nth}/Get"), format!("/issuetracker.v1.IssueService/Get{nth}")] {
            let status = call_unknown_method(&service, &path, &id).await;
            assert!([Code::Unimplemented, Code::Unauthenticated].contains(&status.code()), "{status:?}");
        }
        let get = GetIssueRequest { id, ..Default::default() };
        assert!(service.issues().get_issue(with_token(&token, get)).await.is_err());
        assert!(login(&service, &format!("{SECRET}{nth}"), &format!("{SECRET}{nth}")).await.is_err());
        let list = ListIssuesRequest { filter: format!("word{nth}"), ..Default::default() };
        service.issues().list_issues(with_token(&token, list)).await.unwrap();
    };
    call(1).await;
    let recorded = |count| {
        move |scrape: &Scrape| {
            let list = "issuetracker.v1.IssueService/ListIssues";
            let calls = [("_OTHER", "UNIMPLEMENTED"), ("_OTHER", "UNAUTHENTICATED"), (GET, "NOT_FOUND"), (list, "OK")];
            calls.iter().all(|(method, code)| scrape.calls(method, code) == count)
                && scrape.calls(LOGIN, "UNAUTHENTICATED") == count
        }
    };
    let before = scrape_until(&service, "the first calls are recorded and rows are pruned", |scrape| {
        let pruned = scrape.find("issue_tracker_pruned_rows_total", &[("data", "audit events")]);
        pruned.is_some() && recorded(1.0)(scrape)
    })
    .await;
    for nth in 2..=10 {
        call(nth).await;
    }
    let after = scrape_until(&service, "all calls are recorded", recorded(10.0)).await;

    // The service itself executes statements in the background.
    let added = after.series().difference(&before.series()).cloned().collect::<Vec<_>>();
    let added: Vec<_> = added.iter().filter(|series| !series.starts_with("db_client_operation_duration")).collect();
    assert!(added.is_empty(), "{added:#?}");
    let mut known = statement_names();
    known.extend(["commit", "rollback", "_OTHER"].map(str::to_owned));
    let found = after.label_values("db_query_summary");
    assert!(found.contains("list_issues") && found.iter().all(|name| known.contains(*name)), "{found:?}");
}

#[test]
fn listener_serves_one_path_to_one_method() {
    let external = External::start(Durability::Throwaway);
    let mut service = start(&external, &[]);
    let address = metrics_address(&service);
    for (request, status) in [
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /metrics/ HTTP/1.1", "404 Not Found"),
        ("GET /metrics?name=x HTTP/1.1", "200 OK"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0", "405 Method Not Allowed"),
        ("DELETE /metrics HTTP/1.1", "405 Method Not Allowed"),
        ("HEAD /metrics HTTP/1.1", "405 Method Not Allowed"),
        ("GET /metrics HTTP/9", "400 Bad Request"),
    ] {
        let response = respond(&address, request);
        assert!(response.starts_with(&format!("HTTP/1.1 {status}\r\n")), "{request:.50}: {response:.200}");
    }
    let twice = respond(&address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1");
    assert_eq!(twice.matches("HTTP/1.1 200 OK\r\n").count(), 1, "a connection serves one request");
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

#[test]
fn hanging_clients_of_the_metrics_are_disconnected_and_hold_up_neither_scrapes_nor_the_shutdown() {
    let external = External::start(Durability::Throwaway);
    let mut service = start(&external, &[]);
    let address = metrics_address(&service);
    let hang = |begin: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.write_all(begin.as_bytes()).unwrap();
        stream.set_read_timeout(Some(HANG)).unwrap();
        stream
    };
    let mut hanging: Vec<TcpStream> =
        ["", "GET /metrics HTTP/1.1\r\n", "POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n"].map(hang).into();
    hanging.extend((0..20).map(|_| hang("G")));

    assert!(Scrape::of(&service).types.len() > 10);
    for stream in &mut hanging {
        // Ends, with or without a response.
        let _ = stream.read_to_end(&mut Vec::new()).map_err(|error| {
            assert!(!matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut), "{error}");
        });
    }
    let _hanging: Vec<_> = (0..20).map(|_| hang("G")).collect();
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

#[test]
fn metrics_address_in_use_fails_the_start_and_names_the_flag() {
    let dir = Dir::new();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = other.local_addr().unwrap().to_string();

    let output = run(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data(), "--metrics-listen", &address]);

    assert_refused(&output, &format!("--metrics-listen: cannot listen on {address}"));
    assert!(!dir.path("data").exists());
}

/// A row of the table in `docs/operations.md`: the type and the labels of a metric.
type Row = (String, BTreeSet<String>);

fn documented() -> BTreeMap<String, Row> {
    let text = include_str!("../../docs/operations.md");
    let section = text.split("\n## ").find(|section| section.starts_with("Metrics\n")).unwrap();
    let row = |line: &str| {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
        let labels = cells[3].split(", ").filter(|label| !label.is_empty());
        Some((name.to_owned(), (cells[2].to_owned(), labels.map(|label| label.replace('`', "")).collect())))
    };
    section.lines().filter_map(row).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_md_lists_exactly_the_metrics_of_a_service() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external, &[]);
    assert!(login(&service, ADA, "a wrong password").await.is_err());
    let token = login(&service, ADA, SECRET).await.unwrap();
    create_issue(&service, &token, "an issue").await;

    let scrape = scrape_until(&service, "the call is recorded and rows are pruned", |scrape| {
        scrape.calls(CREATE, "OK") == 1.0 && scrape.find("issue_tracker_pruned_rows_total", &[]).is_some()
    })
    .await;
    let labels = |name: &str, kind: &str| {
        let suffix = if kind == "histogram" { "_count" } else { "" };
        let samples = &scrape.samples[&format!("{name}{suffix}")];
        let names: BTreeSet<String> = samples.iter().flat_map(|(labels, _)| labels.keys().cloned()).collect();
        names
    };
    let found: BTreeMap<String, Row> =
        scrape.types.iter().map(|(name, kind)| (name.clone(), (kind.clone(), labels(name, kind)))).collect();
    assert_eq!(documented(), found);
}
