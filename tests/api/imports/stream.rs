//! The protocol of the import stream, import ids, limits and timeouts.

use std::time::Duration;

use super::*;
use crate::{
    h2_client::{H2Client, framed},
    harness::{self, assert_invalid, assert_retriable, error_metadata, eventually, limits},
    lock_waiters,
};

const MIB: usize = 1024 * 1024;

/// Returns the options of an ATOMIC import with a new import id.
fn atomic() -> ImportOptions {
    ImportOptions { import_id: Uuid::now_v7().to_string(), ..Default::default() }
}

/// Asserts that there is no issue and no finished import. Records of unfinished imports are allowed.
async fn assert_nothing_written(tracker: &Tracker) {
    assert_eq!(issue_count(tracker).await, 0);
    assert_eq!(tracker.count("SELECT count(*) FROM imports WHERE finish_time IS NOT NULL").await, 0);
}

#[tokio::test]
async fn options_are_required_once_and_first() {
    let tracker = Tracker::start().await;
    let file = || chunk(0, "title\na\n");
    let streams = [
        vec![],
        vec![file()],
        vec![options(atomic()), options(atomic())],
        vec![options(atomic()), file(), options(atomic())],
    ];
    for messages in streams {
        assert_invalid(send(&tracker.member, messages).await, &["options"]);
    }
    assert_invalid(send(&tracker.member, vec![options(atomic()), ImportIssuesRequest::default()]).await, &["message"]);
    assert_nothing_written(&tracker).await;
}

#[tokio::test]
async fn all_violations_of_the_options_are_reported() {
    let tracker = Tracker::start().await;
    let bad = ImportOptions { import_id: "42".to_owned(), mode: 9, total_bytes: -1, ..Default::default() };

    let refused = send(&tracker.member, vec![options(bad), chunk(0, "title\na\n")]).await;

    assert_invalid(refused, &["options.import_id", "options.mode", "options.total_bytes"]);
    assert_nothing_written(&tracker).await;
}

#[tokio::test]
async fn gap_between_chunks_is_out_of_range_with_the_expected_offset() {
    let tracker = Tracker::start().await;
    for mode in [ImportMode::Atomic, ImportMode::SkipInvalid] {
        let opts = ImportOptions { mode: mode.into(), ..atomic() };

        let refused = send(&tracker.member, vec![options(opts), chunk(0, "title\na\n"), chunk(9, "b\n")]).await;

        let status = assert_error(refused, Code::OutOfRange, "IMPORT_OFFSET_GAP");
        assert_eq!(error_metadata(&status, "expected_offset").as_deref(), Some("8"));
        assert_nothing_written(&tracker).await;
    }
}

#[tokio::test]
async fn bytes_received_before_are_ignored() {
    let tracker = Tracker::start().await;
    // A repeated chunk, an overlapping one, and a different one within received bytes: the bytes received first win.
    let messages = vec![
        options(atomic()),
        chunk(0, "title\na\n"),
        chunk(0, "title\na\n"),
        chunk(6, "a\nb\n"),
        chunk(2, "XXX"),
        chunk(10, ""),
        chunk(8, "c\nd\n"),
    ];

    let responses = send(&tracker.member, messages).await.unwrap();

    assert_eq!(responses.summary.byte_count, 12);
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["a", "b", "d"]);
}

#[tokio::test]
async fn chunk_has_at_most_1_mib() {
    let tracker = Tracker::start().await;
    let file = |bytes: usize| {
        let mut file = b"title\na\n".to_vec();
        file.resize(bytes, b'\n');
        file
    };

    let over = send(&tracker.member, vec![options(atomic()), chunk(0, file(MIB + 1))]).await;
    assert_invalid(over, &["chunk.data"]);
    let far_over = send(&tracker.member, vec![options(atomic()), chunk(0, file(5 * MIB))]).await;
    assert_invalid(far_over, &["request"]);
    assert_nothing_written(&tracker).await;

    let fits = send(&tracker.member, vec![options(atomic()), chunk(0, file(MIB))]).await.unwrap();
    assert_eq!(fits.counts(), (ImportState::Committed, 1, 1, 0, 0));
}

#[tokio::test]
async fn negative_offset_is_invalid() {
    let tracker = Tracker::start().await;

    let refused = send(&tracker.member, vec![options(atomic()), chunk(-1, "title\na\n")]).await;

    assert_invalid(refused, &["chunk.offset"]);
    assert_nothing_written(&tracker).await;
}

