//! Streams the file to the server: a thread reads chunks into a bounded channel, which HTTP/2 flow control drains.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc as std_mpsc,
    },
    time::Duration,
};

use anyhow::anyhow;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::file_source::FileSource;
use crate::pb::{ImportChunk, ImportIssuesRequest, ImportOptions, import_issues_request::Message};

const CHUNK_BYTES: usize = 256 * 1024;
const CHUNKS_BUFFERED_MAX: usize = 4;
/// A slow source sends an empty chunk after this time. The server's limit between two messages is 60 s.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Reads the file in a thread, once per attempt, each from its own offset.
pub struct ChunkStream {
    commands: std_mpsc::Sender<ReadCommand>,
    source: oneshot::Receiver<FileSource>,
}

/// Has the thread read the file from an offset to its end.
struct ReadCommand {
    offset: u64,
    parts: mpsc::Sender<FilePart>,
    failed: oneshot::Sender<io::Error>,
    /// Cancelled when the attempt has ended. The receiver of `parts` can live longer.
    ended: CancellationToken,
}

enum FilePart {
    Chunk(ImportChunk),
    End,
}

/// The stream of one attempt. The thread stops reading for it when this is dropped.
pub struct AttemptStream {
    commands: std_mpsc::Sender<ReadCommand>,
    parts: Option<mpsc::Sender<FilePart>>,
    ended: DropGuard,
}

impl ChunkStream {
    pub fn new(mut source: FileSource) -> Self {
        let (commands, received) = std_mpsc::channel::<ReadCommand>();
        let (finished, source_back) = oneshot::channel();
        let runtime = Handle::current();
        std::thread::spawn(move || {
            for command in received {
                if let Err(error) = send(&mut source, &command, &runtime) {
                    // The receiver is gone if the attempt has failed already.
                    let _ = command.failed.send(error);
                }
            }
            let _ = finished.send(source);
        });
        Self { commands, source: source_back }
    }

    /// Returns the messages of an attempt: the options, then the chunks that [`AttemptStream::start`] requests. `all_sent`
    /// is set when the stream has ended.
    pub fn requests(
        &self,
        options: ImportOptions,
        all_sent: Arc<AtomicBool>,
    ) -> (AttemptStream, impl Stream<Item = ImportIssuesRequest> + Send + 'static) {
        let (parts, received) = mpsc::channel(CHUNKS_BUFFERED_MAX);
        let attempt = AttemptStream {
            commands: self.commands.clone(),
            parts: Some(parts),
            ended: CancellationToken::new().drop_guard(),
        };
        let request = |message| ImportIssuesRequest { message: Some(message) };
        let options = stream::iter([request(Message::Options(options))]);
        let chunks = chunks(received, all_sent).map(move |chunk| request(Message::Chunk(chunk)));
        (attempt, options.chain(chunks))
    }

    /// Ends the thread and returns the source. All attempts must have ended.
    pub async fn into_source(self) -> anyhow::Result<FileSource> {
        drop(self.commands);
        self.source.await.map_err(|_| anyhow!("the thread that reads the file has failed"))
    }
}

impl AttemptStream {
    /// Sends the file from this offset. The receiver gets an error of reading the file; it is closed when the file is read.
    pub fn start(&mut self, offset: u64) -> oneshot::Receiver<io::Error> {
        let (failed, failure) = oneshot::channel();
        if let Some(parts) = self.parts.take() {
            let command = ReadCommand { offset, parts, failed, ended: self.ended.token().clone() };
            // The thread lives as long as a sender of commands.
            let _ = self.commands.send(command);
        }
        failure
    }
}

fn send(source: &mut FileSource, command: &ReadCommand, runtime: &Handle) -> io::Result<()> {
    source.seek(command.offset)?;
    loop {
        let offset = source.offset().cast_signed();
        let mut data = vec![0; CHUNK_BYTES];
        let count = source.fill(&mut data)?;
        data.truncate(count);
        let is_end = data.is_empty();
        let part =
            if is_end { FilePart::End } else { FilePart::Chunk(ImportChunk { offset, data: Bytes::from(data) }) };
        let is_sent = runtime.block_on(async {
            tokio::select! {
                sent = command.parts.send(part) => sent.is_ok(),
                () = command.ended.cancelled() => false,
            }
        });
        if is_end || !is_sent {
            return Ok(());
        }
    }
}

