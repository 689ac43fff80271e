//! `IssueService.ExportIssues`: rows from the database to chunks of a file.

use std::time::Duration;

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::streaming::{ResponseSender, ResponseStream, respond};
use crate::{
    csv::{ExportChunk, ExportWriter},
    db::{Db, issues::ExportSession},
    error::{Error, Result},
    fairness::FairPermit,
    filter::Filter,
    pb::ExportIssuesResponse,
};

/// How long an export waits for its client to read a chunk.
const EXPORT_IDLE_MAX: Duration = Duration::from_secs(60);
/// The maximum number of chunks that wait for the client.
const EXPORT_CHUNKS_BUFFERED_MAX: usize = 4;

pub type ExportStream = ResponseStream<ExportIssuesResponse>;

/// What to export, and how.
pub struct ExportOptions {
    pub filter: Filter,
    pub show_deleted: bool,
    pub escape_formulas: bool,
}

/// Starts an export.
pub fn start(db: Db, options: ExportOptions, permit: FairPermit, stopping: CancellationToken) -> ExportStream {
    respond(EXPORT_CHUNKS_BUFFERED_MAX, stopping, |responses| async move {
        let _permit = permit;
        export(&db, &options, &responses).await
    })
}

async fn export(db: &Db, options: &ExportOptions, responses: &ResponseSender<ExportIssuesResponse>) -> Result<()> {
    let mut session = ExportSession::open(db, &options.filter, options.show_deleted).await?;
    let mut writer = ExportWriter::new(options.escape_formulas)?;
    while let Some(row) = session.next().await? {
        if let Some(chunk) = writer.write(&row)? {
            send(responses, chunk).await?;
        }
    }
    session.finish().await?;
    let last = writer.finish()?;
    if last.data.is_empty() { Ok(()) } else { send(responses, last).await }
}

async fn send(responses: &ResponseSender<ExportIssuesResponse>, chunk: ExportChunk) -> Result<()> {
    let ExportChunk { data, row_count } = chunk;
    let response = ExportIssuesResponse { data, row_count: row_count.cast_signed() };
    timeout(EXPORT_IDLE_MAX, responses.send(response)).await.unwrap_or_else(|_| {
        let seconds = EXPORT_IDLE_MAX.as_secs();
        let message =
            format!("stream: no response read for {seconds} s; read the stream continuously, and export again");
        Err(Error::Timeout { reason: "EXPORT_IDLE", message })
    })
}
