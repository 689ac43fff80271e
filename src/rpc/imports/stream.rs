//! A file that is streamed in: its bytes to rows on one side, rows to the database on the other, a batch between them.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use uuid::Uuid;

use super::{
    options,
    stall_timeout::{IMPORT_IDLE_MAX, Patience},
};
use crate::{
    csv::{Columns, HeaderFault, Record, RecordReader, RowError, parse_row},
    db::{
        Db,
        imports::{
            Batch, IMPORT_ERRORS_KEPT_MAX, IMPORT_ERRORS_SENT_MAX, ImportSession, ImportTask, ImportTotals, Opened,
        },
    },
    error::{Error, Result, Violation, quote},
    pb::{
        ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportProgress, ImportRowError, import_issues_request,
        import_issues_response::Message,
    },
};

/// Bytes of a file in one message.
const IMPORT_CHUNK_BYTES_MAX: usize = 1024 * 1024;
/// Rows that are written at once, by whichever bound is reached first. Their number also decides where SKIP_INVALID
/// commits, so it must not depend on how the stream is cut.
const IMPORT_BATCH_ROWS_MAX: usize = 5_000;
const IMPORT_BATCH_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// Messages that wait for the client to read them.
pub(super) const IMPORT_ANSWERS_WAITING_MAX: usize = 16;

/// The way back to the client.
pub(super) struct Client {
    pub answers: mpsc::Sender<Result<ImportIssuesResponse, Status>>,
}

impl Client {
    async fn send(&self, message: Message, patience: &mut Patience) -> Result<()> {
        let answer = ImportIssuesResponse { message: Some(message) };
        let sent = patience.wait(self.answers.send(Ok(answer)), "the client has not read its answers").await?;
        sent.map_err(|_| Error::Cancelled)
    }

    pub async fn fail(&self, error: Error) {
        // If the client has gone away or does not read, there is nobody to tell.
        let _ = tokio::time::timeout(IMPORT_IDLE_MAX, self.answers.send(Err(error.into()))).await;
    }
}

/// Makes an import, and tells the client how it goes.
pub(super) async fn import(
    db: &Db,
    caller_id: Uuid,
    mut requests: Streaming<ImportIssuesRequest>,
    client: &Client,
) -> Result<()> {
    let mut patience = Patience::default();
    let first = next_message(&mut requests, &mut patience).await?;
    let Some(import_issues_request::Message::Options(options)) = first else {
        return Err(Error::invalid("options", "must be the first message of the stream"));
    };
    let task = Arc::new(options::read(caller_id, options)?);
    let session = match ImportSession::open(db, Arc::clone(&task)).await? {
        Opened::Session(session) => *session,
        Opened::Finished(summary) => return client.send(Message::Summary(summary), &mut patience).await,
    };
    client.send(progress(&task, session.totals()), &mut patience).await?;
    let file = FileReader::new(Arc::clone(&task), &session);
    // While a batch is written, the next is read.
    let (batches, written) = mpsc::channel(1);
    tokio::try_join!(
        async move { read_file(requests, file, batches).await },
        write_batches(session, &task, written, client)
    )?;
    Ok(())
}

/// None: the client has half-closed the stream.
async fn next_message(
    requests: &mut Streaming<ImportIssuesRequest>,
    patience: &mut Patience,
) -> Result<Option<import_issues_request::Message>> {
    match patience.wait(requests.message(), "nothing was sent").await? {
        Ok(None) => Ok(None),
        Ok(Some(ImportIssuesRequest { message: Some(message) })) => Ok(Some(message)),
        Ok(Some(ImportIssuesRequest { message: None })) => {
            Err(Error::invalid("message", "has neither options nor a chunk"))
        }
        Err(status) => Err(Error::from_bare(&status)
            .filter(|e| e.code() == tonic::Code::InvalidArgument)
            .unwrap_or(Error::Cancelled)),
    }
}

/// Reads the file to its end, and hands it on in batches.
async fn read_file(
    mut requests: Streaming<ImportIssuesRequest>,
    mut file: FileReader,
    batches: mpsc::Sender<Batch>,
) -> Result<()> {
    let mut patience = Patience::default();
    while let Some(message) = next_message(&mut requests, &mut patience).await? {
        let import_issues_request::Message::Chunk(chunk) = message else {
            return Err(Error::invalid("options", "must be sent once, as the first message"));
        };
        // What was received before counts as well: a client may send the file from its start again.
        patience.progressed(chunk.data.len() as u64);
        let data = new_bytes(&chunk, file.records.offset())?;
        let mut data = &data[..];
        while let Some(batch) = file.read(&mut data)? {
            // A receiver that is gone has failed, and says why.
            batches.send(batch).await.map_err(|_| Error::Cancelled)?;
        }
    }
    let (offset, total_bytes) = (file.records.offset(), file.task.total_bytes);
    if total_bytes != 0 && offset != total_bytes {
        return Err(Error::InvalidReason {
            reason: "IMPORT_TRUNCATED",
            field: "options.total_bytes",
            message: format!(
                "the stream ended after {offset} of {total_bytes} bytes; send the file again with the same import_id"
            ),
        });
    }
    let last = file.finish()?;
    batches.send(last).await.map_err(|_| Error::Cancelled)
}

