//! The lifecycle of client connections: idle and maximum age, eviction, and clients that do not read.

use issue_tracker::pb::{ImportIssuesRequest, WhoAmIRequest};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic_health::pb::HealthCheckRequest;

use super::*;
use crate::h2_client::request;
pub(super) use crate::h2_client::{H2Client, framed};
use crate::support::bounds::HANG;

/// Longer than the deadlines of these tests and the 20 s that a client has after them to read a response.
const READ_GRACE_PASSED: Duration = Duration::from_secs(25);
/// Pings would also close a connection.
const WITHOUT_PINGS: [&str; 2] = ["--keepalive-seconds", "3600"];

impl H2Client {
    /// Returns whether a call succeeds on this connection.
    pub async fn is_served(&mut self, tracker: &Tracker) -> bool {
        let called = async {
            let (response, mut stream) = self.begin(tracker, "AuthService/WhoAmI").await?;
            stream.send_data(framed(&WhoAmIRequest {}), true)?;
            response.await
        };
        called.await.is_ok_and(|response| !response.headers().contains_key("grpc-status"))
    }

    /// Waits until the server has closed the connection.
    pub async fn closed(self) {
        tokio::time::timeout(HANG, self.connection).await.expect("the connection stays open").unwrap();
    }
}

/// Waits until the server closes a connection without a complete HTTP/2 handshake.
async fn closed_by_server(mut tcp: TcpStream) {
    let mut sent = Vec::new();
    // A reset closes the connection, too.
    let _ = tokio::time::timeout(HANG, tcp.read_to_end(&mut sent)).await.expect("the connection stays open");
}

#[tokio::test]
async fn idle_and_silent_connections_are_closed() {
    let tracker = Tracker::start_with(limits(&["--idle-seconds", "1"])).await;
    let silent = TcpStream::connect(&tracker.address).await.unwrap();
    let mut half_preface = TcpStream::connect(&tracker.address).await.unwrap();
    half_preface.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    let mut used = H2Client::open(&tracker).await;
    let unused = H2Client::open(&tracker).await;
    assert!(used.is_served(&tracker).await);

    closed_by_server(silent).await;
    closed_by_server(half_preface).await;
    used.closed().await;
    unused.closed().await;

    assert!(H2Client::open(&tracker).await.is_served(&tracker).await);
}

#[tokio::test]
async fn connection_with_a_call_in_flight_is_not_idle() {
    let tracker = Tracker::start_with(limits(&["--idle-seconds", "1"])).await;
    let (lock, update) = start_blocked_update(&tracker).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
}

