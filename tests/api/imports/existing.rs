//! Rows with the external id of an existing issue: `on_existing`.

use super::*;
use crate::lock_waiters;

/// Returns the issue with this external id.
async fn by_external_id(tracker: &Tracker, external_id: &str) -> Issue {
    let id: Uuid = tracker.sql("SELECT id FROM issues WHERE external_id = $1", &[&external_id]).await[0].get(0);
    tracker.viewer.get(&id.to_string()).await
}

/// Returns version, field, old and new value of each event of the issue.
async fn history(tracker: &Tracker, issue: &Issue) -> Vec<(i64, String, Option<String>, Option<String>)> {
    const SQL: &str = "SELECT version, field, old_value, new_value FROM issue_events
        WHERE issue_id = $1::text::uuid ORDER BY version, field, old_value, new_value";
    let rows = tracker.sql(SQL, &[&issue.id]).await;
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect()
}

/// Creates an issue with the external id `X-1` in which every field is set.
async fn full_issue(tracker: &Tracker) -> Issue {
    let (bug, ui) = (tracker.member.label("bug").await, tracker.member.label("ui").await);
    tracker.member.label("docs").await;
    let issue = Issue {
        title: "title".into(),
        description: "description".into(),
        priority: Priority::High.into(),
        status: IssueStatus::InProgress.into(),
        assignee_id: tracker.viewer.user.id.clone(),
        external_id: "X-1".into(),
        label_ids: vec![bug.id, ui.id],
        ..Issue::default()
    };
    tracker.admin.file_as(issue).await
}

fn label_names(issue: &Issue) -> Vec<&str> {
    issue.labels.iter().map(|label| &*label.name).collect()
}

#[tokio::test]
async fn existing_issue_is_a_row_error_by_default() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;

    let responses = import("title,external_id\nother,X-1\nnew,X-2\n").skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(1, "EXTERNAL_ID_TAKEN")]);
    assert_eq!(responses.outcome(), (1, 0, 0, 1));
    assert_eq!(by_external_id(&tracker, "X-1").await, issue);
}

#[tokio::test]
async fn skip_leaves_existing_and_deleted_issues_unchanged() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let deleted = Issue { title: "deleted".into(), external_id: "X-2".into(), ..Issue::default() };
    let deleted = tracker.member.file_as(deleted).await;
    let delete = issue_tracker::pb::DeleteIssueRequest { id: deleted.id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();

    let import =
        import("title,external_id,labels\nother,X-1,docs\nother,X-2,\nnew,X-3,\nno external id,,\n").skip_existing();
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.summary.state(), ImportState::Committed);
    assert_eq!(responses.outcome(), (2, 0, 2, 0));
    assert_eq!(by_external_id(&tracker, "X-1").await, issue);
    assert_eq!(by_external_id(&tracker, "X-2").await.version, 2);
}

#[tokio::test]
async fn update_changes_only_the_columns_of_the_file() {
    let tracker = Tracker::start().await;
    type Change = fn(&mut Issue, &Tracker);
    let cases: [(&str, &str, Change); 6] = [
        ("title", "other", |issue, _| issue.title = "other".into()),
        ("description", "other", |issue, _| issue.description = "other".into()),
        ("priority", "low", |issue, _| issue.priority = Priority::Low.into()),
        ("status", "open", |issue, _| issue.status = IssueStatus::Open.into()),
        ("assignee", "MEMBER", |issue, tracker| issue.assignee_id = tracker.member.user.id.clone()),
        ("labels", "ui; Docs", |issue, _| {
            issue.labels.retain(|label| label.name != "bug");
        }),
    ];
    let mut expected = full_issue(&tracker).await;
    for (column, value, change) in cases {
        let responses =
            import(format!("external_id,{column}\nX-1,{value}\n")).update().by(&tracker.member).await.unwrap();

        assert_eq!(responses.outcome(), (0, 1, 0, 0), "{column}: {responses:?}");
        change(&mut expected, &tracker);
        let mut issue = by_external_id(&tracker, "X-1").await;
        assert_eq!(issue.version, expected.version + 1, "{column}");
        if column == "labels" {
            assert_eq!(label_names(&issue), ["docs", "ui"]);
            issue.labels.retain(|label| label.name != "docs");
        }
        (expected.version, expected.update_time) = (issue.version, issue.update_time);
        assert_eq!(issue, expected, "{column}");
    }
}

