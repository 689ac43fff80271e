//! `LabelService`.

pub mod deletion;

use issue_tracker::pb::{
    AddIssueLabelsRequest, CreateLabelRequest, DeleteIssueRequest, DeleteLabelRequest, Issue, Label, ListLabelsRequest,
    ListLabelsResponse, RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest, UpdateIssueRequest, UpdateLabelRequest,
};
use prost_types::FieldMask;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_error, assert_invalid, bad_fields, error_metadata, limits};

async fn create(client: &Client, name: &str, description: &str) -> Result<Label, Status> {
    let label = Label { id: String::new(), name: name.to_owned(), description: description.to_owned() };
    let request = CreateLabelRequest { label: Some(label), ..Default::default() };
    client.labels().create_label(request).await.map(tonic::Response::into_inner)
}

async fn update(client: &Client, label: Label, paths: &[&str]) -> Result<Label, Status> {
    let mask = FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() };
    let request = UpdateLabelRequest { label: Some(label), update_mask: Some(mask), ..Default::default() };
    client.labels().update_label(request).await.map(tonic::Response::into_inner)
}

async fn delete(client: &Client, id: &str, force: bool) -> Result<i32, Status> {
    let request = DeleteLabelRequest { id: id.to_owned(), force, ..Default::default() };
    client.labels().delete_label(request).await.map(|response| response.into_inner().issue_count)
}

async fn list(client: &Client, page_size: i32, page_token: &str) -> Result<ListLabelsResponse, Status> {
    let request = ListLabelsRequest { page_size, page_token: page_token.to_owned() };
    client.labels().list_labels(request).await.map(tonic::Response::into_inner)
}

async fn add(client: &Client, issue: &Issue, labels: &[&Label]) -> Result<Issue, Status> {
    let request = AddIssueLabelsRequest { issue_id: issue.id.clone(), label_ids: ids(labels), ..Default::default() };
    client.labels().add_issue_labels(request).await.map(tonic::Response::into_inner)
}

async fn remove(client: &Client, issue: &Issue, labels: &[&Label]) -> Result<Issue, Status> {
    let request = RemoveIssueLabelsRequest { issue_id: issue.id.clone(), label_ids: ids(labels), ..Default::default() };
    client.labels().remove_issue_labels(request).await.map(tonic::Response::into_inner)
}

async fn replace(client: &Client, issue: &Issue, labels: &[&Label]) -> Result<Issue, Status> {
    let request =
        ReplaceIssueLabelsRequest { issue_id: issue.id.clone(), label_ids: ids(labels), ..Default::default() };
    client.labels().replace_issue_labels(request).await.map(tonic::Response::into_inner)
}

fn ids(labels: &[&Label]) -> Vec<String> {
    labels.iter().map(|label| label.id.clone()).collect()
}

fn names(labels: &[Label]) -> Vec<&str> {
    labels.iter().map(|label| &*label.name).collect()
}

/// Creates labels with these names.
async fn create_labels<const N: usize>(client: &Client, names: [&str; N]) -> [Label; N] {
    let mut labels = Vec::new();
    for name in names {
        labels.push(client.label(name).await);
    }
    labels.try_into().unwrap()
}

const COUNT_ISSUE_LABELS: &str = "SELECT count(*) FROM issue_labels";
const COUNT_EVENTS: &str = "SELECT count(*) FROM issue_events";

#[tokio::test]
async fn name_has_1_to_50_characters_no_semicolon_and_no_surrounding_space() {
    let tracker = Tracker::start().await;
    for bad in ["", "  ", "a;b", ";", " bug", "bug\n", "\u{3000}bug", "nul\0", &"é".repeat(51)] {
        assert_invalid(create(&tracker.member, bad, "").await, &["label.name"]);
    }
    assert_invalid(create(&tracker.member, "a;b", &"x".repeat(256)).await, &["label.name", "label.description"]);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);

    for good in [&*"é".repeat(50), "😀 two words", "'; DROP TABLE labels --".replace(';', ",").as_str()] {
        let label = create(&tracker.member, good, &"é".repeat(255)).await.unwrap();
        assert_eq!((label.name, label.description.chars().count()), (good.to_owned(), 255));
    }
}

