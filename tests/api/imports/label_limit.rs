//! Imports that create labels, and the limit of labels.

use futures_util::future::join_all;

use super::*;
use crate::harness::limits;

/// Returns an import that creates these labels, one per row.
fn creating(labels: impl IntoIterator<Item = String>) -> Import {
    let rows: String = labels.into_iter().map(|label| format!("issue,{label}\n")).collect();
    import(format!("title,labels\n{rows}")).with(|options| options.create_labels = true)
}

fn names(range: std::ops::Range<i32>) -> impl Iterator<Item = String> {
    range.map(|n| format!("label {n}"))
}

async fn label_count(tracker: &Tracker) -> i64 {
    tracker.count("SELECT count(*) FROM labels").await
}

#[tokio::test]
async fn import_beyond_the_limit_of_labels_fails_and_writes_no_row() {
    let tracker = Tracker::start_with(limits(&["--labels", "3"])).await;
    for import in [creating(names(0..4)), creating(names(0..4)).skip_invalid(), creating(names(0..4)).validate_only()] {
        let status = assert_error(import.by(&tracker.member).await, Code::ResourceExhausted, "LABELS_EXCEEDED");
        assert!(status.message().contains("more than 3 labels"), "{status:?}");
        assert_eq!((label_count(&tracker).await, issue_count(&tracker).await), (0, 0));
    }

    let fits = creating(names(0..3)).by(&tracker.member).await.unwrap();
    assert_eq!(fits.counts(), (ImportState::Committed, 3, 3, 0, 0));
    let existing = creating(names(0..3)).by(&tracker.member).await.unwrap();
    assert_eq!(existing.counts(), (ImportState::Committed, 3, 3, 0, 0));
}

#[tokio::test]
async fn refused_import_inserts_no_more_labels_than_the_limit_allows() {
    let tracker = Tracker::start_with(limits(&["--labels", "3"])).await;
    let rows: String = (0..200)
        .map(|row| format!("issue,{}\n", names(row * 100..row * 100 + 100).collect::<Vec<_>>().join(";")))
        .collect();
    let import = import(format!("title,labels\n{rows}")).with(|options| options.create_labels = true);

    assert_error(import.by(&tracker.member).await, Code::ResourceExhausted, "LABELS_EXCEEDED");

    // Rows that were rolled back take space until they are vacuumed.
    let bytes = tracker.count("SELECT pg_relation_size('labels')").await;
    assert!(bytes <= 8_192, "{bytes}");
}

#[tokio::test]
async fn refused_import_resumes_when_labels_were_deleted() {
    let tracker = Tracker::start_with(limits(&["--labels", "6"])).await;
    let import = creating((0..7_000).map(|row| format!("label {}", row / 1_000)));
    let import = import.skip_invalid().id(Uuid::now_v7());
    assert_error(import.clone().by(&tracker.member).await, Code::ResourceExhausted, "LABELS_EXCEEDED");
    assert_eq!((label_count(&tracker).await, issue_count(&tracker).await), (5, 5_000));

    tracker.sql("DELETE FROM issue_labels WHERE label_id = (SELECT id FROM labels WHERE name = 'label 0')", &[]).await;
    tracker.sql("DELETE FROM labels WHERE name = 'label 0'", &[]).await;
    let resumed = resume(&tracker.member, &import).await.unwrap();

    assert_eq!(resumed.counts(), (ImportState::Committed, 7_000, 7_000, 0, 0));
    assert_eq!((label_count(&tracker).await, issue_count(&tracker).await), (6, 7_000));
}

#[tokio::test]
async fn concurrent_imports_keep_to_the_limit_of_labels_together() {
    let tracker = Tracker::start_with(limits(&["--labels", "5"])).await;
    for skip_invalid in [false, true] {
        tracker.sql("TRUNCATE labels, issues, issue_labels, comments, imports", &[]).await;
        // One user cannot have all permits of imports.
        let clients = [&tracker.member, &tracker.admin].into_iter().cycle();
        let imports = (0..4).zip(clients).map(|(nth, client)| {
            let import = creating(names(nth * 3..nth * 3 + 3));
            if skip_invalid { import.skip_invalid() } else { import }.by(client)
        });
        let (committed, refused): (Vec<_>, Vec<_>) = join_all(imports).await.into_iter().partition(Result::is_ok);

        assert_eq!((committed.len(), refused.len()), (1, 3));
        for outcome in refused {
            assert_error(outcome, Code::ResourceExhausted, "LABELS_EXCEEDED");
        }
        assert_eq!((label_count(&tracker).await, issue_count(&tracker).await), (3, 3));
    }
}
