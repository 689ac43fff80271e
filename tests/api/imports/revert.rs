//! `RevertImport`.

use std::sync::Arc;

use issue_tracker::pb::{BulkUpdateStatusRequest, DeleteLabelRequest, UpdateIssueRequest};

use super::{
    interruptions::{Interruption, RawImport},
    *,
};
use crate::{
    harness::{assert_invalid, error_metadata, limits},
    labels::deletion::mark,
    lock_waiters,
};

/// Runs an import, which must commit, and returns its id.
async fn commit(tracker: &Tracker, import: Import) -> String {
    let responses = import.by(&tracker.member).await.unwrap();
    assert_eq!(responses.summary.state(), ImportState::Committed, "{responses:?}");
    responses.summary.import_id
}

/// Returns the numbers of removed, restored and kept issues.
fn counts(response: &RevertImportResponse) -> (i64, i64, i64) {
    (response.removed_count, response.restored_count, response.kept_count)
}

async fn retitle(tracker: &Tracker, external_id: &str) -> String {
    let id: Uuid = tracker.sql("SELECT id FROM issues WHERE external_id = $1", &[&external_id]).await[0].get(0);
    let issue = Issue { id: id.to_string(), title: "changed since".into(), ..Issue::default() };
    let request = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
    tracker.member.issues().update_issue(request).await.unwrap().into_inner().id
}

async fn comment_on(tracker: &Tracker, external_id: &str) -> String {
    let id: Uuid = tracker.sql("SELECT id FROM issues WHERE external_id = $1", &[&external_id]).await[0].get(0);
    tracker.viewer.get(&id.to_string()).await;
    tracker.admin.comment(&id.to_string(), "since").await;
    id.to_string()
}

/// Returns the contents of all issues as text, without version, history and update_time.
async fn values(tracker: &Tracker) -> Vec<String> {
    const SQL: &str = "SELECT jsonb_build_array(id, title, description, status, priority, assignee_id, reporter_id,
            external_id, create_time, close_time, reopen_count, delete_time,
            (SELECT array_agg(label_id ORDER BY label_id) FROM issue_labels WHERE issue_id = i.id))::text
        FROM issues i ORDER BY 1";
    tracker.sql(SQL, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn revert_removes_only_the_issues_that_the_import_created() {
    let tracker = Tracker::start().await;
    tracker.member.label("bug").await;
    let other = tracker.member.file("other").await;
    let earlier = commit(&tracker, import("title,external_id\nearlier,0\n")).await;
    let before = values(&tracker).await;
    for import in [import("title,external_id,labels\na,1,bug\nb,2,bug\n"), import(titles(6_000)).skip_invalid()] {
        let id = commit(&tracker, import).await;
        let created = issue_count(&tracker).await - 2;

        let reverted = revert(&tracker.member, &id, false).await.unwrap();

        assert_eq!(counts(&reverted), (created, 0, 0));
        assert_eq!(values(&tracker).await, before);
        assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 0);
        let record = get_import(&tracker.member, &id).await.unwrap();
        assert_eq!((record.state(), record.created_count), (ImportState::Reverted, created));
        assert!(record.revert_time.is_some());
    }
    assert_eq!(tracker.member.get(&other.id).await, other);
    assert_eq!(get_import(&tracker.member, &earlier).await.unwrap().state(), ImportState::Committed);
}