#[tokio::test]
async fn update_with_an_empty_field_clears_all_but_the_status() {
    let tracker = Tracker::start().await;
    full_issue(&tracker).await;

    let file = "external_id,description,priority,status,assignee,labels\nX-1,,,,,\n";
    let responses = import(file).update().by(&tracker.member).await.unwrap();

    assert_eq!(responses.outcome(), (0, 1, 0, 0));
    let issue = by_external_id(&tracker, "X-1").await;
    assert_eq!((&*issue.title, &*issue.description, issue.priority()), ("title", "", Priority::Unspecified));
    assert_eq!((&*issue.assignee_id, issue.labels.len(), issue.status()), ("", 0, IssueStatus::InProgress));
}

#[tokio::test]
async fn update_cannot_clear_a_title() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;

    let responses = import("external_id,title\nX-1,\n").update().by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(1, "REQUIRED")]);
    assert_eq!(by_external_id(&tracker, "X-1").await, issue);
}

#[tokio::test]
async fn file_without_titles_can_update_but_not_create() {
    let tracker = Tracker::start().await;
    full_issue(&tracker).await;

    let file = "external_id,priority\nX-1,low\nX-2,low\n,low\n";
    let responses = import(file).skip_invalid().update().by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(2, "REQUIRED"), (3, "REQUIRED")]);
    assert!(responses.errors.iter().all(|error| error.column == "title"));
    assert_eq!(responses.outcome(), (0, 1, 0, 2));
    let refused = import(file).skip_existing().by(&tracker.member).await;
    crate::harness::assert_invalid(refused, &["header.title"]);
}

#[tokio::test]
async fn update_is_one_version_with_events() {
    let tracker = Tracker::start().await;
    let before = full_issue(&tracker).await;

    let file = "external_id,title,status,labels\nX-1,other,closed,docs;ui\n";
    import(file).update().by(&tracker.member).await.unwrap();

    let issue = by_external_id(&tracker, "X-1").await;
    assert_eq!((issue.version, issue.status()), (2, IssueStatus::Closed));
    assert_eq!(issue.close_time, issue.update_time);
    let label = |issue: &Issue, name: &str| Some(issue.labels.iter().find(|l| l.name == name).unwrap().id.clone());
    let text = |text: &str| Some(text.to_owned());
    let events = [
        (2, "label".to_owned(), label(&before, "bug"), None),
        (2, "label".to_owned(), None, label(&issue, "docs")),
        (2, "status".to_owned(), text("IN_PROGRESS"), text("CLOSED")),
        (2, "title".to_owned(), text("title"), text("other")),
    ];
    assert_eq!(history(&tracker, &issue).await, events);
    let actors = "SELECT count(*) FROM issue_events WHERE actor_id <> (SELECT id FROM users WHERE username = 'member')";
    assert_eq!(tracker.count(actors).await, 0);
}

#[tokio::test]
async fn repeated_update_changes_nothing() {
    let tracker = Tracker::start().await;
    full_issue(&tracker).await;
    let file = "external_id,title,description,status,priority,assignee,labels,create_time,close_time\n\
        X-1,other,,closed,low,member,ui,,\n\
        X-2,new,text,closed,,,docs; bug,2020-01-01T00:00:00Z,2020-01-02T00:00:00Z\n";
    let first = import(file).update().by(&tracker.member).await.unwrap();
    assert_eq!(first.outcome(), (1, 1, 0, 0));
    let before = issue_rows(&tracker).await;
    let events = tracker.count("SELECT count(*) FROM issue_events").await;

    for import in [import(file).update(), import(file).update().skip_invalid()] {
        let again = import.by(&tracker.member).await.unwrap();

        assert_eq!(again.outcome(), (0, 0, 2, 0));
        assert_eq!(issue_rows(&tracker).await, before);
        assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, events);
    }
}

#[tokio::test]
async fn update_ignores_create_time_and_close_time() {
    let tracker = Tracker::start().await;
    let before = full_issue(&tracker).await;

    let file = "external_id,status,create_time,close_time\nX-1,closed,2020-01-01T00:00:00Z,2020-01-02T00:00:00Z\n";
    import(file).update().by(&tracker.member).await.unwrap();

    let issue = by_external_id(&tracker, "X-1").await;
    assert_eq!((issue.create_time, issue.close_time), (before.create_time, issue.update_time));
}

