//! An import in state RUNNING: from its lock to its commit, rejection or interruption.

mod single_transaction;

use std::sync::Arc;

use uuid::Uuid;

pub use self::single_transaction::Written;
use super::{
    Checkpoint, IMPORT_ERRORS_STORED_MAX, ImportSpec, ParsedRows, already_running,
    plan::{PlanLimits, plan_batch},
    references::{References, find_user},
    retention::{check_not_removed, evict_import_errors},
    staging::{StagedFile, delete_parts},
    state, write,
};
use crate::{
    csv::{Batch, BatchReader, Header, RowError},
    db::{Db, conn::ExclusiveConn},
    error::{Error, Result, quote},
    metrics,
    pb::{ImportProgress, ImportState, ImportSummary},
};

/// How often a transaction, which is a batch or the whole file, is attempted when concurrent changes conflict with it.
const ATTEMPTS_MAX: u32 = 3;

/// The outcome of [`ImportRun::start`].
pub enum Started {
    Running(Box<ImportRun>),
    /// The import was finished before: the stored summary.
    AlreadyFinished(ImportSummary),
}

/// An import in progress. It holds the import's lock and a connection. If it is dropped before it has finished, the
/// connection is closed: the lock is released, uncommitted rows are rolled back, and the import is INTERRUPTED.
///
/// Without [`ImportSpec::is_single_transaction`], [`write_batch`](Self::write_batch) writes each batch, and
/// [`finish`](Self::finish) ends the run. Otherwise [`receive`](Self::receive) and [`stage`](Self::stage) take the whole file
/// without a transaction, and [`write_staged`](Self::write_staged) writes it and ends the run.
pub struct ImportRun {
    db: Db,
    /// Shared only with what reads the staged file while batches are written.
    conn: Arc<ExclusiveConn>,
    spec: Arc<ImportSpec>,
    default_assignee_id: Option<Uuid>,
    /// Where the run continues in the file: the position and the header.
    start: (Checkpoint, Option<Arc<Header>>),
    received: ParsedRows,
    staged: StagedFile,
    /// The end of the rows that are written.
    checkpoint: Checkpoint,
    header: Option<Arc<Header>>,
    /// What the parser has found in the rows that are written.
    parsed: ParsedRows,
    references: References,
    /// The errors of a single transaction, which are stored if the import is rejected.
    errors: Vec<RowError>,
}

impl ImportRun {
    /// Takes the import's lock, then starts the import, resumes it, or returns the summary of a finished one.
    ///
    /// Fails with `IMPORT_RUNNING` if another call has the lock, `IMPORT_MISMATCH` if the stored import differs, and
    /// `Invalid` if the default assignee does not exist.
    pub async fn start(db: &Db, spec: Arc<ImportSpec>) -> Result<Started> {
        let conn = Arc::new(db.conn().await?.into_exclusive());
        if !state::lock_for_session(&conn, spec.import_id).await? {
            return Err(already_running(spec.import_id));
        }
        let start = Checkpoint::default();
        let mut run = Self {
            db: db.clone(),
            conn,
            spec: Arc::clone(&spec),
            default_assignee_id: None,
            start: (start, None),
            received: ParsedRows::before(&start),
            staged: StagedFile::default(),
            checkpoint: start,
            header: None,
            parsed: ParsedRows::before(&start),
            references: References::default(),
            errors: Vec::new(),
        };
        if let Some(stored) = state::find(&run.conn, spec.import_id).await? {
            if let Err(error) = stored.check_same(&spec) {
                // Unlock before the caller receives the error, so that its next call does not find the import running.
                run.release().await;
                return Err(error);
            }
            if matches!(stored.state, ImportState::Committed | ImportState::Reverted) {
                run.release().await;
                return Ok(Started::AlreadyFinished(spec.summary(&stored.checkpoint, stored.state)));
            }
            if stored.is_resumable() {
                let header = stored.column_names.map(|names| Arc::new(Header::from_names(&names)));
                run.start = (stored.checkpoint, header);
                run.received = ParsedRows::before(&stored.checkpoint);
                run.go_to_start();
            }
        } else if let Err(error) = check_not_removed(&run.conn, spec.import_id).await {
            run.release().await;
            return Err(error);
        }
        run.default_assignee_id = run.find_default_assignee().await?;
        if !spec.validate_only {
            run.evict_errors().await?;
            match run.start.1 {
                Some(_) => state::resume(&run.conn, &spec).await?,
                None => state::start(&run.conn, &spec).await?,
            }
        }
        if spec.is_single_transaction() {
            // An interrupted run may have left them.
            delete_parts(&run.conn, spec.import_id).await?;
        }
        Ok(Started::Running(Box::new(run)))
    }

