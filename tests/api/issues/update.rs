//! `UpdateIssue`: field masks, versions, comments of an update, and concurrent updates.

use issue_tracker::pb::{
    AddIssueLabelsRequest, BulkUpdateStatusRequest, DeleteIssueRequest, Issue, Priority, Status, UpdateIssueRequest,
};
use prost_types::FieldMask;
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use super::titled;
use crate::harness::{Client, Tracker, assert_error, assert_invalid, bad_fields, error_metadata, resources};

/// Returns a request that sets these values; without paths it has no mask.
fn change(id: &str, values: Issue, paths: &[&str]) -> UpdateIssueRequest {
    let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
    UpdateIssueRequest {
        issue: Some(Issue { id: id.to_owned(), ..values }),
        update_mask: (!paths.is_empty()).then_some(FieldMask { paths }),
        ..Default::default()
    }
}

async fn send(client: &Client, request: UpdateIssueRequest) -> Result<Issue, tonic::Status> {
    Ok(client.issues().update_issue(request).await?.into_inner())
}

/// Creates an issue in which every clearable field is set.
async fn full_issue(tracker: &Tracker) -> Issue {
    let issue = Issue {
        description: "it crashes".to_owned(),
        priority: Priority::High.into(),
        assignee_id: tracker.viewer.user.id.clone(),
        external_id: "JIRA-1".to_owned(),
        ..titled("crash")
    };
    tracker.member.file_as(issue).await
}

/// Asserts that the issue and its history are unchanged.
async fn assert_unchanged(tracker: &Tracker, issue: &Issue) {
    assert_eq!(tracker.member.get(&issue.id).await, *issue);
    let events = tracker.sql("SELECT FROM issue_events WHERE version > $1", &[&issue.version]).await;
    assert!(events.is_empty());
}

#[tokio::test]
async fn stale_version_is_aborted_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash on start").await;
    let update = |title: &str| UpdateIssueRequest { expected_version: 1, ..change(&issue.id, titled(title), &[]) };
    let updated = send(&tracker.member, update("crash on stop")).await.unwrap();
    assert_eq!((updated.version, updated.title.as_str()), (2, "crash on stop"));

    let stale = send(&tracker.member, update("no crash")).await;

    let status = assert_error(stale, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(error_metadata(&status, "current_version").as_deref(), Some("2"));
    assert_eq!(tracker.member.get(&issue.id).await, updated);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 1);
}

#[tokio::test]
async fn without_a_mask_only_populated_fields_are_set() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let mut request = change(&issue.id, Issue { priority: Priority::Low.into(), ..titled("crash on stop") }, &[]);

    let updated = send(&tracker.member, request.clone()).await.unwrap();
    let expected = Issue {
        title: "crash on stop".to_owned(),
        priority: Priority::Low.into(),
        version: 2,
        update_time: updated.update_time,
        ..issue
    };
    assert_eq!(updated, expected);
    assert_eq!(tracker.member.get(&updated.id).await, expected);

    request.issue.as_mut().unwrap().title = "crash".to_owned();
    request.update_mask = Some(FieldMask::default());
    let updated = send(&tracker.member, request).await.unwrap();
    assert_eq!((&*updated.title, &*updated.description), ("crash", "it crashes"), "an empty mask equals no mask");
}

#[tokio::test]
async fn masked_unset_field_is_cleared_and_others_are_unchanged() {
    let tracker = Tracker::start().await;
    let mut expected = full_issue(&tracker).await;
    for path in ["description", "priority", "assignee_id", "external_id"] {
        // Populated fields outside the mask are ignored, even when they are invalid.
        let values = Issue { status: Status::Closed.into(), ..titled(&"x".repeat(300)) };
        let updated = send(&tracker.member, change(&expected.id, values, &[path])).await.unwrap();
        match path {
            "description" => expected.description.clear(),
            "priority" => expected.priority = 0,
            "assignee_id" => expected.assignee_id.clear(),
            _ => expected.external_id.clear(),
        }
        expected = Issue { version: expected.version + 1, update_time: updated.update_time, ..expected };
        assert_eq!(updated, expected, "{path}");
        assert_eq!(tracker.member.get(&updated.id).await, expected);
    }
    assert_eq!(
        tracker.count("SELECT count(*) FROM issue_events WHERE coalesce(new_value, '') IN ('', 'NONE')").await,
        4
    );
}

