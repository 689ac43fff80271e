//! Much of what is harmless once.

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
use tonic::Code;

use super::{
    HANG, SOON, Target, WHO_AM_I,
    http2::{
        Answer, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PING, RST_STREAM, RawConnection,
        SETTINGS, WINDOW_UPDATE, call, call_block, connect, frame, framed, read_answer, request,
    },
};
use crate::harness::{PASSWORD, Tracker, assert_error, limits};

const MANY: usize = 10_000;
const LOGIN: &str = "/issuetracker.v1.AuthService/Login";

#[tokio::test]
async fn headers_beyond_the_bound_are_refused_however_they_are_cut() {
    let target = Target::start().await;
    for count in [2_000, 20_000] {
        let mut many = request(&target, WHO_AM_I);
        for nth in 0..count {
            many.headers_mut().append(HeaderName::from_static("x-many"), nth.into());
        }
        assert!(!matches!(call(&target, many, framed(b"")).await, Answer::Status { http: 200, grpc: Some(0) }));
        target.assert_answers().await;
    }
    let mut large = request(&target, WHO_AM_I);
    large.headers_mut().insert("x-large", "x".repeat(64 * 1024).parse().unwrap());
    assert!(!matches!(call(&target, large, framed(b"")).await, Answer::Status { http: 200, grpc: Some(0) }));
    target.assert_unharmed().await;
}