    /// Returns the end of the rows that are written.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Returns how far the import is.
    pub fn progress(&self) -> ImportProgress {
        ImportProgress {
            import_id: self.spec.import_id.to_string(),
            offset: self.received.offset.cast_signed(),
            row_count: self.received.row_count.cast_signed(),
            rejected_count: self.known_counts().rejected_count.cast_signed(),
            committed_offset: self.spec.committed_offset(&self.checkpoint).cast_signed(),
            written_row_count: self.checkpoint.row_count.cast_signed(),
        }
    }

    /// Returns the counts of the rows that are received: what was written of them, and the rows that are known to be invalid.
    /// Those are rejected by the database among the rows that are written, and by the parser among all.
    fn known_counts(&self) -> Checkpoint {
        Checkpoint {
            row_count: self.received.row_count,
            rejected_count: self.checkpoint.rejected_count + self.received.rejected_count - self.parsed.rejected_count,
            error_count: self.checkpoint.error_count + self.received.error_count - self.parsed.error_count,
            ..self.checkpoint
        }
    }

    /// Returns a parser of the file from where the run continues. Its batches hold at most `errors_max` errors.
    pub fn reader(&self, errors_max: usize) -> BatchReader {
        let (checkpoint, header) = &self.start;
        match header {
            None => BatchReader::new(self.spec.format.clone(), errors_max),
            Some(header) => {
                BatchReader::resume(self.spec.format.clone(), Arc::clone(header), checkpoint.position(), errors_max)
            }
        }
    }

    /// Forgets what was written since the start.
    fn go_to_start(&mut self) {
        (self.checkpoint, self.header) = self.start.clone();
        self.parsed = ParsedRows::before(&self.checkpoint);
        self.references.clear();
        self.errors.clear();
    }

    async fn find_default_assignee(&self) -> Result<Option<Uuid>> {
        let Some(username) = &self.spec.default_assignee else { return Ok(None) };
        let id = find_user(&self.conn, username).await?;
        let unknown = || {
            let message = format!("\"{}\" is not a user; expected an existing username", quote(username));
            Error::invalid("options.default_assignee", message)
        };
        id.map(Some).ok_or_else(unknown)
    }

    /// Writes the valid rows of a batch and moves the checkpoint to its end, in one transaction. Returns the errors of the
    /// rejected rows that are among the first [`IMPORT_ERRORS_STORED_MAX`] of the file.
    pub async fn write_batch(&mut self, batch: &Batch) -> Result<Vec<RowError>> {
        for _ in 0..ATTEMPTS_MAX {
            match self.try_write_batch(batch).await {
                Err(error) if is_conflict(&error) => {
                    metrics::count(|metrics| &metrics.retries.import_conflict);
                    self.conn.execute_command("ROLLBACK").await?;
                    self.references.clear();
                }
                written => return written,
            }
        }
        Err(conflict())
    }

    async fn try_write_batch(&mut self, batch: &Batch) -> Result<Vec<RowError>> {
        let spec = Arc::clone(&self.spec);
        let header = header(batch)?;
        self.conn.enqueue("BEGIN")?;
        let (next, errors) = self.write_rows(batch).await?;
        state::insert_errors(&self.conn, spec.import_id, self.stored_error_count(), &errors).await?;
        state::save_checkpoint(&self.conn, &spec, &next, &header, batch.is_last).await?;
        self.references.check_label_count(&self.conn, self.db.storage_limits().labels_max).await?;
        self.conn.commit().await.map_err(Error::with_request_id)?;
        self.received.add(batch);
        self.advance(next, batch)?;
        Ok(errors)
    }

