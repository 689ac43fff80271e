//! Floods: many frames, streams, headers or connections, each of them valid.

use bytes::Bytes;
use futures_util::future::join_all;
use http::HeaderName;
use issue_tracker::pb::{
    BatchCreateIssuesRequest, GetIssueRequest, Issue, ListIssuesRequest, LoginRequest, Role, UpdateIssueRequest,
    WhoAmIRequest,
};
use prost::Message;
use tokio::{
    sync::oneshot,
    task::JoinSet,
    time::{Duration, sleep, timeout},
};
use tonic::{Code, Response};

use super::{
    HANG, SOON, Target, WHO_AM_I,
    http2::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Outcome, PING, RST_STREAM, RawConnection,
        SETTINGS, WINDOW_UPDATE, call, call_block, connect, frame, framed, read_response, request,
    },
};
use crate::{
    h2_client::H2Client,
    harness::{Client, PASSWORD, Tracker, advance_clock, assert_error, limits},
    support::eventually::eventually,
};

const MANY: usize = 10_000;
const LOGIN: &str = "/issuetracker.v1.AuthService/Login";

#[tokio::test]
async fn headers_above_the_size_limit_are_rejected() {
    let target = Target::start().await;
    for count in [2_000, 20_000] {
        let mut many = request(&target, WHO_AM_I);
        for nth in 0..count {
            many.headers_mut().append(HeaderName::from_static("x-many"), nth.into());
        }
        assert!(!matches!(call(&target, many, framed(b"")).await, Outcome::Status { http: 200, grpc: Some(0) }));
        target.assert_serving().await;
    }
    let mut large = request(&target, WHO_AM_I);
    large.headers_mut().insert("x-large", "x".repeat(64 * 1024).parse().unwrap());
    assert!(!matches!(call(&target, large, framed(b"")).await, Outcome::Status { http: 200, grpc: Some(0) }));
    target.assert_unharmed().await;
}

