//! Connections that are silent, idle or old, or violate HTTP/2.

use std::time::Duration;

use tokio::{net::TcpStream, time::timeout};
use tonic::Code;

use super::{
    HANG, Target, WHO_AM_I,
    http2::{
        END_HEADERS, GOAWAY, HEADERS, MAX_CONCURRENT_STREAMS, REFUSED_STREAM, RST_STREAM, RawConnection, SETTINGS,
        call_block, call_on, connect, frame, framed, request,
    },
};
use crate::harness::{Tracker, limits};

const MANY: usize = 1_000;

#[tokio::test]
async fn connection_of_another_protocol_is_closed() {
    let target = Target::start().await;
    let random: Vec<u8> = (0..4_096_u32).map(|nth| (nth.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let client_hello = b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x03aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\x00\x00\x02\x13\x01\x01\x00\x00\x00";
    for (what, bytes) in [
        ("HTTP/1.1", &b"GET / HTTP/1.1\r\nHost: tracker\r\n\r\n"[..]),
        ("an upgrade", b"POST / HTTP/1.1\r\nHost: tracker\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n"),
        ("TLS", client_hello),
        ("random bytes", &random),
        ("zeros", &[0; 4_096]),
        ("a malformed preface", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"),
        ("no settings", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x04\x08\0\0\0\0\0\0\0\0\x01aaaaaaaaaaaaaaaaaaaaaaaaa"),
    ] {
        let mut raw = RawConnection::connect(&target).await;
        raw.send(bytes).await;
        let response = raw.until_closed().await;
        assert!(response.len() < 1_024, "{what}: the response has {} bytes", response.len());
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn illegal_frame_ends_its_stream_or_connection() {
    let target = Target::start().await;
    let block = call_block(&target, WHO_AM_I);
    for (what, bytes) in [
        ("data on an idle stream", frame(0, 1, 1, b"x")),
        ("headers on a server-initiated stream", frame(HEADERS, END_HEADERS, 2, &block)),
        ("headers on stream 0", frame(HEADERS, END_HEADERS, 0, &block)),
        ("a malformed header block", frame(HEADERS, END_HEADERS, 1, &[0xff; 64])),
        ("a frame that is too large", frame(0, 0, 1, &vec![0; 20_000])),
        ("a continuation without headers", frame(9, END_HEADERS, 1, &block)),
        ("a ping of five bytes", frame(6, 0, 0, b"short")),
        ("settings on a stream", frame(4, 0, 1, &[])),
        ("settings of five bytes", frame(4, 0, 0, b"short")),
        ("a push promise", frame(5, END_HEADERS, 1, &block)),
        ("half of a frame's headers", frame(HEADERS, END_HEADERS, 1, &block)[..20].to_vec()),
    ] {
        let mut raw = RawConnection::begin(&target, &[]).await;
        raw.send(&bytes).await;
        if what.starts_with("half") {
            // The service waits for the rest, and the client disconnects.
            continue;
        }
        loop {
            match raw.next().await {
                None => break,
                Some(frame) if [GOAWAY, RST_STREAM].contains(&frame.kind) => break,
                Some(frame) => assert_ne!(frame.kind, HEADERS, "{what} gets a response"),
            }
        }
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn connection_without_a_complete_preface_is_closed() {
    let target = Target::start_with(&["--idle-seconds", "1"]).await;
    let mut silent = Vec::new();
    for sent in [&b""[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n"] {
        let mut raw = RawConnection::connect(&target).await;
        raw.send(sent).await;
        silent.push(raw);
    }
    for mut raw in silent {
        raw.until_closed().await;
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn connection_that_stalls_within_headers_is_closed() {
    let target = Target::start_with(&["--idle-seconds", "1"]).await;
    let mut raw = RawConnection::begin(&target, &[]).await;
    raw.send(&frame(HEADERS, 0, 1, &call_block(&target, WHO_AM_I))).await;
    raw.until_closed().await;
    target.assert_unharmed().await;
}

#[tokio::test]
async fn streams_above_the_advertised_maximum_are_refused() {
    let target = Target { tracker: Tracker::start_with(limits(&["--streams", "2"])).await };
    let mut raw = RawConnection::begin(&target, &[]).await;
    let settings = raw.next_of(SETTINGS).await.unwrap().payload;
    let maximum = settings.chunks(6).find(|setting| setting[..2] == MAX_CONCURRENT_STREAMS.to_be_bytes());
    assert_eq!(maximum.expect("the maximum is advertised")[2..], 2_u32.to_be_bytes());
    let block = call_block(&target, "/issuetracker.v1.ImportService/ImportIssues");
    for stream in [1, 3, 5] {
        raw.send(&frame(HEADERS, END_HEADERS, stream, &block)).await;
    }
    let refused = raw.next_of(RST_STREAM).await.expect("the connection stays open");
    assert_eq!((refused.stream, &refused.payload[..]), (5, &REFUSED_STREAM.to_be_bytes()[..]));
    drop(raw);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn connection_with_a_call_is_closed_if_pings_are_not_acknowledged() {
    let target = Target::start_with(&["--keepalive-seconds", "1"]).await;
    let mut raw = RawConnection::begin(&target, &[]).await;
    raw.send(&frame(HEADERS, END_HEADERS, 1, &call_block(&target, "/issuetracker.v1.ImportService/ImportIssues")))
        .await;
    raw.until_closed().await;
    target.assert_unharmed().await;
}

#[tokio::test]
async fn idle_connection_is_closed_and_the_client_reconnects_without_an_error() {
    let target = Target::start_with(&["--idle-seconds", "1"]).await;
    let requests = connect(&target).await;
    let outcome = call_on(requests.clone(), request(&target, WHO_AM_I), framed(b"")).await;
    outcome.assert_grpc(Code::Ok);
    let closed = async {
        let mut requests = requests;
        while let Ok(ready) = requests.ready().await {
            requests = ready;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(HANG, closed).await.expect("the connection stays open");
    for _ in 0..3 {
        target.member.auth().who_am_i(issue_tracker::pb::WhoAmIRequest {}).await.unwrap();
        tokio::time::sleep(Duration::from_millis(1_200)).await;
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn connection_at_its_maximum_age_is_replaced_without_a_failed_call() {
    let target = Target::start_with(&["--age-seconds", "1", "--age-grace-seconds", "1"]).await;
    let before = target.connections();
    assert_eq!(before.len(), 1);
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(4) {
        let call = || async { target.member.auth().who_am_i(issue_tracker::pb::WhoAmIRequest {}).await };
        if let Err(status) = call().await {
            // tonic returns an error for a call that it has not sent; other clients send it on the next connection.
            let source = std::error::Error::source(&status);
            assert!(source.is_some_and(|source| source.is::<tonic::transport::Error>()), "{status:?}");
            call().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(target.connections().is_disjoint(&before), "the connection is not replaced");
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_block_other_calls() {
    let target = Target::start().await;
    let mut idle = Vec::new();
    for _ in 0..MANY {
        idle.push(RawConnection::begin(&target, &[]).await);
    }
    target.assert_serving().await;
    drop(idle);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn idle_connections_are_evicted_at_the_connection_limit() {
    let target = Target::start_with(&["--connections", "20"]).await;
    let mut idle = Vec::new();
    for _ in 0..30 {
        // More than the limit: the last ones wait until others are evicted.
        idle.push(TcpStream::connect(&target.address).await.unwrap());
    }
    for _ in 0..3 {
        let served = async {
            loop {
                let outcome = call_on(connect(&target).await, request(&target, WHO_AM_I), framed(b"")).await;
                if matches!(outcome, super::http2::Outcome::Status { http: 200, grpc: Some(0) }) {
                    break;
                }
            }
        };
        timeout(HANG, served).await.expect("no new connection is served");
    }
    drop(idle);
    target.assert_unharmed().await;
}
