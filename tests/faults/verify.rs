//! Compares the database with the responses that the clients received: every acknowledged write is stored once, and no
//! other write is.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Instant,
};

use issue_tracker::pb::{
    BatchGetIssuesRequest, BatchGetIssuesResponse, BulkUpdateStatusRequest, BulkUpdateStatusResponse, Comment, Issue,
    UpdateIssueRequest,
};
use prost::Message;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config};
use tonic::transport::Channel;

use crate::{
    harness::call,
    load::{CompletedMutation, Kind, classify, versions_in_response},
    replay::assert_rows_follow_from_history,
    support::{bounds::HANG, database::session},
};

const CONCURRENT_RETRIES: usize = 16;
const ISSUES_PER_BATCH: usize = 100;

/// Descriptions of inconsistent states, and queries that find them.
const INVARIANT_VIOLATIONS: [(&str, &str); 6] = [
    (
        "the version does not match the number of changes in the history",
        "SELECT i.id::text FROM issues i LEFT JOIN issue_events e ON e.issue_id = i.id GROUP BY i.id, i.version
         HAVING i.version <> 1 + count(DISTINCT e.version)",
    ),
    (
        "the history has a gap",
        "SELECT i.id::text FROM issues i JOIN issue_events e ON e.issue_id = i.id GROUP BY i.id, i.version
         HAVING min(e.version) <> 2 OR max(e.version) <> i.version",
    ),
    (
        "two users wrote the same version",
        "SELECT issue_id::text FROM issue_events GROUP BY issue_id, version HAVING count(DISTINCT actor_id) > 1",
    ),
    (
        "a change is in the history twice",
        "SELECT issue_id::text FROM issue_events GROUP BY issue_id, version, field,
            CASE WHEN field = 'label' THEN coalesce(old_value, new_value) END HAVING count(*) > 1",
    ),
    (
        "close_time contradicts the status or create_time",
        "SELECT id::text FROM issues WHERE (status = 3) <> (close_time IS NOT NULL) OR close_time < create_time",
    ),
    (
        "update_time is before create_time",
        "SELECT id::text FROM issues WHERE update_time < create_time
         UNION ALL SELECT id::text FROM comments WHERE update_time < create_time",
    ),
];

/// Compares the database with the responses of the clients. Then retries every acknowledged call and asserts that it
/// returns the same response and writes nothing.
pub async fn verify(database: &Config, channel: &Channel, mutations: Vec<CompletedMutation>) {
    let rows = session(database).await;
    assert_invariants(&rows).await;
    check_issues(&rows, &mutations).await;
    assert_rows_follow_from_history(&rows, &mutations).await;
    check_comments(&rows, &mutations).await;
    check_history(&rows, &mutations).await;
    check_stored_responses(&rows, &mutations).await;
    check_comment_counts(&rows, channel, &mutations).await;
    let before = digest(&rows).await;
    retry_acknowledged(channel, mutations).await;
    assert_eq!(digest(&rows).await, before, "a retry changed the database");
}

/// Asserts what holds for all issues, however they were written.
pub async fn assert_invariants(rows: &Client) {
    for (what, sql) in INVARIANT_VIOLATIONS {
        let found = texts(rows, sql).await;
        assert!(found.is_empty(), "{what}: {found:?}");
    }
}

