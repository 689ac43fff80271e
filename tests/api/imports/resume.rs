//! Imports that are sent again: after an interruption, after they finished, and with other options.

use std::collections::HashMap;

use super::{
    interruptions::{Interruption, RawImport},
    *,
};
use crate::harness::error_metadata;

/// Sends the first `bytes` of the file, waits until the first batch of 5,000 rows is committed, and resets the stream.
async fn interrupt_after_first_batch(tracker: &Tracker, import: &Import, bytes: usize) {
    let mut raw = RawImport::open(tracker, import.options.clone()).await;
    raw.send(&chunk(0, &import.file[..bytes]));
    tracker.wait_until("SELECT count(*) > 0 FROM imports WHERE row_count = 5000").await;
    raw.interrupt_and_wait(Interruption::Reset(h2::Reason::CANCEL), tracker).await;
}

/// Returns a file of one batch, which is 5,000 rows with the external ids 1 to 5000, and then `rest`.
fn batch_and(header: &str, rest: &str) -> String {
    let columns = header.split(',').count();
    let row = |n: usize| format!("issue {n},{n}{}\n", ",".repeat(columns - 2));
    (1..=5_000).fold(format!("{header}\n"), |file, n| file + &row(n)) + rest
}

#[tokio::test]
async fn first_response_has_the_offset_to_resume_from() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).skip_invalid().id(Uuid::now_v7());
    let fresh = open(&tracker.member, import.options.clone()).await;
    assert_eq!((fresh.first.offset, fresh.first.row_count, fresh.first.committed_offset), (0, 0, 0));
    fresh.cancel();
    tracker.wait_until(import_locks!("= 0")).await;
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    let again = open(&tracker.member, import.options.clone()).await;

    let committed = titles(5_000).len() as i64 - 1;
    let first = &again.first;
    assert_eq!((first.offset, first.row_count, first.committed_offset), (committed, 5_000, committed));
    assert_eq!(first.import_id, import.options.import_id);
}

#[tokio::test]
async fn progress_has_the_committed_offset() {
    let tracker = Tracker::start().await;

    let skipping = import(titles(5_010)).skip_invalid().by(&tracker.member).await.unwrap();
    let atomic = import(titles(5_010)).by(&tracker.member).await.unwrap();

    assert!(skipping.progress.iter().all(|progress| progress.committed_offset == progress.offset), "{skipping:?}");
    assert_eq!(skipping.progress.last().unwrap().committed_offset, titles(5_010).len() as i64);
    assert!(atomic.progress.iter().all(|progress| progress.committed_offset == 0), "{atomic:?}");
}

#[tokio::test]
async fn resending_from_the_start_writes_no_row_twice() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 5_010, 5_010, 0, 0));
    assert_eq!(responses.summary.byte_count, titles(5_010).len() as i64);
    assert_eq!(tracker.count("SELECT count(DISTINCT title) FROM issues").await, 5_010);
    assert_eq!(issue_count(&tracker).await, 5_010);
}

#[tokio::test]
async fn gap_after_the_committed_offset_is_out_of_range_with_the_expected_offset() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;
    let committed = titles(5_000).len() as i64 - 1;

    let refused = send(&tracker.member, vec![options(import.options), chunk(committed + 1, "issue 5001\n")]).await;

    let status = assert_error(refused, Code::OutOfRange, "IMPORT_OFFSET_GAP");
    assert_eq!(error_metadata(&status, "expected_offset"), Some(committed.to_string()));
    assert_eq!(issue_count(&tracker).await, 5_000);
}

#[tokio::test]
async fn resumed_import_counts_rows_and_lines_from_the_start_of_the_file() {
    let tracker = Tracker::start().await;
    let mut file = "title,description\r\n".to_owned();
    file.extend((0..5_000).map(|n| format!("issue {n},\"two\r\nlines\"\r\n")));
    let offset = file.len() as i64 + 2;
    file += "\r\n,no title\r\nlast,\r\n";
    let import = import(&*file).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, file.len() - 2).await;

    let responses = resume(&tracker.member, &import).await.unwrap();

    let positions: Vec<_> =
        responses.errors.iter().map(|e| (e.row_number, e.line_number, e.byte_offset, &*e.code)).collect();
    assert_eq!(positions, [(5_001, 10_003, offset, "REQUIRED")]);
    assert_eq!(responses.counts(), (ImportState::Committed, 5_002, 5_001, 1, 1));
}