#[tokio::test]
async fn revert_restores_updated_issues() {
    let tracker = Tracker::start().await;
    let seed = "title,external_id,description,priority,status,assignee,labels,create_time,close_time\n\
        a,1,text,high,open,viewer,bug;ui,2020-01-01T00:00:00Z,\n\
        b,2,text,low,closed,,ui,2020-01-01T00:00:00Z,2020-01-03T00:00:00Z\n\
        c,3,,,closed,member,,2020-01-01T00:00:00Z,2020-01-04T00:00:00Z\n\
        d,4,,,in_progress,,bug,2020-01-01T00:00:00Z,\n";
    commit(&tracker, import(seed).with(|options| options.create_labels = true)).await;
    let before = values(&tracker).await;
    let file = "title,external_id,description,priority,status,assignee,labels\n\
        A,1,,,closed,,docs\n\
        B,2,other,critical,open,admin,\n\
        c,3,,,in_progress,,bug\n\
        d,4,,,in_progress,,bug\n\
        new,5,,,,,new\n";
    let id = commit(&tracker, import(file).update().with(|options| options.create_labels = true)).await;

    let reverted = revert(&tracker.member, &id, false).await.unwrap();

    assert_eq!(counts(&reverted), (1, 3, 0));
    assert_eq!(values(&tracker).await, before);
    // The revert is one version; the import did not change the fourth issue.
    let versions = "SELECT array_agg(version ORDER BY external_id) FROM issues";
    assert_eq!(tracker.sql(versions, &[]).await[0].get::<_, Vec<i64>>(0), [3, 3, 3, 1]);
    let events =
        "SELECT array_agg(field || ':' || coalesce(old_value, '') || '>' || coalesce(new_value, '') ORDER BY e.id)
        FROM issue_events e JOIN issues i ON i.id = e.issue_id
        WHERE i.external_id = '2' AND e.version = 3 AND field NOT IN ('label', 'assignee_id')";
    assert_eq!(
        tracker.sql(events, &[]).await[0].get::<_, Vec<String>>(0),
        ["status:OPEN>CLOSED", "priority:CRITICAL>LOW", "title:B>b", "description:other>text"]
    );
    let relabelled = "SELECT count(*) FROM issue_events WHERE version = 3 AND field = 'label'";
    assert_eq!(tracker.count(relabelled).await, 3 + 1 + 1);
    // Labels that the import created are kept.
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 4);
    assert_eq!(tracker.count("SELECT count(*) FROM import_issues").await, 0);
}

#[tokio::test]
async fn status_can_be_updated_after_a_revert() {
    let tracker = Tracker::start().await;
    commit(&tracker, import("title,external_id,status\na,1,open\n")).await;
    let id = commit(&tracker, import("external_id,status\n1,closed\n").update()).await;
    revert(&tracker.member, &id, false).await.unwrap();

    commit(&tracker, import("external_id,status\n1,closed\n").update()).await;

    let issue = issues(&tracker).await.remove("a").unwrap();
    assert_eq!((issue.version, issue.close_time), (4, issue.update_time));
}

#[tokio::test]
async fn later_changes_and_comments_block_a_revert_without_force() {
    let tracker = Tracker::start().await;
    commit(&tracker, import("title,external_id\nold 1,1\nold 2,2\nold 3,3\n")).await;
    let file = "title,external_id\nnew 1,1\nnew 2,2\nnew 3,3\ncreated 4,4\ncreated 5,5\ncreated 6,6\n";
    let id = commit(&tracker, import(file).update()).await;
    let mut changed = vec![
        retitle(&tracker, "1").await,
        comment_on(&tracker, "2").await,
        retitle(&tracker, "4").await,
        comment_on(&tracker, "5").await,
    ];
    changed.sort();
    let before = tracker.contents().await;

    let refused = revert(&tracker.member, &id, false).await;

    let status = assert_error(refused, Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    assert_eq!(error_metadata(&status, "changed_count").as_deref(), Some("4"));
    assert_eq!(error_metadata(&status, "changed_ids"), Some(changed.join(",")));
    assert!(status.message().contains("force"), "{status:?}");
    assert_eq!(tracker.contents().await, before);

    let forced = revert(&tracker.member, &id, true).await.unwrap();
    assert_eq!(counts(&forced), (1, 1, 4));
    assert_eq!(forced.kept_ids, changed);
    let remaining = tracker.sql("SELECT external_id, title FROM issues ORDER BY 1", &[]).await;
    let remaining: Vec<(&str, &str)> = remaining.iter().map(|row| (row.get(0), row.get(1))).collect();
    let expected = [("1", "changed since"), ("2", "new 2"), ("3", "old 3"), ("4", "changed since"), ("5", "created 5")];
    assert_eq!(remaining, expected);
}

#[tokio::test]
async fn comments_before_the_import_do_not_block_a_revert() {
    let tracker = Tracker::start().await;
    commit(&tracker, import("title,external_id\nold,1\n")).await;
    comment_on(&tracker, "1").await;
    let id = commit(&tracker, import("title,external_id\nnew,1\n").update()).await;

    assert_eq!(counts(&revert(&tracker.member, &id, false).await.unwrap()), (0, 1, 0));
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 1);
}

