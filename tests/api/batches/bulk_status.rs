//! `BulkUpdateStatus`: atomic, writes only real changes, errors that name every bad id by its index.

use issue_tracker::pb::{
    BulkUpdateStatusRequest, BulkUpdateStatusResponse, DeleteIssueRequest, Issue, IssueView, Status,
    bulk_update_status_response::Result as Changed,
};
use tonic::Code;

use super::{create, get, ids, indices, new_id, numbered};
use crate::harness::{Client, Tracker, assert_error, assert_invalid, bad_fields, error_metadata, resources};

fn set(ids: &[String], status: Status) -> BulkUpdateStatusRequest {
    BulkUpdateStatusRequest { ids: ids.to_vec(), status: status.into(), ..Default::default() }
}

async fn send(client: &Client, request: BulkUpdateStatusRequest) -> Result<BulkUpdateStatusResponse, tonic::Status> {
    Ok(client.issues().bulk_update_status(request).await?.into_inner())
}

async fn delete(tracker: &Tracker, id: &str) {
    let request = DeleteIssueRequest { id: id.to_owned(), ..Default::default() };
    tracker.member.issues().delete_issue(request).await.unwrap();
}

/// Asserts that the issues are unchanged, and that there are no status events and no comments.
async fn assert_untouched(tracker: &Tracker, filed: &[Issue]) {
    assert_eq!(get(&tracker.viewer, &ids(filed), IssueView::Basic).await.unwrap(), filed);
    let related = "SELECT (SELECT count(*) FROM issue_events WHERE field = 'status') + (SELECT count(*) FROM comments)";
    assert_eq!(tracker.count(related).await, 0);
}

#[tokio::test]
async fn only_changed_issues_get_a_version_a_comment_and_an_event() {
    let tracker = Tracker::start().await;
    let mut issues = numbered(4);
    issues[1].status = Status::Closed.into();
    issues[3].status = Status::InProgress.into();
    let filed = create(&tracker.member, issues).await.unwrap();
    let requested: Vec<String> = [2, 1, 3, 0].map(|n: usize| filed[n].id.clone()).to_vec();

    let close = BulkUpdateStatusRequest { comment: "done".into(), ..set(&requested, Status::Closed) };
    let response = send(&tracker.admin, close).await.unwrap();

    assert_eq!(response.changed_count, 3);
    let expected = requested.iter().zip([true, false, true, true]);
    let expected = expected.map(|(id, changed)| Changed { id: id.clone(), version: 1 + i64::from(changed), changed });
    assert_eq!(response.results, expected.collect::<Vec<_>>());
    let stored = get(&tracker.viewer, &ids(&filed), IssueView::Full).await.unwrap();
    assert_eq!(stored.iter().map(|issue| issue.version).collect::<Vec<_>>(), [2, 1, 2, 2]);
    assert_eq!(stored[1], filed[1], "an issue that was closed before is unchanged");
    for issue in [&stored[0], &stored[2], &stored[3]] {
        assert_eq!((issue.status(), issue.close_time), (Status::Closed, issue.update_time));
        let comments: Vec<_> = issue.comments.iter().map(|c| (&*c.content, &*c.author_username)).collect();
        assert_eq!(comments, [("done", "admin")]);
    }
    let events = "SELECT string_agg(concat_ws(' ', old_value, new_value, u.username), ', ' ORDER BY issue_id)
        FROM issue_events e JOIN users u ON u.id = e.actor_id WHERE field = 'status' AND version = 2";
    assert_eq!(
        tracker.sql(events, &[]).await[0].get::<_, String>(0),
        "OPEN CLOSED admin, OPEN CLOSED admin, IN_PROGRESS CLOSED admin"
    );
}

#[tokio::test]
async fn setting_the_current_status_changes_nothing() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(3)).await.unwrap();
    let open = BulkUpdateStatusRequest { comment: "open".into(), ..set(&ids(&filed), Status::Open) };
    let response = send(&tracker.member, open).await.unwrap();
    assert_eq!(response.changed_count, 0);
    assert!(response.results.iter().all(|result| !result.changed && result.version == 1), "{response:?}");
    assert_untouched(&tracker, &filed).await;
}

