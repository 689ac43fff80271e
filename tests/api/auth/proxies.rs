//! Client addresses behind proxies: `--trusted-proxies` and `x-forwarded-for`.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use issue_tracker::pb::{AuditAction, AuditEvent, ListAuditEventsRequest, UpdateUserRequest};
use prost_types::FieldMask;
use tonic::metadata::MetadataMap;

use super::{
    throttle::{assert_throttled, at, at_with_token},
    *,
};

const PROXY: [u8; 4] = [127, 0, 3, 1];
const PROXIES: &str = "127.0.3.0/24, 10.0.0.0/8, 2001:db8:1::/48";
const CLIENT: &str = "203.0.113.9";
const OTHER_CLIENT: &str = "203.0.113.10";

/// Starts a service that trusts [`PROXIES`], and throttles a user at an address after one failure.
async fn behind_proxies() -> Tracker {
    Tracker::start_with(limits(&["--trusted-proxies", PROXIES, "--login-failures", "1"])).await
}

fn forwarded<T>(message: T, values: &[&[u8]]) -> Request<T> {
    let mut headers = HeaderMap::new();
    for value in values {
        headers.append("x-forwarded-for", HeaderValue::from_bytes(value).unwrap());
    }
    let mut request = Request::new(message);
    // tonic's metadata accepts only ASCII; header values may have other bytes.
    *request.metadata_mut() = MetadataMap::from_headers(headers);
    request
}

/// Logs in on the connection `via`, with these values of `x-forwarded-for`.
async fn log_in_for(via: &Client, values: &[&[u8]], username: &str, password: &str) -> Result<LoginResponse, Status> {
    let request = LoginRequest { username: username.into(), password: password.into(), validate_only: false };
    Ok(via.auth().login(forwarded(request, values)).await?.into_inner())
}

/// Sends wrong passwords until a login is throttled for more than 6 s, which outlasts the rest of a test.
async fn lock_out(via: &Client, client: &str) {
    for _ in 0..20 {
        match log_in_for(via, &[client.as_bytes()], "member", "wrong password").await {
            Err(status) if status.code() == Code::Unauthenticated => {}
            refused => {
                let delay = assert_throttled(refused.map(drop));
                if delay > Duration::from_secs(6) {
                    return;
                }
                advance_clock(delay).await;
            }
        }
    }
    panic!("20 attempts were checked");
}

async fn assert_locked_out(via: &Client, values: &[&[u8]]) {
    assert_throttled(log_in_for(via, values, "member", PASSWORD).await.map(drop));
}

async fn assert_not_locked_out(via: &Client, values: &[&[u8]]) {
    assert_unauthenticated(log_in_for(via, values, "member", "wrong password").await);
}

/// Returns the addresses in the audit events of an action, oldest first.
async fn addresses(tracker: &Tracker, action: AuditAction) -> Vec<String> {
    let request = ListAuditEventsRequest { page_size: 1_000, ..Default::default() };
    let events = tracker.admin.users().list_audit_events(request).await.unwrap().into_inner().audit_events;
    let address = |event: AuditEvent| (event.action() == action).then_some(event.address);
    events.into_iter().rev().filter_map(address).collect()
}

