//! The load client: a separate process with a fixed number of requests in flight, that checks the responses.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use issue_tracker::pb::{
    Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue, IssueView, ListIssuesRequest,
    ListIssuesResponse, UpdateIssueRequest,
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    client::Connection,
    dataset::{COMMENTS_PER_ISSUE, LABELS_PER_ISSUE, issue_id},
    large_dataset,
    overload::{self, CallResult},
    results::Outcome,
    service::Service,
};

/// The environment variable that holds the task of the load client, as JSON.
pub const TASK_VARIABLE: &str = "ISSUE_TRACKER_LOAD_TASK";

/// The title of issues that CreateIssue creates.
pub const TITLE: &str = "An issue of the benchmark";

/// The RPC that an operation calls.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    GetIssue,
    CreateIssue,
    UpdateIssue,
    CreateComment,
    ListIssues,
    ListIssuesByStatus,
    /// Lists issues that contain a word that no issue has, which scans all of them.
    Search,
}

/// A call, and the pgbench script that does the same work.
pub struct Operation {
    pub name: &'static str,
    pub target: &'static str,
    pub call: Call,
    /// Whether each call has a unique request id.
    pub request_ids: bool,
    /// The pgbench script.
    pub script: &'static str,
    /// Whether pgbench disables triggers, because the script writes the history itself.
    pub triggers_off: bool,
    pub pgbench_clients: usize,
    pub in_flight: usize,
    pub connections: usize,
    /// Whether to compare the median latency instead of the rate.
    pub by_latency: bool,
}

const CONCURRENT: Operation = Operation {
    name: "",
    target: "",
    call: Call::GetIssue,
    request_ids: false,
    script: "",
    triggers_off: false,
    pgbench_clients: 8,
    in_flight: 64,
    connections: 8,
    by_latency: false,
};

/// One call in flight, so that the latency includes no queueing.
pub const ONE_AT_A_TIME: Operation =
    Operation { pgbench_clients: 1, in_flight: 1, connections: 1, by_latency: true, ..CONCURRENT };

const GET_SCRIPT: &str = "\\set n random(1, ISSUES)
SELECT id, title, description, status, priority, assignee_id, reporter_id, version, external_id, create_time, update_time, close_time, delete_time, reopen_count FROM issues WHERE id = ISSUE_ID(:n);
SELECT l.id, l.name, l.description FROM issue_labels il JOIN labels l ON l.id = il.label_id WHERE il.issue_id = ISSUE_ID(:n) ORDER BY lower(l.name);
SELECT c.id, c.issue_id, c.parent_id, c.author_id, u.username, c.content, c.create_time, c.update_time, c.delete_time FROM comments c JOIN users u ON u.id = c.author_id WHERE c.issue_id = ISSUE_ID(:n) ORDER BY c.id;
";

const CREATE_ISSUE: Operation = Operation {
    name: "CreateIssue",
    target: ">= 2.0, aim 3.0",
    call: Call::CreateIssue,
    script: "\\set u random(1, 1000)
INSERT INTO issues (id, reporter_id, title, description, status, priority) VALUES (NEW_ID(), USER_ID(:u), 'An issue of the benchmark', 'what happens and how to see it', 1, 2);
",
    ..CONCURRENT
};

const UPDATE_ISSUE: Operation = Operation {
    name: "UpdateIssue",
    target: ">= 1.0, aim 1.5",
    call: Call::UpdateIssue,
    triggers_off: true,
    script: "\\set n random(1, ISSUES)
\\set u random(1, 1000)
\\set r random(1, 1000000)
BEGIN;
UPDATE issues SET title = 'Retitled ' || :r, version = version + 1, update_time = now() WHERE id = ISSUE_ID(:n);
INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value) VALUES (ISSUE_ID(:n), 2, USER_ID(:u), 'title', 'Issue number ' || :n, 'Retitled ' || :r);
COMMIT;
",
    ..CONCURRENT
};

const CREATE_COMMENT: Operation = Operation {
    name: "CreateComment",
    target: ">= 1.5, aim 2.5",
    call: Call::CreateComment,
    script: "\\set n random(1, ISSUES)
\\set u random(1, 1000)
INSERT INTO comments (id, issue_id, author_id, content) VALUES (NEW_ID(), ISSUE_ID(:n), USER_ID(:u), 'a comment of the benchmark');
",
    ..CONCURRENT
};

