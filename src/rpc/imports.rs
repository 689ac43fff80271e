//! `ImportService`: the stream's bytes to rows on one side, rows to the database on the other, a batch between them.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{Api, Reply};
use crate::{
    auth::Caller,
    db::{
        Db,
        import::{IMPORT_ERRORS_SENT_MAX, ImportSession, ImportTask, ImportTotals, Opened},
    },
    error::{Error, Result, Violation, quote},
    import::{Columns, ImportRow, Record, RecordReader, RowError, parse_row},
    pb::{
        ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportMode, ImportOptions, ImportProgress,
        ImportRowError, Role, import_issues_request, import_issues_response::Message,
        import_service_server::ImportService,
    },
    request::Check,
};

/// Bytes of a file in one message.
const IMPORT_CHUNK_BYTES_MAX: usize = 1024 * 1024;
/// Rows that are written at once, by whichever bound is reached first. Their number also decides where SKIP_INVALID
/// commits, so it must not depend on how the stream is cut.
const IMPORT_BATCH_ROWS_MAX: usize = 5_000;
const IMPORT_BATCH_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// How long an import waits for its client, to send or to read.
const IMPORT_IDLE_MAX: Duration = Duration::from_secs(60);
/// Messages that wait for the client to read them.
const IMPORT_ANSWERS_WAITING_MAX: usize = 16;

#[tonic::async_trait]
impl ImportService for Api {
    type ImportIssuesStream = ReceiverStream<Result<ImportIssuesResponse, Status>>;

