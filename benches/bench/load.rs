//! The load client: a process of its own with a fixed number of requests in flight, which checks its answers.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use issue_tracker::pb::{
    Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue, IssueView, ListIssuesRequest,
    UpdateIssueRequest, comment_service_client::CommentServiceClient, issue_service_client::IssueServiceClient,
};
use serde_json::{Value, json};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::{
    dataset::{COMMENTS_PER_ISSUE, LABELS_PER_ISSUE, issue_id},
    report::Outcome,
    service::Service,
};

/// Has the task of a load client, as JSON.
pub const TASK_VARIABLE: &str = "ISSUE_TRACKER_LOAD_TASK";

/// A call, and what pgbench does for the same.
pub struct Operation {
    pub name: &'static str,
    pub target: &'static str,
    /// pgbench's script.
    pub script: &'static str,
    /// Whether triggers are off, because the script writes the history itself.
    pub triggers_off: bool,
    pub yardstick_clients: usize,
    pub in_flight: usize,
    pub connections: usize,
    /// What is compared: the median latency instead of the rate.
    pub by_latency: bool,
}

const CONCURRENT: Operation = Operation {
    name: "",
    target: "",
    script: "",
    triggers_off: false,
    yardstick_clients: 8,
    in_flight: 64,
    connections: 8,
    by_latency: false,
};

const GET_SCRIPT: &str = "\\set n random(1, ISSUES)
SELECT id, title, description, status, priority, assignee_id, reporter_id, version, external_id, create_time, update_time, close_time, delete_time, reopen_count FROM issues WHERE id = ISSUE_ID(:n);
SELECT l.id, l.name, l.description FROM issue_labels il JOIN labels l ON l.id = il.label_id WHERE il.issue_id = ISSUE_ID(:n) ORDER BY lower(l.name);
SELECT c.id, c.issue_id, c.parent_id, c.author_id, u.username, c.content, c.create_time, c.update_time, c.delete_time FROM comments c JOIN users u ON u.id = c.author_id WHERE c.issue_id = ISSUE_ID(:n) ORDER BY c.id;
";

pub const OPERATIONS: &[Operation] = &[
    Operation { name: "GetIssue full", target: ">= 1.0, aim 1.5", script: GET_SCRIPT, ..CONCURRENT },
    Operation {
        name: "CreateIssue",
        target: ">= 2.0, aim 3.0",
        script: "\\set u random(1, 1000)
INSERT INTO issues (id, reporter_id, title, description, status, priority) VALUES (NEW_ID(), USER_ID(:u), 'An issue of the benchmark', 'what happens and how to see it', 1, 2);
",
        ..CONCURRENT
    },
    Operation {
        name: "UpdateIssue",
        target: ">= 1.0, aim 1.5",
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
    },
    Operation {
        name: "CreateComment",
        target: ">= 1.5, aim 2.5",
        script: "\\set n random(1, ISSUES)
\\set u random(1, 1000)
INSERT INTO comments (id, issue_id, author_id, content) VALUES (NEW_ID(), ISSUE_ID(:n), USER_ID(:u), 'a comment of the benchmark');
",
        ..CONCURRENT
    },
    Operation {
        name: "ListIssues by status",
        target: ">= 0.7, aim 1.0",
        script: "SELECT i.id, i.title, i.description, i.status, i.priority, i.assignee_id, i.reporter_id, i.version, i.external_id, i.create_time, i.update_time, i.close_time, i.delete_time, i.reopen_count, (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL), l.ids, l.names, l.descriptions FROM (SELECT i.* FROM issues i WHERE i.delete_time IS NULL AND i.status = :STATUS ORDER BY i.id DESC LIMIT 51) i LEFT JOIN LATERAL (SELECT array_agg(l.id ORDER BY lower(l.name)) AS ids, array_agg(l.name ORDER BY lower(l.name)) AS names, array_agg(l.description ORDER BY lower(l.name)) AS descriptions FROM issue_labels il JOIN labels l ON l.id = il.label_id WHERE il.issue_id = i.id) l ON true ORDER BY i.id DESC;
",
        ..CONCURRENT
    },
    Operation {
        name: "GetIssue one at a time",
        target: "<= 1.3, aim 0.8",
        script: GET_SCRIPT,
        yardstick_clients: 1,
        in_flight: 1,
        connections: 1,
        by_latency: true,
        ..CONCURRENT
    },
];

/// Runs the load client as a process, to its end.
pub fn spawn(operation: &Operation, service: &Service, issues: u32, duration: Duration) -> anyhow::Result<Outcome> {
    start(operation, service, issues, duration)?.finish()
}

