//! Tests jumps of the wall clock, as seen by the service and its embedded database.

use std::{collections::HashSet, time::Duration};

use issue_tracker::pb::{
    CreateIssueRequest, CreateUserRequest, GetIssueRequest, Issue, ListIssuesRequest, ListIssuesResponse, LoginRequest,
    LoginResponse, Role, UpdateIssueRequest, User,
};
use prost::Message;
use tokio::sync::watch;
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt;

use crate::{
    harness::{Settings, call, call_within, serves},
    load::Load,
    shim::Shim,
    support::{database::session, eventually::eventually, process::Dir, service::Service},
    verify::verify,
};

const CLIENTS: usize = 8;
const HOUR: i64 = 3_600;
/// Longer than the lifetime of a session.
const TWO_DAYS: i64 = 48 * HOUR;
/// Long enough to observe the wait on a busy machine, and shorter than the lock timeout.
const SHORT_DEADLINE: Duration = Duration::from_secs(2);
const PASSWORD: &str = "correct horse battery";

struct ServiceWithClock {
    dir: Dir,
    shim: Shim,
    service: Service,
    channel: Channel,
    admin: String,
}

impl ServiceWithClock {
    fn start() -> Self {
        let dir = Dir::new();
        let shim = Shim::new(&dir);
        let service = Service::start(&dir, shim.program(&["--data-dir", &dir.data(), "--bcrypt-cost", "4"]));
        let channel = service.channel();
        let admin = service.admin_token();
        Self { dir, shim, service, channel, admin }
    }

    async fn call<T: Message + Default>(&self, method: &str, message: &impl Message) -> T {
        let reply = call(&self.channel, &self.admin, method, &message.encode_to_vec()).await;
        T::decode(&*reply.unwrap_or_else(|status| panic!("{method}: {status:?}"))).unwrap()
    }

    async fn login(&self, username: &str) -> String {
        let request =
            LoginRequest { username: username.to_owned(), password: PASSWORD.to_owned(), ..Default::default() };
        self.call::<LoginResponse>("AuthService/Login", &request).await.access_token
    }

    /// Returns whether the service accepts the token.
    async fn accepts_token(&self, token: &str) -> bool {
        match call(&self.channel, token, "AuthService/WhoAmI", &[]).await {
            Ok(_) => true,
            Err(status) => {
                assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
                false
            }
        }
    }

