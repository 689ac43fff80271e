//! Concurrent clients that mix all mutations and reads, retry until they receive an outcome, and record the responses.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use issue_tracker::pb::{
    self, AddIssueLabelsRequest, BatchCreateIssuesRequest, BatchCreateIssuesResponse, BulkUpdateStatusRequest,
    BulkUpdateStatusResponse, Comment, CreateCommentRequest, CreateIssueRequest, DeleteIssueRequest, GetIssueRequest,
    Issue, ListIssuesRequest, ListIssuesResponse, RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest,
    UndeleteIssueRequest, UpdateIssueRequest,
};
use prost::Message;
use prost_types::FieldMask;
use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::Config;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Caller, call, create_callers},
    support::{bounds::HANG, database::session, service::channel},
};

const LABELS: usize = 5;
/// The number of issues that all clients prefer, so that they conflict.
const HOT_ISSUES: usize = 10;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Create,
    BatchCreate,
    Update,
    Comment,
    Bulk,
    Labels,
    Delete,
    Undelete,
}

/// A mutation and its outcome.
#[derive(Clone, Debug)]
pub struct CompletedMutation {
    pub kind: Kind,
    pub caller: Uuid,
    pub token: String,
    pub method: &'static str,
    pub message: Vec<u8>,
    pub request_id: Uuid,
    /// A text that only this mutation writes.
    pub marker: String,
    /// The issue that it changes, if it changes exactly one.
    pub issue_id: String,
    /// The number of attempts.
    pub tries: u32,
    /// The encoded response. `None` if the mutation was rejected and wrote nothing.
    pub response: Option<Vec<u8>>,
}

/// The state that the clients share.
struct LoadState {
    /// The address of each replica.
    addresses: Vec<watch::Receiver<String>>,
    stop: AtomicBool,
    began: Instant,
    /// When the last acknowledged mutation was sent, in microseconds since `began`.
    last_acknowledged_us: AtomicU64,
    acknowledged: AtomicU64,
    label_ids: Vec<String>,
    caller_ids: Vec<String>,
    /// The ids of the created issues, in order, and the highest version of each that a response has reported.
    issues: Mutex<(Vec<String>, HashMap<String, i64>)>,
}

impl LoadState {
    fn issues(&self) -> MutexGuard<'_, (Vec<String>, HashMap<String, i64>)> {
        self.issues.lock().unwrap()
    }

    fn record_version(&self, id: &str, version: i64) {
        let mut issues = self.issues();
        match issues.1.get_mut(id) {
            Some(known_version) => *known_version = version.max(*known_version),
            None => {
                issues.1.insert(id.to_owned(), version);
                issues.0.push(id.to_owned());
            }
        }
    }
}

pub struct Load {
    state: Arc<LoadState>,
    clients: Vec<JoinHandle<Vec<CompletedMutation>>>,
}

impl Load {
    /// Starts clients, each with its own token, of one service. They reconnect when its address changes.
    pub async fn start(
        database: &Config,
        address: watch::Receiver<String>,
        clients: usize,
        rng: &mut fastrand::Rng,
    ) -> Self {
        Self::start_on_replicas(database, vec![address], clients, rng).await
    }

    /// Starts clients of several replicas. Each retries a failed call on the next replica.
    pub async fn start_on_replicas(
        database: &Config,
        addresses: Vec<watch::Receiver<String>>,
        clients: usize,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let callers = create_callers(database, clients).await;
        let rows = session(database).await;
        let mut label_ids = Vec::new();
        for _ in 0..LABELS {
            let id = Uuid::now_v7();
            const SQL: &str = "INSERT INTO labels (id, name) VALUES ($1, 'label ' || $1::uuid::text)";
            rows.execute(SQL, &[&id]).await.unwrap();
            label_ids.push(id.to_string());
        }
        let state = Arc::new(LoadState {
            addresses,
            stop: AtomicBool::new(false),
            began: Instant::now(),
            last_acknowledged_us: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            label_ids,
            caller_ids: callers.iter().map(|caller| caller.id.to_string()).collect(),
            issues: Mutex::default(),
        });
        let run = |(nth, caller)| {
            let client = Client { nth, caller, state: Arc::clone(&state), rng: rng.fork(), mutations: Vec::new() };
            tokio::spawn(client.run())
        };
        let clients = callers.into_iter().enumerate().map(run).collect();
        Self { state, clients }
    }

    pub fn acknowledged(&self) -> u64 {
        self.state.acknowledged.load(Ordering::SeqCst)
    }

