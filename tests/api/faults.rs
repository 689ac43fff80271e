//! What callers receive when connections, locks, time or the database are unavailable, and how the server recovers.

mod connections;
mod deadlines;
mod lock_waits;
mod read_only;
mod shutdown;

use std::{path::PathBuf, sync::Arc, time::Duration};

use issue_tracker::{
    db::migrate::migrate,
    pb::{CreateIssueRequest, GetIssueRequest, Issue, UpdateIssueRequest},
    postgres::{Cluster, Durability},
};
use tokio::task::{JoinHandle, spawn_blocking};
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use uuid::Uuid;

use crate::{
    harness::{Client, Tracker, advance_clock, assert_error, assert_retriable, eventually, limits},
    lock_waiters,
    support::{database::session, scratch::scratch_dir},
};

/// Another transaction, which locks all issues until it is dropped or committed.
struct Lock(tokio_postgres::Client);

impl Lock {
    async fn all_issues(tracker: &Tracker) -> Self {
        let client = tracker.session().await;
        client.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
        Self(client)
    }

    async fn release(self) {
        self.0.batch_execute("COMMIT").await.unwrap();
    }
}

fn retitle(issue: &Issue, title: &str) -> UpdateIssueRequest {
    let issue = Issue { id: issue.id.clone(), title: title.to_owned(), ..Issue::default() };
    UpdateIssueRequest { issue: Some(issue), ..Default::default() }
}

fn spawn_update(
    client: &Client,
    request: impl tonic::IntoRequest<UpdateIssueRequest> + Send + 'static,
) -> JoinHandle<Result<Issue, Status>> {
    let mut issues = client.issues();
    tokio::spawn(async move { issues.update_issue(request).await.map(tonic::Response::into_inner) })
}

/// Creates an issue and starts an update of it, which is blocked until the lock is released.
async fn start_blocked_update(tracker: &Tracker) -> (Lock, JoinHandle<Result<Issue, Status>>) {
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(tracker).await;
    let update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.wait_until_blocked().await;
    (lock, update)
}

async fn try_get(client: &Client, issue: &Issue) -> Result<Issue, Status> {
    let request = GetIssueRequest { id: issue.id.clone(), ..Default::default() };
    client.issues().get_issue(request).await.map(tonic::Response::into_inner)
}

async fn try_file(client: &Client, title: &str) -> Result<Issue, Status> {
    let issue = Issue { title: title.to_owned(), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    client.issues().create_issue(request).await.map(tonic::Response::into_inner)
}

async fn health(tracker: &Tracker) -> ServingStatus {
    let checked = HealthClient::new(tracker.channel.clone()).check(HealthCheckRequest::default()).await;
    checked.unwrap().into_inner().status()
}

async fn wait_for_health(tracker: &Tracker, status: ServingStatus) {
    eventually(status.as_str_name(), async || health(tracker).await == status).await;
}

#[track_caller]
fn assert_overloaded<T: std::fmt::Debug>(result: Result<T, Status>) {
    assert_retriable(result, Code::ResourceExhausted, "OVERLOADED");
}

#[track_caller]
fn assert_unavailable<T: std::fmt::Debug>(result: Result<T, Status>) {
    assert_retriable(result, Code::Unavailable, "DATABASE_UNAVAILABLE");
}

#[tokio::test]
async fn exhausted_pool_fails_calls_until_a_connection_is_free() {
    let tracker =
        Tracker::start_with(limits(&["--pool-connections", "3", "--imports", "1", "--pool-wait-ms", "1500"])).await;
    let first = tracker.member.file("first").await;
    let held = tracker.hold_connections(3).await;

    assert_overloaded(try_get(&tracker.member, &first).await);
    assert_overloaded(try_file(&tracker.member, "third").await);
    assert_eq!(health(&tracker).await, ServingStatus::Serving);

    drop(held);
    assert_eq!(try_get(&tracker.member, &first).await.unwrap(), first);
    try_file(&tracker.member, "second").await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
}

#[tokio::test]
async fn calls_blocked_on_locks_leave_connections_for_other_calls() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "4", "--imports", "1"])).await;
    let mut issues = Vec::new();
    for _ in 0..8 {
        issues.push(tracker.member.file("locked").await);
    }
    let lock = Lock::all_issues(&tracker).await;
    // Each user may hold one of the two permits for lock waiters.
    let users = [&tracker.member, &tracker.admin].into_iter().cycle();
    let updates: Vec<_> =
        issues.iter().zip(users).map(|(issue, user)| spawn_update(user, retitle(issue, "changed"))).collect();
    tracker.wait_until(lock_waiters!("= 2")).await;

    let filed = tracker.member.file("not locked").await;
    assert_eq!(try_get(&tracker.member, &issues[0]).await.unwrap(), issues[0]);
    assert_eq!(spawn_update(&tracker.member, retitle(&filed, "changed")).await.unwrap().unwrap().version, 2);

    lock.release().await;
    for update in updates {
        match update.await.unwrap() {
            Ok(updated) => assert_eq!(updated.title, "changed"),
            // It waited longer for a connection than the pool allows.
            refused => assert_overloaded(refused),
        }
    }
}

