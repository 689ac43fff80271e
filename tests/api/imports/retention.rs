//! How long imports and their row errors are stored, and how many errors of a user.

use issue_tracker::db::imports::{prune_import_errors, prune_imports};

use super::*;
use crate::harness::limits;

const IMPORT_DAYS: i32 = 90;
const ERROR_DAYS: i32 = 30;

/// Makes all imports older than this, and those that have ended as old.
async fn age(tracker: &Tracker, days: i32) {
    let sql = "UPDATE imports SET create_time = now() - make_interval(days => $1),
        finish_time = CASE WHEN finish_time IS NOT NULL THEN now() - make_interval(days => $1) END,
        revert_time = CASE WHEN revert_time IS NOT NULL THEN now() - make_interval(days => $1) END";
    tracker.sql(sql, &[&days]).await;
}

/// Removes old imports, until there is nothing to remove.
async fn prune(tracker: &Tracker) {
    let db = tracker.db.conn().await.unwrap();
    while prune_imports(&db, IMPORT_DAYS).await.unwrap() > 0 {}
    while prune_import_errors(&db, ERROR_DAYS).await.unwrap() > 0 {}
}

/// Returns the numbers of imports, errors, previous values and imports whose removal is not finished.
async fn stored(tracker: &Tracker) -> [i64; 4] {
    let [imports, errors, issues, expired] = ["imports", "import_errors", "import_issues", "expired_imports"]
        .map(|table| format!("SELECT count(*) FROM {table}"));
    [
        tracker.count(&imports).await,
        tracker.count(&errors).await,
        tracker.count(&issues).await,
        tracker.count(&expired).await,
    ]
}

/// Returns an import with this many invalid rows.
fn invalid(rows: usize) -> Import {
    import(format!("title,priority\n{}", ",x\n".repeat(rows)))
}

/// Updates an issue with an import, and returns the import's id.
async fn update_by_import(tracker: &Tracker) -> String {
    import("title,external_id\nbefore,X-1\n").by(&tracker.member).await.unwrap();
    let updated = import("title,external_id\nafter,X-1\n").update().by(&tracker.member).await.unwrap();
    assert_eq!(updated.outcome(), (0, 1, 0, 0));
    updated.summary.import_id
}

#[tokio::test]
async fn import_is_removed_with_its_rows_after_the_retention() {
    let tracker = Tracker::start().await;
    let updated = update_by_import(&tracker).await;
    let rejected = invalid(3).by(&tracker.member).await.unwrap().summary.import_id;
    let reverted = import("title\nreverted\n").by(&tracker.member).await.unwrap().summary.import_id;
    revert(&tracker.member, &reverted, false).await.unwrap();
    let running = open(&tracker.member, ImportOptions::default()).await;
    age(&tracker, IMPORT_DAYS - 1).await;
    prune(&tracker).await;
    assert_eq!(stored(&tracker).await, [5, 0, 1, 0], "errors are stored for a shorter time");

    age(&tracker, IMPORT_DAYS).await;
    prune(&tracker).await;

    assert_eq!(stored(&tracker).await, [1, 0, 0, 0]);
    for id in [&updated, &rejected, &reverted] {
        assert_error(get_import(&tracker.member, id).await, Code::NotFound, "NOT_FOUND");
        assert_error(revert(&tracker.member, id, false).await, Code::NotFound, "NOT_FOUND");
    }
    assert_eq!(get_import(&tracker.member, &running.first.import_id).await.unwrap().state(), ImportState::Running);
    assert_eq!(issues(&tracker).await.keys().collect::<Vec<_>>(), ["after"]);
}

#[tokio::test]
async fn interrupted_import_is_removed_after_the_retention() {
    let tracker = Tracker::start().await;
    let interrupted = open(&tracker.member, ImportOptions::default()).await;
    interrupted.cancel();
    tracker.wait_until(import_locks!("= 0")).await;
    age(&tracker, IMPORT_DAYS - 1).await;
    prune(&tracker).await;
    assert_eq!(stored(&tracker).await, [1, 0, 0, 0]);
    age(&tracker, IMPORT_DAYS).await;
    prune(&tracker).await;
    assert_eq!(stored(&tracker).await, [0, 0, 0, 0]);
}

