//! An import's side of the database: one session an import, a batch of rows at a time.
//!
//! [`plan`] looks up what rows refer to and judges them, [`write`](mod@write) puts them in, [`state`] keeps how the
//! import stands, and [`revert`](mod@revert) undoes it.

mod plan;
mod revert;
mod state;
mod write;

pub use revert::{IMPORT_CHANGED_SHOWN_MAX, revert};
pub use state::{get, list_errors};

use std::{collections::HashMap, sync::Arc};

use uuid::Uuid;

use super::{Conn, Db, PooledConn};
use crate::{
    csv::{Columns, Format, ImportRow, RowError},
    error::{Error, Result, quote},
    pb::{ImportMode, ImportState, ImportSummary, OnExisting, Priority},
};
use state::Found;

/// Row errors that an import's client is sent.
pub const IMPORT_ERRORS_SENT_MAX: u64 = 1_000;
/// Row errors of an import that are kept.
pub const IMPORT_ERRORS_KEPT_MAX: usize = 10_000;
/// How often a batch is tried when others change what it refers to at the same time.
const BATCH_TRIES_MAX: u32 = 3;

/// What an import is.
#[derive(Clone, Debug)]
pub struct ImportTask {
    pub import_id: Uuid,
    pub caller_id: Uuid,
    pub mode: ImportMode,
    pub validate_only: bool,
    /// The file's size; 0: not known.
    pub total_bytes: u64,
    pub on_existing: OnExisting,
    pub format: Format,
    /// Of new issues whose row has none, as the status in the format.
    pub default_priority: Priority,
    /// A username.
    pub default_assignee: Option<String>,
    pub create_labels: bool,
    /// SHA-256 over the options that are the same whenever the import is sent.
    pub fingerprint: [u8; 32],
}

/// What an import has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportTotals {
    /// Where in the file it is, and on which line.
    pub offset: u64,
    pub line_number: u64,
    pub row_count: u64,
    pub created_count: u64,
    pub updated_count: u64,
    pub skipped_count: u64,
    pub rejected_count: u64,
    pub error_count: u64,
}

/// Rows of the file that are written together, and the errors of those that cannot be.
#[derive(Debug, Default)]
pub struct Batch {
    /// Which columns the file has; known in every batch.
    pub columns: Option<Arc<Columns>>,
    pub rows: Vec<ImportRow>,
    /// Those that may be among the first [`IMPORT_ERRORS_KEPT_MAX`] of the file.
    pub errors: Vec<RowError>,
    pub error_count: u64,
    pub rejected_count: u64,
    /// Where the batch ends in the file, and on which line.
    pub offset: u64,
    pub line_number: u64,
    /// Whether it ends the file. Without this one nothing is finished, whatever became of the reader.
    pub is_last: bool,
}

/// An import that may begin or go on, or the summary of the one that was finished under this id.
pub enum Opened {
    Session(Box<ImportSession>),
    Finished(ImportSummary),
}

/// The connection of an import. Dropped before [`ImportSession::finish`], the connection is closed, and with it goes what
/// is not committed.
pub struct ImportSession {
    db: Db,
    conn: PooledConn,
    task: Arc<ImportTask>,
    totals: ImportTotals,
    columns: Option<Arc<Columns>>,
    default_assignee_id: Option<Uuid>,
    users: HashMap<String, Option<Uuid>>,
    labels: HashMap<String, Option<Uuid>>,
    /// Of an import that is all or nothing: what is kept of it if it is to be nothing.
    errors: Vec<RowError>,
}

impl ImportTask {
    /// Whether all rows go into one transaction.
    fn is_one_transaction(&self) -> bool {
        self.mode == ImportMode::Atomic || self.validate_only
    }

    /// Where the stream has to go on if it is cut now, which is told of a trial as it would be of the real import.
    pub fn committed_offset(&self, totals: &ImportTotals) -> u64 {
        if self.mode == ImportMode::SkipInvalid { totals.offset } else { 0 }
    }

    fn summary(&self, totals: &ImportTotals, state: ImportState) -> ImportSummary {
        let written = |count: u64| if state == ImportState::Rejected { 0 } else { count.cast_signed() };
        ImportSummary {
            import_id: self.import_id.to_string(),
            state: state.into(),
            row_count: totals.row_count.cast_signed(),
            created_count: written(totals.created_count),
            rejected_count: totals.rejected_count.cast_signed(),
            error_count: totals.error_count.cast_signed(),
            byte_count: totals.offset.cast_signed(),
            updated_count: written(totals.updated_count),
            skipped_count: written(totals.skipped_count),
        }
    }