#[tokio::test]
async fn star_mask_sets_every_field_and_clears_unset_ones() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let values = Issue { status: Status::InProgress.into(), ..titled("crash on stop") };

    let updated = send(&tracker.member, change(&issue.id, values.clone(), &["*"])).await.unwrap();

    let expected = Issue {
        id: issue.id,
        reporter_id: issue.reporter_id,
        version: 2,
        create_time: issue.create_time,
        update_time: updated.update_time,
        ..values
    };
    assert_eq!(updated, expected);
}

#[tokio::test]
async fn title_and_status_cannot_be_cleared() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    for (paths, fields) in [
        (&["title"][..], &["issue.title"][..]),
        (&["status"], &["issue.status"]),
        (&["*"], &["issue.title", "issue.status"]),
    ] {
        let cleared = send(&tracker.member, change(&issue.id, Issue::default(), paths)).await;
        assert_invalid(cleared, fields);
    }
    assert_unchanged(&tracker, &issue).await;
}

#[tokio::test]
async fn unknown_and_read_only_paths_are_all_named() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let paths = [
        "titel",
        "title",
        "version",
        "reporter_id",
        "label_ids",
        "create_time",
        "issue.title",
        "",
        "TITLE",
        "*",
        "id",
        "title;DROP TABLE issues",
    ];
    let status = assert_error(
        send(&tracker.member, change(&issue.id, titled("crash on stop"), &paths)).await,
        Code::InvalidArgument,
        "INVALID",
    );
    let bad = paths.iter().enumerate().filter(|(_, path)| **path != "title");
    let expected: Vec<String> = bad.map(|(index, _)| format!("update_mask.paths[{index}]")).collect();
    assert_eq!(bad_fields(&status), expected);
    assert!(status.message().contains("\"titel\"") && status.message().contains("assignee_id"), "{status:?}");
    assert_unchanged(&tracker, &issue).await;
}

#[tokio::test]
async fn duplicate_mask_path_is_one_change() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let update = change(&issue.id, titled("crash on stop"), &["title", "title"]);
    assert_eq!(send(&tracker.member, update).await.unwrap().version, 2);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 1);
}

#[tokio::test]
async fn all_violations_of_an_update_are_reported() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let update = UpdateIssueRequest {
        expected_version: -1,
        comment: "c".repeat(16_385),
        request_id: "again".to_owned(),
        ..change(
            "crash",
            Issue {
                description: "d".repeat(65_537),
                status: 4,
                priority: 5,
                assignee_id: "alice".to_owned(),
                external_id: "x".repeat(256),
                ..titled(" ")
            },
            &[],
        )
    };
    let status = assert_error(send(&tracker.member, update).await, Code::InvalidArgument, "INVALID");
    let mut fields = bad_fields(&status);
    fields.sort();
    let expected = [
        "comment",
        "expected_version",
        "issue.assignee_id",
        "issue.description",
        "issue.external_id",
        "issue.id",
        "issue.priority",
        "issue.status",
        "issue.title",
        "request_id",
    ];
    assert_eq!(fields, expected);
    let empty = send(&tracker.member, change(&issue.id, Issue::default(), &[])).await;
    assert_invalid(empty, &["update_mask"]);
    assert_unchanged(&tracker, &issue).await;
}

#[tokio::test]
async fn update_to_equal_values_changes_nothing() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let updated = send(&tracker.member, change(&issue.id, issue.clone(), &["*"])).await.unwrap();
    assert_eq!(updated, issue);
    assert_unchanged(&tracker, &issue).await;
}

#[tokio::test]
async fn version_grows_by_one_however_many_fields_change() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let values = Issue { status: Status::InProgress.into(), priority: 1, ..titled("crash on stop") };
    assert_eq!(send(&tracker.member, change(&issue.id, values, &[])).await.unwrap().version, 2);
    let events = "SELECT string_agg(field, ' ' ORDER BY field) FROM issue_events WHERE version = 2";
    assert_eq!(tracker.sql(events, &[]).await[0].get::<_, String>(0), "priority status title");
}

