//! `DeleteLabel` with `force`: in several transactions, while others change the issues.

use futures_util::future::join_all;
use issue_tracker::{
    db::labels::resume_deletion,
    pb::{CreateIssueRequest, DeleteLabelResponse, ListIssuesRequest},
};
use tokio::task::JoinHandle;

use super::*;
use crate::lock_waiters;

/// More issues than two transactions of a deletion change.
const ISSUES: i64 = 2_500;

/// Marks a label as the first transaction of its deletion does, `age_seconds` ago.
pub async fn mark(tracker: &Tracker, label_id: &str, age_seconds: f64) {
    let sql = "UPDATE labels SET delete_actor_id = $2, delete_request_id = gen_random_uuid(),
            delete_fingerprint = sha256(''), removed_issue_count = 0,
            delete_step_time = now() - make_interval(secs => $3)
        WHERE id = $1";
    let (id, actor): (Uuid, Uuid) = (label_id.parse().unwrap(), tracker.admin.user.id.parse().unwrap());
    tracker.sql(sql, &[&id, &actor, &age_seconds]).await;
}

/// Creates a label that [`ISSUES`] issues have.
async fn used_label(tracker: &Tracker) -> Label {
    let label = tracker.member.label("used").await;
    let sql = "WITH created AS (
            INSERT INTO issues (id, reporter_id, title, description, status, priority)
            SELECT gen_random_uuid(), $1, 'used', '', 1, 0 FROM generate_series(1, $3) RETURNING id
        )
        INSERT INTO issue_labels SELECT id, $2 FROM created";
    let (user, id): (Uuid, Uuid) = (tracker.member.user.id.parse().unwrap(), label.id.parse().unwrap());
    tracker.sql(sql, &[&user, &id, &(ISSUES as i32)]).await;
    label
}

/// Returns the issue with the label that is `nth` in the order in which a deletion changes them.
async fn issue_with_label(tracker: &Tracker, nth: i64) -> Issue {
    let sql = "SELECT issue_id FROM issue_labels ORDER BY issue_id OFFSET $1 LIMIT 1";
    let id: Uuid = tracker.sql(sql, &[&nth]).await[0].get(0);
    tracker.member.get(&id.to_string()).await
}

/// Locks an issue until the session commits.
async fn lock_issue(tracker: &Tracker, issue: &Issue) -> tokio_postgres::Client {
    let session = tracker.session().await;
    session.batch_execute(&format!("BEGIN; SELECT FROM issues WHERE id = '{}' FOR UPDATE", issue.id)).await.unwrap();
    session
}

fn deletion(label: &Label) -> DeleteLabelRequest {
    DeleteLabelRequest { id: label.id.clone(), force: true, ..Default::default() }
}

fn spawn_deletion(client: &Client, request: DeleteLabelRequest) -> JoinHandle<Result<DeleteLabelResponse, Status>> {
    let mut labels = client.labels();
    tokio::spawn(async move { labels.delete_label(request).await.map(tonic::Response::into_inner) })
}

/// Waits until a deletion waits for the only issue that is left.
async fn wait_until_one_issue_is_left(tracker: &Tracker) {
    tracker.wait_until("SELECT count(*) = 1 FROM issue_labels").await;
    tracker.wait_until_blocked().await;
}

/// Asserts that the label is deleted, and was removed from each issue by one event.
async fn assert_deleted(tracker: &Tracker, label: &Label) {
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
    assert_eq!(tracker.count(COUNT_ISSUE_LABELS).await, 0);
    let removals = "SELECT count(*), count(DISTINCT issue_id) FROM issue_events
        WHERE field = 'label' AND old_value = $1 AND new_value IS NULL";
    let row = &tracker.sql(removals, &[&label.id]).await[0];
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (ISSUES, ISSUES));
    let versions = "SELECT count(*) FROM issues i WHERE version - 1 <>
        (SELECT count(DISTINCT e.version) FROM issue_events e WHERE e.issue_id = i.id)";
    assert_eq!(tracker.count(versions).await, 0);
}

