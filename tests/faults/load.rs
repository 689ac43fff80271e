//! Clients that do everything at once, try again until they are answered, and keep what they were told.

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
use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::Config;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Caller, call, callers},
    support::{bounds::HANG, database::session, service::channel},
};

const LABELS: usize = 5;
/// The issues that everybody is at.
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

/// A mutation and what became of it.
#[derive(Clone, Debug)]
pub struct Made {
    pub kind: Kind,
    pub caller: Uuid,
    pub token: String,
    pub method: &'static str,
    pub message: Vec<u8>,
    pub request_id: Uuid,
    /// In what it writes, and in nothing else.
    pub marker: String,
    /// The issue that it is about, if it is one.
    pub issue_id: String,
    /// How often it was tried.
    pub tries: u32,
    /// The reply; none: refused for good, and so nothing is written.
    pub reply: Option<Vec<u8>>,
}

/// What the clients share.
struct Shared {
    address: watch::Receiver<String>,
    stop: AtomicBool,
    began: Instant,
    /// When the last acknowledged mutation was sent, in microseconds since `began`.
    last_acknowledged_us: AtomicU64,
    acknowledged: AtomicU64,
    label_ids: Vec<String>,
    /// The issues that were filed, in order, and the highest version that anybody was told of each.
    issues: Mutex<(Vec<String>, HashMap<String, i64>)>,
}

impl Shared {
    fn issues(&self) -> MutexGuard<'_, (Vec<String>, HashMap<String, i64>)> {
        self.issues.lock().unwrap()
    }

    fn saw(&self, id: &str, version: i64) {
        let mut issues = self.issues();
        match issues.1.get_mut(id) {
            Some(known) => *known = version.max(*known),
            None => {
                issues.1.insert(id.to_owned(), version);
                issues.0.push(id.to_owned());
            }
        }
    }
}

pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Vec<Made>>>,
}

