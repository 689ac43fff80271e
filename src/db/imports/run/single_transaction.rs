//! An import in one transaction: IMPORT_MODE_ATOMIC, and every dry run.
//!
//! The file is received first. Only then the transaction begins, and nothing in it waits for the client: its locks are held for
//! the server's time. If concurrent changes conflict with the transaction, it is attempted again from the staged file.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::{ATTEMPTS_MAX, ImportRun, conflict, is_conflict};
use crate::{
    csv::{Batch, RowError},
    db::{
        Db,
        imports::{
            Checkpoint, IMPORT_ERRORS_SENT_MAX, IMPORT_ERRORS_STORED_MAX, ImportSpec,
            staging::{StagedFile, delete_parts},
            state,
        },
    },
    error::{Error, Result},
    fairness::Flow,
    metrics,
    pb::{ImportMode, ImportProgress, ImportState, ImportSummary},
};

/// The outcome of [`ImportRun::write_staged`].
pub struct Written {
    /// The first errors, as many as the client may receive.
    pub errors: Vec<RowError>,
    /// The progress at the end.
    pub progress: ImportProgress,
    pub summary: ImportSummary,
}

impl ImportRun {
    /// Counts a batch that was received, also for GetImport.
    pub async fn receive(&mut self, batch: &Batch) {
        self.received.add(batch);
        publish(&self.db, &self.spec, self.known_counts()).await;
    }

    /// Takes bytes of the file. The first call begins at the offset of [`progress`](Self::progress) after the start.
    pub async fn stage(&mut self, data: &[u8]) -> Result<()> {
        self.staged.add(&self.conn, self.spec.import_id, data).await
    }

    /// Writes the file in one transaction, and ends the run: commits or rejects an atomic import, or rolls back a dry run.
    /// Calls `report` after each batch but the last.
    pub async fn write_staged(mut self, report: impl Fn(ImportProgress) + Sync) -> Result<Written> {
        let errors_sent_before = self.checkpoint.error_count;
        let staged = std::mem::take(&mut self.staged);
        let state = match self.write_with_attempts(&staged, &report).await {
            Ok(state) => state,
            Err(error) => {
                self.abandon().await;
                return Err(error);
            }
        };
        let summary = self.spec.summary(&self.checkpoint, state);
        let progress = self.progress();
        let mut errors = std::mem::take(&mut self.errors);
        errors.truncate(IMPORT_ERRORS_SENT_MAX.saturating_sub(errors_sent_before) as usize);
        self.evict_errors_at_end().await;
        self.delete_parts_and_release(staged.has_parts()).await;
        Ok(Written { errors, progress, summary })
    }

    /// Ends the run after an error. The import is INTERRUPTED, and has written nothing.
    pub async fn abandon(self) {
        if self.conn.execute_command("ROLLBACK").await.is_ok() {
            // A part may be stored although its statement has failed.
            self.delete_parts_and_release(true).await;
        }
    }

    async fn delete_parts_and_release(self, has_parts: bool) {
        // If it fails, the connection is closed, and pruning deletes the parts.
        if !has_parts || delete_parts(&self.conn, self.spec.import_id).await.is_ok() {
            self.release().await;
        }
    }

    async fn write_with_attempts(
        &mut self,
        staged: &StagedFile,
        report: &(impl Fn(ImportProgress) + Sync),
    ) -> Result<ImportState> {
        for _ in 0..ATTEMPTS_MAX {
            match self.try_write(staged, report).await {
                Err(error) if is_conflict(&error) => {
                    metrics::count(|metrics| &metrics.retries.import_conflict);
                    self.conn.execute_command("ROLLBACK").await?;
                    self.go_to_start();
                }
                written => return written,
            }
        }
        Err(conflict())
    }

    /// Reads the staged file, parses it and writes its batches, all at the same time, then ends the transaction.
    async fn try_write(
        &mut self,
        staged: &StagedFile,
        report: &(impl Fn(ImportProgress) + Sync),
    ) -> Result<ImportState> {
        self.conn.enqueue("BEGIN")?;
        let (conn, spec, db) = (Arc::clone(&self.conn), Arc::clone(&self.spec), self.db.clone());
        let (batches, parsed) = mpsc::channel(1);
        let (counts, changed_counts) = watch::channel(self.known_counts());
        let replay = staged.replay(&conn, spec.import_id, self.reader(IMPORT_ERRORS_STORED_MAX), batches);
        let write = self.write_batches(parsed, counts, report);
        let (replayed, written, ()) = tokio::join!(replay, write, publish_latest(&db, &spec, changed_counts));
        // If a statement of `write` fails, then what `replay` reads after it fails too.
        written?;
        replayed?;
        self.end_transaction().await
    }

    async fn write_batches(
        &mut self,
        mut batches: mpsc::Receiver<Batch>,
        counts: watch::Sender<Checkpoint>,
        report: &(impl Fn(ImportProgress) + Sync),
    ) -> Result<()> {
        while let Some(batch) = batches.recv().await {
            let (next, errors) = self.write_rows(&batch).await?;
            self.errors.extend(errors);
            self.advance(next, &batch)?;
            if !batch.is_last {
                report(self.progress());
                counts.send_replace(self.known_counts());
            }
        }
        Ok(())
    }

    async fn end_transaction(&mut self) -> Result<ImportState> {
        let spec = Arc::clone(&self.spec);
        let checkpoint = &self.checkpoint;
        if checkpoint.offset != self.received.offset {
            return Err(Error::Internal("a staged file is not complete"));
        }
        let state = if spec.mode == ImportMode::Atomic && checkpoint.rejected_count > 0 {
            ImportState::Rejected
        } else if spec.validate_only {
            ImportState::Validated
        } else {
            ImportState::Committed
        };
        if state == ImportState::Committed {
            let header = self.header.as_ref().ok_or(Error::Internal("an import has no last batch"))?;
            state::save_checkpoint(&self.conn, &spec, checkpoint, header, true).await?;
            self.references.check_label_count(&self.conn, self.db.storage_limits().labels_max).await?;
            self.conn.commit().await.map_err(Error::with_request_id)?;
        } else {
            self.conn.execute_command("ROLLBACK").await?;
        }
        if state == ImportState::Rejected && !spec.validate_only {
            self.conn.enqueue("BEGIN")?;
            state::reject(&self.conn, spec.import_id, checkpoint, &self.errors).await?;
            self.conn.commit().await.map_err(Error::with_request_id)?;
        }
        Ok(state)
    }
}

/// Publishes the latest counts until there are no more.
async fn publish_latest(db: &Db, spec: &ImportSpec, mut counts: watch::Receiver<Checkpoint>) {
    while counts.changed().await.is_ok() {
        let latest = *counts.borrow_and_update();
        publish(db, spec, latest).await;
    }
}

async fn publish(db: &Db, spec: &ImportSpec, counts: Checkpoint) {
    if !spec.validate_only {
        // Only GetImport reads this. The import does not depend on it.
        let _ = state::publish_progress(&db.for_flow(Flow::Internal), spec.import_id, &counts).await;
    }
}
