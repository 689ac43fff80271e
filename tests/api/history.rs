//! The history in `issue_events`, and the migrations.

use std::collections::{BTreeMap, BTreeSet};

use issue_tracker::{
    auth::new_token,
    db::migrate::migrate,
    pb::{
        AddIssueLabelsRequest, BulkUpdateStatusRequest, DeleteIssueRequest, DeleteLabelRequest, Issue, Priority,
        RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest, Status as IssueStatus, UndeleteIssueRequest,
        UpdateIssueRequest, WhoAmIRequest,
    },
};
use proptest::{prelude::*, test_runner::TestRunner};
use prost_types::FieldMask;
use tokio_postgres::Config;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::{
    harness::{Client, Tracker, assert_error, execute, limits, new_database},
    support::database::session,
};

/// A row of `issue_events`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    version: i64,
    actor: String,
    field: String,
    old: Option<String>,
    new: Option<String>,
}

/// Returns the events of an issue, oldest first.
async fn history(tracker: &Tracker, issue_id: &str) -> Vec<Event> {
    let sql = "SELECT version, actor_id, field, old_value, new_value FROM issue_events WHERE issue_id = $1 ORDER BY id";
    let rows = tracker.sql(sql, &[&issue_id.parse::<Uuid>().unwrap()]).await;
    rows.iter()
        .map(|row| Event {
            version: row.get(0),
            actor: row.get::<_, Uuid>(1).to_string(),
            field: row.get(2),
            old: row.get(3),
            new: row.get(4),
        })
        .collect()
}

/// An event whose actor is `member`; `values` are the old and the new one.
fn event(tracker: &Tracker, version: i64, field: &str, values: [Option<&str>; 2]) -> Event {
    let [old, new] = values.map(|value| value.map(str::to_owned));
    Event { version, actor: tracker.member.user.id.clone(), field: field.to_owned(), old, new }
}

async fn update(client: &Client, issue: Issue, paths: &[&str]) -> Result<Issue, Status> {
    let mask = FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() };
    let request = UpdateIssueRequest { issue: Some(issue), update_mask: Some(mask), ..Default::default() };
    client.issues().update_issue(request).await.map(tonic::Response::into_inner)
}

async fn set_deleted(client: &Client, issue: &Issue, deleted: bool) -> Result<Issue, Status> {
    let id = issue.id.clone();
    let response = match deleted {
        true => client.issues().delete_issue(DeleteIssueRequest { id, ..Default::default() }).await,
        false => client.issues().undelete_issue(UndeleteIssueRequest { id, ..Default::default() }).await,
    };
    response.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn creating_an_issue_writes_no_event() {
    let tracker = Tracker::start().await;
    let label = tracker.member.label("bug").await;
    let full = Issue {
        title: "crash".into(),
        description: "on start".into(),
        status: IssueStatus::Closed.into(),
        priority: Priority::High.into(),
        assignee_id: tracker.admin.user.id.clone(),
        external_id: "X-1".into(),
        label_ids: vec![label.id],
        ..Issue::default()
    };
    assert_eq!(tracker.member.file_as(full).await.version, 1);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 0);
}

