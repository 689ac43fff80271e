//! What is kept of an import itself: how it stands, and its errors.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, ImportTask, ImportTotals};
use crate::{
    csv::{Columns, RowError},
    db::{Db, Page, PageBounds},
    error::{Error, Result},
    pb::{Import, ImportMode, ImportRowError, ImportState},
    request::timestamp,
};

/// The state of an import; of one by a version that did not keep it, what its times say.
macro_rules! state_column {
    () => {
        "coalesce(state, CASE WHEN finish_time IS NULL THEN 4 ELSE 1 END::smallint)"
    };
}
pub(super) use state_column;

/// The key of the lock that whoever works on an import holds.
macro_rules! lock_key {
    () => {
        "hashtextextended('import ' || $1::uuid::text, 0)"
    };
}

/// Takes the import's lock for the session; false if somebody has it.
pub(super) async fn lock(db: &Conn, import_id: Uuid) -> Result<bool> {
    const SQL: &str = concat!("-- lock_import\nSELECT pg_try_advisory_lock(", lock_key!(), ")");
    Ok(db.query_one(SQL, &[&import_id]).await?.get(0))
}

/// As [`lock`], for the transaction.
pub(super) async fn lock_in_transaction(db: &Conn, import_id: Uuid) -> Result<bool> {
    const SQL: &str = concat!("-- lock_import_in_transaction\nSELECT pg_try_advisory_xact_lock(", lock_key!(), ")");
    Ok(db.query_one(SQL, &[&import_id]).await?.get(0))
}