#[tokio::test]
async fn update_that_reopens_an_issue_increments_reopen_count() {
    let tracker = Tracker::start().await;
    import("title,external_id,status\na,X-1,closed\n").by(&tracker.member).await.unwrap();

    import("external_id,status\nX-1,open\n").update().by(&tracker.member).await.unwrap();

    let issue = by_external_id(&tracker, "X-1").await;
    assert_eq!((issue.version, issue.reopen_count, issue.close_time), (2, 1, None));
}

#[tokio::test]
async fn update_of_a_deleted_issue_is_a_row_error() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;
    let delete = issue_tracker::pb::DeleteIssueRequest { id: issue.id, ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();

    let responses = import("external_id,title\nX-1,other\n").update().by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(1, "ISSUE_DELETED")]);
    assert_eq!(responses.errors[0].column, "external_id");
    assert_eq!(responses.summary.state(), ImportState::Rejected);
    assert_eq!(by_external_id(&tracker, "X-1").await.version, 2);
}

#[tokio::test]
async fn second_row_for_an_issue_is_a_duplicate_within_and_across_batches() {
    for rows_between in [0, 6_000] {
        let tracker = Tracker::start().await;
        full_issue(&tracker).await;
        let mut file = "title,external_id\nother,X-1\nnew,X-2\n".to_owned();
        file.extend((0..rows_between).map(|n| format!("issue {n},\n")));
        file += "third,X-1\nfourth,X-2\n";
        let duplicates = [(rows_between + 3, "DUPLICATE_EXTERNAL_ID"), (rows_between + 4, "DUPLICATE_EXTERNAL_ID")];

        for import in [import(&*file).update(), import(&*file).skip_existing()] {
            let rejected = import.clone().by(&tracker.member).await.unwrap();
            assert_eq!(rejected.codes(), duplicates);
            assert_eq!((rejected.summary.state(), rejected.outcome()), (ImportState::Rejected, (0, 0, 0, 2)));
            let dry_run = import.skip_invalid().validate_only().by(&tracker.member).await.unwrap();
            assert_eq!(dry_run.codes(), duplicates);
        }
        let responses = import(&*file).skip_invalid().update().by(&tracker.member).await.unwrap();
        assert_eq!(responses.codes(), duplicates);
        assert_eq!(by_external_id(&tracker, "X-1").await.title, "other");
    }
}

#[tokio::test]
async fn rejected_update_changes_nothing() {
    let tracker = Tracker::start().await;
    let issue = full_issue(&tracker).await;

    let import = import("external_id,title,labels\nX-1,other,docs\nX-2,new,nope\n").update();
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.summary.state(), ImportState::Rejected);
    assert_eq!(by_external_id(&tracker, "X-1").await, issue);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 0);
    assert_eq!(tracker.count("SELECT count(*) FROM import_issues").await, 0);
}

#[tokio::test]
async fn issue_deleted_while_the_update_is_blocked_is_a_row_error() {
    let tracker = Tracker::start().await;
    full_issue(&tracker).await;
    let other = tracker.session().await;
    let delete =
        format!("BEGIN; UPDATE issues SET delete_time = now(), change_actor_id = '{}'", tracker.member.user.id);
    other.batch_execute(&delete).await.unwrap();
    let update = import("external_id,title\nX-1,other\nX-2,new\n").skip_invalid().update();
    let update = update.spawn_by(&tracker.member);
    tracker.wait_until(lock_waiters!("> 0")).await;
    other.batch_execute("COMMIT").await.unwrap();

    let responses = update.await.unwrap().unwrap();

    assert_eq!(responses.codes(), [(1, "ISSUE_DELETED")]);
    assert_eq!(responses.outcome(), (1, 0, 0, 1));
    assert_eq!(by_external_id(&tracker, "X-1").await.title, "title");
}

#[tokio::test]
async fn change_committed_while_the_update_is_blocked_is_kept() {
    let tracker = Tracker::start().await;
    full_issue(&tracker).await;
    let other = tracker.session().await;
    let change =
        format!("BEGIN; UPDATE issues SET description = 'theirs', change_actor_id = '{}'", tracker.admin.user.id);
    other.batch_execute(&change).await.unwrap();
    let update = import("external_id,title\nX-1,ours\n").update().spawn_by(&tracker.member);
    tracker.wait_until(lock_waiters!("> 0")).await;
    other.batch_execute("COMMIT").await.unwrap();

    assert_eq!(update.await.unwrap().unwrap().outcome(), (0, 1, 0, 0));
    let issue = by_external_id(&tracker, "X-1").await;
    assert_eq!((&*issue.title, &*issue.description, issue.version), ("ours", "theirs", 3));
}