#[tokio::test]
async fn names_are_unique_case_insensitively() {
    let tracker = Tracker::start().await;
    let [_, summer] = create_labels(&tracker.member, ["Bug", "été"]).await;
    for taken in ["Bug", "bUG", "ÉTÉ"] {
        let status = assert_error(create(&tracker.member, taken, "").await, Code::AlreadyExists, "ALREADY_EXISTS");
        let details = status.get_error_details();
        assert_eq!(details.resource_info().map(|info| &*info.resource_name), Some(taken), "{status:?}");
    }
    let renamed = update(&tracker.member, Label { name: "BUG".into(), ..summer.clone() }, &["name"]).await;
    assert_error(renamed, Code::AlreadyExists, "ALREADY_EXISTS");

    // A label may take its own name in another case.
    let label = update(&tracker.member, Label { name: "Été".into(), ..summer }, &["name"]).await.unwrap();
    assert_eq!(label.name, "Été");
    assert_eq!(names(&list(&tracker.viewer, 0, "").await.unwrap().labels), ["Bug", "Été"]);
}

#[tokio::test]
async fn update_sets_the_masked_fields_and_changes_no_issue() {
    let tracker = Tracker::start().await;
    let label = create(&tracker.member, "bug", "a fault").await.unwrap();
    let issue = tracker.member.file_as(Issue { title: "crash".into(), label_ids: ids(&[&label]), ..Issue::default() });
    let issue = issue.await;
    let to = |name: &str, text: &str| Label { id: label.id.clone(), name: name.into(), description: text.into() };

    assert_eq!(update(&tracker.member, to("defect", "x"), &["name"]).await.unwrap(), to("defect", "a fault"));
    assert_eq!(update(&tracker.member, to("", "y"), &[]).await.unwrap(), to("defect", "y"), "the populated fields");
    assert_eq!(update(&tracker.member, to("", ""), &["description"]).await.unwrap(), to("defect", ""), "cleared");
    assert_eq!(update(&tracker.member, to("bug", "z"), &["*"]).await.unwrap(), to("bug", "z"));

    assert_invalid(update(&tracker.member, to("", ""), &["name"]).await, &["label.name"]);
    assert_invalid(update(&tracker.member, to("", ""), &[]).await, &["update_mask"]);
    assert_invalid(update(&tracker.member, to("x", ""), &["id", "name"]).await, &["update_mask.paths[0]"]);
    let missing = Label { id: Uuid::now_v7().to_string(), ..to("x", "") };
    assert_error(update(&tracker.member, missing, &["name"]).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(tracker.member.get(&issue.id).await, Issue { labels: vec![to("bug", "z")], ..issue });
}

#[tokio::test]
async fn pages_are_ordered_by_name_case_insensitively_and_stable_under_writes() {
    let tracker = Tracker::start().await;
    let [banana, ..] = create_labels(&tracker.member, ["banana", "Cherry", "apple", "Date", "éclair"]).await;

    let first = list(&tracker.viewer, 2, "").await.unwrap();
    assert_eq!(names(&first.labels), ["apple", "banana"]);
    // The last label of the page is deleted, and labels are created on both sides of it.
    delete(&tracker.member, &banana.id, false).await.unwrap();
    create_labels(&tracker.member, ["Aardvark", "BANANAS"]).await;
    let second = list(&tracker.viewer, 3, &first.next_page_token).await.unwrap();
    assert_eq!(names(&second.labels), ["BANANAS", "Cherry", "Date"]);
    let last = list(&tracker.viewer, 1, &second.next_page_token).await.unwrap();
    assert_eq!((names(&last.labels), &*last.next_page_token), (vec!["éclair"], ""));

    assert_invalid(list(&tracker.viewer, -1, "AQ").await, &["page_size", "page_token"]);
}

#[tokio::test]
async fn label_in_use_is_deleted_only_with_force() {
    let tracker = Tracker::start().await;
    let [used, unused] = create_labels(&tracker.member, ["used", "unused"]).await;
    for title in ["one", "two"] {
        let issue = tracker.member.file(title).await;
        add(&tracker.member, &issue, &[&used]).await.unwrap();
    }
    let events = tracker.count(COUNT_EVENTS).await;

    let status = assert_error(delete(&tracker.member, &used.id, false).await, Code::FailedPrecondition, "LABEL_IN_USE");
    assert!(status.message().contains("2 issues") && status.message().contains("force"), "{status:?}");
    assert_eq!((tracker.count(COUNT_ISSUE_LABELS).await, tracker.count(COUNT_EVENTS).await), (2, events));
    assert_eq!(delete(&tracker.member, &unused.id, false).await.unwrap(), 0);
    assert_error(delete(&tracker.member, &unused.id, true).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(list(&tracker.viewer, 0, "").await.unwrap().labels, [used]);
}

#[tokio::test]
async fn forced_deletion_removes_the_label_from_every_issue_including_deleted_ones() {
    let tracker = Tracker::start().await;
    let [bug, ui] = create_labels(&tracker.member, ["bug", "ui"]).await;
    let (one, deleted) = (tracker.member.file("one").await, tracker.member.file("deleted").await);
    let unlabeled = tracker.member.file("unlabeled").await;
    for issue in [&one, &deleted] {
        add(&tracker.member, issue, &[&bug, &ui]).await.unwrap();
    }
    let request = DeleteIssueRequest { id: deleted.id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(request).await.unwrap();

    assert_eq!(delete(&tracker.admin, &bug.id, true).await.unwrap(), 2);

    for (issue, version) in [(&one, 3), (&deleted, 4)] {
        let now = tracker.member.get(&issue.id).await;
        assert_eq!((names(&now.labels), now.version), (vec!["ui"], version));
        let (id, actor): (Uuid, Uuid) = (issue.id.parse().unwrap(), tracker.admin.user.id.parse().unwrap());
        let sql = "SELECT field, old_value, new_value FROM issue_events
            WHERE issue_id = $1 AND version = $2 AND actor_id = $3";
        let events = tracker.sql(sql, &[&id, &version, &actor]).await;
        let [event] = &events[..] else { panic!("one event, not {events:?}") };
        let event: (&str, Option<&str>, Option<&str>) = (event.get(0), event.get(1), event.get(2));
        assert_eq!(event, ("label", Some(&*bug.id), None));
    }
    assert_eq!(tracker.member.get(&unlabeled.id).await, unlabeled);
}

#[tokio::test]
async fn label_change_is_one_version_and_an_equal_set_is_none() {
    let tracker = Tracker::start().await;
    let [a, b, c] = create_labels(&tracker.member, ["a", "B", "c"]).await;
    let issue = tracker.member.file("crash").await;
    let member = &tracker.member;
    let summary = |issue: Issue| (issue.labels.iter().map(|l| l.name.clone()).collect::<String>(), issue.version);

    assert_eq!(summary(add(member, &issue, &[&c, &a, &b]).await.unwrap()), ("aBc".into(), 2));
    let again = add(member, &issue, &[&b, &a]).await.unwrap();
    assert_eq!(summary(again.clone()), ("aBc".into(), 2));
    assert_eq!(summary(remove(member, &issue, &[&b, &c]).await.unwrap()), ("a".into(), 3));
    assert_eq!(summary(remove(member, &issue, &[&b, &c]).await.unwrap()), ("a".into(), 3));
    assert_eq!(summary(add(member, &issue, &[&a, &b]).await.unwrap()), ("aB".into(), 4));
    assert_eq!(summary(replace(member, &issue, &[&c, &b]).await.unwrap()), ("Bc".into(), 5));
    assert_eq!(summary(replace(member, &issue, &[&b, &c]).await.unwrap()), ("Bc".into(), 5));
    assert_eq!(summary(replace(member, &issue, &[]).await.unwrap()), (String::new(), 6));
    let bare = replace(member, &issue, &[]).await.unwrap();
    assert_eq!(summary(bare.clone()), (String::new(), 6));
    assert_eq!(tracker.member.get(&issue.id).await, bare);
    assert_eq!(tracker.count(COUNT_ISSUE_LABELS).await, 0);
}

#[tokio::test]
async fn missing_labels_are_named_by_index_and_nothing_is_written() {
    let tracker = Tracker::start().await;
    let [known, carried] = create_labels(&tracker.member, ["known", "carried"]).await;
    let issue = tracker.member.file("crash").await;
    let issue = add(&tracker.member, &issue, &[&carried]).await.unwrap();
    let missing = || Label { id: Uuid::now_v7().to_string(), ..Label::default() };
    let (x, y) = (missing(), missing());

    let label_set = [&x, &known, &carried, &y];
    for result in [
        add(&tracker.member, &issue, &label_set).await,
        remove(&tracker.member, &issue, &label_set).await,
        replace(&tracker.member, &issue, &label_set).await,
    ] {
        let status = assert_error(result, Code::NotFound, "NOT_FOUND");
        assert_eq!(bad_fields(&status), ["label_ids[0]", "label_ids[3]"]);
    }
    let missing_issue = Issue { id: missing().id, ..Issue::default() };
    let status = assert_error(add(&tracker.member, &missing_issue, &[&x]).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["issue_id"]);
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(tracker.count(COUNT_EVENTS).await, 1);
}

#[tokio::test]
async fn malformed_duplicate_and_too_many_label_ids_are_invalid() {
    let tracker = Tracker::start().await;
    let [bug] = create_labels(&tracker.member, ["bug"]).await;
    let upper_case = Label { id: bug.id.to_uppercase(), ..bug.clone() };
    let issue = tracker.member.file("crash").await;
    let malformed = Label { id: "bug".into(), ..Label::default() };
    let many: Vec<Label> = (0..101).map(|_| Label { id: Uuid::now_v7().to_string(), ..Label::default() }).collect();
    let many: Vec<&Label> = many.iter().collect();
    let member = &tracker.member;

    for (label_set, field) in
        [(&[&bug, &upper_case][..], "label_ids[1]"), (&[&malformed], "label_ids[0]"), (&many, "label_ids")]
    {
        assert_invalid(add(member, &issue, label_set).await, &[field]);
        assert_invalid(remove(member, &issue, label_set).await, &[field]);
        assert_invalid(replace(member, &issue, label_set).await, &[field]);
    }
    assert_invalid(add(member, &issue, &[]).await, &["label_ids"]);
    assert_invalid(remove(member, &issue, &[]).await, &["label_ids"]);
    let all = AddIssueLabelsRequest { expected_version: -1, request_id: "1".into(), ..Default::default() };
    let status = member.labels().add_issue_labels(all).await;
    assert_invalid(status, &["request_id", "issue_id", "label_ids", "expected_version"]);
    assert_eq!(tracker.member.get(&issue.id).await, issue);
}

#[tokio::test]
async fn label_changes_with_a_stale_version_or_on_a_deleted_issue_fail() {
    let tracker = Tracker::start().await;
    let [bug] = create_labels(&tracker.member, ["bug"]).await;
    let issue = tracker.member.file("crash").await;
    let issue = add(&tracker.member, &issue, &[&bug]).await.unwrap();
    let request = |expected_version| ReplaceIssueLabelsRequest {
        issue_id: issue.id.clone(),
        expected_version,
        ..Default::default()
    };
    let mut client = tracker.member.labels();

    for stale in [1, 3] {
        let status = assert_error(client.replace_issue_labels(request(stale)).await, Code::Aborted, "VERSION_MISMATCH");
        assert_eq!(error_metadata(&status, "current_version").as_deref(), Some("2"));
    }
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(client.replace_issue_labels(request(2)).await.unwrap().into_inner().version, 3);

    let delete = DeleteIssueRequest { id: issue.id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();
    for result in [
        add(&tracker.member, &issue, &[&bug]).await,
        remove(&tracker.member, &issue, &[&bug]).await,
        replace(&tracker.member, &issue, &[&bug]).await,
    ] {
        assert_error(result, Code::FailedPrecondition, "ISSUE_STATE");
    }
    assert_eq!(tracker.count(COUNT_ISSUE_LABELS).await, 0);
}

#[tokio::test]
async fn issue_has_at_most_100_labels() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let sql = "INSERT INTO labels (id, name) SELECT gen_random_uuid(), 'label ' || n FROM generate_series(1, 101) n
        RETURNING id";
    let rows = tracker.sql(sql, &[]).await;
    let all: Vec<Label> =
        rows.iter().map(|row| Label { id: row.get::<_, Uuid>(0).to_string(), ..Label::default() }).collect();
    let all: Vec<&Label> = all.iter().collect();

    let full = add(&tracker.member, &issue, &all[..100]).await.unwrap();
    assert_eq!((full.labels.len(), full.version), (100, 2));
    let over = add(&tracker.member, &issue, &all[100..]).await;
    assert_error(over, Code::FailedPrecondition, "TOO_MANY_LABELS");
    assert_eq!(tracker.member.get(&issue.id).await, full);
    // Labels that the issue already has do not count twice, and a replacement counts only the new set.
    assert_eq!(add(&tracker.member, &issue, &all[..1]).await.unwrap(), full);
    assert_eq!(replace(&tracker.member, &issue, &all[1..]).await.unwrap().labels.len(), 100);
}

#[tokio::test]
async fn concurrent_replacements_leave_exactly_one_of_the_sets() {
    let tracker = Tracker::start().await;
    let [a, b, c, d] = create_labels(&tracker.member, ["a", "b", "c", "d"]).await;
    let issue = tracker.member.file("crash").await;
    let (one_set, other_set) = ([&a, &b], [&b, &c, &d]);
    let mut changes = 0;
    for _ in 0..30 {
        let (left, right) =
            tokio::join!(replace(&tracker.member, &issue, &one_set), replace(&tracker.admin, &issue, &other_set));
        let (left, right) = (left.unwrap(), right.unwrap());
        assert_eq!((names(&left.labels), names(&right.labels)), (vec!["a", "b"], vec!["b", "c", "d"]));
        let now = tracker.member.get(&issue.id).await;
        let later = if left.version > right.version { left } else { right };
        assert_eq!(now, later);
        changes = now.version - 1;
    }
    assert_eq!(tracker.count("SELECT count(DISTINCT version) FROM issue_events").await, changes);
}

#[tokio::test]
async fn concurrent_additions_are_all_applied() {
    let tracker = Tracker::start().await;
    let label_set = create_labels(&tracker.member, ["a", "b", "c", "d", "e", "f"]).await;
    for _ in 0..10 {
        let issue = tracker.member.file("crash").await;
        let additions = label_set.iter().map(|label| {
            let (client, issue, label) = (tracker.member.clone(), issue.clone(), label.clone());
            async move { add(&client, &issue, &[&label]).await }
        });
        for added in futures_util::future::join_all(additions).await {
            added.unwrap();
        }
        let now = tracker.member.get(&issue.id).await;
        assert_eq!((names(&now.labels), now.version), (vec!["a", "b", "c", "d", "e", "f"], 7));
    }
}

#[tokio::test]
async fn label_deletion_concurrent_with_additions_leaves_no_dangling_reference() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let kept = tracker.member.label("kept").await;
    for _ in 0..15 {
        let to_delete = tracker.member.label("to_delete").await;
        let (both, only_deleted) = ([&kept, &to_delete], [&to_delete]);
        let issue_with_label = Issue { title: "with label".into(), label_ids: ids(&[&to_delete]), ..Issue::default() };
        let create = issue_tracker::pb::CreateIssueRequest { issue: Some(issue_with_label), ..Default::default() };
        let mut issues = tracker.member.issues();
        let (deleted, added, replaced, created) = tokio::join!(
            delete(&tracker.admin, &to_delete.id, true),
            add(&tracker.member, &issue, &both),
            replace(&tracker.admin, &issue, &only_deleted),
            issues.create_issue(create)
        );
        assert!((0..=2).contains(&deleted.unwrap()));
        for outcome in [added.map(drop), replaced.map(drop), created.map(drop)] {
            if let Err(status) = outcome {
                assert_error(Err::<(), _>(status), Code::NotFound, "NOT_FOUND");
            }
        }
        let id: Uuid = to_delete.id.parse().unwrap();
        assert!(tracker.sql("SELECT FROM issue_labels WHERE label_id = $1", &[&id]).await.is_empty());
    }
    let versions = "SELECT count(*) FROM issues i WHERE version - 1 <>
        (SELECT count(DISTINCT e.version) FROM issue_events e WHERE e.issue_id = i.id)";
    assert_eq!(tracker.count(versions).await, 0);
}

#[tokio::test]
async fn blocked_update_returns_the_labels_as_of_its_version() {
    let tracker = Tracker::start().await;
    let [bug] = create_labels(&tracker.member, ["bug"]).await;
    let issue = tracker.member.file("crash").await;
    let (id, label): (Uuid, Uuid) = (issue.id.parse().unwrap(), bug.id.parse().unwrap());
    // The statements of AddIssueLabels, before the commit.
    let mut other = tracker.session().await;
    let addition = other.transaction().await.unwrap();
    addition.execute("UPDATE issues SET change_actor_id = reporter_id WHERE id = $1", &[&id]).await.unwrap();
    addition.execute("INSERT INTO issue_labels VALUES ($1, $2)", &[&id, &label]).await.unwrap();

    let renamed = Issue { title: "crash on start".into(), ..issue.clone() };
    let request = UpdateIssueRequest { issue: Some(renamed), ..Default::default() };
    let mut client = tracker.member.issues();
    let update = tokio::spawn(async move { client.update_issue(request).await });
    tracker.wait_until_blocked().await;
    addition.commit().await.unwrap();

    let updated = update.await.unwrap().unwrap().into_inner();
    assert_eq!((updated.version, names(&updated.labels)), (3, vec!["bug"]));
}

#[tokio::test]
async fn dry_run_has_the_outcome_of_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let [bug, ui] = create_labels(&tracker.member, ["bug", "ui"]).await;
    let issue = tracker.member.file("crash").await;
    let issue = add(&tracker.member, &issue, &[&bug]).await.unwrap();
    let mut client = tracker.member.labels();
    let (id, validate_only) = (|| issue.id.clone(), true);

    let label = Label { name: "new".into(), ..Label::default() };
    let create = CreateLabelRequest { label: Some(label), validate_only, ..Default::default() };
    assert_eq!(client.create_label(create).await.unwrap().into_inner().name, "new");
    let label = Label { name: "BUG".into(), ..ui.clone() };
    let update = UpdateLabelRequest { label: Some(label), validate_only, ..Default::default() };
    assert_error(client.update_label(update).await, Code::AlreadyExists, "ALREADY_EXISTS");
    let delete = DeleteLabelRequest { id: bug.id.clone(), force: true, validate_only, ..Default::default() };
    assert_eq!(client.delete_label(delete).await.unwrap().into_inner().issue_count, 1);
    let add = AddIssueLabelsRequest { issue_id: id(), label_ids: ids(&[&ui]), validate_only, ..Default::default() };
    let validated = client.add_issue_labels(add).await.unwrap().into_inner();
    assert_eq!((names(&validated.labels), validated.version), (vec!["bug", "ui"], 3));
    let remove =
        RemoveIssueLabelsRequest { issue_id: id(), label_ids: ids(&[&bug]), validate_only, ..Default::default() };
    assert_eq!(client.remove_issue_labels(remove).await.unwrap().into_inner().labels, []);
    let replace = ReplaceIssueLabelsRequest { issue_id: id(), validate_only, ..Default::default() };
    assert_eq!(client.replace_issue_labels(replace).await.unwrap().into_inner().version, 3);

    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(list(&tracker.viewer, 0, "").await.unwrap().labels, [bug, ui]);
    assert_eq!(tracker.count(COUNT_EVENTS).await, 1);
}

#[tokio::test]
async fn retry_with_the_request_id_returns_the_stored_response_and_writes_once() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let mut client = tracker.member.labels();
    let request_id = || Uuid::new_v4().to_string();

    let label = Some(Label { name: "bug".into(), ..Label::default() });
    let create = CreateLabelRequest { label, request_id: request_id(), ..Default::default() };
    let label = client.create_label(create.clone()).await.unwrap().into_inner();
    assert_eq!(
        client.create_label(create).await.unwrap().into_inner(),
        label,
        "must not fail because the name is taken"
    );
    let (issue_id, label_ids) = (issue.id.clone(), ids(&[&label]));
    let add = AddIssueLabelsRequest { issue_id, label_ids, request_id: request_id(), ..Default::default() };
    let added = client.add_issue_labels(add.clone()).await.unwrap().into_inner();
    let delete =
        DeleteLabelRequest { id: label.id.clone(), force: true, request_id: request_id(), ..Default::default() };
    assert_eq!(client.delete_label(delete.clone()).await.unwrap().into_inner().issue_count, 1);

    assert_eq!(
        client.delete_label(delete).await.unwrap().into_inner().issue_count,
        1,
        "must not fail because the label is deleted"
    );
    assert_eq!(client.add_issue_labels(add.clone()).await.unwrap().into_inner(), added);
    let other = AddIssueLabelsRequest { expected_version: 2, ..add };
    assert_error(client.add_issue_labels(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(tracker.member.get(&issue.id).await.version, 3);
}

#[tokio::test]
async fn label_beyond_the_limit_is_refused_and_writes_nothing() {
    let tracker = Tracker::start_with(limits(&["--labels", "2"])).await;
    let [first, _] = create_labels(&tracker.member, ["first", "second"]).await;
    let third = CreateLabelRequest {
        label: Some(Label { name: "third".into(), ..Label::default() }),
        request_id: Uuid::now_v7().to_string(),
        ..CreateLabelRequest::default()
    };
    let create_third = async |validate_only| {
        let request = CreateLabelRequest { validate_only, ..third.clone() };
        tracker.member.labels().create_label(request).await
    };
    let before = tracker.contents().await;

    for validate_only in [true, false] {
        let status = assert_error(create_third(validate_only).await, Code::ResourceExhausted, "LABELS_EXCEEDED");
        assert!(status.message().contains("more than 2 labels"), "{status:?}");
        assert_eq!(error_metadata(&status, "labels_max").as_deref(), Some("2"));
        assert!(status.get_details_retry_info().is_none(), "a retry does not help");
    }
    assert_error(create(&tracker.member, "FIRST", "").await, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(tracker.contents().await, before);

    delete(&tracker.member, &first.id, false).await.unwrap();
    let created = create_third(false).await.unwrap().into_inner();
    assert_eq!(create_third(false).await.unwrap().into_inner(), created, "the stored response");
    update(&tracker.member, Label { name: "renamed".into(), ..created }, &["name"]).await.unwrap();
}

#[tokio::test]
async fn concurrent_calls_on_two_replicas_keep_to_the_limit_of_labels() {
    let tracker = Tracker::start_with(limits(&["--labels", "10"])).await;
    let replica = tracker.start_replica_with(limits(&["--labels", "10"])).await;

    let clients = [&tracker.member, &replica.member];
    let created = futures_util::future::join_all(
        (0..40)
            .zip(clients.into_iter().cycle())
            .map(async |(n, client)| create(client, &format!("label {n}"), "").await),
    );
    let (created, refused): (Vec<_>, Vec<_>) = created.await.into_iter().partition(Result::is_ok);

    assert_eq!((created.len(), refused.len()), (10, 30));
    for outcome in refused {
        assert_error(outcome, Code::ResourceExhausted, "LABELS_EXCEEDED");
    }
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 10);
}
