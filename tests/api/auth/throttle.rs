//! Login throttling: delays after failed password checks, per user and per address.

use std::{net::IpAddr, time::Duration};

use tonic_types::StatusExt;

use super::*;

/// Returns a client that connects from another loopback address.
pub async fn at(tracker: &Tracker, address: [u8; 4]) -> Client {
    at_with_token(tracker, address, "").await
}

pub async fn at_with_token(tracker: &Tracker, address: [u8; 4], token: &str) -> Client {
    let endpoint = Endpoint::try_from(format!("http://{}", tracker.address)).unwrap();
    Tracker::client_on(endpoint.local_address(Some(IpAddr::from(address))).connect().await.unwrap(), token)
}

async fn try_password(client: &Client, username: &str, password: &str) -> Result<(), Status> {
    let request = LoginRequest { username: username.into(), password: password.into(), validate_only: false };
    client.auth().login(request).await.map(drop)
}

async fn fail(client: &Client, username: &str) {
    assert_unauthenticated(try_password(client, username, "wrong password").await);
}

/// Asserts that the service refused to check the password. Returns the retry delay.
#[track_caller]
pub fn assert_throttled(result: Result<(), Status>) -> Duration {
    let status = assert_error(result, Code::ResourceExhausted, "TOO_MANY_TRIES");
    status.get_error_details().retry_info().unwrap().retry_delay.unwrap()
}

/// Sends wrong passwords until one is throttled. Returns how many were checked before, and the retry delay. On a slow
/// machine a delay may pass between two attempts, but the delays grow.
async fn fail_until_refused(client: &Client, username: &str) -> (u32, Duration) {
    for checked in 0..20 {
        match try_password(client, username, "wrong password").await {
            Err(status) if status.code() == Code::Unauthenticated => {}
            refused => return (checked, assert_throttled(refused)),
        }
    }
    panic!("20 attempts were checked");
}

#[tokio::test]
async fn login_after_too_many_failures_succeeds_after_the_retry_delay() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "3"])).await;
    let client = tracker.client_with_token(None);
    // A user who does not exist, a disabled user, and an enabled user.
    disable(&tracker, &tracker.viewer.user).await;
    for username in ["no-such-user", "viewer", "member"] {
        let (checked, delay) = fail_until_refused(&client, username).await;
        assert!(checked >= 3, "{username}: {checked}");
        assert!(delay <= Duration::from_secs(1 << (checked - 3)), "{username}: {delay:?} after {checked}");
        advance_clock(delay).await;
        fail(&client, username).await;
        let (more, next) = fail_until_refused(&client, username).await;
        assert!(
            next <= Duration::from_secs(1 << (checked + more - 2)),
            "{username}: {next:?} after {checked} and {more}"
        );
    }
    // A user name in another case counts as the same user, and a success resets the count of failures.
    let (_, delay) = fail_until_refused(&client, "MEMBER").await;
    advance_clock(delay).await;
    try_password(&client, "member", PASSWORD).await.unwrap();
    fail(&client, "member").await;
    try_password(&client, "member", PASSWORD).await.expect("the failures before the success do not count");
}

#[tokio::test]
async fn burst_of_wrong_passwords_is_checked_only_up_to_the_limit() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "4"])).await;
    let client = tracker.client_with_token(None);
    let burst = join_all((0..100).map(|nth| {
        let (client, password) = (client.clone(), format!("guess number {nth}"));
        async move { try_password(&client, "member", &password).await.unwrap_err().code() }
    }));
    let checked = burst.await.into_iter().filter(|code| *code == Code::Unauthenticated).count();
    // The service checks at most two passwords of one user concurrently.
    assert!((2..=4).contains(&checked), "{checked}");
}

