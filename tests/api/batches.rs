//! `BatchCreateIssues` and `BatchGetIssues`: atomic, in request order, errors that name every bad item.

mod bulk_status;

use issue_tracker::pb::{
    BatchCreateIssuesRequest, BatchCreateIssuesResponse, BatchGetIssuesRequest, CreateIssueRequest, DeleteIssueRequest,
    Issue, IssueView, Label,
};
use tonic::Code;
use uuid::Uuid;

use crate::{
    harness::{Client, Tracker, assert_error, assert_invalid, bad_fields, error_metadata, limits, resources},
    lock_waiters,
};

fn titled(title: impl Into<String>) -> Issue {
    Issue { title: title.into(), ..Issue::default() }
}

fn numbered(count: usize) -> Vec<Issue> {
    (0..count).map(|n| titled(format!("issue {n}"))).collect()
}

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

async fn create(client: &Client, issues: Vec<Issue>) -> Result<Vec<Issue>, tonic::Status> {
    let request = BatchCreateIssuesRequest { issues, ..Default::default() };
    Ok(client.issues().batch_create_issues(request).await?.into_inner().issues)
}

async fn get(client: &Client, ids: &[String], view: IssueView) -> Result<Vec<Issue>, tonic::Status> {
    let request = BatchGetIssuesRequest { ids: ids.to_vec(), view: view.into() };
    Ok(client.issues().batch_get_issues(request).await?.into_inner().issues)
}

fn ids(issues: &[Issue]) -> Vec<String> {
    issues.iter().map(|issue| issue.id.clone()).collect()
}

/// Expands the ranges of `ErrorInfo.metadata["indices"]`, such as `0-3,7`.
fn indices(status: &tonic::Status) -> Vec<usize> {
    let text = error_metadata(status, "indices").unwrap_or_default();
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        first.parse::<usize>().unwrap()..=last.parse().unwrap()
    };
    text.split(',').filter(|range| !range.is_empty()).flat_map(range).collect()
}

#[tokio::test]
async fn batch_create_returns_issues_in_request_order() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await;
    let mut issues = numbered(1_000);
    issues[1].label_ids = vec![bug.id.clone()];
    issues[2].assignee_id = tracker.viewer.user.id.clone();

    let filed = create(&tracker.member, issues.clone()).await.unwrap();

    let expected = |(new, filed): (&Issue, &Issue)| Issue {
        id: filed.id.clone(),
        status: 1,
        version: 1,
        reporter_id: tracker.member.user.id.clone(),
        labels: if new.label_ids.is_empty() { Vec::new() } else { vec![bug.clone()] },
        label_ids: Vec::new(),
        create_time: filed.create_time,
        update_time: filed.create_time,
        ..new.clone()
    };
    assert_eq!(filed, issues.iter().zip(&filed).map(expected).collect::<Vec<_>>());
    assert!(filed.is_sorted_by(|older, newer| older.id < newer.id));
    assert_eq!(get(&tracker.viewer, &ids(&filed), IssueView::Basic).await.unwrap(), filed);
}

#[tokio::test]
async fn batch_create_takes_1_to_1000_issues() {
    let tracker = Tracker::start().await;
    for count in [0, 1_001] {
        assert_invalid(create(&tracker.member, numbered(count)).await, &["issues"]);
    }
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
}

#[tokio::test]
async fn wrong_item_count_is_named_beside_every_other_violation() {
    let tracker = Tracker::start().await;
    let mut issues = numbered(1_001);
    issues[3].title.clear();
    for (issues, fields) in
        [(Vec::new(), &["request_id", "issues"][..]), (issues, &["request_id", "issues", "issues[3].title"])]
    {
        let request = BatchCreateIssuesRequest { issues, request_id: "1".to_owned(), ..Default::default() };
        assert_invalid(tracker.member.issues().batch_create_issues(request).await, fields);
    }
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
}

