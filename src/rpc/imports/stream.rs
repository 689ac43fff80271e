//! `ImportService.ImportIssues`: takes the file from the client, and sends progress, row errors and the summary.
//!
//! In IMPORT_MODE_SKIP_INVALID, a batch is received and parsed while another is written. In IMPORT_MODE_ATOMIC and in dry runs,
//! the whole file is received before any of it is written.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tonic::Streaming;
use uuid::Uuid;

use super::options;
use crate::{
    csv::{Batch, BatchReader, FileError, HeaderError, RowError},
    db::{
        Db,
        imports::{IMPORT_ERRORS_SENT_MAX, IMPORT_ERRORS_STORED_MAX, ImportRun, Started, Written},
    },
    error::{Error, Result, Violation, quote},
    fairness::{FairPermit, FairSemaphore, Flow},
    metrics,
    pb::{
        ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportRowError, import_issues_request,
        import_issues_response::Message,
    },
    rpc::{
        stall_timeout::{MinimumRate, StallTimeout},
        streaming::ResponseSender,
    },
};

/// The maximum size of the data of one chunk.
const IMPORT_CHUNK_BYTES_MAX: usize = 1024 * 1024;
/// 1 KiB/s. A slow source may pause for 10 minutes.
static IMPORT_RATE_MIN: MinimumRate = MinimumRate {
    waited_max: Duration::from_secs(600),
    bytes: 600 * 1024,
    reason: "IMPORT_IDLE",
    missing: "received",
    advice: RESUME,
};
pub(super) const RESUME: &str = "send the file again with the same import_id";

/// The client's end of the response stream.
struct Responses {
    sender: ResponseSender<ImportIssuesResponse>,
    stall_timeout: StallTimeout,
}

impl Responses {
    async fn send(&mut self, message: Message) -> Result<()> {
        let response = ImportIssuesResponse { message: Some(message) };
        self.stall_timeout.wait(self.sender.send(response), "no response read").await?
    }

    /// Sends a message unless too many wait for the client.
    fn try_send(&self, message: Message) {
        self.sender.try_send(ImportIssuesResponse { message: Some(message) });
    }
}

/// Runs an import, and sends progress, row errors and the summary.
pub(super) async fn import(
    db: &Db,
    start: FairPermit,
    imports: &FairSemaphore,
    caller_id: Uuid,
    mut requests: Streaming<ImportIssuesRequest>,
    sender: ResponseSender<ImportIssuesResponse>,
) -> Result<()> {
    let mut stall_timeout = StallTimeout::new(&IMPORT_RATE_MIN);
    let first = next_message(&mut requests, &mut stall_timeout).await?;
    let Some(import_issues_request::Message::Options(options)) = first else {
        return Err(Error::invalid("options", "missing; expected as the first message of the stream"));
    };
    let spec = Arc::new(options::parse(caller_id, options)?);
    // Taken now, so that a client that sends nothing keeps no other import out.
    let _permit = permit(imports, Flow::User(caller_id))?;
    drop(start);
    let mut responses = Responses { sender, stall_timeout: StallTimeout::new(&IMPORT_RATE_MIN) };
    let _in_progress = metrics::in_progress(|metrics| &metrics.imports.in_progress);
    let run = match ImportRun::start(db, Arc::clone(&spec)).await? {
        Started::Running(run) => *run,
        Started::AlreadyFinished(summary) => return responses.send(Message::Summary(summary)).await,
    };
    responses.send(Message::Progress(run.progress())).await?;
    let chunks = Chunks { requests, stall_timeout: StallTimeout::new(&IMPORT_RATE_MIN), total_bytes: spec.total_bytes };
    if spec.is_single_transaction() {
        return receive_then_write(run, chunks, responses).await;
    }
    let (batches, parsed) = mpsc::channel(1);
    let file = run.reader(IMPORT_ERRORS_STORED_MAX);
    tokio::try_join!(read_batches(chunks, file, batches), write_batches(run, parsed, responses))?;
    Ok(())
}

/// The client's messages after the options.
struct Chunks {
    requests: Streaming<ImportIssuesRequest>,
    stall_timeout: StallTimeout,
    /// The announced size of the file; 0 if unknown.
    total_bytes: u64,
}

impl Chunks {
    /// Returns the client's next bytes after those received before, which may be none; `None` at the end of the file. `received`
    /// is where they begin.
    async fn next(&mut self, received: u64) -> Result<Option<bytes::Bytes>> {
        match next_message(&mut self.requests, &mut self.stall_timeout).await? {
            Some(import_issues_request::Message::Chunk(chunk)) => {
                // Bytes received before count too: after a cut, a client may send the file from its start.
                self.stall_timeout.add_bytes(chunk.data.len() as u64);
                metrics::count_by(|metrics| &metrics.imports.bytes, chunk.data.len() as u64);
                new_bytes(&chunk, received).map(Some)
            }
            Some(import_issues_request::Message::Options(_)) => {
                Err(Error::invalid("options", "sent twice; expected only as the first message"))
            }
            None if self.total_bytes != 0 && received != self.total_bytes => Err(Error::InvalidReason {
                reason: "IMPORT_TRUNCATED",
                field: "options.total_bytes",
                message: format!(
                    "options.total_bytes: the stream ended after {received} of {} bytes; send the file again with the same \
                     import_id",
                    self.total_bytes
                ),
            }),
            None => Ok(None),
        }
    }
}

/// Takes a permit for an import or its reversal.
pub(super) fn permit(imports: &FairSemaphore, flow: Flow) -> Result<FairPermit> {
    imports.try_acquire(flow, 1).map_err(|_| Error::Exhausted("too many concurrent imports; retry later".to_owned()))
}