/// PostgreSQL has room for about 20,000 locks.
#[tokio::test]
async fn removal_of_many_imports_locks_only_those_that_it_removes() {
    let tracker = Tracker::start().await;
    let fill = "INSERT INTO imports (id, caller_id, mode, create_time, committed_offset, row_count, created_count,
            rejected_count, error_count)
        SELECT gen_random_uuid(), $1, 1, now() - interval '1 year', 0, 0, 0, 0, 0 FROM generate_series(1, 50000)";
    tracker.sql(fill, &[&tracker.member.user.id.parse::<Uuid>().unwrap()]).await;
    tracker.sql("ANALYZE imports", &[]).await;

    prune_imports(&tracker.db.conn().await.unwrap(), IMPORT_DAYS).await.unwrap();

    assert_eq!(tracker.count("SELECT count(*) FROM imports").await, 49_500);
}

#[tokio::test]
async fn import_can_be_reverted_until_the_retention_ends() {
    let tracker = Tracker::start().await;
    let id = update_by_import(&tracker).await;
    age(&tracker, IMPORT_DAYS - 1).await;
    prune(&tracker).await;

    let reverted = revert(&tracker.member, &id, false).await.unwrap();

    assert_eq!((reverted.removed_count, reverted.restored_count, reverted.kept_count), (0, 1, 0));
    assert_eq!(issues(&tracker).await.keys().collect::<Vec<_>>(), ["before"]);
}

#[tokio::test]
async fn import_whose_removal_is_not_finished_cannot_be_reverted() {
    let tracker = Tracker::start().await;
    let id = update_by_import(&tracker).await;
    let fill =
        "INSERT INTO import_issues (import_id, issue_id) SELECT $1, gen_random_uuid() FROM generate_series(1, 25000)";
    tracker.sql(fill, &[&id.parse::<Uuid>().unwrap()]).await;
    age(&tracker, IMPORT_DAYS).await;

    prune_imports(&tracker.db.conn().await.unwrap(), IMPORT_DAYS).await.unwrap();

    let [imports, _, issues, expired] = stored(&tracker).await;
    assert_eq!((imports, issues, expired), (0, 15_001, 1));
    assert_error(revert(&tracker.member, &id, false).await, Code::NotFound, "NOT_FOUND");
    let again = import("title\nnew\n").id(id.parse().unwrap()).by(&tracker.member).await;
    assert_error(again, Code::FailedPrecondition, "IMPORT_MISMATCH");
    prune(&tracker).await;
    assert_eq!(stored(&tracker).await, [0, 0, 0, 0]);
}

#[tokio::test]
async fn import_id_of_a_removed_import_is_refused_while_its_issues_exist() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    import("title\nold\n").id(id).by(&tracker.member).await.unwrap();
    age(&tracker, IMPORT_DAYS).await;
    prune(&tracker).await;

    for import in [import("title\nnew\n").id(id), import("title\nnew\n").id(id).validate_only()] {
        assert_error(import.by(&tracker.member).await, Code::FailedPrecondition, "IMPORT_MISMATCH");
    }
    assert_eq!(issues(&tracker).await.keys().collect::<Vec<_>>(), ["old"]);
    assert_eq!(tracker.count("SELECT count(*) FROM imports").await, 0);
}

