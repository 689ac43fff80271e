//! Tests exhausted connections: those of the service's pool, and those of the database.

use issue_tracker::{
    pb::{CreateIssueRequest, Issue, ListIssuesRequest},
    postgres::Durability,
};
use prost::Message;
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls};
use tonic::{Code, Status};

use crate::{
    harness::{Settings, assert_retriable, call, create_callers, serves},
    support::{
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, finished, program},
    },
};

const POOL_CONNECTIONS: i64 = 4;
/// The health check and authentication use connections outside the pool.
const OTHER_CONNECTIONS_MAX: i64 = 3;
const REJECTED_CALLS: usize = 30;
/// More than PostgreSQL allows by default. Bounds the loop that takes all connections.
const CONNECTIONS_MAX: usize = 1_000;

const SERVICE_CONNECTIONS: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker'";
const WAITING_CONNECTIONS: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker' \
    AND wait_event_type = 'Lock'";

fn start(external: &External) -> Service {
    let mut command = program(&["--database-url", &external.url(), "--pool-wait-ms", "300"]);
    command.args(["--pool-connections", &POOL_CONNECTIONS.to_string(), "--imports", "1", "--exports", "1"]);
    Service::start(&external.dir, command)
}

async fn count(rows: &Client, sql: &str) -> i64 {
    rows.query_one(sql, &[]).await.unwrap().get(0)
}

/// Returns a list request. Requests of different page sizes do not share a read.
fn list(nth: usize) -> Vec<u8> {
    ListIssuesRequest { page_size: 1 + nth as i32, ..Default::default() }.encode_to_vec()
}

fn create(title: String) -> Vec<u8> {
    let issue = Issue { title, ..Issue::default() };
    CreateIssueRequest { issue: Some(issue), ..Default::default() }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_fail_with_overloaded_while_the_pool_is_exhausted_and_no_connection_leaks() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external);
    // One user may hold three of four connections.
    let tokens: Vec<String> =
        create_callers(&external.config(), 2).await.into_iter().map(|caller| caller.token).collect();
    let (channel, token) = (service.channel(), tokens[0].clone());
    let (rows, lock) = (session(&external.config()).await, session(&external.config()).await);
    for iteration in 0..Settings::from_environment().pick(3, 20) {
        // Caches the tokens, so that authentication needs no connection.
        for token in &tokens {
            call(&channel, token, "IssueService/ListIssues", &list(0)).await.unwrap();
        }
        lock.batch_execute("BEGIN; LOCK TABLE issues IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let mut blocked_calls = JoinSet::new();
        for nth in 0..POOL_CONNECTIONS as usize {
            let (channel, token) = (channel.clone(), tokens[nth % 2].clone());
            blocked_calls.spawn(async move { call(&channel, &token, "IssueService/ListIssues", &list(nth)).await });
        }
        eventually("every pooled connection waits for the lock", async || {
            count(&rows, WAITING_CONNECTIONS).await == POOL_CONNECTIONS
        })
        .await;

        let mut rejected = JoinSet::new();
        for nth in 0..REJECTED_CALLS {
            let (channel, token) = (channel.clone(), tokens[nth / 2 % 2].clone());
            rejected.spawn(async move {
                match nth % 2 {
                    0 => call(&channel, &token, "IssueService/ListIssues", &list(100 + nth)).await,
                    _ => call(&channel, &token, "IssueService/CreateIssue", &create("never".to_owned())).await,
                }
            });
        }
        while let Some(rejected) = rejected.join_next().await {
            assert_retriable(&rejected.unwrap().unwrap_err(), Code::ResourceExhausted, "OVERLOADED");
        }
        assert!(serves(&channel).await, "an exhausted pool must not make health fail");

        lock.batch_execute("COMMIT").await.unwrap();
        while let Some(blocked) = blocked_calls.join_next().await {
            blocked.unwrap().unwrap();
        }
        let title = format!("issue {iteration}");
        call(&channel, &token, "IssueService/CreateIssue", &create(title)).await.unwrap();
        assert_eq!(count(&rows, "SELECT count(*) FROM issues").await, iteration + 1);
        let connections = count(&rows, SERVICE_CONNECTIONS).await;
        assert!(connections <= POOL_CONNECTIONS + OTHER_CONNECTIONS_MAX, "{connections} connections");
    }
    eventually("no transaction is left open", async || {
        let open = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker' AND state <> 'idle'";
        count(&rows, open).await == 0
    })
    .await;
    service.assert_no_internal_errors();
}

/// Clients that hold every connection that the database allows.
struct ConnectionHolders(Vec<Client>);

impl ConnectionHolders {
    async fn take_all(external: &External) -> Self {
        let mut holders = Self(Vec::new());
        holders.take_rest(external).await;
        holders
    }

    async fn take_rest(&mut self, external: &External) {
        while let Ok((client, connection)) = external.config().connect(NoTls).await {
            tokio::spawn(connection);
            self.0.push(client);
            assert!(self.0.len() < CONNECTIONS_MAX, "the database accepts connections without a limit");
        }
    }

    /// Terminates the connections of the service and takes their slots.
    async fn take_from_service(&mut self, external: &External) {
        const SQL: &str = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
            WHERE application_name = 'issue-tracker'";
        count(&self.0[0], SQL).await;
        self.take_rest(external).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn database_without_free_connections_is_reported_unavailable_and_the_service_recovers() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external);
    let (channel, token) = (service.channel(), create_callers(&external.config(), 1).await.remove(0).token);
    call(&channel, &token, "IssueService/CreateIssue", &create("before".to_owned())).await.unwrap();
    let mut holders = ConnectionHolders::take_all(&external).await;
    let mut error: Option<Status> = None;
    eventually("the service has no connection left", async || {
        // The service may reconnect before its slot is taken.
        holders.take_from_service(&external).await;
        error = call(&channel, &token, "IssueService/ListIssues", &list(1)).await.err();
        // While the service tries to connect, calls fail with RESOURCE_EXHAUSTED.
        error.as_ref().is_some_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    assert_retriable(&error.unwrap(), Code::Unavailable, "DATABASE_UNAVAILABLE");
    eventually("health reports NOT_SERVING", async || {
        holders.take_from_service(&external).await;
        !serves(&channel).await
    })
    .await;
    // Another service that does not wait fails to start, with an error message.
    let args = ["--database-url", &external.url(), "--listen", "127.0.0.1:0", "--wait-for-database", "0"];
    let output = finished(program(&args).spawn().unwrap());
    assert!(output.status.code().is_some_and(|code| code != 0), "{output:?}");
    assert!(!output.stderr.is_empty() && !String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");

    drop(holders);

    eventually("health reports SERVING", async || serves(&channel).await).await;
    eventually("calls succeed", async || {
        call(&channel, &token, "IssueService/CreateIssue", &create("after".to_owned())).await.is_ok()
    })
    .await;
    let rows = session(&external.config()).await;
    assert_eq!(count(&rows, "SELECT count(*) FROM issues").await, 2);
    service.assert_no_internal_errors();
}
