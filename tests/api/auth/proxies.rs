//! Whose address counts where proxies stand in front of the service.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use issue_tracker::pb::{AuditAction, AuditEvent, ListAuditEventsRequest, UpdateUserRequest};
use prost_types::FieldMask;
use tonic::metadata::MetadataMap;

use super::{
    throttle::{assert_too_soon, at, at_with_token},
    *,
};

const PROXY: [u8; 4] = [127, 0, 3, 1];
const PROXIES: &str = "127.0.3.0/24, 10.0.0.0/8, 2001:db8:1::/48";
const HERE: &str = "203.0.113.9";
const ELSEWHERE: &str = "203.0.113.10";

/// A service that takes the word of a proxy, and one wrong password for each user from each address.
async fn behind_proxies() -> Tracker {
    Tracker::start_with(limits(&["--trusted-proxies", PROXIES, "--login-failures", "1"])).await
}

fn forwarded<T>(message: T, values: &[&[u8]]) -> Request<T> {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append("x-forwarded-for", HeaderValue::from_bytes(value).unwrap());
    }
    let mut request = Request::new(message);
    // Metadata by itself takes ASCII only.
    *request.metadata_mut() = MetadataMap::from_headers(headers);
    request
}

/// Tries a password by a connection on which somebody says that it is for somebody else.
async fn try_for(via: &Client, values: &[&[u8]], username: &str, password: &str) -> Result<LoginResponse, Status> {
    let request = LoginRequest { username: username.into(), password: password.into(), validate_only: false };
    Ok(via.auth().login(forwarded(request, values)).await?.into_inner())
}

/// Fails until a try is refused, with a delay that outlasts what follows.
async fn lock_out(via: &Client, client: &str) {
    for _ in 0..20 {
        match try_for(via, &[client.as_bytes()], "member", "wrong password").await {
            Err(status) if status.code() == Code::Unauthenticated => {}
            refused => {
                let delay = assert_too_soon(refused.map(drop));
                if delay > Duration::from_secs(6) {
                    return;
                }
                tokio::time::sleep(delay).await;
            }
        }
    }
    panic!("20 tries were taken");
}

async fn assert_locked_out(via: &Client, values: &[&[u8]]) {
    assert_too_soon(try_for(via, values, "member", PASSWORD).await.map(drop));
}

async fn assert_free(via: &Client, values: &[&[u8]]) {
    assert_unauthenticated(try_for(via, values, "member", "wrong password").await);
}

async fn addresses(tracker: &Tracker, action: AuditAction) -> Vec<String> {
    let request = ListAuditEventsRequest { page_size: 1_000, ..Default::default() };
    let events = tracker.admin.users().list_audit_events(request).await.unwrap().into_inner().audit_events;
    let told = |event: AuditEvent| (event.action() == action).then_some(event.address);
    events.into_iter().rev().filter_map(told).collect()
}