    /// Whether an import that was begun under this id is this one.
    fn check_same(&self, found: &Found) -> Result<()> {
        let sizes = match found.state {
            // A rejected file is mended before it is sent again.
            ImportState::Rejected => [0, self.total_bytes],
            _ if found.is_whole => [0, found.totals.offset],
            _ if found.total_bytes == 0 => [0, self.total_bytes],
            _ => [0, found.total_bytes],
        };
        let same = found.caller_id == self.caller_id
            && found.mode == self.mode as i16
            && found.fingerprint.as_deref().is_none_or(|fingerprint| *fingerprint == self.fingerprint)
            && sizes.contains(&self.total_bytes);
        if !same {
            let message = format!(
                "import \"{}\" was made with other options, of another file or by another user; take a new import_id",
                self.import_id
            );
            return Err(Error::precondition("IMPORT_MISMATCH", "options.import_id", message));
        }
        if found.goes_on() && found.columns.is_none() {
            let message = format!(
                "import \"{}\" was begun by a version of the service that does not go on with it; take a new import_id",
                self.import_id
            );
            return Err(Error::precondition("IMPORT_MISMATCH", "options.import_id", message));
        }
        Ok(())
    }
}

impl ImportSession {
    /// Takes the import's lock, and looks whether it was begun before.
    pub async fn open(db: &Db, task: Arc<ImportTask>) -> Result<Opened> {
        let conn = db.conn().await?;
        conn.set_discard(true);
        if !state::lock(&conn, task.import_id).await? {
            return Err(running(task.import_id));
        }
        let mut session = Self {
            db: db.clone(),
            conn,
            task: Arc::clone(&task),
            totals: ImportTotals::default(),
            columns: None,
            default_assignee_id: None,
            users: HashMap::new(),
            labels: HashMap::new(),
            errors: Vec::new(),
        };
        let found = state::find(&session.conn, task.import_id).await?;
        if let Some(found) = found {
            if let Err(error) = task.check_same(&found) {
                // Now, not when the connection is gone: who mends the call calls again at once.
                session.close().await;
                return Err(error);
            }
            if matches!(found.state, ImportState::Committed | ImportState::Reverted) {
                session.close().await;
                return Ok(Opened::Finished(task.summary(&found.totals, found.state)));
            }
            if found.goes_on() {
                session.totals = found.totals;
                session.columns = found.columns.map(|names| Arc::new(Columns::from_names(&names)));
            }
        }
        session.find_default_assignee().await?;
        if !task.validate_only {
            state::begin(&session.conn, &task, session.columns.is_some()).await?;
        }
        if task.is_one_transaction() {
            // How long it may wait for its client is the stream's matter.
            session.conn.enqueue("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0")?;
        }
        Ok(Opened::Session(Box::new(session)))
    }

    /// What the import has done so far; after [`ImportSession::open`], where it goes on.
    pub fn totals(&self) -> &ImportTotals {
        &self.totals
    }

    /// The file's columns, if the import goes on behind its header.
    pub fn columns(&self) -> Option<&Arc<Columns>> {
        self.columns.as_ref()
    }

    async fn find_default_assignee(&mut self) -> Result<()> {
        let Some(username) = &self.task.default_assignee else { return Ok(()) };
        let id = plan::user_id(&self.conn, username).await?;
        let unknown =
            || Error::invalid("options.default_assignee", format!("there is no user \"{}\"", quote(username)));
        self.default_assignee_id = Some(id.ok_or_else(unknown)?);
        Ok(())
    }

    /// Writes the rows that are good, and answers the errors of those that are not, as far as they are among the first
    /// [`IMPORT_ERRORS_KEPT_MAX`]. What is committed with the last rows says that the import is finished.
    pub async fn write(&mut self, batch: &Batch) -> Result<Vec<RowError>> {
        for attempt in 1.. {
            match self.try_write(batch).await {
                // Somebody took an external id or deleted a label between the look-up and the COPY, or got in the way of it.
                Err(error)
                    if error.constraint().is_some() || matches!(error, Error::Aborted { .. } | Error::Conflict(_)) =>
                {
                    if self.task.is_one_transaction() || attempt == BATCH_TRIES_MAX {
                        return Err(Error::Aborted {
                            reason: "CONFLICT",
                            message: "the import got in the way of another request; try again".to_owned(),
                        });
                    }
                    self.conn.client.batch_execute("ROLLBACK").await?;
                    self.users.clear();
                    self.labels.clear();
                }
                written => return written,
            }
        }
        Err(Error::Internal("a batch was tried without end"))
    }

