use futures_util::{FutureExt, stream::pending};
use http_body_util::{Full, StreamBody};
use uuid::Uuid;

use super::*;
use crate::{
    fairness::{Flow, SharePercent},
    middleware::method_table::RequiredRole,
};

type PendingBody = StreamBody<futures_util::stream::Pending<Result<http_body::Frame<Bytes>>>>;

const SHARE: SharePercent = SharePercent(1);

fn buffers() -> Arc<Buffers> {
    let limits = RequestLimits {
        requests_max: 1,
        metadata_bytes_max: 16 * 1024,
        message_bytes_max: 16 * 1024,
        share: SHARE,
        deadline_default: Duration::from_secs(1),
    };
    BufferingLayer::new(limits).buffers
}

fn flow() -> Flow {
    Flow::User(Uuid::from_u128(1))
}

/// The policy of a mutation that needs credentials.
fn mutation() -> CallPolicy {
    CallPolicy::of(&Request::new(()))
}

/// Begins calls that send no message until one is refused, and returns how many were not.
fn waiting_calls(policy: CallPolicy, metadata_bytes: usize) -> usize {
    let (buffers, mut waiting) = (buffers(), Vec::new());
    loop {
        let buffers = Arc::clone(&buffers);
        let (parts, ()) =
            Request::builder().header("x-large", "x".repeat(metadata_bytes)).body(()).unwrap().into_parts();
        let mut call = Box::pin(async move {
            let (body, mut memory): (PendingBody, _) = (StreamBody::new(pending()), CallMemory::of(flow()));
            buffers.read_request(body, &parts, policy, &mut memory).await
        });
        match (&mut call).now_or_never() {
            None => waiting.push(call),
            Some(outcome) => {
                assert!(matches!(outcome, Err(Error::Exhausted(_))), "{outcome:?}");
                return waiting.len();
            }
        }
    }
}

#[tokio::test]
async fn calls_that_wait_for_their_message_count_with_their_metadata() {
    let share_bytes = SHARE.of(MESSAGE_MEMORY_KIB) as usize * 1024;
    for metadata_bytes in [10, 2 * CALL_BYTES, 4 * CALL_BYTES] {
        let calls = waiting_calls(mutation(), metadata_bytes);
        assert!(calls > 0 && calls * metadata_bytes.max(CALL_BYTES) <= share_bytes, "{calls} of {metadata_bytes}");
    }
    let share_bytes = SHARE.of(UNAUTHENTICATED_MEMORY_KIB) as usize * 1024;
    let login = CallPolicy { required_role: RequiredRole::Unauthenticated, ..mutation() };
    let calls = waiting_calls(login, 12 * 1024);
    assert!(calls > 0 && calls * (12 * 1024 - UNAUTHENTICATED_UNCOUNTED_BYTES) <= share_bytes, "{calls} logins");
}

#[tokio::test]
async fn small_responses_that_are_not_read_count_as_calls() {
    let (buffers, mut unread) = (buffers(), Vec::new());
    let policy = CallPolicy { only_reads: true, ..mutation() };
    while let Ok(response) = buffers.read_response(Full::from("small"), policy, CallMemory::of(flow())).await {
        unread.push(response);
    }
    let share_bytes = SHARE.of(MESSAGE_MEMORY_KIB) as usize * 1024;
    assert!(!unread.is_empty() && unread.len() * CALL_BYTES <= share_bytes, "{}", unread.len());
}

#[tokio::test]
async fn small_responses_do_not_keep_the_buffer_of_their_encoding() {
    let mut buffer = BytesMut::with_capacity(8 * 1024);
    buffer.extend_from_slice(b"small");
    let message = buffer.split().freeze();
    let at = message.as_ptr();
    let policy = CallPolicy { only_reads: true, ..mutation() };
    let response = buffers().read_response(Full::new(message), policy, CallMemory::of(flow())).await;
    assert_ne!(response.unwrap().data.unwrap().as_ptr(), at);
}

#[tokio::test]
async fn mutations_that_were_executed_return_their_responses() {
    let buffers = buffers();
    let (parts, ()) = Request::new(()).into_parts();
    let share_kib = SHARE.of(MESSAGE_MEMORY_KIB);
    let mut executed = Vec::new();
    loop {
        let mut memory = CallMemory::of(flow());
        let message = buffers.read_request(Full::from("change"), &parts, mutation(), &mut memory).await;
        let Ok(message) = message else { break };
        if buffers.reserve_response(mutation(), message.len(), &mut memory).is_err() {
            break;
        }
        executed.push(memory);
    }
    // All of them have the largest response.
    let response = Bytes::from(vec![0; 4 * 1024]);
    let mut unread = Vec::new();
    for memory in executed {
        unread.push(buffers.read_response(Full::new(response.clone()), mutation(), memory).await.unwrap());
    }
    let held_kib: u32 = unread.iter().map(|response| response.memory.kib()).sum();
    assert!((1..=share_kib).contains(&held_kib), "{held_kib} of {share_kib} KiB");
    let other = Flow::User(Uuid::from_u128(2));
    buffers.budget.add(&mut CallMemory::of(other), CALL_BYTES).unwrap();
}

/// The frames of a request.
struct Frames(std::vec::IntoIter<Bytes>);

impl Body for Frames {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<http_body::Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.next().map(|data| Ok(http_body::Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.len() == 0
    }
}

#[tokio::test]
async fn message_of_many_frames_takes_no_more_memory_than_its_size() {
    const FRAME_BYTES: usize = 16 * 1024;
    const BYTES: usize = 2_100_000;
    let mut message = vec![0];
    message.extend((BYTES as u32).to_be_bytes());
    message.resize(MESSAGE_PREFIX_BYTES + BYTES, 7);
    let frames: Vec<_> = message.chunks(FRAME_BYTES).map(Bytes::copy_from_slice).collect();
    let budget = MemoryBudget::new("memory", 0, MESSAGE_MEMORY_KIB, SharePercent(75));
    let mut memory = CallMemory::of(Flow::Internal);
    let read = read_message(Frames(frames.into_iter()), 4 * BYTES, &budget, &mut memory).await.unwrap();
    assert_eq!(read, message);
    let capacity = read.try_into_mut().unwrap().capacity();
    assert!(capacity < message.len() + FRAME_BYTES, "{capacity}");
}