async fn texts(rows: &Client, sql: &str) -> Vec<String> {
    rows.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Asserts that exactly the acknowledged issues are stored, each once and under the id in the response.
async fn check_issues(rows: &Client, mutations: &[CompletedMutation]) {
    let mut acknowledged: Vec<String> = Vec::new();
    for mutation in mutations {
        match (mutation.kind, &mutation.response) {
            (Kind::Create | Kind::BatchCreate, None) => panic!("a create was rejected: {mutation:?}"),
            (Kind::Create, Some(response)) => {
                let issue = Issue::decode(&**response).unwrap();
                assert_eq!((&issue.description, issue.version), (&mutation.marker, 1));
                acknowledged.push(format!("{} {}", issue.id, mutation.marker));
            }
            (Kind::BatchCreate, Some(response)) => {
                let versions = versions_in_response(mutation.kind, response).into_iter().enumerate();
                acknowledged.extend(versions.map(|(nth, (id, _))| format!("{id} {}.{nth}", mutation.marker)));
            }
            _ => {}
        }
    }
    // The description as created.
    const SQL: &str = "SELECT id || ' ' || coalesce((SELECT old_value FROM issue_events
            WHERE issue_id = issues.id AND field = 'description' ORDER BY version LIMIT 1), description)
        FROM issues";
    assert_same(&texts(rows, SQL).await, &acknowledged);
}

/// Asserts that exactly the acknowledged comments are stored, each once, on its issue and with its author.
async fn check_comments(rows: &Client, mutations: &[CompletedMutation]) {
    let mut acknowledged: Vec<String> = Vec::new();
    let mut acknowledge = |mutation: &CompletedMutation, issue_id: &str| {
        acknowledged.push(format!("{issue_id} {} {}", mutation.caller, mutation.marker))
    };
    for mutation in mutations {
        match (mutation.kind, &mutation.response) {
            (Kind::Comment, Some(response)) => {
                assert_eq!(Comment::decode(&**response).unwrap().content, mutation.marker);
                acknowledge(mutation, &mutation.issue_id);
            }
            (Kind::Update, Some(_)) if !UpdateIssueRequest::decode(&*mutation.message).unwrap().comment.is_empty() => {
                acknowledge(mutation, &mutation.issue_id);
            }
            (Kind::Bulk, Some(response)) => {
                let with_comment = !BulkUpdateStatusRequest::decode(&*mutation.message).unwrap().comment.is_empty();
                let results = BulkUpdateStatusResponse::decode(&**response).unwrap().results;
                results
                    .iter()
                    .filter(|result| result.changed && with_comment)
                    .for_each(|result| acknowledge(mutation, &result.id));
            }
            _ => {}
        }
    }
    let sql = "SELECT issue_id || ' ' || author_id || ' ' || content FROM comments";
    assert_same(&texts(rows, sql).await, &acknowledged);
}

/// Asserts that the history has every acknowledged version with its actor and change, and no other.
async fn check_history(rows: &Client, mutations: &[CompletedMutation]) {
    const SQL: &str = "SELECT issue_id || ' ' || version || ' ' || actor_id || ' ' || field || ' ' ||
            CASE WHEN field = 'label' THEN '' ELSE coalesce(new_value, '') END FROM issue_events";
    let history: HashSet<String> = texts(rows, SQL).await.into_iter().collect();
    let mut acknowledged_versions: HashSet<String> = HashSet::new();
    let mut titles: HashSet<String> = HashSet::new();
    for mutation in mutations {
        let Some(response) = &mutation.response else { continue };
        for (id, version) in versions_in_response(mutation.kind, response) {
            acknowledged_versions.insert(format!("{id} {version} {}", mutation.caller));
            let change = match mutation.kind {
                Kind::Update => format!("title {}", mutation.marker),
                Kind::Delete => "deleted true".to_owned(),
                Kind::Undelete => "deleted false".to_owned(),
                _ => continue,
            };
            assert!(history.contains(&format!("{id} {version} {} {change}", mutation.caller)), "{mutation:?}");
            titles.extend((mutation.kind == Kind::Update).then(|| mutation.marker.clone()));
        }
        if mutation.kind == Kind::Bulk {
            check_bulk(mutation, response, &history);
        }
    }
    for event in &history {
        let fields: Vec<&str> = event.splitn(5, ' ').collect();
        assert!(acknowledged_versions.contains(&fields[..3].join(" ")), "no client received a response with {event}");
        assert!(fields[3] != "title" || titles.contains(fields[4]), "no client received a response with {event}");
    }
}

