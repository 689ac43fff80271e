//! Tests the import and export commands against the real server, and against a fake server that interrupts streams.

use std::{
    collections::{HashSet, VecDeque},
    fs,
    io::{Read, Write},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
};

use flate2::{Compression, write::GzEncoder};
use issue_tracker::pb::{self, import_issues_response::Message};
use serde_json::Value;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

#[path = "cli/connections.rs"]
mod connections;
#[path = "cli/fake_server.rs"]
mod fake_server;
#[path = "cli/harness.rs"]
mod harness;
#[path = "support"]
mod support {
    pub mod bounds;
    pub mod calls;
    pub mod database;
    pub mod eventually;
    pub mod ports;
    pub mod process;
    pub mod scratch;
    pub mod service;
    pub mod terminal;
}

use fake_server::{FakeServer, Interruption, Proxy};
use harness::ProgramOutput;
use support::{
    bounds::HANG,
    calls::titles,
    database::session,
    eventually::eventually,
    ports::unused_port,
    process::{Dir, signal},
    service::{Service, TOKEN_FILE, finished, lines, program},
    terminal::{open_terminal, read_terminal},
};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn rows(numbers: std::ops::Range<u32>) -> String {
    numbers.map(|n| format!("row {n:06},a description of some length\n")).collect()
}

fn run_with_stdin(mut command: Command, bytes: &[u8]) -> ProgramOutput {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    // The write fails when the program exits without reading; callers assert on its output.
    std::thread::spawn(move || stdin.write_all(&bytes));
    ProgramOutput::of(child)
}

const GOOD: &str = "title,priority\nSlow search,high\nBroken link,\n";
const BAD: &str = "title,priority\nfirst,high\n,low\n\"two\nlines\",urgent\nlast,\n";

