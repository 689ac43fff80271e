//! A buffered response that is dropped if its client reads it too slowly.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::memory_budget::CallMemory;
use crate::error::Error;

/// How much of a response is passed to the connection in one piece.
///
/// hyper takes a whole frame as soon as the client has window for one byte, and asks for the next one when it is sent. In
/// pieces, a client that does not read leaves little memory uncounted.
const PIECE_BYTES: usize = 16 * 1024;
/// The rate at which a client must read a response, once it had [`READ_START_MAX`].
const READ_BYTES_PER_SECOND_MIN: usize = 64 * 1024;
const READ_START_MAX: Duration = Duration::from_secs(5);

/// A response of one message that its client has not read yet.
pub enum UnreadResponse {
    /// It fits into one piece, which waits in the connection.
    Small(Remaining),
    Large {
        remaining: Arc<Mutex<Option<Remaining>>>,
        /// Takes what remains when the time to read it is over.
        _timer: AbortOnDropHandle<()>,
    },
    /// The client was sent an error because it read too slowly.
    Ended,
}

/// The part of a response that the connection has not taken.
pub struct Remaining {
    pub data: Option<Bytes>,
    pub trailers: Option<HeaderMap>,
    pub(super) memory: CallMemory,
    /// Whether the connection has taken a part of the message.
    is_split: bool,
}

impl UnreadResponse {
    /// Starts the time that the client has to read the response; see [`UnreadResponse::read_max`].
    pub fn new(response: Remaining) -> Self {
        let bytes = response.bytes();
        if bytes <= PIECE_BYTES {
            return Self::Small(response);
        }
        let remaining = Arc::new(Mutex::new(Some(response)));
        let too_late = Arc::clone(&remaining);
        let timer = tokio::spawn(async move {
            sleep(Self::read_max(bytes)).await;
            drop(too_late.lock().unwrap_or_else(PoisonError::into_inner).take());
        });
        Self::Large { remaining, _timer: AbortOnDropHandle::new(timer) }
    }

    /// Returns how long a client may take to read a response of this size.
    pub fn read_max(bytes: usize) -> Duration {
        READ_START_MAX + Duration::from_secs(1).mul_f64(bytes as f64 / READ_BYTES_PER_SECOND_MIN as f64)
    }

    pub fn next_frame(&mut self) -> Option<Frame<Bytes>> {
        let frame = match self {
            Self::Small(remaining) => return remaining.next_frame(),
            Self::Large { remaining, .. } => {
                let mut remaining = remaining.lock().unwrap_or_else(PoisonError::into_inner);
                remaining.as_mut().map(Remaining::next_frame)
            }
            Self::Ended => return None,
        };
        frame.unwrap_or_else(|| {
            *self = Self::Ended;
            let message = "the response was read at less than 64 KiB/s; read it continuously".to_owned();
            let mut trailers = HeaderMap::new();
            Status::from(Error::Timeout { reason: "RESPONSE_UNREAD", message }).add_header(&mut trailers).ok()?;
            Some(Frame::trailers(trailers))
        })
    }

    pub fn is_end(&self) -> bool {
        match self {
            Self::Small(remaining) => remaining.is_end(),
            Self::Large { remaining, .. } => {
                let remaining = remaining.lock().unwrap_or_else(PoisonError::into_inner);
                remaining.as_ref().is_some_and(Remaining::is_end)
            }
            Self::Ended => true,
        }
    }
}

impl Remaining {
    pub(super) fn new(memory: CallMemory) -> Self {
        Self { data: None, trailers: None, memory, is_split: false }
    }

    pub fn bytes(&self) -> usize {
        self.data.as_ref().map_or(0, Bytes::len)
    }

    fn next_frame(&mut self) -> Option<Frame<Bytes>> {
        let Some(data) = &mut self.data else { return self.trailers.take().map(Frame::trailers) };
        if !self.is_split && data.len() <= PIECE_BYTES {
            return self.data.take().map(Frame::data);
        }
        self.is_split = true;
        // A copy: a part of the message would keep all of it in memory while it waits in the connection.
        let piece = Bytes::copy_from_slice(&data.split_to(data.len().min(PIECE_BYTES)));
        if data.is_empty() {
            self.data = None;
        }
        Some(Frame::data(piece))
    }

    fn is_end(&self) -> bool {
        self.data.is_none() && self.trailers.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fairness::Flow;

    fn response(bytes: usize) -> UnreadResponse {
        let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("grpc-status"), 0.into())]);
        let mut response = Remaining::new(CallMemory::of(Flow::Internal));
        (response.data, response.trailers) = (Some(vec![7; bytes].into()), Some(trailers));
        UnreadResponse::new(response)
    }

    fn status(frame: &Frame<Bytes>) -> Option<&str> {
        frame.trailers_ref()?.get("grpc-status")?.to_str().ok()
    }

    #[tokio::test(start_paused = true)]
    async fn response_that_is_read_in_time_is_complete() {
        for bytes in [1, PIECE_BYTES, 1024 * 1024] {
            let mut response = response(bytes);
            let mut read = 0;
            let last = loop {
                assert!(!response.is_end());
                sleep(Duration::from_millis(200)).await;
                match response.next_frame().unwrap().into_data() {
                    Ok(data) => read += data.len(),
                    Err(frame) => break frame,
                }
            };
            assert_eq!((read, status(&last)), (bytes, Some("0")));
            assert!(response.is_end() && response.next_frame().is_none());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn large_response_that_is_read_too_slowly_is_dropped_and_ends_with_an_error() {
        let bytes = 1024 * 1024;
        let mut response = response(bytes);
        assert!(response.next_frame().unwrap().is_data());
        let UnreadResponse::Large { remaining, .. } = &response else { panic!("a response of 1 MiB is large") };
        let remaining = Arc::clone(remaining);
        sleep(UnreadResponse::read_max(bytes) - Duration::from_millis(1)).await;
        assert!(remaining.lock().unwrap().is_some());
        sleep(Duration::from_millis(2)).await;
        assert!(remaining.lock().unwrap().is_none(), "what it holds is dropped although the client does not read");
        assert_eq!(status(&response.next_frame().unwrap()), Some("4"));
        assert!(response.is_end() && response.next_frame().is_none());
    }
}