#[tokio::test]
async fn headers_that_are_continued_for_ever_end_their_connection() {
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
        target.assert_answers().await;
        assert!(!is_open, "{} frames of {} bytes are taken", MANY * 100, piece.len());
        // It is not only that nobody reads it any more.
        timeout(SOON, raw.until_closed()).await.expect("the connection is kept");
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn streams_that_are_reset_as_fast_as_they_come_cost_their_connection_and_nothing_else() {
    let target = Target::start().await;
    let mut reset = 0;
    let mut connections = 0;
    while reset < MANY {
        connections += 1;
        assert!(connections < MANY, "no connection takes anything");
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
    target.assert_answers().await;
    // By hand, without waiting for anything.
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
async fn pings_and_settings_by_the_ten_thousand_are_answered_or_end_their_connection() {
    let target = Target::start().await;
    let settings = frame(SETTINGS, 0, 0, &[0, 4, 0, 1, 0, 0]);
    for (flood, answer) in [(frame(PING, 0, 0, b"faultfau"), PING), (settings, SETTINGS)] {
        for reads in [true, false] {
            let mut raw = RawConnection::begin(&target, &[]).await;
            let mut is_open = true;
            for _ in 0..MANY / 100 {
                is_open = is_open && raw.send(&flood.repeat(100)).await;
                if reads && is_open {
                    is_open = raw.next_of(answer).await.is_some();
                }
            }
            target.assert_answers().await;
        }
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn an_answer_that_is_never_read_ends_with_its_connection() {
    let target = Target::start_with(&["--deadline-ms", "500", "--keepalive-seconds", "1"]).await;
    let issue = Issue { title: "large".into(), description: "x".repeat(60_000), ..Issue::default() };
    let id = target.member.file_as(issue).await.id;
    for answers_pings in [true, false] {
        // No window for what comes, and one call.
        let mut raw = RawConnection::begin(&target, &[0, 4, 0, 0, 0, 0]).await;
        raw.send(&frame(HEADERS, END_HEADERS, 1, &call_block(&target, "/issuetracker.v1.IssueService/GetIssue"))).await;
        let message = [b"\x0a\x24", id.as_bytes()].concat();
        raw.send(&frame(DATA, END_STREAM, 1, &framed(&message))).await;
        while let Some(next) = raw.next().await {
            assert_ne!(next.kind, DATA, "there is no window for it");
            if next.kind == PING && next.flags == 0 && answers_pings {
                raw.send(&frame(PING, 1, 0, &next.payload)).await;
            }
        }
    }
    target.assert_unharmed().await;
}

/// Reads an answer byte by byte until its connection is closed; tells, as soon as the answer begins, whether it is one.
async fn read_bytewise(mut raw: RawConnection, begun: oneshot::Sender<bool>) {
    let mut begun = Some(begun);
    while let Some(next) = raw.next().await {
        match next.kind {
            HEADERS => {
                let is_answer = next.flags & END_STREAM == 0;
                begun.take().expect("the answer ends before its connection").send(is_answer).unwrap();
                if !is_answer {
                    return;
                }
            }
            DATA => {
                assert!(next.payload.len() <= 1, "there is no window for {} bytes", next.payload.len());
                sleep(Duration::from_millis(20)).await;
                raw.send(&frame(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes())).await;
            }
            PING if next.flags == 0 => drop(raw.send(&frame(PING, 1, 0, &next.payload)).await),
            _ => {}
        }
    }
}

#[tokio::test]
async fn large_answers_that_are_read_byte_by_byte_hold_so_much_memory_and_are_let_go_while_others_are_served() {
    const READERS: usize = 100;
    let target = Target { tracker: Tracker::start_with(limits(&["--deadline-ms", "20000"])).await };
    let member = &target.tracker.member;
    let issue = Issue { title: "large".into(), description: "x".repeat(65_536), ..Issue::default() };
    for _ in 0..3 {
        let request = BatchCreateIssuesRequest { issues: vec![issue.clone(); 16], ..Default::default() };
        member.issues().batch_create_issues(request).await.unwrap();
    }
    let made = member.file_as(Issue { description: "😀".repeat(65_536), ..issue }).await;
    let list = ListIssuesRequest { page_size: 100, ..Default::default() };
    let answer_bytes = member.issues().list_issues(list.clone()).await.unwrap().into_inner().encoded_len();

    let mut readers = JoinSet::new();
    let begin = async |method: &str, message: Vec<u8>| {
        // A window of one byte for each stream.
        let mut raw = RawConnection::begin(&target, &[0, 4, 0, 0, 0, 1]).await;
        let block = call_block(&target, &format!("/issuetracker.v1.IssueService/{method}"));
        raw.send(&frame(HEADERS, END_HEADERS, 1, &block)).await;
        raw.send(&frame(DATA, END_STREAM, 1, &framed(&message))).await;
        raw
    };
    let mut read = |raw: RawConnection| {
        let (sender, has_begun) = oneshot::channel();
        readers.spawn(read_bytewise(raw, sender));
        has_begun
    };
    let mut begun = Vec::new();
    for _ in 0..READERS {
        begun.push(read(begin("ListIssues", list.encode_to_vec()).await));
    }
    let begun = timeout(HANG, join_all(begun)).await.expect("a call is not answered");
    let answers = begun.into_iter().filter(|begun| *begun.as_ref().unwrap()).count();

    assert!(0 < answers && answers < READERS, "{answers}");
    assert!(answers * (answer_bytes - 64 * 1024) <= 256 * 1024 * 1024, "{answers} of {answer_bytes} bytes");
    let refused = member.issues().list_issues(list.clone()).await;
    assert_error(refused, Code::ResourceExhausted, "OVERLOADED");
    // What is left of the room.
    let get = GetIssueRequest { id: made.id.clone(), ..Default::default() };
    let mut get_more = async || timeout(HANG, read(begin("GetIssue", get.encode_to_vec()).await)).await;
    while get_more().await.expect("a call is not answered").unwrap() {}
    let change = Issue { id: made.id.clone(), title: "made, and told so".into(), ..Issue::default() };
    let change = UpdateIssueRequest { issue: Some(change), ..Default::default() };
    assert_eq!(member.issues().update_issue(change).await.unwrap().into_inner().version, 2);
    target.assert_answers().await;
    member.file("small").await;

    while let Some(reader) = timeout(HANG, readers.join_next()).await.expect("a reader is never let go") {
        reader.unwrap();
    }
    member.issues().list_issues(list).await.expect("there is room again");
    target.assert_unharmed().await;
}

#[tokio::test]
async fn windows_that_grow_by_nothing_or_beyond_all_bounds_are_errors() {
    let target = Target::start().await;
    let most = 0x7fff_ffff_u32.to_be_bytes();
    for (stream, increments) in [(0, vec![[0; 4]]), (1, vec![[0; 4]]), (0, vec![most; 2]), (1, vec![most; 2])] {
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
async fn many_calls_of_one_connection_are_answered_or_refused_one_by_one() {
    let target = Target::start().await;
    let requests = connect(&target).await;
    let mut answered = 0;
    let mut calls = JoinSet::new();
    for _ in 0..500 {
        let (requests, request) = (requests.clone(), request(&target, WHO_AM_I));
        calls.spawn(async move { super::http2::call_on(requests, request, framed(b"")).await });
    }
    while let Some(call) = timeout(HANG, calls.join_next()).await.expect("a call hangs") {
        match call.unwrap() {
            Answer::Status { http: 200, grpc: Some(0) } => answered += 1,
            // The client did not yet know how many the service takes; it may try these again.
            Answer::Cut(error) => assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM)),
            // There is one slot.
            refused => refused.assert_grpc(Code::ResourceExhausted),
        }
    }
    assert!(answered > 0);
    drop(requests);
    let _ = call(&target, request(&target, WHO_AM_I), Bytes::new()).await;
    target.assert_unharmed().await;
}

/// They are taken beside the slots for calls, some on each connection; they have five seconds to be sent, and little memory
/// in all.
#[tokio::test]
async fn logins_that_are_half_sent_take_no_slot_and_end_while_others_sign_in() {
    let target = Target::start().await;
    let login = |password: String| LoginRequest { username: "member".into(), password, validate_only: false };
    let whole = framed(&login("x".repeat(15 * 1024)).encode_to_vec());
    let mut calls = JoinSet::new();
    for _ in 0..200 {
        let requests = connect(&target).await;
        for _ in 0..20 {
            let (requests, request, part) = (requests.clone(), request(&target, LOGIN), whole.slice(..14 * 1024));
            calls.spawn(async move {
                let (answer, mut stream) = requests.ready().await.unwrap().send_request(request, false).unwrap();
                let _ = stream.send_data(part, false);
                // The stream is kept as it is until it is answered.
                (read_answer(answer).await.unwrap_or_else(Answer::Cut), stream).0
            });
        }
    }
    let (mut ended, mut refused, mut signed_in) = (0, 0, 0);
    while !calls.is_empty() {
        let client = target.tracker.client_with_token(None);
        client.auth().login(login(PASSWORD.to_owned())).await.expect("others sign in");
        signed_in += 1;
        target.tracker.member.auth().who_am_i(WhoAmIRequest {}).await.expect("the slot is free");
        while let Some(answer) = calls.try_join_next() {
            match answer.unwrap() {
                Answer::Status { http: 200, grpc: Some(grpc) } if grpc == Code::DeadlineExceeded as i32 => ended += 1,
                answer => {
                    answer.assert_grpc(Code::ResourceExhausted);
                    refused += 1;
                }
            }
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(signed_in > 1 && ended > 0, "{signed_in} signed in, {ended} ended");
    // Four on each connection, and such as there is no memory for: there is for 1,260 at once.
    assert!(refused >= 4 * 200, "{refused} refused");
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_token_that_nobody_knows_yet_is_looked_up_for_all_calls_that_come_with_it() {
    let tracker = Tracker::start().await;
    for round in 0..5 {
        let client = tracker.user(&format!("newcomer-{round}"), Role::Member).await;
        let calls = (0..200).map(|_| async { client.auth().who_am_i(WhoAmIRequest {}).await });
        let refused: Vec<_> = join_all(calls).await.into_iter().filter_map(Result::err).collect();
        assert!(refused.is_empty(), "{} of 200: {:?}", refused.len(), refused[0]);
    }
}
