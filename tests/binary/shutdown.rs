//! Signals, and replicas that are restarted one after the other.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::task::JoinHandle;

use super::*;

/// A service on a database, an issue in it, and an update that waits for the transaction in `lock`.
struct Waiting {
    external: External,
    service: Service,
    token: String,
    lock: tokio_postgres::Client,
    update: JoinHandle<Result<Issue, tonic::Status>>,
}

impl Waiting {
    async fn start() -> Self {
        let external = External::start(Durability::Throwaway);
        create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
        let service = Service::on(&external, &["--drain-seconds", "100"]);
        let token = login(&service, "ada", SECRET).await.unwrap();
        let issue = file(&service, &token, "first").await;
        let lock = session(&external.config()).await;
        lock.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
        let changed = Issue { id: issue.id, title: "changed".to_owned(), ..Issue::default() };
        let request = with_token(&token, UpdateIssueRequest { issue: Some(changed), ..Default::default() });
        let mut issues = service.issues();
        let update = tokio::spawn(async move { Ok(issues.update_issue(request).await?.into_inner()) });
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        eventually("the update waits", async || lock.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) > 0).await;
        Self { external, service, token, lock, update }
    }

    async fn title(&self) -> String {
        self.lock.query_one("SELECT title FROM issues", &[]).await.unwrap().get(0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_under_way_at_sigterm_finishes_and_new_ones_are_refused() {
    let mut waiting = Waiting::start().await;

    waiting.service.signal(libc::SIGTERM);
    wait_until("the service stops", || waiting.service.log().contains("stopping"));
    let list = with_token(&waiting.token, ListIssuesRequest::default());
    let refused = waiting.service.issues().list_issues(list).await.unwrap_err();
    assert_eq!((refused.code(), refused.message().contains("stopping")), (Code::Unavailable, true), "{refused:?}");
    assert_refused(&run(&["health", "--listen", &waiting.service.address]), "NOT_SERVING");
    waiting.lock.batch_execute("COMMIT").await.unwrap();

    let updated = (&mut waiting.update).await.unwrap().unwrap();
    assert_eq!((updated.title.as_str(), updated.version), ("changed", 2));
    assert_eq!(waiting.service.wait().code(), Some(0));
    assert_eq!(waiting.title().await, "changed");
    assert!(std::net::TcpStream::connect(&waiting.service.address).is_err());
    drop(waiting.external);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_service_at_once() {
    let mut waiting = Waiting::start().await;
    waiting.service.signal(libc::SIGTERM);
    wait_until("the service stops", || waiting.service.log().contains("stopping"));
    assert!(waiting.service.child.try_wait().unwrap().is_none(), "a request is under way");

    waiting.service.signal(libc::SIGTERM);

    assert_eq!(waiting.service.wait().code(), Some(1));
    assert!(is_unavailable(&(&mut waiting.update).await.unwrap().unwrap_err()));
}

const CLIENTS: usize = 8;
const RESTARTS_EACH: usize = 3;
const ROUNDS_PER_RESTART: usize = 4 * CLIENTS;

/// Replicas of one service, by their addresses.
struct Replicas {
    channels: Vec<Channel>,
    token: String,
    /// How often [`Replicas::work`] has come around, for all clients.
    rounds: AtomicUsize,
    done: AtomicBool,
}

/// gRPC has UNAVAILABLE for a connection that cannot be used; tonic tells some of these as UNKNOWN or CANCELLED.
fn is_unavailable(status: &tonic::Status) -> bool {
    let source = std::error::Error::source(status);
    status.code() == Code::Unavailable || source.is_some_and(|source| source.is::<tonic::transport::Error>())
}

/// Calls one replica after the other, beginning with one, until one is available.
macro_rules! call {
    ($replicas:expr, $first:expr, $method:ident($message:expr)) => {{
        let began = Instant::now();
        let mut nth = $first;
        loop {
            let mut issues = $replicas.issues(nth);
            match issues.$method(with_token(&$replicas.token, $message.clone())).await {
                Ok(response) => break response.into_inner(),
                Err(status) => assert!(is_unavailable(&status), "a failed call: {status:?}"),
            }
            assert!(began.elapsed() < HANG, "no replica is available");
            tokio::time::sleep(TICK).await;
            nth += 1;
        }
    }};
}

impl Replicas {
    fn issues(&self, nth: usize) -> IssueServiceClient<Channel> {
        IssueServiceClient::new(self.channels[nth % self.channels.len()].clone())
    }

    /// Files an issue, changes it and reads it, again and again.
    async fn work(&self, client: usize) {
        for nth in 0.. {
            if self.done.load(Ordering::Relaxed) {
                return;
            }
            let first = client + nth;
            let issue = Issue { title: format!("{client}-{nth}"), ..Issue::default() };
            let request_id = Uuid::new_v4().to_string();
            let create = CreateIssueRequest { issue: Some(issue), request_id, ..Default::default() };
            let issue = call!(self, first, create_issue(create));
            let changed = Issue { id: issue.id.clone(), description: "changed".to_owned(), ..Issue::default() };
            let request_id = Uuid::new_v4().to_string();
            let update =
                UpdateIssueRequest { issue: Some(changed), expected_version: 1, request_id, ..Default::default() };
            assert_eq!(call!(self, first + 1, update_issue(update)).version, 2);
            let get = GetIssueRequest { id: issue.id, ..Default::default() };
            assert_eq!(call!(self, first, get_issue(get)).description, "changed");
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_shows_no_failed_call_and_no_doubled_write() {
    let external = External::start(Durability::Throwaway);
    create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
    let start = |listen: &str| Service::on(&external, &["--listen", listen]);
    let mut services = [start("127.0.0.1:0"), start("127.0.0.1:0")];
    let token = login(&services[0], "ada", SECRET).await.unwrap();
    let channels = services.iter().map(Service::channel).collect();
    let replicas = Replicas { channels, token, rounds: AtomicUsize::new(0), done: AtomicBool::new(false) };
    let replicas = Arc::new(replicas);
    let worker = |client| {
        let replicas = Arc::clone(&replicas);
        tokio::spawn(async move { replicas.work(client).await })
    };
    let workers: Vec<_> = (0..CLIENTS).map(worker).collect();
    let rounds = || replicas.rounds.load(Ordering::Relaxed);

    for _ in 0..RESTARTS_EACH {
        for service in &mut services {
            let before = rounds();
            eventually("the clients have come around", async || {
                assert!(!workers.iter().any(JoinHandle::is_finished), "a client has failed");
                rounds() >= before + ROUNDS_PER_RESTART
            })
            .await;
            assert_eq!(service.stop().code(), Some(0), "{}", service.log());
            *service = start(&service.address.clone());
        }
    }
    replicas.done.store(true, Ordering::Relaxed);

    for worker in workers {
        worker.await.unwrap();
    }
    let rounds = rounds();
    let sql = session(&external.config()).await;
    let counts = "SELECT count(*), count(DISTINCT title), sum(version)::int8 FROM issues";
    let row = sql.query_one(counts, &[]).await.unwrap();
    let (issues, titles, versions): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!((issues, titles, versions), (rounds as i64, rounds as i64, 2 * rounds as i64));
}
