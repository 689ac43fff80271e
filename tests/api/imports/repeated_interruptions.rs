//! Imports of large files with every kind of row: interrupted repeatedly, as a dry run, and concurrently.

use super::{
    interruptions::{INTERRUPTIONS, RawImport},
    *,
};
use crate::harness::{eventually, limits};

const ROWS: usize = 20_000;

/// A linear congruential generator (Knuth's MMIX), deterministic for a given seed.
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// Returns a file with valid and invalid rows, labels, duplicate external ids, quoted line breaks and blank lines.
pub(super) fn mixed_file(seed: u64, rows: usize) -> String {
    let mut random = Random(seed);
    let mut file =
        "title,description,status,priority,assignee,labels,external_id,create_time,close_time\r\n".to_owned();
    for row in 0..rows {
        let status = ["open", "closed", "in_progress", ""][random.below(4)];
        let status = if random.below(10) < 4 { "closed" } else { status };
        let status = if random.below(40) == 0 { "opne" } else { status };
        let priority = ["low", "HIGH", "", "critical"][random.below(4)];
        let assignee = ["member", "Viewer", "", "", if random.below(9) == 0 { "absent" } else { "" }][random.below(5)];
        let labels =
            ["bug", "ui;bug", "", "Docs; ui ;UI", if random.below(9) == 0 { "none" } else { "" }][random.below(5)];
        let title = if random.below(50) == 0 { "" } else { &*format!("issue {row}") };
        let description = match random.below(6) {
            0 => "\"two\r\nlines, \"\"quoted\"\"\"".to_owned(),
            1 => format!("\"é{}\n\n{row}\"", "x".repeat(random.below(40))),
            _ => String::new(),
        };
        // Duplicates, both within 12 rows and anywhere before.
        let key = match random.below(30) {
            0 => format!("K-{}", row.saturating_sub(random.below(12))),
            1 => format!("K-{}", random.below(row + 1)),
            2 => String::new(),
            _ => format!("K-{row}"),
        };
        let year = 2000 + random.below(20);
        let create_time = if random.below(9) == 0 { String::new() } else { format!("{year}-02-03T04:05:06Z") };
        let closed = !create_time.is_empty() && random.below(3) == 0;
        let close_time = if closed { format!("{}-01-01T00:00:00Z", year + 1) } else { String::new() };
        let end =
            ["\r\n", "\n", "\r\n\r\n", ",one too many\n"][if random.below(30) == 0 { 3 } else { random.below(3) }];
        file += &format!(
            "{title},{description},{status},{priority},{assignee},{labels},{key},{create_time},{close_time}{end}"
        );
    }
    file
}

pub(super) async fn start_with_labels() -> Tracker {
    let tracker = Tracker::start().await;
    for name in ["bug", "ui", "docs"] {
        tracker.member.label(name).await;
    }
    tracker
}

/// Waits until the interruption is recorded and returns the committed offset, or none if the import has no record.
async fn committed_offset(tracker: &Tracker, import: &Import) -> Option<usize> {
    let mut record = None;
    eventually("the interruption is recorded", async || {
        match get_import(&tracker.member, &import.options.import_id).await {
            Ok(import) => record = Some(import),
            Err(status) => assert_eq!(status.code(), Code::NotFound),
        }
        record.as_ref().is_none_or(|record| record.state() != ImportState::Running)
    })
    .await;
    let record = record?;
    assert_eq!(record.state(), ImportState::Interrupted);
    Some(record.committed_offset as usize)
}

/// Sends the import with interruptions at 200 offsets, and then the rest.
async fn import_with_interruptions(tracker: &Tracker, import: &Import) -> Responses {
    let mut random = Random(7);
    let mut ends: Vec<usize> = (0..200).map(|_| random.below(import.file.len())).collect();
    ends.sort_unstable();
    let mut committed = 0;
    let mut resumed = 0;
    for (nth, end) in ends.into_iter().enumerate() {
        let mut raw = RawImport::open(tracker, import.options.clone()).await;
        if committed < end {
            raw.send(&chunk(committed as i64, &import.file[committed..end]));
        }
        // Interrupts some streams at once, some after up to 60 ms, and some after a batch is written.
        if end.saturating_sub(committed) > import.file.len() / ROWS * 6_000 {
            eventually("a batch is committed", async || {
                let record = get_import(&tracker.member, &import.options.import_id).await;
                record.is_ok_and(|record| record.committed_offset as usize != committed)
            })
            .await;
        } else if nth % 3 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(random.below(60) as u64)).await;
        }
        raw.interrupt_and_wait(INTERRUPTIONS[nth % INTERRUPTIONS.len()], tracker).await;
        let Some(now) = committed_offset(tracker, import).await else {
            assert_eq!(committed, 0, "only the first streams can be interrupted before the import has a record");
            continue;
        };
        assert!((committed..=end.max(committed)).contains(&now), "{committed} {now} {end}");
        resumed += usize::from(now > committed);
        committed = now;
    }
    assert!(resumed > 1, "the import is resumed after more than one batch");
    resume(&tracker.member, import).await.unwrap()
}