#[tokio::test]
async fn each_changed_field_is_one_event_with_the_new_version_and_the_caller() {
    let tracker = Tracker::start().await;
    let issue = tracker.admin.file("crash").await;
    let admin = tracker.admin.user.id.clone();
    let full = Issue {
        id: issue.id.clone(),
        title: "crash on start".into(),
        description: "it burns".into(),
        status: IssueStatus::Closed.into(),
        priority: Priority::Critical.into(),
        assignee_id: admin.clone(),
        external_id: "X-1".into(),
        ..Issue::default()
    };
    let paths = ["title", "description", "status", "priority", "assignee_id", "external_id"];
    for path in paths {
        update(&tracker.member, full.clone(), &[path]).await.unwrap();
    }
    // One update clears or resets every field but the title.
    let reset = Issue { status: IssueStatus::Open.into(), title: full.title.clone(), ..issue.clone() };
    assert_eq!(update(&tracker.member, reset, &["*"]).await.unwrap().version, 8);

    let mut events = history(&tracker, &issue.id).await;
    events[6..].sort_by_key(|event| paths.iter().position(|path| *path == event.field));
    let event = |version, field, old, new| event(&tracker, version, field, [old, new]);
    let expected = [
        event(2, "title", Some("crash"), Some("crash on start")),
        event(3, "description", Some(""), Some("it burns")),
        event(4, "status", Some("OPEN"), Some("CLOSED")),
        event(5, "priority", Some("NONE"), Some("CRITICAL")),
        event(6, "assignee_id", None, Some(&admin)),
        event(7, "external_id", None, Some("X-1")),
        event(8, "description", Some("it burns"), Some("")),
        event(8, "status", Some("CLOSED"), Some("OPEN")),
        event(8, "priority", Some("CRITICAL"), Some("NONE")),
        event(8, "assignee_id", Some(&admin), None),
        event(8, "external_id", Some("X-1"), None),
    ];
    assert_eq!(events, expected);
}

#[tokio::test]
async fn bulk_updates_deletions_and_label_changes_write_events() {
    let tracker = Tracker::start().await;
    let (issue, done) = (tracker.admin.file("crash").await, tracker.admin.file("done").await);
    let (bug, ui) = (tracker.admin.label("bug").await, tracker.admin.label("ui").await);
    let status = IssueStatus::InProgress.into();
    update(&tracker.admin, Issue { status, ..done.clone() }, &["status"]).await.unwrap();
    let before = history(&tracker, &done.id).await;

    let ids = vec![issue.id.clone(), done.id.clone()];
    let bulk = BulkUpdateStatusRequest { ids, status, comment: "on it".into(), ..Default::default() };
    tracker.member.issues().bulk_update_status(bulk).await.unwrap();
    set_deleted(&tracker.member, &issue, true).await.unwrap();
    set_deleted(&tracker.member, &issue, false).await.unwrap();
    let issue_id = issue.id.clone();
    let add = AddIssueLabelsRequest { issue_id, label_ids: vec![bug.id.clone()], ..Default::default() };
    tracker.member.labels().add_issue_labels(add).await.unwrap();
    let issue_id = issue.id.clone();
    let replace = ReplaceIssueLabelsRequest { issue_id, label_ids: vec![ui.id.clone()], ..Default::default() };
    tracker.member.labels().replace_issue_labels(replace).await.unwrap();
    let issue_id = issue.id.clone();
    let remove = RemoveIssueLabelsRequest { issue_id, label_ids: vec![ui.id.clone()], ..Default::default() };
    tracker.member.labels().remove_issue_labels(remove).await.unwrap();

    let event = |version, field, old, new| event(&tracker, version, field, [old, new]);
    let expected = [
        event(2, "status", Some("OPEN"), Some("IN_PROGRESS")),
        event(3, "deleted", Some("false"), Some("true")),
        event(4, "deleted", Some("true"), Some("false")),
        event(5, "label", None, Some(&bug.id)),
        event(6, "label", Some(&bug.id), None),
        event(6, "label", None, Some(&ui.id)),
        event(7, "label", Some(&ui.id), None),
    ];
    assert_eq!(history(&tracker, &issue.id).await, expected);
    assert_eq!(history(&tracker, &done.id).await, before, "its status did not change");
}