    /// Asserts that pages list every issue of `before`, and no issue twice.
    async fn assert_all_listed_once(&self, before: Vec<String>) {
        let (mut listed, mut page_token) = (HashSet::new(), String::new());
        loop {
            let request = ListIssuesRequest { page_size: 20, page_token, show_deleted: true, ..Default::default() };
            let page: ListIssuesResponse = self.call("IssueService/ListIssues", &request).await;
            for issue in page.issues {
                assert!(listed.insert(issue.id.clone()), "{} is listed twice", issue.id);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        let skipped: Vec<String> = before.into_iter().filter(|id| !listed.contains(id)).collect();
        assert!(skipped.is_empty(), "not listed: {skipped:?}");
    }

    /// Asserts that the simulated clock is in effect in the database and in the service.
    async fn assert_clock(&self, seconds: i64) {
        let issue = Issue { title: "what time is it".to_owned(), ..Issue::default() };
        let request = CreateIssueRequest { issue: Some(issue), validate_only: true, ..Default::default() };
        let issue: Issue = self.call("IssueService/CreateIssue", &request).await;
        let real_seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        let service_seconds = uuid::Uuid::try_parse(&issue.id).unwrap().get_timestamp().unwrap().to_unix().0 as i64;
        let database_seconds = issue.create_time.unwrap().seconds;
        assert!(
            (database_seconds - real_seconds - seconds).abs() < HOUR / 2,
            "{database_seconds} {real_seconds} {seconds}"
        );
        // Ids do not go back with the clock, so they stay ordered by creation.
        assert!(service_seconds - real_seconds > seconds - HOUR / 2, "{service_seconds} {real_seconds} {seconds}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_versions_pages_and_history_stay_consistent_when_the_clock_jumps() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let mut fixture = ServiceWithClock::start();
    let (_addresses, address) = watch::channel(fixture.service.address.clone());
    let load = Load::start(&fixture.dir.database(), address, CLIENTS, &mut rng).await;
    load.wait_for_acknowledged(50).await;
    // Not two days back: stored responses written then would expire when the clock is correct again.
    let steps = [-HOUR, HOUR, 0, TWO_DAYS, 0];
    for step in steps.iter().cycle().take(steps.len() * settings.pick(1, 10)) {
        fixture.shim.set_clock(*step);
        fixture.assert_clock(*step).await;
        load.wait_for_acknowledged(rng.u64(20..60)).await;
        fixture.assert_all_listed_once(load.issue_ids()).await;
        assert!(serves(&fixture.channel).await);
    }
    let mutations = load.finish().await;
    assert_eq!(fixture.service.stop().code(), Some(0));
    let data = fixture.dir.data();
    let service = Service::start(&fixture.dir, fixture.shim.program(&["--data-dir", &data]));
    verify(&fixture.dir.database(), &service.channel(), mutations).await;
    service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_expire_by_the_database_clock_and_deadlines_ignore_clock_jumps() {
    let fixture = ServiceWithClock::start();
    let user = User { username: "ada".to_owned(), role: Role::Member.into(), ..User::default() };
    let request = CreateUserRequest { user: Some(user), password: PASSWORD.to_owned(), ..Default::default() };
    fixture.call::<User>("UserService/CreateUser", &request).await;
    let session = fixture.login("ada").await;
    for (step, is_valid) in [(-HOUR, true), (TWO_DAYS, false)] {
        fixture.shim.set_clock(step);
        eventually("the session has the expected validity", async || fixture.accepts_token(&session).await == is_valid)
            .await;
        let new = fixture.login("ada").await;
        assert!(fixture.accepts_token(&new).await && fixture.accepts_token(&fixture.admin).await);
        assert_deadlines(&fixture, step).await;
        fixture.shim.set_clock(0);
    }
    eventually("the session is valid again", async || fixture.accepts_token(&session).await).await;
    fixture.service.assert_no_internal_errors();
}

/// Asserts that one call ends at its deadline although the clock goes back, and that another survives a jump past its
/// deadline.
async fn assert_deadlines(fixture: &ServiceWithClock, clock: i64) {
    let issue = Issue { title: "locked".to_owned(), ..Issue::default() };
    let issue: Issue = fixture
        .call("IssueService/CreateIssue", &CreateIssueRequest { issue: Some(issue), ..Default::default() })
        .await;
    let lock = session(&fixture.dir.database()).await;
    lock.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
    let changed = Issue { id: issue.id.clone(), title: "changed".to_owned(), ..Issue::default() };
    let message = UpdateIssueRequest { issue: Some(changed), ..Default::default() }.encode_to_vec();
    let update = |deadline: Duration| {
        let (channel, token, message) = (fixture.channel.clone(), fixture.admin.clone(), message.clone());
        let method = "IssueService/UpdateIssue";
        tokio::spawn(async move { call_within(&channel, &token, method, &message, deadline).await })
    };
    let has_lock_waiter = async || {
        const SQL: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        lock.query_one(SQL, &[]).await.unwrap().get::<_, i64>(0) > 0
    };

    let short = update(SHORT_DEADLINE);
    eventually("the update waits", has_lock_waiter).await;
    fixture.shim.set_clock(clock - HOUR);
    let code = short.await.unwrap().unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    eventually("the abandoned statement is cancelled", async || !has_lock_waiter().await).await;

    fixture.shim.set_clock(clock);
    let long = update(Duration::from_secs(60));
    // PostgreSQL's own timeouts use the wall clock, so it may end the statement immediately.
    eventually("the update waits", async || long.is_finished() || has_lock_waiter().await).await;
    fixture.shim.set_clock(clock + HOUR);
    lock.batch_execute("COMMIT").await.unwrap();
    match long.await.unwrap() {
        Ok(_) => {}
        Err(status) => {
            let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
            assert!(["CONFLICT", "STATEMENT_TIMEOUT"].contains(&&*reason), "{status:?}");
        }
    }
    fixture.shim.set_clock(clock);
    let get = GetIssueRequest { id: issue.id, ..Default::default() };
    assert!(fixture.call::<Issue>("IssueService/GetIssue", &get).await.version <= 2);
}
