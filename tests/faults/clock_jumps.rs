//! The machine's clock jumps, that of the service and of its private database.

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
    harness::{Form, call, call_within, serves},
    load::Load,
    shim::Shim,
    support::{database::session, eventually::eventually, process::Dir, service::Service},
    verify::verify,
};

const CLIENTS: usize = 8;
const HOUR: i64 = 3_600;
/// Longer than a session lasts.
const TWO_DAYS: i64 = 48 * HOUR;
/// Long enough to be seen waiting on a busy machine, and shorter than the database lets anybody wait for a lock.
const SHORT_DEADLINE: Duration = Duration::from_secs(2);
const PASSWORD: &str = "correct horse battery";

struct Clocked {
    dir: Dir,
    shim: Shim,
    service: Service,
    channel: Channel,
    admin: String,
}

impl Clocked {
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

    async fn sign_in(&self, username: &str) -> String {
        let request =
            LoginRequest { username: username.to_owned(), password: PASSWORD.to_owned(), ..Default::default() };
        self.call::<LoginResponse>("AuthService/Login", &request).await.access_token
    }

    /// Whether a token is still good.
    async fn knows(&self, token: &str) -> bool {
        match call(&self.channel, token, "AuthService/WhoAmI", &[]).await {
            Ok(_) => true,
            Err(status) => {
                assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
                false
            }
        }
    }

    /// Every issue that was there before is listed, and none twice.
    async fn assert_pages_whole(&self, before: Vec<String>) {
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

    /// The database and the service have the clock that they should have, or this test tests nothing.
    async fn assert_clock(&self, seconds: i64) {
        let issue = Issue { title: "what time is it".to_owned(), ..Issue::default() };
        let request = CreateIssueRequest { issue: Some(issue), validate_only: true, ..Default::default() };
        let issue: Issue = self.call("IssueService/CreateIssue", &request).await;
        let true_seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        let of_service = uuid::Uuid::try_parse(&issue.id).unwrap().get_timestamp().unwrap().to_unix().0 as i64;
        let of_database = issue.create_time.unwrap().seconds;
        assert!((of_database - true_seconds - seconds).abs() < HOUR / 2, "{of_database} {true_seconds} {seconds}");
        // Ids do not go back with the clock, so that their order is still that of creation.
        assert!(of_service - true_seconds > seconds - HOUR / 2, "{of_service} {true_seconds} {seconds}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_clock_says_ids_versions_pages_and_history_hold() {
    let form = Form::of_environment();
    let mut rng = form.rng();
    let mut clocked = Clocked::start();
    let (_addresses, address) = watch::channel(clocked.service.address.clone());
    let load = Load::start(&clocked.dir.database(), address, CLIENTS, &mut rng).await;
    load.acknowledges(50).await;
    // Not two days back: what is written then is old enough to be forgotten when the clock is right again.
    let steps = [-HOUR, HOUR, 0, TWO_DAYS, 0];
    for step in steps.iter().cycle().take(steps.len() * form.pick(1, 10)) {
        clocked.shim.set_clock(*step);
        clocked.assert_clock(*step).await;
        load.acknowledges(rng.u64(20..60)).await;
        clocked.assert_pages_whole(load.issue_ids()).await;
        assert!(serves(&clocked.channel).await);
    }
    let made = load.finish().await;
    assert_eq!(clocked.service.stop().code(), Some(0));
    let data = clocked.dir.data();
    let service = Service::start(&clocked.dir, clocked.shim.program(&["--data-dir", &data]));
    verify(&clocked.dir.database(), &service.channel(), made).await;
    service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_end_by_the_databases_clock_and_deadlines_by_no_clock() {
    let clocked = Clocked::start();
    let user = User { username: "ada".to_owned(), role: Role::Member.into(), ..User::default() };
    let request = CreateUserRequest { user: Some(user), password: PASSWORD.to_owned(), ..Default::default() };
    clocked.call::<User>("UserService/CreateUser", &request).await;
    let session = clocked.sign_in("ada").await;
    for (step, lasts) in [(-HOUR, true), (TWO_DAYS, false)] {
        clocked.shim.set_clock(step);
        eventually("the session is what it should be", async || clocked.knows(&session).await == lasts).await;
        let new = clocked.sign_in("ada").await;
        assert!(clocked.knows(&new).await && clocked.knows(&clocked.admin).await);
        assert_deadlines(&clocked, step).await;
        clocked.shim.set_clock(0);
    }
    eventually("it lasts again", async || clocked.knows(&session).await).await;
    clocked.service.assert_sound();
}

/// One call outlives a jump far beyond its deadline, and another ends at its deadline though the clock goes back.
async fn assert_deadlines(clocked: &Clocked, clock: i64) {
    let issue = Issue { title: "locked".to_owned(), ..Issue::default() };
    let issue: Issue = clocked
        .call("IssueService/CreateIssue", &CreateIssueRequest { issue: Some(issue), ..Default::default() })
        .await;
    let lock = session(&clocked.dir.database()).await;
    lock.batch_execute("BEGIN; SELECT FROM issues FOR UPDATE").await.unwrap();
    let changed = Issue { id: issue.id.clone(), title: "changed".to_owned(), ..Issue::default() };
    let message = UpdateIssueRequest { issue: Some(changed), ..Default::default() }.encode_to_vec();
    let update = |deadline: Duration| {
        let (channel, token, message) = (clocked.channel.clone(), clocked.admin.clone(), message.clone());
        let method = "IssueService/UpdateIssue";
        tokio::spawn(async move { call_within(&channel, &token, method, &message, deadline).await })
    };
    let is_waited_for = async || {
        const SQL: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        lock.query_one(SQL, &[]).await.unwrap().get::<_, i64>(0) > 0
    };

    let short = update(SHORT_DEADLINE);
    eventually("the update waits", is_waited_for).await;
    clocked.shim.set_clock(clock - HOUR);
    let code = short.await.unwrap().unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    eventually("nothing is left of it", async || !is_waited_for().await).await;

    clocked.shim.set_clock(clock);
    let long = update(Duration::from_secs(60));
    // PostgreSQL itself measures by the clock how long a statement runs and waits for a lock, and may end it at once.
    eventually("the update waits", async || long.is_finished() || is_waited_for().await).await;
    clocked.shim.set_clock(clock + HOUR);
    lock.batch_execute("COMMIT").await.unwrap();
    match long.await.unwrap() {
        Ok(_) => {}
        Err(status) => {
            let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
            assert!(["CONFLICT", "STATEMENT_TIMEOUT"].contains(&&*reason), "{status:?}");
        }
    }
    clocked.shim.set_clock(clock);
    let get = GetIssueRequest { id: issue.id, ..Default::default() };
    assert!(clocked.call::<Issue>("IssueService/GetIssue", &get).await.version <= 2);
}
