//! Bodies of calls.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;
use tonic::Code;

use super::{
    HANG, Target, WHO_AM_I,
    http2::{Answer, begin, call, call_on, connect, framed, read_answer, request},
};

const CREATE_ISSUE: &str = "/issuetracker.v1.IssueService/CreateIssue";
const IMPORT_ISSUES: &str = "/issuetracker.v1.ImportService/ImportIssues";
const EXPORT_ISSUES: &str = "/issuetracker.v1.IssueService/ExportIssues";

#[tokio::test]
async fn a_body_that_is_not_one_message_is_told_as_that() {
    let target = Target::start().await;
    let two = [framed(b"\x0a\x00"), framed(b"\x0a\x00")].concat();
    for (what, body, code) in [
        ("none", &b""[..], Code::InvalidArgument),
        ("half a prefix", b"\0\0\0", Code::InvalidArgument),
        ("less than its length", b"\0\0\0\0\x09abc", Code::InvalidArgument),
        ("much less than its length", b"\0\xff\xff\xff\xffabc", Code::InvalidArgument),
        ("compressed, without a word how", b"\x01\0\0\0\x03abc", Code::InvalidArgument),
        ("an unknown flag", b"\x07\0\0\0\x03abc", Code::InvalidArgument),
        ("not what the method takes", b"\0\0\0\0\x03\xff\xff\xff", Code::InvalidArgument),
        ("a message, and half of another", b"\0\0\0\0\x00\0\0", Code::InvalidArgument),
        ("two messages", &two, Code::InvalidArgument),
    ] {
        for path in [CREATE_ISSUE, IMPORT_ISSUES, EXPORT_ISSUES] {
            let answer = call(&target, request(&target, path), Bytes::copy_from_slice(body)).await;
            let Answer::Status { http: 200, grpc: Some(told) } = answer else { panic!("{what}, {path}: {answer:?}") };
            // A stream's first message is answered before the second is looked at.
            let may_be_done = path == EXPORT_ISSUES && body.len() > 5;
            assert!(told == code as i32 || may_be_done && told == 0, "{what}, {path}: {told}");
        }
    }
    assert_eq!(target.count("SELECT count(*) FROM issues").await, 0);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_message_in_pieces_of_one_byte_is_whole() {
    let target = Target::start().await;
    let (answer, mut stream) = begin(&target, CREATE_ISSUE).await;
    let body = framed(b"\x0a\x0b\x12\x09in pieces");
    for byte in &body {
        stream.send_data(Bytes::copy_from_slice(&[*byte]), false).unwrap();
        // So that it goes out alone.
        tokio::task::yield_now().await;
    }
    // What a client says behind its message is not read.
    stream.send_trailers([("x-trailer".parse().unwrap(), "1".parse().unwrap())].into_iter().collect()).unwrap();
    drop(stream);
    timeout(HANG, read_answer(answer)).await.unwrap().unwrap().assert_grpc(Code::Ok);
    let titled = target.count("SELECT count(*) FROM issues WHERE title = 'in pieces'").await;
    assert_eq!(titled, 1);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_before_it_has_come() {
    let target = Target::start().await;
    let (answer, mut stream) = begin(&target, CREATE_ISSUE).await;
    stream.send_data(Bytes::from_static(b"\0\x7f\xff\xff\xff"), false).unwrap();
    let sending = async {
        let piece = Bytes::from(vec![b'x'; 64 * 1024]);
        for _ in 0..1_000 {
            stream.reserve_capacity(piece.len());
            // None, or an error: the service takes no more.
            let Some(Ok(_)) = std::future::poll_fn(|context| stream.poll_capacity(context)).await else { return };
            if stream.send_data(piece.clone(), false).is_err() {
                return;
            }
        }
    };
    let answer = async {
        let answer = tokio::select! {
            answer = read_answer(answer) => answer,
            () = async { sending.await; std::future::pending().await } => unreachable!(),
        };
        answer.unwrap_or_else(Answer::Cut)
    };
    timeout(HANG, answer).await.unwrap().assert_grpc(Code::InvalidArgument);
    drop(stream);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_unary_call_that_is_never_ended_ends_at_its_deadline() {
    let target = Target::start_with(&["--deadline-ms", "700"]).await;
    for body in [framed(b""), Bytes::new(), Bytes::from_static(b"\0\0")] {
        let (answer, mut stream) = begin(&target, WHO_AM_I).await;
        stream.send_data(body, false).unwrap();
        let answer = timeout(HANG, read_answer(answer)).await.expect("it hangs").unwrap_or_else(Answer::Cut);
        answer.assert_grpc(Code::DeadlineExceeded);
    }
    target.assert_unharmed().await;
}

#[tokio::test]
async fn a_call_that_comes_byte_by_byte_and_far_too_slowly_ends_at_its_deadline() {
    let target = Target::start_with(&["--deadline-ms", "700"]).await;
    let (answer, mut stream) = begin(&target, CREATE_ISSUE).await;
    let dripping = async {
        loop {
            let _ = stream.send_data(Bytes::from_static(b"\0"), false);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let answer = tokio::select! {
        answer = timeout(HANG, read_answer(answer)) => answer.expect("it hangs").unwrap_or_else(Answer::Cut),
        () = dripping => unreachable!(),
    };
    answer.assert_grpc(Code::DeadlineExceeded);
    drop(stream);
    target.assert_unharmed().await;
}

#[tokio::test]
async fn an_import_that_is_ended_at_once_or_cut_at_once_leaves_nothing() {
    let target = Target::start().await;
    let before = target.contents().await;
    for _ in 0..20 {
        let answer = call_on(connect(&target).await, request(&target, IMPORT_ISSUES), Bytes::new());
        timeout(HANG, answer).await.unwrap().assert_grpc(Code::InvalidArgument);

        let (_answer, mut stream) = begin(&target, IMPORT_ISSUES).await;
        stream.send_data(Bytes::from_static(b"\0\0\0"), false).unwrap();
        stream.send_reset(h2::Reason::CANCEL);
        target.assert_answers().await;
    }
    assert_eq!(target.contents().await, before);
    target.assert_unharmed().await;
}