/// The part of a chunk that was not received before.
fn new_bytes(chunk: &ImportChunk, received: u64) -> Result<bytes::Bytes> {
    if chunk.data.len() > IMPORT_CHUNK_BYTES_MAX {
        let message =
            format!("has {} bytes, at most {IMPORT_CHUNK_BYTES_MAX} are taken in one message", chunk.data.len());
        return Err(Error::invalid("chunk.data", message));
    }
    let Ok(offset) = u64::try_from(chunk.offset) else {
        return Err(Error::invalid("chunk.offset", format!("must not be negative, is {}", chunk.offset)));
    };
    let Some(known) = received.checked_sub(offset) else {
        return Err(Error::OffsetGap {
            message: format!("chunk.offset: is {offset}, but only {received} bytes were received; send from there"),
            expected_offset: received.cast_signed(),
        });
    };
    let known = usize::try_from(known).unwrap_or(usize::MAX).min(chunk.data.len());
    Ok(chunk.data.slice(known..))
}

/// Bytes to batches.
struct FileReader {
    task: Arc<ImportTask>,
    records: RecordReader,
    columns: Option<Arc<Columns>>,
    batch: Batch,
    batch_start: u64,
    /// Errors that were given to batches: those beyond the bound are only counted.
    errors_given: usize,
}

impl FileReader {
    /// From where the import begins or goes on.
    fn new(task: Arc<ImportTask>, session: &ImportSession) -> Self {
        let totals = session.totals();
        let records = match session.columns() {
            None => RecordReader::new(),
            Some(_) => RecordReader::starting_at(totals.offset, totals.row_count + 1, totals.line_number),
        };
        Self {
            records: records.separated_by(task.format.separator),
            columns: session.columns().cloned(),
            batch: Batch { offset: totals.offset, line_number: totals.line_number, ..Batch::default() },
            batch_start: totals.offset,
            errors_given: 0,
            task,
        }
    }

    /// A batch if one is full; none when the bytes are used up.
    fn read(&mut self, data: &mut &[u8]) -> Result<Option<Batch>> {
        while let Some(record) = self.records.read(data) {
            let given = &mut self.errors_given;
            take_record(&self.task, &mut self.columns, &mut self.batch, given, &record)?;
            let rows = self.batch.rows.len() as u64 + self.batch.rejected_count;
            if rows >= IMPORT_BATCH_ROWS_MAX as u64 || self.batch.offset - self.batch_start >= IMPORT_BATCH_BYTES_MAX {
                self.batch_start = self.batch.offset;
                let next = Batch { offset: self.batch.offset, line_number: self.batch.line_number, ..Batch::default() };
                let full = std::mem::replace(&mut self.batch, next);
                return Ok(Some(Batch { columns: self.columns.clone(), ..full }));
            }
        }
        Ok(None)
    }

    /// What is left at the end of the file.
    fn finish(mut self) -> Result<Batch> {
        if let Some(record) = self.records.finish() {
            let given = &mut self.errors_given;
            take_record(&self.task, &mut self.columns, &mut self.batch, given, &record)?;
        }
        if self.columns.is_none() {
            return Err(Error::invalid(
                "file",
                "is empty; its first line must name the columns, such as title,description",
            ));
        }
        Ok(Batch { columns: self.columns, offset: self.records.offset(), is_last: true, ..self.batch })
    }
}

fn take_record(
    task: &ImportTask,
    columns: &mut Option<Arc<Columns>>,
    batch: &mut Batch,
    errors_given: &mut usize,
    record: &Record<'_>,
) -> Result<()> {
    batch.offset = record.end_offset;
    batch.line_number = record.end_line_number;
    let Some(columns) = columns else {
        *columns = Some(Arc::new(Columns::parse(record, &task.format).map_err(invalid_header)?));
        return Ok(());
    };
    match parse_row(&task.format, columns, record) {
        Ok(row) => batch.rows.push(row),
        Err(errors) => {
            batch.rejected_count += 1;
            batch.error_count += errors.len() as u64;
            let room = IMPORT_ERRORS_KEPT_MAX.saturating_sub(*errors_given);
            *errors_given += errors.len().min(room);
            batch.errors.extend(errors.into_iter().take(room));
        }
    }
    Ok(())
}

fn invalid_header(faults: Vec<HeaderFault>) -> Error {
    let violation = |fault: HeaderFault| {
        let field = match &*fault.column {
            "" => "header".to_owned(),
            column => format!("header.{}", quote(column)),
        };
        Violation::new(field, fault.message)
    };
    Error::Invalid(faults.into_iter().map(violation).collect())
}

async fn write_batches(
    mut session: ImportSession,
    task: &ImportTask,
    mut batches: mpsc::Receiver<Batch>,
    client: &Client,
) -> Result<()> {
    // Of what was sent before a cut, some may be lost on the way; it is kept to be listed.
    let mut sent = session.totals().error_count;
    let mut patience = Patience::default();
    let mut is_last = false;
    while !is_last {
        let batch = batches.recv().await.ok_or(Error::Cancelled)?;
        is_last = batch.is_last;
        patience.progressed(batch.offset - session.totals().offset);
        for error in session.write(&batch).await? {
            if sent < IMPORT_ERRORS_SENT_MAX {
                client.send(Message::RowError(row_error(error)), &mut patience).await?;
                sent += 1;
            }
        }
        client.send(progress(task, session.totals()), &mut patience).await?;
    }
    let summary = session.finish().await?;
    client.send(Message::Summary(summary), &mut patience).await
}

fn progress(task: &ImportTask, totals: &ImportTotals) -> Message {
    Message::Progress(ImportProgress {
        import_id: task.import_id.to_string(),
        offset: totals.offset.cast_signed(),
        row_count: totals.row_count.cast_signed(),
        rejected_count: totals.rejected_count.cast_signed(),
        committed_offset: task.committed_offset(totals).cast_signed(),
    })
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
