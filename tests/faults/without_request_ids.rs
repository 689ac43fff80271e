//! Mutations without request ids, which cannot be repeated safely: an error that does not leave the outcome open means that
//! nothing was written.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use issue_tracker::{
    pb::{
        BulkUpdateStatusRequest, Comment, CreateCommentRequest, CreateIssueRequest, Issue, Status as IssueStatus,
        UpdateIssueRequest,
    },
    postgres::Durability,
};
use prost::Message;
use tokio::{sync::watch, task::JoinSet};
use tokio_postgres::Client;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::{
    harness::{Caller, Settings, call, call_within, create_callers},
    support::{
        bounds::HANG,
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, channel, program},
    },
};

const CLIENTS: usize = 12;
/// So short that it passes during some calls.
const SHORT_DEADLINE: Duration = Duration::from_millis(4);

/// What a caller knows about a mutation after its call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Acknowledged,
    /// The error says that the mutation may have been made.
    Unknown,
    /// The error says that nothing was written.
    Refused,
}

impl Outcome {
    /// `docs/errors.md` has the reasons.
    fn of(result: &Result<Vec<u8>, Status>) -> Self {
        let Err(status) = result else { return Self::Acknowledged };
        let reason = status.get_details_error_info().map(|info| info.reason);
        match (status.code(), reason.as_deref()) {
            // The client library reports these when the connection is lost.
            (Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded, None) => {
                Self::Unknown
            }
            (Code::Unavailable, Some("OUTCOME_UNKNOWN"))
            | (Code::DeadlineExceeded, Some("DEADLINE" | "RESPONSE_UNREAD"))
            | (Code::Cancelled, Some("CANCELLED")) => Self::Unknown,
            (Code::Internal, _) => panic!("{status:?}"),
            _ => Self::Refused,
        }
    }
}

/// A mutation, by the text that only it writes.
struct Mutation {
    marker: String,
    outcome: Outcome,
    error: Option<Status>,
    /// Whether it writes the marker only if it changes an issue.
    is_conditional: bool,
}

/// Returns a random mutation that writes the marker.
fn mutation(rng: &mut fastrand::Rng, issue_id: &str, marker: &str) -> (&'static str, Vec<u8>) {
    let (id, text) = (issue_id.to_owned(), marker.to_owned());
    match rng.u32(..5) {
        0 | 1 => {
            let issue = Some(Issue { title: text, ..Issue::default() });
            ("IssueService/CreateIssue", CreateIssueRequest { issue, ..Default::default() }.encode_to_vec())
        }
        2 => {
            let issue = Some(Issue { id, title: text, ..Issue::default() });
            ("IssueService/UpdateIssue", UpdateIssueRequest { issue, ..Default::default() }.encode_to_vec())
        }
        3 => {
            let comment = Some(Comment { issue_id: id, content: text, ..Comment::default() });
            ("CommentService/CreateComment", CreateCommentRequest { comment, ..Default::default() }.encode_to_vec())
        }
        _ => {
            // The comment is written for each issue whose status changes.
            let status = [IssueStatus::Open, IssueStatus::InProgress, IssueStatus::Closed][rng.usize(..3)].into();
            let request = BulkUpdateStatusRequest { ids: vec![id], status, comment: text, ..Default::default() };
            ("IssueService/BulkUpdateStatus", request.encode_to_vec())
        }
    }
}

/// Makes mutations until `stop`, each once.
async fn run_client(
    address: watch::Receiver<String>,
    caller: Caller,
    (issue_ids, stop, completed): (Vec<String>, Arc<AtomicBool>, Arc<AtomicUsize>),
    (nth, mut rng): (usize, fastrand::Rng),
) -> Vec<Mutation> {
    let mut mutations = Vec::new();
    let mut connected = (address.borrow().clone(), channel(&address.borrow()));
    while !stop.load(Ordering::SeqCst) {
        let current = address.borrow().clone();
        if connected.0 != current {
            connected = (current.clone(), channel(&current));
        }
        let marker = format!("m-{nth}-{}", mutations.len());
        let issue_id = rng.choice(&issue_ids).unwrap();
        let (method, message) = mutation(&mut rng, issue_id, &marker);
        let result = match rng.u32(..20) {
            0 => call_within(&connected.1, &caller.token, method, &message, SHORT_DEADLINE).await,
            _ => call(&connected.1, &caller.token, method, &message).await,
        };
        let outcome = Outcome::of(&result);
        completed.fetch_add(usize::from(outcome == Outcome::Acknowledged), Ordering::SeqCst);
        // A killed service refuses connections at once.
        tokio::time::sleep(Duration::from_millis(if outcome == Outcome::Acknowledged { 0 } else { 20 })).await;
        let is_conditional = method == "IssueService/BulkUpdateStatus";
        mutations.push(Mutation { marker, outcome, error: result.err(), is_conditional });
    }
    mutations
}

