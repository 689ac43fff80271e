//! The stored state of an import: its row in `imports`, its lock, and the transitions.

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Checkpoint, Conn, IMPORT_ERRORS_STORED_MAX, ImportSpec};
use crate::{
    csv::{Header, RowError},
    db::{Db, conn::Params},
    error::{Error, Result},
    pb::{ImportMode, ImportState},
};

/// Takes the import's lock until the connection releases it; returns false if another connection has it.
pub(super) async fn lock_for_session(db: &Conn, import_id: Uuid) -> Result<bool> {
    const SQL: &str = "-- lock_import
        SELECT pg_try_advisory_lock(hashtextextended('import ' || $1::uuid::text, 0)) AS locked";
    Ok(db.query_one(SQL, &[&import_id]).await?.get("locked"))
}

/// Takes the import's lock until the end of the transaction; returns false if another connection has it.
pub(super) async fn lock_for_transaction(db: &Conn, import_id: Uuid) -> Result<bool> {
    const SQL: &str = "-- lock_import_in_transaction
        SELECT pg_try_advisory_xact_lock(hashtextextended('import ' || $1::uuid::text, 0)) AS locked";
    Ok(db.query_one(SQL, &[&import_id]).await?.get("locked"))
}

/// Returns whether any connection has the import's lock. Does not take it: that could make a concurrent call fail.
pub(super) async fn is_locked(db: &Conn, import_id: Uuid) -> Result<bool> {
    // pg_locks shows the key of 64 bits in two halves, with objsubid 1.
    const SQL: &str = "-- is_import_locked
        SELECT EXISTS (
            SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
            WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                AND (l.classid::int8 << 32 | l.objid::int8) = hashtextextended('import ' || $1::uuid::text, 0)
        ) AS locked";
    Ok(db.query_one(SQL, &[&import_id]).await?.get("locked"))
}

/// A row of `imports`.
pub(super) struct StoredImport {
    pub caller_id: Uuid,
    pub mode: i16,
    pub state: ImportState,
    /// `None` if an older version started the import.
    pub fingerprint: Option<Vec<u8>>,
    pub total_bytes: u64,
    /// Whether the file was read to its end.
    pub is_finished: bool,
    pub checkpoint: Checkpoint,
    /// The file's [header](Header::names); `None` until a batch is committed.
    pub column_names: Option<Vec<String>>,
}

impl StoredImport {
    /// Returns whether the stream continues at the checkpoint instead of at the start of the file.
    pub fn is_resumable(&self) -> bool {
        self.state == ImportState::Running && self.mode == ImportMode::SkipInvalid as i16 && self.checkpoint.offset > 0
    }

    /// Fails with `IMPORT_MISMATCH` unless `spec` has the same caller, options and file size as this import.
    pub fn check_same(&self, spec: &ImportSpec) -> Result<()> {
        let expected_sizes = match self.state {
            // A rejected file may be corrected before it is sent again.
            ImportState::Rejected => [0, spec.total_bytes],
            _ if self.is_finished => [0, self.checkpoint.offset],
            _ if self.total_bytes == 0 => [0, spec.total_bytes],
            _ => [0, self.total_bytes],
        };
        let is_same = self.caller_id == spec.caller_id
            && self.mode == spec.mode as i16
            && self.fingerprint.as_deref().is_none_or(|fingerprint| *fingerprint == spec.fingerprint)
            && expected_sizes.contains(&spec.total_bytes);
        let mismatch = |message: String| Err(Error::precondition("IMPORT_MISMATCH", "options.import_id", message));
        if !is_same {
            return mismatch(format!(
                "import \"{}\" has other options, another file size or another caller; expected the same, or a new import_id",
                spec.import_id
            ));
        }
        if self.is_resumable() && self.column_names.is_none() {
            return mismatch(format!(
                "import \"{}\" was started by an older version and cannot be resumed; expected a new import_id",
                spec.import_id
            ));
        }
        Ok(())
    }
}

pub(super) async fn find(db: &Conn, import_id: Uuid) -> Result<Option<StoredImport>> {
    // Imports of older versions have no state: 4 is RUNNING, 1 is COMMITTED.
    const SQL: &str = "-- find_import
        SELECT caller_id, mode, coalesce(state, CASE WHEN finish_time IS NULL THEN 4 ELSE 1 END::smallint) AS state,
            fingerprint, total_bytes, finish_time IS NOT NULL AS is_finished, columns, committed_offset, committed_line,
            row_count, created_count, updated_count, skipped_count, rejected_count, error_count
        FROM imports
        WHERE id = $1";
    let Some(row) = db.query_opt(SQL, &[&import_id]).await? else { return Ok(None) };
    let count = |name: &str| row.get::<_, i64>(name).cast_unsigned();
    Ok(Some(StoredImport {
        caller_id: row.get("caller_id"),
        mode: row.get("mode"),
        state: state_from_row(&row)?,
        fingerprint: row.get("fingerprint"),
        total_bytes: count("total_bytes"),
        is_finished: row.get("is_finished"),
        column_names: row.get("columns"),
        checkpoint: Checkpoint {
            offset: count("committed_offset"),
            line_number: count("committed_line"),
            row_count: count("row_count"),
            created_count: count("created_count"),
            updated_count: count("updated_count"),
            skipped_count: count("skipped_count"),
            rejected_count: count("rejected_count"),
            error_count: count("error_count"),
        },
    }))
}