#[tokio::test]
async fn lock_timeout_is_aborted_as_a_conflict() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;

    assert_error(spawn_update(&tracker.member, retitle(&issue, "a")).await.unwrap(), Code::Aborted, "CONFLICT");

    lock.release().await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
}

#[tokio::test]
async fn requests_beyond_the_limit_fail_while_health_checks_succeed() {
    let tracker = Tracker::start_with(limits(&["--requests", "1"])).await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;
    let update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.wait_until(lock_waiters!("= 1")).await;

    assert_overloaded(try_get(&tracker.member, &issue).await);
    assert_eq!(health(&tracker).await, ServingStatus::Serving);

    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap().title, "changed");
}

#[tokio::test]
async fn statement_timeout_rolls_back_the_whole_transaction() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "300"])).await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;
    let request_id = Uuid::now_v7().to_string();
    let request = UpdateIssueRequest { comment: "why".to_owned(), request_id, ..retitle(&issue, "changed") };

    let timed_out = spawn_update(&tracker.member, request.clone()).await.unwrap();

    assert_error(timed_out, Code::DeadlineExceeded, "STATEMENT_TIMEOUT");
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    for table in ["comments", "issue_events", "requests"] {
        assert_eq!(tracker.count(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
    }
    lock.release().await;
    assert_eq!(spawn_update(&tracker.member, request).await.unwrap().unwrap().version, 2);
}

/// Starts a tracker whose statement timeout no test reaches, with so few connections that a leaked one is noticed.
async fn tracker_without_statement_timeout() -> Tracker {
    let args = ["--statement-ms", "600000", "--pool-connections", "3", "--imports", "1"];
    Tracker::start_with(limits(&args)).await
}

#[tokio::test]
async fn expired_deadline_cancels_the_statement() {
    let tracker = tracker_without_statement_timeout().await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;
    let updates = ["a", "b", "c"].map(|title| {
        let mut request = Request::new(UpdateIssueRequest { comment: "why".to_owned(), ..retitle(&issue, title) });
        request.set_timeout(Duration::from_millis(300));
        spawn_update(&tracker.member, request)
    });
    for update in updates {
        let code = update.await.unwrap().unwrap_err().code();
        assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    }

    tracker.wait_until_no_locks().await;

    // The test still holds the lock, and reads do not wait for it.
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    lock.release().await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(spawn_update(&tracker.member, retitle(&issue, "d")).await.unwrap().unwrap().version, 2);
}

#[tokio::test]
async fn cancelled_update_leaves_no_lock_and_writes_nothing() {
    let tracker = tracker_without_statement_timeout().await;
    let issue = tracker.member.file("first").await;
    for _ in 0..5 {
        let lock = Lock::all_issues(&tracker).await;
        let request = UpdateIssueRequest { comment: "why".to_owned(), ..retitle(&issue, "changed") };
        let update = spawn_update(&tracker.member, request);
        tracker.wait_until(lock_waiters!("= 1")).await;
        update.abort();
        tracker.wait_until_no_locks().await;
        lock.release().await;
    }

    tracker.sql("SELECT FROM issues FOR UPDATE NOWAIT", &[]).await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 0);
}

#[tokio::test]
async fn terminated_idle_connections_are_replaced_without_an_error() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("first").await;
    for _ in 0..10 {
        let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND datname = current_database()";
        assert!(!tracker.sql(terminate, &[]).await.is_empty());

        assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
    }
}

