//! A catalogue of abuse, one pattern per test: one caller abuses the service, other users do ordinary work meanwhile and
//! succeed, and afterwards the service has all of its permits.
//!
//! With `ISSUE_TRACKER_ABUSE=long`, each pattern is also measured; see [`long`].
//!
//! More patterns are in `auth/floods.rs` (tokens, passwords and resets), `conformance/floods.rs` (frames, headers and
//! incomplete logins) and `conformance/connections.rs` (idle connections).

mod control;
mod held_calls;
mod imports;
mod long;
mod member;
mod memory;
mod process;
mod refused_calls;
mod traffic;
mod unauthenticated;
mod viewer;

use std::{
    cell::Cell,
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use issue_tracker::pb::{
    Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue, ListCommentsRequest, ListIssuesRequest,
    Priority, Role, Status as IssueStatus, UpdateIssueRequest,
};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tonic::{Code, Request, Status};

use self::{
    long::{Measuring, Settings},
    traffic::Connector,
};
use crate::{
    harness::{Client, Tracker, limits},
    lock_waiters,
    support::eventually::eventually,
};

/// `--requests` of the service.
const REQUESTS: usize = 64;
/// The part of [`REQUESTS`] that one user may hold. The rest suffices for [`OTHERS`].
const REQUESTS_OF_ONE: usize = 48;
/// `--pool-connections` of the service.
const CONNECTIONS: usize = 8;
/// The part of [`CONNECTIONS`] that one user may hold.
const CONNECTIONS_OF_ONE: usize = 6;
/// The users who do ordinary work.
const OTHERS: usize = 16;
/// The calls of their work: create, get and update an issue, comment on one, list issues.
const ORDINARY_CALLS: usize = 5;
/// How often each of them makes all of these calls during an abuse, in the short form.
const ROUNDS: usize = 2;
/// The deadline of an ordinary call.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a statement takes that reads the issue of [`Scene::make_lists_slow`]. 40 of them fill all connections for
/// longer than `--pool-wait-ms`.
const SLOW_SECONDS: u32 = 1;
/// Issues that do not match the filters of slow lists. A report or a list that no index serves reads all of them.
const MANY_ISSUES: &str = "
    INSERT INTO issues (id, reporter_id, assignee_id, status, priority, title, description,
            create_time, update_time, close_time)
        SELECT ('0180' || lpad(to_hex(n), 8, '0') || '70008000000000000000')::uuid, admin.id, admin.id, 1 + n % 3, n % 4,
            'issue ' || n, 'what happens', t, t, CASE WHEN n % 3 = 2 THEN t + make_interval(hours => n % 500) END
        FROM users admin, generate_series(1, 100000) n,
            LATERAL (SELECT timestamptz '2024-01-01' + n * interval '1 minute' AS t) at
        WHERE admin.username = 'admin';
    INSERT INTO issue_labels (issue_id, label_id)
        SELECT issue.id, label.id
        FROM (SELECT id, row_number() OVER (ORDER BY id) AS nth FROM issues) issue
            JOIN (SELECT id, row_number() OVER (ORDER BY id) AS nth FROM labels) label
                ON label.nth IN (1 + issue.nth % 8, 1 + issue.nth / 8 % 8)
        ON CONFLICT DO NOTHING;
    ANALYZE";
/// The message of a call that its client has ended at its deadline. On a busy machine, calls of a flood can take that long.
const CLIENT_TIMEOUT: &str = "Timeout expired";
/// How many calls a flood begins each second at most, in the short form. It bounds the processor time of a test.
const FLOOD_CALLS_PER_SECOND: u32 = 250;

/// A service, the client that abuses it, and the users whose work the abuse must not affect.
struct Scene {
    tracker: Tracker,
    others: Vec<Other>,
    abuser: Connector,
    /// `None` in the short form.
    measuring: Option<Measuring>,
}

/// A user who does ordinary work.
struct Other {
    client: Client,
    issue_id: String,
}

impl Scene {
    /// Runs a pattern.
    async fn run(pattern: impl AsyncFn(&Self)) {
        Self::run_with(&[], pattern).await;
    }

    /// Runs a pattern on a service with these arguments.
    async fn run_with(args: &[&str], pattern: impl AsyncFn(&Self)) {
        let small = ["--requests", "64", "--pool-connections", "8", "--pool-wait-ms", "4000"];
        let args = [&small, args].concat();
        match Settings::from_environment() {
            Some(settings) => long::run(settings, &args, pattern).await,
            None => pattern(&Self::on(Tracker::start_with(limits(&args)).await, None).await).await,
        }
    }

    async fn on(tracker: Tracker, measuring: Option<Measuring>) -> Self {
        let mut others = Vec::new();
        for nth in 0..OTHERS {
            let client = tracker.user(&format!("other-{nth}"), Role::Member).await;
            let issue_id = client.file("ordinary").await.id;
            others.push(Other { client, issue_id });
        }
        let abuser = Connector::new(&tracker.address);
        let scene = Self { tracker, others, abuser, measuring };
        // Opens all database connections.
        scene.assert_unharmed().await;
        scene
    }

    /// Returns whether this is the long form.
    fn is_measured(&self) -> bool {
        self.measuring.is_some()
    }

    /// Returns a client of a viewer that has a connection of its own.
    fn viewer(&self) -> Client {
        self.abuser.client(&self.tracker.viewer.token)
    }

    /// Returns a client of a member that has a connection of its own.
    fn member(&self) -> Client {
        self.abuser.client(&self.tracker.member.token)
    }

    /// Asserts that at least 99.5 % of the ordinary calls of other users succeed. In the long form, measures them.
    async fn assert_others_succeed(&self) {
        if let Some(measuring) = &self.measuring {
            return measuring.measure(self).await;
        }
        let outcomes = join_all(self.others.iter().map(Other::work)).await.concat();
        let failures: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        let (failed, all) = (failures.len(), outcomes.len());
        assert!(failed * 200 <= all, "{failed} of {all} ordinary calls failed, such as {:?}", failures[0]);
    }

    /// Asserts as [`Scene::assert_others_succeed`] does, and repeats the abuse meanwhile.
    async fn assert_others_succeed_during(&self, mut abuse: impl AsyncFnMut()) {
        let others_finished = Cell::new(false);
        let others = async {
            self.assert_others_succeed().await;
            others_finished.set(true);
        };
        let repeated = async {
            while !others_finished.get() {
                abuse().await;
            }
        };
        tokio::join!(others, repeated);
    }

    /// Asserts that as many calls run at the same time as there are request slots and database connections.
    async fn assert_unharmed(&self) {
        const NO_STATEMENTS: &str = "SELECT count(*) = 0 FROM pg_stat_activity
            WHERE state <> 'idle' AND usename <> current_user AND datname = current_database()";
        self.tracker.wait_until(NO_STATEMENTS).await;
        // The service may not have noticed yet that a client has left.
        eventually("all permits are free", async || self.all_permits_are_free().await).await;
    }

    async fn all_permits_are_free(&self) -> bool {
        let blocker = self.tracker.session().await;
        blocker.batch_execute("BEGIN; LOCK TABLE issues, comments IN ACCESS EXCLUSIVE MODE").await.unwrap();
        let [first, second] = [&self.others[0], &self.others[1]];
        // Each list holds a connection.
        let mut calls: Vec<_> = (0..CONNECTIONS)
            .map(|nth| if nth < CONNECTIONS_OF_ONE { first } else { second })
            .map(Other::spawn_list_comments)
            .collect();
        let blocked = self.tracker.wait_until(lock_waiters!("= 8"));
        let all_blocked = timeout(Duration::from_secs(2), blocked).await.is_ok();
        let requests_of_other = REQUESTS - REQUESTS_OF_ONE - (CONNECTIONS - CONNECTIONS_OF_ONE);
        calls.extend((CONNECTIONS_OF_ONE..REQUESTS_OF_ONE).map(|_| first.spawn_get_issue()));
        calls.extend((0..requests_of_other).map(|_| second.spawn_get_issue()));
        // A call beyond a limit fails at once.
        sleep(Duration::from_millis(50)).await;
        blocker.batch_execute("COMMIT").await.unwrap();
        let outcomes = join_all(calls).await;
        all_blocked && outcomes.into_iter().all(|outcome| outcome.unwrap().is_ok())
    }

    /// Makes lists slow whose filters only one old issue matches.
    ///
    /// In the short form, each statement that reads the issue takes [`SLOW_SECONDS`] without processor time. Ordinary work
    /// does not read it: conditions on numbers and ids are evaluated first. In the long form, there are many other issues.
    async fn make_lists_slow(&self) {
        let member = &self.tracker.member;
        let mut label_ids = Vec::new();
        for name in "abcdefgh".chars() {
            label_ids.push(member.label(&name.to_string()).await.id);
        }
        let slow = Issue {
            title: "slow".into(),
            status: IssueStatus::Closed.into(),
            priority: Priority::Critical.into(),
            assignee_id: member.user.id.clone(),
            label_ids,
            ..Issue::default()
        };
        member.file_as(slow).await;
        let session = self.tracker.session().await;
        if self.is_measured() {
            return session.batch_execute(MANY_ISSUES).await.unwrap();
        }
        let policy = format!(
            "ALTER TABLE issues ENABLE ROW LEVEL SECURITY;
            CREATE POLICY slow ON issues
                USING (title <> 'slow' OR pg_sleep({SLOW_SECONDS}) IS NOT NULL) WITH CHECK (true)"
        );
        session.batch_execute(&policy).await.unwrap();
    }

    /// Returns how many sessions of the database have been opened.
    async fn sessions_opened(&self) -> i64 {
        self.tracker.count("SELECT sessions FROM pg_stat_database WHERE datname = current_database()").await
    }
}

impl Other {
    async fn work(&self) -> Vec<Result<(), Status>> {
        let mut outcomes = Vec::new();
        for nth in 0..ROUNDS * ORDINARY_CALLS {
            outcomes.push(self.call(nth).await);
        }
        outcomes
    }

    /// Makes one of [`ORDINARY_CALLS`].
    async fn call(&self, nth: usize) -> Result<(), Status> {
        let (mut issues, mut comments) = (self.client.issues(), self.client.comments());
        let issue = Issue { title: format!("ordinary {nth}"), ..Issue::default() };
        match nth % ORDINARY_CALLS {
            0 => {
                let create = CreateIssueRequest { issue: Some(issue), ..Default::default() };
                issues.create_issue(ordinary(create)).await.map(drop)
            }
            1 => {
                let get = GetIssueRequest { id: self.issue_id.clone(), ..Default::default() };
                issues.get_issue(ordinary(get)).await.map(drop)
            }
            2 => {
                let issue = Issue { id: self.issue_id.clone(), ..issue };
                let update = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
                issues.update_issue(ordinary(update)).await.map(drop)
            }
            3 => {
                let comment = Comment { issue_id: self.issue_id.clone(), content: "done".into(), ..Comment::default() };
                let comment = CreateCommentRequest { comment: Some(comment), ..Default::default() };
                comments.create_comment(ordinary(comment)).await.map(drop)
            }
            _ => list(&self.client, "status = open", 0).await,
        }
    }

    fn spawn_list_comments(&self) -> JoinHandle<Result<(), Status>> {
        let (mut comments, issue_id) = (self.client.comments(), self.issue_id.clone());
        let request = ListCommentsRequest { issue_id, ..Default::default() };
        tokio::spawn(async move { comments.list_comments(ordinary(request)).await.map(drop) })
    }

    fn spawn_get_issue(&self) -> JoinHandle<Result<(), Status>> {
        let (mut issues, id) = (self.client.issues(), self.issue_id.clone());
        let request = GetIssueRequest { id, ..Default::default() };
        tokio::spawn(async move { issues.get_issue(ordinary(request)).await.map(drop) })
    }
}

/// Returns a request with [`DEADLINE`].
fn ordinary<T>(message: T) -> Request<T> {
    with_deadline(message, DEADLINE)
}

fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Lists the issues that match a filter. Lists with another `nth` have another page size: equal ones share a read.
async fn list(client: &Client, filter: &str, nth: usize) -> Result<(), Status> {
    let page_size = 10 + (nth % 900) as i32;
    let request = ListIssuesRequest { filter: filter.to_owned(), page_size, ..Default::default() };
    client.issues().list_issues(ordinary(request)).await.map(drop)
}

/// Concurrent tasks that repeat a call until the flood is stopped. In the short form, calls that end soon are made in bursts, at
/// most [`FLOOD_CALLS_PER_SECOND`].
struct Flood {
    tasks: JoinSet<()>,
    outcomes: Arc<Mutex<BTreeMap<String, usize>>>,
    begun: Arc<AtomicUsize>,
}

impl Flood {
    /// Starts tasks, and waits until each has begun a call. Each call has another number.
    async fn start<F>(concurrent: u32, call: impl Fn(usize) -> F + Clone + Send + 'static) -> Self
    where
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (outcomes, begun) = (Arc::<Mutex<BTreeMap<String, usize>>>::default(), Arc::<AtomicUsize>::default());
        let mut tasks = JoinSet::new();
        let interval = match Settings::from_environment() {
            Some(_) => Duration::ZERO,
            None => Duration::from_secs(1) * concurrent / FLOOD_CALLS_PER_SECOND,
        };
        for _ in 0..concurrent {
            let (outcomes, begun, call) = (Arc::clone(&outcomes), Arc::clone(&begun), call.clone());
            tasks.spawn(async move {
                loop {
                    let outcome = call(begun.fetch_add(1, Ordering::Relaxed)).await;
                    let name = match outcome {
                        Err(status) if status.message() == CLIENT_TIMEOUT => CLIENT_TIMEOUT.to_owned(),
                        outcome => format!("{:?}", outcome.map_or_else(|status| status.code(), |()| Code::Ok)),
                    };
                    *outcomes.lock().unwrap().entry(name).or_default() += 1;
                    sleep(interval).await;
                }
            });
        }
        let flood = Self { tasks, outcomes, begun };
        eventually("all tasks of the flood have begun", async || flood.begun() >= concurrent as usize).await;
        // Lets the calls reach the service.
        sleep(Duration::from_millis(100)).await;
        flood
    }

    /// Returns how many calls have begun.
    fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// Waits until a call has ended, and abandons those in flight. Asserts that all others have ended with these codes, by name.
    async fn stop(mut self, expected: &[&str]) {
        eventually("a call of the flood has ended", async || !self.outcomes.lock().unwrap().is_empty()).await;
        self.tasks.shutdown().await;
        let outcomes = self.outcomes.lock().unwrap();
        let is_expected = |name: &String| name == CLIENT_TIMEOUT || expected.contains(&&**name);
        assert!(outcomes.keys().all(is_expected), "{outcomes:?}");
    }

    /// As [`Flood::stop`], when a call was refused: the flood has taken all that one user may have.
    async fn stop_limited(self, expected: &[&str]) {
        let is_limited = async || self.outcomes.lock().unwrap().contains_key("ResourceExhausted");
        eventually("a call of the flood is refused", is_limited).await;
        self.stop(expected).await;
    }
}
