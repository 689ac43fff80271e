//! Everything at once: an import that is cut again and again comes to the same end as one that is not.

use super::{
    interruptions::{CUTS, RawImport},
    *,
};
use crate::harness::{eventually, limits};

const ROWS: usize = 20_000;

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// A file with everything in it: bad rows of every kind, labels, external ids twice, quotes with line ends, blank lines.
fn storm_file(seed: u64, rows: usize) -> String {
    let mut numbers = Numbers(seed);
    let mut file =
        "title,description,status,priority,assignee,labels,external_id,create_time,close_time\r\n".to_owned();
    for row in 0..rows {
        let status = ["open", "closed", "in_progress", ""][numbers.below(4)];
        let status = if numbers.below(10) < 4 { "closed" } else { status };
        let status = if numbers.below(40) == 0 { "opne" } else { status };
        let priority = ["low", "HIGH", "", "critical"][numbers.below(4)];
        let assignee =
            ["member", "Viewer", "", "", if numbers.below(9) == 0 { "nobody" } else { "" }][numbers.below(5)];
        let labels =
            ["bug", "ui;bug", "", "Docs; ui ;UI", if numbers.below(9) == 0 { "none" } else { "" }][numbers.below(5)];
        let title = if numbers.below(50) == 0 { "" } else { &*format!("issue {row}") };
        let description = match numbers.below(6) {
            0 => "\"two\r\nlines, \"\"quoted\"\"\"".to_owned(),
            1 => format!("\"é{}\n\n{row}\"", "x".repeat(numbers.below(40))),
            _ => String::new(),
        };
        // Many twice, near and far.
        let key = match numbers.below(30) {
            0 => format!("K-{}", row.saturating_sub(numbers.below(12))),
            1 => format!("K-{}", numbers.below(row + 1)),
            2 => String::new(),
            _ => format!("K-{row}"),
        };
        let year = 2000 + numbers.below(20);
        let create_time = if numbers.below(9) == 0 { String::new() } else { format!("{year}-02-03T04:05:06Z") };
        let closed = !create_time.is_empty() && numbers.below(3) == 0;
        let close_time = if closed { format!("{}-01-01T00:00:00Z", year + 1) } else { String::new() };
        let end =
            ["\r\n", "\n", "\r\n\r\n", ",one too many\n"][if numbers.below(30) == 0 { 3 } else { numbers.below(3) }];
        file += &format!(
            "{title},{description},{status},{priority},{assignee},{labels},{key},{create_time},{close_time}{end}"
        );
    }
    file
}

async fn start_with_labels() -> Tracker {
    let tracker = Tracker::start().await;
    for name in ["bug", "ui", "docs"] {
        tracker.member.label(name).await;
    }
    tracker
}

/// Where an import goes on that was cut a moment ago; none if it has not begun.
async fn interrupted_at(tracker: &Tracker, import: &Import) -> Option<usize> {
    let mut told = None;
    eventually("the server has seen the cut", async || {
        match get_import(&tracker.member, &import.options.import_id).await {
            Ok(import) => told = Some(import),
            Err(status) => assert_eq!(status.code(), Code::NotFound),
        }
        told.as_ref().is_none_or(|told| told.state() != ImportState::Running)
    })
    .await;
    let told = told?;
    assert_eq!(told.state(), ImportState::Interrupted);
    Some(told.committed_offset as usize)
}

/// Sends the import in pieces, each of which breaks off at one of 200 places, and then the rest.
async fn import_with_cuts(tracker: &Tracker, import: &Import) -> Answer {
    let mut numbers = Numbers(7);
    let mut cuts: Vec<usize> = (0..200).map(|_| numbers.below(import.file.len())).collect();
    cuts.sort_unstable();
    let mut committed = 0;
    let mut resumed = 0;
    for (nth, cut) in cuts.into_iter().enumerate() {
        let mut raw = RawImport::open(tracker, import.options.clone()).await;
        if committed < cut {
            raw.send(&chunk(committed as i64, &import.file[committed..cut]));
        }
        // Some are cut at once, some when the server has read something, some when it has written a batch.
        if cut.saturating_sub(committed) > import.file.len() / ROWS * 6_000 {
            eventually("a batch is in", async || {
                let told = get_import(&tracker.member, &import.options.import_id).await;
                told.is_ok_and(|told| told.committed_offset as usize != committed)
            })
            .await;
        } else if nth % 3 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(numbers.below(60) as u64)).await;
        }
        raw.cut(CUTS[nth % CUTS.len()], tracker).await;
        let Some(now) = interrupted_at(tracker, import).await else {
            assert_eq!(committed, 0, "only the first can be cut before they begin");
            continue;
        };
        assert!((committed..=cut.max(committed)).contains(&now), "{committed} {now} {cut}");
        resumed += usize::from(now > committed);
        committed = now;
    }
    assert!(resumed > 1, "the cuts are between batches");
    go_on(&tracker.member, import).await.unwrap()
}

