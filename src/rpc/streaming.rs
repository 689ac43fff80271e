//! Server-streaming responses: a task produces messages, and a bounded channel carries them to the client.

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::error::{Error, Result};

/// How long the error that ends a stream waits for a client that does not read.
const ERROR_UNREAD_MAX: Duration = Duration::from_secs(60);

/// The response of a server-streaming RPC.
pub type ResponseStream<T> = ReceiverStream<Result<T, Status>>;

/// The producer's end of a [`ResponseStream`].
pub struct ResponseSender<T> {
    messages: mpsc::Sender<Result<T, Status>>,
}

impl<T> ResponseSender<T> {
    /// Sends a message. Waits while the buffer is full, without a time limit: the caller sets one. Fails with `Cancelled`
    /// when the client has cancelled the call.
    pub async fn send(&self, message: T) -> Result<()> {
        self.messages.send(Ok(message)).await.map_err(|_| Error::Cancelled)
    }

    /// Sends a message if the buffer has room.
    pub fn try_send(&self, message: T) {
        let _ = self.messages.try_send(Ok(message));
    }

    async fn fail(&self, error: Error) {
        // The client may have cancelled or stopped reading. Then no client receives the error.
        let _ = timeout(ERROR_UNREAD_MAX, self.messages.send(Err(error.into()))).await;
    }
}

/// Runs a producer in a task of its own, and returns the stream of what it sends.
///
/// The producer is dropped when the client cancels the call or its deadline passes (`Cancelled`), and when the service stops
/// (`Stopping`). If it fails, its error ends the stream; what it holds is released before. At most
/// `buffered_max` messages wait for the client.
pub fn respond<T, F>(
    buffered_max: usize,
    stopping: CancellationToken,
    produce: impl FnOnce(ResponseSender<T>) -> F,
) -> ResponseStream<T>
where
    T: Send + 'static,
    F: Future<Output = Result<()>> + Send + 'static,
{
    let (messages, stream) = mpsc::channel(buffered_max);
    let sender = ResponseSender { messages: messages.clone() };
    let producer = produce(ResponseSender { messages });
    tokio::spawn(async move {
        let produced = tokio::select! {
            produced = producer => produced,
            () = sender.messages.closed() => Err(Error::Cancelled),
            () = stopping.cancelled() => Err(Error::Stopping),
        };
        if let Err(error) = produced {
            sender.fail(error).await;
        }
    });
    ReceiverStream::new(stream)
}