/// Starts it.
pub fn start(operation: &Operation, service: &Service, issues: u32, duration: Duration) -> anyhow::Result<Running> {
    let task = json!({
        "operation": operation.name, "address": service.address, "token": service.token, "issues": issues,
        "milliseconds": duration.as_millis() as u64, "in_flight": operation.in_flight,
        "connections": operation.connections,
    });
    let child = Command::new(std::env::current_exe()?)
        .env(TASK_VARIABLE, task.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    Ok(Running(child))
}

pub struct Running(std::process::Child);

impl Running {
    pub fn finish(self) -> anyhow::Result<Outcome> {
        let output = self.0.wait_with_output()?;
        ensure!(output.status.success(), "the load client failed");
        Outcome::from_json(&serde_json::from_slice(&output.stdout)?).context("the load client said something else")
    }
}

/// What the process does.
pub fn main(task: &str) -> anyhow::Result<()> {
    let task: Value = serde_json::from_str(task)?;
    let text = |name: &str| task[name].as_str().context("no such text in the task");
    let number = |name: &str| task[name].as_u64().context("no such number in the task");
    let (operation, in_flight, connections) =
        (text("operation")?.to_owned(), number("in_flight")?, number("connections")?);
    let (issues, duration) = (number("issues")? as u32, Duration::from_millis(number("milliseconds")?));
    let authorization: MetadataValue<Ascii> = format!("Bearer {}", text("token")?).parse()?;
    let endpoint = Endpoint::try_from(format!("http://{}", text("address")?))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let mut channels = Vec::new();
        for _ in 0..connections {
            channels.push(endpoint.clone().tcp_nodelay(true).connect().await?);
        }
        let started = Instant::now();
        let workers: Vec<_> = (0..in_flight)
            .map(|nth| {
                let caller = Caller {
                    channel: channels[nth as usize % channels.len()].clone(),
                    authorization: authorization.clone(),
                    random: 0x9e37_79b9_7f4a_7c15 ^ (nth + 1).wrapping_mul(0x2545_f491_4f6c_dd1d),
                    issues,
                    worker: nth as u32,
                    workers: in_flight as u32,
                };
                tokio::spawn(work(operation.clone(), caller, started + duration))
            })
            .collect();
        let (mut latencies, mut errors) = (Vec::new(), 0);
        for worker in workers {
            let (of_worker, errors_of_worker) = worker.await?;
            latencies.extend(of_worker);
            errors += errors_of_worker;
        }
        anyhow::Ok(Outcome::new(latencies, started.elapsed(), errors))
    })?;
    println!("{}", outcome.to_json());
    Ok(())
}

/// Calls one after the other until the time is over; answers the latencies of those that were right, in microseconds,
/// and how many were not.
async fn work(operation: String, mut caller: Caller, end: Instant) -> (Vec<u32>, u64) {
    let (mut latencies, mut errors) = (Vec::new(), 0);
    while Instant::now() < end {
        let started = Instant::now();
        match caller.call(&operation).await {
            Ok(true) => latencies.push(started.elapsed().as_micros() as u32),
            Ok(false) => errors += 1,
            Err(status) => {
                if errors == 0 {
                    eprintln!("{operation}: {status:?}");
                }
                errors += 1;
            }
        }
    }
    (latencies, errors)
}

struct Caller {
    channel: Channel,
    authorization: MetadataValue<Ascii>,
    random: u64,
    issues: u32,
    worker: u32,
    workers: u32,
}

impl Caller {
    /// Whether the answer is right.
    async fn call(&mut self, operation: &str) -> Result<bool, Status> {
        let mut issues = IssueServiceClient::new(self.channel.clone());
        match operation {
            "CreateIssue" => {
                let issue = Issue {
                    title: "An issue of the benchmark".to_owned(),
                    description: "what happens and how to see it".to_owned(),
                    priority: 2,
                    ..Issue::default()
                };
                let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
                Ok(issues.create_issue(self.request(request)).await?.get_ref().version == 1)
            }
            "UpdateIssue" => {
                // Each worker has issues of its own.
                let number = 1 + self.pick(self.issues / self.workers - 1) * self.workers + self.worker;
                let title = format!("Retitled {}", self.pick(1_000_000_000));
                let issue = Issue { id: issue_id(number).to_string(), title: title.clone(), ..Issue::default() };
                let request = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
                let updated = issues.update_issue(self.request(request)).await?.into_inner();
                Ok(updated.title == title && updated.version > 1)
            }
            "CreateComment" => {
                let issue_id = issue_id(1 + self.pick(self.issues)).to_string();
                let content = "a comment of the benchmark".to_owned();
                let comment = Comment { issue_id: issue_id.clone(), content, ..Comment::default() };
                let request = CreateCommentRequest { comment: Some(comment), ..Default::default() };
                let mut comments = CommentServiceClient::new(self.channel.clone());
                Ok(comments.create_comment(self.request(request)).await?.get_ref().issue_id == issue_id)
            }
            "ListIssues by status" => {
                let (status, name) = [(1, "OPEN"), (2, "IN_PROGRESS"), (3, "CLOSED")][self.pick(3) as usize];
                let request = ListIssuesRequest { filter: format!("status = {name}"), ..Default::default() };
                let listed = issues.list_issues(self.request(request)).await?.into_inner();
                Ok(listed.issues.len() == 50 && listed.issues.iter().all(|issue| issue.status == status))
            }
            _ => {
                let id = issue_id(1 + self.pick(self.issues)).to_string();
                let request = GetIssueRequest { id: id.clone(), view: IssueView::Full.into() };
                let issue = issues.get_issue(self.request(request)).await?.into_inner();
                Ok(issue.id == id
                    && issue.comments.len() >= COMMENTS_PER_ISSUE
                    && issue.labels.len() == LABELS_PER_ISSUE)
            }
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    /// xorshift64*: a number under `below`.
    fn pick(&mut self, below: u32) -> u32 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let mixed = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        ((mixed * u64::from(below)) >> 32) as u32
    }
}