#[tokio::test]
async fn issue_that_another_call_has_locked_does_not_hold_up_the_deletion_from_other_issues() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let (first, last) = (issue_with_label(&tracker, 0).await, issue_with_label(&tracker, ISSUES - 1).await);
    let lock = lock_issue(&tracker, &first).await;

    let deletion = spawn_deletion(&tracker.admin, deletion(&label));
    wait_until_one_issue_is_left(&tracker).await;

    // The deletion has committed what it has changed, and has no lock on it.
    let renamed = Issue { title: "renamed".into(), ..last };
    let update = UpdateIssueRequest { issue: Some(renamed), ..Default::default() };
    let updated = tracker.member.issues().update_issue(update).await.unwrap().into_inner();
    assert_eq!((updated.version, &*updated.labels), (3, &[][..]));
    assert_eq!(tracker.member.get(&first.id).await, first);

    lock.batch_execute("COMMIT").await.unwrap();
    assert_eq!(i64::from(deletion.await.unwrap().unwrap().issue_count), ISSUES);
    assert_deleted(&tracker, &label).await;
    let actor = "SELECT count(*) FROM issue_events WHERE field = 'label' AND actor_id <> $1";
    let admin: Uuid = tracker.admin.user.id.parse().unwrap();
    assert_eq!(tracker.sql(actor, &[&admin]).await[0].get::<_, i64>(0), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn issues_are_updated_while_their_label_is_deleted() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let mut issues = Vec::new();
    for nth in [0, ISSUES / 4, ISSUES / 2, ISSUES - 1] {
        issues.push(issue_with_label(&tracker, nth).await);
    }
    let deletion = spawn_deletion(&tracker.admin, deletion(&label));
    let mut round = 0;
    while !deletion.is_finished() {
        round += 1;
        let updated = join_all(issues.iter().map(async |issue| {
            let issue = Issue { id: issue.id.clone(), title: format!("round {round}"), ..Issue::default() };
            let update = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
            tracker.member.issues().update_issue(update).await
        }));
        for updated in updated.await {
            updated.unwrap();
        }
    }

    assert_eq!(i64::from(deletion.await.unwrap().unwrap().issue_count), ISSUES);
    assert_deleted(&tracker, &label).await;
}

#[tokio::test]
async fn label_that_is_being_deleted_counts_as_missing() {
    let tracker = Tracker::start().await;
    let [label, kept] = create_labels(&tracker.member, ["used", "kept"]).await;
    let issue = tracker.member.file("crash").await;
    let issue = add(&tracker.member, &issue, &[&label, &kept]).await.unwrap();
    mark(&tracker, &label.id, 0.0).await;
    let before = tracker.contents().await;

    let labeled = Issue { title: "new".into(), label_ids: ids(&[&kept, &label]), ..Issue::default() };
    for validate_only in [true, false] {
        let create = CreateIssueRequest { issue: Some(labeled.clone()), validate_only, ..Default::default() };
        let created = tracker.member.issues().create_issue(create).await;
        let status = assert_error(created, Code::NotFound, "NOT_FOUND");
        assert_eq!(bad_fields(&status), ["issue.label_ids[1]"]);
    }
    let batch = issue_tracker::pb::BatchCreateIssuesRequest { issues: vec![labeled], ..Default::default() };
    let created = tracker.member.issues().batch_create_issues(batch).await;
    let status = assert_error(created, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["issues[0].label_ids[1]"]);
    for result in [
        add(&tracker.member, &issue, &[&kept, &label]).await,
        remove(&tracker.member, &issue, &[&kept, &label]).await,
        replace(&tracker.member, &issue, &[&kept, &label]).await,
    ] {
        let status = assert_error(result, Code::NotFound, "NOT_FOUND");
        assert_eq!(bad_fields(&status), ["label_ids[1]"]);
    }
    let described = Label { description: "still used".into(), ..label.clone() };
    assert_error(update(&tracker.member, described, &["description"]).await, Code::NotFound, "NOT_FOUND");
    assert_error(delete(&tracker.member, &label.id, false).await, Code::NotFound, "NOT_FOUND");
    assert_error(create(&tracker.member, "USED", "").await, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(list(&tracker.viewer, 0, "").await.unwrap().labels, std::slice::from_ref(&kept));
    let validated = DeleteLabelRequest { validate_only: true, ..deletion(&label) };
    assert_eq!(tracker.member.labels().delete_label(validated).await.unwrap().into_inner().issue_count, 1);

    // Issues that still have it show it, and filters match them.
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    let by_label = ListIssuesRequest { filter: "label = used".into(), ..Default::default() };
    let listed = tracker.viewer.issues().list_issues(by_label).await.unwrap().into_inner();
    assert_eq!(listed.issues.len(), 1);
    assert_eq!(tracker.contents().await, before);

    // A call that replaces the labels may remove it.
    assert_eq!(names(&replace(&tracker.member, &issue, &[&kept]).await.unwrap().labels), ["kept"]);
}

/// Begins a deletion with a request id, and abandons the call when one issue still has the label. Returns the request.
async fn interrupt_deletion(tracker: &Tracker, label: &Label) -> DeleteLabelRequest {
    let lock = lock_issue(tracker, &issue_with_label(tracker, 7).await).await;
    let request = DeleteLabelRequest { request_id: Uuid::now_v7().to_string(), ..deletion(label) };
    let call = spawn_deletion(&tracker.admin, request.clone());
    wait_until_one_issue_is_left(tracker).await;
    call.abort();
    tracker.wait_until(lock_waiters!("= 0")).await;
    lock.batch_execute("COMMIT").await.unwrap();
    request
}

#[tokio::test]
async fn interrupted_deletion_is_completed_in_the_background_and_its_response_stored() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let request = interrupt_deletion(&tracker, &label).await;

    assert_eq!(resume_deletion(&tracker.db).await.unwrap(), None, "the last step was a moment ago");
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 1);
    tracker.sql("UPDATE labels SET delete_step_time = now() - interval '31 s'", &[]).await;
    resume_deletion(&tracker.db).await.unwrap();
    // The service may have been faster, which does the same every 30 s.
    tracker.wait_until("SELECT count(*) = 0 FROM labels").await;
    assert_deleted(&tracker, &label).await;

    let retried = spawn_deletion(&tracker.admin, request.clone()).await.unwrap().unwrap();
    assert_eq!(i64::from(retried.issue_count), ISSUES);
    let other = DeleteLabelRequest { force: false, ..request };
    let other = tracker.admin.labels().delete_label(other).await;
    assert_error(other, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_error(delete(&tracker.admin, &label.id, true).await, Code::NotFound, "NOT_FOUND");
}

