//! The bodies of requests and answers on their way through the gate.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use hyper::body::Incoming;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, Sleep},
};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::{Status, body::Body};

use super::{deadline_passed, unauthenticated_streams::OpenStream};
use crate::{error::Error, transport::connection::Call};

/// What of an answer is given to the connection at once.
const ANSWER_PIECE_BYTES: usize = 16 * 1024;
/// How long a stream may stand still: longer than imports and exports wait for their client.
pub(super) const STREAM_STILL_MAX: Duration = Duration::from_secs(120);

/// What a request holds until its answer is read.
#[derive(Default)]
pub(super) struct Held {
    pub _slot: Option<OwnedSemaphorePermit>,
    pub _open_stream: Option<OpenStream>,
    pub payload: Vec<OwnedSemaphorePermit>,
}

/// hyper takes a frame whole as soon as the client has room for one byte, and asks for the next when it is sent: whoever
/// does not read is to have little of an answer that nobody counts any more.
pub(super) fn next_piece(data: &mut Option<Bytes>) -> Option<Bytes> {
    let bytes = data.as_mut()?;
    let piece = bytes.split_to(bytes.len().min(ANSWER_PIECE_BYTES));
    if bytes.is_empty() {
        *data = None;
    }
    Some(piece)
}

/// An answer on its way to the client, with all that it holds until it is read.
pub struct Answer {
    pub(super) content: Content,
    pub(super) deadline: Option<Pin<Box<Sleep>>>,
    pub(super) stop: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    pub(super) call: Call,
    pub(super) _held: Held,
}

pub(super) enum Content {
    Unary { data: Option<Bytes>, trailers: Option<HeaderMap> },
    Stream(Body),
}

impl Answer {
    pub(super) fn empty(call: Call) -> Self {
        let content = Content::Unary { data: None, trailers: None };
        Self { content, deadline: None, stop: None, call, _held: Held::default() }
    }

    /// Ends a stream with an error.
    fn end(&mut self, error: Error) -> Option<Result<Frame<Bytes>, Status>> {
        self.content = Content::Unary { data: None, trailers: None };
        let mut trailers = HeaderMap::new();
        Status::from(error).add_header(&mut trailers).ok().map(|()| Ok(Frame::trailers(trailers)))
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let body = match &mut this.content {
            Content::Unary { data, trailers } => {
                let piece = next_piece(data).map(Frame::data);
                let frame = piece.or_else(|| trailers.take().map(Frame::trailers));
                return Poll::Ready(frame.map(Ok));
            }
            Content::Stream(body) => body,
        };
        if let Some(deadline) = &mut this.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(this.end(deadline_passed()));
        }
        let polled = Pin::new(body).poll_frame(context);
        if polled.is_pending()
            && let Some(stop) = &mut this.stop
            && stop.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(this.end(Error::Stopping));
        }
        match &polled {
            // There is nothing to be read, for as long as it takes.
            Poll::Pending => this.call.lasts(),
            Poll::Ready(_) => this.call.lasts_until(Instant::now() + STREAM_STILL_MAX),
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Unary { data, trailers } => data.is_none() && trailers.is_none(),
            Content::Stream(body) => body.is_end_stream(),
        }
    }
}

/// A body that fails when the client resets its stream, which tonic and hyper take for its proper end: half a file would
/// pass for a whole one.
pub(super) struct Uncut(pub Incoming);

impl http_body::Body for Uncut {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let cut = || {
            let message = "the stream was cut".to_owned();
            Some(Err(Status::from(Error::Aborted { reason: "STREAM_CUT", message })))
        };
        match ready!(Pin::new(&mut self.0).poll_frame(context)) {
            Some(Ok(frame)) => Poll::Ready(Some(Ok(frame))),
            None if self.0.is_end_stream() => Poll::Ready(None),
            Some(Err(_)) | None => Poll::Ready(cut()),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}
