//! Whether the database holds what callers were told, all of it, once, and nothing else.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    time::Instant,
};

use issue_tracker::pb::{
    BatchGetIssuesRequest, BatchGetIssuesResponse, BulkUpdateStatusResponse, Comment, Issue, UpdateIssueRequest,
};
use prost::Message;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Config};
use tonic::transport::Channel;

use crate::{
    harness::call,
    load::{Kind, Made, judged, told_versions},
    support::{bounds::HANG, database::session},
};

const REPLAYS_AT_ONCE: usize = 16;
const ISSUES_AT_ONCE: usize = 100;

/// What must never be found, whatever callers did.
const IMPOSSIBLE: [(&str, &str); 9] = [
    (
        "a version is not one more than the changes in history",
        "SELECT i.id::text FROM issues i LEFT JOIN issue_events e ON e.issue_id = i.id GROUP BY i.id, i.version
         HAVING i.version <> 1 + count(DISTINCT e.version)",
    ),
    (
        "history has a gap",
        "SELECT i.id::text FROM issues i JOIN issue_events e ON e.issue_id = i.id GROUP BY i.id, i.version
         HAVING min(e.version) <> 2 OR max(e.version) <> i.version",
    ),
    (
        "two callers made one version",
        "SELECT issue_id::text FROM issue_events GROUP BY issue_id, version HAVING count(DISTINCT actor_id) > 1",
    ),
    (
        "a change is in history twice",
        "SELECT issue_id::text FROM issue_events GROUP BY issue_id, version, field,
            CASE WHEN field = 'label' THEN coalesce(old_value, new_value) END HAVING count(*) > 1",
    ),
    (
        "a change does not begin where the one before has ended",
        "SELECT issue_id::text FROM (SELECT issue_id, old_value,
                lag(new_value) OVER (PARTITION BY issue_id, field ORDER BY version) AS before
            FROM issue_events WHERE field <> 'label') e
         WHERE before IS NOT NULL AND before <> old_value",
    ),
    (
        "an issue is not what its history says",
        "SELECT i.id::text FROM issues i CROSS JOIN LATERAL (
            SELECT DISTINCT ON (field) field, new_value FROM issue_events e
            WHERE e.issue_id = i.id ORDER BY field, version DESC) e
         WHERE e.new_value <> CASE e.field WHEN 'title' THEN i.title WHEN 'deleted' THEN (i.delete_time IS NOT NULL)::text
            WHEN 'status' THEN (ARRAY['OPEN', 'IN_PROGRESS', 'CLOSED'])[i.status] ELSE e.new_value END",
    ),
    (
        "an issue's labels are not what its history says",
        "SELECT issue_id::text FROM (
            SELECT issue_id, coalesce(old_value, new_value) AS label_id, count(new_value) - count(old_value) AS is_on
            FROM issue_events WHERE field = 'label' GROUP BY issue_id, label_id) e
         WHERE is_on <> (SELECT count(*) FROM issue_labels l
            WHERE l.issue_id = e.issue_id AND l.label_id::text = e.label_id)",
    ),
    (
        "close_time is not that of a closed issue",
        "SELECT id::text FROM issues WHERE (status = 3) <> (close_time IS NOT NULL) OR close_time < create_time",
    ),
    (
        "something was changed before it was made",
        "SELECT id::text FROM issues WHERE update_time < create_time
         UNION ALL SELECT id::text FROM comments WHERE update_time < create_time",
    ),
];

/// Compares the database with what the clients were told, then makes every call once more: the same replies come, and
/// nothing is written.
pub async fn verify(database: &Config, channel: &Channel, made: Vec<Made>) {
    let rows = session(database).await;
    for (what, sql) in IMPOSSIBLE {
        let found = texts(&rows, sql).await;
        assert!(found.is_empty(), "{what}: {found:?}");
    }
    check_issues(&rows, &made).await;
    check_comments(&rows, &made).await;
    check_history(&rows, &made).await;
    check_requests(&rows, &made).await;
    check_comment_counts(&rows, channel, &made).await;
    let before = digest(&rows).await;
    replay(channel, made).await;
    assert_eq!(digest(&rows).await, before, "a replay has written");
}

