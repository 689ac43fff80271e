//! Connections that are silent, stuck or too many.

use issue_tracker::pb::{ImportIssuesRequest, WhoAmIRequest};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic_health::pb::HealthCheckRequest;

use super::*;
use crate::h2_client::request;
pub(super) use crate::h2_client::{Raw, framed};
use crate::support::bounds::HANG;

impl Raw {
    /// Whether a call is answered.
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
        tokio::time::timeout(HANG, self.connection).await.expect("the connection stays").unwrap();
    }
}

/// Waits until the server closes a connection on which it was only talked to.
async fn closed_by_server(mut tcp: TcpStream) {
    let mut sent = Vec::new();
    // A reset is an end as well.
    let _ = tokio::time::timeout(HANG, tcp.read_to_end(&mut sent)).await.expect("the connection stays");
}

#[tokio::test]
async fn a_connection_without_calls_is_let_go_and_so_is_one_that_never_says_a_word() {
    let tracker = Tracker::start_with(limits(&["--idle-seconds", "1"])).await;
    let silent = TcpStream::connect(&tracker.address).await.unwrap();
    let mut half_greeting = TcpStream::connect(&tracker.address).await.unwrap();
    half_greeting.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
    let mut used = Raw::open(&tracker).await;
    let unused = Raw::open(&tracker).await;
    assert!(used.is_served(&tracker).await);

    closed_by_server(silent).await;
    closed_by_server(half_greeting).await;
    used.closed().await;
    unused.closed().await;

    assert!(Raw::open(&tracker).await.is_served(&tracker).await);
}

