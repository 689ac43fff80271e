//! How often a password may be tried.

use std::{net::IpAddr, time::Duration};

use tonic_types::StatusExt;

use super::*;

/// A client at another address of this machine.
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

/// Refused without a look at the password; answers the delay that it names.
#[track_caller]
pub fn assert_too_soon(result: Result<(), Status>) -> Duration {
    let status = assert_error(result, Code::ResourceExhausted, "TOO_MANY_TRIES");
    status.get_error_details().retry_info().unwrap().retry_delay.unwrap()
}

/// Fails until a try is refused; answers how many were taken, and the delay. A slow machine can let a delay pass, but they
/// grow.
async fn fail_until_refused(client: &Client, username: &str) -> (u32, Duration) {
    for taken in 0..20 {
        match try_password(client, username, "wrong password").await {
            Err(status) if status.code() == Code::Unauthenticated => {}
            refused => return (taken, assert_too_soon(refused)),
        }
    }
    panic!("20 tries were taken");
}

#[tokio::test]
async fn after_too_many_wrong_passwords_a_try_waits_as_long_as_it_is_told() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "3"])).await;
    let client = tracker.client_with_token(None);
    // One who does not exist, one who is disabled, one who does.
    disable(&tracker, &tracker.viewer.user).await;
    for username in ["nobody", "viewer", "member"] {
        let (taken, delay) = fail_until_refused(&client, username).await;
        assert!(taken >= 3, "{username}: {taken}");
        assert!(delay <= Duration::from_secs(1 << (taken - 3)), "{username}: {delay:?} after {taken}");
        tokio::time::sleep(delay).await;
        fail(&client, username).await;
        let (more, next) = fail_until_refused(&client, username).await;
        assert!(next <= Duration::from_secs(1 << (taken + more - 2)), "{username}: {next:?} after {taken} and {more}");
    }
    // The right password is not looked at either, and then it is.
    let (_, delay) = fail_until_refused(&client, "MEMBER").await;
    tokio::time::sleep(delay).await;
    try_password(&client, "member", PASSWORD).await.unwrap();
    fail(&client, "member").await;
    try_password(&client, "member", PASSWORD).await.expect("the failures before are forgotten");
}

#[tokio::test]
async fn of_a_burst_of_wrong_passwords_no_more_than_the_free_ones_are_checked() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "4"])).await;
    let client = tracker.client_with_token(None);
    let burst = join_all((0..100).map(|nth| {
        let (client, password) = (client.clone(), format!("guess number {nth}"));
        async move { try_password(&client, "member", &password).await.unwrap_err().code() }
    }));
    let checked = burst.await.into_iter().filter(|code| *code == Code::Unauthenticated).count();
    // Two at a time.
    assert!((2..=4).contains(&checked), "{checked}");
}

/// Each password takes a while, and only so many may wait.
#[tokio::test]
async fn strangers_who_send_many_passwords_do_not_take_the_places_of_who_has_signed_in() {
    let tracker = Tracker::start().await;
    let client = tracker.client_with_token(None);
    try_password(&client, "member", PASSWORD).await.unwrap();
    let slow = bcrypt::hash(PASSWORD, 10).unwrap();
    tracker.sql("UPDATE users SET password_hash = $1 WHERE username = 'viewer'", &[&slow]).await;
    let strangers = tokio::spawn({
        let client = client.clone();
        async move { join_all((0..200).map(|_| try_password(&client, "viewer", "wrong password"))).await }
    });
    let mut signed_in = 0;
    while !strangers.is_finished() {
        try_password(&client, "member", PASSWORD).await.expect("the places of the known are free");
        signed_in += 1;
    }
    assert!(signed_in > 1);
    let codes: Vec<Code> = strangers.await.unwrap().into_iter().map(|result| result.unwrap_err().code()).collect();
    assert!(codes.contains(&Code::ResourceExhausted) && codes.contains(&Code::Unauthenticated), "{codes:?}");
}

#[tokio::test]
async fn who_is_attacked_from_elsewhere_signs_in() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "2"])).await;
    for nth in 1..=5 {
        let attacker = at(&tracker, [127, 0, 1, nth]).await;
        fail_until_refused(&attacker, "member").await;
    }
    try_password(&tracker.client_with_token(None), "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn an_address_that_tries_many_users_waits_but_for_those_who_have_signed_in_there() {
    let tracker = Tracker::start_with(limits(&["--login-failures-per-address", "5"])).await;
    let office = at(&tracker, [127, 0, 2, 1]).await;
    try_password(&office, "member", PASSWORD).await.unwrap();
    for nth in 0..5 {
        fail(&office, &format!("user{nth}")).await;
    }
    let (taken, _) = fail_until_refused(&office, "viewer").await;
    assert!(taken < 10, "before the failures of the one count: {taken}");
    try_password(&office, "member", PASSWORD).await.unwrap();
    try_password(&at(&tracker, [127, 0, 2, 2]).await, "viewer", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn trials_of_a_login_count_as_what_they_try() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    let request = LoginRequest { username: "member".into(), password: "wrong".into(), validate_only: true };
    let mut refused = client.auth().login(request.clone()).await;
    for _ in 0..10 {
        if refused.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated) {
            refused = client.auth().login(request.clone()).await;
        }
    }
    assert_too_soon(refused.map(drop));
}

#[tokio::test]
async fn the_current_password_cannot_be_guessed_either() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "2"])).await;
    let mut refused = change_password(&tracker.member, change("wrong", OTHER_PASSWORD)).await;
    for _ in 0..10 {
        if refused.as_ref().is_err_and(|status| status.code() == Code::InvalidArgument) {
            refused = change_password(&tracker.member, change("wrong", OTHER_PASSWORD)).await;
        }
    }
    let delay = assert_too_soon(refused);
    // Signing in is counted apart, and so are other users.
    log_in(&tracker, "member", PASSWORD).await.unwrap();
    change_password(&tracker.viewer, change(PASSWORD, OTHER_PASSWORD)).await.unwrap();

    tokio::time::sleep(delay).await;
    let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, request.clone()).await.unwrap();
    // What is only answered again is no try.
    for _ in 0..2 {
        assert_invalid(change_password(&tracker.member, change("x", "another password")).await, &["current_password"]);
    }
    change_password(&tracker.member, request).await.unwrap();
}

/// Refused tries reach neither the database nor bcrypt.
#[tokio::test]
async fn a_try_that_comes_too_soon_is_refused_without_the_database() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    for _ in 0..3 {
        // The delays get long enough for what follows.
        let (_, delay) = fail_until_refused(&client, "member").await;
        tokio::time::sleep(delay).await;
    }
    fail(&client, "member").await;
    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await.unwrap();
    assert_too_soon(try_password(&client, "member", PASSWORD).await);
}