#[tokio::test]
async fn stream_that_does_not_end_at_total_bytes_fails_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let file = "title\na\nb\n";
    for (mode, total_bytes) in [
        (ImportMode::Atomic, 11),
        (ImportMode::Atomic, 9),
        (ImportMode::SkipInvalid, 1_000),
        (ImportMode::SkipInvalid, 1),
    ] {
        let opts = ImportOptions { mode: mode.into(), total_bytes, ..atomic() };

        let refused = send(&tracker.member, vec![options(opts), chunk(0, file)]).await;

        let status = assert_error(refused, Code::InvalidArgument, "IMPORT_TRUNCATED");
        assert!(status.message().contains("10 of"), "{status:?}");
        assert_nothing_written(&tracker).await;
    }
}

#[tokio::test]
async fn resent_finished_import_returns_its_summary_and_writes_nothing() {
    let tracker = Tracker::start().await;
    for import in [
        import("title,status\na,open\n").id(Uuid::now_v7()),
        import("title,status\na,open\nb,opne\n").skip_invalid().id(Uuid::now_v7()),
    ] {
        let first = import.clone().by(&tracker.member).await.unwrap();
        let count = issue_count(&tracker).await;

        let again = import.clone().by(&tracker.member).await.unwrap();
        let only_options = send(&tracker.member, vec![options(import.options.clone())]).await.unwrap();
        let dry_run = import.validate_only().by(&tracker.member).await.unwrap();

        for response in [again, only_options, dry_run] {
            assert_eq!(response.summary, first.summary);
        }
        assert_eq!(issue_count(&tracker).await, count);
    }
}

#[tokio::test]
async fn finished_import_returns_its_summary_while_the_client_still_sends() {
    let tracker = Tracker::start().await;
    // Larger than the flow-control window of the stream.
    let file = "title,description\n".to_owned() + &format!("a,{}\n", "x".repeat(60_000)).repeat(300);
    let import = import(file).id(Uuid::now_v7());
    let first = import.clone().by(&tracker.member).await.unwrap();

    let again = import.by(&tracker.member).await.unwrap();

    assert_eq!(again.summary, first.summary);
    assert_eq!(issue_count(&tracker).await, 300);
}

#[tokio::test]
async fn last_batch_and_finish_time_are_committed_together() {
    let tracker = Tracker::start().await;
    import(titles(3)).skip_invalid().by(&tracker.member).await.unwrap();

    // Both columns default to the start of the transaction.
    let together = "SELECT finish_time = (SELECT max(create_time) FROM issues) FROM imports";
    assert!(tracker.sql(together, &[]).await[0].get::<_, bool>(0));
}

#[tokio::test]
async fn import_id_of_a_file_with_another_size_is_a_mismatch() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    import("title\na\n").id(id).by(&tracker.member).await.unwrap();

    let other_file = import("title\na\nb\n").id(id).by(&tracker.member).await;

    assert_error(other_file, Code::FailedPrecondition, "IMPORT_MISMATCH");
    assert_eq!(issue_count(&tracker).await, 1);
}

#[tokio::test]
async fn import_id_of_another_user_or_mode_is_a_mismatch() {
    let tracker = Tracker::start().await;
    let import = import("title\na\n").id(Uuid::now_v7());
    import.clone().by(&tracker.member).await.unwrap();

    let other_user = import.clone().by(&tracker.admin).await;
    let other_mode = import.skip_invalid().by(&tracker.member).await;

    assert_error(other_user, Code::FailedPrecondition, "IMPORT_MISMATCH");
    assert_error(other_mode, Code::FailedPrecondition, "IMPORT_MISMATCH");
    assert_eq!(issue_count(&tracker).await, 1);
}

#[tokio::test]
async fn second_stream_for_a_running_import_is_aborted() {
    let tracker = Tracker::start().await;
    let opts = atomic();
    let first = open(&tracker.member, opts.clone()).await;
    first.send(chunk(0, "title\na\n")).await;

    let second = send(&tracker.member, vec![options(opts), chunk(0, "title\nb\n")]).await;

    assert_error(second, Code::Aborted, "IMPORT_RUNNING");
    let first = first.finish().await.unwrap();
    assert_eq!(first.counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test]
async fn imports_beyond_the_limit_fail_until_one_ends() {
    let tracker = Tracker::start_with(limits(&["--imports", "1"])).await;
    let first = open(&tracker.member, atomic()).await;
    first.send(chunk(0, "title\na\n")).await;

    let second = import("title\nb\n").by(&tracker.member).await;

    assert_retriable(second, Code::ResourceExhausted, "OVERLOADED");
    first.finish().await.unwrap();
    eventually("the permit of the first import is free", async || {
        import("title\nb\n").by(&tracker.member).await.is_ok()
    })
    .await;
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["a", "b"]);
}