#[tokio::test]
async fn comment_is_added_with_a_change_or_alone_without_a_new_version() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let update = change(&issue.id, titled("crash on stop"), &[]);
    let updated = send(&tracker.member, UpdateIssueRequest { comment: "seen".into(), ..update }).await.unwrap();
    assert_eq!((updated.version, updated.comment_count), (2, 1));

    let comment_only = UpdateIssueRequest { comment: "again".into(), ..change(&issue.id, Issue::default(), &[]) };
    let commented = send(&tracker.admin, comment_only).await.unwrap();

    assert_eq!((commented.version, commented.comment_count, commented.update_time), (2, 2, updated.update_time));
    let stored = tracker.member.get(&issue.id).await;
    let comments: Vec<_> = stored.comments.iter().map(|c| (&*c.content, &*c.author_username)).collect();
    assert_eq!(comments, [("seen", "member"), ("again", "admin")]);
    assert_eq!(Issue { comments: Vec::new(), ..stored }, commented);
}

#[tokio::test]
async fn change_and_comment_are_written_together_or_not_at_all() {
    let tracker = Tracker::start().await;
    tracker.member.file_as(Issue { external_id: "JIRA-2".to_owned(), ..titled("other") }).await;
    let issue = full_issue(&tracker).await;
    let with = |values: Issue, comment: &str| UpdateIssueRequest {
        comment: comment.to_owned(),
        ..change(&issue.id, values, &[])
    };

    let stale = UpdateIssueRequest { expected_version: 9, ..with(titled("x"), "seen") };
    assert_error(send(&tracker.member, stale).await, Code::Aborted, "VERSION_MISMATCH");
    let unknown = Issue { assignee_id: Uuid::now_v7().to_string(), ..Issue::default() };
    assert_error(send(&tracker.member, with(unknown, "seen")).await, Code::NotFound, "NOT_FOUND");
    let taken = Issue { external_id: "JIRA-2".to_owned(), ..Issue::default() };
    assert_error(send(&tracker.member, with(taken, "seen")).await, Code::AlreadyExists, "ALREADY_EXISTS");
    for comment in [" \n", "a\0b", &"é".repeat(16_385)] {
        assert_invalid(send(&tracker.member, with(titled("x"), comment)).await, &["comment"]);
    }

    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 0);
    assert_unchanged(&tracker, &issue).await;
    send(&tracker.member, with(titled("x"), &"é".repeat(16_384))).await.unwrap();
}

#[tokio::test]
async fn missing_assignee_is_not_found_and_named() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let missing_id = Uuid::now_v7().to_string();
    let update = change(&issue.id, Issue { assignee_id: missing_id.clone(), ..titled("x") }, &[]);
    let status = assert_error(send(&tracker.member, update).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["issue.assignee_id"]);
    assert_eq!(resources(&status), [("user".to_owned(), missing_id)]);
    assert_unchanged(&tracker, &issue).await;
}

#[tokio::test]
async fn external_id_of_another_issue_is_taken_until_it_is_cleared() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let other = tracker.member.file("other").await;
    let with_external_id = |external_id: &str| Issue { external_id: external_id.to_owned(), ..Issue::default() };

    let taken = send(&tracker.member, change(&other.id, with_external_id("JIRA-1"), &[])).await;
    let status = assert_error(taken, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(bad_fields(&status), ["issue.external_id"]);
    assert_eq!(resources(&status), [("issue".to_owned(), "JIRA-1".to_owned())]);
    assert_unchanged(&tracker, &other).await;

    send(&tracker.member, change(&issue.id, Issue::default(), &["external_id"])).await.unwrap();
    let updated = send(&tracker.member, change(&other.id, with_external_id("JIRA-1"), &[])).await.unwrap();
    assert_eq!(updated.external_id, "JIRA-1");
}

