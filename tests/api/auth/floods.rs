//! Floods of what anybody can send, or one user: the others sign in and call meanwhile.

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
    h2_client::{Raw, request},
    lock_waiters,
};

/// While the database is asked: that takes longer.
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

/// Gives the right password, for no session.
async fn try_login(channel: &Channel, username: &str) -> Result<(), Status> {
    let request = LoginRequest { username: username.into(), password: PASSWORD.into(), validate_only: true };
    Tracker::client_on(channel.clone(), "").auth().login(request).await.map(drop)
}

/// Nobody reads or writes the table until it ends, and so no token is looked up.
async fn lock(tracker: &Tracker, table: &str) -> tokio_postgres::Client {
    let session = tracker.session().await;
    session.batch_execute(&format!("BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")).await.unwrap();
    session
}

/// How many statements that look tokens up wait: others do, where old tokens are being pruned.
macro_rules! look_ups {
    ($is:literal) => {
        concat!(lock_waiters!($is), " AND query LIKE '-- find_callers%'")
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_tokens_that_nobody_has_keeps_nobody_from_signing_in_or_calling() {
    let tracker = Tracker::start_with(limits(&["--requests", "4"])).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut flood = Vec::new();
    for _ in 0..4 {
        let channel = connect(&tracker).await;
        for _ in 0..250 {
            let (channel, stop) = (channel.clone(), Arc::clone(&stop));
            flood.push(tokio::spawn(async move {
                let mut told = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let nobody = Tracker::client_on(channel.clone(), &random_token());
                    told.push(who_am_i(&nobody).await.unwrap_err().code());
                }
                told.sort_by_key(|code| *code as i32);
                told.dedup();
                told
            }));
        }
    }
    for _ in 0..10 {
        // The token of a new session is looked up among those of the flood.
        let session = session(&tracker, "member").await;
        assert_eq!(who_am_i(&session).await.unwrap(), tracker.member.user);
        assert_eq!(who_am_i(&tracker.viewer).await.unwrap(), tracker.viewer.user);
    }
    stop.store(true, Ordering::Relaxed);
    for told in join_all(flood).await {
        assert_eq!(told.unwrap(), [Code::Unauthenticated]);
    }
}

#[tokio::test]
async fn look_ups_that_hang_leave_connections_for_logins() {
    let tracker = Tracker::start().await;
    // Signing in asks for users only, as it makes no session.
    let lock = lock(&tracker, "tokens").await;
    let hanging: Vec<_> = (0..50).map(|_| spawn_who_am_i(tracker.client_with_token(Some(&random_token())))).collect();
    tracker.wait_until(look_ups!("= 1")).await;
    for _ in 0..4 {
        try_login(&tracker.channel, "member").await.unwrap();
    }
    assert_eq!(tracker.count(look_ups!("")).await, 1, "one statement looks all of them up");
    lock.batch_execute("COMMIT").await.unwrap();
    for told in hanging {
        assert_unauthenticated(told.await.unwrap());
    }
}

/// More than these, not yet looked at, cost an HTTP/2 connection.
const RESETS_OF_CONNECTION: usize = 10;

/// The service's connections to the database, each by its process there.
async fn connections(tracker: &Tracker) -> BTreeSet<i32> {
    let sql = "SELECT pid FROM pg_stat_activity
        WHERE application_name = 'issue-tracker' AND datname = current_database()";
    tracker.sql(sql, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn look_ups_that_are_reset_at_once_cost_no_connections() {
    let tracker = Tracker::start().await;
    try_login(&tracker.channel, "member").await.unwrap();
    let before = connections(&tracker).await;
    let mut raw = Raw::open(&tracker).await;
    for nth in 0..200 {
        if nth % RESETS_OF_CONNECTION == 0 {
            raw = Raw::open(&tracker).await;
        }
        let mut request = request(&tracker, "/issuetracker.v1.AuthService/WhoAmI");
        let token = format!("Bearer {}", random_token());
        request.headers_mut().insert("authorization", token.parse().unwrap());
        let (_, mut stream) = raw.requests.clone().ready().await.unwrap().send_request(request, false).unwrap();
        // What is reset before it is sent is not sent at all.
        tokio::time::sleep(RESET_AFTER).await;
        stream.send_reset(h2::Reason::CANCEL);
    }
    assert_unauthenticated(who_am_i(&tracker.client_with_token(Some(&random_token()))).await);
    let after = connections(&tracker).await;
    assert!(after.is_superset(&before), "{before:?} have become {after:?}");
}

#[tokio::test]
async fn of_tokens_that_are_looked_up_together_each_is_told_for_itself() {
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
    tracker.until_blocked().await;
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
    assert_eq!(tracker.count(look_ups!("")).await, 1, "the others wait for the first, and go together");
    lock.batch_execute("COMMIT").await.unwrap();

    assert_unauthenticated(first.await.unwrap());
    for (user, told) in calls {
        match (user, told.await.unwrap()) {
            (Some(user), told) => assert_eq!(told.unwrap(), user),
            (None, told) => drop(assert_unauthenticated(told)),
        }
    }
}

#[tokio::test]
async fn look_ups_whose_callers_have_gone_end_and_what_was_revoked_meanwhile_is_not_believed() {
    let tracker = Tracker::start().await;
    let session = session(&tracker, "member").await;
    let lock = lock(&tracker, "users").await;
    for _ in 0..3 {
        // One goes as a round of its own, the others together.
        let calls: Vec<_> = (0..20).map(|_| spawn_who_am_i(session.clone())).collect();
        tracker.until_blocked().await;
        calls.iter().for_each(JoinHandle::abort);
        tracker.until_let_go().await;
    }
    let mut request = Request::new(WhoAmIRequest {});
    request.set_timeout(Duration::from_millis(300));
    let code = session.auth().who_am_i(request).await.unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    lock.batch_execute("UPDATE tokens SET revoke_time = now() WHERE name IS NULL; COMMIT").await.unwrap();
    assert_unauthenticated(who_am_i(&session).await);
    who_am_i(&tracker.viewer).await.unwrap();
}

/// Those who have signed in wait in one line, twelve for each processor that checks passwords.
#[tokio::test]
async fn two_users_who_flood_with_their_right_passwords_leave_places_for_a_third() {
    let tracker = Tracker::start().await;
    let slow = bcrypt::hash(PASSWORD, 10).unwrap();
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
                let trial = ChangePasswordRequest { validate_only: true, ..change(PASSWORD, OTHER_PASSWORD) };
                let tried = match nth / 2 % 2 {
                    0 => try_login(&channel, &user.user.username).await,
                    _ => change_password(&user, trial).await,
                };
                if let Err(status) = tried {
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
        try_login(&tracker.channel, "member").await.expect("there is a place");
    }
    stop.store(true, Ordering::Relaxed);
    let refused: u32 = join_all(flood).await.into_iter().map(Result::unwrap).sum();
    assert!(refused > 0, "it was a flood");
}

/// Two of his are checked at a time, and he is told when to come again.
#[track_caller]
fn assert_overloaded(status: Status) {
    use tonic_types::StatusExt;
    let status = assert_error(Err::<(), _>(status), Code::ResourceExhausted, "OVERLOADED");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}