#[tokio::test]
async fn service_completes_interrupted_deletions_when_it_starts() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    mark(&tracker, &label.id, 60.0).await;

    let _replica = tracker.start_replica().await;

    tracker.wait_until("SELECT count(*) = 0 FROM labels").await;
    assert_deleted(&tracker, &label).await;
}

#[tokio::test]
async fn retry_with_the_request_id_continues_an_interrupted_deletion() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let request = interrupt_deletion(&tracker, &label).await;

    for attempt in ["continues", "returns the stored response"] {
        let response = spawn_deletion(&tracker.admin, request.clone()).await.unwrap().unwrap();
        assert_eq!(i64::from(response.issue_count), ISSUES, "{attempt}");
    }
    assert_deleted(&tracker, &label).await;
    assert_eq!(tracker.count("SELECT count(*) FROM requests").await, 1);
}

#[tokio::test]
async fn concurrent_deletions_of_a_label_return_the_same_count() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let lock = lock_issue(&tracker, &issue_with_label(&tracker, 7).await).await;
    let keyed = DeleteLabelRequest { request_id: Uuid::now_v7().to_string(), ..deletion(&label) };
    let mut calls = vec![spawn_deletion(&tracker.admin, keyed.clone())];
    wait_until_one_issue_is_left(&tracker).await;
    // One retry, and calls of another user with and without a request id.
    calls.push(spawn_deletion(&tracker.admin, keyed));
    calls.push(spawn_deletion(&tracker.member, deletion(&label)));
    tracker.wait_until(lock_waiters!("> 1")).await;

    lock.batch_execute("COMMIT").await.unwrap();

    let outcomes = join_all(calls).await;
    let counts: Vec<_> = outcomes.into_iter().map(|call| call.unwrap().map(|deleted| deleted.issue_count)).collect();
    for count in &counts[..2] {
        assert_eq!(count.as_ref().ok(), Some(&(ISSUES as i32)), "{counts:?}");
    }
    // It has not seen the label if its first statement waited until the label was deleted.
    match &counts[2] {
        Ok(count) => assert_eq!(*count, ISSUES as i32),
        Err(status) => drop(assert_error::<()>(Err(status.clone()), Code::NotFound, "NOT_FOUND")),
    }
    assert_deleted(&tracker, &label).await;
}

#[tokio::test]
async fn label_that_a_call_adds_during_its_deletion_is_removed_again() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let issue = tracker.member.file("late").await;
    // The statements of AddIssueLabels, before the commit.
    let adding = tracker.session().await;
    let statements = format!(
        "BEGIN; SELECT FROM labels FOR KEY SHARE;
        UPDATE issues SET change_actor_id = reporter_id WHERE id = '{0}';
        INSERT INTO issue_labels VALUES ('{0}', '{1}');
        SELECT insert_label_events(reporter_id, ARRAY[id], ARRAY[version], NULL, ARRAY['{1}'::uuid])
        FROM issues WHERE id = '{0}'",
        issue.id, label.id
    );
    adding.batch_execute(&statements).await.unwrap();

    let deletion = spawn_deletion(&tracker.admin, deletion(&label));
    tracker.wait_until("SELECT count(*) = 0 FROM issue_labels").await;
    tracker.wait_until_blocked().await;
    adding.batch_execute("COMMIT").await.unwrap();

    assert_eq!(i64::from(deletion.await.unwrap().unwrap().issue_count), ISSUES + 1);
    let issue = tracker.member.get(&issue.id).await;
    assert_eq!((issue.version, &*issue.labels), (3, &[][..]));
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
}

#[tokio::test]
async fn error_of_a_label_in_use_counts_up_to_1000_issues() {
    let tracker = Tracker::start().await;
    let label = used_label(&tracker).await;
    let deleted = delete(&tracker.member, &label.id, false).await;
    let status = assert_error(deleted, Code::FailedPrecondition, "LABEL_IN_USE");
    assert!(status.message().contains("more than 1000 issues"), "{status:?}");
    assert_eq!(list(&tracker.viewer, 0, "").await.unwrap().labels, [label]);
}