async fn assert_same_result(clean: (&Tracker, Responses), interrupted: (&Tracker, Responses), id: &str) {
    assert_eq!(clean.1.summary, interrupted.1.summary);
    assert!(clean.1.summary.rejected_count > 500, "{:?}", clean.1.summary);
    assert_eq!(stored_errors(&interrupted.0.member, id).await, stored_errors(&clean.0.member, id).await);
    let (clean_rows, interrupted_rows) = (issue_rows(clean.0).await, issue_rows(interrupted.0).await);
    assert_eq!(clean_rows.len(), interrupted_rows.len());
    for (clean_row, interrupted_row) in clean_rows.iter().zip(&interrupted_rows) {
        assert_eq!(clean_row, interrupted_row);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn import_interrupted_200_times_has_the_result_of_an_uninterrupted_one() {
    let (clean, interrupted) = tokio::join!(start_with_labels(), start_with_labels());
    let import = import(mixed_file(1, ROWS)).skip_invalid().id(Uuid::now_v7());

    let whole = import.clone().by(&clean.member).await.unwrap();
    let responses = import_with_interruptions(&interrupted, &import).await;

    assert_eq!(whole.summary.row_count, ROWS as i64);
    assert_same_result((&clean, whole), (&interrupted, responses), &import.options.import_id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn update_interrupted_200_times_has_the_result_of_an_uninterrupted_one() {
    let (clean, interrupted) = tokio::join!(start_with_labels(), start_with_labels());
    for tracker in [&clean, &interrupted] {
        let seed = import(mixed_file(2, ROWS / 2)).skip_invalid();
        seed.by(&tracker.member).await.unwrap();
    }
    let import = import(mixed_file(3, ROWS)).skip_invalid().update().id(Uuid::now_v7());

    let whole = import.clone().by(&clean.member).await.unwrap();
    let responses = import_with_interruptions(&interrupted, &import).await;

    assert!(whole.summary.updated_count > 1_000 && whole.summary.created_count > 1_000, "{:?}", whole.summary);
    assert_same_result((&clean, whole), (&interrupted, responses), &import.options.import_id).await;
    // Reverting restores equal issues on both.
    for tracker in [&clean, &interrupted] {
        revert(&tracker.member, &import.options.import_id, false).await.unwrap();
    }
    assert_eq!(issue_rows(&clean).await, issue_rows(&interrupted).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn dry_run_of_a_mixed_file_has_the_responses_of_the_import() {
    let tracker = start_with_labels().await;
    import(mixed_file(2, 3_000)).skip_invalid().by(&tracker.member).await.unwrap();
    for on_existing in [OnExisting::Fail, OnExisting::Skip, OnExisting::Update] {
        let import = import(mixed_file(3, 12_000)).skip_invalid().with(|options| {
            options.on_existing = on_existing.into();
            options.create_labels = true;
        });
        let before = tracker.contents().await;
        let dry_run = import.clone().validate_only().by(&tracker.member).await.unwrap();
        assert_eq!(tracker.contents().await, before);

        let real = import.by(&tracker.member).await.unwrap();

        assert_eq!(dry_run.summary.state(), ImportState::Validated);
        revert(&tracker.member, &real.summary.import_id, false).await.unwrap();
        assert_eq!(real.errors.len(), 1_000, "{on_existing:?}");
        let dry_run = dry_run.normalized_to(&real).without_intermediate_progress();
        assert_eq!(dry_run, real.without_intermediate_progress(), "{on_existing:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_concurrent_imports_with_shared_labels_all_commit() {
    let tracker = Tracker::start_with(limits(&["--imports", "10", "--pool-connections", "14"])).await;
    let import_of = |nth: usize| {
        let rows = (0..6_000).map(|n| format!("import {nth} issue {n},{nth}-{n},l{};l{}\n", n % 7, (n + nth) % 11));
        let file = rows.fold("title,external_id,labels\n".to_owned(), |file, row| file + &row);
        let import = import(file).id(Uuid::now_v7()).skip_invalid();
        import.with(|options| options.create_labels = true)
    };
    // More than the share of one user.
    let user = |nth: usize| if nth.is_multiple_of(2) { &tracker.member } else { &tracker.admin };
    let imports = (0..10).map(|nth| import_of(nth).spawn_by(user(nth)));
    for import in imports.collect::<Vec<_>>() {
        let responses = import.await.unwrap().unwrap();
        assert_eq!(responses.counts(), (ImportState::Committed, 6_000, 6_000, 0, 0));
    }
    assert_eq!(issue_count(&tracker).await, 60_000);
    assert_eq!(tracker.count("SELECT count(DISTINCT external_id) FROM issues").await, 60_000);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 11);
    let count_issue_labels = "SELECT count(*) FROM issue_labels";
    let expected: usize =
        (0..10).map(|nth| (0..6_000).map(|n| if n % 7 == (n + nth) % 11 { 1 } else { 2 }).sum::<usize>()).sum();
    assert_eq!(tracker.count(count_issue_labels).await, expected as i64);
}
