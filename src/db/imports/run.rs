//! An import in state RUNNING: from its lock to its commit, rejection or interruption.

use std::sync::Arc;

use uuid::Uuid;

use super::{
    Checkpoint, IMPORT_ERRORS_STORED_MAX, ImportSpec, already_running,
    plan::{PlanLimits, plan_batch},
    references::{References, find_user},
    retention::{check_not_removed, evict_import_errors},
    state, write,
};
use crate::{
    csv::{Batch, Header, RowError},
    db::{Db, conn::ExclusiveConn},
    error::{Error, Result, quote},
    fairness::Flow,
    pb::{ImportMode, ImportState, ImportSummary},
};

/// How often a batch is attempted when concurrent changes conflict with it.
const BATCH_ATTEMPTS_MAX: u32 = 3;

/// The outcome of [`ImportRun::start`].
pub enum Started {
    Running(Box<ImportRun>),
    /// The import was finished before: the stored summary.
    AlreadyFinished(ImportSummary),
}

/// An import in progress. It holds the import's lock and a connection. If it is dropped before
/// [`finish`](ImportRun::finish), the connection is closed: the lock is released, uncommitted rows are rolled back, and the
/// import is INTERRUPTED.
pub struct ImportRun {
    db: Db,
    conn: ExclusiveConn,
    spec: Arc<ImportSpec>,
    checkpoint: Checkpoint,
    header: Option<Arc<Header>>,
    default_assignee_id: Option<Uuid>,
    references: References,
    /// The errors of an atomic import. They are stored if it is rejected.
    errors: Vec<RowError>,
}