#[tokio::test]
async fn missing_references_and_taken_external_ids_are_named_together() {
    let tracker = Tracker::start().await;
    tracker.member.file_as(Issue { external_id: "taken".to_owned(), ..titled("first") }).await;
    let mut issues = numbered(3);
    issues[0].external_id = "taken".to_owned();
    issues[1].assignee_id = new_id();
    issues[2].label_ids = vec![new_id()];

    let batch = assert_error(create(&tracker.member, issues.clone()).await, Code::NotFound, "NOT_FOUND");
    let one =
        Issue { external_id: "taken".to_owned(), assignee_id: new_id(), label_ids: vec![new_id()], ..titled("x") };
    let request = CreateIssueRequest { issue: Some(one), ..Default::default() };
    let single = assert_error(tracker.member.issues().create_issue(request).await, Code::NotFound, "NOT_FOUND");

    assert_eq!(bad_fields(&batch), ["issues[0].external_id", "issues[1].assignee_id", "issues[2].label_ids[0]"]);
    let kinds: Vec<String> = resources(&batch).into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, ["issue", "user", "label"]);
    assert_eq!(bad_fields(&single), ["issue.assignee_id", "issue.label_ids[0]", "issue.external_id"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
}

#[tokio::test]
async fn batch_with_invalid_issues_names_all_of_them_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let mut issues = numbered(6);
    issues[1].title.clear();
    issues[3].status = 9;
    issues[3].title = "x".repeat(256);
    issues[5].assignee_id = "alice".to_owned();

    let status = assert_error(create(&tracker.member, issues).await, Code::InvalidArgument, "INVALID");

    let mut fields = bad_fields(&status);
    fields.sort();
    assert_eq!(fields, ["issues[1].title", "issues[3].status", "issues[3].title", "issues[5].assignee_id"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
}

#[tokio::test]
async fn missing_assignees_and_labels_are_all_named() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await.id;
    let mut issues = numbered(4);
    issues[0].assignee_id = tracker.viewer.user.id.clone();
    issues[1].assignee_id = new_id();
    issues[2].label_ids = vec![bug, new_id(), new_id()];
    issues[3].assignee_id = issues[1].assignee_id.clone();

    let status = assert_error(create(&tracker.member, issues.clone()).await, Code::NotFound, "NOT_FOUND");

    let fields = ["issues[1].assignee_id", "issues[2].label_ids[1]", "issues[2].label_ids[2]", "issues[3].assignee_id"];
    assert_eq!(bad_fields(&status), fields);
    let missing = [
        ("user", &issues[1].assignee_id),
        ("label", &issues[2].label_ids[1]),
        ("label", &issues[2].label_ids[2]),
        ("user", &issues[3].assignee_id),
    ];
    assert_eq!(resources(&status), missing.map(|(kind, id)| (kind.to_owned(), id.clone())));
    let counts = "SELECT (SELECT count(*) FROM issues) + (SELECT count(*) FROM issue_labels)";
    assert_eq!(tracker.count(counts).await, 0);
}

#[tokio::test]
async fn taken_and_repeated_external_ids_are_all_named() {
    let tracker = Tracker::start().await;
    let keyed = |external_id: &str| Issue { external_id: external_id.to_owned(), ..titled("crash") };
    tracker.member.file_as(keyed("taken")).await;

    let batch = ["new", "taken", "repeated", "", "repeated", "taken", ""].map(keyed).to_vec();
    let status = assert_error(create(&tracker.member, batch).await, Code::AlreadyExists, "ALREADY_EXISTS");

    let fields = ["issues[1].external_id", "issues[4].external_id", "issues[5].external_id"];
    assert_eq!(bad_fields(&status), fields);
    let names: Vec<String> = resources(&status).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["taken", "repeated", "taken"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
}

#[tokio::test]
async fn error_about_a_thousand_items_fits_in_the_trailers_and_has_all_indices() {
    let tracker = Tracker::start().await;
    // Each character takes 4 bytes, and 12 when percent-encoded in a header.
    let keyed = |n: usize| Issue { external_id: format!("{n} {}", "😀".repeat(200)), ..titled("crash") };
    create(&tracker.member, (0..300).map(keyed).collect()).await.unwrap();

    let again = create(&tracker.member, (0..300).map(keyed).collect()).await;
    let status = assert_error(again, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(indices(&status), (0..300).collect::<Vec<_>>());

    let invalid = |n: usize| Issue { assignee_id: "漢".repeat(n), ..Issue::default() };
    let status = create(&tracker.member, (1..=1_000).map(invalid).collect()).await;
    let status = assert_error(status, Code::InvalidArgument, "INVALID");
    assert_eq!(indices(&status), (0..1_000).collect::<Vec<_>>());
    assert!(bad_fields(&status).starts_with(&["issues[0].title".to_owned()]), "{status:?}");
}

#[tokio::test]
async fn batch_create_whose_response_is_too_large_is_rejected_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let mut label_ids = Vec::new();
    for n in 0..100 {
        let label = Label { name: format!("label {n}"), description: "d".repeat(255), ..Label::default() };
        let request = issue_tracker::pb::CreateLabelRequest { label: Some(label), ..Default::default() };
        label_ids.push(tracker.member.labels().create_label(request).await.unwrap().into_inner().id);
    }
    // The request is small, as it has label ids; the response has whole labels.
    let labelled = |n: usize| Issue { label_ids: label_ids.clone(), ..titled(format!("issue {n}")) };

    let too_large = create(&tracker.member, (0..200).map(labelled).collect()).await;

    let status = assert_error(too_large, Code::InvalidArgument, "RESPONSE_TOO_LARGE");
    assert_eq!(bad_fields(&status), ["issues"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
    assert_eq!(create(&tracker.member, (0..50).map(labelled).collect()).await.unwrap().len(), 50);
}

#[tokio::test]
async fn repeated_batch_create_returns_the_stored_response() {
    let tracker = Tracker::start().await;
    let request = BatchCreateIssuesRequest { issues: numbered(3), request_id: new_id(), ..Default::default() };
    let mut issues = tracker.member.issues();
    let first = issues.batch_create_issues(request.clone()).await.unwrap().into_inner();

    let retried: BatchCreateIssuesResponse = issues.batch_create_issues(request.clone()).await.unwrap().into_inner();

    assert_eq!(retried, first);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 3);
    let other = BatchCreateIssuesRequest { issues: numbered(2), ..request };
    let status = assert_error(issues.batch_create_issues(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(bad_fields(&status), ["request_id"]);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 3);
}

#[tokio::test]
async fn batch_create_dry_run_responds_as_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let keyed = |external_id: &str| Issue { external_id: external_id.to_owned(), ..titled("crash") };
    tracker.member.file_as(keyed("taken")).await;
    let dry_run = |issues: Vec<Issue>| {
        let mut client = tracker.member.issues();
        let request = BatchCreateIssuesRequest { issues, validate_only: true, ..Default::default() };
        async move { client.batch_create_issues(request).await }
    };

    let issues = dry_run(numbered(2)).await.unwrap().into_inner().issues;
    assert_eq!(issues.iter().map(|issue| &*issue.title).collect::<Vec<_>>(), ["issue 0", "issue 1"]);
    assert_error(dry_run(vec![keyed("taken")]).await, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
}

#[tokio::test]
async fn batch_get_returns_issues_in_the_order_of_the_ids_including_deleted_ones() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(5)).await.unwrap();
    let delete = DeleteIssueRequest { id: filed[4].id.clone(), ..Default::default() };
    let deleted = tracker.member.issues().delete_issue(delete).await.unwrap().into_inner();
    let expected = [&filed[2], &deleted, &filed[0], &filed[3]].map(Issue::clone);

    assert_eq!(get(&tracker.viewer, &ids(&expected), IssueView::Basic).await.unwrap(), expected);
}

#[tokio::test]
async fn batch_get_takes_1_to_1000_distinct_valid_ids() {
    let tracker = Tracker::start().await;
    let ids = ids(&create(&tracker.member, numbered(2)).await.unwrap());
    let assert_fields = async |ids: Vec<String>, fields: &[&str]| {
        assert_invalid(get(&tracker.viewer, &ids, IssueView::Basic).await, fields);
    };
    assert_fields(vec![], &["ids"]).await;
    assert_fields((0..1_001).map(|_| new_id()).collect(), &["ids"]).await;
    let repeated = vec![ids[0].clone(), ids[1].clone(), ids[0].to_uppercase(), ids[1].clone()];
    assert_fields(repeated, &["ids[2]", "ids[3]"]).await;
    let malformed = vec!["42".to_owned(), ids[0].clone(), String::new(), "42".to_owned()];
    assert_fields(malformed, &["ids[0]", "ids[2]", "ids[3]"]).await;
    let request = BatchGetIssuesRequest { ids, view: 7 };
    assert_invalid(tracker.viewer.issues().batch_get_issues(request).await, &["view"]);
}

#[tokio::test]
async fn batch_get_names_all_missing_ids() {
    let tracker = Tracker::start().await;
    let mut requested = ids(&create(&tracker.member, numbered(3)).await.unwrap());
    requested.insert(1, new_id());
    requested.push(new_id());
    for view in [IssueView::Basic, IssueView::Full] {
        let status = assert_error(get(&tracker.viewer, &requested, view).await, Code::NotFound, "NOT_FOUND");
        assert_eq!(bad_fields(&status), ["ids[1]", "ids[4]"]);
        assert_eq!(resources(&status), [&requested[1], &requested[4]].map(|id| ("issue".to_owned(), id.clone())));
    }
}

#[tokio::test]
async fn full_view_of_batch_get_includes_comments() {
    let tracker = Tracker::start().await;
    let filed = create(&tracker.member, numbered(3)).await.unwrap();
    let first = tracker.admin.comment(&filed[2].id, "first").await;
    let other = tracker.member.comment(&filed[0].id, "other").await;
    let second = tracker.member.comment(&filed[2].id, "second").await;

    let full = get(&tracker.viewer, &ids(&filed), IssueView::Full).await.unwrap();

    assert_eq!(full.iter().map(|issue| &issue.comments[..]).collect::<Vec<_>>(), [&[other][..], &[], &[first, second]]);
    let basic = get(&tracker.viewer, &ids(&filed), IssueView::Basic).await.unwrap();
    assert_eq!(basic.iter().map(|issue| issue.comment_count).collect::<Vec<_>>(), [1, 0, 2]);
    assert!(basic.iter().all(|issue| issue.comments.is_empty()));
}

#[tokio::test]
async fn batch_get_whose_response_exceeds_3_mib_is_rejected() {
    let tracker = Tracker::start().await;
    let mut large = Vec::new();
    for _ in 0..2 {
        let batch = (0..7).map(|_| Issue { description: "😀".repeat(65_536), ..titled("large") });
        large.extend(create(&tracker.member, batch.collect()).await.unwrap());
    }
    let assert_too_large = |result| {
        let status = assert_error(result, Code::InvalidArgument, "RESPONSE_TOO_LARGE");
        assert_eq!(bad_fields(&status), ["ids"]);
    };
    let ids = ids(&large);

    assert_too_large(get(&tracker.viewer, &ids, IssueView::Basic).await);
    assert_eq!(get(&tracker.viewer, &ids[..11], IssueView::Basic).await.unwrap(), large[..11]);

    // Five comments of 64 KiB each exceed the bound again.
    for _ in 0..5 {
        tracker.member.comment(&ids[0], &"😀".repeat(16_384)).await;
    }
    get(&tracker.viewer, &ids[1..12], IssueView::Full).await.unwrap();
    assert_too_large(get(&tracker.viewer, &ids[..11], IssueView::Full).await);
}

#[tokio::test]
async fn reads_of_large_batches_of_one_user_wait_for_each_other_and_not_others() {
    // One user may have one of the two permits of reports, searches and large batches.
    let args = ["--pool-connections", "8", "--pool-wait-ms", "200"];
    let tracker = Tracker::start_with(limits(&args)).await;
    let filed = ids(&create(&tracker.member, numbered(101)).await.unwrap());
    let blocker = tracker.session().await;
    blocker.batch_execute("BEGIN; LOCK TABLE issues IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let spawn_get = |client: &Client, ids: &[String]| {
        let (client, ids) = (client.clone(), ids.to_vec());
        tokio::spawn(async move { get(&client, &ids, IssueView::Basic).await })
    };
    let first = spawn_get(&tracker.member, &filed);
    tracker.wait_until(lock_waiters!("= 1")).await;
    assert_error(get(&tracker.member, &filed, IssueView::Basic).await, Code::ResourceExhausted, "OVERLOADED");
    let others = [spawn_get(&tracker.viewer, &filed), spawn_get(&tracker.member, &filed[..100])];
    tracker.wait_until(lock_waiters!("= 3")).await;
    blocker.batch_execute("COMMIT").await.unwrap();
    for (read, count) in [first].into_iter().chain(others).zip([101, 101, 100]) {
        assert_eq!(read.await.unwrap().unwrap().len(), count);
    }
}