#[tokio::test]
async fn added_labels_and_deletions_count_as_later_changes() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await;
    let id = commit(&tracker, import("title,external_id\na,1\nb,2\nc,3\n")).await;
    let ids = tracker.sql("SELECT id::text FROM issues ORDER BY external_id", &[]).await;
    let [labeled, deleted]: [String; 2] = [ids[0].get(0), ids[1].get(0)];
    let label = issue_tracker::pb::AddIssueLabelsRequest {
        issue_id: labeled.clone(),
        label_ids: vec![bug.id],
        ..Default::default()
    };
    tracker.member.labels().add_issue_labels(label).await.unwrap();
    let delete = issue_tracker::pb::DeleteIssueRequest { id: deleted.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();

    let forced = revert(&tracker.member, &id, true).await.unwrap();

    assert_eq!((counts(&forced), forced.kept_ids), ((1, 0, 2), vec![labeled, deleted]));
}

#[tokio::test]
async fn first_100_changed_ids_are_returned() {
    let tracker = Tracker::start().await;
    let id = commit(&tracker, import(titles(150))).await;
    let actor: Uuid = tracker.admin.user.id.parse().unwrap();
    tracker.sql("UPDATE issues SET priority = 1, change_actor_id = $1", &[&actor]).await;
    let first = tracker.sql("SELECT id::text FROM issues ORDER BY id LIMIT 100", &[]).await;
    let first: Vec<String> = first.iter().map(|row| row.get(0)).collect();

    let refused = revert(&tracker.member, &id, false).await;

    let status = assert_error(refused, Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    assert_eq!(error_metadata(&status, "changed_count").as_deref(), Some("150"));
    assert_eq!(error_metadata(&status, "changed_ids"), Some(first.join(",")));
    let forced = revert(&tracker.member, &id, true).await.unwrap();
    assert_eq!((counts(&forced), forced.kept_ids), ((0, 0, 150), first));
}

#[tokio::test]
async fn refused_revert_leaves_no_lock_behind() {
    let tracker = Tracker::start().await;
    let id = commit(&tracker, import("title,external_id\na,1\n")).await;
    retitle(&tracker, "1").await;
    for _ in 0..300 {
        // A concurrent call takes the connection that the refused one returns to the pool.
        let refused = revert(&tracker.member, &id, false);
        let (refused, _) = tokio::join!(refused, get_import(&tracker.member, &id));
        assert_error(refused, Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    }
}

#[tokio::test]
async fn repeated_revert_returns_the_first_response_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let id = commit(&tracker, import("title,external_id\na,1\nb,2\n")).await;
    retitle(&tracker, "1").await;
    let first = revert(&tracker.member, &id, true).await.unwrap();
    assert_eq!(counts(&first), (1, 0, 1));
    let before = tracker.contents().await;

    for (client, force) in [(&tracker.member, false), (&tracker.member, true), (&tracker.admin, false)] {
        assert_eq!(revert(client, &id, force).await.unwrap(), first);
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn dry_run_of_a_revert_has_its_outcome_and_writes_nothing() {
    let tracker = Tracker::start().await;
    commit(&tracker, import("title,external_id\nold,1\n")).await;
    let id = commit(&tracker, import("title,external_id\nnew,1\nb,2\nc,3\n").update()).await;
    retitle(&tracker, "3").await;
    let before = tracker.contents().await;
    let mut imports = tracker.member.imports();
    let request =
        |force| RevertImportRequest { import_id: id.clone(), force, validate_only: true, ..Default::default() };

    let refused = imports.revert_import(request(false)).await;
    assert_error(refused, Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    let validated = imports.revert_import(request(true)).await.unwrap().into_inner();

    assert_eq!(tracker.contents().await, before);
    assert_eq!(counts(&validated), (1, 1, 1));
    assert_eq!(revert(&tracker.member, &id, true).await.unwrap(), validated);
}

#[tokio::test]
async fn reverted_import_returns_its_summary_and_its_rows_can_be_imported_again() {
    let tracker = Tracker::start().await;
    let import = import("title,external_id\na,1\nb,2\n").id(Uuid::now_v7());
    let first = import.clone().by(&tracker.member).await.unwrap().summary;
    revert(&tracker.member, &first.import_id, false).await.unwrap();

    let again = import.clone().by(&tracker.member).await.unwrap();

    assert_eq!(again.summary, ImportSummary { state: ImportState::Reverted.into(), ..first });
    assert_eq!(issue_count(&tracker).await, 0);
    let second = import.id(Uuid::now_v7()).by(&tracker.member).await.unwrap();
    assert_eq!(second.counts(), (ImportState::Committed, 2, 2, 0, 0));
}

#[tokio::test]
async fn revert_of_an_interrupted_import_removes_its_batches_and_prevents_resuming() {
    let tracker = Tracker::start().await;
    commit(&tracker, import("title,external_id\nold,1\n")).await;
    let rows = (1..=5_010).fold("title,external_id\n".to_owned(), |file, n| file + &format!("issue {n},{n}\n"));
    let import = import(rows).skip_invalid().update().id(Uuid::now_v7());
    let mut raw = RawImport::open(&tracker, import.options.clone()).await;
    raw.send(&chunk(0, &import.file[..import.file.len() - 3]));
    tracker.wait_until("SELECT count(*) = 5000 FROM issues").await;
    let id = import.options.import_id.clone();
    assert_error(revert(&tracker.member, &id, false).await, Code::Aborted, "IMPORT_RUNNING");
    raw.interrupt_and_wait(Interruption::Reset(h2::Reason::CANCEL), &tracker).await;

    let reverted = revert(&tracker.member, &id, false).await.unwrap();

    assert_eq!(counts(&reverted), (4_999, 1, 0));
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["old"]);
    let again = import.by(&tracker.member).await.unwrap();
    assert_eq!((again.summary.state(), again.summary.row_count), (ImportState::Reverted, 5_000));
    assert_eq!(issue_count(&tracker).await, 1);
}

#[tokio::test]
async fn revert_of_an_uncommitted_atomic_import_fails() {
    let tracker = Tracker::start().await;
    let rejected = import("title,status\na,opne\n").by(&tracker.member).await.unwrap().summary.import_id;
    let interrupted = import("title\na\n").id(Uuid::now_v7());
    open(&tracker.member, interrupted.options.clone()).await.cancel();
    tracker.wait_until(import_locks!("= 0")).await;

    for id in [&rejected, &interrupted.options.import_id] {
        let refused = revert(&tracker.member, id, true).await;
        assert_error(refused, Code::FailedPrecondition, "IMPORT_NOT_COMMITTED");
    }
    let again = resume(&tracker.member, &interrupted).await.unwrap();
    assert_eq!(again.counts(), (ImportState::Committed, 1, 1, 0, 0));
}

#[tokio::test]
async fn members_revert_their_own_imports_and_administrators_all() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Member).await;
    let id = commit(&tracker, import("title\na\n")).await;

    for client in [&other, &tracker.viewer] {
        assert_error(revert(client, &id, true).await, Code::PermissionDenied, "PERMISSION_DENIED");
    }
    assert_error(revert(&other, &Uuid::now_v7().to_string(), true).await, Code::NotFound, "NOT_FOUND");
    assert_invalid(revert(&other, "", true).await, &["import_id"]);
    assert_eq!(issue_count(&tracker).await, 1);
    assert_eq!(counts(&revert(&tracker.admin, &id, false).await.unwrap()), (1, 0, 0));
}

#[tokio::test]
async fn reverting_a_later_update_restores_the_result_of_the_earlier_import() {
    let tracker = Tracker::start().await;
    let first = commit(&tracker, import("title,external_id\nfirst,1\n")).await;
    let second = commit(&tracker, import("title,external_id\nsecond,1\n").update()).await;

    let refused = revert(&tracker.member, &first, false).await;
    assert_error(refused, Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    assert_eq!(counts(&revert(&tracker.member, &second, false).await.unwrap()), (0, 1, 0));

    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["first"]);
}

#[tokio::test]
async fn revert_does_not_restore_deleted_labels() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await;
    tracker.member.label("ui").await;
    commit(&tracker, import("title,external_id,labels\na,1,bug\n")).await;
    let id = commit(&tracker, import("external_id,labels\n1,ui\n").update()).await;
    tracker.member.labels().delete_label(DeleteLabelRequest { id: bug.id, ..Default::default() }).await.unwrap();

    assert_eq!(counts(&revert(&tracker.member, &id, false).await.unwrap()), (0, 1, 0));
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 0);
}