#[tokio::test]
async fn deleted_issue_cannot_be_updated_or_commented() {
    let tracker = Tracker::start().await;
    let id = full_issue(&tracker).await.id;
    let delete = DeleteIssueRequest { id: id.clone(), ..Default::default() };
    let deleted = tracker.member.issues().delete_issue(delete).await.unwrap().into_inner();
    for update in [
        change(&id, titled("x"), &[]),
        change(&id, titled("crash"), &[]),
        UpdateIssueRequest { expected_version: 2, ..change(&id, titled("x"), &[]) },
        UpdateIssueRequest { comment: "seen".into(), ..change(&id, Issue::default(), &[]) },
    ] {
        assert_error(send(&tracker.member, update).await, Code::FailedPrecondition, "ISSUE_STATE");
    }
    assert_unchanged(&tracker, &deleted).await;
}

#[tokio::test]
async fn close_time_and_reopen_count_follow_the_status() {
    let tracker = Tracker::start().await;
    let mut issue = tracker.member.file("crash").await;
    for (status, closed, reopen_count) in [
        (Status::InProgress, false, 0),
        (Status::Closed, true, 0),
        (Status::Open, false, 1),
        (Status::Closed, true, 1),
        (Status::InProgress, false, 2),
        (Status::Open, false, 2),
    ] {
        let update = change(&issue.id, Issue { status: status.into(), ..Issue::default() }, &[]);
        issue = send(&tracker.member, update).await.unwrap();
        assert_eq!((issue.status(), issue.reopen_count), (status, reopen_count));
        assert_eq!(issue.close_time, if closed { issue.update_time } else { None });
    }
    let close = change(&issue.id, Issue { status: Status::Closed.into(), ..Issue::default() }, &[]);
    let closed = send(&tracker.member, close.clone()).await.unwrap();
    send(&tracker.member, change(&issue.id, titled("other"), &[])).await.unwrap();
    let again = send(&tracker.member, close).await.unwrap();
    assert_eq!(again.close_time, closed.close_time, "closing a closed issue changes nothing");
}

#[tokio::test]
async fn exactly_one_of_concurrent_updates_with_the_same_expected_version_succeeds() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let (iterations, callers) = (25, 8);
    for iteration in 1..=iterations {
        let mut calls = JoinSet::new();
        for caller in 0..callers {
            let client = tracker.member.clone();
            let update = UpdateIssueRequest {
                expected_version: iteration,
                comment: if caller % 2 == 0 { "mine".to_owned() } else { String::new() },
                ..change(&issue.id, titled(&format!("{iteration} by {caller}")), &[])
            };
            calls.spawn(async move { send(&client, update).await });
        }
        let (succeeded, failed): (Vec<_>, Vec<_>) = calls.join_all().await.into_iter().partition(Result::is_ok);
        assert_eq!((succeeded.len(), failed.len()), (1, callers - 1));
        for failed in failed {
            let status = assert_error(failed, Code::Aborted, "VERSION_MISMATCH");
            assert_eq!(error_metadata(&status, "current_version"), Some((iteration + 1).to_string()));
        }
        let stored = tracker.member.get(&issue.id).await;
        assert_eq!((stored.title, stored.version), (succeeded[0].as_ref().unwrap().title.clone(), iteration + 1));
    }
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, iterations);
}

#[tokio::test]
async fn concurrent_updates_of_different_fields_are_all_applied() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let iterations = 20;
    for iteration in 1..=iterations {
        let text = format!("{iteration}");
        let values = [
            titled(&text),
            Issue { description: text.clone(), ..Issue::default() },
            Issue { external_id: text.clone(), ..Issue::default() },
            Issue { status: 1 + iteration % 3, ..Issue::default() },
            Issue { priority: 1 + iteration % 4, ..Issue::default() },
        ];
        let mut calls = JoinSet::new();
        for values in values {
            let (client, update) = (tracker.member.clone(), change(&issue.id, values, &[]));
            calls.spawn(async move { send(&client, update).await.unwrap() });
        }
        calls.join_all().await;
        let stored = tracker.member.get(&issue.id).await;
        assert_eq!([&stored.title, &stored.description, &stored.external_id], [&text; 3]);
        assert_eq!((stored.status, stored.priority), (1 + iteration % 3, 1 + iteration % 4));
    }
    let stored = tracker.member.get(&issue.id).await;
    // Each update changes one field, so each event has its own version.
    let changes = tracker.count("SELECT count(DISTINCT version) FROM issue_events").await;
    let events = tracker.count("SELECT count(*) FROM issue_events").await;
    assert_eq!((stored.version, changes), (1 + events, events));
}