/// Ends with the file only. The stream of an abandoned attempt never ends: the server would take that for the end of the
/// file.
fn chunks(parts: mpsc::Receiver<FilePart>, all_sent: Arc<AtomicBool>) -> impl Stream<Item = ImportChunk> + Send {
    stream::unfold((parts, 0), move |(mut parts, offset)| {
        let all_sent = Arc::clone(&all_sent);
        async move {
            let chunk = match timeout(SILENCE_MAX, parts.recv()).await {
                Err(_) => ImportChunk { offset, data: Bytes::new() },
                Ok(Some(FilePart::Chunk(chunk))) => chunk,
                Ok(Some(FilePart::End)) => {
                    all_sent.store(true, Ordering::Relaxed);
                    return None;
                }
                Ok(None) => std::future::pending().await,
            };
            let next_offset = chunk.offset + chunk.data.len() as i64;
            Some((chunk, (parts, next_offset)))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Write, pin::pin};

    use super::*;

    fn chunk_stream(bytes: &[u8]) -> ChunkStream {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        ChunkStream::new(FileSource::open(file.path()).unwrap())
    }

    fn data(request: Option<ImportIssuesRequest>) -> (i64, Vec<u8>) {
        match request.unwrap().message.unwrap() {
            Message::Chunk(chunk) => (chunk.offset, chunk.data.to_vec()),
            Message::Options(options) => panic!("{options:?}"),
        }
    }

    #[tokio::test]
    async fn an_abandoned_stream_does_not_end_and_the_next_starts_at_its_offset() {
        let bytes = vec![b'x'; 20 * CHUNK_BYTES];
        let stream = chunk_stream(&bytes);
        let all_sent = Arc::new(AtomicBool::new(false));

        let (mut attempt, requests) = stream.requests(ImportOptions::default(), Arc::clone(&all_sent));
        let mut requests = pin!(requests);
        requests.next().await.unwrap();
        let _failure = attempt.start(0);
        assert_eq!(data(requests.next().await), (0, vec![b'x'; CHUNK_BYTES]));
        drop(attempt);
        // The channel is full and its receiver is alive, but the thread is free.
        let (mut attempt, again) = stream.requests(ImportOptions::default(), Arc::clone(&all_sent));
        let mut again = pin!(again);
        again.next().await.unwrap();
        let _failure = attempt.start(bytes.len() as u64 - 7);
        assert_eq!(data(again.next().await), (bytes.len() as i64 - 7, vec![b'x'; 7]));
        assert!(again.next().await.is_none());
        assert!(all_sent.load(Ordering::Relaxed));

        let abandoned = async { while requests.next().await.is_some() {} };
        assert!(timeout(Duration::from_millis(200), abandoned).await.is_err(), "the stream has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_source_sends_empty_chunks() {
        let (_parts, received) = mpsc::channel(1);
        let mut chunks = pin!(chunks(received, Arc::default()));
        let chunk = chunks.next().await.unwrap();
        assert_eq!((chunk.offset, chunk.data.len()), (0, 0));
    }

    #[tokio::test]
    async fn an_error_of_the_file_is_returned_and_does_not_end_the_stream() {
        let stream = chunk_stream(b"title\n");
        let (mut attempt, requests) = stream.requests(ImportOptions::default(), Arc::default());
        let mut requests = pin!(requests);
        requests.next().await.unwrap();
        let failure = attempt.start(100).await.unwrap();
        assert!(failure.to_string().contains("the file ends at byte 6"), "{failure}");
        assert!(timeout(Duration::from_millis(200), requests.next()).await.is_err(), "the stream has ended");
    }
}