#[tokio::test]
async fn endless_continuation_frames_close_their_connection() {
    let target = Target::start().await;
    for piece in [&b""[..], b"\0\x01x\x01y", &[b'\x20'; 1_000]] {
        let mut raw = RawConnection::begin(&target, &[]).await;
        raw.send(&frame(HEADERS, 0, 1, &call_block(&target, WHO_AM_I))).await;
        let flood = frame(CONTINUATION, 0, 1, piece).repeat(100);
        let mut is_open = true;
        for _ in 0..MANY {
            is_open = raw.send(&flood).await;
            if !is_open {
                break;
            }
        }
        target.assert_serving().await;
        assert!(!is_open, "{} frames of {} bytes are accepted", MANY * 100, piece.len());
        // The service closes the connection, and does not only stop reading from it.
        timeout(SOON, raw.until_closed()).await.expect("the connection stays open");
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn rapid_stream_resets_close_at_most_their_own_connection() {
    let target = Target::start().await;
    let mut reset = 0;
    let mut connections = 0;
    while reset < MANY {
        connections += 1;
        assert!(connections < MANY, "no connection accepts a stream");
        let mut requests = connect(&target).await;
        while reset < MANY {
            let Ok(ready) = timeout(HANG, requests.ready()).await.expect("a connection hangs") else { break };
            requests = ready;
            let Ok((_, mut stream)) = requests.send_request(request(&target, WHO_AM_I), false) else { break };
            stream.send_reset(h2::Reason::CANCEL);
            reset += 1;
            if reset % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
    target.assert_serving().await;
    // The same with hand-made frames, without reading anything.
    let mut raw = RawConnection::begin(&target, &[]).await;
    let block = call_block(&target, WHO_AM_I);
    for stream in 0..MANY as u32 {
        let flood = [
            frame(HEADERS, END_HEADERS, 2 * stream + 1, &block),
            frame(RST_STREAM, 0, 2 * stream + 1, &8_u32.to_be_bytes()),
        ];
        if !raw.send(&flood.concat()).await {
            break;
        }
    }
    drop(raw);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn flood_of_pings_or_settings_is_acknowledged_or_closes_its_connection() {
    let target = Target::start().await;
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
    for (flood, acknowledgement) in [(frame(PING, 0, 0, b"faultfau"), PING), (settings, SETTINGS)] {
        for reads in [true, false] {
            let mut raw = RawConnection::begin(&target, &[]).await;
            let mut is_open = true;
            for _ in 0..MANY / 100 {
                is_open = is_open && raw.send(&flood.repeat(100)).await;
                if reads && is_open {
                    is_open = raw.next_of(acknowledgement).await.is_some();
                }
            }
            target.assert_serving().await;
        }
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn connection_with_an_unread_response_is_closed() {
    let target = Target::start_with(&["--deadline-ms", "500", "--keepalive-seconds", "1"]).await;
    let issue = Issue { title: "large".into(), description: "x".repeat(60_000), ..Issue::default() };
    let id = target.member.file_as(issue).await.id;
    for acknowledges_pings in [true, false] {
        // An initial window of 0 bytes.
        let mut raw = RawConnection::begin(&target, &[0, 4, 0, 0, 0, 0]).await;
        raw.send(&frame(HEADERS, END_HEADERS, 1, &call_block(&target, "/issuetracker.v1.IssueService/GetIssue"))).await;
        let message = [b"\x0a\x24", id.as_bytes()].concat();
        raw.send(&frame(DATA, END_STREAM, 1, &framed(&message))).await;
        while let Some(next) = raw.next().await {
            assert_ne!(next.kind, DATA, "data arrives without a window");
            if next.kind == PING && next.flags == 0 && acknowledges_pings {
                raw.send(&frame(PING, 1, 0, &next.payload)).await;
            }
        }
    }
    target.assert_unharmed().await;
}

/// Reads a response one byte every 20 ms until the connection is closed. Sends, as soon as the response begins, whether
/// the call was admitted.
async fn read_bytewise(mut raw: RawConnection, admitted: oneshot::Sender<bool>) {
    let mut admitted = Some(admitted);
    while let Some(next) = raw.next().await {
        match next.kind {
            HEADERS => {
                let is_admitted = next.flags & END_STREAM == 0;
                admitted.take().expect("the response ends before its connection").send(is_admitted).unwrap();
                if !is_admitted {
                    return;
                }
            }
            DATA => {
                assert!(next.payload.len() <= 1, "{} bytes arrive in a window of 1", next.payload.len());
                sleep(Duration::from_millis(20)).await;
                raw.send(&frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes())).await;
            }
            PING if next.flags == 0 => drop(raw.send(&frame(PING, 1, 0, &next.payload)).await),
            _ => {}
        }
    }
}

#[tokio::test]
async fn slow_readers_of_large_responses_hold_bounded_memory_and_are_disconnected() {
    const READERS: usize = 100;
    // Pings would also disconnect readers.
    let args = ["--deadline-ms", "20000", "--keepalive-seconds", "3600"];
    let target = Target { tracker: Tracker::start_with(limits(&args)).await };
    let member = &target.tracker.member;
    let issue = Issue { title: "large".into(), description: "x".repeat(65_536), ..Issue::default() };
    for _ in 0..3 {
        let request = BatchCreateIssuesRequest { issues: vec![issue.clone(); 16], ..Default::default() };
        member.issues().batch_create_issues(request).await.unwrap();
    }
    let large = member.file_as(Issue { description: "😀".repeat(65_536), ..issue }).await;
    let list = ListIssuesRequest { page_size: 100, ..Default::default() };
    let response_bytes = member.issues().list_issues(list.clone()).await.unwrap().into_inner().encoded_len();

    let mut readers = JoinSet::new();
    let begin = async |method: &str, message: Vec<u8>| {
        // An initial window of 1 byte.
        let mut raw = RawConnection::begin(&target, &[0, 4, 0, 0, 0, 1]).await;
        let block = call_block(&target, &format!("/issuetracker.v1.IssueService/{method}"));
        raw.send(&frame(HEADERS, END_HEADERS, 1, &block)).await;
        raw.send(&frame(DATA, END_STREAM, 1, &framed(&message))).await;
        raw
    };
    let mut read = |raw: RawConnection| {
        let (sender, admitted) = oneshot::channel();
        readers.spawn(read_bytewise(raw, sender));
        admitted
    };
    let mut outcomes = Vec::new();
    for _ in 0..READERS {
        outcomes.push(read(begin("ListIssues", list.encode_to_vec()).await));
    }
    let outcomes = timeout(HANG, join_all(outcomes)).await.expect("a call hangs");
    let admitted = outcomes.into_iter().filter(|admitted| *admitted.as_ref().unwrap()).count();

    assert!(0 < admitted && admitted < READERS, "{admitted}");
    assert!(admitted * (response_bytes - 64 * 1024) <= 256 * 1024 * 1024, "{admitted} of {response_bytes} bytes");
    let refused = member.issues().list_issues(list.clone()).await;
    assert_error(refused, Code::ResourceExhausted, "OVERLOADED");
    // Smaller responses use up the rest of the memory budget.
    let get = GetIssueRequest { id: large.id.clone(), ..Default::default() };
    let mut get_more = async || timeout(HANG, read(begin("GetIssue", get.encode_to_vec()).await)).await;
    while get_more().await.expect("a call hangs").unwrap() {}
    // A mutation whose response might exceed it is not executed.
    let change = Issue { id: large.id.clone(), title: "changed".into(), ..Issue::default() };
    let change = UpdateIssueRequest { issue: Some(change), ..Default::default() };
    assert_error(member.issues().update_issue(change).await, Code::ResourceExhausted, "OVERLOADED");
    assert_eq!(target.count("SELECT count(*) FROM issues WHERE version > 1").await, 0);
    target.assert_serving().await;
    member.file("small").await;

    // The deadline, and the 20 s that clients have after it to read a response.
    advance_clock(Duration::from_secs(41)).await;
    while let Some(reader) = timeout(HANG, readers.join_next()).await.expect("a reader is never disconnected") {
        reader.unwrap();
    }
    member.issues().list_issues(list).await.expect("the memory is free again");
    target.assert_unharmed().await;
}

/// Each mutation either returns its response or is not executed, and the responses of one user fit into its share.
#[tokio::test]
async fn unread_responses_of_mutations_hold_the_share_of_their_user_at_most() {
    const CALLS: usize = 60;
    const WAVES: usize = 3;
    const ISSUES: &str = "INSERT INTO issues (id, reporter_id, status, priority, title, description)
        SELECT gen_random_uuid(), users.id, 1, 0, 'large', repeat('😀', 65536)
        FROM users, generate_series(1, 60) WHERE username = 'member'";
    // One user may have 25.6 MiB.
    let args = ["--requests", "1000", "--user-share-percent", "10", "--pool-connections", "12"];
    let tracker = Tracker::start_with(limits(&args)).await;
    tracker.session().await.batch_execute(ISSUES).await.unwrap();
    let ids = tracker.sql("SELECT id::text FROM issues", &[]).await;
    let update = |nth: usize| {
        let issue = Issue { id: ids[nth % CALLS].get(0), title: format!("changed {nth}"), ..Issue::default() };
        UpdateIssueRequest { issue: Some(issue), ..Default::default() }
    };
    let update_as = async |client: &Client| client.issues().update_issue(update(0)).await.map(Response::into_inner);
    let bytes = update_as(&tracker.admin).await.unwrap().encoded_len();

    let (mut unread, mut admitted) = (Vec::new(), 0);
    for wave in 1..=WAVES {
        let mut client = H2Client::open_with(&tracker, 0).await.unwrap();
        let mut heads = Vec::new();
        for nth in 0..CALLS {
            let (response, mut stream) = client.begin(&tracker, "IssueService/UpdateIssue").await.unwrap();
            stream.send_data(framed(&update(wave * CALLS + nth).encode_to_vec()), true).unwrap();
            heads.push(response);
        }
        let heads = timeout(HANG, join_all(heads)).await.expect("a call hangs");
        let refused = heads.iter().filter(|head| head.as_ref().unwrap().headers().contains_key("grpc-status"));
        admitted += CALLS - refused.count();
        unread.push((client, heads));
    }

    assert!((1..WAVES * CALLS).contains(&admitted), "{admitted} responses");
    assert!(admitted * bytes <= 256 * 1024 * 1024 / 10, "{admitted} responses of {bytes} bytes");
    let executed = "SELECT count(*) FROM issue_events JOIN users ON users.id = actor_id WHERE username = 'member'";
    assert_eq!(tracker.count(executed).await, admitted as i64);
    update_as(&tracker.admin).await.expect("another user's update is admitted");
    drop(unread);
    eventually("the memory is free again", async || update_as(&tracker.member).await.is_ok()).await;
}

#[tokio::test]
async fn zero_or_overflowing_window_update_is_an_error() {
    let target = Target::start().await;
    let maximum = 0x7fff_ffff_u32.to_be_bytes();
    for (stream, increments) in [(0, vec![[0; 4]]), (1, vec![[0; 4]]), (0, vec![maximum; 2]), (1, vec![maximum; 2])] {
        let mut raw = RawConnection::begin(&target, &[]).await;
        raw.send(&frame(HEADERS, END_HEADERS, 1, &call_block(&target, WHO_AM_I))).await;
        for increment in increments {
            raw.send(&frame(WINDOW_UPDATE, 0, stream, &increment)).await;
        }
        loop {
            match raw.next().await {
                None => break,
                Some(frame) if [GOAWAY, RST_STREAM].contains(&frame.kind) => break,
                Some(_) => {}
            }
        }
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn excess_calls_of_one_connection_are_refused_individually() {
    let target = Target::start().await;
    let requests = connect(&target).await;
    let mut succeeded = 0;
    let mut calls = JoinSet::new();
    for _ in 0..500 {
        let (requests, request) = (requests.clone(), request(&target, WHO_AM_I));
        calls.spawn(async move { super::http2::call_on(requests, request, framed(b"")).await });
    }
    while let Some(call) = timeout(HANG, calls.join_next()).await.expect("a call hangs") {
        match call.unwrap() {
            Outcome::Status { http: 200, grpc: Some(0) } => succeeded += 1,
            // The client did not know the maximum of concurrent streams yet; it may retry these.
            Outcome::Reset(error) => assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM)),
            // The service admits one request at a time.
            refused => refused.assert_grpc(Code::ResourceExhausted),
        }
    }
    assert!((1..500).contains(&succeeded), "{succeeded} of 500 succeeded");
    drop(requests);
    let _ = call(&target, request(&target, WHO_AM_I), Bytes::new()).await;
    target.assert_unharmed().await;
}

/// Logins have permits apart from those of other requests: a limited number per connection, and a memory budget for all.
/// A login must be sent within 5 s.
#[tokio::test]
async fn incomplete_logins_take_no_request_permits_and_time_out() {
    let target = Target::start().await;
    let login = |password: String| LoginRequest { username: "member".into(), password, validate_only: false };
    let whole = framed(&login("x".repeat(15 * 1024)).encode_to_vec());
    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let requests = connect(&target).await;
        for _ in 0..20 {
            let (requests, request, part) = (requests.clone(), request(&target, LOGIN), whole.slice(..14 * 1024));
            calls.spawn(async move {
                let (response, mut stream) = requests.ready().await.unwrap().send_request(request, false).unwrap();
                let _ = stream.send_data(part, false);
                // Keeps the stream open until the response arrives.
                (read_response(response).await.unwrap_or_else(Outcome::Reset), stream).0
            });
        }
    }
    let (mut timed_out, mut refused, mut logins) = (0, 0, 0);
    while !calls.is_empty() {
        let client = target.tracker.client_with_token(None);
        client.auth().login(login(PASSWORD.to_owned())).await.expect("a complete login succeeds");
        logins += 1;
        target.tracker.member.auth().who_am_i(WhoAmIRequest {}).await.expect("the request permit is free");
        while let Some(call) = calls.try_join_next() {
            match call.unwrap() {
                Outcome::Status { http: 200, grpc: Some(grpc) } if grpc == Code::DeadlineExceeded as i32 => {
                    timed_out += 1
                }
                outcome => {
                    outcome.assert_grpc(Code::ResourceExhausted);
                    refused += 1;
                }
            }
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(logins > 1 && timed_out > 0, "{logins} logins, {timed_out} timed out");
    // Four on each connection exceed its limit. Others exceed the memory budget, which suffices for 1,117 of one client.
    assert!(refused >= 4 * 200, "{refused} refused");
    target.assert_unharmed().await;
}

#[tokio::test]
async fn concurrent_calls_with_an_uncached_token_all_succeed() {
    let tracker = Tracker::start().await;
    for round in 0..5 {
        let client = tracker.user(&format!("newcomer-{round}"), Role::Member).await;
        let calls = (0..200).map(|_| async { client.auth().who_am_i(WhoAmIRequest {}).await });
        let refused: Vec<_> = join_all(calls).await.into_iter().filter_map(Result::err).collect();
        assert!(refused.is_empty(), "{} of 200: {:?}", refused.len(), refused[0]);
    }
}
