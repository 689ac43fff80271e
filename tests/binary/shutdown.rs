//! Tests graceful shutdown and rolling restarts of replicas.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::task::JoinHandle;

use super::*;

/// A service with an update in flight that waits for the row lock of the transaction in `lock_holder`.
struct BlockedUpdate {
    external: External,
    service: Service,
    token: String,
    lock_holder: tokio_postgres::Client,
    update: JoinHandle<Result<Issue, tonic::Status>>,
}

impl BlockedUpdate {
    async fn start() -> Self {
        let external = External::start(Durability::Throwaway);
        create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
        let service = Service::on(&external, &["--drain-seconds", "100"]);
        let token = login(&service, "ada", SECRET).await.unwrap();
        let issue = create_issue(&service, &token, "first").await;
        let lock_holder = session(&external.config()).await;
        lock_holder.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
        let changed = Issue { id: issue.id, title: "changed".to_owned(), ..Issue::default() };
        let request = with_token(&token, UpdateIssueRequest { issue: Some(changed), ..Default::default() });
        let mut issues = service.issues();
        let update = tokio::spawn(async move { Ok(issues.update_issue(request).await?.into_inner()) });
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        eventually("the update waits", async || {
            lock_holder.query_one(blocked, &[]).await.unwrap().get::<_, i64>(0) > 0
        })
        .await;
        Self { external, service, token, lock_holder, update }
    }

    async fn title(&self) -> String {
        self.lock_holder.query_one("SELECT title FROM issues", &[]).await.unwrap().get(0)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_requests_in_flight_finish_and_rejects_new_ones() {
    let mut blocked = BlockedUpdate::start().await;

    blocked.service.signal(libc::SIGTERM);
    wait_until("the shutdown is logged", || blocked.service.log().contains("shutdown began"));
    let list = with_token(&blocked.token, ListIssuesRequest::default());
    let refused = blocked.service.issues().list_issues(list).await.unwrap_err();
    assert_eq!((refused.code(), refused.message().contains("stopping")), (Code::Unavailable, true), "{refused:?}");
    let health = run(&["health", "--listen", &blocked.service.address]);
    assert_eq!((health.status.code(), text(&health.stdout)), (Some(1), "NOT_SERVING\n"), "{health:?}");
    // Calls in flight must not be interrupted by a restart.
    let liveness = run(&["health", "--listen", &blocked.service.address, "--service", "issuetracker.liveness"]);
    assert_eq!((liveness.status.code(), text(&liveness.stdout)), (Some(0), "SERVING\n"), "{liveness:?}");
    blocked.lock_holder.batch_execute("COMMIT").await.unwrap();

    let updated = (&mut blocked.update).await.unwrap().unwrap();
    assert_eq!((updated.title.as_str(), updated.version), ("changed", 2));
    assert_eq!(blocked.service.wait().code(), Some(0));
    assert_eq!(blocked.title().await, "changed");
    assert!(std::net::TcpStream::connect(&blocked.service.address).is_err());
    drop(blocked.external);
}

#[tokio::test(flavor = "multi_thread")]
async fn second_signal_stops_the_service_immediately() {
    let mut blocked = BlockedUpdate::start().await;
    blocked.service.signal(libc::SIGTERM);
    wait_until("the shutdown is logged", || blocked.service.log().contains("shutdown began"));
    assert!(blocked.service.child.try_wait().unwrap().is_none(), "the service must wait for the request in flight");

    blocked.service.signal(libc::SIGTERM);

    assert_eq!(blocked.service.wait().code(), Some(143));
    assert!(is_unavailable(&(&mut blocked.update).await.unwrap().unwrap_err()));
}

const CLIENTS: usize = 8;
const RESTARTS_EACH: usize = 3;
const ITERATIONS_PER_RESTART: usize = 4 * CLIENTS;

/// Replicas of one service, and the state that their clients share.
struct Replicas {
    channels: Vec<Channel>,
    token: String,
    /// Completed iterations of [`Replicas::run_client`], summed over all clients.
    iterations: AtomicUsize,
    done: AtomicBool,
}

/// Returns whether a call failed because of its connection. tonic reports some of these as UNKNOWN or CANCELLED.
fn is_unavailable(status: &tonic::Status) -> bool {
    let source = std::error::Error::source(status);
    status.code() == Code::Unavailable || source.is_some_and(|source| source.is::<tonic::transport::Error>())
}

/// Calls the replicas in turn, starting with number `$first`, until one is available.
macro_rules! call {
    ($replicas:expr, $first:expr, $method:ident($message:expr)) => {{
        let began = Instant::now();
        let mut nth = $first;
        loop {
            let mut issues = $replicas.issues(nth);
            match issues.$method(with_token(&$replicas.token, $message.clone())).await {
                Ok(response) => break response.into_inner(),
                Err(status) => assert!(is_unavailable(&status), "a call failed: {status:?}"),
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

    /// Creates, updates and reads one issue per iteration until `done` is set.
    async fn run_client(&self, client: usize) {
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
            self.iterations.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rolling_restart_under_load_fails_no_call_and_duplicates_no_write() {
    let external = External::start(Durability::Throwaway);
    create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
    let start = |address: &str| Service::on(&external, &["--listen", address]);
    let start_anywhere = || start(&format!("127.0.0.1:{}", unused_port()));
    let mut services = [start_anywhere(), start_anywhere()];
    let token = login(&services[0], "ada", SECRET).await.unwrap();
    let channels = services.iter().map(Service::channel).collect();
    let replicas = Replicas { channels, token, iterations: AtomicUsize::new(0), done: AtomicBool::new(false) };
    let replicas = Arc::new(replicas);
    let worker = |client| {
        let replicas = Arc::clone(&replicas);
        tokio::spawn(async move { replicas.run_client(client).await })
    };
    let workers: Vec<_> = (0..CLIENTS).map(worker).collect();
    let iterations = || replicas.iterations.load(Ordering::Relaxed);

    for _ in 0..RESTARTS_EACH {
        for service in &mut services {
            let before = iterations();
            eventually("the clients have completed their iterations", async || {
                assert!(!workers.iter().any(JoinHandle::is_finished), "a client has failed");
                iterations() >= before + ITERATIONS_PER_RESTART
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
    let iterations = iterations();
    let sql = session(&external.config()).await;
    let counts = "SELECT count(*), count(DISTINCT title), sum(version)::int8 FROM issues";
    let row = sql.query_one(counts, &[]).await.unwrap();
    let (issues, titles, versions): (i64, i64, i64) = (row.get(0), row.get(1), row.get(2));
    assert_eq!((issues, titles, versions), (iterations as i64, iterations as i64, 2 * iterations as i64));
}
