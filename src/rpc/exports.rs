//! `IssueService.ExportIssues`: rows from the database to chunks of a file.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{
    stall_timeout::{MinimumRate, StallTimeout, limit_duration},
    streaming::{ResponseSender, ResponseStream, respond},
};
use crate::{
    csv::{ExportChunk, ExportWriter},
    db::{Db, issues::ExportSession},
    error::Result,
    fairness::FairPermit,
    filter::Filter,
    metrics,
    pb::ExportIssuesResponse,
};

/// 16 KiB/s. A client that reads slower would keep a snapshot, which keeps PostgreSQL from removing old row versions.
static EXPORT_RATE_MIN: MinimumRate = MinimumRate {
    waited_max: Duration::from_secs(120),
    bytes: 1_920 * 1024,
    reason: "EXPORT_IDLE",
    missing: "read",
    advice: "read the stream continuously, and export again",
};
/// The maximum number of chunks that wait for the client.
const EXPORT_CHUNKS_BUFFERED_MAX: usize = 4;

pub type ExportStream = ResponseStream<ExportIssuesResponse>;

/// What to export, and how.
pub struct ExportOptions {
    pub filter: Filter,
    pub show_deleted: bool,
    pub escape_formulas: bool,
    pub duration_max: Duration,
}

/// Starts an export.
pub fn start(db: Db, options: ExportOptions, permit: FairPermit, stopping: CancellationToken) -> ExportStream {
    respond(EXPORT_CHUNKS_BUFFERED_MAX, stopping, |responses| async move {
        let _permit = permit;
        let _in_progress = metrics::in_progress(|metrics| &metrics.exports.in_progress);
        export(&db, &options, &responses).await
    })
}

async fn export(db: &Db, options: &ExportOptions, responses: &ResponseSender<ExportIssuesResponse>) -> Result<()> {
    let advice = "read faster, or export fewer issues with a filter";
    limit_duration(options.duration_max, "EXPORT_TIMEOUT", advice, send_chunks(db, options, responses)).await
}

async fn send_chunks(db: &Db, options: &ExportOptions, responses: &ResponseSender<ExportIssuesResponse>) -> Result<()> {
    let mut session = ExportSession::open(db, &options.filter, options.show_deleted).await?;
    let mut writer = ExportWriter::new(options.escape_formulas)?;
    let mut stall_timeout = StallTimeout::new(&EXPORT_RATE_MIN);
    let mut sent_rows = 0;
    while let Some(row) = session.next().await? {
        if let Some(chunk) = writer.write(&row)? {
            send(responses, &mut stall_timeout, chunk, &mut sent_rows).await?;
        }
    }
    session.finish().await?;
    let last = writer.finish()?;
    if last.data.is_empty() { Ok(()) } else { send(responses, &mut stall_timeout, last, &mut sent_rows).await }
}

async fn send(
    responses: &ResponseSender<ExportIssuesResponse>,
    stall_timeout: &mut StallTimeout,
    chunk: ExportChunk,
    sent_rows: &mut u64,
) -> Result<()> {
    let ExportChunk { data, row_count } = chunk;
    let bytes = data.len() as u64;
    let response = ExportIssuesResponse { data, row_count: row_count.cast_signed() };
    stall_timeout.wait(responses.send(response), "no response read").await??;
    stall_timeout.add_bytes(bytes);
    metrics::count_by(|metrics| &metrics.exports.bytes, bytes);
    metrics::count_by(|metrics| &metrics.exports.rows, row_count - *sent_rows);
    *sent_rows = row_count;
    Ok(())
}