    async fn try_write(&mut self, batch: &Batch) -> Result<Vec<RowError>> {
        let task = Arc::clone(&self.task);
        let columns = batch.columns.clone().ok_or(Error::Internal("a batch has no columns"))?;
        if !task.is_one_transaction() {
            self.conn.enqueue("BEGIN")?;
        }
        let kept = self.totals.error_count.min(IMPORT_ERRORS_KEPT_MAX as u64) as usize;
        let resolved = self.resolve(&batch.rows, &columns, IMPORT_ERRORS_KEPT_MAX - kept).await?;
        let updated_count = write::write(&self.conn, &task, &columns, &resolved).await?;

        let bad_rows = batch.rows.len() - resolved.new.len() - resolved.existing.len() - resolved.skipped.len();
        let mut totals = self.totals;
        totals.offset = batch.offset;
        totals.line_number = batch.line_number;
        totals.row_count += batch.rows.len() as u64 + batch.rejected_count;
        totals.created_count += resolved.new.len() as u64;
        totals.updated_count += updated_count;
        totals.skipped_count += (resolved.skipped.len() + resolved.existing.len()) as u64 - updated_count;
        totals.rejected_count += bad_rows as u64 + batch.rejected_count;
        totals.error_count += resolved.error_count + batch.error_count;

        let mut errors = [&batch.errors[..], &resolved.errors].concat();
        errors.sort_by_key(|error| error.row_number);
        errors.truncate(IMPORT_ERRORS_KEPT_MAX - kept);
        if !task.is_one_transaction() {
            state::keep_errors(&self.conn, task.import_id, kept, &errors).await?;
            state::keep(&self.conn, &task, &totals, &columns, batch.is_last).await?;
            self.conn.commit().await.map_err(Error::with_request_id)?;
        } else if !task.validate_only {
            self.errors.extend_from_slice(&errors);
            // Whoever looks at the import is told less if this fails, and that is all.
            let _ = state::show_progress(&self.db, task.import_id, &totals).await;
        }
        self.totals = totals;
        self.columns = Some(columns);
        Ok(errors)
    }

    /// Commits, or rolls back what must not stay.
    pub async fn finish(self) -> Result<ImportSummary> {
        let (task, totals) = (&*self.task, &self.totals);
        let state = if task.mode == ImportMode::Atomic && totals.rejected_count > 0 {
            ImportState::Rejected
        } else if task.validate_only {
            ImportState::Validated
        } else {
            ImportState::Committed
        };
        if task.is_one_transaction() {
            if state == ImportState::Committed {
                let columns = self.columns.as_ref().ok_or(Error::Internal("an import ends without a batch"))?;
                state::keep(&self.conn, task, totals, columns, true).await?;
            }
            match state {
                ImportState::Committed => self.conn.commit().await.map_err(Error::with_request_id)?,
                _ => self.conn.client.batch_execute("ROLLBACK").await?,
            }
            if state == ImportState::Rejected && !task.validate_only {
                self.conn.enqueue("BEGIN")?;
                state::reject(&self.conn, task.import_id, totals, &self.errors).await?;
                self.conn.commit().await.map_err(Error::with_request_id)?;
            }
        }
        let summary = task.summary(totals, state);
        // It is committed, whatever happens to the connection now.
        self.close().await;
        Ok(summary)
    }

    /// Gives the connection back to the pool, or lets it be closed if its lock cannot be freed.
    async fn close(self) {
        if self.conn.client.batch_execute("SELECT pg_advisory_unlock_all()").await.is_ok() {
            self.conn.set_discard(false);
        }
    }
}

fn running(import_id: Uuid) -> Error {
    Error::Aborted {
        reason: "IMPORT_RUNNING",
        message: format!("another call works on import \"{import_id}\"; wait until it has ended"),
    }
}