#[tokio::test]
async fn deadlock_and_serialization_failure_are_retried_by_the_server() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("first").await;
    // A rollback does not undo nextval.
    let sql = "CREATE SEQUENCE attempts;
        CREATE FUNCTION fail_twice() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            CASE nextval('attempts')
                WHEN 1 THEN RAISE deadlock_detected;
                WHEN 2 THEN RAISE serialization_failure;
                ELSE RETURN new;
            END CASE;
        END $$;
        CREATE TRIGGER fail_twice BEFORE UPDATE ON issues FOR EACH ROW EXECUTE FUNCTION fail_twice()";
    tracker.session().await.batch_execute(sql).await.unwrap();

    let updated = tracker.member.issues().update_issue(retitle(&issue, "changed")).await.unwrap().into_inner();

    assert_eq!((&*updated.title, updated.version), ("changed", 2));
    assert_eq!(tracker.count("SELECT last_value FROM attempts").await, 3);
}

/// A durable PostgreSQL cluster that one test may stop and kill.
struct OwnCluster {
    cluster: Option<Cluster>,
    dir: PathBuf,
}

impl OwnCluster {
    async fn start() -> Self {
        let mut own =
            Self { cluster: None, dir: scratch_dir().join(format!("issue-tracker-faults-{}", Uuid::new_v4())) };
        own.restart().await;
        session(&own.config("postgres")).await.batch_execute("CREATE DATABASE tracker").await.unwrap();
        migrate(&own.config("tracker")).await.unwrap();
        own
    }

    async fn restart(&mut self) {
        let dir = self.dir.clone();
        let cluster = spawn_blocking(move || Cluster::start(&dir, Durability::Durable)).await.unwrap();
        self.cluster = Some(cluster.unwrap());
    }

    async fn stop(&mut self) {
        let cluster = self.cluster.take().unwrap();
        spawn_blocking(move || cluster.stop()).await.unwrap().unwrap();
    }

    fn config(&self, database: &str) -> tokio_postgres::Config {
        self.cluster.as_ref().unwrap().connect_config(database)
    }

    /// Kills the server with SIGKILL: nothing is flushed.
    fn kill(&self) {
        let pid = self.cluster.as_ref().unwrap().server_pid();
        assert!(pid > 1);
        // SAFETY: kill takes two numbers; the pid is that of a server that the test started.
        assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGKILL) }, 0);
    }
}

impl Drop for OwnCluster {
    fn drop(&mut self) {
        drop(self.cluster.take());
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_unavailable_while_the_database_is_down_and_succeed_after_its_restart() {
    let mut cluster = OwnCluster::start().await;
    let tracker = Tracker::start_on(cluster.config("tracker"), limits(&[])).await;
    let issue = tracker.member.file("before").await;
    wait_for_health(&tracker, ServingStatus::Serving).await;

    cluster.stop().await;

    assert_unavailable(try_get(&tracker.member, &issue).await);
    assert_unavailable(try_file(&tracker.member, "meanwhile").await);
    // The viewer's token is not cached.
    assert_unavailable(try_get(&tracker.viewer, &issue).await);
    wait_for_health(&tracker, ServingStatus::NotServing).await;
    assert_unavailable(try_get(&tracker.member, &issue).await);

    cluster.restart().await;
    wait_for_health(&tracker, ServingStatus::Serving).await;
    assert_eq!(try_get(&tracker.viewer, &issue).await.unwrap(), issue);
    try_file(&tracker.member, "after").await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_a_killed_database() {
    let cluster = OwnCluster::start().await;
    let tracker = Arc::new(Tracker::start_on(cluster.config("tracker"), limits(&[])).await);
    let writers: Vec<_> =
        (0..4).map(|writer| tokio::spawn(create_issues_through_a_failure(tracker.clone(), writer))).collect();
    tracker.wait_until("SELECT count(*) > 20 FROM issues").await;

    cluster.kill();

    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    for issue in acknowledged {
        assert_eq!(try_get(&tracker.viewer, &issue).await.unwrap(), issue);
    }
    wait_for_health(&tracker, ServingStatus::Serving).await;
}

/// Creates issues until calls have failed and 20 more have succeeded, and returns the acknowledged ones. Every failure
/// must be UNAVAILABLE.
async fn create_issues_through_a_failure(tracker: Arc<Tracker>, writer: u32) -> Vec<Issue> {
    let mut acknowledged = Vec::new();
    let (mut failures, mut after) = (0, 0);
    while after < 20 {
        match try_file(&tracker.member, &format!("issue {} of {writer}", acknowledged.len())).await {
            Ok(issue) => {
                after += u32::from(failures > 0);
                acknowledged.push(issue);
            }
            Err(status) => {
                // Whether the issue was created is unknown: the request has no id to retry it with.
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                failures += 1;
                assert!(failures < 3_000, "the server does not recover");
                // Shorter than the retry delay in the error, to keep the test fast.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    acknowledged
}