#[tokio::test]
async fn one_call_changes_up_to_1000_issues() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(1_000)).await.unwrap();
    let close = BulkUpdateStatusRequest {
        expected_versions: vec![1; 1_000],
        comment: "done".to_owned(),
        ..set(&ids(&filed), Status::Closed)
    };
    let response = send(&tracker.member, close).await.unwrap();
    assert_eq!(response.changed_count, 1_000);
    assert_eq!(response.results.iter().map(|result| result.id.clone()).collect::<Vec<_>>(), ids(&filed));
    assert_eq!(tracker.count("SELECT count(*) FROM issues WHERE status = 3 AND version = 2").await, 1_000);
    assert_eq!(tracker.count("SELECT count(DISTINCT issue_id) FROM comments").await, 1_000);
}

#[tokio::test]
async fn invalid_request_names_its_fields_and_changes_nothing() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(2)).await.unwrap();
    let ids = ids(&filed);
    let good = set(&ids, Status::Closed);
    let with_ids = |ids: Vec<String>| BulkUpdateStatusRequest { ids, ..good.clone() };
    let with_status = |status: i32| BulkUpdateStatusRequest { status, ..good.clone() };
    let with_versions =
        |versions: &[i64]| BulkUpdateStatusRequest { expected_versions: versions.to_vec(), ..good.clone() };
    let with_comment = |comment: &str| BulkUpdateStatusRequest { comment: comment.to_owned(), ..good.clone() };
    let repeated = ids[0].to_uppercase();
    for (request, fields) in [
        (with_ids(vec![]), &["ids"][..]),
        (with_ids((0..1_001).map(|_| new_id()).collect()), &["ids"]),
        (with_ids(vec![ids[0].clone(), ids[1].clone(), repeated]), &["ids[2]"]),
        (with_ids(vec!["42".to_owned(), ids[1].clone(), String::new()]), &["ids[0]", "ids[2]"]),
        (with_status(0), &["status"]),
        (with_status(4), &["status"]),
        (with_status(-1), &["status"]),
        (with_versions(&[1]), &["expected_versions"]),
        (with_versions(&[1, 1, 1]), &["expected_versions"]),
        (with_versions(&[1, -1]), &["expected_versions[1]"]),
        (with_comment(" "), &["comment"]),
        (with_comment(&"c".repeat(16_385)), &["comment"]),
    ] {
        assert_invalid(send(&tracker.member, request).await, fields);
    }
    let all = BulkUpdateStatusRequest {
        ids: vec!["42".to_owned(), ids[0].clone()],
        status: 9,
        expected_versions: vec![-1, -2],
        comment: "\0".to_owned(),
        request_id: "not a UUID".to_owned(),
        validate_only: true,
    };
    let status = assert_error(send(&tracker.member, all).await, Code::InvalidArgument, "INVALID");
    let mut fields = bad_fields(&status);
    fields.sort();
    let expected = ["comment", "expected_versions[0]", "expected_versions[1]", "ids[0]", "request_id", "status"];
    assert_eq!(fields, expected);
    assert_untouched(&tracker, &filed).await;
}

#[tokio::test]
async fn missing_ids_take_precedence_over_stale_versions_and_these_over_deleted_issues() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(6)).await.unwrap();
    delete(&tracker, &filed[0].id).await;
    delete(&tracker, &filed[5].id).await;
    let mut requested = ids(&filed);
    // An existing issue between two missing ones.
    requested.insert(2, new_id());
    requested.insert(4, new_id());
    let close = |ids: &[String], expected_versions: &[i64]| BulkUpdateStatusRequest {
        expected_versions: expected_versions.to_vec(),
        comment: "done".to_owned(),
        ..set(ids, Status::Closed)
    };

    let missing = send(&tracker.member, close(&requested, &[0, 9, 0, 0, 0, 1, 7, 0])).await;
    let status = assert_error(missing, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["ids[2]", "ids[4]"]);
    assert_eq!(resources(&status), [&requested[2], &requested[4]].map(|id| ("issue".to_owned(), id.clone())));

    let stale = send(&tracker.member, close(&ids(&filed), &[0, 9, 0, 1, 7, 1])).await;
    let status = assert_error(stale, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(bad_fields(&status), ["ids[1]", "ids[4]", "ids[5]"]);
    assert_eq!(error_metadata(&status, "current_version").as_deref(), Some("1"));

    let deleted = send(&tracker.member, close(&ids(&filed), &[2, 1, 1, 0, 0, 0])).await;
    let status = assert_error(deleted, Code::FailedPrecondition, "ISSUE_STATE");
    for what in ["ids[0]", "ids[5]", &*filed[0].id] {
        assert!(status.message().contains(what), "{what} in {}", status.message());
    }

    assert_untouched(&tracker, &get(&tracker.viewer, &ids(&filed), IssueView::Basic).await.unwrap()).await;
    assert_eq!(tracker.count("SELECT count(*) FROM issues WHERE status <> 1").await, 0);
}