pub const OPERATIONS: &[Operation] = &[
    Operation { name: "GetIssue full", target: ">= 1.0, aim 1.5", script: GET_SCRIPT, ..CONCURRENT },
    CREATE_ISSUE,
    Operation { name: "CreateIssue with request ids", target: "", request_ids: true, ..CREATE_ISSUE },
    UPDATE_ISSUE,
    Operation { name: "UpdateIssue with request ids", target: "", request_ids: true, ..UPDATE_ISSUE },
    CREATE_COMMENT,
    Operation { name: "CreateComment with request ids", target: "", request_ids: true, ..CREATE_COMMENT },
    Operation {
        name: "ListIssues by status",
        target: ">= 0.7, aim 1.0",
        call: Call::ListIssuesByStatus,
        script: "SELECT i.id, i.title, i.description, i.status, i.priority, i.assignee_id, i.reporter_id, i.version, i.external_id, i.create_time, i.update_time, i.close_time, i.delete_time, i.reopen_count, (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL), ARRAY(SELECT label_id FROM issue_labels il WHERE il.issue_id = i.id) FROM (SELECT i.* FROM issues i WHERE i.delete_time IS NULL AND i.status = :STATUS ORDER BY i.id DESC LIMIT 51) i ORDER BY i.id DESC;
SELECT id, name, description FROM labels WHERE id = ANY (LABEL_IDS) ORDER BY lower(name);
",
        ..CONCURRENT
    },
    Operation {
        name: "GetIssue one at a time",
        target: "<= 1.3, aim 0.8",
        script: GET_SCRIPT,
        ..ONE_AT_A_TIME
    },
];

/// The offered load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Number of concurrent calls.
    pub in_flight: usize,
    /// Calls per second, regardless of the number in flight. 0 means that `in_flight` alone limits the load.
    pub rate: f64,
}

impl Load {
    pub fn of(operation: &Operation) -> Self {
        Self { in_flight: operation.in_flight, rate: 0.0 }
    }
}

/// Runs the load client to its end.
pub fn run(operation: &Operation, service: &Service, duration: Duration) -> anyhow::Result<Outcome> {
    run_with(operation, Load::of(operation), service, duration)
}

pub fn run_with(operation: &Operation, load: Load, service: &Service, duration: Duration) -> anyhow::Result<Outcome> {
    let task = json!({
        "in_flight": load.in_flight, "rate": load.rate,
        "operation": operation.name, "address": service.address, "token": service.token, "issues": service.issues,
        "milliseconds": duration.as_millis() as u64,
    });
    let output = Command::new(std::env::current_exe()?)
        .env(TASK_VARIABLE, task.to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the load client failed");
    Outcome::from_json(&serde_json::from_slice(&output.stdout)?).context("the output of the load client is invalid")
}

/// Runs in the load client process.
pub fn main(task: &str) -> anyhow::Result<()> {
    let task: Value = serde_json::from_str(task)?;
    let text = |name: &str| task[name].as_str().context("the task lacks a text field");
    let number = |name: &str| task[name].as_u64().context("the task lacks a number field");
    let (name, address, token) = (text("operation")?, text("address")?, text("token")?);
    let (issues, duration) = (number("issues")? as u32, Duration::from_millis(number("milliseconds")?));
    let (in_flight, rate) = (number("in_flight")? as usize, task["rate"].as_f64().context("the task lacks the rate")?);
    let operation = OPERATIONS
        .iter()
        .chain(large_dataset::GROWTH)
        .chain(overload::OVERLOADS.iter().map(|overload| &overload.operation))
        .find(|operation| operation.name == name)
        .context("unknown operation")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut connections = Vec::new();
        for _ in 0..operation.connections {
            connections.push(Connection::open(address, token).await?);
        }
        let started = Instant::now();
        if rate > 0.0 {
            let probe = tokio::spawn(overload::probe(Connection::open(address, token).await?, started + duration));
            let (latencies, wrong) = overload::at_rate(operation, &connections, issues, rate, duration).await?;
            return Ok(Outcome::new(latencies, started.elapsed(), wrong + probe.await??));
        }
        let workers: Vec<_> = (0..in_flight)
            .map(|worker| {
                let connection = connections[worker % connections.len()].clone();
                let may_be_rejected = in_flight > operation.in_flight;
                tokio::spawn(work(
                    Caller::new(operation, connection, issues, worker as u32),
                    started + duration,
                    may_be_rejected,
                ))
            })
            .collect();
        let (mut latencies, mut errors) = (Vec::new(), 0);
        for worker in workers {
            let (worker_latencies, worker_errors) = worker.await?;
            latencies.extend(worker_latencies);
            errors += worker_errors;
        }
        anyhow::Ok(Outcome::new(latencies, started.elapsed(), errors))
    })?;
    println!("{}", outcome.to_json());
    Ok(())
}