pub(super) fn state_from_row(row: &Row) -> Result<ImportState> {
    ImportState::try_from(i32::from(row.get::<_, i16>("state")))
        .map_err(|_| Error::Internal("an import has an unknown state"))
}

/// Moves a new, rejected or interrupted import without committed rows to RUNNING, at the start of the file.
pub(super) async fn start(db: &Conn, spec: &ImportSpec) -> Result<()> {
    const SQL: &str = "-- start_import
        WITH cleared AS (
            DELETE FROM import_errors WHERE import_id = /* id */ $1
        )
        INSERT INTO imports AS i (id, caller_id, mode, fingerprint, total_bytes, state, committed_offset, row_count,
            created_count, rejected_count, error_count)
        VALUES (/* id */ $1, /* caller_id */ $2, /* mode */ $3, /* fingerprint */ $4, /* total_bytes */ $5,
            /* state */ $6, 0, 0, 0, 0, 0)
        ON CONFLICT (id) DO UPDATE SET
            fingerprint = excluded.fingerprint,
            total_bytes = excluded.total_bytes,
            state = excluded.state,
            finish_time = NULL,
            create_time = CASE WHEN i.state = excluded.state THEN i.create_time ELSE now() END,
            row_count = 0,
            created_count = 0,
            updated_count = 0,
            skipped_count = 0,
            rejected_count = 0,
            error_count = 0,
            stored_error_count = 0";
    let ImportSpec { import_id, caller_id, mode, fingerprint, total_bytes, .. } = spec;
    let (mode, state, total_bytes) = (*mode as i16, ImportState::Running as i16, total_bytes.cast_signed());
    check_one_row(db.execute(SQL, &[import_id, caller_id, &mode, &&fingerprint[..], &total_bytes, &state]).await?)
}

/// Continues an interrupted import at its checkpoint. Its state is RUNNING already: only the lock was lost.
pub(super) async fn resume(db: &Conn, spec: &ImportSpec) -> Result<()> {
    const SQL: &str = "-- resume_import
        UPDATE imports SET total_bytes = CASE total_bytes WHEN 0 THEN $2 ELSE total_bytes END WHERE id = $1";
    check_one_row(db.execute(SQL, &[&spec.import_id, &spec.total_bytes.cast_signed()]).await?)
}

/// Stores the checkpoint, in the transaction of the rows before it. With the last rows, moves the import to COMMITTED.
pub(super) async fn save_checkpoint(
    db: &Conn,
    spec: &ImportSpec,
    checkpoint: &Checkpoint,
    header: &Header,
    is_finished: bool,
) -> Result<()> {
    const SQL: &str = "-- save_import_checkpoint
        UPDATE imports SET
            committed_offset = /* offset */ $2,
            committed_line = /* line_number */ $3,
            row_count = /* row_count */ $4,
            created_count = /* created_count */ $5,
            updated_count = /* updated_count */ $6,
            skipped_count = /* skipped_count */ $7,
            rejected_count = /* rejected_count */ $8,
            error_count = /* error_count */ $9,
            stored_error_count = least(/* error_count */ $9, /* errors_stored_max */ $13::int8),
            columns = /* column_names */ $10,
            state = /* state */ $11,
            finish_time = CASE WHEN /* is_finished */ $12 THEN now() END
        WHERE id = /* id */ $1";
    // Unchanged issues are stored to detect a second row with their external id. After the last row they are not needed.
    const DELETE_UNCHANGED: &str = "-- delete_unchanged_import_issues
        DELETE FROM import_issues WHERE import_id = $1 AND version IS NULL";
    let [offset, line_number, rows, created, updated, skipped, rejected, errors] = checkpoint_values(checkpoint);
    let state = if is_finished { ImportState::Committed } else { ImportState::Running } as i16;
    let id = &spec.import_id;
    let names = header.names();
    #[rustfmt::skip]
    let saved = db.execute(SQL, &[
        id, &offset, &line_number, &rows, &created, &updated, &skipped, &rejected, &errors, &names, &state, &is_finished,
        &(IMPORT_ERRORS_STORED_MAX as i64),
    ]).await?;
    if is_finished && checkpoint.skipped_count > 0 {
        // There can be as many as the file has rows, and no other call waits for this.
        db.enqueue("SET LOCAL statement_timeout = 0")?;
        db.execute(DELETE_UNCHANGED, &[id]).await?;
    }
    check_one_row(saved)
}