/// Runs the import while another transaction holds the external id `X-1`, and commits that transaction once the import
/// is blocked on it.
async fn import_into_conflict(tracker: &Tracker, import: Import) -> Result<Responses, Status> {
    let other = hold_external_id(tracker).await;
    let import = import.spawn_by(&tracker.member);
    tracker.wait_until(lock_waiters!("> 0")).await;
    other.batch_execute("COMMIT").await.unwrap();
    import.await.unwrap()
}

#[tokio::test]
async fn external_id_taken_concurrently_is_a_row_error() {
    let file = "title,external_id\na,1\nours,X-1\nb,2\n";
    let cases = [
        (import(file).skip_invalid(), (ImportState::Committed, 3, 2, 1, 1), &["a", "b", "theirs"][..]),
        (import(file), (ImportState::Rejected, 3, 0, 1, 1), &["theirs"]),
        (import(file).validate_only(), (ImportState::Rejected, 3, 0, 1, 1), &["theirs"]),
        (import(file).skip_invalid().validate_only(), (ImportState::Validated, 3, 2, 1, 1), &["theirs"]),
    ];
    for (import, counts, titles) in cases {
        let tracker = Tracker::start().await;

        let responses = import_into_conflict(&tracker, import).await.unwrap();

        assert_eq!(responses.codes(), [(2, "EXTERNAL_ID_TAKEN")]);
        assert_eq!(responses.counts(), counts);
        assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), titles);
    }
}

#[tokio::test]
async fn create_issue_waits_for_an_import_that_is_writing_the_same_external_id() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "600000"])).await;
    // The second batch is blocked by this.
    let other = hold_external_id(&tracker).await;
    let mut file = "title,external_id\nours,X-2\n".to_owned();
    file.extend((0..5_000).map(|n| format!("issue {n},{n}\n")));
    file += "ours,X-1\n";
    let import = import(file).spawn_by(&tracker.member);
    tracker.wait_until(lock_waiters!("= 1")).await;
    let created = tokio::spawn({
        let mut issues = tracker.member.issues();
        let issue = Issue { title: "theirs".to_owned(), external_id: "X-2".to_owned(), ..Default::default() };
        let request = issue_tracker::pb::CreateIssueRequest { issue: Some(issue), ..Default::default() };
        async move { issues.create_issue(request).await }
    });
    tracker.wait_until(lock_waiters!("= 2")).await;

    other.batch_execute("ROLLBACK").await.unwrap();

    assert_eq!(import.await.unwrap().unwrap().counts(), (ImportState::Committed, 5_002, 5_002, 0, 0));
    assert_error(created.await.unwrap(), Code::AlreadyExists, "ALREADY_EXISTS");
}

#[tokio::test]
async fn import_interrupted_by_a_shutdown_resumes_on_a_replica() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "60"])).await;
    let import = import(titles(12_000)).skip_invalid().id(Uuid::now_v7());
    let mut first = open(&tracker.member, import.options.clone()).await;
    first.send(chunk(0, &import.file[..80_000])).await;
    let Some(Message::Progress(progress)) = first.responses.message().await.unwrap().unwrap().message else { panic!() };
    assert!(progress.committed_offset > 0);

    tracker.stop();

    assert_error(first.finish().await, Code::Unavailable, "STOPPING");
    let replica = tracker.start_replica().await;
    let record = get_import(&replica.member, &import.options.import_id).await.unwrap();
    assert!(record.committed_offset >= progress.committed_offset);
    let responses = resume(&replica.member, &import).await.unwrap();
    assert_eq!(responses.counts(), (ImportState::Committed, 12_000, 12_000, 0, 0));
    assert_eq!(issue_count(&replica).await, 12_000);
    tracker.wait_until_stopped().await;
}