#[tokio::test]
async fn clients_of_a_trusted_proxy_are_throttled_individually() {
    let tracker = behind_proxies().await;
    let proxy = at(&tracker, PROXY).await;
    lock_out(&proxy, CLIENT).await;
    // Whatever stands to the left of the client's address, through any trusted proxy, and in any notation of the address.
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
    log_in_for(&proxy, &[OTHER_CLIENT.as_bytes()], "member", PASSWORD).await.unwrap();
    log_in_for(&proxy, &[b"203.0.113.9, 203.0.113.11"], "member", PASSWORD).await.unwrap();
    // Without the header, the proxy's own address counts.
    log_in_for(&proxy, &[], "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn address_behind_a_proxy_that_fails_for_many_users_is_throttled_alone() {
    let args = ["--trusted-proxies", PROXIES, "--login-failures-per-address", "2"];
    let tracker = Tracker::start_with(limits(&args)).await;
    let proxy = at(&tracker, PROXY).await;
    for username in ["no-such-user", "admin"] {
        assert_unauthenticated(log_in_for(&proxy, &[CLIENT.as_bytes()], username, "wrong password").await);
    }
    assert_locked_out(&proxy, &[CLIENT.as_bytes()]).await;
    log_in_for(&proxy, &[OTHER_CLIENT.as_bytes()], "member", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn forwarded_address_from_an_untrusted_peer_is_ignored() {
    let tracker = behind_proxies().await;
    let attacker = at(&tracker, [127, 0, 4, 1]).await;
    lock_out(&attacker, CLIENT).await;
    // A forged address does not evade the peer's own delay.
    for value in [OTHER_CLIENT, "127.0.3.1", "::1", "nonsense"] {
        assert_locked_out(&attacker, &[value.as_bytes()]).await;
    }
    // A forged address does not lock out the client that has the address.
    log_in_for(&at(&tracker, PROXY).await, &[CLIENT.as_bytes()], "member", PASSWORD).await.unwrap();
    assert!(addresses(&tracker, AuditAction::LoginFailed).await.iter().all(|address| address == "127.0.4.1"));
}

#[tokio::test]
async fn without_trusted_proxies_the_header_is_ignored() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let client = tracker.client_with_token(None);
    lock_out(&client, CLIENT).await;
    assert_locked_out(&client, &[OTHER_CLIENT.as_bytes()]).await;
    assert!(addresses(&tracker, AuditAction::LoginFailed).await.iter().all(|address| address == "127.0.0.1"));
}

#[tokio::test]
async fn malformed_forwarded_address_counts_as_the_address_of_the_proxy_that_sent_it() {
    let tracker = behind_proxies().await;
    let [proxy, other] = [PROXY, [127, 0, 3, 2]].map(|address| at(&tracker, address));
    let (proxy, other) = (proxy.await, other.await);
    lock_out(&proxy, "unknown").await;
    for malformed in [&b""[..], b" , ", b"203.0.113.10, malformed", b"203.0.113.10, \xff", &[b'9'; 8_000]] {
        assert_locked_out(&proxy, &[malformed]).await;
        assert_locked_out(&proxy, &[b"203.0.113.10", malformed]).await;
    }
    assert_locked_out(&proxy, &[]).await;
    assert_locked_out(&other, &[b"203.0.113.10, malformed, 127.0.3.1"]).await;
    assert_not_locked_out(&other, &[b"malformed"]).await;
    // Values to the left of a client's address are not parsed.
    assert_not_locked_out(&proxy, &[b"malformed, \xff, 203.0.113.12"]).await;
}

#[tokio::test]
async fn audit_events_have_the_address_of_the_client_behind_a_trusted_proxy() {
    let tracker = behind_proxies().await;
    let proxy = at(&tracker, PROXY).await;
    assert_unauthenticated(log_in_for(&proxy, &[b"198.51.100.1, 2001:db8:2::7, 10.0.0.1"], "member", "wrong").await);
    assert_eq!(addresses(&tracker, AuditAction::LoginFailed).await, ["2001:db8:2::7"]);
    let session = log_in_for(&proxy, &[b"[::ffff:203.0.113.9]:4711"], "member", PASSWORD).await.unwrap().access_token;
    assert_eq!(addresses(&tracker, AuditAction::Login).await, [CLIENT]);
    let logout = LogoutRequest::default();
    at_with_token(&tracker, PROXY, &session)
        .await
        .auth()
        .logout(forwarded(logout, &[OTHER_CLIENT.as_bytes()]))
        .await
        .unwrap();
    assert_eq!(addresses(&tracker, AuditAction::Logout).await, [OTHER_CLIENT]);
}

#[tokio::test]
async fn audit_events_of_calls_that_the_service_retried_have_the_client_address() {
    let tracker = behind_proxies().await;
    let admin = at_with_token(&tracker, PROXY, &tracker.admin.token).await;
    // Caches the token: its look-up would wait for the lock on the table of users.
    who_am_i(&admin).await.unwrap();
    let user = Some(User { id: tracker.viewer.user.id.clone(), disabled: true, ..User::default() });
    let update_mask = Some(FieldMask { paths: vec!["disabled".into()] });
    let request = UpdateUserRequest { user, update_mask, ..Default::default() };

    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE users IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let call = tokio::spawn(async move { admin.users().update_user(forwarded(request, &[CLIENT.as_bytes()])).await });
    tracker.wait_until_blocked().await;
    // The call loses its database connection, and the service retries it on another one.
    const TERMINATE: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'";
    assert_eq!(session.query_one(TERMINATE, &[]).await.unwrap().get::<_, i64>(0), 1);
    tracker.wait_until_blocked().await;
    session.batch_execute("COMMIT").await.unwrap();
    call.await.unwrap().unwrap();
    assert_eq!(addresses(&tracker, AuditAction::UserDisabled).await, [CLIENT]);
}