    /// Returns the ids of all issues created so far.
    pub fn issue_ids(&self) -> Vec<String> {
        self.state.issues().0.clone()
    }

    /// Waits until a mutation sent after `moment` is acknowledged. Returns the time since `moment`.
    pub async fn wait_for_acknowledged_since(&self, moment: Instant) -> Duration {
        let moment_us = moment.duration_since(self.state.began).as_micros() as u64;
        while self.state.last_acknowledged_us.load(Ordering::SeqCst) <= moment_us {
            assert!(moment.elapsed() < HANG, "the service does not recover");
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        moment.elapsed()
    }

    /// Waits until `more` further mutations are acknowledged.
    pub async fn wait_for_acknowledged(&self, more: u64) {
        let (began, target) = (Instant::now(), self.acknowledged() + more);
        while self.acknowledged() < target {
            assert!(began.elapsed() < HANG, "no mutation is acknowledged");
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Stops the clients after their current calls. Returns all their mutations.
    pub async fn finish(self) -> Vec<CompletedMutation> {
        self.state.stop.store(true, Ordering::SeqCst);
        let mut mutations = Vec::new();
        for client in self.clients {
            mutations.extend(client.await.unwrap());
        }
        mutations
    }
}

struct Client {
    nth: usize,
    caller: Caller,
    state: Arc<LoadState>,
    rng: fastrand::Rng,
    mutations: Vec<CompletedMutation>,
}

/// A mutation to send: its kind, method, encoded message, and the id of the issue that it changes.
type PlannedMutation = (Kind, &'static str, Vec<u8>, String);

impl Client {
    async fn run(mut self) -> Vec<CompletedMutation> {
        let mut connected = Connection::to(self.state.addresses.clone(), self.nth);
        while !self.state.stop.load(Ordering::SeqCst) {
            if self.rng.u32(..4) == 0 {
                self.read(&mut connected).await;
            } else {
                self.mutate(&mut connected).await;
            }
            tokio::time::sleep(Duration::from_millis(self.rng.u64(..10))).await;
        }
        self.mutations
    }

    /// Reads an issue or a page. Asserts that versions never go back, and that a page is ordered without duplicates.
    async fn read(&mut self, connection: &mut Connection) {
        if self.rng.bool() {
            let list = ListIssuesRequest { page_size: 20, show_deleted: self.rng.bool(), ..Default::default() };
            let list = list.encode_to_vec();
            let listed = call(connection.channel(), &self.caller.token, "IssueService/ListIssues", &list).await;
            let Some(page) = classify(listed).flatten() else { return connection.pause().await };
            let page = ListIssuesResponse::decode(&*page).unwrap();
            let order: Vec<&str> = page.issues.iter().map(|issue| &*issue.id).collect();
            assert!(order.is_sorted_by(|left, right| left > right), "{order:?}");
            return;
        }
        let Some(id) = self.issue() else { return };
        let known_version = self.state.issues().1[&id];
        let get = GetIssueRequest { id: id.clone(), ..Default::default() };
        let read = call(connection.channel(), &self.caller.token, "IssueService/GetIssue", &get.encode_to_vec()).await;
        let Some(issue) = classify(read).flatten() else { return connection.pause().await };
        let issue = Issue::decode(&*issue).unwrap();
        assert!(
            issue.version >= known_version,
            "{id} has version {}, but a response has reported {known_version}",
            issue.version
        );
    }

    async fn mutate(&mut self, connection: &mut Connection) {
        let request_id = Uuid::new_v4();
        let marker = format!("m-{}-{}", self.nth, self.mutations.len());
        let Some((kind, method, message, issue_id)) = self.mutation(&request_id.to_string(), &marker) else { return };
        let began = Instant::now();
        for tries in 1.. {
            let sent_us = self.state.began.elapsed().as_micros() as u64;
            let result = call(connection.channel(), &self.caller.token, method, &message).await;
            let Some(response) = classify(result) else {
                assert!(began.elapsed() < HANG, "{method} has no outcome");
                connection.pause().await;
                continue;
            };
            if let Some(response) = &response {
                self.state.last_acknowledged_us.fetch_max(sent_us, Ordering::SeqCst);
                self.state.acknowledged.fetch_add(1, Ordering::SeqCst);
                for (id, version) in versions_in_response(kind, response) {
                    self.state.record_version(&id, version);
                }
            }
            let (caller, token) = (self.caller.id, self.caller.token.clone());
            self.mutations.push(CompletedMutation {
                kind,
                caller,
                token,
                method,
                message,
                request_id,
                marker,
                issue_id,
                tries,
                response,
            });
            return;
        }
    }

    /// Picks a random mutation. Returns `None` if there is no issue to change yet.
    fn mutation(&mut self, request_id: &str, marker: &str) -> Option<PlannedMutation> {
        let request_id = request_id.to_owned();
        let number = if self.state.issues().0.len() < HOT_ISSUES { 0 } else { self.rng.u32(..100) };
        Some(match number {
            0..25 => {
                let issue = Some(self.new_issue(marker.to_owned()));
                let request = CreateIssueRequest { issue, request_id, ..Default::default() };
                (Kind::Create, "IssueService/CreateIssue", request.encode_to_vec(), String::new())
            }
            25..30 => {
                let issues = (0..self.rng.usize(2..5)).map(|nth| self.new_issue(format!("{marker}.{nth}"))).collect();
                let request = BatchCreateIssuesRequest { issues, request_id, ..Default::default() };
                (Kind::BatchCreate, "IssueService/BatchCreateIssues", request.encode_to_vec(), String::new())
            }
            30..55 => self.update(request_id, marker)?,
            55..70 => {
                let issue_id = self.issue()?;
                let comment = Comment { issue_id: issue_id.clone(), content: marker.to_owned(), ..Comment::default() };
                let request = CreateCommentRequest { comment: Some(comment), request_id, ..Default::default() };
                (Kind::Comment, "CommentService/CreateComment", request.encode_to_vec(), issue_id)
            }
            70..80 => self.bulk(request_id, marker)?,
            80..92 => self.labels(request_id)?,
            92..96 => {
                let id = self.issue()?;
                let request = DeleteIssueRequest { id: id.clone(), request_id, ..Default::default() };
                (Kind::Delete, "IssueService/DeleteIssue", request.encode_to_vec(), id)
            }
            _ => {
                let id = self.issue()?;
                let request = UndeleteIssueRequest { id: id.clone(), request_id, ..Default::default() };
                (Kind::Undelete, "IssueService/UndeleteIssue", request.encode_to_vec(), id)
            }
        })
    }

    /// Returns an issue to create, whose description is the marker.
    fn new_issue(&mut self, marker: String) -> Issue {
        let (title, description) = ("as created".to_owned(), marker.clone());
        if self.rng.u32(..4) > 0 {
            // Such calls run in batches.
            return Issue { title, description, ..Issue::default() };
        }
        let label_ids = self.rng.choose_multiple(&self.state.label_ids, 2).into_iter().cloned().collect();
        Issue { title, description, label_ids, ..self.issue_fields(&marker) }
    }

    /// Returns random values of the fields other than the title. The external id is unique.
    fn issue_fields(&mut self, marker: &str) -> Issue {
        let mut or_none = |value: &str| if self.rng.bool() { value.to_owned() } else { String::new() };
        let (description, external_id) = (or_none(marker), or_none(marker));
        let assignee_id = self.rng.choice(&self.state.caller_ids).unwrap();
        let assignee_id = if self.rng.bool() { assignee_id.clone() } else { String::new() };
        Issue {
            description,
            external_id,
            assignee_id,
            status: self.rng.i32(1..=3),
            priority: self.rng.i32(0..=4),
            ..Issue::default()
        }
    }

    /// Changes the title, and any of the other fields.
    fn update(&mut self, request_id: String, marker: &str) -> Option<PlannedMutation> {
        let id = self.issue()?;
        // Stale if another client updates the issue first.
        let expected_version = if self.rng.bool() { self.state.issues().1[&id] } else { 0 };
        let comment = if self.rng.u32(..3) == 0 { marker.to_owned() } else { String::new() };
        let issue = Some(Issue { id: id.clone(), title: marker.to_owned(), ..self.issue_fields(marker) });
        let mut paths = vec!["title".to_owned()];
        for path in ["description", "status", "priority", "assignee_id", "external_id"] {
            paths.extend((self.rng.u32(..4) == 0).then(|| path.to_owned()));
        }
        let update_mask = Some(FieldMask { paths });
        let request =
            UpdateIssueRequest { issue, update_mask, expected_version, comment, request_id, ..Default::default() };
        Some((Kind::Update, "IssueService/UpdateIssue", request.encode_to_vec(), id))
    }

    fn bulk(&mut self, request_id: String, marker: &str) -> Option<PlannedMutation> {
        let mut ids: Vec<String> = (0..self.rng.usize(2..6)).filter_map(|_| self.issue()).collect();
        ids.sort();
        ids.dedup();
        self.rng.shuffle(&mut ids);
        let statuses = [pb::Status::Open, pb::Status::InProgress, pb::Status::Closed];
        let status = statuses[self.rng.usize(..3)].into();
        let comment = if self.rng.bool() { marker.to_owned() } else { String::new() };
        let request = BulkUpdateStatusRequest { ids, status, comment, request_id, ..Default::default() };
        Some((Kind::Bulk, "IssueService/BulkUpdateStatus", request.encode_to_vec(), String::new()))
    }

    fn labels(&mut self, request_id: String) -> Option<PlannedMutation> {
        let id = self.issue()?;
        let label_ids = self.rng.choose_multiple(&self.state.label_ids, 2).into_iter().cloned().collect();
        let issue_id = id.clone();
        let (method, message) = match self.rng.u32(..3) {
            0 => {
                let request = AddIssueLabelsRequest { issue_id, label_ids, request_id, ..Default::default() };
                ("LabelService/AddIssueLabels", request.encode_to_vec())
            }
            1 => {
                let request = RemoveIssueLabelsRequest { issue_id, label_ids, request_id, ..Default::default() };
                ("LabelService/RemoveIssueLabels", request.encode_to_vec())
            }
            _ => {
                let request = ReplaceIssueLabelsRequest { issue_id, label_ids, request_id, ..Default::default() };
                ("LabelService/ReplaceIssueLabels", request.encode_to_vec())
            }
        };
        Some((Kind::Labels, method, message, id))
    }

    fn issue(&mut self) -> Option<String> {
        let issues = self.state.issues();
        let among = if self.rng.bool() { &issues.0[..issues.0.len().min(HOT_ISSUES)] } else { &issues.0[..] };
        self.rng.choose_multiple(among, 1).first().map(|id| (*id).clone())
    }
}

/// Returns the ids and versions of the issues in a response.
pub fn versions_in_response(kind: Kind, response: &[u8]) -> Vec<(String, i64)> {
    let of_issue = |issue: Issue| (issue.id, issue.version);
    match kind {
        Kind::Create | Kind::Update | Kind::Labels | Kind::Delete | Kind::Undelete => {
            vec![of_issue(Issue::decode(response).unwrap())]
        }
        Kind::BatchCreate => {
            BatchCreateIssuesResponse::decode(response).unwrap().issues.into_iter().map(of_issue).collect()
        }
        Kind::Bulk => {
            let results = BulkUpdateStatusResponse::decode(response).unwrap().results;
            results.into_iter().map(|result| (result.id, result.version)).collect()
        }
        Kind::Comment => Vec::new(),
    }
}

/// Classifies the result of a call: `None` if the outcome is unknown and the call must be retried, `Some(None)` if it
/// was rejected permanently, `Some(Some(response))` if it succeeded. Panics on an error that a caller must never
/// receive.
pub fn classify(result: Result<Vec<u8>, Status>) -> Option<Option<Vec<u8>>> {
    let status = match result {
        Ok(response) => return Some(Some(response)),
        Err(status) => status,
    };
    let reason = status.get_details_error_info().map(|info| info.reason);
    match (status.code(), reason.as_deref()) {
        // The client library reports these when the connection is lost.
        (Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded, None) => None,
        (Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled, Some(_)) => None,
        (Code::Aborted, Some("CONFLICT")) => None,
        (Code::Aborted, Some("VERSION_MISMATCH")) | (Code::FailedPrecondition, Some("ISSUE_STATE")) => Some(None),
        _ => panic!("{status:?}"),
    }
}

/// A connection to one of the replicas, which follows its address.
struct Connection {
    addresses: Vec<watch::Receiver<String>>,
    replica: usize,
    channel: Channel,
}

impl Connection {
    /// Connects to the replica with this number, modulo their count.
    fn to(mut addresses: Vec<watch::Receiver<String>>, replica: usize) -> Self {
        let replica = replica % addresses.len();
        let channel = channel(&addresses[replica].borrow_and_update());
        Self { addresses, replica, channel }
    }

    fn channel(&mut self) -> &Channel {
        let address = &mut self.addresses[self.replica];
        if address.has_changed().unwrap_or(false) {
            self.channel = channel(&address.borrow_and_update());
        }
        &self.channel
    }

    /// Waits before a retry, for less time than the service asks for. The retry goes to the next replica, if there is one.
    async fn pause(&mut self) {
        tokio::time::sleep(RETRY_PAUSE).await;
        if self.addresses.len() > 1 {
            self.replica = (self.replica + 1) % self.addresses.len();
            self.channel = channel(&self.addresses[self.replica].borrow_and_update());
        }
    }
}