impl ImportRun {
    /// Takes the import's lock, then starts the import, resumes it, or returns the summary of a finished one.
    ///
    /// Fails with `IMPORT_RUNNING` if another call has the lock, `IMPORT_MISMATCH` if the stored import differs, and
    /// `Invalid` if the default assignee does not exist.
    pub async fn start(db: &Db, spec: Arc<ImportSpec>) -> Result<Started> {
        let conn = db.conn().await?.into_exclusive();
        if !state::lock_for_session(&conn, spec.import_id).await? {
            return Err(already_running(spec.import_id));
        }
        let mut run = Self {
            db: db.clone(),
            conn,
            spec: Arc::clone(&spec),
            checkpoint: Checkpoint::default(),
            header: None,
            default_assignee_id: None,
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
                run.checkpoint = stored.checkpoint;
                run.header = stored.column_names.map(|names| Arc::new(Header::from_names(&names)));
            }
        } else if let Err(error) = check_not_removed(&run.conn, spec.import_id).await {
            run.release().await;
            return Err(error);
        }
        run.default_assignee_id = run.find_default_assignee().await?;
        if !spec.validate_only {
            run.evict_errors().await?;
            match run.header {
                Some(_) => state::resume(&run.conn, &spec).await?,
                None => state::start(&run.conn, &spec).await?,
            }
        }
        if spec.is_single_transaction() {
            // The stall timeout of the stream bounds how long the transaction waits for the client.
            run.conn.enqueue("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0")?;
        }
        Ok(Started::Running(Box::new(run)))
    }

    /// Returns how far the import is. After [`start`](Self::start), the file continues here.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Returns the file's header if the import was resumed after it.
    pub fn header(&self) -> Option<&Arc<Header>> {
        self.header.as_ref()
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
        for attempt in 1..=BATCH_ATTEMPTS_MAX {
            match self.try_write_batch(batch).await {
                // A concurrent call took an external id or deleted a label after the lookup, or caused a deadlock.
                Err(error)
                    if error.constraint().is_some()
                        || matches!(error, Error::Aborted { .. } | Error::LockTimeout | Error::Conflict(_)) =>
                {
                    if self.spec.is_single_transaction() || attempt == BATCH_ATTEMPTS_MAX {
                        break;
                    }
                    self.conn.execute_command("ROLLBACK").await?;
                    self.references.clear();
                }
                written => return written,
            }
        }
        Err(Error::Aborted {
            reason: "CONFLICT",
            message: "the import conflicts with a concurrent change; retry with the same import_id".to_owned(),
        })
    }

    async fn try_write_batch(&mut self, batch: &Batch) -> Result<Vec<RowError>> {
        let spec = Arc::clone(&self.spec);
        let header = batch.header.clone().ok_or(Error::Internal("a batch has no header"))?;
        let stored_errors = self.checkpoint.error_count.min(IMPORT_ERRORS_STORED_MAX as u64) as usize;
        let errors_max = IMPORT_ERRORS_STORED_MAX - stored_errors;
        if !spec.is_single_transaction() {
            self.conn.enqueue("BEGIN")?;
        }
        let labels_max = self.db.storage_limits().labels_max;
        let limits = PlanLimits { errors_max, labels_max };
        let plan = plan_batch(&self.conn, &spec, &mut self.references, self.default_assignee_id, batch, limits).await?;
        let updated_count = write::execute(&self.conn, &spec, &header, &plan).await?;

        let planned = plan.inserts.len() + plan.updates.len() + plan.skips.len();
        let mut next = self.checkpoint;
        next.offset = batch.end_offset;
        next.line_number = batch.end_line_number;
        next.row_count += batch.rows.len() as u64 + batch.rejected_count;
        next.created_count += plan.inserts.len() as u64;
        next.updated_count += updated_count;
        // An update without a difference counts as skipped.
        next.skipped_count += (plan.skips.len() + plan.updates.len()) as u64 - updated_count;
        next.rejected_count += (batch.rows.len() - planned) as u64 + batch.rejected_count;
        next.error_count += plan.error_count + batch.error_count;

        let mut errors = [&batch.errors[..], &plan.errors].concat();
        errors.sort_by_key(|error| error.row_number);
        errors.truncate(errors_max);
        if !spec.is_single_transaction() {
            state::insert_errors(&self.conn, spec.import_id, stored_errors, &errors).await?;
            state::save_checkpoint(&self.conn, &spec, &next, &header, batch.is_last).await?;
            self.references.check_label_count(&self.conn, labels_max).await?;
            self.conn.commit().await.map_err(Error::with_request_id)?;
        } else if !spec.validate_only {
            self.errors.extend_from_slice(&errors);
            // Only GetImport reads this. The import does not depend on it.
            let _ = state::publish_progress(&self.db.for_flow(Flow::Internal), spec.import_id, &next).await;
        }
        self.checkpoint = next;
        self.header = Some(header);
        Ok(errors)
    }

    /// Commits or rejects an atomic import, rolls back a dry run, and returns the summary. Must be called after the last
    /// batch, with which an import in IMPORT_MODE_SKIP_INVALID is committed already.
    pub async fn finish(mut self) -> Result<ImportSummary> {
        let (spec, checkpoint) = (&*self.spec, &self.checkpoint);
        let state = if spec.mode == ImportMode::Atomic && checkpoint.rejected_count > 0 {
            ImportState::Rejected
        } else if spec.validate_only {
            ImportState::Validated
        } else {
            ImportState::Committed
        };
        if spec.is_single_transaction() {
            if state == ImportState::Committed {
                let header = self.header.as_ref().ok_or(Error::Internal("an import has no last batch"))?;
                state::save_checkpoint(&self.conn, spec, checkpoint, header, true).await?;
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
        }
        if checkpoint.error_count > 0 && !spec.validate_only {
            // The import has ended, whether this succeeds or not. The user's next import does it again.
            let _ = self.evict_errors().await;
        }
        let summary = spec.summary(checkpoint, state);
        self.release().await;
        Ok(summary)
    }

    async fn evict_errors(&self) -> Result<()> {
        let errors_max = self.db.storage_limits().import_errors_per_user_max;
        evict_import_errors(&self.conn, self.spec.caller_id, errors_max).await
    }

    /// Releases the lock and returns the connection to the pool. If that fails, the connection is closed, which releases
    /// the lock too.
    async fn release(self) {
        if self.conn.execute_command("SELECT pg_advisory_unlock_all()").await.is_ok() {
            self.conn.release();
        }
    }
}