async fn texts(rows: &Client, sql: &str) -> Vec<String> {
    rows.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Every issue that was acknowledged is there once, under the id that was told, and no other.
async fn check_issues(rows: &Client, made: &[Made]) {
    let mut told: Vec<String> = Vec::new();
    for made in made {
        match (made.kind, &made.reply) {
            (Kind::Create | Kind::BatchCreate, None) => panic!("an issue was refused: {made:?}"),
            (Kind::Create, Some(reply)) => {
                let issue = Issue::decode(&**reply).unwrap();
                assert_eq!((&issue.description, issue.version), (&made.marker, 1));
                told.push(format!("{} {}", issue.id, made.marker));
            }
            (Kind::BatchCreate, Some(reply)) => {
                let versions = told_versions(made.kind, reply).into_iter().enumerate();
                told.extend(versions.map(|(nth, (id, _))| format!("{id} {}.{nth}", made.marker)));
            }
            _ => {}
        }
    }
    assert_same(&texts(rows, "SELECT id || ' ' || description FROM issues").await, &told);
}

/// Every comment that was acknowledged is there once, on its issue, with its author, and no other.
async fn check_comments(rows: &Client, made: &[Made]) {
    let mut told: Vec<String> = Vec::new();
    let mut tell = |made: &Made, issue_id: &str| told.push(format!("{issue_id} {} {}", made.caller, made.marker));
    for made in made {
        match (made.kind, &made.reply) {
            (Kind::Comment, Some(reply)) => {
                assert_eq!(Comment::decode(&**reply).unwrap().content, made.marker);
                tell(made, &made.issue_id);
            }
            (Kind::Update, Some(_)) if !UpdateIssueRequest::decode(&*made.message).unwrap().comment.is_empty() => {
                tell(made, &made.issue_id);
            }
            (Kind::Bulk, Some(reply)) => {
                let with_comment =
                    !issue_tracker::pb::BulkUpdateStatusRequest::decode(&*made.message).unwrap().comment.is_empty();
                let results = BulkUpdateStatusResponse::decode(&**reply).unwrap().results;
                results
                    .iter()
                    .filter(|result| result.changed && with_comment)
                    .for_each(|result| tell(made, &result.id));
            }
            _ => {}
        }
    }
    let sql = "SELECT issue_id || ' ' || author_id || ' ' || content FROM comments";
    assert_same(&texts(rows, sql).await, &told);
}

/// What a client was told to be version N is what history has as N, by him; and history has nothing that nobody was told.
async fn check_history(rows: &Client, made: &[Made]) {
    const SQL: &str = "SELECT issue_id || ' ' || version || ' ' || actor_id || ' ' || field || ' ' ||
            CASE WHEN field = 'label' THEN '' ELSE new_value END FROM issue_events";
    let history: HashSet<String> = texts(rows, SQL).await.into_iter().collect();
    let mut told_by: HashSet<String> = HashSet::new();
    let mut titles: HashSet<String> = HashSet::new();
    for made in made {
        let Some(reply) = &made.reply else { continue };
        for (id, version) in told_versions(made.kind, reply) {
            told_by.insert(format!("{id} {version} {}", made.caller));
            let change = match made.kind {
                Kind::Update => format!("title {}", made.marker),
                Kind::Delete => "deleted true".to_owned(),
                Kind::Undelete => "deleted false".to_owned(),
                _ => continue,
            };
            assert!(history.contains(&format!("{id} {version} {} {change}", made.caller)), "{made:?}");
            titles.extend((made.kind == Kind::Update).then(|| made.marker.clone()));
        }
        if made.kind == Kind::Bulk {
            check_bulk(made, reply, &history);
        }
    }
    for event in &history {
        let fields: Vec<&str> = event.splitn(5, ' ').collect();
        assert!(told_by.contains(&fields[..3].join(" ")), "nobody was told of {event}");
        assert!(fields[3] != "title" || titles.contains(fields[4]), "nobody was told of {event}");
    }
}

fn check_bulk(made: &Made, reply: &[u8], history: &HashSet<String>) {
    let results = BulkUpdateStatusResponse::decode(reply).unwrap().results;
    for result in results.iter().filter(|result| result.changed) {
        let change = format!("{} {} {} status ", result.id, result.version, made.caller);
        let statuses = ["OPEN", "IN_PROGRESS", "CLOSED"];
        assert!(statuses.iter().any(|status| history.contains(&format!("{change}{status}"))), "{made:?}");
    }
}

/// A reply is kept for each acknowledged call, and for no other.
async fn check_requests(rows: &Client, made: &[Made]) {
    let told: Vec<String> = made
        .iter()
        .filter(|made| made.reply.is_some())
        .map(|made| format!("{} {}", made.caller, made.request_id))
        .collect();
    assert_same(&texts(rows, "SELECT caller_id || ' ' || request_id FROM requests").await, &told);
}

async fn check_comment_counts(rows: &Client, channel: &Channel, made: &[Made]) {
    const SQL: &str = "SELECT i.id::text, (SELECT count(*) FROM comments c WHERE c.issue_id = i.id) FROM issues i";
    let counts: HashMap<String, i64> =
        rows.query(SQL, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    let ids: Vec<&String> = counts.keys().collect();
    let token = &made[0].token;
    for ids in ids.chunks(ISSUES_AT_ONCE) {
        let request = BatchGetIssuesRequest { ids: ids.iter().map(|id| (*id).clone()).collect(), view: 0 };
        let got = call(channel, token, "IssueService/BatchGetIssues", &request.encode_to_vec()).await.unwrap();
        for issue in BatchGetIssuesResponse::decode(&*got).unwrap().issues {
            assert_eq!(i64::from(issue.comment_count), counts[&issue.id], "{}", issue.id);
        }
    }
}

async fn replay(channel: &Channel, made: Vec<Made>) {
    let mut running = JoinSet::new();
    for made in made.into_iter().filter(|made| made.reply.is_some()) {
        if running.len() == REPLAYS_AT_ONCE {
            running.join_next().await.unwrap().unwrap();
        }
        let channel = channel.clone();
        running.spawn(async move {
            let began = Instant::now();
            loop {
                assert!(began.elapsed() < HANG, "never replayed: {made:?}");
                let again = call(&channel, &made.token, made.method, &made.message).await;
                if let Some(reply) = judged(again) {
                    assert!(reply == made.reply, "another reply: {made:?}");
                    return;
                }
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
}

/// How much there is of everything, and what issues are like.
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
fn assert_same(found: &[String], told: &[String]) {
    let (once, all) = (found.iter().collect::<BTreeSet<_>>(), told.iter().collect::<BTreeSet<_>>());
    let lost: Vec<_> = all.difference(&once).take(5).collect();
    let unknown: Vec<_> = once.difference(&all).take(5).collect();
    assert!(lost.is_empty() && unknown.is_empty(), "lost: {lost:?}; nobody was told of: {unknown:?}");
    assert_eq!(found.len(), told.len(), "something is there twice");
}
