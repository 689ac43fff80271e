//! The way of the file's bytes to the server: a thread reads them, a bounded channel holds a few chunks, and HTTP/2's
//! flow control empties it.

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

use super::file_source::Source;
use crate::pb::{ImportChunk, ImportIssuesRequest, ImportOptions, import_issues_request::Message};

const CHUNK_BYTES: usize = 256 * 1024;
const CHUNKS_WAITING_MAX: usize = 4;
/// A server takes a client that says nothing for a minute for gone; one whose pipe is slow says something before.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// Reads the file, and reads parts of it again when they are asked for again.
pub struct Feeder {
    orders: std_mpsc::Sender<Order>,
    source: oneshot::Receiver<Source>,
}

/// Sends everything from an offset on.
struct Order {
    offset: u64,
    pieces: mpsc::Sender<Piece>,
    failed: oneshot::Sender<io::Error>,
    /// Nobody takes the pieces any more, even if the channel still stands.
    is_over: CancellationToken,
}

enum Piece {
    Chunk(ImportChunk),
    /// The file's end.
    End,
}

/// One try's end of the channel. The thread stops sending when this goes away.
pub struct Feed {
    orders: std_mpsc::Sender<Order>,
    pieces: Option<mpsc::Sender<Piece>>,
    is_over: DropGuard,
}

impl Feeder {
    pub fn new(mut source: Source) -> Self {
        let (orders, received) = std_mpsc::channel::<Order>();
        let (finished, source_back) = oneshot::channel();
        let runtime = Handle::current();
        std::thread::spawn(move || {
            for order in received {
                if let Err(error) = send(&mut source, &order, &runtime) {
                    // If nobody listens, the try has failed already.
                    let _ = order.failed.send(error);
                }
            }
            let _ = finished.send(source);
        });
        Self { orders, source: source_back }
    }

    /// The stream of a try: the options, then what [`Feed::begin`] sets going. `all_sent` is set when it has ended.
    pub fn requests(
        &self,
        options: ImportOptions,
        all_sent: Arc<AtomicBool>,
    ) -> (Feed, impl Stream<Item = ImportIssuesRequest> + Send + 'static) {
        let (pieces, received) = mpsc::channel(CHUNKS_WAITING_MAX);
        let feed =
            Feed { orders: self.orders.clone(), pieces: Some(pieces), is_over: CancellationToken::new().drop_guard() };
        let request = |message| ImportIssuesRequest { message: Some(message) };
        let options = stream::iter([request(Message::Options(options))]);
        let chunks = chunks(received, all_sent).map(move |chunk| request(Message::Chunk(chunk)));
        (feed, options.chain(chunks))
    }

    /// The source, once no try needs it any more.
    pub async fn into_source(self) -> anyhow::Result<Source> {
        drop(self.orders);
        self.source.await.map_err(|_| anyhow!("the thread that reads the file has failed"))
    }
}

impl Feed {
    /// Sends the file from this offset on. The receiver gets an error of the file's; it is closed when all is read.
    pub fn begin(&mut self, offset: u64) -> oneshot::Receiver<io::Error> {
        let (failed, failure) = oneshot::channel();
        if let Some(pieces) = self.pieces.take() {
            let order = Order { offset, pieces, failed, is_over: self.is_over.token().clone() };
            // The thread lives as long as there is somebody to order.
            let _ = self.orders.send(order);
        }
        failure
    }
}

fn send(source: &mut Source, order: &Order, runtime: &Handle) -> io::Result<()> {
    source.seek(order.offset)?;
    loop {
        let offset = source.offset().cast_signed();
        let mut data = vec![0; CHUNK_BYTES];
        let count = source.fill(&mut data)?;
        data.truncate(count);
        let is_end = data.is_empty();
        let piece = if is_end { Piece::End } else { Piece::Chunk(ImportChunk { offset, data: Bytes::from(data) }) };
        let is_sent = runtime.block_on(async {
            tokio::select! {
                sent = order.pieces.send(piece) => sent.is_ok(),
                () = order.is_over.cancelled() => false,
            }
        });
        if is_end || !is_sent {
            return Ok(());
        }
    }
}

/// Ends only with the file. A try that is given up never ends its stream: the server would take that for the file's end.
fn chunks(pieces: mpsc::Receiver<Piece>, all_sent: Arc<AtomicBool>) -> impl Stream<Item = ImportChunk> + Send {
    stream::unfold((pieces, 0), move |(mut pieces, offset)| {
        let all_sent = Arc::clone(&all_sent);
        async move {
            let chunk = match timeout(SILENCE_MAX, pieces.recv()).await {
                Err(_) => ImportChunk { offset, data: Bytes::new() },
                Ok(Some(Piece::Chunk(chunk))) => chunk,
                Ok(Some(Piece::End)) => {
                    all_sent.store(true, Ordering::Relaxed);
                    return None;
                }
                Ok(None) => std::future::pending().await,
            };
            let next_offset = chunk.offset + chunk.data.len() as i64;
            Some((chunk, (pieces, next_offset)))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{io::Write, pin::pin};

    use super::*;

    fn feeder(bytes: &[u8]) -> Feeder {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        Feeder::new(Source::open(file.path()).unwrap())
    }

    fn data(request: Option<ImportIssuesRequest>) -> (i64, Vec<u8>) {
        match request.unwrap().message.unwrap() {
            Message::Chunk(chunk) => (chunk.offset, chunk.data.to_vec()),
            Message::Options(options) => panic!("{options:?}"),
        }
    }

    #[tokio::test]
    async fn a_try_that_is_given_up_ends_no_stream_and_the_next_goes_on_where_it_is_told() {
        let bytes = vec![b'x'; 20 * CHUNK_BYTES];
        let feeder = feeder(&bytes);
        let all_sent = Arc::new(AtomicBool::new(false));

        let (mut feed, requests) = feeder.requests(ImportOptions::default(), Arc::clone(&all_sent));
        let mut requests = pin!(requests);
        requests.next().await.unwrap();
        let _failure = feed.begin(0);
        assert_eq!(data(requests.next().await), (0, vec![b'x'; CHUNK_BYTES]));
        drop(feed);
        // The channel is full and the stream is there, but the thread is free.
        let (mut feed, again) = feeder.requests(ImportOptions::default(), Arc::clone(&all_sent));
        let mut again = pin!(again);
        again.next().await.unwrap();
        let _failure = feed.begin(bytes.len() as u64 - 7);
        assert_eq!(data(again.next().await), (bytes.len() as i64 - 7, vec![b'x'; 7]));
        assert!(again.next().await.is_none());
        assert!(all_sent.load(Ordering::Relaxed));

        let given_up = async { while requests.next().await.is_some() {} };
        assert!(timeout(Duration::from_millis(200), given_up).await.is_err(), "the stream has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_source_is_not_silence() {
        let (_pieces, received) = mpsc::channel(1);
        let mut chunks = pin!(chunks(received, Arc::default()));
        let chunk = chunks.next().await.unwrap();
        assert_eq!((chunk.offset, chunk.data.len()), (0, 0));
    }

    #[tokio::test]
    async fn an_error_of_the_file_is_told_and_ends_no_stream() {
        let feeder = feeder(b"title\n");
        let (mut feed, requests) = feeder.requests(ImportOptions::default(), Arc::default());
        let mut requests = pin!(requests);
        requests.next().await.unwrap();
        let failure = feed.begin(100).await.unwrap();
        assert!(failure.to_string().contains("it ends at byte 6"), "{failure}");
        assert!(timeout(Duration::from_millis(200), requests.next()).await.is_err(), "the stream has ended");
    }
}