impl Load {
    /// Begins with so many clients, each with a token of its own. They follow the service to its newest address.
    pub async fn start(
        database: &Config,
        address: watch::Receiver<String>,
        clients: usize,
        rng: &mut fastrand::Rng,
    ) -> Self {
        let callers = callers(database, clients).await;
        let rows = session(database).await;
        let mut label_ids = Vec::new();
        for _ in 0..LABELS {
            let id = Uuid::now_v7();
            const SQL: &str = "INSERT INTO labels (id, name) VALUES ($1, 'label ' || $1::uuid::text)";
            rows.execute(SQL, &[&id]).await.unwrap();
            label_ids.push(id.to_string());
        }
        let shared = Arc::new(Shared {
            address,
            stop: AtomicBool::new(false),
            began: Instant::now(),
            last_acknowledged_us: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            label_ids,
            issues: Mutex::default(),
        });
        let run = |(nth, caller)| {
            let client = Client { nth, caller, shared: Arc::clone(&shared), rng: rng.fork(), made: Vec::new() };
            tokio::spawn(client.run())
        };
        let clients = callers.into_iter().enumerate().map(run).collect();
        Self { shared, clients }
    }

    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::SeqCst)
    }

    /// Of all that were filed so far.
    pub fn issue_ids(&self) -> Vec<String> {
        self.shared.issues().0.clone()
    }

    /// Waits for the acknowledgement of a mutation that was sent after this moment, and tells how long it took to come.
    pub async fn acknowledged_after(&self, moment: Instant) -> Duration {
        let moment_us = moment.duration_since(self.shared.began).as_micros() as u64;
        while self.shared.last_acknowledged_us.load(Ordering::SeqCst) <= moment_us {
            assert!(moment.elapsed() < HANG, "the service does not recover");
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        moment.elapsed()
    }

    /// Waits until so many more mutations are acknowledged.
    pub async fn acknowledges(&self, more: u64) {
        let (began, target) = (Instant::now(), self.acknowledged() + more);
        while self.acknowledged() < target {
            assert!(began.elapsed() < HANG, "nothing is acknowledged any more");
            assert!(self.clients.iter().all(|client| !client.is_finished()), "a client has failed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Lets each client finish its call; answers all that they have made.
    pub async fn finish(self) -> Vec<Made> {
        self.shared.stop.store(true, Ordering::SeqCst);
        let mut made = Vec::new();
        for client in self.clients {
            made.extend(client.await.unwrap());
        }
        made
    }
}

struct Client {
    nth: usize,
    caller: Caller,
    shared: Arc<Shared>,
    rng: fastrand::Rng,
    made: Vec<Made>,
}

/// A mutation that is to be made: how, with which message, about which issue.
type Mutation = (Kind, &'static str, Vec<u8>, String);

impl Client {
    async fn run(mut self) -> Vec<Made> {
        let mut connected = Connection::to(self.shared.address.clone());
        while !self.shared.stop.load(Ordering::SeqCst) {
            if self.rng.u32(..4) == 0 {
                self.read(&mut connected).await;
            } else {
                self.mutate(&mut connected).await;
            }
            tokio::time::sleep(Duration::from_millis(self.rng.u64(..10))).await;
        }
        self.made
    }

    /// An issue is never seen older than somebody was told it is, and a page has no row twice.
    async fn read(&mut self, connection: &mut Connection) {
        if self.rng.bool() {
            let list = ListIssuesRequest { page_size: 20, show_deleted: self.rng.bool(), ..Default::default() };
            let list = list.encode_to_vec();
            let listed = call(connection.channel(), &self.caller.token, "IssueService/ListIssues", &list).await;
            let Some(page) = judged(listed).flatten() else { return connection.pause().await };
            let page = ListIssuesResponse::decode(&*page).unwrap();
            let order: Vec<&str> = page.issues.iter().map(|issue| &*issue.id).collect();
            assert!(order.is_sorted_by(|left, right| left > right), "{order:?}");
            return;
        }
        let Some(id) = self.issue() else { return };
        let known = self.shared.issues().1[&id];
        let get = GetIssueRequest { id: id.clone(), ..Default::default() };
        let read = call(connection.channel(), &self.caller.token, "IssueService/GetIssue", &get.encode_to_vec()).await;
        let Some(issue) = judged(read).flatten() else { return connection.pause().await };
        let issue = Issue::decode(&*issue).unwrap();
        assert!(issue.version >= known, "{id} is seen at version {}, and was told to be at {known}", issue.version);
    }

    async fn mutate(&mut self, connection: &mut Connection) {
        let request_id = Uuid::new_v4();
        let marker = format!("m-{}-{}", self.nth, self.made.len());
        let Some((kind, method, message, issue_id)) = self.mutation(&request_id.to_string(), &marker) else { return };
        let began = Instant::now();
        for tries in 1.. {
            let sent_us = self.shared.began.elapsed().as_micros() as u64;
            let answer = call(connection.channel(), &self.caller.token, method, &message).await;
            let Some(reply) = judged(answer) else {
                assert!(began.elapsed() < HANG, "{method} is never answered");
                connection.pause().await;
                continue;
            };
            if let Some(reply) = &reply {
                self.shared.last_acknowledged_us.fetch_max(sent_us, Ordering::SeqCst);
                self.shared.acknowledged.fetch_add(1, Ordering::SeqCst);
                for (id, version) in told_versions(kind, reply) {
                    self.shared.saw(&id, version);
                }
            }
            let (caller, token) = (self.caller.id, self.caller.token.clone());
            self.made.push(Made { kind, caller, token, method, message, request_id, marker, issue_id, tries, reply });
            return;
        }
    }

    /// None: there is nothing yet to change.
    fn mutation(&mut self, request_id: &str, marker: &str) -> Option<Mutation> {
        let request_id = request_id.to_owned();
        let number = if self.shared.issues().0.len() < HOT_ISSUES { 0 } else { self.rng.u32(..100) };
        let new = |marker: String| Issue { title: "as filed".to_owned(), description: marker, ..Issue::default() };
        Some(match number {
            0..25 => {
                let issue = Some(new(marker.to_owned()));
                let request = CreateIssueRequest { issue, request_id, ..Default::default() };
                (Kind::Create, "IssueService/CreateIssue", request.encode_to_vec(), String::new())
            }
            25..30 => {
                let issues = (0..self.rng.usize(2..5)).map(|nth| new(format!("{marker}.{nth}"))).collect();
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

    fn update(&mut self, request_id: String, marker: &str) -> Option<Mutation> {
        let id = self.issue()?;
        // Stale, if somebody is quicker.
        let expected_version = if self.rng.bool() { self.shared.issues().1[&id] } else { 0 };
        let comment = if self.rng.u32(..3) == 0 { marker.to_owned() } else { String::new() };
        let issue = Some(Issue { id: id.clone(), title: marker.to_owned(), ..Issue::default() });
        let request = UpdateIssueRequest { issue, expected_version, comment, request_id, ..Default::default() };
        Some((Kind::Update, "IssueService/UpdateIssue", request.encode_to_vec(), id))
    }

    fn bulk(&mut self, request_id: String, marker: &str) -> Option<Mutation> {
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

    fn labels(&mut self, request_id: String) -> Option<Mutation> {
        let id = self.issue()?;
        let label_ids = self.rng.choose_multiple(&self.shared.label_ids, 2).into_iter().cloned().collect();
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
        let issues = self.shared.issues();
        let among = if self.rng.bool() { &issues.0[..issues.0.len().min(HOT_ISSUES)] } else { &issues.0[..] };
        self.rng.choose_multiple(among, 1).first().map(|id| (*id).clone())
    }
}

/// The issues and versions that a reply tells of.
pub fn told_versions(kind: Kind, reply: &[u8]) -> Vec<(String, i64)> {
    let of_issue = |issue: Issue| (issue.id, issue.version);
    match kind {
        Kind::Create | Kind::Update | Kind::Labels | Kind::Delete | Kind::Undelete => {
            vec![of_issue(Issue::decode(reply).unwrap())]
        }
        Kind::BatchCreate => {
            BatchCreateIssuesResponse::decode(reply).unwrap().issues.into_iter().map(of_issue).collect()
        }
        Kind::Bulk => {
            let results = BulkUpdateStatusResponse::decode(reply).unwrap().results;
            results.into_iter().map(|result| (result.id, result.version)).collect()
        }
        Kind::Comment => Vec::new(),
    }
}

/// What an answer means: none that nobody knows and it is to be tried again, else the reply or a refusal for good.
/// Anything that a caller should never see fails the test.
pub fn judged(answer: Result<Vec<u8>, Status>) -> Option<Option<Vec<u8>>> {
    let status = match answer {
        Ok(reply) => return Some(Some(reply)),
        Err(status) => status,
    };
    let reason = status.get_details_error_info().map(|info| info.reason);
    match (status.code(), reason.as_deref()) {
        // Made by the client's own side, as the connection was lost.
        (Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled | Code::DeadlineExceeded, None) => None,
        (Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled, Some(_)) => None,
        (Code::Aborted, Some("CONFLICT")) => None,
        (Code::Aborted, Some("VERSION_MISMATCH")) | (Code::FailedPrecondition, Some("ISSUE_STATE")) => Some(None),
        _ => panic!("{status:?}"),
    }
}

/// A connection to wherever the service is.
struct Connection {
    address: watch::Receiver<String>,
    channel: Channel,
}

impl Connection {
    fn to(mut address: watch::Receiver<String>) -> Self {
        let channel = channel(&address.borrow_and_update());
        Self { address, channel }
    }

    fn channel(&mut self) -> &Channel {
        if self.address.has_changed().unwrap_or(false) {
            self.channel = channel(&self.address.borrow_and_update());
        }
        &self.channel
    }

    /// As the service asks its callers to, only shorter.
    async fn pause(&self) {
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}