#[tokio::test]
async fn resumed_import_detects_duplicates_of_rows_before_the_interruption() {
    for on_existing in [OnExisting::Fail, OnExisting::Skip, OnExisting::Update] {
        let tracker = Tracker::start().await;
        // With SKIP and UPDATE, row 1 differs from an existing issue and row 2 equals one; the others are created.
        let seed = "title,external_id\nother title,1\nissue 2,2\n";
        let is_fail = on_existing == OnExisting::Fail;
        if !is_fail {
            import(seed).by(&tracker.member).await.unwrap();
        }
        let file = batch_and("title,external_id", "again,1\nagain,2\nagain,3\nnew,5001\n");
        let import = import(file).skip_invalid().id(Uuid::now_v7()).with(|o| o.on_existing = on_existing.into());
        interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

        let responses = resume(&tracker.member, &import).await.unwrap();

        let twice = "DUPLICATE_EXTERNAL_ID";
        assert_eq!(responses.codes(), [(5_001, twice), (5_002, twice), (5_003, twice)], "{on_existing:?}");
        let outcome = match on_existing {
            OnExisting::Update => (4_999, 1, 1, 3),
            OnExisting::Skip => (4_999, 0, 2, 3),
            _ => (5_001, 0, 0, 3),
        };
        assert_eq!(responses.outcome(), outcome, "{on_existing:?}");
        assert_eq!(issue_count(&tracker).await, 5_001, "{on_existing:?}");
        assert_eq!(tracker.count("SELECT count(*) FROM import_issues WHERE version IS NULL").await, 0);
    }
}

#[tokio::test]
async fn resumed_import_keeps_its_column_names() {
    let tracker = Tracker::start().await;
    let names =
        HashMap::from([("Key".to_owned(), "external_id".to_owned()), ("Summary".to_owned(), "title".to_owned())]);
    let file = batch_and("SUMMARY,key,Colour,status", "last,5001,red,closed\n");
    let import = import(file).skip_invalid().id(Uuid::now_v7()).with(|options| {
        options.column_names = names;
        options.ignore_unknown_columns = true;
    });
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    let responses = resume(&tracker.member, &import).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 5_001, 5_001, 0, 0));
    let last = tracker.sql("SELECT title, status FROM issues WHERE external_id = '5001'", &[]).await;
    assert_eq!((last[0].get::<_, &str>(0), last[0].get::<_, i16>(1)), ("last", 3));
}

#[tokio::test]
async fn interrupted_atomic_import_restarts_from_the_beginning() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    let again = open(&tracker.member, import.options.clone()).await;

    assert_eq!((again.first.offset, again.first.row_count, again.first.committed_offset), (0, 0, 0));
    again.send(chunk(0, import.file)).await;
    assert_eq!(again.finish().await.unwrap().counts(), (ImportState::Committed, 5_010, 5_010, 0, 0));
    assert_eq!(issue_count(&tracker).await, 5_010);
}

type Change = fn(&mut ImportOptions);

/// Returns, for each option, a change that makes it differ from a SKIP_INVALID [`import`], with the option's name.
fn other_options() -> Vec<(&'static str, Change)> {
    vec![
        ("mode", |options| options.mode = ImportMode::Atomic.into()),
        ("on_existing", |options| options.on_existing = OnExisting::Skip.into()),
        ("column_names", |options| options.column_names = HashMap::from([("title".into(), "title".into())])),
        ("separator", |options| options.separator = "\t".into()),
        ("label_separator", |options| options.label_separator = "|".into()),
        ("default_status", |options| options.default_status = IssueStatus::Closed.into()),
        ("default_priority", |options| options.default_priority = Priority::Low.into()),
        ("default_assignee", |options| options.default_assignee = "member".into()),
        ("ignore_unknown_columns", |options| options.ignore_unknown_columns = true),
        ("create_labels", |options| options.create_labels = true),
        ("total_bytes", |options| options.total_bytes += 1),
    ]
}