#[tokio::test]
async fn revert_does_not_restore_labels_that_are_being_deleted() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await;
    tracker.member.label("ui").await;
    commit(&tracker, import("title,external_id,labels\na,1,bug\n")).await;
    let id = commit(&tracker, import("external_id,labels\n1,ui\n").update()).await;
    mark(&tracker, &bug.id, 0.0).await;

    assert_eq!(counts(&revert(&tracker.member, &id, false).await.unwrap()), (0, 1, 0));
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 0);
}

#[tokio::test]
async fn issue_whose_only_change_cannot_be_restored_keeps_its_version() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await;
    commit(&tracker, import("title,external_id,labels\na,1,bug\nb,2,bug\n")).await;
    // The import removes the label from both issues, and changes the title of the second one.
    let id = commit(&tracker, import("title,external_id,labels\na,1,\nB,2,\n").update()).await;
    tracker.member.labels().delete_label(DeleteLabelRequest { id: bug.id, ..Default::default() }).await.unwrap();
    let events = "SELECT count(*) FROM issue_events e JOIN issues i ON i.id = e.issue_id WHERE i.external_id = '1'";
    let events_before = tracker.count(events).await;

    assert_eq!(counts(&revert(&tracker.member, &id, false).await.unwrap()), (0, 1, 0));

    let versions = "SELECT array_agg(version ORDER BY external_id) FROM issues";
    assert_eq!(tracker.sql(versions, &[]).await[0].get::<_, Vec<i64>>(0), [2, 3]);
    assert_eq!(tracker.count(events).await, events_before);
}