#[tokio::test]
async fn a_connection_with_a_call_under_way_is_not_idle() {
    let tracker = Tracker::start_with(limits(&["--idle-seconds", "1"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.until_blocked().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
}

#[tokio::test]
async fn an_old_connection_is_asked_to_go_and_its_calls_may_finish() {
    let tracker = Tracker::start_with(limits(&["--age-seconds", "1"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let mut raw = Raw::open(&tracker).await;
    let (response, mut stream) = raw.begin(&tracker, "IssueService/UpdateIssue").await.unwrap();
    stream.send_data(framed(&retitle(&issue, "changed")), true).unwrap();
    tracker.until_blocked().await;

    eventually("a new call is not taken", async || !raw.is_served(&tracker).await).await;
    assert!(raw.begin(&tracker, "AuthService/WhoAmI").await.is_err());
    lock.release().await;

    let mut answer = response.await.unwrap().into_body();
    assert!(!answer.data().await.unwrap().unwrap().is_empty());
    raw.closed().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap().title, "changed");
}

#[tokio::test]
async fn when_there_is_no_room_the_longest_idle_connection_goes() {
    let tracker = Tracker::start_with(limits(&["--connections", "3"])).await;
    // The tracker's own client has none yet: it connects when it calls.
    let mut longest = Raw::open(&tracker).await;
    assert!(longest.is_served(&tracker).await);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut others = [Raw::open(&tracker).await, Raw::open(&tracker).await];
    for other in &mut others {
        assert!(other.is_served(&tracker).await);
    }
    tokio::time::sleep(Duration::from_millis(1_200)).await;

    let mut newest = Raw::open(&tracker).await;

    assert!(newest.is_served(&tracker).await);
    longest.closed().await;
    for other in &mut others {
        assert!(other.is_served(&tracker).await);
    }
}

#[tokio::test]
async fn when_all_connections_are_busy_a_new_one_is_closed_and_the_calls_go_on() {
    let tracker = Tracker::start_with(limits(&["--connections", "1"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.until_blocked().await;

    closed_by_server(TcpStream::connect(&tracker.address).await.unwrap()).await;

    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
}

#[tokio::test]
async fn when_there_is_no_room_connections_go_that_strangers_keep_busy() {
    let tracker = Tracker::start_with(limits(&["--connections", "2"])).await;
    let mut busy = Raw::open(&tracker).await;
    let (imported, mut import) = busy.begin(&tracker, "ImportService/ImportIssues").await.unwrap();
    let strange = Raw::open(&tracker).await;
    let watch = request(&tracker, "/grpc.health.v1.Health/Watch");
    let (watched, mut stream) = strange.requests.clone().ready().await.unwrap().send_request(watch, false).unwrap();
    stream.send_data(framed(&HealthCheckRequest::default()), true).unwrap();
    let mut watched = watched.await.unwrap().into_body();
    assert!(!watched.data().await.unwrap().unwrap().is_empty());

    // A login would take no longer than it is kept.
    closed_by_server(TcpStream::connect(&tracker.address).await.unwrap()).await;
    eventually("a new connection is served", async || match Raw::open_with(&tracker, 65_535).await {
        Ok(mut new) => new.is_served(&tracker).await,
        Err(_) => false,
    })
    .await;

    strange.closed().await;
    import.send_data(framed(&ImportIssuesRequest::default()), true).unwrap();
    imported.await.unwrap().into_body().trailers().await.unwrap();
}

/// Asks again and again, until its connection is closed.
async fn keep_asking(raw: Raw, request: http::Request<()>) {
    let ask = async || {
        let (answer, mut stream) = raw.requests.clone().ready().await?.send_request(request.clone(), false)?;
        // Who is refused at once need not take it.
        let _ = stream.send_data(framed(&()), true);
        answer.await
    };
    while ask().await.is_ok() {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn when_there_is_no_room_connections_go_whose_calls_nobody_signs_in_for_however_short_these_are() {
    let tracker = Tracker::start_with(limits(&["--connections", "2"])).await;
    let mut unauthorized = request(&tracker, "/issuetracker.v1.AuthService/WhoAmI");
    unauthorized.headers_mut().remove("authorization");
    let mut strangers = Vec::new();
    for request in [unauthorized, request(&tracker, "/grpc.health.v1.Health/Check")] {
        strangers.push(tokio::spawn(keep_asking(Raw::open(&tracker).await, request)));
    }
    let mut served = Vec::new();
    eventually("both have gone", async || {
        if let Ok(mut new) = Raw::open_with(&tracker, 65_535).await
            && new.is_served(&tracker).await
        {
            served.push(new);
        }
        strangers.iter().all(JoinHandle::is_finished)
    })
    .await;
    assert!(!served.is_empty());
}

#[tokio::test]
async fn a_client_that_does_not_read_its_answer_is_let_go() {
    // Long enough for another call to find the only place taken.
    let tracker = Tracker::start_with(limits(&["--deadline-ms", "1500", "--requests", "1"])).await;
    let issue = tracker.member.file("read me").await;
    let mut raw = Raw::open_with(&tracker, 0).await.unwrap();
    let (response, mut stream) = raw.begin(&tracker, "IssueService/GetIssue").await.unwrap();
    let request = GetIssueRequest { id: issue.id.clone(), ..Default::default() };
    stream.send_data(framed(&request), true).unwrap();
    let mut unread = response.await.unwrap().into_body();
    // What it holds, it holds as long as it is not read.
    assert_overloaded(try_get(&tracker.member, &issue).await);

    let cut = tokio::time::timeout(HANG, unread.data()).await.expect("the answer stays");

    assert!(cut.is_none_or(|data| data.is_err()));
    raw.closed().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

/// As where a proxy brings many clients on one connection.
#[tokio::test]
async fn beside_an_answer_that_is_not_read_calls_of_the_same_connection_end_in_peace() {
    let tracker = Tracker::start_with(limits(&["--deadline-ms", "300"])).await;
    let issue = Issue { title: "large".into(), description: "x".repeat(60_000), ..Issue::default() };
    let issue = tracker.member.file_as(issue).await;
    let mut raw = Raw::open_with(&tracker, 2_000).await.unwrap();
    let (unread, mut stream) = raw.begin(&tracker, "IssueService/GetIssue").await.unwrap();
    stream.send_data(framed(&GetIssueRequest { id: issue.id, ..Default::default() }), true).unwrap();
    let _unread = unread.await.unwrap().into_body();
    // Has no deadline, and its messages are yet to come.
    let (imported, mut import) = raw.begin(&tracker, "ImportService/ImportIssues").await.unwrap();

    let asked_to_go = async {
        while raw.begin(&tracker, "AuthService/WhoAmI").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(HANG, asked_to_go).await.expect("the connection is used on");
    import.send_data(framed(&ImportIssuesRequest::default()), true).unwrap();
    let mut answer = imported.await.unwrap().into_body();
    while let Some(data) = answer.data().await {
        data.unwrap();
    }
    answer.trailers().await.unwrap();
    raw.closed().await;
}

#[tokio::test]
async fn a_thousand_idle_connections_do_not_keep_others_out() {
    let tracker = Tracker::start_with(limits(&["--connections", "200"])).await;
    let mut idle = Vec::new();
    for _ in 0..1_000 {
        idle.push(TcpStream::connect(&tracker.address).await.unwrap());
    }
    eventually("a call is answered", async || try_file(&tracker.member, "among them").await.is_ok()).await;
}