/// Returns the client's next message; `None` when it has half-closed the stream.
async fn next_message(
    requests: &mut Streaming<ImportIssuesRequest>,
    stall_timeout: &mut StallTimeout,
) -> Result<Option<import_issues_request::Message>> {
    match stall_timeout.wait(requests.message(), "no message received").await? {
        Ok(None) => Ok(None),
        Ok(Some(ImportIssuesRequest { message: Some(message) })) => Ok(Some(message)),
        Ok(Some(ImportIssuesRequest { message: None })) => {
            Err(Error::invalid("message", "empty; expected options or a chunk"))
        }
        Err(status) => Err(Error::from_bare(&status)
            .filter(|e| e.code() == tonic::Code::InvalidArgument)
            .unwrap_or(Error::Cancelled)),
    }
}

/// Parses the chunks into batches until the client half-closes the stream.
async fn read_batches(mut chunks: Chunks, mut file: BatchReader, batches: mpsc::Sender<Batch>) -> Result<()> {
    // A closed channel means that `write_batches` has failed. Its error is reported, not this one.
    let send = async |batch| batches.send(batch).await.map_err(|_| Error::Cancelled);
    while let Some(data) = chunks.next(file.offset()).await? {
        let mut data = &data[..];
        while let Some(batch) = file.read(&mut data).map_err(file_error)? {
            send(batch).await?;
        }
    }
    send(file.finish().map_err(file_error)?).await
}

/// Stores the chunks until the client half-closes the stream. Parses them only to count rows and to check the header.
async fn receive(run: &mut ImportRun, mut chunks: Chunks, responses: &mut Responses) -> Result<()> {
    // The errors are reported when the rows are written, in the order of the file.
    let mut file = run.reader(0);
    while let Some(data) = chunks.next(file.offset()).await? {
        let mut unparsed = &data[..];
        while let Some(batch) = file.read(&mut unparsed).map_err(file_error)? {
            responses.stall_timeout.add_bytes(batch.end_offset - run.progress().offset.cast_unsigned());
            run.receive(&batch).await;
            responses.send(Message::Progress(run.progress())).await?;
        }
        run.stage(&data).await?;
    }
    run.receive(&file.finish().map_err(file_error)?).await;
    responses.send(Message::Progress(run.progress())).await
}

/// Receives the whole file, writes it, and then sends the row errors.
async fn receive_then_write(mut run: ImportRun, chunks: Chunks, mut responses: Responses) -> Result<()> {
    if let Err(error) = receive(&mut run, chunks, &mut responses).await {
        run.abandon().await;
        return Err(error);
    }
    // While rows are locked, nothing waits for the client.
    let Written { errors, progress, summary } =
        run.write_staged(|progress| responses.try_send(Message::Progress(progress))).await?;
    for error in errors {
        responses.send(Message::RowError(row_error(error))).await?;
    }
    responses.send(Message::Progress(progress)).await?;
    responses.send(Message::Summary(summary)).await
}

/// Checks a chunk. Returns the part of it that follows the bytes received before.
fn new_bytes(chunk: &ImportChunk, received: u64) -> Result<bytes::Bytes> {
    if chunk.data.len() > IMPORT_CHUNK_BYTES_MAX {
        let message = format!("has {} bytes; at most {IMPORT_CHUNK_BYTES_MAX} are allowed", chunk.data.len());
        return Err(Error::invalid("chunk.data", message));
    }
    let Ok(offset) = u64::try_from(chunk.offset) else {
        return Err(Error::invalid("chunk.offset", format!("{} is negative; expected 0 or more", chunk.offset)));
    };
    let Some(received_before) = received.checked_sub(offset) else {
        return Err(Error::OffsetGap {
            message: format!(
                "chunk.offset: {offset} leaves a gap; {received} bytes were received, continue from there"
            ),
            expected_offset: received.cast_signed(),
        });
    };
    let skipped = usize::try_from(received_before).unwrap_or(usize::MAX).min(chunk.data.len());
    Ok(chunk.data.slice(skipped..))
}

fn file_error(error: FileError) -> Error {
    let violation = |error: HeaderError| {
        let field = match &*error.column {
            "" => "header".to_owned(),
            column => format!("header.{}", quote(column)),
        };
        Violation::new(field, error.message)
    };
    match error {
        FileError::Header(errors) => Error::Invalid(errors.into_iter().map(violation).collect()),
        FileError::Empty => Error::invalid("file", "empty; expected a header line, such as title,description"),
    }
}

/// Writes each batch, and finishes the import after the last one.
async fn write_batches(mut run: ImportRun, mut batches: mpsc::Receiver<Batch>, mut responses: Responses) -> Result<()> {
    // Errors sent before a cut may not have arrived. They are stored, and ListImportErrors returns them.
    let mut sent = run.checkpoint().error_count;
    let mut is_last = false;
    while !is_last {
        let batch = batches.recv().await.ok_or(Error::Cancelled)?;
        is_last = batch.is_last;
        responses.stall_timeout.add_bytes(batch.end_offset - run.checkpoint().offset);
        for error in run.write_batch(&batch).await? {
            if sent < IMPORT_ERRORS_SENT_MAX {
                responses.send(Message::RowError(row_error(error))).await?;
                sent += 1;
            }
        }
        responses.send(Message::Progress(run.progress())).await?;
    }
    responses.send(Message::Summary(run.finish().await)).await
}

fn row_error(error: RowError) -> ImportRowError {
    ImportRowError {
        row_number: error.row_number.cast_signed(),
        line_number: error.line_number.cast_signed(),
        byte_offset: error.byte_offset.cast_signed(),
        column: error.column,
        value: error.value,
        code: error.code.as_str().to_owned(),
        message: error.message,
    }
}