#[tokio::test(flavor = "multi_thread")]
async fn import_exit_code_is_the_outcome_and_only_accepted_rows_are_written() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let (good, bad) = (dir.write("good.csv", GOOD), dir.write("bad.csv", BAD));

    let checked = service.run(&["import", &good, "--validate-only"]).assert_code(0);
    checked.assert_prints("dry run, nothing was written: 2 rows: 2 would be created");
    let checked = service.run(&["import", &bad, "--validate-only"]).assert_code(1);
    checked.assert_prints("nothing was written: 2 of 4 rows rejected");
    let refused = service.run(&["import", &bad]).assert_code(1);
    refused.assert_prints("nothing was written: 2 of 4 rows rejected");
    assert_eq!(service.titles().await, [""; 0]);

    let unknown = dir.write("unknown.csv", "titel,prio\na,b\n");
    let failed = service.run(&["import", &unknown]).assert_code(2);
    assert!(failed.stderr.contains("issue-tracker: refused (INVALID_ARGUMENT):\n  header.titel: "), "{failed:#?}");
    assert!(failed.stderr.contains("\n  header.prio: "), "{failed:#?}");
    assert!(!failed.stderr.contains("--import-id"), "nothing was written, so there is nothing to resume: {failed:#?}");
    service.run(&["import", &dir.text("missing.csv")]).assert_code(2).assert_prints("cannot read");
    service.run(&["import", &good, "--mode", "some"]).assert_code(2).assert_prints("possible values");
    let wrong = dir.write("wrong.token", format!("itk_{}\n", "A".repeat(43)));
    let mut denied = program(&["import", "--server", &service.address, "--token-file", &wrong, &good]);
    ProgramOutput::of(denied.spawn().unwrap()).assert_code(2).assert_prints("(UNAUTHENTICATED)");
    let mut without_token = program(&["import", "--server", &service.address, "--data-dir", &dir.text("none"), &good]);
    ProgramOutput::of(without_token.spawn().unwrap())
        .assert_code(2)
        .assert_prints("token: missing; expected --token-file");

    assert_eq!(service.titles().await, [""; 0]);

    service.run(&["import", &good]).assert_code(0).assert_prints(": 2 rows: 2 created");
    let partial = service.run(&["import", &bad, "--mode", "skip-invalid"]).assert_code(1);
    partial.assert_prints(": 4 rows: 2 created, 2 rejected");
    assert_eq!(service.titles().await, ["Broken link", "Slow search", "first", "last"]);
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn import_reads_plain_and_gzip_files_and_stdin_and_writes_rejected_rows_for_repair() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let (bad, again) = (dir.write("bad.csv.gz", gzip(BAD.as_bytes())), dir.text("again.csv"));

    let output = service.run(&["import", &bad, "--mode", "skip-invalid", "--rejected", &again]).assert_code(1);
    output.assert_prints("again.csv has 2 of 2 rejected rows");
    let expected = concat!(
        "LINE  COLUMN    VALUE   MESSAGE\n",
        "   3  title             title: required\n",
        "   4  priority  urgent  priority: \"urgent\" is not a priority; expected low, medium, high, critical"
    );
    assert!(output.stdout.starts_with(expected), "{output:#?}");
    let rejected = fs::read_to_string(&again).unwrap();
    assert_eq!(rejected, "title,priority\n,low\n\"two\nlines\",urgent\n");
    fs::write(&again, rejected.replace(",low", "second,low").replace("urgent", "high")).unwrap();
    service.run(&["import", &again]).assert_code(0);

    let piped_in = |bytes: &[u8]| run_with_stdin(service.command(&["import", "-"]), bytes);
    piped_in(b"title\nfrom a pipe\n").assert_code(0);
    piped_in(&gzip(b"title\nfrom a compressed pipe\n")).assert_code(0);
    let rejected =
        run_with_stdin(service.command(&["import", "-", "--rejected", &again, "--errors", "0"]), b"title\nx\n\"\"\n");
    rejected.assert_code(1).assert_prints("and 1 more");
    assert_eq!(fs::read_to_string(&again).unwrap(), "title\n\"\"\n");
    assert_eq!(
        service.titles().await,
        ["first", "from a compressed pipe", "from a pipe", "last", "second", "two\nlines"]
    );
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn json_flag_prints_progress_errors_and_summary_as_json_lines() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let bad = dir.write("bad.csv", BAD);

    let output = service.run(&["import", &bad, "--mode", "skip-invalid", "--json"]).assert_code(1);

    assert_eq!(output.stderr, "");
    assert_eq!(output.json("progress").last().unwrap()["row_count"], 4);
    let errors = output.json("row_error");
    assert_eq!(errors.len(), 2);
    assert_eq!(
        (&errors[1]["line_number"], &errors[1]["code"], &errors[1]["value"]),
        (&4.into(), &"INVALID_PRIORITY".into(), &"urgent".into())
    );
    let summary = &output.json("summary")[0];
    assert_eq!((&summary["state"], &summary["created_count"]), (&"IMPORT_STATE_COMMITTED".into(), &2.into()));
    let last = output.stdout.lines().last().unwrap();
    assert!(last.starts_with("{\"summary\":"), "{last}");
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn truncated_gzip_file_fails_and_writes_nothing() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    // Any prefix of this file is a valid CSV file.
    let titles: String = (0..200_000).map(|n| format!("{n}\n")).collect();
    let whole = gzip(format!("title\n{titles}").as_bytes());
    let path = dir.write("truncated.csv.gz", &whole[..whole.len() - 1_000]);

    let output = service.run(&["import", &path]).assert_code(2);

    output.assert_prints(&format!("cannot read {path}: "));
    let database = session(&dir.database()).await;
    let active_sql = "SELECT FROM pg_stat_activity WHERE application_name = 'issue-tracker' AND state <> 'idle'";
    eventually("the import has ended on the server", async || {
        database.query(active_sql, &[]).await.unwrap().is_empty()
    })
    .await;
    assert_eq!(service.titles().await, [""; 0], "the client must abort the stream, not end it");
    assert_eq!(service.stop().code(), Some(0));
}