#[tokio::test]
async fn connection_at_its_maximum_age_is_closed_after_its_calls_finish() {
    let tracker = Tracker::start_with(limits(&["--age-seconds", "1"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let mut raw = H2Client::open(&tracker).await;
    let (response, mut stream) = raw.begin(&tracker, "IssueService/UpdateIssue").await.unwrap();
    stream.send_data(framed(&retitle(&issue, "changed")), true).unwrap();
    tracker.wait_until_blocked().await;

    eventually("new calls are refused", async || !raw.is_served(&tracker).await).await;
    assert!(raw.begin(&tracker, "AuthService/WhoAmI").await.is_err());
    lock.release().await;

    let mut response = response.await.unwrap().into_body();
    assert!(!response.data().await.unwrap().unwrap().is_empty());
    raw.closed().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap().title, "changed");
}

#[tokio::test]
async fn new_connection_beyond_the_limit_evicts_the_longest_idle_one() {
    let tracker = Tracker::start_with(limits(&["--connections", "3"])).await;
    // The tracker's own client connects on its first call, so it has no connection yet.
    let mut longest = H2Client::open(&tracker).await;
    assert!(longest.is_served(&tracker).await);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut others = [H2Client::open(&tracker).await, H2Client::open(&tracker).await];
    for other in &mut others {
        assert!(other.is_served(&tracker).await);
    }
    tokio::time::sleep(Duration::from_millis(1_200)).await;

    let mut newest = H2Client::open(&tracker).await;

    assert!(newest.is_served(&tracker).await);
    longest.closed().await;
    for other in &mut others {
        assert!(other.is_served(&tracker).await);
    }
}

#[tokio::test]
async fn new_connection_beyond_the_limit_is_closed_when_all_others_are_busy() {
    let tracker = Tracker::start_with(limits(&["--connections", "1"])).await;
    let (lock, update) = start_blocked_update(&tracker).await;

    closed_by_server(TcpStream::connect(&tracker.address).await.unwrap()).await;

    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
}

#[tokio::test]
async fn connection_with_only_unauthenticated_streams_is_evicted() {
    let tracker = Tracker::start_with(limits(&["--connections", "2"])).await;
    let mut busy = H2Client::open(&tracker).await;
    let (imported, mut import) = busy.begin(&tracker, "ImportService/ImportIssues").await.unwrap();
    let unauthenticated = H2Client::open(&tracker).await;
    let watch = request(&tracker, "/grpc.health.v1.Health/Watch");
    let (health_updates, mut stream) =
        unauthenticated.requests.clone().ready().await.unwrap().send_request(watch, false).unwrap();
    stream.send_data(framed(&HealthCheckRequest::default()), true).unwrap();
    let mut health_updates = health_updates.await.unwrap().into_body();
    assert!(!health_updates.data().await.unwrap().unwrap().is_empty());

    // An unauthenticated connection is not evictable for its first 10 s, which leaves time for a login.
    closed_by_server(TcpStream::connect(&tracker.address).await.unwrap()).await;
    advance_clock(Duration::from_secs(10)).await;
    eventually("a new connection is served", async || match H2Client::open_with(&tracker, 65_535).await {
        Ok(mut new) => new.is_served(&tracker).await,
        Err(_) => false,
    })
    .await;

    unauthenticated.closed().await;
    import.send_data(framed(&ImportIssuesRequest::default()), true).unwrap();
    imported.await.unwrap().into_body().trailers().await.unwrap();
}

/// Repeats a call every 300 ms until its connection is closed.
async fn call_until_closed(raw: H2Client, request: http::Request<()>) {
    let call = async || {
        let (response, mut stream) = raw.requests.clone().ready().await?.send_request(request.clone(), false)?;
        // Fails if the server has already rejected the call.
        let _ = stream.send_data(framed(&()), true);
        response.await
    };
    while call().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn connection_with_only_short_unauthenticated_calls_is_evicted() {
    let tracker = Tracker::start_with(limits(&["--connections", "2"])).await;
    let mut without_token = request(&tracker, "/issuetracker.v1.AuthService/WhoAmI");
    without_token.headers_mut().remove("authorization");
    let mut unauthenticated_connections = Vec::new();
    for request in [without_token, request(&tracker, "/grpc.health.v1.Health/Check")] {
        unauthenticated_connections.push(tokio::spawn(call_until_closed(H2Client::open(&tracker).await, request)));
    }
    let mut served = Vec::new();
    eventually("both unauthenticated connections are closed", async || {
        if let Ok(mut new) = H2Client::open_with(&tracker, 65_535).await
            && new.is_served(&tracker).await
        {
            served.push(new);
        }
        unauthenticated_connections.iter().all(JoinHandle::is_finished)
    })
    .await;
    assert!(!served.is_empty());
}

#[tokio::test]
async fn connection_with_an_unread_response_is_closed() {
    let args = [&["--requests", "1"], &WITHOUT_PINGS[..]].concat();
    let tracker = Tracker::start_with(limits(&args)).await;
    let issue = tracker.member.file("read me").await;
    let mut raw = H2Client::open_with(&tracker, 0).await.unwrap();
    let (response, mut stream) = raw.begin(&tracker, "IssueService/GetIssue").await.unwrap();
    let request = GetIssueRequest { id: issue.id.clone(), ..Default::default() };
    stream.send_data(framed(&request), true).unwrap();
    let mut unread = response.await.unwrap().into_body();
    // A call holds its slot until the response is ready.
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);

    advance_clock(READ_GRACE_PASSED).await;
    let data = tokio::time::timeout(HANG, unread.data()).await.expect("the response stays open");

    assert!(data.is_none_or(|data| data.is_err()));
    raw.closed().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

/// A proxy multiplexes many clients over one connection in this way.
#[tokio::test]
async fn unread_response_does_not_fail_other_calls_on_its_connection() {
    let tracker = Tracker::start_with(limits(&[&["--deadline-ms", "300"], &WITHOUT_PINGS[..]].concat())).await;
    let issue = Issue { title: "large".into(), description: "x".repeat(60_000), ..Issue::default() };
    let issue = tracker.member.file_as(issue).await;
    let mut raw = H2Client::open_with(&tracker, 2_000).await.unwrap();
    let (unread, mut stream) = raw.begin(&tracker, "IssueService/GetIssue").await.unwrap();
    stream.send_data(framed(&GetIssueRequest { id: issue.id, ..Default::default() }), true).unwrap();
    let _unread = unread.await.unwrap().into_body();
    // Imports have no default deadline; its messages are sent later.
    let (imported, mut import) = raw.begin(&tracker, "ImportService/ImportIssues").await.unwrap();

    // The service has begun both calls once it serves a later one.
    assert!(raw.is_served(&tracker).await);
    advance_clock(READ_GRACE_PASSED).await;
    let new_calls_refused = async {
        while raw.begin(&tracker, "AuthService/WhoAmI").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(HANG, new_calls_refused).await.expect("the connection accepts new calls");
    import.send_data(framed(&ImportIssuesRequest::default()), true).unwrap();
    let mut response = imported.await.unwrap().into_body();
    while let Some(data) = response.data().await {
        data.unwrap();
    }
    response.trailers().await.unwrap();
    raw.closed().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_prevent_new_ones() {
    let tracker = Tracker::start_with(limits(&["--connections", "200"])).await;
    let mut idle = Vec::new();
    for _ in 0..1_000 {
        idle.push(TcpStream::connect(&tracker.address).await.unwrap());
    }
    eventually("a call succeeds", async || try_file(&tracker.member, "first").await.is_ok()).await;
}