/// bcrypt is slow and the queue for it is bounded. A client that has logged in before has permits of its own.
#[tokio::test]
async fn login_flood_does_not_exhaust_the_permits_of_known_clients() {
    let tracker = Tracker::start().await;
    let client = tracker.client_with_token(None);
    try_password(&client, "member", PASSWORD).await.unwrap();
    let slow = bcrypt::hash(PASSWORD, 10).unwrap();
    tracker.sql("UPDATE users SET password_hash = $1 WHERE username = 'viewer'", &[&slow]).await;
    let flood = tokio::spawn({
        let client = client.clone();
        async move { join_all((0..200).map(|_| try_password(&client, "viewer", "wrong password"))).await }
    });
    let mut logins = 0;
    while !flood.is_finished() {
        try_password(&client, "member", PASSWORD).await.expect("a known client's login is admitted");
        logins += 1;
    }
    assert!(logins > 1);
    let codes: Vec<Code> = flood.await.unwrap().into_iter().map(|result| result.unwrap_err().code()).collect();
    assert!(codes.contains(&Code::ResourceExhausted) && codes.contains(&Code::Unauthenticated), "{codes:?}");
}

#[tokio::test]
async fn failures_from_other_addresses_do_not_lock_a_user_out() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "2"])).await;
    for nth in 1..=5 {
        let attacker = at(&tracker, [127, 0, 1, nth]).await;
        fail_until_refused(&attacker, "member").await;
    }
    try_password(&tracker.client_with_token(None), "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn address_that_fails_for_many_users_is_throttled_except_for_users_known_there() {
    let tracker = Tracker::start_with(limits(&["--login-failures-per-address", "5"])).await;
    let office = at(&tracker, [127, 0, 2, 1]).await;
    try_password(&office, "member", PASSWORD).await.unwrap();
    for nth in 0..5 {
        fail(&office, &format!("user{nth}")).await;
    }
    let (checked, _) = fail_until_refused(&office, "viewer").await;
    assert!(checked < 10, "the limit of the user applied before that of the address: {checked}");
    try_password(&office, "member", PASSWORD).await.unwrap();
    try_password(&at(&tracker, [127, 0, 2, 2]).await, "viewer", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn dry_runs_of_a_login_count_as_attempts() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    let request = LoginRequest { username: "member".into(), password: "wrong".into(), validate_only: true };
    let mut refused = client.auth().login(request.clone()).await;
    for _ in 0..10 {
        if refused.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated) {
            refused = client.auth().login(request.clone()).await;
        }
    }
    assert_throttled(refused.map(drop));
}

#[tokio::test]
async fn wrong_current_passwords_are_throttled() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "2"])).await;
    let mut refused = change_password(&tracker.member, change("wrong", OTHER_PASSWORD)).await;
    for _ in 0..10 {
        if refused.as_ref().is_err_and(|status| status.code() == Code::InvalidArgument) {
            refused = change_password(&tracker.member, change("wrong", OTHER_PASSWORD)).await;
        }
    }
    let delay = assert_throttled(refused);
    // Logins of the same user and other users are counted separately.
    log_in(&tracker, "member", PASSWORD).await.unwrap();
    change_password(&tracker.viewer, change(PASSWORD, OTHER_PASSWORD)).await.unwrap();

    advance_clock(delay).await;
    let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, request.clone()).await.unwrap();
    // The new password of a retry is checked, which is an attempt too: it is throttled, and succeeds after the delay.
    for _ in 0..2 {
        assert_invalid(change_password(&tracker.member, change("x", "another password")).await, &["current_password"]);
    }
    let delay = assert_throttled(change_password(&tracker.member, request.clone()).await);
    advance_clock(delay).await;
    change_password(&tracker.member, request).await.unwrap();
}

#[tokio::test]
async fn throttled_login_needs_no_database() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    for _ in 0..3 {
        // The delays grow until the last one outlasts the rest of the test.
        let (_, delay) = fail_until_refused(&client, "member").await;
        advance_clock(delay).await;
    }
    fail(&client, "member").await;
    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await.unwrap();
    assert_throttled(try_password(&client, "member", PASSWORD).await);
}