#[tokio::test]
async fn row_errors_are_removed_before_their_import() {
    let tracker = Tracker::start().await;
    let rejected = invalid(3).by(&tracker.member).await.unwrap().summary;
    let partial = import("title\nvalid\n,\n").skip_invalid().by(&tracker.member).await.unwrap().summary;
    age(&tracker, ERROR_DAYS - 1).await;
    prune(&tracker).await;
    assert_eq!(stored(&tracker).await, [2, rejected.error_count + partial.error_count, 0, 0]);

    age(&tracker, ERROR_DAYS).await;
    prune(&tracker).await;

    assert_eq!(stored(&tracker).await, [2, 0, 0, 0]);
    for summary in [rejected, partial] {
        assert!(stored_errors(&tracker.member, &summary.import_id).await.is_empty());
        let import = get_import(&tracker.member, &summary.import_id).await.unwrap();
        assert_eq!(import.error_count, summary.error_count);
    }
}

#[tokio::test]
async fn row_errors_of_older_imports_are_removed_beyond_the_limit_of_the_user() {
    let tracker = Tracker::start_with(limits(&["--import-errors", "10000"])).await;
    let other = invalid(1_000).by(&tracker.admin).await.unwrap().summary.import_id;
    let mut ids = Vec::new();
    for rows in [1_000, 4_000, 2_000] {
        ids.push(invalid(rows).by(&tracker.member).await.unwrap().summary.import_id);
    }
    let errors = async |client: &Client, id: &str| stored_errors(client, id).await.len();
    // Two errors per row: the third import exceeds the limit, which removes those of the first two imports.
    assert_eq!(errors(&tracker.member, &ids[1]).await, 0);
    assert_eq!(errors(&tracker.member, &ids[2]).await, 4_000);

    let last = invalid(10).skip_invalid().by(&tracker.member).await.unwrap().summary.import_id;

    assert_eq!(errors(&tracker.member, &ids[0]).await, 0);
    assert_eq!(errors(&tracker.member, &ids[1]).await, 0);
    assert_eq!(errors(&tracker.member, &ids[2]).await, 4_000);
    assert_eq!(errors(&tracker.member, &last).await, 20);
    assert_eq!(errors(&tracker.admin, &other).await, 2_000, "another user's");
    assert_eq!(stored(&tracker).await, [5, 6_020, 0, 0]);
}

#[tokio::test]
async fn row_errors_of_an_import_in_progress_are_kept_and_count_first() {
    let tracker = Tracker::start_with(limits(&["--import-errors", "10000"])).await;
    let options = ImportOptions { mode: ImportMode::SkipInvalid.into(), ..ImportOptions::default() };
    let mut running = open(&tracker.member, options).await;
    // A batch has 5,000 rows.
    let file = format!("title,priority\n{}{}", ",x\n".repeat(2_000), "valid,\n".repeat(3_001));
    running.requests.send(chunk(0, file)).await.unwrap();
    tracker.wait_until("SELECT count(*) = 4000 FROM import_errors").await;
    let older = invalid(3_000).by(&tracker.member).await.unwrap().summary.import_id;
    assert_eq!(stored_errors(&tracker.member, &older).await.len(), 6_000);

    let newer = invalid(2_000).by(&tracker.member).await.unwrap().summary.import_id;

    let errors = async |id: &str| stored_errors(&tracker.member, id).await.len();
    assert_eq!(errors(&running.first.import_id).await, 4_000);
    assert_eq!(errors(&older).await, 0);
    assert_eq!(errors(&newer).await, 4_000);
    drop(running.requests);
    while running.responses.message().await.unwrap().is_some() {}
}

#[tokio::test]
async fn stored_errors_are_counted_again_when_a_rejected_import_is_corrected() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    let count = "SELECT stored_error_count::int8 FROM imports";
    invalid(3).id(id).by(&tracker.member).await.unwrap();
    assert_eq!(tracker.count(count).await, 6);
    invalid(1).id(id).by(&tracker.member).await.unwrap();
    assert_eq!(tracker.count(count).await, 2);
    import("title,priority\nvalid,\n").id(id).by(&tracker.member).await.unwrap();
    assert_eq!(tracker.count(count).await, 0);
    assert_eq!(tracker.count("SELECT count(*) FROM import_errors").await, 0);
}
