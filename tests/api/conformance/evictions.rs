//! Connections that are told to go, and begin calls all the same: until a client has acknowledged it, HTTP/2 lets it do so.

use std::time::Duration;

use issue_tracker::pb::{CreateIssueRequest, Issue};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::{
    HANG, SOON, Target, WHO_AM_I,
    http2::{DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, RawConnection, call_block, frame, framed},
};
use crate::harness::{Tracker, limits};

/// There is room for one connection.
async fn start() -> Target {
    Target { tracker: Tracker::start_with(limits(&["--connections", "1"])).await }
}

/// Begins to watch the service's health, which does not end by itself.
async fn watch(raw: &mut RawConnection, target: &Target, stream: u32) {
    raw.send(&frame(HEADERS, END_HEADERS, stream, &call_block(target, "/grpc.health.v1.Health/Watch"))).await;
    raw.send(&frame(DATA, END_STREAM, stream, &framed(b""))).await;
}

/// Connects until there is room, and what is there meanwhile is told to go.
async fn until_served(target: &Target) {
    let served = async {
        loop {
            // Where there is no room, the connection is closed before anything is said.
            let mut raw = RawConnection::begin(target, &[]).await;
            raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &call_block(target, WHO_AM_I))).await;
            if raw.next_of(HEADERS).await.is_some() {
                break;
            }
        }
    };
    timeout(HANG, served).await.expect("nobody gets in");
}

#[tokio::test]
async fn a_connection_that_makes_room_is_not_kept_by_calls_that_nobody_signs_in_for() {
    let target = start().await;
    let mut leaving = RawConnection::begin(&target, &[]).await;
    // Idle for long enough to be let go.
    sleep(Duration::from_millis(1_200)).await;
    let leaves = async {
        leaving.next_of(GOAWAY).await.expect("it is told to go");
        watch(&mut leaving, &target, 1).await;
        timeout(SOON, leaving.until_closed()).await.expect("it stays");
    };
    tokio::join!(leaves, until_served(&target));
    target.assert_unharmed().await;
}

#[tokio::test]
async fn on_a_connection_that_makes_room_a_call_may_finish_that_somebody_has_signed_in_for() {
    let target = start().await;
    let mut leaving = RawConnection::begin(&target, &[]).await;
    watch(&mut leaving, &target, 1).await;
    let leaves = async {
        leaving.next_of(GOAWAY).await.expect("it is told to go");
        let create = call_block(&target, "/issuetracker.v1.IssueService/CreateIssue");
        leaving.send(&frame(HEADERS, END_HEADERS, 3, &create)).await;
        // Longer than it is kept without such a call.
        sleep(Duration::from_millis(1_500)).await;
        let issue = Issue { title: "late".into(), ..Issue::default() };
        let message = CreateIssueRequest { issue: Some(issue), ..Default::default() }.encode_to_vec();
        leaving.send(&frame(DATA, END_STREAM, 3, &framed(&message))).await;
        let answer = leaving.next_of(DATA).await.expect("it is cut");
        assert_eq!(answer.stream, 3);
        timeout(SOON, leaving.until_closed()).await.expect("it stays");
    };
    tokio::join!(leaves, until_served(&target));
    assert_eq!(target.count("SELECT count(*) FROM issues").await, 1);
    target.assert_unharmed().await;
}