/// Stores the counts of an atomic import in a transaction of its own, so that GetImport shows its progress.
pub(super) async fn publish_progress(db: &Db, import_id: Uuid, checkpoint: &Checkpoint) -> Result<()> {
    const SQL: &str = "-- publish_import_progress
        UPDATE imports SET
            row_count = /* row_count */ $2,
            created_count = /* created_count */ $3,
            updated_count = /* updated_count */ $4,
            skipped_count = /* skipped_count */ $5,
            rejected_count = /* rejected_count */ $6,
            error_count = /* error_count */ $7
        WHERE id = /* id */ $1";
    let [_, _, rows, created, updated, skipped, rejected, errors] = checkpoint_values(checkpoint);
    let tx = db.begin().await?;
    // Progress may be lost in a crash: do not wait for the disk.
    tx.enqueue("SET LOCAL synchronous_commit = off")?;
    tx.execute(SQL, &[&import_id, &rows, &created, &updated, &skipped, &rejected, &errors]).await?;
    tx.commit().await
}

/// Moves an atomic import to REJECTED and stores its errors. Takes several statements: call it in a transaction.
pub(super) async fn reject(db: &Conn, import_id: Uuid, checkpoint: &Checkpoint, errors: &[RowError]) -> Result<()> {
    const SQL: &str = "-- reject_import
        UPDATE imports SET
            state = /* state */ $2,
            finish_time = now(),
            row_count = /* row_count */ $3,
            created_count = 0,
            updated_count = 0,
            skipped_count = 0,
            rejected_count = /* rejected_count */ $4,
            error_count = /* error_count */ $5,
            stored_error_count = /* stored_error_count */ $6
        WHERE id = /* id */ $1";
    let stored_error_count = errors.len() as i32;
    let [_, _, rows, .., rejected, error_count] = checkpoint_values(checkpoint);
    let state = ImportState::Rejected as i16;
    let params: Params = &[&import_id, &state, &rows, &rejected, &error_count, &stored_error_count];
    check_one_row(db.execute(SQL, params).await?)?;
    insert_errors(db, import_id, 0, errors).await
}

fn checkpoint_values(checkpoint: &Checkpoint) -> [i64; 8] {
    [
        checkpoint.offset,
        checkpoint.line_number,
        checkpoint.row_count,
        checkpoint.created_count,
        checkpoint.updated_count,
        checkpoint.skipped_count,
        checkpoint.rejected_count,
        checkpoint.error_count,
    ]
    .map(u64::cast_signed)
}

/// Checks that a statement has changed the row of the import, and no other.
pub(super) fn check_one_row(changed: u64) -> Result<()> {
    if changed == 1 { Ok(()) } else { Err(Error::Internal("the row of an import is missing")) }
}

/// Stores errors after the first `stored` ones.
pub(super) async fn insert_errors(db: &Conn, import_id: Uuid, stored: usize, errors: &[RowError]) -> Result<()> {
    const SQL: &str = "-- insert_import_errors
        INSERT INTO import_errors (import_id, position, row_number, line_number, byte_offset, column_name, value, code,
            message)
        SELECT /* import_id */ $1, /* stored */ $2 + n.nth, n.row_number, n.line_number, n.byte_offset, n.column_name,
            n.value, n.code, n.message
        FROM unnest(
            /* row_numbers */ $3::int8[],
            /* line_numbers */ $4::int8[],
            /* byte_offsets */ $5::int8[],
            /* column_names */ $6::text[],
            /* values */ $7::text[],
            /* codes */ $8::text[],
            /* messages */ $9::text[]
        ) WITH ORDINALITY AS n (row_number, line_number, byte_offset, column_name, value, code, message, nth)";
    if errors.is_empty() {
        return Ok(());
    }
    let row_numbers: Vec<i64> = errors.iter().map(|error| error.row_number.cast_signed()).collect();
    let line_numbers: Vec<i64> = errors.iter().map(|error| error.line_number.cast_signed()).collect();
    let byte_offsets: Vec<i64> = errors.iter().map(|error| error.byte_offset.cast_signed()).collect();
    let columns: Vec<&str> = errors.iter().map(|error| &*error.column).collect();
    let values: Vec<&str> = errors.iter().map(|error| &*error.value).collect();
    let codes: Vec<&str> = errors.iter().map(|error| error.code.as_str()).collect();
    let messages: Vec<&str> = errors.iter().map(|error| &*error.message).collect();
    let stored = stored as i64;
    #[rustfmt::skip]
    db.execute(SQL, &[
        &import_id, &stored, &row_numbers, &line_numbers, &byte_offsets, &columns, &values, &codes, &messages,
    ]).await?;
    Ok(())
}
