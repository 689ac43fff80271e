//! Floods of calls from unauthenticated callers or from single users. Other users can log in and call during them.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use issue_tracker::{auth::new_token, pb::Role};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use super::*;
use crate::{
    h2_client::{H2Client, request},
    lock_waiters,
};

/// Delay before a stream is reset: shorter than the database query of a look-up, so that the reset interrupts it.
const RESET_AFTER: Duration = Duration::from_micros(100);

fn spawn_who_am_i(client: Client) -> JoinHandle<Result<User, Status>> {
    tokio::spawn(async move { who_am_i(&client).await })
}

fn random_token() -> String {
    new_token().unwrap().0
}

async fn connect(tracker: &Tracker) -> Channel {
    Endpoint::try_from(format!("http://{}", tracker.address)).unwrap().connect().await.unwrap()
}

/// Logs in with the right password, as a dry run that creates no session.
async fn try_login(channel: &Channel, username: &str) -> Result<(), Status> {
    let request = LoginRequest { username: username.into(), password: PASSWORD.into(), validate_only: true };
    Tracker::client_on(channel.clone(), "").auth().login(request).await.map(drop)
}

/// Blocks all reads and writes of a table until the returned session commits.
async fn lock(tracker: &Tracker, table: &str) -> tokio_postgres::Client {
    let session = tracker.session().await;
    session.batch_execute(&format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    session
}

/// [`lock_waiters`], but only statements that look tokens up: pruning of old tokens may wait too.
macro_rules! look_ups {
    ($is:literal) => {
        concat!(lock_waiters!($is), " AND query LIKE '-- find_callers%'")
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flood_of_unknown_tokens_does_not_block_logins_or_calls() {
    let tracker = Tracker::start_with(limits(&["--requests", "4"])).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut flood = Vec::new();
    for _ in 0..4 {
        let channel = connect(&tracker).await;
        for _ in 0..250 {
            let (channel, stop) = (channel.clone(), Arc::clone(&stop));
            flood.push(tokio::spawn(async move {
                let mut codes = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let client = Tracker::client_on(channel.clone(), &random_token());
                    codes.push(who_am_i(&client).await.unwrap_err().code());
                }
                codes.sort_by_key(|code| *code as i32);
                codes.dedup();
                codes
            }));
        }
    }
    for _ in 0..3 {
        // The token of a new session is looked up among those of the flood.
        let session = session(&tracker, "member").await;
        assert_eq!(who_am_i(&session).await.unwrap(), tracker.member.user);
        assert_eq!(who_am_i(&tracker.viewer).await.unwrap(), tracker.viewer.user);
    }
    stop.store(true, Ordering::Relaxed);
    for codes in join_all(flood).await {
        assert_eq!(codes.unwrap(), [Code::Unauthenticated]);
    }
}

#[tokio::test]
async fn blocked_look_ups_leave_database_connections_for_logins() {
    let tracker = Tracker::start().await;
    // A dry run of a login reads the table of users only.
    let lock = lock(&tracker, "tokens").await;
    let blocked: Vec<_> = (0..50).map(|_| spawn_who_am_i(tracker.client_with_token(Some(&random_token())))).collect();
    tracker.wait_until(look_ups!("= 1")).await;
    for _ in 0..4 {
        try_login(&tracker.channel, "member").await.unwrap();
    }
    assert_eq!(tracker.count(look_ups!("")).await, 1, "more than one statement looks tokens up");
    lock.batch_execute("COMMIT").await.unwrap();
    for call in blocked {
        assert_unauthenticated(call.await.unwrap());
    }
}

/// The number of resets that the service accepts on one HTTP/2 connection before it has processed them.
const RESETS_PER_CONNECTION: usize = 10;

/// Returns the backend pids of the service's database connections.
async fn connections(tracker: &Tracker) -> BTreeSet<i32> {
    let sql = "SELECT pid FROM pg_stat_activity
        WHERE application_name = 'issue-tracker' AND datname = current_database()";
    tracker.sql(sql, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn reset_look_ups_close_no_database_connections() {
    let tracker = Tracker::start().await;
    try_login(&tracker.channel, "member").await.unwrap();
    let before = connections(&tracker).await;
    let mut raw = H2Client::open(&tracker).await;
    for nth in 0..200 {
        if nth % RESETS_PER_CONNECTION == 0 {
            raw = H2Client::open(&tracker).await;
        }
        let mut request = request(&tracker, "/issuetracker.v1.AuthService/WhoAmI");
        let token = format!("Bearer {}", random_token());
        request.headers_mut().insert("authorization", token.parse().unwrap());
        let (_, mut stream) = raw.requests.clone().ready().await.unwrap().send_request(request, false).unwrap();
        // h2 does not send a request that is reset before it was written.
        tokio::time::sleep(RESET_AFTER).await;
        stream.send_reset(h2::Reason::CANCEL);
    }
    assert_unauthenticated(who_am_i(&tracker.client_with_token(Some(&random_token()))).await);
    let after = connections(&tracker).await;
    assert!(after.is_superset(&before), "connections of {before:?} were closed; now there are {after:?}");
}

#[tokio::test]
async fn logins_that_wait_for_the_database_leave_a_connection_to_look_ups() {
    let tracker = Tracker::start_with(limits(&["--pool-wait-ms", "1000"])).await;
    // New tokens wait, look-ups do not.
    let lock = tracker.session().await;
    lock.batch_execute("BEGIN; LOCK TABLE tokens IN SHARE MODE").await.unwrap();
    let logins = ["member", "viewer"].map(|username| {
        let mut client = Tracker::client_on(tracker.channel.clone(), "").auth();
        let request = LoginRequest { username: username.into(), password: PASSWORD.into(), validate_only: false };
        tokio::spawn(async move { client.login(request).await.map(drop) })
    });
    let both_wait = concat!(lock_waiters!("= 2"), " AND query LIKE '-- create_session%'");
    tracker.wait_until(both_wait).await;

    assert_unauthenticated(who_am_i(&tracker.client_with_token(Some(&random_token()))).await);

    lock.batch_execute("COMMIT").await.unwrap();
    for login in logins {
        login.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn tokens_in_one_batch_each_have_their_own_outcome() {
    let tracker = Tracker::start().await;
    let mut users = Vec::new();
    for nth in 0..10 {
        users.push(tracker.user(&format!("user-{nth}"), Role::Viewer).await);
    }
    let (expired, revoked, disabled) = (users.pop().unwrap(), users.pop().unwrap(), users.pop().unwrap());
    let of_expired = "UPDATE tokens SET expire_time = now() WHERE user_id = $1";
    tracker.sql(of_expired, &[&expired.user.id.parse::<Uuid>().unwrap()]).await;
    revoked.auth().logout(LogoutRequest::default()).await.unwrap();
    disable(&tracker, &disabled.user).await;

    let lock = lock(&tracker, "users").await;
    let first = spawn_who_am_i(tracker.client_with_token(Some(&random_token())));
    tracker.wait_until_blocked().await;
    let mut calls = Vec::new();
    for _ in 0..3 {
        for bad in [&expired, &revoked, &disabled] {
            calls.push((None, spawn_who_am_i(bad.clone())));
        }
        for user in &users {
            calls.push((Some(user.user.clone()), spawn_who_am_i(user.clone())));
            calls.push((None, spawn_who_am_i(tracker.client_with_token(Some(&random_token())))));
        }
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(tracker.count(look_ups!("")).await, 1, "more than one batch is in flight");
    lock.batch_execute("COMMIT").await.unwrap();

    assert_unauthenticated(first.await.unwrap());
    for (user, call) in calls {
        match (user, call.await.unwrap()) {
            (Some(user), result) => assert_eq!(result.unwrap(), user),
            (None, result) => drop(assert_unauthenticated(result)),
        }
    }
}

#[tokio::test]
async fn abandoned_look_ups_are_cancelled_and_do_not_cache_a_revoked_token() {
    let tracker = Tracker::start().await;
    let session = session(&tracker, "member").await;
    let lock = lock(&tracker, "users").await;
    for _ in 0..3 {
        // The first call is a batch of its own, the others are the next batch.
        let calls: Vec<_> = (0..20).map(|_| spawn_who_am_i(session.clone())).collect();
        tracker.wait_until_blocked().await;
        calls.iter().for_each(JoinHandle::abort);
        tracker.wait_until_no_locks().await;
    }
    let mut request = Request::new(WhoAmIRequest {});
    request.set_timeout(Duration::from_millis(300));
    let code = session.auth().who_am_i(request).await.unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    lock.batch_execute("UPDATE tokens SET revoke_time = now() WHERE name IS NULL; COMMIT").await.unwrap();
    assert_unauthenticated(who_am_i(&session).await);
    who_am_i(&tracker.viewer).await.unwrap();
}

/// Authenticated callers share one queue for password checks, with 12 places per processor.
#[tokio::test]
async fn two_users_who_flood_with_correct_passwords_leave_permits_for_a_third() {
    let tracker = Tracker::start().await;
    let slow = bcrypt::hash(PASSWORD, 8).unwrap();
    tracker.sql("UPDATE users SET password_hash = $1", &[&slow]).await;
    for username in ["admin", "viewer", "member"] {
        try_login(&tracker.channel, username).await.unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut flood = Vec::new();
    for nth in 0..80 {
        let user = [&tracker.admin, &tracker.viewer][nth % 2].clone();
        let (channel, stop) = (connect(&tracker).await, Arc::clone(&stop));
        flood.push(tokio::spawn(async move {
            let mut refused = 0;
            while !stop.load(Ordering::Relaxed) {
                let dry_run = ChangePasswordRequest { validate_only: true, ..change(PASSWORD, OTHER_PASSWORD) };
                let result = match nth / 2 % 2 {
                    0 => try_login(&channel, &user.user.username).await,
                    _ => change_password(&user, dry_run).await,
                };
                if let Err(status) = result {
                    assert_overloaded(status);
                    refused += 1;
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            refused
        }));
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    for _ in 0..10 {
        try_login(&tracker.channel, "member").await.expect("the third user's login is admitted");
    }
    stop.store(true, Ordering::Relaxed);
    let refused: u32 = join_all(flood).await.into_iter().map(Result::unwrap).sum();
    assert!(refused > 0, "the flood exceeds no limit");
}

/// Asserts OVERLOADED with a retry delay: the service checks at most two passwords of one user concurrently.
#[track_caller]
fn assert_overloaded(status: Status) {
    use tonic_types::StatusExt;
    let status = assert_error(Err::<(), _>(status), Code::ResourceExhausted, "OVERLOADED");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}
