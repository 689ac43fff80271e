//! Imports in the database. `docs/imports.md` draws the state machine: its states, transitions and tables.
//!
//! [`run`] is an import in state RUNNING. In one transaction, it writes a file that [`staging`] has stored first. For each
//! batch, [`references`] looks up the names that rows refer to, [`plan`] decides whether a row is inserted, updates an issue, is
//! skipped or is rejected, and [`write`](mod@write) executes the plan. [`state`] stores the transitions, [`read`] returns an
//! import and its errors, [`revert`](mod@revert) undoes it, and [`retention`] removes old imports and errors.

mod plan;
mod read;
mod references;
mod retention;
mod revert;
mod run;
mod staging;
mod state;
mod write;

pub use read::{get, list_errors};
pub use retention::{prune_import_errors, prune_imports};
#[cfg(feature = "internals")]
pub use revert::IMPORT_CHANGED_SHOWN_MAX;
pub use revert::revert;
pub use run::{ImportRun, Started, Written};
pub use staging::prune_import_staging;

use uuid::Uuid;

use super::conn::Conn;
use crate::{
    csv::{Batch, FilePosition, Format},
    error::Error,
    pb::{ImportMode, ImportState, ImportSummary, OnExisting, Priority},
};

/// The maximum number of row errors sent on the stream of an import.
pub const IMPORT_ERRORS_SENT_MAX: u64 = 1_000;
/// The maximum number of row errors stored for an import.
pub const IMPORT_ERRORS_STORED_MAX: usize = 10_000;

/// The validated options of an import.
#[derive(Clone, Debug)]
pub struct ImportSpec {
    pub import_id: Uuid,
    pub caller_id: Uuid,
    pub mode: ImportMode,
    pub validate_only: bool,
    /// The file's size in bytes; 0 if unknown.
    pub total_bytes: u64,
    pub on_existing: OnExisting,
    pub format: Format,
    /// The priority of new issues whose row has none. The default status is part of `format`.
    pub default_priority: Priority,
    /// The username of the assignee of new issues whose row has none.
    pub default_assignee: Option<String>,
    pub create_labels: bool,
    /// SHA-256 of the options that must be the same when the import is sent again.
    pub fingerprint: [u8; 32],
}

/// How far an import is: a position in the file, and the counts of the rows before it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checkpoint {
    pub offset: u64,
    pub line_number: u64,
    pub row_count: u64,
    pub created_count: u64,
    pub updated_count: u64,
    pub skipped_count: u64,
    pub rejected_count: u64,
    pub error_count: u64,
}

impl Checkpoint {
    pub fn position(&self) -> FilePosition {
        FilePosition { offset: self.offset, line_number: self.line_number, row_count: self.row_count }
    }
}

/// How far the parser is in the file, and what it has found.
#[derive(Clone, Copy, Debug)]
struct ParsedRows {
    offset: u64,
    row_count: u64,
    rejected_count: u64,
    error_count: u64,
}

impl ParsedRows {
    /// Returns the rows before the checkpoint, with those among them that the database has rejected.
    fn before(checkpoint: &Checkpoint) -> Self {
        let Checkpoint { offset, row_count, rejected_count, error_count, .. } = *checkpoint;
        Self { offset, row_count, rejected_count, error_count }
    }

    /// Adds the next batch.
    fn add(&mut self, batch: &Batch) {
        self.offset = batch.end_offset;
        self.row_count += batch.row_count();
        self.rejected_count += batch.rejected_count;
        self.error_count += batch.error_count;
    }
}

impl ImportSpec {
    /// Returns whether all rows are written in one transaction, instead of one per batch.
    pub fn is_single_transaction(&self) -> bool {
        self.mode == ImportMode::Atomic || self.validate_only
    }

    /// Returns where the stream must continue if it is cut now. A dry run returns what the real import would.
    fn committed_offset(&self, checkpoint: &Checkpoint) -> u64 {
        if self.mode == ImportMode::SkipInvalid { checkpoint.offset } else { 0 }
    }

    fn summary(&self, checkpoint: &Checkpoint, state: ImportState) -> ImportSummary {
        let written = |count: u64| if state == ImportState::Rejected { 0 } else { count.cast_signed() };
        ImportSummary {
            import_id: self.import_id.to_string(),
            state: state.into(),
            row_count: checkpoint.row_count.cast_signed(),
            created_count: written(checkpoint.created_count),
            rejected_count: checkpoint.rejected_count.cast_signed(),
            error_count: checkpoint.error_count.cast_signed(),
            byte_count: checkpoint.offset.cast_signed(),
            updated_count: written(checkpoint.updated_count),
            skipped_count: written(checkpoint.skipped_count),
        }
    }
}

fn already_running(import_id: Uuid) -> Error {
    Error::Aborted {
        reason: "IMPORT_RUNNING",
        message: format!("import \"{import_id}\" is in use by another call; retry after that call has ended"),
    }
}
