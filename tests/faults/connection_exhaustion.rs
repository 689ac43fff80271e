//! No connection left: neither of the service's own, nor of the database's.

use issue_tracker::{
    pb::{CreateIssueRequest, Issue, ListIssuesRequest},
    postgres::Durability,
};
use prost::Message;
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls};
use tonic::{Code, Status};

use crate::{
    harness::{Form, assert_retriable, call, callers, serves},
    support::{
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, finished, program},
    },
};

const POOL_CONNECTIONS: i64 = 4;
/// To ask whether the database is there, and who calls: these are connections of their own.
const OTHER_CONNECTIONS_MAX: i64 = 3;
const REFUSED: usize = 30;
/// PostgreSQL's own bound is lower.
const CONNECTIONS_MAX: usize = 1_000;

const OF_SERVICE: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker'";
const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker' \
    AND wait_event_type = 'Lock'";

fn start(external: &External) -> Service {
    let mut command = program(&["--database-url", &external.url(), "--pool-wait-ms", "300"]);
    command.args(["--pool-connections", &POOL_CONNECTIONS.to_string(), "--imports", "1", "--exports", "1"]);
    Service::start(&external.dir, command)
}

async fn count(rows: &Client, sql: &str) -> i64 {
    rows.query_one(sql, &[]).await.unwrap().get(0)
}

/// Lists of different sizes, which are not answered together.
fn list(nth: usize) -> Vec<u8> {
    ListIssuesRequest { page_size: 1 + nth as i32, ..Default::default() }.encode_to_vec()
}

fn create(title: String) -> Vec<u8> {
    let issue = Issue { title, ..Issue::default() };
    CreateIssueRequest { issue: Some(issue), ..Default::default() }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_every_connection_waits_others_are_refused_in_time_and_none_is_lost() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external);
    let (channel, token) = (service.channel(), callers(&external.config(), 1).await.remove(0).token);
    let (rows, lock) = (session(&external.config()).await, session(&external.config()).await);
    for round in 0..Form::of_environment().pick(3, 20) {
        // Known, or it would have to be looked up.
        call(&channel, &token, "IssueService/ListIssues", &list(0)).await.unwrap();
        lock.batch_execute("BEGIN; LOCK TABLE issues IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let mut holders = JoinSet::new();
        for nth in 0..POOL_CONNECTIONS as usize {
            let (channel, token) = (channel.clone(), token.clone());
            holders.spawn(async move { call(&channel, &token, "IssueService/ListIssues", &list(nth)).await });
        }
        eventually("every connection waits", async || count(&rows, WAITING).await == POOL_CONNECTIONS).await;

        let mut refused = JoinSet::new();
        for nth in 0..REFUSED {
            let (channel, token) = (channel.clone(), token.clone());
            refused.spawn(async move {
                match nth % 2 {
                    0 => call(&channel, &token, "IssueService/ListIssues", &list(100 + nth)).await,
                    _ => call(&channel, &token, "IssueService/CreateIssue", &create("never".to_owned())).await,
                }
            });
        }
        while let Some(refused) = refused.join_next().await {
            assert_retriable(&refused.unwrap().unwrap_err(), Code::ResourceExhausted, "OVERLOADED");
        }
        assert!(serves(&channel).await, "a busy database is not one that is away");

        lock.batch_execute("COMMIT").await.unwrap();
        while let Some(held) = holders.join_next().await {
            held.unwrap().unwrap();
        }
        let title = format!("issue {round}");
        call(&channel, &token, "IssueService/CreateIssue", &create(title)).await.unwrap();
        assert_eq!(count(&rows, "SELECT count(*) FROM issues").await, round + 1);
        let connections = count(&rows, OF_SERVICE).await;
        assert!(connections <= POOL_CONNECTIONS + OTHER_CONNECTIONS_MAX, "{connections} connections");
    }
    eventually("nothing is left open", async || {
        let open = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker' AND state <> 'idle'";
        count(&rows, open).await == 0
    })
    .await;
    service.assert_sound();
}

/// All connections that the database gives, in somebody else's hands.
struct Squatters(Vec<Client>);

impl Squatters {
    async fn take_all(external: &External) -> Self {
        let mut squatters = Self(Vec::new());
        squatters.take_rest(external).await;
        squatters
    }

    async fn take_rest(&mut self, external: &External) {
        while let Ok((client, connection)) = external.config().connect(NoTls).await {
            tokio::spawn(connection);
            self.0.push(client);
            assert!(self.0.len() < CONNECTIONS_MAX, "there is no end of connections");
        }
    }

    /// Takes those of the service too.
    async fn rob(&mut self, external: &External) {
        const SQL: &str = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
            WHERE application_name = 'issue-tracker'";
        count(&self.0[0], SQL).await;
        self.take_rest(external).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_others_have_all_of_the_databases_connections_it_is_told_to_be_away_and_comes_back() {
    let external = External::start(Durability::Throwaway);
    let service = start(&external);
    let (channel, token) = (service.channel(), callers(&external.config(), 1).await.remove(0).token);
    call(&channel, &token, "IssueService/CreateIssue", &create("before".to_owned())).await.unwrap();
    let mut squatters = Squatters::take_all(&external).await;
    let mut refusal: Option<Status> = None;
    eventually("the service has no connection any more", async || {
        // It may be quicker than who robs it.
        squatters.rob(&external).await;
        refusal = call(&channel, &token, "IssueService/ListIssues", &list(1)).await.err();
        // While it tries to connect, the pool is only busy.
        refusal.as_ref().is_some_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    assert_retriable(&refusal.unwrap(), Code::Unavailable, "DATABASE_UNAVAILABLE");
    eventually("health says so", async || {
        squatters.rob(&external).await;
        !serves(&channel).await
    })
    .await;
    // One that would start now says why it does not.
    let output = finished(program(&["--database-url", &external.url(), "--listen", "127.0.0.1:0"]).spawn().unwrap());
    assert!(output.status.code().is_some_and(|code| code != 0), "{output:?}");
    assert!(!output.stderr.is_empty() && !String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");

    drop(squatters);

    eventually("health says that it serves", async || serves(&channel).await).await;
    eventually("calls are answered", async || {
        call(&channel, &token, "IssueService/CreateIssue", &create("after".to_owned())).await.is_ok()
    })
    .await;
    let rows = session(&external.config()).await;
    assert_eq!(count(&rows, "SELECT count(*) FROM issues").await, 2);
    service.assert_sound();
}