/// Advances the clock, and leaves the import time to wait again or to time out.
async fn advance_clock(time: Duration) {
    harness::advance_clock(time).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn import_that_receives_nothing_for_60_s_times_out_and_can_be_resumed() {
    let tracker = Tracker::start_with(limits(&["--imports", "1"])).await;
    let import = import("title\na\nb\n").id(Uuid::now_v7());
    let open = open(&tracker.member, import.options.clone()).await;
    open.send(chunk(0, "title\na\n")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;

    advance_clock(Duration::from_secs(50)).await;
    tracker.wait_until(import_locks!("= 1")).await;
    advance_clock(Duration::from_secs(11)).await;

    let status = assert_error(read(open.responses).await, Code::DeadlineExceeded, "IMPORT_IDLE");
    assert!(status.message().contains("no message received for 60 s"), "{status:?}");
    // The only import permit is free again.
    assert_eq!(import.by(&tracker.member).await.unwrap().counts(), (ImportState::Committed, 2, 2, 0, 0));
}

#[tokio::test]
async fn import_below_the_minimum_throughput_times_out() {
    // The last are blank lines, 850 B/s of them.
    for data in ["", "x", &"\n".repeat(50 * 1024)] {
        let tracker = Tracker::start_with(limits(&["--imports", "1"])).await;
        let import = import("title\na\nb\n").id(Uuid::now_v7());
        let open = open(&tracker.member, import.options.clone()).await;
        open.send(chunk(0, "title\n")).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        for minute in 0..10 {
            advance_clock(Duration::from_secs(59)).await;
            open.send(chunk(6 + minute * data.len() as i64, data)).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        tracker.wait_until(import_locks!("= 1")).await;

        advance_clock(Duration::from_secs(11)).await;

        let status = assert_error(read(open.responses).await, Code::DeadlineExceeded, "IMPORT_IDLE");
        assert!(status.message().contains("fewer than 600 KiB received in 600 s"), "{status:?}");
        assert_eq!(import.by(&tracker.member).await.unwrap().counts(), (ImportState::Committed, 2, 2, 0, 0));
    }
}

#[tokio::test]
async fn import_at_the_minimum_throughput_succeeds() {
    let tracker = Tracker::start().await;
    let opts = ImportOptions { mode: ImportMode::SkipInvalid.into(), ..atomic() };
    let open = open(&tracker.member, opts).await;
    open.send(chunk(0, "title\n")).await;
    let row = format!("{}\n", "x".repeat(64 * 1024 - 1));
    for minute in 0..12 {
        advance_clock(Duration::from_secs(59)).await;
        open.send(chunk(6 + (minute * row.len()) as i64, &*row)).await;
    }

    let responses = open.finish().await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 12, 0, 12, 12));
}

#[tokio::test]
async fn import_beyond_its_maximum_duration_ends_and_can_be_resumed() {
    let tracker = Tracker::start_with(limits(&["--import-seconds", "40"])).await;
    let import = import(titles(12_000)).skip_invalid().id(Uuid::now_v7());
    let mut open = open(&tracker.member, import.options.clone()).await;
    open.send(chunk(0, &import.file[..80_000])).await;
    let Some(Message::Progress(progress)) = open.responses.message().await.unwrap().unwrap().message else { panic!() };
    advance_clock(Duration::from_secs(20)).await;
    open.send(chunk(80_000, "")).await;
    tracker.wait_until(import_locks!("= 1")).await;

    advance_clock(Duration::from_secs(20)).await;

    let status = assert_error(read(open.responses).await, Code::DeadlineExceeded, "IMPORT_TIMEOUT");
    assert!(status.message().contains("40 s"), "{status:?}");
    tracker.wait_until(import_locks!("= 0")).await;
    let record = get_import(&tracker.member, &import.options.import_id).await.unwrap();
    assert_eq!((record.state(), record.committed_offset), (ImportState::Interrupted, progress.committed_offset));
    let responses = resume(&tracker.member, &import).await.unwrap();
    assert_eq!(responses.counts(), (ImportState::Committed, 12_000, 12_000, 0, 0));
    assert_eq!(issue_count(&tracker).await, 12_000);
}

#[tokio::test]
async fn import_with_unread_responses_ends_after_60_s_or_a_reset() {
    let tracker = Tracker::start().await;
    for resets in [false, true] {
        let mut raw = H2Client::open_with(&tracker, 0).await.unwrap();
        let (_response, mut stream) = raw.begin(&tracker, "ImportService/ImportIssues").await.unwrap();
        let opts = ImportOptions { mode: ImportMode::SkipInvalid.into(), ..atomic() };
        stream.send_data(framed(&options(opts)), false).unwrap();
        // More errors than the server buffers.
        stream.send_data(framed(&chunk(0, "title,status\n".to_owned() + &"x,opne\n".repeat(6_000))), false).unwrap();
        let is_written = "SELECT count(*) > 0 FROM imports WHERE row_count = 5000";
        tracker.wait_until(is_written).await;
        tokio::time::sleep(Duration::from_millis(100)).await;

        match resets {
            true => stream.send_reset(h2::Reason::CANCEL),
            false => {
                advance_clock(Duration::from_secs(55)).await;
                tracker.wait_until(import_locks!("= 1")).await;
                advance_clock(Duration::from_secs(6)).await;
            }
        }

        tracker.wait_until_no_locks().await;
        tracker.sql("TRUNCATE imports", &[]).await;
    }
}