/// Kills the server during an import, starts another on the same address, and returns that server and the output since.
async fn import_across_server_crash(dir: &Dir, mode: &str) -> (Service, ProgramOutput) {
    let address = format!("127.0.0.1:{}", unused_port());
    let mut service = Service::embedded(dir, &address);
    let mut client = service.command(&["import", "-", "--json", "--mode", mode]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = client.stdin.take().unwrap();
    let output_lines = lines(client.stdout.take().unwrap());
    stdin.write_all(format!("title,description\n{}", rows(0..12_000)).as_bytes()).unwrap();
    loop {
        let line = output_lines.recv_timeout(HANG).unwrap();
        let message: Value = serde_json::from_str(&line).unwrap();
        if message["progress"]["row_count"].as_i64() >= Some(5_000) {
            break;
        }
    }
    service.kill();
    let service = Service::embedded(dir, &address);
    // The write fails when the client has exited; callers assert on its output.
    let _ = stdin.write_all(rows(12_000..20_000).as_bytes());
    drop(stdin);
    let mut output = ProgramOutput::of(client);
    output.stdout = output_lines.iter().map(|line| line + "\n").collect();
    (service, output)
}

#[tokio::test(flavor = "multi_thread")]
async fn atomic_import_completes_after_a_server_crash() {
    let dir = Dir::new();
    let (mut service, output) = import_across_server_crash(&dir, "atomic").await;
    let output = output.assert_code(0);
    output.assert_prints("retrying in");
    assert_eq!(output.json("summary")[0]["created_count"], 20_000);
    let titles = service.titles().await;
    assert_eq!((titles.len(), titles.iter().collect::<HashSet<_>>().len()), (20_000, 20_000));
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn import_resumed_after_a_server_crash_writes_each_row_once_and_export_returns_all() {
    let dir = Dir::new();
    let (mut service, output) = import_across_server_crash(&dir, "skip-invalid").await;
    let output = output.assert_code(0);
    let summary = &output.json("summary")[0];
    assert_eq!((&summary["row_count"], &summary["created_count"]), (&20_000.into(), &20_000.into()));
    let resumed = output.json("progress").iter().all(|progress| progress["committed_offset"].as_i64() > Some(0));
    assert!(resumed, "committed rows must not be sent again");
    let titles = service.titles().await;
    assert_eq!((titles.len(), titles.iter().collect::<HashSet<_>>().len()), (20_000, 20_000));

    let file = dir.text("exported.csv");
    service.run(&["export", &file]).assert_code(0);
    let exported = fs::read_to_string(&file).unwrap();
    assert_eq!(exported.lines().count(), 20_001);
    assert_eq!(service.run(&["export"]).assert_code(0).stdout, exported);
    let none = service.run(&["export", "--filter", "status = closed"]).assert_code(0);
    assert_eq!(none.stdout.lines().count(), 1, "{}", none.stdout);
    service.run(&["export", "--filter", "colour = red"]).assert_code(2).assert_prints("(INVALID_ARGUMENT)");
    assert_eq!(service.stop().code(), Some(0));
}

/// A fake server, and a directory for the client's files.
struct Fixture {
    dir: Dir,
    fake: FakeServer,
    /// The address that the client connects to.
    address: SocketAddr,
}

impl Fixture {
    async fn new(fake: FakeServer) -> Self {
        let address = fake.clone().serve().await;
        Self { dir: Dir::new(), fake, address }
    }

    fn command(&self, args: &[&str]) -> Command {
        let server = self.address.to_string();
        let mut command = program(&[args, &["--server", &server]].concat());
        command.env("ISSUE_TRACKER_TOKEN", "itk_x");
        command
    }

    /// Runs the program and waits off the runtime, whose threads serve the fake server.
    async fn run(&self, args: &[&str]) -> ProgramOutput {
        let child = self.command(args).spawn().unwrap();
        tokio::task::spawn_blocking(|| ProgramOutput::of(child)).await.unwrap()
    }
}

/// Returns a CSV file of 5 MB, long enough for seven interruptions.
fn large_csv() -> String {
    format!("title,description\n{}", rows(0..130_000))
}

fn status_with_reason(code: Code, reason: &str) -> Status {
    Status::with_error_details(code, reason, ErrorDetails::with_error_info(reason, "issuetracker", []))
}

#[tokio::test(flavor = "multi_thread")]
async fn interrupted_import_stream_resumes_from_the_committed_offset() {
    let interruptions = || {
        vec![
            Interruption::Status(status_with_reason(Code::ResourceExhausted, "OVERLOADED")),
            Interruption::Status(status_with_reason(Code::Aborted, "IMPORT_RUNNING")),
            Interruption::Status(status_with_reason(Code::Unavailable, "DATABASE_UNAVAILABLE")),
            Interruption::Status(status_with_reason(Code::DeadlineExceeded, "IMPORT_IDLE")),
            Interruption::Status(status_with_reason(Code::OutOfRange, "IMPORT_OFFSET_GAP")),
            Interruption::Status(Status::new(Code::Internal, "h2 protocol error")),
            Interruption::End,
        ]
    };
    for (kind, mode) in [("csv", "skip-invalid"), ("csv", "atomic"), ("gz", "skip-invalid"), ("pipe", "skip-invalid")] {
        let fixture = Fixture::new(FakeServer::new().with_interruptions(interruptions())).await;
        let args = ["--mode", mode, "--json", "--create-labels"];
        let output = match kind {
            "pipe" => {
                let command = fixture.command(&[&["import", "-"], &args[..]].concat());
                tokio::task::spawn_blocking(move || run_with_stdin(command, large_csv().as_bytes())).await.unwrap()
            }
            _ => {
                let bytes = if kind == "gz" { gzip(large_csv().as_bytes()) } else { large_csv().into_bytes() };
                let path = fixture.dir.write("issues", bytes);
                fixture.run(&[&["import", &path], &args[..]].concat()).await
            }
        };
        let output = output.assert_code(0);
        let state = fixture.fake.state();
        assert!(state.interruptions.is_empty(), "{kind} {mode}");
        assert_eq!(state.options.len(), 8, "{kind} {mode}");
        assert!(state.committed == large_csv().as_bytes(), "{kind} {mode}: each byte must be committed once, in order");
        assert!(
            state.options.iter().all(|options| *options == state.options[0]),
            "every stream must send the same options"
        );
        let total_bytes = if kind == "csv" { large_csv().len() as i64 } else { 0 };
        assert_eq!(state.options[0].total_bytes, total_bytes, "{kind}");
        let begins_at_zero = output.json("progress").iter().filter(|progress| progress["offset"] == 0).count();
        assert_eq!(begins_at_zero > 5, mode == "atomic", "{kind} {mode}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_connection_is_reestablished() {
    let mut fixture = Fixture::new(FakeServer::new()).await;
    let proxy = Proxy::start(fixture.address, [700_000, 500_000, 100]).await;
    fixture.address = proxy;
    let path = fixture.dir.write("issues.csv", large_csv());
    let output = fixture.run(&["import", &path, "--mode", "skip-invalid"]).await.assert_code(0);
    assert!(fixture.fake.state().committed == large_csv().as_bytes());
    assert_eq!(output.stderr.matches("retrying in").count(), 3, "{output:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_stops_retrying_after_retry_seconds_without_progress() {
    let mut fixture = Fixture::new(FakeServer::new()).await;
    fixture.address = "127.0.0.1:1".parse().unwrap();
    let path = fixture.dir.write("issues.csv", GOOD);
    for args in [&["import", &path, "--retry-seconds", "1"][..], &["export", "--retry-seconds", "1"]] {
        let output = fixture.run(args).await.assert_code(2);
        output.assert_prints("cannot connect to 127.0.0.1:1 (Connection refused");
        output.assert_prints("retrying in");
        output.assert_prints("gave up after 1 s without progress");
        assert_eq!(output.stdout, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn first_connection_is_retried_for_5_s_only() {
    let mut fixture = Fixture::new(FakeServer::new()).await;
    fixture.address = "127.0.0.1:1".parse().unwrap();
    let path = fixture.dir.write("issues.csv", GOOD);
    for args in [&["import", &path][..], &["export"]] {
        let output = fixture.run(args).await.assert_code(2);
        output.assert_prints("gave up after 5 s without progress");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_color_removes_escape_sequences_from_the_progress_bar() {
    for (no_color, has_escapes) in [(None, true), (Some(""), true), (Some("1"), false)] {
        let chunks = (0..20).map(|_| rows(0..10_000)).collect();
        let fixture = Fixture::new(FakeServer::new().with_export(chunks, vec![])).await;
        let (mut terminal, stderr) = open_terminal();
        let mut command = fixture.command(&["export", "/dev/null"]);
        command.env("TERM", "xterm").env_remove("NO_COLOR").stderr(stderr);
        if let Some(value) = no_color {
            command.env("NO_COLOR", value);
        }
        let mut child = command.spawn().unwrap();
        // Dropping the command closes the last copy of the terminal's other end.
        drop(command);
        let printed = tokio::task::spawn_blocking(move || read_terminal(&mut terminal, |_, _| {}));
        let printed = printed.await.unwrap();
        assert!(child.wait().unwrap().success(), "{printed}");
        assert!(printed.contains("200,000 issues, "), "{printed}");
        assert_eq!(printed.contains('\x1b'), has_escapes, "{no_color:?}: {printed:?}");
    }
}

#[test]
fn no_color_removes_escape_sequences_from_the_log() {
    let dir = Dir::new();
    for (no_color, has_escapes) in [("", true), ("1", false)] {
        let (mut terminal, stderr) = open_terminal();
        let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
        let mut child = command.env("NO_COLOR", no_color).stderr(stderr).spawn().unwrap();
        // Dropping the command closes the last copy of the terminal's other end.
        drop(command);
        let log = std::thread::spawn(move || read_terminal(&mut terminal, |_, _| {}));
        let mut output_lines = lines(child.stdout.take().unwrap()).into_iter();
        assert!(output_lines.any(|line| line.starts_with("listening on ")));
        assert!(signal(child.id(), libc::SIGTERM));
        assert!(child.wait().unwrap().success());

        let log = log.join().unwrap();

        assert!(log.contains("postgres started"), "{log}");
        assert_eq!(log.contains('\x1b'), has_escapes, "{no_color:?}: {log:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn permanent_errors_are_not_retried() {
    for code in [
        Code::InvalidArgument,
        Code::PermissionDenied,
        Code::FailedPrecondition,
        Code::Unauthenticated,
        Code::NotFound,
        Code::Internal,
    ] {
        let interruption = Interruption::Status(status_with_reason(code, "NO"));
        let fixture = Fixture::new(FakeServer::new().with_interruptions(vec![interruption])).await;
        let path = fixture.dir.write("issues.csv", large_csv());
        let output = fixture.run(&["import", &path, "--mode", "skip-invalid"]).await.assert_code(2);
        assert!(output.stderr.contains("issue-tracker: NO ("), "{output:#?}");
        assert!(!output.stderr.contains("retrying"), "{output:#?}");
        let has_committed = !fixture.fake.state().committed.is_empty();
        assert_eq!(output.stderr.contains("--import-id"), has_committed, "{output:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn signal_prints_the_command_that_resumes_the_import() {
    for (mode, number, code) in
        [("skip-invalid", libc::SIGINT, 130), ("atomic", libc::SIGINT, 130), ("skip-invalid", libc::SIGTERM, 143)]
    {
        let fixture = Fixture::new(FakeServer::new()).await;
        let mut command = fixture.command(&["import", "-", "--map", "Sum mary=title", "--mode", mode, "--json"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = large_csv();
        stdin.write_all(&bytes.as_bytes()[..1_000_000]).unwrap();
        let output_lines = lines(child.stdout.take().unwrap());
        let has_offset = |line: &String| !line.contains("\"offset\":0,");
        let output_lines = tokio::task::spawn_blocking(move || output_lines.iter().find(has_offset)).await.unwrap();
        assert!(output_lines.is_some());
        assert!(signal(child.id(), number));
        let output = tokio::task::spawn_blocking(|| ProgramOutput::of(child)).await.unwrap().assert_code(code);
        let id = fixture.fake.state().options[0].import_id.clone();
        if mode == "atomic" {
            assert_eq!(output.stderr, "interrupted\nnothing was written; run the command again\n");
            continue;
        }
        let program = env!("CARGO_BIN_EXE_issue-tracker");
        let server = fixture.address;
        let command = format!(
            "  {program} import --import-id {id} - --map 'Sum mary=title' --mode {mode} --json --server {server}\n"
        );
        assert!(output.stderr.starts_with("interrupted\nsome rows may be written;"), "{output:#?}");
        assert!(output.stderr.contains(&command), "{output:#?}");
        assert!(output.stderr.contains("with the same input, from its start"), "{output:#?}");
        let before = fixture.fake.state().committed.len();
        assert!(before > 0 && before < bytes.len());

        // The printed command resumes the import.
        let again = fixture.command(&["import", "-", "--import-id", &id, "--mode", mode]);
        tokio::task::spawn_blocking(|| run_with_stdin(again, large_csv().as_bytes())).await.unwrap().assert_code(0);
        assert!(fixture.fake.state().committed == bytes.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_import_option_has_a_flag() {
    let fixture = Fixture::new(FakeServer::new()).await;
    let path = fixture.dir.write("issues.csv", GOOD);
    let id = "0198c0de-0000-7000-8000-000000000001";
    #[rustfmt::skip]
    let args = [
        "import", &path, "--import-id", id, "--mode", "skip-invalid", "--on-existing", "update", "--validate-only",
        "--map", "Summary=title", "--map", "Notes=", "--separator", "tab", "--label-separator", "|",
        "--default-status", "in-progress", "--default-priority", "critical", "--default-assignee", "alice",
        "--ignore-unknown-columns", "--create-labels",
    ];
    fixture.run(&args).await.assert_code(0);
    let expected = pb::ImportOptions {
        import_id: id.to_owned(),
        mode: pb::ImportMode::SkipInvalid.into(),
        validate_only: true,
        total_bytes: GOOD.len() as i64,
        on_existing: pb::OnExisting::Update.into(),
        column_names: [("Summary", "title"), ("Notes", "")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
        separator: "\t".to_owned(),
        label_separator: "|".to_owned(),
        default_status: pb::Status::InProgress.into(),
        default_priority: pb::Priority::Critical.into(),
        default_assignee: "alice".to_owned(),
        ignore_unknown_columns: true,
        create_labels: true,
    };
    assert_eq!(fixture.fake.state().options, [expected]);
    let twice = fixture.run(&["import", &path, "--map", "a=title", "--map", "a=labels"]).await.assert_code(2);
    twice.assert_prints("--map: column \"a\" is mapped twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_errors_missing_from_the_stream_are_listed_from_the_server() {
    let lines: Vec<String> = (0..1_500).map(|n| format!("{n:05}\n")).collect();
    let file = format!("title\n{}", lines.concat());
    let errors = (0..1_500).map(|n| fake_server::row_error(6 + 6 * n, n + 2));
    for (listed, expected) in [(1_500, 1_500), (1_200, 1_200), (0, 1_000)] {
        let fake = FakeServer::new().with_errors(errors.clone().collect(), 1_000, listed);
        let fixture = Fixture::new(fake).await;
        let (path, rejected) = (fixture.dir.write("issues.csv", &file), fixture.dir.text("rejected.csv"));
        let output =
            fixture.run(&["import", &path, "--mode", "skip-invalid", "--rejected", &rejected]).await.assert_code(1);
        let written = fs::read_to_string(&rejected).unwrap();
        assert!(written == format!("title\n{}", lines[..expected].concat()), "{expected}");
        output.assert_prints(&format!("rejected.csv has {expected} of 1500 rejected rows"));
        output.assert_prints("and 500 more");
        if expected < 1_500 {
            output.assert_prints("the positions of the others are unknown");
            output.assert_prints("more; the server returns the first 1,");
        }
        // The table's heading, 1,000 errors, the count of the remaining errors, the outcome.
        assert_eq!(output.stdout.lines().count(), 1_003);
        let none = fixture.run(&["import", &path, "--errors", "3"]).await;
        assert_eq!(none.stdout.lines().count(), 6, "{none:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn export_writes_a_complete_file_or_none() {
    let chunks = || vec!["title\n".to_owned() + &rows(0..1_000), rows(1_000..2_000), rows(2_000..3_000)];
    let whole = chunks().concat();
    let interruption = || Interruption::Status(status_with_reason(Code::Unavailable, "DATABASE_UNAVAILABLE"));
    let fixture = Fixture::new(FakeServer::new().with_export(chunks(), vec![interruption(), interruption()])).await;
    let path = fixture.dir.text("issues.csv");
    let flags = ["--filter", "status = open", "--show-deleted", "--escape-formulas"];
    let output = fixture.run(&[&["export", &path], &flags[..]].concat()).await.assert_code(0);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    assert_eq!(output.stdout, "");
    output.assert_prints("3,000 issues, ");
    let expected =
        pb::ExportIssuesRequest { filter: "status = open".to_owned(), show_deleted: true, escape_formulas: true };
    assert!(fixture.fake.state().export_requests.iter().all(|request| *request == expected));
    for args in [&["export"][..], &["export", "-"]] {
        assert_eq!(fixture.run(args).await.assert_code(0).stdout, whole);
    }

    for interruption in [interruption(), Interruption::Status(status_with_reason(Code::Internal, "INTERNAL"))] {
        let fixture = Fixture::new(FakeServer::new().with_export(chunks(), vec![interruption; 50])).await;
        let path = fixture.dir.write("issues.csv", "before");
        fixture.run(&["export", &path, "--retry-seconds", "1"]).await.assert_code(2);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fixture.dir.names(), ["issues.csv"], "no temporary file must remain");
        let output = fixture.run(&["export"]).await.assert_code(2);
        assert!(output.stdout.len() < whole.len() && whole.starts_with(&output.stdout));
    }
    fixture.run(&["export", "/nonexistent/issues.csv"]).await.assert_code(2).assert_prints("cannot write");
}

#[tokio::test(flavor = "multi_thread")]
async fn export_to_a_closed_pipe_exits_without_an_error() {
    let chunks = (0..200).map(|_| rows(0..10_000)).collect();
    let fixture = Fixture::new(FakeServer::new().with_export(chunks, vec![])).await;
    let mut child = fixture.command(&["export"]).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = tokio::task::spawn_blocking(|| ProgramOutput::of(child)).await.unwrap().assert_code(0);
    assert!(!output.stderr.contains("issue-tracker:"), "{output:#?}");
}
