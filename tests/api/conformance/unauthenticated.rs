//! Limits for unauthenticated calls: per client and per connection.

use std::time::Duration;

use bytes::Bytes;
use h2::{
    SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::Request;
use issue_tracker::pb::LoginRequest;
use prost::Message;
use tokio::time::timeout;
use tonic::Code;

use super::{
    HANG, Target, WHO_AM_I,
    http2::{Outcome, call_on, connect, framed, request},
};
use crate::{harness::PASSWORD, support::eventually::eventually};

const LOGIN: &str = "/issuetracker.v1.AuthService/Login";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// Maximum concurrent unauthenticated calls of one client on one connection.
const CALLS_PER_CLIENT: usize = 16;
/// Maximum concurrent unauthenticated streams of one client on all connections.
const STREAMS_PER_CLIENT: usize = 64;

/// Builds a request that names this client in `x-forwarded-for`.
fn request_for(target: &Target, path: &str, client: &str) -> Request<()> {
    let mut request = request(target, path);
    request.headers_mut().insert("x-forwarded-for", client.parse().unwrap());
    request
}

async fn log_in(target: &Target, requests: &SendRequest<Bytes>, client: &str) -> Outcome {
    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: true };
    let call = call_on(requests.clone(), request_for(target, LOGIN, client), framed(&login.encode_to_vec()));
    timeout(HANG, call).await.expect("the login hangs")
}

/// A call in flight that does not end by itself: an incomplete login, or a stream.
type OpenCall = (ResponseFuture, SendStream<Bytes>);

async fn open(target: &Target, requests: &SendRequest<Bytes>, path: &str, client: &str) -> OpenCall {
    let mut ready =
        timeout(HANG, requests.clone().ready()).await.expect("the connection accepts no more calls").unwrap();
    let (response, mut stream) = ready.send_request(request_for(target, path, client), false).unwrap();
    if path == WATCH {
        stream.send_data(framed(b""), true).unwrap();
    }
    (response, stream)
}

/// Opens as many calls as one client may have on one connection.
async fn open_max(target: &Target, requests: &SendRequest<Bytes>, path: &str, client: &str) -> Vec<OpenCall> {
    let mut open_calls = Vec::new();
    for _ in 0..CALLS_PER_CLIENT {
        open_calls.push(open(target, requests, path, client).await);
    }
    open_calls
}

/// Resets calls, and waits until the client's permits are free.
async fn reset(target: &Target, requests: &SendRequest<Bytes>, open_calls: Vec<OpenCall>, client: &str) {
    for (_, mut stream) in open_calls {
        stream.send_reset(h2::Reason::CANCEL);
    }
    let logged_in = async {
        while !matches!(log_in(target, requests, client).await, Outcome::Status { http: 200, grpc: Some(0) }) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(HANG, logged_in).await.expect("the permits are never free again");
}

#[tokio::test]
async fn unauthenticated_calls_of_a_connection_are_limited_whatever_address_it_forwards() {
    for args in [&[][..], &["--trusted-proxies", "127.0.0.2"]] {
        let target = Target::start_with(args).await;
        let requests = connect(&target).await;
        let open_calls = open_max(&target, &requests, WATCH, "203.0.113.9").await;
        for client in ["203.0.113.9", "203.0.113.10"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
        }
        // Calls with credentials and other connections are not affected.
        call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
        log_in(&target, &connect(&target).await, "203.0.113.9").await.assert_grpc(Code::Ok);
        reset(&target, &requests, open_calls, "203.0.113.9").await;
        drop(requests);
        target.assert_unharmed().await;
    }
}

#[tokio::test]
async fn client_of_a_trusted_proxy_does_not_exhaust_the_permits_of_others_on_its_connection() {
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1"]).await;
    let requests = connect(&target).await;
    // Incomplete logins, and streams.
    for path in [LOGIN, WATCH] {
        let open_calls = open_max(&target, &requests, path, "2001:db8::1").await;
        // One client may have all addresses of an IPv6 /64 network.
        for client in ["2001:db8::1", "2001:db8::2", "198.51.100.1, [2001:db8::ffff:1]:4711"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
        }
        for client in ["203.0.113.9", "2001:db8:0:1::1", "2001:db8::1, 203.0.113.9", "malformed"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::Ok);
        }
        reset(&target, &requests, open_calls, "2001:db8::1").await;
    }
    drop(requests);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn unauthenticated_calls_take_at_most_half_of_the_streams_of_a_proxy_connection() {
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1", "--streams", "40"]).await;
    let requests = connect(&target).await;
    // The first response ensures that the client has received the maximum of concurrent streams.
    call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
    let mut open_calls = open_max(&target, &requests, WATCH, "203.0.113.1").await;
    for _ in CALLS_PER_CLIENT..20 {
        open_calls.push(open(&target, &requests, WATCH, "203.0.113.2").await);
    }
    for client in ["203.0.113.2", "203.0.113.3"] {
        log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
    }
    call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
    reset(&target, &requests, open_calls, "203.0.113.3").await;
    drop(requests);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn unauthenticated_streams_of_a_client_are_limited_across_connections() {
    const OTHER: &str = "203.0.113.9";
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1"]).await;
    let mut open_calls = Vec::new();
    for nth in 0..STREAMS_PER_CLIENT {
        let requests = connect(&target).await;
        // One client may have all addresses of an IPv6 /64 network.
        let (response, stream) = open(&target, &requests, WATCH, &format!("2001:db8::{nth}")).await;
        let head = timeout(HANG, response).await.expect("the watch gets no response").unwrap();
        assert!(!head.headers().contains_key("grpc-status"), "the stream {nth} is refused");
        open_calls.push((requests, stream, head));
    }
    let watch = async |client| {
        let requests = connect(&target).await;
        let (response, stream) = open(&target, &requests, WATCH, client).await;
        let head = timeout(HANG, response).await.expect("the watch gets no response").unwrap();
        let status = head.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned());
        drop(stream);
        status
    };

    assert_eq!(watch("2001:db8::ffff").await, Some((Code::ResourceExhausted as i32).to_string()));
    assert_eq!(watch(OTHER).await, None);
    // Unary calls have no limit across connections.
    log_in(&target, &connect(&target).await, "2001:db8::ffff").await.assert_grpc(Code::Ok);

    open_calls.truncate(STREAMS_PER_CLIENT / 2);
    eventually("permits are free again", async || watch("2001:db8::ffff").await.is_none()).await;
    drop(open_calls);
    target.assert_unharmed().await;
}
