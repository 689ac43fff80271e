//! What callers see when something is short, slow, stuck or away, and that it heals by itself.

mod connections;
mod deadlines;
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
    harness::{Client, Tracker, assert_error, assert_retriable, eventually, limits},
    lock_waiters,
    support::database::session,
};

/// Somebody else's transaction that holds all issues until it is dropped or committed.
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
async fn a_used_up_pool_is_told_and_heals_when_its_connections_are_free() {
    let tracker =
        Tracker::start_with(limits(&["--pool-connections", "2", "--imports", "1", "--pool-wait-ms", "1500"])).await;
    let first = tracker.member.file("first").await;
    let held = [tracker.db.conn().await.unwrap(), tracker.db.conn().await.unwrap()];

    assert_overloaded(try_get(&tracker.member, &first).await);
    assert_overloaded(try_file(&tracker.member, "third").await);
    assert_eq!(health(&tracker).await, ServingStatus::Serving);

    drop(held);
    assert_eq!(try_get(&tracker.member, &first).await.unwrap(), first);
    try_file(&tracker.member, "second").await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
}

#[tokio::test]
async fn calls_that_wait_for_a_lock_leave_connections_for_others() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "4", "--imports", "1"])).await;
    let mut issues = Vec::new();
    for _ in 0..8 {
        issues.push(tracker.member.file("locked").await);
    }
    let lock = Lock::all_issues(&tracker).await;
    let updates: Vec<_> = issues.iter().map(|issue| spawn_update(&tracker.member, retitle(issue, "changed"))).collect();
    tracker.wait_until(lock_waiters!("= 2")).await;

    let filed = tracker.member.file("beside them").await;
    assert_eq!(try_get(&tracker.member, &issues[0]).await.unwrap(), issues[0]);
    assert_eq!(spawn_update(&tracker.member, retitle(&filed, "changed")).await.unwrap().unwrap().version, 2);

    lock.release().await;
    for update in updates {
        match update.await.unwrap() {
            Ok(updated) => assert_eq!(updated.title, "changed"),
            // It has waited too long for its turn.
            refused => assert_overloaded(refused),
        }
    }
}

#[tokio::test]
async fn a_lock_that_is_held_too_long_is_told_as_a_conflict() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;

    assert_error(spawn_update(&tracker.member, retitle(&issue, "a")).await.unwrap(), Code::Aborted, "CONFLICT");

    lock.release().await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
}

#[tokio::test]
async fn requests_beyond_the_bound_are_refused_while_health_answers() {
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
async fn a_statement_that_takes_too_long_ends_with_its_whole_transaction() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "300"])).await;
    let issue = tracker.member.file("first").await;
    let lock = Lock::all_issues(&tracker).await;
    let request_id = Uuid::now_v7().to_string();
    let request = UpdateIssueRequest { comment: "why".to_owned(), request_id, ..retitle(&issue, "changed") };

    let late = spawn_update(&tracker.member, request.clone()).await.unwrap();

    assert_error(late, Code::DeadlineExceeded, "STATEMENT_TIMEOUT");
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    for table in ["comments", "issue_events", "requests"] {
        assert_eq!(tracker.count(&format!("SELECT count(*) FROM {table}")).await, 0, "{table}");
    }
    lock.release().await;
    assert_eq!(spawn_update(&tracker.member, request).await.unwrap().unwrap().version, 2);
}

/// With no bound that would end a statement by itself, and so few connections that one more or less is noticed.
async fn patient_tracker() -> Tracker {
    let args = ["--statement-ms", "600000", "--pool-connections", "2", "--imports", "1"];
    Tracker::start_with(limits(&args)).await
}

#[tokio::test]
async fn a_statement_is_cancelled_when_its_deadline_passes() {
    let tracker = patient_tracker().await;
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

    tracker.until_let_go().await;

    // The lock still stands, and nobody else has to wait for it.
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    lock.release().await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(spawn_update(&tracker.member, retitle(&issue, "d")).await.unwrap().unwrap().version, 2);
}