/// Updates the issue with `set` in a transaction, starts `call`, and commits the transaction once the call is blocked on
/// the row lock. Returns the call's result.
async fn call_during_update<T: Send + 'static>(
    tracker: &Tracker,
    id: &str,
    set: &str,
    call: impl Future<Output = T> + Send + 'static,
) -> T {
    let session = tracker.session().await;
    let actor = &tracker.admin.user.id;
    let sql = format!("BEGIN; UPDATE issues SET {set}, change_actor_id = '{actor}' WHERE id = '{id}'");
    session.batch_execute(&sql).await.unwrap();
    let call = tokio::spawn(call);
    tracker.wait_until_blocked().await;
    session.batch_execute("COMMIT").await.unwrap();
    call.await.unwrap()
}

#[tokio::test]
async fn blocked_update_applies_to_the_committed_state() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    // These values equal the initial ones: the update changes something only after the concurrent update.
    let update = change(&issue.id, Issue { status: Status::Open.into(), ..titled("crash") }, &[]);
    let client = tracker.member.clone();

    let set = "status = 3, title = 'closed meanwhile'";
    let updated =
        call_during_update(&tracker, &issue.id, set, async move { send(&client, update).await }).await.unwrap();

    assert_eq!((updated.status(), &*updated.title), (Status::Open, "crash"));
    assert_eq!((updated.version, updated.reopen_count), (3, 1));
    assert_eq!(tracker.member.get(&issue.id).await, updated);
}

#[tokio::test]
async fn blocked_bulk_update_applies_to_the_committed_state() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let mut issues = tracker.member.issues();
    let reopen =
        BulkUpdateStatusRequest { ids: vec![issue.id.clone()], status: Status::Open.into(), ..Default::default() };

    let bulk = async move { issues.bulk_update_status(reopen).await };
    let response = call_during_update(&tracker, &issue.id, "status = 3", bulk).await.unwrap().into_inner();

    assert_eq!((response.changed_count, response.results[0].version), (1, 3));
    assert_eq!(tracker.member.get(&issue.id).await.status(), Status::Open);
}

#[tokio::test]
async fn blocked_update_returns_the_issue_as_of_its_version() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let bug = tracker.member.label("bug").await;
    let ui = tracker.member.label("ui").await;
    let label = AddIssueLabelsRequest { issue_id: issue.id.clone(), label_ids: vec![ui.id], ..Default::default() };
    tracker.member.labels().add_issue_labels(label).await.unwrap();
    let (client, update) = (tracker.member.clone(), change(&issue.id, titled("crash on stop"), &[]));

    let session = tracker.session().await;
    let (id, actor, bug) = (&issue.id, &tracker.admin.user.id, bug.id);
    let add_label = format!(
        "BEGIN; UPDATE issues SET change_actor_id = '{actor}' WHERE id = '{id}';
         INSERT INTO issue_labels VALUES ('{id}', '{bug}')"
    );
    session.batch_execute(&add_label).await.unwrap();
    let call = tokio::spawn(async move { send(&client, update).await });
    tracker.wait_until_blocked().await;
    session.batch_execute("COMMIT").await.unwrap();
    let updated = call.await.unwrap().unwrap();

    assert_eq!((updated.version, updated.labels.len()), (4, 2));
    assert_eq!(tracker.member.get(&issue.id).await, updated);
}

#[tokio::test]
async fn dry_run_of_an_update_has_the_outcome_of_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let dry = UpdateIssueRequest {
        comment: "seen".to_owned(),
        validate_only: true,
        ..change(&issue.id, titled("crash on stop"), &[])
    };
    let validated = send(&tracker.member, dry.clone()).await.unwrap();
    assert_eq!((&*validated.title, validated.version, validated.comment_count), ("crash on stop", 2, 1));
    let stale = send(&tracker.member, UpdateIssueRequest { expected_version: 7, ..dry }).await;
    assert_error(stale, Code::Aborted, "VERSION_MISMATCH");
    assert_unchanged(&tracker, &issue).await;
}
