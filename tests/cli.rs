//! Import and export as people start them, against the real server, and against one that cuts streams on purpose.

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
    pub mod process;
    pub mod service;
}

use fake_server::{Cut, Fake, Proxy};
use harness::Ran;
use support::{
    bounds::HANG,
    calls::titles,
    database::session,
    eventually::eventually,
    process::{Dir, signal},
    service::{Service, TOKEN_FILE, finished, lines, program},
};

fn zipped(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn rows(numbers: std::ops::Range<u32>) -> String {
    numbers.map(|n| format!("row {n:06},a description of some length\n")).collect()
}

fn piped(mut command: Command, bytes: &[u8]) -> Ran {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    // One that does not read it has failed, and is asserted on by its output.
    std::thread::spawn(move || stdin.write_all(&bytes));
    Ran::of(child)
}

const GOOD: &str = "title,priority\nSlow search,high\nBroken link,\n";
const BAD: &str = "title,priority\nfirst,high\n,low\n\"two\nlines\",urgent\nlast,\n";

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_is_the_outcome_and_only_what_went_in_is_there() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let (good, bad) = (dir.write("good.csv", GOOD), dir.write("bad.csv", BAD));

    let checked = service.run(&["import", &good, "--validate-only"]).assert_code(0);
    checked.assert_says("nothing was written, only checked: 2 rows: 2 would be created");
    let checked = service.run(&["import", &bad, "--validate-only"]).assert_code(1);
    checked.assert_says("nothing was written: 2 of 4 rows rejected");
    let refused = service.run(&["import", &bad]).assert_code(1);
    refused.assert_says("nothing was written: 2 of 4 rows rejected");
    assert_eq!(service.titles().await, [""; 0]);

    let unknown = dir.write("unknown.csv", "titel,prio\na,b\n");
    let failed = service.run(&["import", &unknown]).assert_code(2);
    assert!(failed.stderr.contains("issue-tracker: refused (INVALID_ARGUMENT):\n  header.titel: "), "{failed:#?}");
    assert!(failed.stderr.contains("\n  header.prio: "), "{failed:#?}");
    assert!(!failed.stderr.contains("--import-id"), "nothing is in: {failed:#?}");
    service.run(&["import", &dir.text("missing.csv")]).assert_code(2).assert_says("cannot read");
    service.run(&["import", &good, "--mode", "some"]).assert_code(2).assert_says("possible values");
    let wrong = dir.write("wrong.token", format!("itk_{}\n", "A".repeat(43)));
    let mut denied = program(&["import", "--server", &service.address, "--token-file", &wrong, &good]);
    Ran::of(denied.spawn().unwrap()).assert_code(2).assert_says("(UNAUTHENTICATED)");
    let mut nobody = program(&["import", "--server", &service.address, "--data-dir", &dir.text("none"), &good]);
    Ran::of(nobody.spawn().unwrap()).assert_code(2).assert_says("no token; give --token-file");

    assert_eq!(service.titles().await, [""; 0]);

    service.run(&["import", &good]).assert_code(0).assert_says(": 2 rows: 2 created");
    let in_part = service.run(&["import", &bad, "--mode", "skip-invalid"]).assert_code(1);
    in_part.assert_says(": 4 rows: 2 created, 2 rejected");
    assert_eq!(service.titles().await, ["Broken link", "Slow search", "first", "last"]);
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_plain_compressed_and_by_standard_input_and_rejected_rows_can_be_repaired() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let (bad, again) = (dir.write("bad.csv.gz", zipped(BAD.as_bytes())), dir.text("again.csv"));

    let ran = service.run(&["import", &bad, "--mode", "skip-invalid", "--rejected", &again]).assert_code(1);
    ran.assert_says("again.csv has 2 of 2 rejected rows");
    let expected = concat!(
        "LINE  COLUMN    VALUE   MESSAGE\n",
        "   3  title             title \"\" is required\n",
        "   4  priority  urgent  priority \"urgent\" is not one of low, medium, high, critical"
    );
    assert!(ran.stdout.starts_with(expected), "{ran:#?}");
    let rejected = fs::read_to_string(&again).unwrap();
    assert_eq!(rejected, "title,priority\n,low\n\"two\nlines\",urgent\n");
    fs::write(&again, rejected.replace(",low", "second,low").replace("urgent", "high")).unwrap();
    service.run(&["import", &again]).assert_code(0);

    let piped_in = |bytes: &[u8]| piped(service.command(&["import", "-"]), bytes);
    piped_in(b"title\nfrom a pipe\n").assert_code(0);
    piped_in(&zipped(b"title\nfrom a compressed pipe\n")).assert_code(0);
    let rejected = piped(service.command(&["import", "-", "--rejected", &again, "--errors", "0"]), b"title\nx\n\"\"\n");
    rejected.assert_code(1).assert_says("and 1 more");
    assert_eq!(fs::read_to_string(&again).unwrap(), "title\n\"\"\n");
    assert_eq!(
        service.titles().await,
        ["first", "from a compressed pipe", "from a pipe", "last", "second", "two\nlines"]
    );
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_errors_and_summary_are_json_lines_for_programs() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    let bad = dir.write("bad.csv", BAD);

    let ran = service.run(&["import", &bad, "--mode", "skip-invalid", "--json"]).assert_code(1);

    assert_eq!(ran.stderr, "");
    assert_eq!(ran.json("progress").last().unwrap()["row_count"], 4);
    let errors = ran.json("row_error");
    assert_eq!(errors.len(), 2);
    assert_eq!(
        (&errors[1]["line_number"], &errors[1]["code"], &errors[1]["value"]),
        (&4.into(), &"INVALID_PRIORITY".into(), &"urgent".into())
    );
    let summary = &ran.json("summary")[0];
    assert_eq!((&summary["state"], &summary["created_count"]), (&"IMPORT_STATE_COMMITTED".into(), &2.into()));
    let last = ran.stdout.lines().last().unwrap();
    assert!(last.starts_with("{\"summary\":"), "{last}");
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_read_to_its_end_is_not_taken_for_a_whole_one() {
    let dir = Dir::new();
    let mut service = Service::embedded(&dir, "127.0.0.1:0");
    // Wherever it ends, it has rows, and all are good.
    let titles: String = (0..200_000).map(|n| format!("{n}\n")).collect();
    let whole = zipped(format!("title\n{titles}").as_bytes());
    let path = dir.write("cut.csv.gz", &whole[..whole.len() - 1_000]);

    let ran = service.run(&["import", &path]).assert_code(2);

    ran.assert_says(&format!("cannot read {path}: "));
    let database = session(&dir.database()).await;
    let at_work = "SELECT FROM pg_stat_activity WHERE application_name = 'issue-tracker' AND state <> 'idle'";
    eventually("the import has ended", async || database.query(at_work, &[]).await.unwrap().is_empty()).await;
    assert_eq!(service.titles().await, [""; 0], "the stream was cut, not ended");
    assert_eq!(service.stop().code(), Some(0));
}

/// Kills the server in the middle of an import, and starts another in its place.
async fn import_through_a_crash(dir: &Dir, mode: &str) -> (Service, Ran) {
    let mut service = Service::embedded(dir, "127.0.0.1:0");
    let mut client = service.command(&["import", "-", "--json", "--mode", mode]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = client.stdin.take().unwrap();
    let answers = lines(client.stdout.take().unwrap());
    stdin.write_all(format!("title,description\n{}", rows(0..12_000)).as_bytes()).unwrap();
    loop {
        let line = answers.recv_timeout(HANG).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        if answer["progress"]["row_count"].as_i64() >= Some(5_000) {
            break;
        }
    }
    let address = service.address.clone();
    service.kill();
    let service = Service::embedded(dir, &address);
    // If it does not read on, its exit code and words say why.
    let _ = stdin.write_all(rows(12_000..20_000).as_bytes());
    drop(stdin);
    let mut ran = Ran::of(client);
    // What it said behind the crash.
    ran.stdout = answers.iter().map(|line| line + "\n").collect();
    (service, ran)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_atomic_import_goes_through_a_crash_of_the_server() {
    let dir = Dir::new();
    let (mut service, ran) = import_through_a_crash(&dir, "atomic").await;
    let ran = ran.assert_code(0);
    ran.assert_says("trying again in");
    assert_eq!(ran.json("summary")[0]["created_count"], 20_000);
    let titles = service.titles().await;
    assert_eq!((titles.len(), titles.iter().collect::<HashSet<_>>().len()), (20_000, 20_000));
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_row_goes_in_once_through_a_crash_of_the_server_and_comes_out_again() {
    let dir = Dir::new();
    let (mut service, ran) = import_through_a_crash(&dir, "skip-invalid").await;
    let ran = ran.assert_code(0);
    let summary = &ran.json("summary")[0];
    assert_eq!((&summary["row_count"], &summary["created_count"]), (&20_000.into(), &20_000.into()));
    let resumed = ran.json("progress").iter().all(|progress| progress["committed_offset"].as_i64() > Some(0));
    assert!(resumed, "the rows that are in are not sent again");
    let titles = service.titles().await;
    assert_eq!((titles.len(), titles.iter().collect::<HashSet<_>>().len()), (20_000, 20_000));

    let file = dir.text("exported.csv");
    service.run(&["export", &file]).assert_code(0);
    let exported = fs::read_to_string(&file).unwrap();
    assert_eq!(exported.lines().count(), 20_001);
    assert_eq!(service.run(&["export"]).assert_code(0).stdout, exported);
    let none = service.run(&["export", "--filter", "status = closed"]).assert_code(0);
    assert_eq!(none.stdout.lines().count(), 1, "{}", none.stdout);
    service.run(&["export", "--filter", "colour = red"]).assert_code(2).assert_says("(INVALID_ARGUMENT)");
    assert_eq!(service.stop().code(), Some(0));
}

/// Against a server that is told how to behave.
struct Stage {
    dir: Dir,
    fake: Fake,
    /// Where the client is sent.
    address: SocketAddr,
}

impl Stage {
    async fn set(fake: Fake) -> Self {
        let address = fake.clone().serve().await;
        Self { dir: Dir::new(), fake, address }
    }

    fn command(&self, args: &[&str]) -> Command {
        let server = self.address.to_string();
        let mut command = program(&[args, &["--server", &server]].concat());
        command.env("ISSUE_TRACKER_TOKEN", "itk_x");
        command
    }

    /// Not on a thread of the runtime: the fake server needs them.
    async fn run(&self, args: &[&str]) -> Ran {
        let child = self.command(args).spawn().unwrap();
        tokio::task::spawn_blocking(|| Ran::of(child)).await.unwrap()
    }
}

/// Five megabytes, which is enough for seven cuts.
fn file() -> String {
    format!("title,description\n{}", rows(0..130_000))
}

fn our_status(code: Code, reason: &str) -> Status {
    Status::with_error_details(code, reason, ErrorDetails::with_error_info(reason, "issuetracker", []))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_cut_in_whatever_way_goes_on_behind_what_is_committed() {
    let cuts = || {
        vec![
            Cut::Status(our_status(Code::ResourceExhausted, "OVERLOADED")),
            Cut::Status(our_status(Code::Aborted, "IMPORT_RUNNING")),
            Cut::Status(our_status(Code::Unavailable, "DATABASE_UNAVAILABLE")),
            Cut::Status(our_status(Code::DeadlineExceeded, "IMPORT_IDLE")),
            Cut::Status(our_status(Code::OutOfRange, "IMPORT_OFFSET_GAP")),
            Cut::Status(Status::new(Code::Internal, "h2 protocol error")),
            Cut::End,
        ]
    };
    for (kind, mode) in [("csv", "skip-invalid"), ("csv", "atomic"), ("gz", "skip-invalid"), ("pipe", "skip-invalid")] {
        let stage = Stage::set(Fake::new().with_cuts(cuts())).await;
        let args = ["--mode", mode, "--json", "--create-labels"];
        let ran = match kind {
            "pipe" => {
                let command = stage.command(&[&["import", "-"], &args[..]].concat());
                tokio::task::spawn_blocking(move || piped(command, file().as_bytes())).await.unwrap()
            }
            _ => {
                let bytes = if kind == "gz" { zipped(file().as_bytes()) } else { file().into_bytes() };
                let path = stage.dir.write("issues", bytes);
                stage.run(&[&["import", &path], &args[..]].concat()).await
            }
        };
        let ran = ran.assert_code(0);
        let state = stage.fake.state();
        assert!(state.cuts.is_empty(), "{kind} {mode}");
        assert_eq!(state.options.len(), 8, "{kind} {mode}");
        assert!(state.committed == file().as_bytes(), "{kind} {mode}: each byte once, in order");
        assert!(state.options.iter().all(|options| *options == state.options[0]), "the same import, the same options");
        let total_bytes = if kind == "csv" { file().len() as i64 } else { 0 };
        assert_eq!(state.options[0].total_bytes, total_bytes, "{kind}");
        let begins_at_zero = ran.json("progress").iter().filter(|progress| progress["offset"] == 0).count();
        assert_eq!(begins_at_zero > 5, mode == "atomic", "{kind} {mode}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_breaks_is_made_again() {
    let mut stage = Stage::set(Fake::new()).await;
    let proxy = Proxy::start(stage.address, [700_000, 500_000, 100]).await;
    stage.address = proxy;
    let path = stage.dir.write("issues.csv", file());
    let ran = stage.run(&["import", &path, "--mode", "skip-invalid"]).await.assert_code(0);
    assert!(stage.fake.state().committed == file().as_bytes());
    assert_eq!(ran.stderr.matches("trying again in").count(), 3, "{ran:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_gives_up_after_some_time_without_progress() {
    let mut stage = Stage::set(Fake::new()).await;
    stage.address = "127.0.0.1:1".parse().unwrap();
    let path = stage.dir.write("issues.csv", GOOD);
    for args in [&["import", &path, "--retry-seconds", "1"][..], &["export", "--retry-seconds", "1"]] {
        let ran = stage.run(args).await.assert_code(2);
        ran.assert_says("127.0.0.1:1 cannot be reached (Connection refused");
        ran.assert_says("trying again in");
        ran.assert_says("given up");
        assert_eq!(ran.stdout, "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_try_does_not_mend_ends_at_once() {
    for code in [
        Code::InvalidArgument,
        Code::PermissionDenied,
        Code::FailedPrecondition,
        Code::Unauthenticated,
        Code::NotFound,
        Code::Internal,
    ] {
        let cut = Cut::Status(our_status(code, "NO"));
        let stage = Stage::set(Fake::new().with_cuts(vec![cut])).await;
        let path = stage.dir.write("issues.csv", file());
        let ran = stage.run(&["import", &path, "--mode", "skip-invalid"]).await.assert_code(2);
        assert!(ran.stderr.contains("issue-tracker: NO ("), "{ran:#?}");
        assert!(!ran.stderr.contains("trying again"), "{ran:#?}");
        let is_begun = !stage.fake.state().committed.is_empty();
        assert_eq!(ran.stderr.contains("--import-id"), is_begun, "{ran:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_says_how_to_go_on() {
    for (mode, number, code) in
        [("skip-invalid", libc::SIGINT, 130), ("atomic", libc::SIGINT, 130), ("skip-invalid", libc::SIGTERM, 143)]
    {
        let stage = Stage::set(Fake::new()).await;
        let mut command = stage.command(&["import", "-", "--map", "Sum mary=title", "--mode", mode, "--json"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = file();
        stdin.write_all(&bytes.as_bytes()[..1_000_000]).unwrap();
        let answers = lines(child.stdout.take().unwrap());
        let has_offset = |line: &String| !line.contains("\"offset\":0,");
        let answers = tokio::task::spawn_blocking(move || answers.iter().find(has_offset)).await.unwrap();
        assert!(answers.is_some());
        assert!(signal(child.id(), number));
        let ran = tokio::task::spawn_blocking(|| Ran::of(child)).await.unwrap().assert_code(code);
        let id = stage.fake.state().options[0].import_id.clone();
        if mode == "atomic" {
            assert_eq!(ran.stderr, "interrupted\nnothing was written; run it again\n");
            continue;
        }
        let program = env!("CARGO_BIN_EXE_issue-tracker");
        let server = stage.address;
        let command = format!(
            "  {program} import --import-id {id} - --map 'Sum mary=title' --mode {mode} --json --server {server}\n"
        );
        assert!(ran.stderr.starts_with("interrupted\nsome rows may be in;"), "{ran:#?}");
        assert!(ran.stderr.contains(&command), "{ran:#?}");
        assert!(ran.stderr.contains("with the same input, from its start"), "{ran:#?}");
        let before = stage.fake.state().committed.len();
        assert!(before > 0 && before < bytes.len());

        // And so it does.
        let again = stage.command(&["import", "-", "--import-id", &id, "--mode", mode]);
        tokio::task::spawn_blocking(|| piped(again, file().as_bytes())).await.unwrap().assert_code(0);
        assert!(stage.fake.state().committed == bytes.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_option_has_a_flag() {
    let stage = Stage::set(Fake::new()).await;
    let path = stage.dir.write("issues.csv", GOOD);
    let id = "0198c0de-0000-7000-8000-000000000001";
    #[rustfmt::skip]
    let args = [
        "import", &path, "--import-id", id, "--mode", "skip-invalid", "--on-existing", "update", "--validate-only",
        "--map", "Summary=title", "--map", "Notes=", "--separator", "tab", "--label-separator", "|",
        "--default-status", "in-progress", "--default-priority", "critical", "--default-assignee", "alice",
        "--ignore-unknown-columns", "--create-labels",
    ];
    stage.run(&args).await.assert_code(0);
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
    assert_eq!(stage.fake.state().options, [expected]);
    let twice = stage.run(&["import", &path, "--map", "a=title", "--map", "a=labels"]).await.assert_code(2);
    twice.assert_says("--map has the column \"a\" twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_that_the_stream_does_not_tell_are_asked_for() {
    let lines: Vec<String> = (0..1_500).map(|n| format!("{n:05}\n")).collect();
    let file = format!("title\n{}", lines.concat());
    let errors = (0..1_500).map(|n| fake_server::row_error(6 + 6 * n, n + 2));
    for (listed, expected) in [(1_500, 1_500), (1_200, 1_200), (0, 1_000)] {
        let fake = Fake::new().with_errors(errors.clone().collect(), 1_000, listed);
        let stage = Stage::set(fake).await;
        let (path, rejected) = (stage.dir.write("issues.csv", &file), stage.dir.text("rejected.csv"));
        let ran = stage.run(&["import", &path, "--mode", "skip-invalid", "--rejected", &rejected]).await.assert_code(1);
        let written = fs::read_to_string(&rejected).unwrap();
        assert!(written == format!("title\n{}", lines[..expected].concat()), "{expected}");
        ran.assert_says(&format!("rejected.csv has {expected} of 1500 rejected rows"));
        ran.assert_says("and 500 more");
        if expected < 1_500 {
            ran.assert_says("of the others it is not known where they are");
            ran.assert_says("of 1,500 errors the server tells the first 1,");
        }
        // The table's head, 1,000 errors, the count of the rest, the outcome.
        assert_eq!(ran.stdout.lines().count(), 1_003);
        let none = stage.run(&["import", &path, "--errors", "3"]).await;
        assert_eq!(none.stdout.lines().count(), 6, "{none:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_a_whole_file_or_none() {
    let pieces = || vec!["title\n".to_owned() + &rows(0..1_000), rows(1_000..2_000), rows(2_000..3_000)];
    let whole = pieces().concat();
    let cut = || Cut::Status(our_status(Code::Unavailable, "DATABASE_UNAVAILABLE"));
    let stage = Stage::set(Fake::new().with_export(pieces(), vec![cut(), cut()])).await;
    let path = stage.dir.text("issues.csv");
    let flags = ["--filter", "status = open", "--show-deleted", "--escape-formulas"];
    let ran = stage.run(&[&["export", &path], &flags[..]].concat()).await.assert_code(0);
    assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    assert_eq!(ran.stdout, "");
    ran.assert_says("3,000 issues, ");
    let expected =
        pb::ExportIssuesRequest { filter: "status = open".to_owned(), show_deleted: true, escape_formulas: true };
    assert!(stage.fake.state().export_requests.iter().all(|request| *request == expected));
    for args in [&["export"][..], &["export", "-"]] {
        assert_eq!(stage.run(args).await.assert_code(0).stdout, whole);
    }

    for cut in [cut(), Cut::Status(our_status(Code::Internal, "INTERNAL"))] {
        let stage = Stage::set(Fake::new().with_export(pieces(), vec![cut; 50])).await;
        let path = stage.dir.write("issues.csv", "before");
        stage.run(&["export", &path, "--retry-seconds", "1"]).await.assert_code(2);
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(stage.dir.names(), ["issues.csv"], "nothing is left beside it");
        let ran = stage.run(&["export"]).await.assert_code(2);
        assert!(ran.stdout.len() < whole.len() && whole.starts_with(&ran.stdout));
    }
    stage.run(&["export", "/nonexistent/issues.csv"]).await.assert_code(2).assert_says("cannot write");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_nobody_reads_on_ends_quietly() {
    let pieces = (0..200).map(|_| rows(0..10_000)).collect();
    let stage = Stage::set(Fake::new().with_export(pieces, vec![])).await;
    let mut child = stage.command(&["export"]).spawn().unwrap();
    let mut first = [0; 10];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let ran = tokio::task::spawn_blocking(|| Ran::of(child)).await.unwrap().assert_code(0);
    assert!(!ran.stderr.contains("issue-tracker:"), "{ran:#?}");
}