#[tokio::test]
async fn a_client_that_goes_away_in_the_middle_leaves_nothing_locked_and_nothing_written() {
    let tracker = patient_tracker().await;
    let issue = tracker.member.file("first").await;
    for _ in 0..5 {
        let lock = Lock::all_issues(&tracker).await;
        let request = UpdateIssueRequest { comment: "why".to_owned(), ..retitle(&issue, "changed") };
        let update = spawn_update(&tracker.member, request);
        tracker.wait_until(lock_waiters!("= 1")).await;
        update.abort();
        tracker.until_let_go().await;
        lock.release().await;
    }

    tracker.sql("SELECT FROM issues FOR UPDATE NOWAIT", &[]).await;
    assert_eq!(tracker.member.get(&issue.id).await, issue);
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 0);
}

#[tokio::test]
async fn connections_that_die_while_idle_are_not_noticed_by_callers() {
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
async fn what_got_in_the_way_of_another_is_made_again_without_the_caller_noticing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("first").await;
    // Sequences count what is rolled back as well.
    let sql = "CREATE SEQUENCE tries;
        CREATE FUNCTION get_in_the_way() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            CASE nextval('tries')
                WHEN 1 THEN RAISE deadlock_detected;
                WHEN 2 THEN RAISE serialization_failure;
                ELSE RETURN new;
            END CASE;
        END $$;
        CREATE TRIGGER get_in_the_way BEFORE UPDATE ON issues FOR EACH ROW EXECUTE FUNCTION get_in_the_way()";
    tracker.session().await.batch_execute(sql).await.unwrap();

    let updated = tracker.member.issues().update_issue(retitle(&issue, "changed")).await.unwrap().into_inner();

    assert_eq!((&*updated.title, updated.version), ("changed", 2));
    assert_eq!(tracker.count("SELECT last_value FROM tries").await, 3);
}

/// A durable cluster that a test may maltreat.
struct OwnCluster {
    cluster: Option<Cluster>,
    dir: PathBuf,
}

impl OwnCluster {
    async fn start() -> Self {
        let mut own =
            Self { cluster: None, dir: std::env::temp_dir().join(format!("issue-tracker-faults-{}", Uuid::new_v4())) };
        own.start_again().await;
        session(&own.config("postgres")).await.batch_execute("CREATE DATABASE tracker").await.unwrap();
        migrate(&own.config("tracker")).await.unwrap();
        own
    }

    async fn start_again(&mut self) {
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

    /// Its processes, and what the service has not yet written, are gone at once.
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
async fn while_the_database_is_away_calls_are_unavailable_and_afterwards_all_is_well_again() {
    let mut cluster = OwnCluster::start().await;
    let tracker = Tracker::start_on(cluster.config("tracker"), limits(&[])).await;
    let issue = tracker.member.file("before").await;
    wait_for_health(&tracker, ServingStatus::Serving).await;

    cluster.stop().await;

    assert_unavailable(try_get(&tracker.member, &issue).await);
    assert_unavailable(try_file(&tracker.member, "meanwhile").await);
    // A token that has to be looked up.
    assert_unavailable(try_get(&tracker.viewer, &issue).await);
    wait_for_health(&tracker, ServingStatus::NotServing).await;
    assert_unavailable(try_get(&tracker.member, &issue).await);

    cluster.start_again().await;
    wait_for_health(&tracker, ServingStatus::Serving).await;
    assert_eq!(try_get(&tracker.viewer, &issue).await.unwrap(), issue);
    try_file(&tracker.member, "after").await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_write_outlives_a_database_that_is_killed() {
    let cluster = OwnCluster::start().await;
    let tracker = Arc::new(Tracker::start_on(cluster.config("tracker"), limits(&[])).await);
    let writers: Vec<_> = (0..4).map(|writer| tokio::spawn(write_through_a_fault(tracker.clone(), writer))).collect();
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

/// Files issues until calls have failed, and then some more; answers those that were acknowledged. Every failure must be
/// that of a database that is away.
async fn write_through_a_fault(tracker: Arc<Tracker>, writer: u32) -> Vec<Issue> {
    let mut acknowledged = Vec::new();
    let (mut failures, mut after) = (0, 0);
    while after < 20 {
        match try_file(&tracker.member, &format!("issue {} of {writer}", acknowledged.len())).await {
            Ok(issue) => {
                after += u32::from(failures > 0);
                acknowledged.push(issue);
            }
            Err(status) => {
                // Without a request id, nobody can find out whether it was filed.
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                failures += 1;
                assert!(failures < 3_000, "the service does not recover");
                // As the service asks its callers to, only sooner.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    acknowledged
}
