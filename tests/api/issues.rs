//! `IssueService`: creating, reading, deleting and undeleting single issues.

mod update;

use issue_tracker::pb::{
    CreateIssueRequest, DeleteIssueRequest, GetIssueRequest, Issue, IssueView, Label, ListIssuesRequest, Priority,
    Status, UndeleteIssueRequest, UpdateIssueRequest,
};
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_error, assert_invalid, bad_fields, error_metadata, resources};

/// Texts that would change or break a statement if they were interpolated into SQL.
const SQL_TEXTS: [&str; 5] = [
    "'; DROP TABLE issues; --",
    "x' OR '1'='1",
    r#"\'; SELECT pg_sleep(10); --"#,
    "$1 $2 %s ? :name {0}",
    r#"$$; DELETE FROM users; $$ "quoted" \" /* */"#,
];

fn titled(title: &str) -> Issue {
    Issue { title: title.to_owned(), ..Issue::default() }
}

fn create(issue: Issue) -> CreateIssueRequest {
    CreateIssueRequest { issue: Some(issue), ..Default::default() }
}

async fn try_create(client: &Client, issue: Issue) -> Result<Issue, tonic::Status> {
    Ok(client.issues().create_issue(create(issue)).await?.into_inner())
}

async fn titles(client: &Client, filter: &str, show_deleted: bool) -> Vec<String> {
    let request = ListIssuesRequest { filter: filter.to_owned(), show_deleted, ..Default::default() };
    let response = client.issues().list_issues(request).await.unwrap().into_inner();
    response.issues.into_iter().map(|issue| issue.title).collect()
}

async fn assert_no_issues(tracker: &Tracker) {
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
}

#[tokio::test]
async fn only_the_title_is_required_and_other_fields_have_defaults() {
    let tracker = Tracker::start().await;

    let issue = tracker.member.file("crash on start").await;

    assert_eq!(issue.id.parse::<Uuid>().unwrap().get_version_num(), 7);
    assert!(issue.create_time.is_some());
    let expected = Issue {
        id: issue.id.clone(),
        title: "crash on start".to_owned(),
        status: Status::Open.into(),
        priority: Priority::Unspecified.into(),
        reporter_id: tracker.member.user.id.clone(),
        version: 1,
        create_time: issue.create_time,
        update_time: issue.create_time,
        ..Issue::default()
    };
    assert_eq!(issue, expected);
    assert_eq!(tracker.viewer.get(&issue.id).await, expected);
}

#[tokio::test]
async fn every_field_of_a_new_issue_is_stored_and_its_labels_are_sorted_by_name() {
    let tracker = Tracker::start().await;
    let mut label_ids = Vec::new();
    for name in ["cherry", "Banana", "apple"] {
        label_ids.push(tracker.member.label(name).await.id);
    }

    let issue = tracker
        .member
        .file_as(Issue {
            description: "it crashes".to_owned(),
            status: Status::InProgress.into(),
            priority: Priority::Critical.into(),
            assignee_id: tracker.viewer.user.id.clone(),
            external_id: "JIRA-1".to_owned(),
            label_ids,
            ..titled("crash")
        })
        .await;

    assert_eq!((&*issue.description, &*issue.external_id), ("it crashes", "JIRA-1"));
    assert_eq!((issue.status(), issue.priority()), (Status::InProgress, Priority::Critical));
    assert_eq!(issue.assignee_id, tracker.viewer.user.id);
    let names: Vec<&str> = issue.labels.iter().map(|label| &*label.name).collect();
    assert_eq!(names, ["apple", "Banana", "cherry"]);
    assert!(issue.label_ids.is_empty(), "input only");
    assert_eq!(tracker.viewer.get(&issue.id).await, issue);
}

#[tokio::test]
async fn output_only_fields_of_a_new_issue_are_ignored() {
    let tracker = Tracker::start().await;
    let long_ago = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });

    let issue = tracker
        .member
        .file_as(Issue {
            id: "not even a UUID".to_owned(),
            reporter_id: tracker.admin.user.id.clone(),
            labels: vec![Label { id: "x".to_owned(), ..Label::default() }],
            version: 77,
            create_time: long_ago,
            update_time: long_ago,
            close_time: long_ago,
            delete_time: long_ago,
            comment_count: 5,
            reopen_count: -3,
            ..titled("crash")
        })
        .await;

    let expected = Issue {
        id: issue.id.clone(),
        status: Status::Open.into(),
        reporter_id: tracker.member.user.id.clone(),
        version: 1,
        create_time: issue.create_time,
        update_time: issue.create_time,
        ..titled("crash")
    };
    assert_eq!(issue, expected);
    assert_ne!(issue.create_time, long_ago);
}