/// Makes sequential calls until `end`. Returns the latencies of the correct responses in microseconds, and the number
/// of failed calls. Rejections are failures unless the run overloads the service.
async fn work(mut caller: Caller, end: Instant, may_be_rejected: bool) -> (Vec<u32>, u64) {
    let (mut latencies, mut errors) = (Vec::new(), 0);
    while Instant::now() < end {
        match overload::timed_call(&mut caller).await {
            CallResult::Succeeded(latency) => latencies.push(latency),
            // Never sleeps past the end of the run.
            CallResult::Rejected(delay) if may_be_rejected => {
                tokio::time::sleep_until((Instant::now() + delay).min(end).into()).await;
            }
            CallResult::Rejected(_) => errors += 1,
            CallResult::Wrong(error) => {
                if errors == 0 {
                    eprintln!("{}: {error:#}", caller.operation.name);
                }
                errors += 1;
            }
        }
    }
    (latencies, errors)
}

pub struct Caller {
    pub operation: &'static Operation,
    connection: Connection,
    random: u64,
    issues: u32,
    worker: u32,
}

impl Caller {
    pub fn new(operation: &'static Operation, connection: Connection, issues: u32, worker: u32) -> Self {
        // A random seed, so that request ids differ between runs. The UUID version makes it nonzero.
        let (random, _) = Uuid::new_v4().as_u64_pair();
        Self { operation, connection, random, issues, worker }
    }

    /// Makes one call and checks the response.
    pub async fn call(&mut self) -> anyhow::Result<()> {
        let request_id = if self.operation.request_ids { self.uuid().to_string() } else { String::new() };
        let is_correct = match self.operation.call {
            Call::CreateIssue => {
                let issue = Issue {
                    title: TITLE.to_owned(),
                    description: "what happens and how to see it".to_owned(),
                    priority: 2,
                    ..Issue::default()
                };
                let request = CreateIssueRequest { issue: Some(issue), request_id, ..Default::default() };
                let created: Issue =
                    self.connection.call("/issuetracker.v1.IssueService/CreateIssue", &request).await?;
                created.version == 1 && created.title == TITLE
            }
            Call::UpdateIssue => {
                // Each worker updates different issues.
                let workers = self.operation.in_flight as u32;
                let number = 1 + self.pick(self.issues / workers - 1) * workers + self.worker;
                let title = format!("Retitled {}", self.pick(1_000_000_000));
                let issue = Issue { id: issue_id(number).to_string(), title: title.clone(), ..Issue::default() };
                let request = UpdateIssueRequest { issue: Some(issue), request_id, ..Default::default() };
                let updated: Issue =
                    self.connection.call("/issuetracker.v1.IssueService/UpdateIssue", &request).await?;
                updated.title == title && updated.version > 1
            }
            Call::CreateComment => {
                let issue_id = issue_id(1 + self.pick(self.issues)).to_string();
                let content = "a comment of the benchmark".to_owned();
                let comment = Comment { issue_id: issue_id.clone(), content, ..Comment::default() };
                let request = CreateCommentRequest { comment: Some(comment), request_id, ..Default::default() };
                let created: Comment =
                    self.connection.call("/issuetracker.v1.CommentService/CreateComment", &request).await?;
                created.issue_id == issue_id
            }
            Call::Search => {
                // A different word each time, because equal searches share a read.
                let word = format!("nosuchword{}", self.pick(1_000_000_000));
                self.list(word).await?.is_empty()
            }
            Call::ListIssues => self.list(String::new()).await?.len() == 50,
            Call::ListIssuesByStatus => {
                let (status, name) = [(1, "OPEN"), (2, "IN_PROGRESS"), (3, "CLOSED")][self.pick(3) as usize];
                let listed = self.list(format!("status = {name}")).await?;
                listed.len() == 50 && listed.iter().all(|issue| issue.status == status)
            }
            Call::GetIssue => {
                let id = issue_id(1 + self.pick(self.issues)).to_string();
                let request = GetIssueRequest { id: id.clone(), view: IssueView::Full.into() };
                let issue: Issue = self.connection.call("/issuetracker.v1.IssueService/GetIssue", &request).await?;
                issue.id == id && issue.comments.len() >= COMMENTS_PER_ISSUE && issue.labels.len() == LABELS_PER_ISSUE
            }
        };
        ensure!(is_correct, "the response is wrong");
        Ok(())
    }

    /// Lists the first page.
    async fn list(&mut self, filter: String) -> anyhow::Result<Vec<Issue>> {
        let request = ListIssuesRequest { filter, ..Default::default() };
        let listed: ListIssuesResponse =
            self.connection.call("/issuetracker.v1.IssueService/ListIssues", &request).await?;
        Ok(listed.issues)
    }

    /// Returns the next value of xorshift64*, whose upper half has the better quality.
    fn next(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a random number less than `below`.
    fn pick(&mut self, below: u32) -> u32 {
        (((self.next() >> 32) * u64::from(below)) >> 32) as u32
    }

    /// Returns a random UUID of version 4.
    fn uuid(&mut self) -> Uuid {
        let bits = u128::from(self.next()) << 64 | u128::from(self.next());
        uuid::Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
    }
}
