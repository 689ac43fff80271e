//! Calls that nobody has signed in for, and whose places they take.

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
    http2::{Answer, call_on, connect, framed, request},
};
use crate::{harness::PASSWORD, support::eventually::eventually};

const LOGIN: &str = "/issuetracker.v1.AuthService/Login";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// Calls without credentials that one client may have on one connection.
const PER_CLIENT: usize = 16;
/// Streams without credentials that one client may have on all connections.
const STREAMS_PER_CLIENT: usize = 64;

/// A call for a client that the connection's other end speaks for.
fn request_for(target: &Target, path: &str, client: &str) -> Request<()> {
    let mut request = request(target, path);
    request.headers_mut().insert("x-forwarded-for", client.parse().unwrap());
    request
}

async fn log_in(target: &Target, requests: &SendRequest<Bytes>, client: &str) -> Answer {
    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: true };
    let call = call_on(requests.clone(), request_for(target, LOGIN, client), framed(&login.encode_to_vec()));
    timeout(HANG, call).await.expect("the login is not answered")
}

/// A call that does not end by itself: what it has to say never comes, or what it asks for always goes on.
type Held = (ResponseFuture, SendStream<Bytes>);

async fn hold(target: &Target, requests: &SendRequest<Bytes>, path: &str, client: &str) -> Held {
    let mut ready = timeout(HANG, requests.clone().ready()).await.expect("no more calls are taken").unwrap();
    let (answer, mut stream) = ready.send_request(request_for(target, path, client), false).unwrap();
    if path == WATCH {
        stream.send_data(framed(b""), true).unwrap();
    }
    (answer, stream)
}

async fn hold_many(target: &Target, requests: &SendRequest<Bytes>, path: &str, client: &str) -> Vec<Held> {
    let mut held = Vec::new();
    for _ in 0..PER_CLIENT {
        held.push(hold(target, requests, path, client).await);
    }
    held
}

/// Its places are free again when the service has heard of it.
async fn give_up(target: &Target, requests: &SendRequest<Bytes>, held: Vec<Held>, client: &str) {
    for (_, mut stream) in held {
        stream.send_reset(h2::Reason::CANCEL);
    }
    let signed_in = async {
        while !matches!(log_in(target, requests, client).await, Answer::Status { http: 200, grpc: Some(0) }) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(HANG, signed_in).await.expect("the places are never free again");
}

#[tokio::test]
async fn a_connection_has_so_many_calls_without_credentials_whoever_it_says_it_speaks_for() {
    for args in [&[][..], &["--trusted-proxies", "127.0.0.2"]] {
        let target = Target::start_with(args).await;
        let requests = connect(&target).await;
        let held = hold_many(&target, &requests, WATCH, "203.0.113.9").await;
        for client in ["203.0.113.9", "203.0.113.10"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
        }
        // Those with credentials, and other connections, go on.
        call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
        log_in(&target, &connect(&target).await, "203.0.113.9").await.assert_grpc(Code::Ok);
        give_up(&target, &requests, held, "203.0.113.9").await;
        drop(requests);
        target.assert_unharmed().await;
    }
}

#[tokio::test]
async fn a_client_of_a_trusted_proxy_does_not_take_the_places_of_the_others_on_its_connection() {
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1"]).await;
    let requests = connect(&target).await;
    // Slow logins, and streams that last.
    for path in [LOGIN, WATCH] {
        let held = hold_many(&target, &requests, path, "2001:db8::1").await;
        // A subscriber has many addresses of IPv6.
        for client in ["2001:db8::1", "2001:db8::2", "198.51.100.1, [2001:db8::ffff:1]:4711"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
        }
        for client in ["203.0.113.9", "2001:db8:0:1::1", "2001:db8::1, 203.0.113.9", "nobody"] {
            log_in(&target, &requests, client).await.assert_grpc(Code::Ok);
        }
        give_up(&target, &requests, held, "2001:db8::1").await;
    }
    drop(requests);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn all_clients_of_a_proxy_together_leave_half_of_its_connection_to_who_has_signed_in() {
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1", "--streams", "40"]).await;
    let requests = connect(&target).await;
    // The client has to hear first how many calls it may have.
    call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
    let mut held = hold_many(&target, &requests, WATCH, "203.0.113.1").await;
    for _ in PER_CLIENT..20 {
        held.push(hold(&target, &requests, WATCH, "203.0.113.2").await);
    }
    for client in ["203.0.113.2", "203.0.113.3"] {
        log_in(&target, &requests, client).await.assert_grpc(Code::ResourceExhausted);
    }
    call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await.assert_grpc(Code::Ok);
    give_up(&target, &requests, held, "203.0.113.3").await;
    drop(requests);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_client_has_so_many_streams_without_credentials_however_many_connections_it_makes() {
    const OTHER: &str = "203.0.113.9";
    let target = Target::start_with(&["--trusted-proxies", "127.0.0.1"]).await;
    let mut held = Vec::new();
    for nth in 0..STREAMS_PER_CLIENT {
        let requests = connect(&target).await;
        // A subscriber has many addresses of IPv6.
        let (answer, stream) = hold(&target, &requests, WATCH, &format!("2001:db8::{nth}")).await;
        let head = timeout(HANG, answer).await.expect("the watch is not answered").unwrap();
        assert!(!head.headers().contains_key("grpc-status"), "the stream {nth} is refused");
        held.push((requests, stream, head));
    }
    let watch = async |client| {
        let requests = connect(&target).await;
        let (answer, stream) = hold(&target, &requests, WATCH, client).await;
        let head = timeout(HANG, answer).await.expect("the watch is not answered").unwrap();
        let status = head.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned());
        drop(stream);
        status
    };

    assert_eq!(watch("2001:db8::ffff").await, Some((Code::ResourceExhausted as i32).to_string()));
    assert_eq!(watch(OTHER).await, None);
    // What ends by itself has no such bound.
    log_in(&target, &connect(&target).await, "2001:db8::ffff").await.assert_grpc(Code::Ok);

    held.truncate(STREAMS_PER_CLIENT / 2);
    eventually("there is room again", async || watch("2001:db8::ffff").await.is_none()).await;
    drop(held);
    target.assert_unharmed().await;
}