#[tokio::test]
async fn dry_runs_failed_calls_and_updates_without_a_change_write_no_event() {
    let tracker = Tracker::start().await;
    let (issue, deleted) = (tracker.member.file("crash").await, tracker.member.file("deleted").await);
    set_deleted(&tracker.member, &deleted, true).await.unwrap();
    let renamed = Issue { title: "renamed".into(), ..issue.clone() };
    let request = UpdateIssueRequest { issue: Some(renamed), comment: "why".into(), ..Default::default() };
    let mut client = tracker.member.issues();

    let dry_run = UpdateIssueRequest { validate_only: true, ..request.clone() };
    assert_eq!(client.update_issue(dry_run).await.unwrap().into_inner().version, 2);
    let stale = UpdateIssueRequest { expected_version: 9, ..request.clone() };
    assert_error(client.update_issue(stale).await, Code::Aborted, "VERSION_MISMATCH");
    let unassignable = Issue { assignee_id: Uuid::now_v7().to_string(), ..request.issue.clone().unwrap() };
    let missing_assignee = UpdateIssueRequest { issue: Some(unassignable), ..request };
    assert_error(client.update_issue(missing_assignee).await, Code::NotFound, "NOT_FOUND");
    let ids = vec![issue.id.clone(), deleted.id.clone()];
    let bulk = BulkUpdateStatusRequest { ids, status: IssueStatus::Closed.into(), ..Default::default() };
    assert_error(client.bulk_update_status(bulk).await, Code::FailedPrecondition, "ISSUE_STATE");
    let same = update(&tracker.member, issue.clone(), &["title", "status", "assignee_id", "external_id"]).await;

    assert_eq!(same.unwrap(), issue);
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(history(&tracker, &issue.id).await, []);
}

#[tokio::test]
async fn sql_update_without_an_actor_is_rejected() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    update(&tracker.member, Issue { title: "burn".into(), ..issue.clone() }, &["title"]).await.unwrap();
    let client = tracker.session().await;

    let anonymous = client.batch_execute("UPDATE issues SET title = 'tampered'").await.unwrap_err();
    assert!(anonymous.as_db_error().unwrap().message().contains("change_actor_id"), "{anonymous:?}");
    client
        .batch_execute("UPDATE issues SET title = 'fixed', version = 7, change_actor_id = reporter_id")
        .await
        .unwrap();

    let now = tracker.member.get(&issue.id).await;
    assert_eq!((&*now.title, now.version), ("fixed", 3), "the trigger overrides the version");
    let title = |version, old, new| event(&tracker, version, "title", [Some(old), Some(new)]);
    assert_eq!(history(&tracker, &issue.id).await, [title(2, "crash", "burn"), title(3, "burn", "fixed")]);
    assert_eq!(tracker.count("SELECT count(change_actor_id) FROM issues").await, 0, "the trigger resets the column");
}

#[tokio::test]
async fn update_time_never_decreases() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    // The clock was set back by an hour.
    let client = tracker.session().await;
    let ahead = "ALTER TABLE issues DISABLE TRIGGER USER;
        UPDATE issues SET create_time = now() + interval '1 h', update_time = now() + interval '1 h';
        ALTER TABLE issues ENABLE TRIGGER USER";
    client.batch_execute(ahead).await.unwrap();
    let before = tracker.member.get(&issue.id).await;

    let status = IssueStatus::Closed.into();
    let closed = update(&tracker.member, Issue { status, ..issue.clone() }, &["status"]).await.unwrap();

    assert_eq!((closed.update_time, closed.close_time), (before.update_time, before.create_time));
    let deleted = set_deleted(&tracker.member, &issue, true).await.unwrap();
    assert_eq!(deleted.update_time, before.update_time);
}

/// A change of an issue. Each number selects one of a few values, so that some operations change nothing.
#[derive(Clone, Debug)]
enum Operation {
    Title(u8),
    Description(u8),
    Status(u8),
    Priority(u8),
    Assignee(u8),
    ExternalId(bool),
    /// All fields, with values that one number selects.
    Everything(u8),
    BulkStatus(u8),
    Deleted(bool),
    AddLabels(u8),
    RemoveLabels(u8),
    ReplaceLabels(u8),
    DeleteLabel(u8),
    DryRun,
    StaleVersion,
}

fn operation() -> impl Strategy<Value = (bool, Operation)> {
    use Operation::*;
    let operation = prop_oneof![
        (0..3u8).prop_map(Title),
        (0..3u8).prop_map(Description),
        (0..3u8).prop_map(Status),
        (0..5u8).prop_map(Priority),
        (0..4u8).prop_map(Assignee),
        any::<bool>().prop_map(ExternalId),
        any::<u8>().prop_map(Everything),
        (0..3u8).prop_map(BulkStatus),
        prop_oneof![1 => Just(true), 3 => Just(false)].prop_map(Deleted),
        (1..8u8).prop_map(AddLabels),
        (1..8u8).prop_map(RemoveLabels),
        (0..8u8).prop_map(ReplaceLabels),
        (0..3u8).prop_map(DeleteLabel),
        Just(DryRun),
        Just(StaleVersion),
    ];
    (any::<bool>(), operation)
}