    /// Writes the valid rows of a batch in the connection's transaction. Returns the checkpoint after the batch, and the errors
    /// of the rejected rows that are among the first [`IMPORT_ERRORS_STORED_MAX`] of the file.
    async fn write_rows(&mut self, batch: &Batch) -> Result<(Checkpoint, Vec<RowError>)> {
        let spec = Arc::clone(&self.spec);
        let header = header(batch)?;
        let errors_max = IMPORT_ERRORS_STORED_MAX - self.stored_error_count();
        let limits = PlanLimits { errors_max, labels_max: self.db.storage_limits().labels_max };
        let plan = plan_batch(&self.conn, &spec, &mut self.references, self.default_assignee_id, batch, limits).await?;
        let updated_count = write::execute(&self.conn, &spec, &header, &plan).await?;

        let planned = plan.inserts.len() + plan.updates.len() + plan.skips.len();
        let mut next = self.checkpoint;
        next.offset = batch.end_offset;
        next.line_number = batch.end_line_number;
        next.row_count += batch.row_count();
        next.created_count += plan.inserts.len() as u64;
        next.updated_count += updated_count;
        // An update without a difference counts as skipped.
        next.skipped_count += (plan.skips.len() + plan.updates.len()) as u64 - updated_count;
        next.rejected_count += (batch.rows.len() - planned) as u64 + batch.rejected_count;
        next.error_count += plan.error_count + batch.error_count;

        let mut errors = [&batch.errors[..], &plan.errors].concat();
        errors.sort_by_key(|error| error.row_number);
        errors.truncate(errors_max);
        Ok((next, errors))
    }

    /// Returns how many errors of the rows that are written are stored, or would be.
    fn stored_error_count(&self) -> usize {
        self.checkpoint.error_count.min(IMPORT_ERRORS_STORED_MAX as u64) as usize
    }

    /// Moves to the checkpoint after a batch that was written.
    fn advance(&mut self, next: Checkpoint, batch: &Batch) -> Result<()> {
        self.header = Some(header(batch)?);
        metrics::count_by(|metrics| &metrics.imports.rows, next.row_count - self.checkpoint.row_count);
        self.checkpoint = next;
        self.parsed.add(batch);
        Ok(())
    }

    /// Ends the run after the last batch, with which [`write_batch`](Self::write_batch) has committed the import. Returns the
    /// summary.
    pub async fn finish(self) -> ImportSummary {
        let summary = self.spec.summary(&self.checkpoint, ImportState::Committed);
        self.evict_errors_at_end().await;
        self.release().await;
        summary
    }

    async fn evict_errors_at_end(&self) {
        if self.checkpoint.error_count > 0 && !self.spec.validate_only {
            // The import has ended, whether this succeeds or not. The user's next import does it again.
            let _ = self.evict_errors().await;
        }
    }

    async fn evict_errors(&self) -> Result<()> {
        let errors_max = self.db.storage_limits().import_errors_per_user_max;
        evict_import_errors(&self.conn, self.spec.caller_id, errors_max).await
    }

    /// Releases the lock and returns the connection to the pool. If that fails, the connection is closed, which releases
    /// the lock too.
    async fn release(self) {
        if self.conn.execute_command("SELECT pg_advisory_unlock_all()").await.is_ok()
            && let Some(conn) = Arc::into_inner(self.conn)
        {
            conn.release();
        }
    }
}

fn header(batch: &Batch) -> Result<Arc<Header>> {
    batch.header.clone().ok_or(Error::Internal("a batch has no header"))
}

/// Returns whether another attempt may succeed: a concurrent call took an external id or deleted a label after the lookup, or
/// caused a deadlock.
fn is_conflict(error: &Error) -> bool {
    error.constraint().is_some() || matches!(error, Error::Aborted { .. } | Error::LockTimeout | Error::Conflict(_))
}

/// The error when all attempts have conflicted.
fn conflict() -> Error {
    Error::Aborted {
        reason: "CONFLICT",
        message: "the import conflicts with a concurrent change; retry with the same import_id".to_owned(),
    }
}