    async fn import_issues(&self, request: Request<Streaming<ImportIssuesRequest>>) -> Reply<Self::ImportIssuesStream> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let permit = Arc::clone(&self.imports).try_acquire_owned().map_err(|_| {
            Error::Exhausted("as many imports as are taken at once are under way; try again".to_owned())
        })?;
        let (answers, stream) = mpsc::channel(IMPORT_ANSWERS_WAITING_MAX);
        let (db, requests) = (self.db.clone(), request.into_inner());
        tokio::spawn(async move {
            let _permit = permit;
            let client = Client { answers };
            if let Err(error) = import(&db, caller.user_id, requests, &client).await {
                client.fail(error).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_import(&self, _: Request<crate::pb::GetImportRequest>) -> Reply<crate::pb::Import> {
        todo!()
    }

    async fn list_import_errors(
        &self,
        _: Request<crate::pb::ListImportErrorsRequest>,
    ) -> Reply<crate::pb::ListImportErrorsResponse> {
        todo!()
    }

    async fn revert_import(
        &self,
        _: Request<crate::pb::RevertImportRequest>,
    ) -> Reply<crate::pb::RevertImportResponse> {
        todo!()
    }
}

/// The way back to the client.
struct Client {
    answers: mpsc::Sender<Result<ImportIssuesResponse, Status>>,
}

impl Client {
    async fn send(&self, message: Message) -> Result<()> {
        let answer = ImportIssuesResponse { message: Some(message) };
        match tokio::time::timeout(IMPORT_IDLE_MAX, self.answers.send(Ok(answer))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Error::Cancelled),
            Err(_) => Err(idle("the client has not read its answers")),
        }
    }

    async fn fail(&self, error: Error) {
        // If the client has gone away or does not read, there is nobody to tell.
        let _ = tokio::time::timeout(IMPORT_IDLE_MAX, self.answers.send(Err(error.into()))).await;
    }
}

fn idle(what: &str) -> Error {
    let message = format!("{what} for {} s; nothing more is written", IMPORT_IDLE_MAX.as_secs());
    Error::Timeout { reason: "IMPORT_IDLE", message }
}

async fn import(db: &Db, caller_id: Uuid, mut requests: Streaming<ImportIssuesRequest>, client: &Client) -> Result<()> {
    let task = read_options(caller_id, &mut requests).await?;
    let session = match ImportSession::open(db, task).await? {
        Opened::Session(session) => *session,
        Opened::Committed(summary) => return client.send(Message::Summary(summary)).await,
    };
    client.send(progress(&task, &ImportTotals::default())).await?;
    // While a batch is written, the next is read.
    let (batches, written) = mpsc::channel(1);
    tokio::try_join!(
        async move { read_file(requests, task.total_bytes, batches).await },
        write_batches(session, task, written, client)
    )?;
    Ok(())
}

async fn read_options(caller_id: Uuid, requests: &mut Streaming<ImportIssuesRequest>) -> Result<ImportTask> {
    let Some(import_issues_request::Message::Options(options)) = next_message(requests).await? else {
        return Err(Error::invalid("options", "must be the first message of the stream"));
    };
    let ImportOptions { import_id, mode, validate_only, total_bytes, .. } = options;
    let mut check = Check::default();
    let import_id = check.optional_uuid("options.import_id", &import_id);
    let mode: ImportMode = check.enumeration("options.mode", mode);
    let total_bytes = check.take(
        "options.total_bytes",
        u64::try_from(total_bytes).map_err(|_| format!("must not be negative, is {total_bytes}")),
    );
    check.done()?;
    let task = ImportTask {
        import_id: import_id.unwrap_or_else(Uuid::now_v7),
        caller_id,
        mode: if mode == ImportMode::Unspecified { ImportMode::Atomic } else { mode },
        validate_only,
        total_bytes,
    };
    Ok(task)
}

/// None: the client has half-closed the stream.
async fn next_message(requests: &mut Streaming<ImportIssuesRequest>) -> Result<Option<import_issues_request::Message>> {
    match tokio::time::timeout(IMPORT_IDLE_MAX, requests.message()).await {
        Err(_) => Err(idle("nothing was sent")),
        Ok(Ok(None)) => Ok(None),
        Ok(Ok(Some(ImportIssuesRequest { message: Some(message) }))) => Ok(Some(message)),
        Ok(Ok(Some(ImportIssuesRequest { message: None }))) => {
            Err(Error::invalid("message", "has neither options nor a chunk"))
        }
        Ok(Err(status)) => Err(Error::from_bare(&status)
            .filter(|e| e.code() == tonic::Code::InvalidArgument)
            .unwrap_or(Error::Cancelled)),
    }
}

/// Rows of the file that are written together, and the errors of those that cannot be.
#[derive(Default)]
struct Batch {
    rows: Vec<ImportRow>,
    /// The first [`IMPORT_ERRORS_SENT_MAX`].
    errors: Vec<RowError>,
    error_count: u64,
    rejected_count: u64,
    /// Where the batch ends in the file.
    offset: u64,
    /// Whether it ends the file. Without this one nothing is finished, whatever became of the reader.
    is_last: bool,
}

/// Reads the file to its end, and hands it on in batches.
async fn read_file(
    mut requests: Streaming<ImportIssuesRequest>,
    total_bytes: u64,
    batches: mpsc::Sender<Batch>,
) -> Result<()> {
    let mut file = FileReader::default();
    while let Some(message) = next_message(&mut requests).await? {
        let import_issues_request::Message::Chunk(chunk) = message else {
            return Err(Error::invalid("options", "must be sent once, as the first message"));
        };
        let data = new_bytes(&chunk, file.records.offset())?;
        let mut data = &data[..];
        while let Some(batch) = file.read(&mut data)? {
            // A receiver that is gone has failed, and says why.
            batches.send(batch).await.map_err(|_| Error::Cancelled)?;
        }
    }
    let offset = file.records.offset();
    if total_bytes != 0 && offset != total_bytes {
        return Err(Error::InvalidReason {
            reason: "IMPORT_TRUNCATED",
            field: "options.total_bytes",
            message: format!(
                "the stream ended after {offset} of {total_bytes} bytes; send the file again from the start"
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
#[derive(Default)]
struct FileReader {
    records: RecordReader,
    columns: Option<Columns>,
    batch: Batch,
    batch_start: u64,
}

impl FileReader {
    /// A batch if one is full; none when the bytes are used up.
    fn read(&mut self, data: &mut &[u8]) -> Result<Option<Batch>> {
        while let Some(record) = self.records.read(data) {
            take_record(&mut self.columns, &mut self.batch, &record)?;
            let rows = self.batch.rows.len() as u64 + self.batch.rejected_count;
            if rows >= IMPORT_BATCH_ROWS_MAX as u64 || self.batch.offset - self.batch_start >= IMPORT_BATCH_BYTES_MAX {
                self.batch_start = self.batch.offset;
                return Ok(Some(std::mem::take(&mut self.batch)));
            }
        }
        Ok(None)
    }

    /// What is left at the end of the file.
    fn finish(mut self) -> Result<Batch> {
        if let Some(record) = self.records.finish() {
            take_record(&mut self.columns, &mut self.batch, &record)?;
        }
        if self.columns.is_none() {
            return Err(Error::invalid(
                "file",
                "is empty; its first line must name the columns, such as title,description",
            ));
        }
        self.batch.offset = self.records.offset();
        self.batch.is_last = true;
        Ok(self.batch)
    }
}

fn take_record(columns: &mut Option<Columns>, batch: &mut Batch, record: &Record<'_>) -> Result<()> {
    let Some(columns) = columns else {
        let violation = |fault: crate::import::HeaderFault| {
            let field = match &*fault.column {
                "" => "header".to_owned(),
                column => format!("header.{}", quote(column)),
            };
            Violation::new(field, fault.message)
        };
        let parsed = Columns::parse(record);
        *columns = Some(parsed.map_err(|faults| Error::Invalid(faults.into_iter().map(violation).collect()))?);
        batch.offset = record.end_offset;
        return Ok(());
    };
    match parse_row(columns, record) {
        Ok(row) => batch.rows.push(row),
        Err(errors) => {
            batch.rejected_count += 1;
            batch.error_count += errors.len() as u64;
            let room = IMPORT_ERRORS_SENT_MAX.saturating_sub(batch.errors.len());
            batch.errors.extend(errors.into_iter().take(room));
        }
    }
    batch.offset = record.end_offset;
    Ok(())
}

async fn write_batches(
    mut session: ImportSession,
    task: ImportTask,
    mut batches: mpsc::Receiver<Batch>,
    client: &Client,
) -> Result<()> {
    let mut totals = ImportTotals::default();
    let mut sent = 0;
    let mut is_last = false;
    while !is_last {
        let batch = batches.recv().await.ok_or(Error::Cancelled)?;
        let Batch { rows, mut errors, error_count, rejected_count, offset, .. } = batch;
        is_last = batch.is_last;
        totals.offset = offset;
        totals.row_count += rows.len() as u64 + rejected_count;
        totals.rejected_count += rejected_count;
        totals.error_count += error_count;
        errors.extend(session.write(&rows, is_last, &mut totals).await?);
        errors.sort_by_key(|error| error.row_number);
        for error in errors {
            if sent < IMPORT_ERRORS_SENT_MAX {
                client.send(Message::RowError(row_error(error))).await?;
                sent += 1;
            }
        }
        client.send(progress(&task, &totals)).await?;
    }
    let summary = session.finish(&totals).await?;
    client.send(Message::Summary(summary)).await
}

fn progress(task: &ImportTask, totals: &ImportTotals) -> Message {
    Message::Progress(ImportProgress {
        import_id: task.import_id.to_string(),
        offset: totals.offset.cast_signed(),
        row_count: totals.row_count.cast_signed(),
        rejected_count: totals.rejected_count.cast_signed(),
        committed_offset: 0,
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
