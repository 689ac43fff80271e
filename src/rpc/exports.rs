//! The stream of `IssueService.ExportIssues`: rows from the database on one side, pieces of a file on the other.

use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    csv::export_writer::{ExportPiece, ExportWriter},
    db::{Db, issues::ExportSession},
    error::{Error, Result},
    filter::Filter,
    pb::ExportIssuesResponse,
};

/// How long an export waits for its client to read.
const EXPORT_IDLE_MAX: Duration = Duration::from_secs(60);
/// Pieces that wait for the client to read them.
const EXPORT_PIECES_WAITING_MAX: usize = 4;

pub type ExportStream = ReceiverStream<Result<ExportIssuesResponse, Status>>;

/// What to export.
pub struct ExportTask {
    pub filter: Filter,
    pub show_deleted: bool,
    pub escape_formulas: bool,
}

/// Exports for as long as somebody reads the stream.
pub fn start(db: Db, task: ExportTask, permit: OwnedSemaphorePermit, stopping: CancellationToken) -> ExportStream {
    let (pieces, stream) = mpsc::channel(EXPORT_PIECES_WAITING_MAX);
    tokio::spawn(async move {
        let client = Client { pieces };
        let exported = tokio::select! {
            exported = export(&db, &task, &client) => exported,
            () = client.pieces.closed() => Err(Error::Cancelled),
            () = stopping.cancelled() => Err(Error::Stopping),
        };
        drop(permit);
        if let Err(error) = exported {
            client.fail(error).await;
        }
    });
    ReceiverStream::new(stream)
}

async fn export(db: &Db, task: &ExportTask, client: &Client) -> Result<()> {
    let mut session = ExportSession::open(db, &task.filter, task.show_deleted).await?;
    let mut writer = ExportWriter::new(task.escape_formulas)?;
    while let Some(row) = session.next().await? {
        if let Some(piece) = writer.write(&row)? {
            client.send(piece).await?;
        }
    }
    session.finish().await?;
    let last = writer.finish()?;
    if last.data.is_empty() { Ok(()) } else { client.send(last).await }
}

/// The way to the client.
struct Client {
    pieces: mpsc::Sender<Result<ExportIssuesResponse, Status>>,
}

impl Client {
    async fn send(&self, ExportPiece { data, row_count }: ExportPiece) -> Result<()> {
        let piece = ExportIssuesResponse { data, row_count: row_count.cast_signed() };
        match tokio::time::timeout(EXPORT_IDLE_MAX, self.pieces.send(Ok(piece))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Error::Cancelled),
            Err(_) => Err(Error::Timeout {
                reason: "EXPORT_IDLE",
                message: format!("the client has not read for {} s; export again", EXPORT_IDLE_MAX.as_secs()),
            }),
        }
    }

    async fn fail(&self, error: Error) {
        // If the client has gone away or does not read, there is nobody to tell.
        let _ = tokio::time::timeout(EXPORT_IDLE_MAX, self.pieces.send(Err(error.into()))).await;
    }
}