#[tokio::test]
async fn the_clients_of_a_trusted_proxy_are_limited_each_by_himself() {
    let tracker = behind_proxies().await;
    let proxy = at(&tracker, PROXY).await;
    lock_out(&proxy, HERE).await;
    // Whatever he writes to the left, by whatever way he comes, and however his address is written.
    for values in [
        &["203.0.113.9"][..],
        &["203.0.113.10, 203.0.113.9"],
        &["10.0.0.1, 203.0.113.9"],
        &["203.0.113.10", "203.0.113.9"],
        &["203.0.113.10,203.0.113.9:4711", "10.0.0.1", "[2001:db8:1::7]:80"],
        &["::ffff:203.0.113.9"],
    ] {
        let values: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
        assert_locked_out(&proxy, &values).await;
        assert_locked_out(&at(&tracker, [127, 0, 3, 200]).await, &values).await;
    }
    try_for(&proxy, &[ELSEWHERE.as_bytes()], "member", PASSWORD).await.unwrap();
    try_for(&proxy, &[b"203.0.113.9, 203.0.113.11"], "member", PASSWORD).await.unwrap();
    // The proxy itself.
    try_for(&proxy, &[], "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn an_address_behind_a_proxy_that_tries_many_users_is_delayed_and_others_there_are_not() {
    let args = ["--trusted-proxies", PROXIES, "--login-failures-per-address", "2"];
    let tracker = Tracker::start_with(limits(&args)).await;
    let proxy = at(&tracker, PROXY).await;
    for username in ["nobody", "admin"] {
        assert_unauthenticated(try_for(&proxy, &[HERE.as_bytes()], username, "wrong password").await);
    }
    assert_locked_out(&proxy, &[HERE.as_bytes()]).await;
    try_for(&proxy, &[ELSEWHERE.as_bytes()], "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn who_is_no_trusted_proxy_cannot_choose_its_address() {
    let tracker = behind_proxies().await;
    let attacker = at(&tracker, [127, 0, 4, 1]).await;
    lock_out(&attacker, HERE).await;
    // Not to escape its own delay ...
    for value in [ELSEWHERE, "127.0.3.1", "::1", "nonsense"] {
        assert_locked_out(&attacker, &[value.as_bytes()]).await;
    }
    // ... nor to lock out whose address it gives.
    try_for(&at(&tracker, PROXY).await, &[HERE.as_bytes()], "member", PASSWORD).await.unwrap();
    assert!(addresses(&tracker, AuditAction::LoginFailed).await.iter().all(|address| address == "127.0.4.1"));
}

#[tokio::test]
async fn without_trusted_proxies_the_header_is_ignored() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    lock_out(&client, HERE).await;
    assert_locked_out(&client, &[ELSEWHERE.as_bytes()]).await;
    assert!(addresses(&tracker, AuditAction::LoginFailed).await.iter().all(|address| address == "127.0.0.1"));
}

#[tokio::test]
async fn garbage_in_the_header_counts_for_the_trusted_proxy_that_passed_it_on() {
    let tracker = behind_proxies().await;
    let [proxy, other] = [PROXY, [127, 0, 3, 2]].map(|address| at(&tracker, address));
    let (proxy, other) = (proxy.await, other.await);
    lock_out(&proxy, "unknown").await;
    for garbage in [&b""[..], b" , ", b"203.0.113.10, nobody", b"203.0.113.10, \xff", &[b'9'; 8_000]] {
        assert_locked_out(&proxy, &[garbage]).await;
        assert_locked_out(&proxy, &[b"203.0.113.10", garbage]).await;
    }
    assert_locked_out(&proxy, &[]).await;
    assert_locked_out(&other, &[b"203.0.113.10, nobody, 127.0.3.1"]).await;
    assert_free(&other, &[b"nobody"]).await;
    // What stands to the left of a client is not looked at.
    assert_free(&proxy, &[b"nobody, \xff, 203.0.113.12"]).await;
}

#[tokio::test]
async fn the_trail_tells_where_clients_of_trusted_proxies_are() {
    let tracker = behind_proxies().await;
    let proxy = at(&tracker, PROXY).await;
    assert_unauthenticated(try_for(&proxy, &[b"198.51.100.1, 2001:db8:2::7, 10.0.0.1"], "member", "wrong").await);
    assert_eq!(addresses(&tracker, AuditAction::LoginFailed).await, ["2001:db8:2::7"]);
    let session = try_for(&proxy, &[b"[::ffff:203.0.113.9]:4711"], "member", PASSWORD).await.unwrap().access_token;
    assert_eq!(addresses(&tracker, AuditAction::Login).await, [HERE]);
    let logout = LogoutRequest::default();
    at_with_token(&tracker, PROXY, &session)
        .await
        .auth()
        .logout(forwarded(logout, &[ELSEWHERE.as_bytes()]))
        .await
        .unwrap();
    assert_eq!(addresses(&tracker, AuditAction::Logout).await, [ELSEWHERE]);
}

/// The address is kept over the tries that the service makes by itself.
#[tokio::test]
async fn the_trail_tells_it_of_calls_that_were_made_again() {
    let tracker = behind_proxies().await;
    let admin = at_with_token(&tracker, PROXY, &tracker.admin.token).await;
    // From then on its token is known.
    who_am_i(&admin).await.unwrap();
    let user = Some(User { id: tracker.viewer.user.id.clone(), disabled: true, ..User::default() });
    let update_mask = Some(FieldMask { paths: vec!["disabled".into()] });
    let request = UpdateUserRequest { user, update_mask, ..Default::default() };

    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let call = tokio::spawn(async move { admin.users().update_user(forwarded(request, &[HERE.as_bytes()])).await });
    tracker.until_blocked().await;
    // Its connection is lost, and it is tried on another one.
    const CUT: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    assert_eq!(session.query_one(CUT, &[]).await.unwrap().get::<_, i64>(0), 1);
    tracker.until_blocked().await;
    session.batch_execute("COMMIT").await.unwrap();
    call.await.unwrap().unwrap();
    assert_eq!(addresses(&tracker, AuditAction::UserDisabled).await, [HERE]);
}