#[tokio::test]
async fn interrupted_import_resumes_only_with_its_options_and_user() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    for (name, change) in other_options() {
        let other = import.clone().with(change).by(&tracker.member).await;
        let status = assert_error(other, Code::FailedPrecondition, "IMPORT_MISMATCH");
        assert!(status.message().contains("other options"), "{name}: {status:?}");
    }
    let other_user = import.clone().by(&tracker.admin).await;
    assert_error(other_user, Code::FailedPrecondition, "IMPORT_MISMATCH");

    assert_eq!(issue_count(&tracker).await, 5_000);
    // Explicit defaults equal unset options.
    let same = import.with(|options| {
        options.on_existing = OnExisting::Fail.into();
        options.separator = ",".into();
        options.label_separator = ";".into();
        options.default_status = IssueStatus::Open.into();
        options.total_bytes = 0;
    });
    assert_eq!(resume(&tracker.member, &same).await.unwrap().counts(), (ImportState::Committed, 5_010, 5_010, 0, 0));
}

#[tokio::test]
async fn finished_import_returns_its_summary_only_for_its_options() {
    let tracker = Tracker::start().await;
    let import = import("title\na\n").skip_invalid().id(Uuid::now_v7());
    import.clone().by(&tracker.member).await.unwrap();

    for (name, change) in other_options() {
        let other = import.clone().with(change).by(&tracker.member).await;
        assert_error(other, Code::FailedPrecondition, "IMPORT_MISMATCH");
        assert_eq!(issue_count(&tracker).await, 1, "{name}");
    }
}

#[tokio::test]
async fn total_bytes_may_be_set_when_resuming() {
    let tracker = Tracker::start().await;
    let import = import(titles(5_010)).skip_invalid().id(Uuid::now_v7());
    let unsized_import = import.clone().with(|options| options.total_bytes = 0);
    interrupt_after_first_batch(&tracker, &unsized_import, import.file.len() - 3).await;

    let truncated = send(&tracker.member, vec![options(import.options.clone())]).await;

    assert_error(truncated, Code::InvalidArgument, "IMPORT_TRUNCATED");
    let other_size = import.clone().with(|options| options.total_bytes += 1).by(&tracker.member).await;
    assert_error(other_size, Code::FailedPrecondition, "IMPORT_MISMATCH");
    assert_eq!(resume(&tracker.member, &unsized_import).await.unwrap().counts().1, 5_010);
}

#[tokio::test]
async fn dry_run_of_the_rest_has_its_responses_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let import = import(batch_and("title,external_id", "again,1\nnew,5001\n")).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;
    let before = tracker.contents().await;

    let dry_run = resume(&tracker.member, &import.clone().validate_only()).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    let real = resume(&tracker.member, &import).await.unwrap();
    assert_eq!(dry_run.summary.state(), ImportState::Validated);
    assert_eq!(real.codes(), [(5_001, "DUPLICATE_EXTERNAL_ID")]);
    let dry_run = dry_run.normalized_to(&real);
    assert_eq!((&dry_run.errors, &dry_run.summary), (&real.errors, &real.summary));
    assert_eq!(dry_run.progress.last(), real.progress.last());
}

#[tokio::test]
async fn limit_of_1000_sent_errors_includes_those_before_the_interruption() {
    let tracker = Tracker::start().await;
    let mut file = "title,status\n".to_owned();
    file.extend((0..5_000).map(|n| format!("issue {n},{}\n", if n < 900 { "opne" } else { "" })));
    file += &"x,opne\n".repeat(200);
    let import = import(file).skip_invalid().id(Uuid::now_v7());
    interrupt_after_first_batch(&tracker, &import, import.file.len() - 3).await;

    let responses = resume(&tracker.member, &import).await.unwrap();

    assert_eq!(responses.errors.len(), 100);
    assert_eq!(responses.counts(), (ImportState::Committed, 5_200, 4_100, 1_100, 1_100));
    let stored = stored_errors(&tracker.member, &import.options.import_id).await;
    assert_eq!(stored.len(), 1_100);
    assert!(stored.is_sorted_by_key(|error| error.row_number));
}