/// Returns how often each marker is stored.
async fn stored_markers(rows: &Client) -> HashMap<String, i64> {
    const SQL: &str = "SELECT marker, count(*) FROM (
            SELECT coalesce((SELECT old_value FROM issue_events e WHERE e.issue_id = i.id AND field = 'title'
                ORDER BY version LIMIT 1), title) AS marker FROM issues i
            UNION ALL SELECT new_value FROM issue_events WHERE field = 'title'
            UNION ALL SELECT content FROM comments) markers
        GROUP BY marker";
    rows.query(SQL, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Asserts that acknowledged mutations are stored once and refused ones never. Prints how many unknown ones are stored.
async fn assert_outcomes(rows: &Client, mutations: &[Mutation]) {
    let stored = stored_markers(rows).await;
    let (mut unknown, mut made, mut errors) = (0, 0, BTreeMap::new());
    for Mutation { marker, outcome, error, is_conditional } in mutations {
        let count = stored.get(marker).copied().unwrap_or(0);
        match outcome {
            Outcome::Acknowledged => {
                assert!(count == 1 || (count == 0 && *is_conditional), "{marker} is stored {count} times");
            }
            Outcome::Refused => assert_eq!(count, 0, "{marker} was refused and is stored: {error:?}"),
            Outcome::Unknown => {
                assert!(count <= 1, "{marker} is stored {count} times: {error:?}");
                unknown += 1;
                made += count;
            }
        }
        if let Some(error) = error {
            let reason = error.get_details_error_info().map_or("connection lost".to_owned(), |info| info.reason);
            *errors.entry(format!("{:?} {reason}", error.code())).or_insert(0) += 1;
        }
    }
    println!("{} mutations without request ids; errors: {errors:?}", mutations.len());
    println!("{unknown} had an unknown outcome: {made} of them were made");
    assert!(unknown > 0, "no fault hit a call");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_mutations_without_request_ids_are_not_made() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let external = External::start(Durability::Throwaway);
    let args = ["--database-url", &external.url(), "--requests", "8", "--drain-seconds", "1"];
    let start = || Service::start(&external.dir, program(&args));
    let mut service = start();
    let (addresses, address) = watch::channel(service.address.clone());
    let callers = create_callers(&external.config(), CLIENTS).await;
    let mut issue_ids = Vec::new();
    for nth in 0..4 {
        let issue = Some(Issue { title: format!("issue {nth}"), ..Issue::default() });
        let message = CreateIssueRequest { issue, ..Default::default() }.encode_to_vec();
        let created = call(&service.channel(), &callers[0].token, "IssueService/CreateIssue", &message).await.unwrap();
        issue_ids.push(Issue::decode(&*created).unwrap().id);
    }
    let (stop, completed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for (nth, caller) in callers.into_iter().enumerate() {
        let shared = (issue_ids.clone(), Arc::clone(&stop), Arc::clone(&completed));
        clients.spawn(run_client(address.clone(), caller, shared, (nth, rng.fork())));
    }
    let rows = session(&external.config()).await;
    let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE application_name = 'issue-tracker' AND state <> 'idle'";

    for fault in 0..settings.pick(8, 80) {
        let target = completed.load(Ordering::SeqCst) + rng.usize(20..150);
        let reached = async || completed.load(Ordering::SeqCst) >= target;
        eventually("mutations are acknowledged", reached).await;
        match fault % 4 {
            0 | 1 => service.kill(),
            // Refuses new calls, and completes those in progress.
            2 => assert_eq!(service.stop().code(), Some(0)),
            _ => {
                rows.query(terminate, &[]).await.unwrap();
                continue;
            }
        }
        service = start();
        addresses.send_replace(service.address.clone());
    }
    stop.store(true, Ordering::SeqCst);
    let mut mutations = Vec::new();
    while let Some(client) = tokio::time::timeout(HANG, clients.join_next()).await.unwrap() {
        mutations.extend(client.unwrap());
    }
    // A statement that lost its service or its caller may still be running.
    assert_eq!(service.stop().code(), Some(0));
    eventually("the sessions of the service have ended", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker'";
        rows.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    assert_outcomes(&rows, &mutations).await;
    service.assert_no_internal_errors();
}