fn check_bulk(mutation: &CompletedMutation, response: &[u8], history: &HashSet<String>) {
    let request = BulkUpdateStatusRequest::decode(&*mutation.message).unwrap();
    let status = request.status().as_str_name().trim_start_matches("STATUS_");
    for result in BulkUpdateStatusResponse::decode(response).unwrap().results.iter().filter(|result| result.changed) {
        let change = format!("{} {} {} status {status}", result.id, result.version, mutation.caller);
        assert!(history.contains(&change), "{change} is not in the history: {mutation:?}");
    }
}

/// Asserts that a response is stored for each acknowledged call, and for no other.
async fn check_stored_responses(rows: &Client, mutations: &[CompletedMutation]) {
    let acknowledged: Vec<String> = mutations
        .iter()
        .filter(|mutation| mutation.response.is_some())
        .map(|mutation| format!("{} {}", mutation.caller, mutation.request_id))
        .collect();
    assert_same(&texts(rows, "SELECT caller_id || ' ' || request_id FROM requests").await, &acknowledged);
}

async fn check_comment_counts(rows: &Client, channel: &Channel, mutations: &[CompletedMutation]) {
    const SQL: &str = "SELECT i.id::text, (SELECT count(*) FROM comments c WHERE c.issue_id = i.id) FROM issues i";
    let counts: HashMap<String, i64> =
        rows.query(SQL, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    let ids: Vec<&String> = counts.keys().collect();
    let token = &mutations[0].token;
    for ids in ids.chunks(ISSUES_PER_BATCH) {
        let request = BatchGetIssuesRequest { ids: ids.iter().map(|id| (*id).clone()).collect(), view: 0 };
        let got = call(channel, token, "IssueService/BatchGetIssues", &request.encode_to_vec()).await.unwrap();
        for issue in BatchGetIssuesResponse::decode(&*got).unwrap().issues {
            assert_eq!(i64::from(issue.comment_count), counts[&issue.id], "{}", issue.id);
        }
    }
}

/// Sends each acknowledged mutation again. Asserts that it returns the same response.
async fn retry_acknowledged(channel: &Channel, mutations: Vec<CompletedMutation>) {
    let mut running = JoinSet::new();
    for mutation in mutations.into_iter().filter(|mutation| mutation.response.is_some()) {
        if running.len() == CONCURRENT_RETRIES {
            running.join_next().await.unwrap().unwrap();
        }
        let channel = channel.clone();
        running.spawn(async move {
            let began = Instant::now();
            loop {
                assert!(began.elapsed() < HANG, "the retry has no outcome: {mutation:?}");
                let again = call(&channel, &mutation.token, mutation.method, &mutation.message).await;
                if let Some(response) = classify(again) {
                    assert!(response == mutation.response, "the retry returned another response: {mutation:?}");
                    return;
                }
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
}

/// Returns the row counts of the tables, and a hash of all issues.
async fn digest(rows: &Client) -> Vec<String> {
    const SQL: &str =
        "SELECT 'issues ' || count(*) || coalesce(md5(string_agg(i::text, ',' ORDER BY id)), '') FROM issues i
        UNION ALL SELECT 'comments ' || count(*) FROM comments
        UNION ALL SELECT 'events ' || count(*) FROM issue_events
        UNION ALL SELECT 'labels ' || count(*) FROM issue_labels
        UNION ALL SELECT 'requests ' || count(*) FROM requests
        ORDER BY 1";
    texts(rows, SQL).await
}

#[track_caller]
fn assert_same(found: &[String], acknowledged: &[String]) {
    let (once, all) = (found.iter().collect::<BTreeSet<_>>(), acknowledged.iter().collect::<BTreeSet<_>>());
    let lost: Vec<_> = all.difference(&once).take(5).collect();
    let unknown: Vec<_> = once.difference(&all).take(5).collect();
    assert!(lost.is_empty() && unknown.is_empty(), "lost: {lost:?}; never acknowledged: {unknown:?}");
    assert_eq!(found.len(), acknowledged.len(), "a row is stored twice");
}