/// The issue of a case, and the labels that the case may use.
struct Subject<'a> {
    tracker: &'a Tracker,
    id: String,
    labels: Vec<String>,
}

impl Subject<'_> {
    fn values(&self, n: u8) -> Issue {
        let clients = [&self.tracker.admin, &self.tracker.member, &self.tracker.viewer];
        Issue {
            id: self.id.clone(),
            title: format!("title {n}"),
            description: "x".repeat(n.into()),
            status: i32::from(n % 3) + 1,
            priority: i32::from(n % 5),
            assignee_id: clients.get(usize::from(n % 4)).map(|client| client.user.id.clone()).unwrap_or_default(),
            external_id: if n.is_multiple_of(2) { String::new() } else { format!("X-{}", self.id) },
            ..Issue::default()
        }
    }

    /// Returns the labels whose bit is set.
    fn labels(&self, bits: u8) -> Vec<String> {
        let chosen = self.labels.iter().enumerate().filter(|(index, _)| bits & 1 << index != 0);
        chosen.map(|(_, id)| id.clone()).collect()
    }

    /// Runs the operation. It may fail because of the issue's state or a deleted label.
    async fn run(&self, client: &Client, operation: &Operation) -> Result<(), Status> {
        use Operation::*;
        let issue_id = self.id.clone();
        let (mut issues, mut labels) = (client.issues(), client.labels());
        let set = async |n: u8, path| update(client, self.values(n), &[path]).await.map(drop);
        match *operation {
            Title(n) => set(n, "title").await,
            Description(n) => set(n, "description").await,
            Status(n) => set(n, "status").await,
            Priority(n) => set(n, "priority").await,
            Assignee(n) => set(n, "assignee_id").await,
            ExternalId(some) => set(some.into(), "external_id").await,
            Everything(n) => set(n, "*").await,
            BulkStatus(n) => {
                let (ids, status) = (vec![issue_id], i32::from(n) + 1);
                let request = BulkUpdateStatusRequest { ids, status, ..Default::default() };
                issues.bulk_update_status(request).await.map(drop)
            }
            Deleted(deleted) => set_deleted(client, &self.values(0), deleted).await.map(drop),
            AddLabels(bits) => {
                let request = AddIssueLabelsRequest { issue_id, label_ids: self.labels(bits), ..Default::default() };
                labels.add_issue_labels(request).await.map(drop)
            }
            RemoveLabels(bits) => {
                let request = RemoveIssueLabelsRequest { issue_id, label_ids: self.labels(bits), ..Default::default() };
                labels.remove_issue_labels(request).await.map(drop)
            }
            ReplaceLabels(bits) => {
                let request =
                    ReplaceIssueLabelsRequest { issue_id, label_ids: self.labels(bits), ..Default::default() };
                labels.replace_issue_labels(request).await.map(drop)
            }
            DeleteLabel(n) => {
                let request =
                    DeleteLabelRequest { id: self.labels[usize::from(n)].clone(), force: true, ..Default::default() };
                labels.delete_label(request).await.map(drop)
            }
            DryRun => {
                let (issue, validate_only) = (Some(self.values(99)), true);
                let request = UpdateIssueRequest { issue, validate_only, ..Default::default() };
                issues.update_issue(request).await.map(drop)
            }
            StaleVersion => {
                let (issue, expected_version) = (Some(self.values(99)), 1_000);
                let request = UpdateIssueRequest { issue, expected_version, ..Default::default() };
                issues.update_issue(request).await.map(drop)
            }
        }
    }
}

/// The values of an issue by the field name in events.
type Values = BTreeMap<String, Option<String>>;