/// Whether somebody works on the import. Does not take the lock: whoever wants it now would be refused.
async fn is_locked(db: &Conn, import_id: Uuid) -> Result<bool> {
    // A key of 64 bits is shown in two halves, with an objsubid of 1.
    const SQL: &str = concat!(
        "-- is_import_locked
        SELECT EXISTS (
            SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
            WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                AND (l.classid::int8 << 32 | l.objid::int8) = ",
        lock_key!(),
        ")"
    );
    Ok(db.query_one(SQL, &[&import_id]).await?.get(0))
}

/// An import that was begun.
pub(super) struct Found {
    pub caller_id: Uuid,
    pub mode: i16,
    pub state: ImportState,
    /// None: begun by a version that did not keep it.
    pub fingerprint: Option<Vec<u8>>,
    pub total_bytes: u64,
    /// Whether the file was read to its end.
    pub is_whole: bool,
    pub totals: ImportTotals,
    /// None: no rows are in.
    pub columns: Option<Vec<String>>,
}

impl Found {
    /// Whether the rest of the file is to be sent, not all of it.
    pub fn goes_on(&self) -> bool {
        self.state == ImportState::Running && self.mode == ImportMode::SkipInvalid as i16 && self.totals.offset > 0
    }
}

pub(super) async fn find(db: &Conn, import_id: Uuid) -> Result<Option<Found>> {
    const SQL: &str = concat!(
        "-- find_import
        SELECT caller_id, mode, ",
        state_column!(),
        ", fingerprint, total_bytes, finish_time IS NOT NULL, columns, committed_offset,
            committed_line, row_count, created_count, updated_count, skipped_count, rejected_count, error_count
        FROM imports WHERE id = $1"
    );
    let Some(row) = db.query_opt(SQL, &[&import_id]).await? else { return Ok(None) };
    let count = |index: usize| row.get::<_, i64>(index).cast_unsigned();
    Ok(Some(Found {
        caller_id: row.get(0),
        mode: row.get(1),
        state: state_from_row(&row, 2)?,
        fingerprint: row.get(3),
        total_bytes: count(4),
        is_whole: row.get(5),
        columns: row.get(6),
        totals: ImportTotals {
            offset: count(7),
            line_number: count(8),
            row_count: count(9),
            created_count: count(10),
            updated_count: count(11),
            skipped_count: count(12),
            rejected_count: count(13),
            error_count: count(14),
        },
    }))
}

pub(super) fn state_from_row(row: &Row, index: usize) -> Result<ImportState> {
    ImportState::try_from(i32::from(row.get::<_, i16>(index)))
        .map_err(|_| Error::Internal("an import has an unknown state"))
}

/// Says that the import runs: anew, or where it was cut.
pub(super) async fn begin(db: &Conn, task: &ImportTask, goes_on: bool) -> Result<()> {
    // What was rejected, or was cut before rows were in, is replaced.
    const BEGIN: &str = "-- begin_import
        WITH cleared AS (DELETE FROM import_errors WHERE import_id = $1)
        INSERT INTO imports AS i (id, caller_id, mode, fingerprint, total_bytes, state, committed_offset, row_count,
            created_count, rejected_count, error_count)
        VALUES ($1, $2, $3, $4, $5, $6, 0, 0, 0, 0, 0)
        ON CONFLICT (id) DO UPDATE SET fingerprint = excluded.fingerprint, total_bytes = excluded.total_bytes,
            state = excluded.state, finish_time = NULL,
            create_time = CASE WHEN i.state = excluded.state THEN i.create_time ELSE now() END,
            row_count = 0, created_count = 0, updated_count = 0, skipped_count = 0, rejected_count = 0, error_count = 0";
    const GO_ON: &str = "-- go_on_with_import
        UPDATE imports SET total_bytes = CASE total_bytes WHEN 0 THEN $2 ELSE total_bytes END WHERE id = $1";
    let (id, total_bytes) = (task.import_id, task.total_bytes.cast_signed());
    let begun = if goes_on {
        db.execute(GO_ON, &[&id, &total_bytes]).await?
    } else {
        let (mode, state) = (task.mode as i16, ImportState::Running as i16);
        db.execute(BEGIN, &[&id, &task.caller_id, &mode, &&task.fingerprint[..], &total_bytes, &state]).await?
    };
    one_import(begun)
}

/// Keeps how far the import is, in the transaction of the rows; with the last of them, that it is finished.
pub(super) async fn keep(
    db: &Conn,
    task: &ImportTask,
    totals: &ImportTotals,
    columns: &Columns,
    is_finished: bool,
) -> Result<()> {
    const KEEP: &str = "-- keep_import
        UPDATE imports SET committed_offset = $2, committed_line = $3, columns = $4, row_count = $5, created_count = $6,
            updated_count = $7, skipped_count = $8, rejected_count = $9, error_count = $10, state = $11,
            finish_time = CASE WHEN $12 THEN now() END
        WHERE id = $1";
    // No row of the file comes after the last.
    const FORGET: &str =
        "-- forget_unchanged_issues\nDELETE FROM import_issues WHERE import_id = $1 AND version IS NULL";
    let [offset, line_number, rows, created, updated, skipped, rejected, errors] = counts(totals);
    let state = if is_finished { ImportState::Committed } else { ImportState::Running } as i16;
    let names = columns.names();
    let id = &task.import_id;
    let kept = db
        .execute(
            KEEP,
            &[
                id,
                &offset,
                &line_number,
                &names,
                &rows,
                &created,
                &updated,
                &skipped,
                &rejected,
                &errors,
                &state,
                &is_finished,
            ],
        )
        .await?;
    if is_finished && totals.skipped_count > 0 {
        // As many as the file has rows: that may take long, and is only waited for by this import.
        db.enqueue("SET LOCAL statement_timeout = 0")?;
        db.execute(FORGET, &[id]).await?;
    }
    one_import(kept)
}

/// Shows how far an import is whose own transaction nobody sees yet.
pub(super) async fn show_progress(db: &Db, import_id: Uuid, totals: &ImportTotals) -> Result<()> {
    const SQL: &str = "-- show_import_progress
        UPDATE imports SET row_count = $2, created_count = $3, updated_count = $4, skipped_count = $5,
            rejected_count = $6, error_count = $7
        WHERE id = $1";
    let [_, _, rows, created, updated, skipped, rejected, errors] = counts(totals);
    let tx = db.begin().await?;
    // Nothing is lost with it, so nobody waits for the disk.
    tx.enqueue("SET LOCAL synchronous_commit = off")?;
    tx.execute(SQL, &[&import_id, &rows, &created, &updated, &skipped, &rejected, &errors]).await?;
    tx.commit().await
}

/// Says that nothing of the import is in, and why. Takes more than one statement: call it in a transaction.
pub(super) async fn reject(db: &Conn, import_id: Uuid, totals: &ImportTotals, errors: &[RowError]) -> Result<()> {
    const SQL: &str = "-- reject_import
        UPDATE imports SET state = $2, finish_time = now(), row_count = $3, created_count = 0, updated_count = 0,
            skipped_count = 0, rejected_count = $4, error_count = $5
        WHERE id = $1";
    let [_, _, rows, .., rejected, error_count] = counts(totals);
    let state = ImportState::Rejected as i16;
    one_import(db.execute(SQL, &[&import_id, &state, &rows, &rejected, &error_count]).await?)?;
    keep_errors(db, import_id, 0, errors).await
}

fn counts(totals: &ImportTotals) -> [i64; 8] {
    [
        totals.offset,
        totals.line_number,
        totals.row_count,
        totals.created_count,
        totals.updated_count,
        totals.skipped_count,
        totals.rejected_count,
        totals.error_count,
    ]
    .map(u64::cast_signed)
}

fn one_import(touched: u64) -> Result<()> {
    if touched == 1 { Ok(()) } else { Err(Error::Internal("the record of an import is gone")) }
}

/// Keeps errors behind those that are kept already.
pub(super) async fn keep_errors(db: &Conn, import_id: Uuid, kept: usize, errors: &[RowError]) -> Result<()> {
    const SQL: &str = "-- keep_import_errors
        INSERT INTO import_errors (import_id, position, row_number, line_number, byte_offset, column_name, value, code,
            message)
        SELECT $1, $2 + nth, row_number, line_number, byte_offset, column_name, value, code, message
        FROM unnest($3::int8[], $4::int8[], $5::int8[], $6::text[], $7::text[], $8::text[], $9::text[]) WITH ORDINALITY
            AS n (row_number, line_number, byte_offset, column_name, value, code, message, nth)";
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
    let kept = kept as i64;
    db.execute(
        SQL,
        &[&import_id, &kept, &row_numbers, &line_numbers, &byte_offsets, &columns, &values, &codes, &messages],
    )
    .await
    .map(drop)
}

/// How an import stands: one of `owner`'s, or anybody's if there is no `owner`. `field` names its id in errors.
pub async fn get(db: &Conn, import_id: Uuid, owner: Option<Uuid>, field: &str) -> Result<Import> {
    const SQL: &str = concat!(
        "-- get_import
        SELECT caller_id, mode, ",
        state_column!(),
        ", create_time, finish_time, revert_time, committed_offset, total_bytes, row_count,
            created_count, updated_count, skipped_count, rejected_count, error_count
        FROM imports WHERE id = $1"
    );
    // In this order: an import that ends in between is finished, not cut.
    let locked = is_locked(db, import_id).await?;
    let row = db.query_opt(SQL, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", field, import_id))?;
    let caller_id = row.get(0);
    check_owner(caller_id, owner)?;
    let mode: i16 = row.get(1);
    let state = match state_from_row(&row, 2)? {
        ImportState::Running if !locked => ImportState::Interrupted,
        state => state,
    };
    // What one that is all or nothing had done is rolled back.
    let is_undone = state == ImportState::Interrupted && mode == ImportMode::Atomic as i16;
    let count = |index: usize| if is_undone { 0 } else { row.get(index) };
    let time = |index: usize| row.get::<_, Option<DateTime<Utc>>>(index).map(timestamp);
    Ok(Import {
        id: import_id.to_string(),
        state: state.into(),
        mode: mode.into(),
        caller_id: caller_id.to_string(),
        create_time: time(3),
        finish_time: time(4),
        revert_time: time(5),
        committed_offset: row.get(6),
        total_bytes: row.get(7),
        row_count: count(8),
        created_count: count(9),
        updated_count: count(10),
        skipped_count: count(11),
        rejected_count: count(12),
        error_count: count(13),
    })
}

/// Whether an import of this user is for `owner`; if there is none, for anybody.
pub(super) fn check_owner(caller_id: Uuid, owner: Option<Uuid>) -> Result<()> {
    match owner {
        Some(owner) if owner != caller_id => {
            Err(Error::PermissionDenied("the import is another user's; administrators have those of all".to_owned()))
        }
        _ => Ok(()),
    }
}

/// The errors of an import behind the one at position `after`, each with its position. Whose import it is as in [`get`].
pub async fn list_errors(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    after: i32,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<(i32, ImportRowError)>> {
    const OWNER: &str = "-- get_owner_of_import\nSELECT caller_id FROM imports WHERE id = $1";
    const SQL: &str = "-- list_import_errors
        SELECT position, row_number, line_number, byte_offset, column_name, value, code, message
        FROM import_errors WHERE import_id = $1 AND position > $2 ORDER BY position LIMIT $3";
    let row = db.query_opt(OWNER, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", "import_id", import_id))?;
    check_owner(row.get(0), owner)?;
    let from_row = |row: &Row| {
        let error = ImportRowError {
            row_number: row.get(1),
            line_number: row.get(2),
            byte_offset: row.get(3),
            column: row.get(4),
            value: row.get(5),
            code: row.get(6),
            message: row.get(7),
        };
        Ok((row.get(0), error))
    };
    db.query_page(SQL, &[&import_id, &after, &limit], bounds, from_row, |(_, error)| prost::Message::encoded_len(error))
        .await
}