#[tokio::test]
async fn revert_waits_for_a_concurrent_comment_and_keeps_its_issue() {
    let tracker = Tracker::start().await;
    let id = commit(&tracker, import("title\na\nb\n")).await;
    let other = tracker.session().await;
    let comment = format!(
        "BEGIN; INSERT INTO comments (id, issue_id, author_id, content)
         SELECT gen_random_uuid(), id, '{}', 'since' FROM issues WHERE title = 'a'",
        tracker.admin.user.id
    );
    other.batch_execute(&comment).await.unwrap();
    let call = tokio::spawn({
        let client = tracker.member.clone();
        async move { revert(&client, &id, false).await }
    });
    tracker.wait_until(lock_waiters!("> 0")).await;
    other.batch_execute("COMMIT").await.unwrap();

    assert_error(call.await.unwrap(), Code::FailedPrecondition, "IMPORT_CHANGED_SINCE");
    assert_eq!(issue_count(&tracker).await, 2);
}

#[tokio::test]
async fn changes_that_wait_for_a_revert_fail_with_not_found() {
    // Half of the connections may wait for row locks, and a user has a share of these.
    let tracker = Arc::new(Tracker::start_with(limits(&["--pool-connections", "10"])).await);
    let id = commit(&tracker, import("title,external_id\na,1\nb,2\nc,3\n")).await;
    let ids: Vec<Uuid> =
        tracker.sql("SELECT id FROM issues ORDER BY id", &[]).await.iter().map(|row| row.get(0)).collect();
    // The revert locks the issues in the order of their ids, and waits for the last one.
    let last = tracker.session().await;
    last.query("BEGIN", &[]).await.unwrap();
    last.query("SELECT FROM issues WHERE id = $1 FOR UPDATE", &[&ids[2]]).await.unwrap();
    let reverted = tokio::spawn({
        let (tracker, id) = (Arc::clone(&tracker), id.clone());
        async move { revert(&tracker.member, &id, false).await }
    });
    tracker.wait_until(lock_waiters!("= 1")).await;
    let issue = Issue { id: ids[0].to_string(), title: "changed".into(), ..Issue::default() };
    let update = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
    let updates = [update.clone(), UpdateIssueRequest { comment: "with a comment".into(), ..update }].map(|update| {
        let mut issues = tracker.member.issues();
        tokio::spawn(async move { issues.update_issue(update).await.map(drop) })
    });
    let status = BulkUpdateStatusRequest {
        ids: vec![ids[1].to_string()],
        status: IssueStatus::Closed.into(),
        ..Default::default()
    };
    let bulk = tokio::spawn({
        let mut issues = tracker.admin.issues();
        async move { issues.bulk_update_status(status).await.map(drop) }
    });
    tracker.wait_until(lock_waiters!("= 4")).await;

    last.query("COMMIT", &[]).await.unwrap();

    assert_eq!(counts(&reverted.await.unwrap().unwrap()), (3, 0, 0));
    for changed in [bulk].into_iter().chain(updates) {
        assert_error(changed.await.unwrap(), Code::NotFound, "NOT_FOUND");
    }
}