async fn assert_same_end(clean: (&Tracker, Answer), cut: (&Tracker, Answer), id: &str) {
    assert_eq!(clean.1.summary, cut.1.summary);
    assert!(clean.1.summary.rejected_count > 500, "{:?}", clean.1.summary);
    assert_eq!(kept_errors(&cut.0.member, id).await, kept_errors(&clean.0.member, id).await);
    let (clean_table, cut_table) = (table(clean.0).await, table(cut.0).await);
    assert_eq!(clean_table.len(), cut_table.len());
    for (clean_row, cut_row) in clean_table.iter().zip(&cut_table) {
        assert_eq!(clean_row, cut_row);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_cut_200_times_ends_as_one_that_is_not() {
    let (clean, cut) = tokio::join!(start_with_labels(), start_with_labels());
    let import = import(storm_file(1, ROWS)).skip_invalid().id(Uuid::now_v7());

    let whole = import.clone().by(&clean.member).await.unwrap();
    let pieces = import_with_cuts(&cut, &import).await;

    assert_eq!(whole.summary.row_count, ROWS as i64);
    assert_same_end((&clean, whole), (&cut, pieces), &import.options.import_id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_that_is_cut_200_times_ends_as_one_that_is_not() {
    let (clean, cut) = tokio::join!(start_with_labels(), start_with_labels());
    for tracker in [&clean, &cut] {
        let seed = import(storm_file(2, ROWS / 2)).skip_invalid();
        seed.by(&tracker.member).await.unwrap();
    }
    let import = import(storm_file(3, ROWS)).skip_invalid().update().id(Uuid::now_v7());

    let whole = import.clone().by(&clean.member).await.unwrap();
    let pieces = import_with_cuts(&cut, &import).await;

    assert!(whole.summary.updated_count > 1_000 && whole.summary.created_count > 1_000, "{:?}", whole.summary);
    assert_same_end((&clean, whole), (&cut, pieces), &import.options.import_id).await;
    // Undone, both are what they were.
    for tracker in [&clean, &cut] {
        revert(&tracker.member, &import.options.import_id, false).await.unwrap();
    }
    assert_eq!(table(&clean).await, table(&cut).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_of_a_file_with_everything_answers_as_the_import_does() {
    let tracker = start_with_labels().await;
    import(storm_file(2, 3_000)).skip_invalid().by(&tracker.member).await.unwrap();
    for on_existing in [OnExisting::Fail, OnExisting::Skip, OnExisting::Update] {
        let import = import(storm_file(3, 12_000)).skip_invalid().with(|options| {
            options.on_existing = on_existing.into();
            options.create_labels = true;
        });
        let before = tracker.contents().await;
        let mut trial = import.clone().validate_only().by(&tracker.member).await.unwrap();
        assert_eq!(tracker.contents().await, before);

        let real = import.by(&tracker.member).await.unwrap();

        assert_eq!(trial.summary.state(), ImportState::Validated);
        trial.summary.state = ImportState::Committed.into();
        trial.summary.import_id = real.summary.import_id.clone();
        for progress in &mut trial.progress {
            progress.import_id = real.summary.import_id.clone();
        }
        assert_eq!(trial, real, "{on_existing:?}");
        assert_eq!(trial.errors.len(), 1_000, "{on_existing:?}");
        revert(&tracker.member, &real.summary.import_id, false).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_imports_at_once_do_not_get_in_each_others_way() {
    let tracker = Tracker::start_with(limits(&["--imports", "10", "--pool-connections", "14"])).await;
    let import_of = |nth: usize| {
        let rows = (0..6_000).map(|n| format!("import {nth} issue {n},{nth}-{n},l{};l{}\n", n % 7, (n + nth) % 11));
        let file = rows.fold("title,external_id,labels\n".to_owned(), |file, row| file + &row);
        let import = import(file).id(Uuid::now_v7()).skip_invalid();
        import.with(|options| options.create_labels = true)
    };
    let imports = (0..10).map(|nth| {
        let (client, import) = (tracker.member.clone(), import_of(nth));
        tokio::spawn(async move { import.by(&client).await })
    });
    for import in imports.collect::<Vec<_>>() {
        let answer = import.await.unwrap().unwrap();
        assert_eq!(answer.counts(), (ImportState::Committed, 6_000, 6_000, 0, 0));
    }
    assert_eq!(issue_count(&tracker).await, 60_000);
    assert_eq!(tracker.count("SELECT count(DISTINCT external_id) FROM issues").await, 60_000);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 11);
    let labelled = "SELECT count(*) FROM issue_labels";
    let expected: usize =
        (0..10).map(|nth| (0..6_000).map(|n| if n % 7 == (n + nth) % 11 { 1 } else { 2 }).sum::<usize>()).sum();
    assert_eq!(tracker.count(labelled).await, expected as i64);
}