#[tokio::test]
async fn error_about_500_missing_ids_fits_in_the_trailers_and_has_all_indices() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(500)).await.unwrap();
    // Every second id is missing, so no range is longer than one index.
    let requested: Vec<String> = filed.iter().flat_map(|issue| [issue.id.clone(), new_id()]).collect();
    let missing: Vec<usize> = (0..1_000).filter(|n| n % 2 == 1).collect();

    let bulk = send(&tracker.member, set(&requested, Status::Closed)).await;
    let status = assert_error(bulk, Code::NotFound, "NOT_FOUND");
    assert_eq!(indices(&status), missing);
    assert!(!resources(&status).is_empty());
    let status = assert_error(get(&tracker.viewer, &requested, IssueView::Basic).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(indices(&status), missing);
    let stale = BulkUpdateStatusRequest { expected_versions: [7, 0].repeat(250), ..set(&ids(&filed), Status::Closed) };
    let status = assert_error(send(&tracker.member, stale).await, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(indices(&status), (0..500).filter(|n| n % 2 == 0).collect::<Vec<_>>());
    assert_untouched(&tracker, &filed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_updates_in_opposite_order_do_not_deadlock() {
    let tracker = Tracker::start().await;
    let ids = ids(&create(&tracker.member, numbered(200)).await.unwrap());
    let reversed: Vec<String> = ids.iter().rev().cloned().collect();
    for _ in 0..15 {
        let close = BulkUpdateStatusRequest { comment: "done".into(), ..set(&ids, Status::Closed) };
        let (first, second, third) = tokio::join!(
            send(&tracker.member, close),
            send(&tracker.member, set(&reversed, Status::InProgress)),
            send(&tracker.admin, set(&ids, Status::Open)),
        );
        for response in [first, second, third] {
            // Each call sees one snapshot: it changes all issues or none.
            let changed = response.unwrap().changed_count;
            assert!(changed == 0 || changed == 200, "{changed}");
        }
    }
    let distinct = "SELECT count(DISTINCT (status, version, reopen_count)) FROM issues";
    assert_eq!(tracker.count(distinct).await, 1);
    let without_event = "SELECT count(*) FROM issues i
        WHERE version <> 1 + (SELECT count(*) FROM issue_events e WHERE e.issue_id = i.id)";
    assert_eq!(tracker.count(without_event).await, 0);
}

#[tokio::test]
async fn repeated_update_returns_the_stored_response() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(2)).await.unwrap();
    let close = BulkUpdateStatusRequest {
        comment: "done".to_owned(),
        request_id: new_id(),
        ..set(&ids(&filed), Status::Closed)
    };
    let first = send(&tracker.member, close.clone()).await.unwrap();
    send(&tracker.member, set(&ids(&filed), Status::Open)).await.unwrap();

    assert_eq!(send(&tracker.member, close.clone()).await.unwrap(), first);
    let other = BulkUpdateStatusRequest { status: Status::InProgress.into(), ..close };
    assert_error(send(&tracker.member, other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");

    assert_eq!(tracker.count("SELECT count(*) FROM issues WHERE status = 1 AND version = 3").await, 2);
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 2);
}

#[tokio::test]
async fn dry_run_responds_as_the_real_call_and_changes_nothing() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(2)).await.unwrap();
    let dry_run = BulkUpdateStatusRequest {
        comment: "done".to_owned(),
        validate_only: true,
        ..set(&ids(&filed), Status::Closed)
    };
    let response = send(&tracker.member, dry_run.clone()).await.unwrap();
    assert_eq!((response.changed_count, response.results[1].version), (2, 2));
    let stale = BulkUpdateStatusRequest { expected_versions: vec![1, 2], ..dry_run.clone() };
    let status = assert_error(send(&tracker.member, stale).await, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(bad_fields(&status), ["ids[1]"]);
    assert_untouched(&tracker, &filed).await;
    let real = BulkUpdateStatusRequest { validate_only: false, ..dry_run };
    assert_eq!(send(&tracker.member, real).await.unwrap(), response);
}
