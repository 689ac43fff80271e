//! Evicted connections on which the client begins calls after GOAWAY. HTTP/2 allows this until the client has acknowledged
//! the GOAWAY.

use std::time::Duration;

use issue_tracker::pb::{CreateIssueRequest, Issue};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::{
    HANG, SOON, Target, WHO_AM_I,
    http2::{DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RawConnection, call_block, frame, framed},
};
use crate::harness::{Tracker, limits};

/// Starts a service that accepts one connection.
async fn start() -> Target {
    Target { tracker: Tracker::start_with(limits(&["--connections", "1"])).await }
}

/// Begins a call that does not end by itself and needs no credentials.
async fn watch(raw: &mut RawConnection, target: &Target, stream: u32) {
    raw.send(&frame(HEADERS, END_HEADERS, stream, &call_block(target, "/grpc.health.v1.Health/Watch"))).await;
    raw.send(&frame(DATA, END_STREAM, stream, &framed(b""))).await;
}

/// Connects until a connection is served, which makes the service evict another one.
async fn until_served(target: &Target) {
    let served = async {
        loop {
            // At the limit, the service closes a new connection without a response.
            let mut raw = RawConnection::begin(target, &[]).await;
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &call_block(target, WHO_AM_I))).await;
            if raw.next_of(HEADERS).await.is_some() {
                break;
            }
        }
    };
    timeout(HANG, served).await.expect("no new connection is served");
}

#[tokio::test]
async fn unauthenticated_call_after_goaway_does_not_keep_an_evicted_connection_open() {
    let target = start().await;
    let mut connection = RawConnection::begin(&target, &[]).await;
    // An idle connection can be evicted after 1 s.
    sleep(Duration::from_millis(1_200)).await;
    let evicted = async {
        connection.next_of(GOAWAY).await.expect("a GOAWAY arrives");
        watch(&mut connection, &target, 1).await;
        timeout(SOON, connection.until_closed()).await.expect("the connection stays open");
    };
    tokio::join!(evicted, until_served(&target));
    target.assert_unharmed().await;
}

#[tokio::test]
async fn authenticated_call_after_goaway_may_finish_on_an_evicted_connection() {
    let target = start().await;
    let mut connection = RawConnection::begin(&target, &[]).await;
    watch(&mut connection, &target, 1).await;
    let evicted = async {
        connection.next_of(GOAWAY).await.expect("a GOAWAY arrives");
        let create = call_block(&target, "/issuetracker.v1.IssueService/CreateIssue");
        connection.send(&frame(HEADERS, END_HEADERS, 3, &create)).await;
        // Longer than an evicted connection stays open without an authenticated call.
        sleep(Duration::from_millis(1_500)).await;
        let issue = Issue { title: "late".into(), ..Issue::default() };
        let message = CreateIssueRequest { issue: Some(issue), ..Default::default() }.encode_to_vec();
        connection.send(&frame(DATA, END_STREAM, 3, &framed(&message))).await;
        let response = connection.next_of(DATA).await.expect("the call gets a response");
        assert_eq!(response.stream, 3);
        timeout(SOON, connection.until_closed()).await.expect("the connection stays open");
    };
    tokio::join!(evicted, until_served(&target));
    assert_eq!(target.count("SELECT count(*) FROM issues").await, 1);
    target.assert_unharmed().await;
}
