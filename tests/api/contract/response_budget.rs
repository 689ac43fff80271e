//! The budget of each user for large stored responses.

use std::time::Duration;

use futures_util::future::join_all;
use issue_tracker::{
    db::response_budget::prune_response_budgets,
    pb::{
        BatchCreateIssuesRequest, BatchCreateIssuesResponse, CreateCommentRequest, CreateIssueRequest, Issue,
        UpdateIssueRequest,
    },
};
use prost::Message;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_error, error_metadata, limits};

const MIB: usize = 1_048_576;
const REASON: &str = "STORED_RESPONSES_EXCEEDED";

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

/// Starts a service that stores 1 MiB of large responses for a user.
async fn start() -> Tracker {
    Tracker::start_with(limits(&["--stored-response-bytes", "1048576"])).await
}

/// Returns text that PostgreSQL cannot compress.
fn noise(bytes: usize) -> String {
    (0..bytes.div_ceil(32)).map(|_| Uuid::new_v4().simple().to_string()).collect::<String>()[..bytes].to_owned()
}

async fn file_with_description(client: &Client, description: String) -> Issue {
    client.file_as(Issue { title: "described".into(), description, ..Issue::default() }).await
}

async fn set_title(client: &Client, issue: &Issue, title: &str, request_id: &str) -> Result<Issue, Status> {
    let request = UpdateIssueRequest {
        issue: Some(Issue { id: issue.id.clone(), title: title.to_owned(), ..Issue::default() }),
        request_id: request_id.to_owned(),
        ..UpdateIssueRequest::default()
    };
    client.issues().update_issue(request).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn large_response_beyond_the_budget_fails_before_its_commit() {
    let tracker = start().await;
    let issue = file_with_description(&tracker.member, noise(60_000)).await;
    let stored = new_id();
    let first = set_title(&tracker.member, &issue, "changed", &stored).await.unwrap();
    let fitting = MIB / first.encoded_len();
    for _ in 1..fitting {
        set_title(&tracker.member, &issue, "changed", &new_id()).await.unwrap();
    }
    let before = tracker.contents().await;

    let refused = new_id();
    let status = assert_error(
        set_title(&tracker.member, &issue, "changed again", &refused).await,
        Code::ResourceExhausted,
        REASON,
    );
    assert!(status.message().starts_with("request_id: "), "{status:?}");
    assert_eq!(error_metadata(&status, "bytes_max"), Some(MIB.to_string()));
    let bytes: usize = error_metadata(&status, "bytes").unwrap().parse().unwrap();
    assert!((MIB..2 * MIB).contains(&bytes), "{bytes}");
    assert_eq!(tracker.contents().await, before);

    // What is stored is returned as before. Other users, and calls without a request id, are not limited.
    assert_eq!(set_title(&tracker.member, &issue, "changed", &stored).await.unwrap(), first);
    set_title(&tracker.admin, &issue, "changed", &new_id()).await.unwrap();
    set_title(&tracker.member, &issue, "changed again", "").await.unwrap();
}

#[tokio::test]
async fn small_responses_are_neither_counted_nor_limited() {
    let tracker = Tracker::start_with(limits(&["--stored-response-bytes", "0"])).await;
    let small = file_with_description(&tracker.member, noise(3_800)).await;
    for _ in 0..20 {
        set_title(&tracker.member, &small, "described", &new_id()).await.unwrap();
    }
    assert_eq!(tracker.count("SELECT count(*) FROM requests").await, 20);
    assert_eq!(tracker.count("SELECT count(*) FROM stored_response_bytes").await, 0);

    let large = file_with_description(&tracker.member, noise(4_097)).await;
    let refused = set_title(&tracker.member, &large, "described", &new_id()).await;
    assert_error(refused, Code::ResourceExhausted, REASON);
    let dry_run = UpdateIssueRequest {
        issue: Some(Issue { id: large.id.clone(), title: "changed".into(), ..Issue::default() }),
        request_id: new_id(),
        validate_only: true,
        ..UpdateIssueRequest::default()
    };
    tracker.member.issues().update_issue(dry_run).await.unwrap();
}

#[tokio::test]
async fn responses_of_every_size_count_as_the_bytes_of_the_message() {
    let tracker = start().await;
    let issue = Issue { title: "one of many".into(), description: noise(1_000), ..Issue::default() };
    let request = BatchCreateIssuesRequest {
        issues: vec![issue; 100],
        request_id: new_id(),
        ..BatchCreateIssuesRequest::default()
    };

    let response: BatchCreateIssuesResponse =
        tracker.member.issues().batch_create_issues(request).await.unwrap().into_inner();

    let counted = tracker.count("SELECT sum(bytes)::int8 FROM stored_response_bytes").await;
    assert_eq!(counted, response.encoded_len() as i64);
}

#[tokio::test]
async fn budget_holds_for_concurrent_calls_on_two_replicas() {
    let tracker = start().await;
    let replica = tracker.start_replica_with(limits(&["--stored-response-bytes", "1048576"])).await;
    let issues: Vec<Issue> = join_all((0..64).map(|_| file_with_description(&tracker.member, noise(60_000)))).await;

    let clients = [&tracker.member, &replica.member];
    let calls = issues.iter().zip(clients.into_iter().cycle()).map(|(issue, client)| async move {
        let request_id = new_id();
        loop {
            match set_title(client, issue, "changed", &request_id).await {
                // All calls charge the same budget, and wait for each other.
                Err(status) if status.code() == Code::Aborted => {}
                outcome => return outcome,
            }
        }
    });
    let outcomes = join_all(calls).await;

    let (stored, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(stored.len(), MIB / stored[0].as_ref().unwrap().encoded_len());
    for outcome in refused {
        assert_error(outcome, Code::ResourceExhausted, REASON);
    }
    assert!(tracker.count("SELECT sum(length(reply))::int8 FROM requests").await <= MIB as i64);
    assert_eq!(tracker.count("SELECT count(*) FROM issues WHERE version = 2").await, stored.len() as i64);
}

#[tokio::test]
async fn calls_of_other_users_succeed_while_a_budget_is_locked() {
    let tracker = start().await;
    let large = file_with_description(&tracker.member, noise(60_000)).await;
    let small: Vec<Issue> = join_all((0..64).map(|_| tracker.admin.file("small"))).await;
    let session = tracker.session().await;
    let lock = format!("SELECT pg_advisory_lock(hashtextextended('response budget {}', 0))", tracker.member.user.id);
    session.batch_execute(&lock).await.unwrap();

    let blocked = {
        let (client, large) = (tracker.member.clone(), large.clone());
        tokio::spawn(async move { set_title(&client, &large, "changed", &new_id()).await })
    };
    tracker.wait_until_blocked().await;
    for _ in 0..3 {
        let others =
            small.iter().map(async |issue| set_title(&tracker.admin, issue, "changed", &new_id()).await.unwrap());
        let again = set_title(&tracker.viewer, &large, "x", "");
        let (others, _) = tokio::join!(join_all(others), again);
        assert_eq!(others.len(), 64);
    }
    assert!(!blocked.is_finished());

    session.batch_execute("SELECT pg_advisory_unlock_all()").await.unwrap();
    blocked.await.unwrap().unwrap();
}

#[tokio::test]
async fn charges_count_for_24_hours_and_are_then_pruned() {
    let tracker = start().await;
    let issue = file_with_description(&tracker.member, noise(60_000)).await;
    for _ in 0..MIB / 60_000 {
        set_title(&tracker.member, &issue, "described", &new_id()).await.unwrap();
    }
    let age = async |hours: i32| {
        let sql = "UPDATE stored_response_bytes SET hour = date_trunc('hour', now()) - make_interval(hours => $1)";
        tracker.sql(sql, &[&hours]).await;
    };
    let call = async || set_title(&tracker.member, &issue, "described", &new_id()).await;
    let prune = async || prune_response_budgets(&tracker.db.conn().await.unwrap()).await.unwrap();

    age(24).await;
    assert_eq!(prune().await, 0);
    assert_error(call().await, Code::ResourceExhausted, REASON);
    age(25).await;
    call().await.unwrap();
    assert_eq!(prune().await, 1);
    assert_eq!(tracker.count("SELECT count(*) FROM stored_response_bytes").await, 1);
}

#[tokio::test]
async fn compressed_responses_are_returned_byte_for_byte() {
    let tracker = start().await;
    let issue = file_with_description(&tracker.member, "all work and no play ".repeat(3_000)).await;
    let [before_upgrade, after_upgrade] = [new_id(), new_id()];
    let responses = |id: &str| {
        let (client, id) = (tracker.member.clone(), id.to_owned());
        let issue = issue.clone();
        async move { set_title(&client, &issue, "changed", &id).await.unwrap() }
    };

    tracker.sql("ALTER TABLE requests ALTER COLUMN reply SET COMPRESSION pglz", &[]).await;
    let old = responses(&before_upgrade).await;
    tracker.sql("ALTER TABLE requests ALTER COLUMN reply SET COMPRESSION lz4", &[]).await;
    let new = responses(&after_upgrade).await;

    assert_eq!(responses(&before_upgrade).await, old);
    assert_eq!(responses(&after_upgrade).await, new);
    let sizes =
        "SELECT pg_column_compression(reply), pg_column_size(reply) * 10 < length(reply) FROM requests ORDER BY 1";
    let sizes: Vec<(String, bool)> = tracker.sql(sizes, &[]).await.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(sizes, [("lz4".to_owned(), true), ("pglz".to_owned(), true)]);
}

#[tokio::test]
async fn new_schema_compresses_responses_with_lz4() {
    let tracker = Tracker::start().await;
    let compression = "SELECT attcompression::text FROM pg_attribute
        WHERE attrelid = 'requests'::regclass AND attname = 'reply'";
    assert_eq!(tracker.sql(compression, &[]).await[0].get::<_, &str>(0), "l");
}

#[tokio::test]
async fn every_mutation_with_a_large_response_is_charged() {
    let tracker = Tracker::start_with(limits(&["--stored-response-bytes", "0"])).await;
    let client = &tracker.member;
    let issue = Issue { title: "large".into(), description: noise(5_000), ..Issue::default() };
    let create = CreateIssueRequest { issue: Some(issue.clone()), request_id: new_id(), ..Default::default() };
    assert_error(client.issues().create_issue(create).await, Code::ResourceExhausted, REASON);
    let create = BatchCreateIssuesRequest { issues: vec![issue], request_id: new_id(), ..Default::default() };
    assert_error(client.issues().batch_create_issues(create).await, Code::ResourceExhausted, REASON);
    let small = client.file("small").await;
    let mut comment = issue_tracker::pb::Comment { issue_id: small.id, content: noise(5_000), ..Default::default() };
    let create = |comment| CreateCommentRequest { comment: Some(comment), request_id: new_id(), ..Default::default() };
    assert_error(client.comments().create_comment(create(comment.clone())).await, Code::ResourceExhausted, REASON);
    comment.content = "short".into();
    client.comments().create_comment(create(comment)).await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 1);
    tokio::time::timeout(Duration::from_secs(1), tracker.wait_until_no_locks()).await.unwrap();
}

/// A batch with such a call would be executed twice, for the other callers too.
#[tokio::test]
async fn calls_of_a_user_beyond_the_budget_stay_out_of_batches() {
    const CALLS: i64 = 20;
    // The sequence counts rolled back changes too.
    const COUNT_CHANGES: &str = "CREATE SEQUENCE changes;
        CREATE FUNCTION count_change() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
            AS 'BEGIN PERFORM nextval(''public.changes''); RETURN NEW; END';
        CREATE TRIGGER count_changes BEFORE UPDATE ON issues FOR EACH ROW EXECUTE FUNCTION count_change()";
    let tracker = Tracker::start_with(limits(&["--stored-response-bytes", "0"])).await;
    let large = file_with_description(&tracker.member, noise(5_000)).await;
    tracker.session().await.batch_execute(COUNT_CHANGES).await.unwrap();
    for _ in 0..CALLS {
        let refused = set_title(&tracker.member, &large, "changed", &new_id()).await;
        assert_error(refused, Code::ResourceExhausted, REASON);
    }
    // The first call in a batch, and each individually.
    assert_eq!(tracker.count("SELECT last_value FROM changes").await, CALLS + 1);
    // Calls without a request id are not affected.
    set_title(&tracker.member, &large, "changed", "").await.unwrap();
}