/// Returns the values of the fields that have events, and the label ids.
fn values(issue: &Issue) -> (Values, BTreeSet<String>) {
    let status = IssueStatus::try_from(issue.status).unwrap().as_str_name().trim_start_matches("STATUS_");
    let priority = Priority::try_from(issue.priority).unwrap().as_str_name().trim_start_matches("PRIORITY_");
    let some = |text: &str| Some(text.to_owned());
    let values = [
        ("title", some(&issue.title)),
        ("description", some(&issue.description)),
        ("status", some(status)),
        ("priority", some(if priority == "UNSPECIFIED" { "NONE" } else { priority })),
        ("assignee_id", some(&issue.assignee_id).filter(|id| !id.is_empty())),
        ("external_id", some(&issue.external_id).filter(|id| !id.is_empty())),
        ("deleted", Some(issue.delete_time.is_some().to_string())),
    ];
    let values = values.map(|(field, value)| (field.to_owned(), value)).into();
    (values, issue.labels.iter().map(|label| label.id.clone()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn undoing_all_events_restores_the_created_issue() {
    let tracker = Tracker::start().await;
    let mut runner = TestRunner::new(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() });
    let runtime = tokio::runtime::Handle::current();
    let cases = (any::<u8>(), proptest::collection::vec(operation(), 1..16));
    let check = |(n, operations): (u8, Vec<(bool, Operation)>)| {
        tokio::task::block_in_place(|| runtime.block_on(undo_all_events(&tracker, n, &operations)))
    };
    runner.run(&cases, check).unwrap();
}

async fn undo_all_events(tracker: &Tracker, n: u8, operations: &[(bool, Operation)]) -> Result<(), TestCaseError> {
    let mut subject = Subject { tracker, id: String::new(), labels: Vec::new() };
    for _ in 0..3 {
        subject.labels.push(tracker.member.label(&Uuid::new_v4().to_string()).await.id);
    }
    let created = Issue { external_id: String::new(), label_ids: subject.labels(n), ..subject.values(n) };
    let created = tracker.admin.file_as(created).await;
    subject.id = created.id.clone();

    let mut last = created.clone();
    let mut actors = BTreeMap::new();
    for (by_admin, operation) in operations {
        let client = if *by_admin { &tracker.admin } else { &tracker.member };
        if let Err(status) = subject.run(client, operation).await {
            let allowed = [Code::FailedPrecondition, Code::NotFound, Code::Aborted];
            prop_assert!(allowed.contains(&status.code()), "{:?}: {:?}", operation, status);
        }
        let now = tracker.viewer.get(&created.id).await;
        let bump = i64::from(values(&now) != values(&last));
        prop_assert_eq!(now.version, last.version + bump, "after {:?}", operation);
        let update_time = |issue: &Issue| issue.update_time.map(|time| (time.seconds, time.nanos));
        prop_assert!(update_time(&now) >= update_time(&last));
        if bump == 1 {
            actors.insert(now.version, client.user.id.clone());
        }
        last = now;
    }

    let (mut current, mut labels) = values(&last);
    let events = history(tracker, &created.id).await;
    let recorded: BTreeMap<i64, String> = events.iter().map(|event| (event.version, event.actor.clone())).collect();
    prop_assert_eq!(recorded, actors);
    let reopened = events.iter().filter(|event| event.field == "status" && event.old.as_deref() == Some("CLOSED"));
    prop_assert_eq!(reopened.count() as i32, last.reopen_count);
    for Event { field, old, new, .. } in events.into_iter().rev() {
        if field == "label" {
            prop_assert!(new.is_none_or(|id| labels.remove(&id)) && old.is_none_or(|id| labels.insert(id)));
            continue;
        }
        prop_assert_eq!(current.insert(field.clone(), old), Some(new), "{}", field);
    }
    prop_assert_eq!((current, labels), values(&created));
    Ok(())
}

/// Creates a database without the schema.
async fn empty_database() -> Config {
    let config = new_database().await;
    let name = format!("{}_empty", config.get_dbname().unwrap());
    execute(&config, &format!("CREATE DATABASE {name} TEMPLATE template0")).await;
    let mut empty = config;
    empty.dbname(&name);
    empty
}

const APPLIED: &str = "SELECT version, name, applied_on, checksum FROM refinery_schema_history ORDER BY version";

/// Returns version, name, time and checksum of the applied migrations.
async fn applied(config: &Config) -> Vec<[String; 4]> {
    let client = session(config).await;
    let rows = client.query(APPLIED, &[]).await.unwrap();
    rows.iter().map(|row| [row.get::<_, i32>(0).to_string(), row.get(1), row.get(2), row.get(3)]).collect()
}

#[tokio::test]
async fn repeated_migration_changes_nothing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let before = applied(&tracker.config).await;

    migrate(&tracker.config).await.unwrap();

    assert!(!before.is_empty());
    assert_eq!(applied(&tracker.config).await, before);
    assert_eq!(tracker.member.get(&issue.id).await, issue);
}

/// Starts from the schema of V2, with a user who has a session and an API token.
#[tokio::test]
async fn sessions_and_api_tokens_survive_the_migration_to_expiring_tokens() {
    let config = empty_database().await;
    execute(&config, include_str!("../../migrations/V1__issue_tracker.sql")).await;
    execute(&config, include_str!("../../migrations/V2__imports_resumed_and_reverted.sql")).await;
    let table = "CREATE TABLE refinery_schema_history
        (version int4 PRIMARY KEY, name varchar(255), applied_on varchar(255), checksum varchar(255))";
    execute(&config, table).await;
    for [version, name, time, checksum] in applied(&new_database().await).await.into_iter().take(2) {
        let row = format!("INSERT INTO refinery_schema_history VALUES ({version}, '{name}', '{time}', '{checksum}')");
        execute(&config, &row).await;
    }
    let (session, api) = (new_token().unwrap(), new_token().unwrap());
    let hex = |sha256: [u8; 32]| sha256.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let rows = format!(
        "INSERT INTO users (id, username, password_hash, role) VALUES (gen_random_uuid(), 'ada', '', 2);
        INSERT INTO tokens (id, user_id, sha256, name, expire_time)
        SELECT gen_random_uuid(), id, '\\x{}'::bytea, NULL, now() + interval '1 hour' FROM users
        UNION ALL SELECT gen_random_uuid(), id, '\\x{}'::bytea, 'ci', NULL FROM users",
        hex(session.1),
        hex(api.1)
    );
    execute(&config, &rows).await;

    migrate(&config).await.unwrap();

    let tracker = Tracker::start_on(config, limits(&[])).await;
    for token in [&session.0, &api.0] {
        tracker.client_with_token(Some(token)).auth().who_am_i(WhoAmIRequest {}).await.unwrap();
    }
}

#[tokio::test]
async fn concurrent_migrations_of_an_empty_database_all_succeed() {
    let config = empty_database().await;

    let all = futures_util::future::join_all((0..4).map(|_| migrate(&config))).await;

    for migrated in all {
        migrated.unwrap();
    }
    let reference = new_database().await;
    let without_time = |rows: Vec<[String; 4]>| rows.into_iter().map(|[v, n, _, c]| [v, n, c]).collect::<Vec<_>>();
    assert_eq!(without_time(applied(&config).await), without_time(applied(&reference).await));
}

#[tokio::test]
async fn newer_schema_and_changed_migration_are_rejected() {
    let newer = new_database().await;
    let row = "INSERT INTO refinery_schema_history VALUES (999, 'from_the_future', '2026-01-01T00:00:00Z', '1')";
    execute(&newer, row).await;
    let other = new_database().await;
    execute(&other, "UPDATE refinery_schema_history SET checksum = '1' WHERE version = 1").await;

    let message = migrate(&newer).await.unwrap_err().to_string();
    assert!(message.contains("newer") && message.contains("999 (from_the_future)"), "{message}");
    let message = migrate(&other).await.unwrap_err().to_string();
    assert!(message.contains("migration 1 (issue_tracker)") && message.contains("other contents"), "{message}");
}