#[tokio::test]
async fn issue_created_closed_has_its_create_time_as_close_time() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file_as(Issue { status: Status::Closed.into(), ..titled("done before") }).await;
    assert_eq!((issue.close_time, issue.reopen_count), (issue.create_time, 0));
}

#[tokio::test]
async fn missing_assignee_and_labels_are_all_named() {
    let tracker = Tracker::start().await;
    let known = tracker.member.label("bug").await.id;
    let [user, first, second] = [(); 3].map(|()| Uuid::now_v7().to_string());

    let created = try_create(
        &tracker.member,
        Issue { assignee_id: user.clone(), label_ids: vec![first.clone(), known, second.clone()], ..titled("crash") },
    )
    .await;

    let status = assert_error(created, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["issue.assignee_id", "issue.label_ids[0]", "issue.label_ids[2]"]);
    let expected = [("user", user), ("label", first), ("label", second)].map(|(kind, id)| (kind.to_owned(), id));
    assert_eq!(resources(&status), expected);
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn duplicate_label_ids_are_invalid() {
    let tracker = Tracker::start().await;
    let known = tracker.member.label("bug").await.id;
    for (first, second) in [
        (known.clone(), known.clone()),
        (known.clone(), known.to_uppercase()),
        (Uuid::nil().to_string(), Uuid::nil().to_string()),
    ] {
        let issue = Issue { label_ids: vec![first, second], ..titled("crash") };
        assert_invalid(try_create(&tracker.member, issue).await, &["issue.label_ids[1]"]);
    }
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn taken_external_id_is_rejected_even_when_its_issue_is_deleted() {
    let tracker = Tracker::start().await;
    let with_external_id = |title: &str| Issue { external_id: "JIRA-1".to_owned(), ..titled(title) };
    let issue = tracker.member.file_as(with_external_id("first")).await;
    let assert_taken = |created| {
        let status = assert_error(created, Code::AlreadyExists, "ALREADY_EXISTS");
        assert_eq!(bad_fields(&status), ["issue.external_id"]);
        assert_eq!(resources(&status), [("issue".to_owned(), "JIRA-1".to_owned())]);
    };

    assert_taken(try_create(&tracker.member, with_external_id("second")).await);
    let delete = DeleteIssueRequest { id: issue.id, ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();
    assert_taken(try_create(&tracker.member, with_external_id("third")).await);

    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
    // Another system assigns external ids, so case and spaces are significant.
    for external_id in ["jira-1", "JIRA-1 "] {
        tracker.member.file_as(Issue { external_id: external_id.to_owned(), ..titled("other") }).await;
    }
}

#[tokio::test]
async fn blank_external_id_is_invalid() {
    let tracker = Tracker::start().await;
    for blank in [" ", "\t\n", "\u{a0}"] {
        let issue = Issue { external_id: blank.to_owned(), ..titled("crash") };
        assert_invalid(try_create(&tracker.member, issue).await, &["issue.external_id"]);
    }
    assert_no_issues(&tracker).await;

    let issue = tracker.member.file("crash").await;
    let blank = Issue { id: issue.id.clone(), external_id: " ".to_owned(), ..Issue::default() };
    let update = UpdateIssueRequest { issue: Some(blank), ..Default::default() };
    assert_invalid(tracker.member.issues().update_issue(update).await, &["issue.external_id"]);
    assert_eq!(tracker.member.get(&issue.id).await, issue);
}

#[tokio::test]
async fn blank_overlong_and_nul_titles_are_invalid() {
    let tracker = Tracker::start().await;
    for title in ["", " ", "\t\r\n", "\u{a0}\u{2003}", "nul\0inside", &"x".repeat(256), &"é".repeat(10_000)] {
        assert_invalid(try_create(&tracker.member, titled(title)).await, &["issue.title"]);
    }
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn text_bounds_count_characters_not_bytes() {
    let tracker = Tracker::start().await;
    let filled = |title: usize, description: usize, external_id: usize| Issue {
        description: "é".repeat(description),
        external_id: "漢".repeat(external_id),
        ..titled(&"😀".repeat(title))
    };

    let issue = tracker.member.file_as(filled(255, 65_536, 255)).await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(issue.description.chars().count(), 65_536);

    let over = try_create(&tracker.member, filled(256, 65_537, 256)).await;
    let status = assert_error(over, Code::InvalidArgument, "INVALID");
    let mut fields = bad_fields(&status);
    fields.sort();
    assert_eq!(fields, ["issue.description", "issue.external_id", "issue.title"]);
    let nul = Issue { description: "a\0".to_owned(), ..titled("crash") };
    assert_invalid(try_create(&tracker.member, nul).await, &["issue.description"]);
    let nul = Issue { external_id: "\0".to_owned(), ..titled("crash") };
    assert_invalid(try_create(&tracker.member, nul).await, &["issue.external_id"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
}

#[tokio::test]
async fn unknown_enum_numbers_are_invalid() {
    let tracker = Tracker::start().await;
    for number in [-1, 5, 99, i32::MIN, i32::MAX, 1 << 16 | 1] {
        let status = Issue { status: number, ..titled("crash") };
        assert_invalid(try_create(&tracker.member, status).await, &["issue.status"]);
        let priority = Issue { priority: number, ..titled("crash") };
        assert_invalid(try_create(&tracker.member, priority).await, &["issue.priority"]);
    }
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn all_violations_are_reported() {
    let tracker = Tracker::start().await;
    let request = CreateIssueRequest {
        issue: Some(Issue {
            title: " ".to_owned(),
            description: "\0".to_owned(),
            status: 9,
            priority: -9,
            assignee_id: "alice".to_owned(),
            external_id: "x".repeat(256),
            label_ids: vec!["bug".to_owned(), Uuid::now_v7().to_string(), String::new()],
            ..Issue::default()
        }),
        request_id: "again".to_owned(),
        validate_only: false,
    };
    let status = assert_error(tracker.member.issues().create_issue(request).await, Code::InvalidArgument, "INVALID");
    let mut fields = bad_fields(&status);
    fields.sort();
    let all = [
        "issue.assignee_id",
        "issue.description",
        "issue.external_id",
        "issue.label_ids[0]",
        "issue.label_ids[2]",
        "issue.priority",
        "issue.status",
        "issue.title",
        "request_id",
    ];
    assert_eq!(fields, all);
    for part in all.iter().chain(&["\"alice\"", "\"bug\"", "256 characters"]) {
        assert!(status.message().contains(part), "{part} in {}", status.message());
    }
    let empty = tracker.member.issues().create_issue(CreateIssueRequest::default()).await;
    let status = assert_error(empty, Code::InvalidArgument, "INVALID");
    assert!(bad_fields(&status).contains(&"issue".to_owned()), "{status:?}");
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn more_than_100_labels_are_invalid() {
    let tracker = Tracker::start().await;
    let label_ids = (0..101).map(|_| Uuid::now_v7().to_string()).collect();
    let created = try_create(&tracker.member, Issue { label_ids, ..titled("crash") }).await;
    assert_invalid(created, &["issue.label_ids"]);
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn sql_in_text_is_stored_and_matched_literally() {
    let tracker = Tracker::start().await;
    for text in SQL_TEXTS {
        let issue = tracker
            .member
            .file_as(Issue { description: text.to_owned(), external_id: text.to_owned(), ..titled(text) })
            .await;
        let comment = UpdateIssueRequest {
            issue: Some(Issue { id: issue.id.clone(), ..Issue::default() }),
            comment: text.to_owned(),
            ..Default::default()
        };
        tracker.member.issues().update_issue(comment).await.unwrap();

        let stored = tracker.member.get(&issue.id).await;
        assert_eq!(
            [&*stored.title, &*stored.description, &*stored.external_id, &*stored.comments[0].content],
            [text; 4]
        );
        let quoted = format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
        assert_eq!(titles(&tracker.member, &quoted, false).await, [text]);
        for field in ["assignee", "reporter", "label"] {
            assert!(titles(&tracker.member, &format!("{field} = {quoted}"), false).await.is_empty());
        }
    }
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, SQL_TEXTS.len() as i64);
    assert_eq!(tracker.count("SELECT count(*) FROM users").await, 3);
}

#[tokio::test]
async fn text_is_stored_byte_for_byte() {
    let tracker = Tracker::start().await;
    for text in [
        "  spaces around  ",
        "line\r\nbreak\nand\ttab",
        "e\u{301} is not \u{e9}, \u{fb01} is not fi",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "עברית \u{202e}override\u{202c} العربية",
        "\u{feff}byte-order mark, zero\u{200b}width",
        "bell\u{7} escape\u{1b}[31m delete\u{7f}",
        "\u{10ffff}\u{fffd}",
    ] {
        let issue = tracker
            .member
            .file_as(Issue { description: text.to_owned(), external_id: text.to_owned(), ..titled(text) })
            .await;
        let stored = tracker.member.get(&issue.id).await;
        assert_eq!([&*stored.title, &*stored.description, &*stored.external_id], [text; 3]);
    }
}

#[tokio::test]
async fn id_must_be_a_hyphenated_uuid() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let get = |id: &str| {
        let (mut client, id) = (tracker.viewer.issues(), id.to_owned());
        async move { client.get_issue(GetIssueRequest { id, view: 0 }).await }
    };
    for id in [
        "",
        " ",
        "42",
        "crash",
        &issue.id.replace('-', ""),
        &format!("{{{}}}", issue.id),
        &format!("urn:uuid:{}", issue.id),
        &format!("{}\n", issue.id),
        &issue.id[..35],
        &"é".repeat(18),
        &"0".repeat(1_000_000),
        "' OR 1=1 --",
        "a\0b",
    ] {
        assert_invalid(get(id).await, &["id"]);
    }
    assert_eq!(get(&issue.id.to_uppercase()).await.unwrap().into_inner(), issue);
}

#[tokio::test]
async fn missing_issue_is_not_found_by_any_rpc() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7().to_string();
    let assert_missing = |status: tonic::Status, field: &str| {
        let status = assert_error::<()>(Err(status), Code::NotFound, "NOT_FOUND");
        assert_eq!(bad_fields(&status), [field]);
        assert_eq!(resources(&status), [("issue".to_owned(), id.clone())]);
    };
    let mut issues = tracker.member.issues();
    for view in [IssueView::Basic, IssueView::Full] {
        assert_missing(
            issues.get_issue(GetIssueRequest { id: id.clone(), view: view.into() }).await.unwrap_err(),
            "id",
        );
    }
    let update = UpdateIssueRequest { issue: Some(Issue { id: id.clone(), ..titled("crash") }), ..Default::default() };
    assert_missing(issues.update_issue(update).await.unwrap_err(), "issue.id");
    let delete = DeleteIssueRequest { id: id.clone(), ..Default::default() };
    assert_missing(issues.delete_issue(delete).await.unwrap_err(), "id");
    let undelete = UndeleteIssueRequest { id: id.clone(), expected_version: 3, ..Default::default() };
    assert_missing(issues.undelete_issue(undelete).await.unwrap_err(), "id");
    assert_no_issues(&tracker).await;
}

#[tokio::test]
async fn only_the_full_view_has_comments_oldest_first_with_their_authors() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let first = tracker.admin.comment(&issue.id, "first").await;
    let second = tracker.member.comment(&issue.id, "second").await;
    let third = tracker.admin.comment(&issue.id, "third").await;
    tracker.admin.comment(&tracker.member.file("other").await.id, "elsewhere").await;
    let get = |view: i32| {
        let (mut client, id) = (tracker.viewer.issues(), issue.id.clone());
        async move { client.get_issue(GetIssueRequest { id, view }).await }
    };

    let full = get(IssueView::Full.into()).await.unwrap().into_inner();
    assert_eq!(full.comments, [first, second, third]);
    let authors: Vec<&str> = full.comments.iter().map(|comment| &*comment.author_username).collect();
    assert_eq!(authors, ["admin", "member", "admin"]);
    for view in [IssueView::Unspecified, IssueView::Basic] {
        let basic = get(view.into()).await.unwrap().into_inner();
        assert_eq!((basic.comments.len(), basic.comment_count, basic.version), (0, 3, 1));
    }
    for number in [3, -1, i32::MAX] {
        assert_invalid(get(number).await, &["view"]);
    }
}

#[tokio::test]
async fn deleted_issue_is_unlisted_readable_and_can_be_undeleted() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let mut issues = tracker.member.issues();

    let delete = DeleteIssueRequest { id: issue.id.clone(), expected_version: 1, ..Default::default() };
    let deleted = issues.delete_issue(delete).await.unwrap().into_inner();
    assert!(deleted.delete_time.is_some());
    assert_eq!((deleted.version, deleted.update_time), (2, deleted.delete_time));
    assert_eq!(tracker.viewer.get(&issue.id).await, deleted);
    assert!(titles(&tracker.viewer, "", false).await.is_empty());
    assert_eq!(titles(&tracker.viewer, "", true).await, ["crash"]);

    let undelete = UndeleteIssueRequest { id: issue.id.clone(), expected_version: 2, ..Default::default() };
    let undeleted = issues.undelete_issue(undelete).await.unwrap().into_inner();
    assert_eq!(undeleted, Issue { version: 3, update_time: undeleted.update_time, ..issue.clone() });
    assert_eq!(tracker.viewer.get(&issue.id).await, undeleted);
    assert_eq!(titles(&tracker.viewer, "", false).await, ["crash"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events WHERE field = 'deleted'").await, 2);
}

#[tokio::test]
async fn deletion_with_a_wrong_state_or_version_fails_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let mut issues = tracker.member.issues();
    let delete = |expected_version| DeleteIssueRequest { id: issue.id.clone(), expected_version, ..Default::default() };
    let undelete =
        |expected_version| UndeleteIssueRequest { id: issue.id.clone(), expected_version, ..Default::default() };
    let assert_stale = |status: tonic::Status| {
        let status = assert_error::<()>(Err(status), Code::Aborted, "VERSION_MISMATCH");
        assert_eq!(error_metadata(&status, "current_version").as_deref(), Some("1"));
        assert_eq!(bad_fields(&status), ["id"]);
    };

    assert_error(issues.undelete_issue(undelete(0)).await, Code::FailedPrecondition, "ISSUE_STATE");
    assert_stale(issues.delete_issue(delete(2)).await.unwrap_err());
    assert_stale(issues.undelete_issue(undelete(2)).await.unwrap_err());
    assert_invalid(issues.delete_issue(delete(-1)).await, &["expected_version"]);
    assert_invalid(issues.undelete_issue(undelete(i64::MIN)).await, &["expected_version"]);
    assert_eq!(tracker.member.get(&issue.id).await, issue);

    let deleted = issues.delete_issue(delete(0)).await.unwrap().into_inner();
    assert_error(issues.delete_issue(delete(0)).await, Code::FailedPrecondition, "ISSUE_STATE");
    assert_error(issues.delete_issue(delete(2)).await, Code::FailedPrecondition, "ISSUE_STATE");
    assert_eq!(tracker.member.get(&issue.id).await, deleted);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 1);
}

#[tokio::test]
async fn dry_run_has_the_outcome_of_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let mut issues = tracker.member.issues();
    let issue = Issue { external_id: "JIRA-1".to_owned(), ..titled("crash") };
    let dry = CreateIssueRequest { validate_only: true, ..create(issue.clone()) };
    let validated = issues.create_issue(dry.clone()).await.unwrap().into_inner();
    assert_eq!((&*validated.title, validated.version), ("crash", 1));
    assert_no_issues(&tracker).await;

    let issue = tracker.member.file_as(issue).await;
    assert_error(issues.create_issue(dry).await, Code::AlreadyExists, "ALREADY_EXISTS");

    let dry_delete = DeleteIssueRequest { id: issue.id.clone(), validate_only: true, ..Default::default() };
    let validated = issues.delete_issue(dry_delete).await.unwrap().into_inner();
    assert!(validated.version == 2 && validated.delete_time.is_some(), "{validated:?}");
    let dry_undelete = UndeleteIssueRequest { id: issue.id.clone(), validate_only: true, ..Default::default() };
    let not_deleted = issues.undelete_issue(dry_undelete.clone()).await;
    assert_error(not_deleted, Code::FailedPrecondition, "ISSUE_STATE");
    assert_eq!(tracker.member.get(&issue.id).await, issue);

    let delete = DeleteIssueRequest { id: issue.id.clone(), ..Default::default() };
    let deleted = issues.delete_issue(delete).await.unwrap().into_inner();
    let validated = issues.undelete_issue(dry_undelete).await.unwrap().into_inner();
    assert_eq!((validated.version, validated.delete_time), (3, None));
    assert_eq!(tracker.member.get(&issue.id).await, deleted);
}
