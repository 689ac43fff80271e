//! Reads an import and its errors.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, state};
use crate::{
    db::{Page, PageBounds, time::timestamp},
    error::{Error, Result},
    pb::{Import, ImportMode, ImportRowError, ImportState},
};

/// Returns an import. `owner` restricts it to imports of that user; `field` names the id in errors.
///
/// Fails with `NotFound`, or `PermissionDenied` if the import is another user's.
pub async fn get(db: &Conn, import_id: Uuid, owner: Option<Uuid>, field: &str) -> Result<Import> {
    // Imports of older versions have no state: 4 is RUNNING, 1 is COMMITTED.
    const SQL: &str = "-- get_import
        SELECT caller_id, mode, coalesce(state, CASE WHEN finish_time IS NULL THEN 4 ELSE 1 END::smallint) AS state,
            create_time, finish_time, revert_time, committed_offset, total_bytes, row_count, created_count,
            updated_count, skipped_count, rejected_count, error_count
        FROM imports
        WHERE id = $1";
    // The lock first: an import that finishes between the two statements is then not taken for an interrupted one.
    let locked = state::is_locked(db, import_id).await?;
    let row = db.query_opt(SQL, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", field, import_id))?;
    let caller_id = row.get("caller_id");
    check_owner(caller_id, owner)?;
    let mode: i16 = row.get("mode");
    let state = match state::state_from_row(&row)? {
        ImportState::Running if !locked => ImportState::Interrupted,
        state => state,
    };
    // The rows of an interrupted atomic import are rolled back; its published counts are not.
    let is_rolled_back = state == ImportState::Interrupted && mode == ImportMode::Atomic as i16;
    let count = |name: &str| if is_rolled_back { 0 } else { row.get(name) };
    let time = |name: &str| row.get::<_, Option<DateTime<Utc>>>(name).map(timestamp);
    Ok(Import {
        id: import_id.to_string(),
        state: state.into(),
        mode: mode.into(),
        caller_id: caller_id.to_string(),
        create_time: time("create_time"),
        finish_time: time("finish_time"),
        revert_time: time("revert_time"),
        committed_offset: row.get("committed_offset"),
        total_bytes: row.get("total_bytes"),
        row_count: count("row_count"),
        created_count: count("created_count"),
        updated_count: count("updated_count"),
        skipped_count: count("skipped_count"),
        rejected_count: count("rejected_count"),
        error_count: count("error_count"),
    })
}

/// Fails with `PermissionDenied` if `owner` is set and is not the import's caller.
pub(super) fn check_owner(caller_id: Uuid, owner: Option<Uuid>) -> Result<()> {
    match owner {
        Some(owner) if owner != caller_id => {
            let message = "the import belongs to another user; requires role administrator".to_owned();
            Err(Error::PermissionDenied(message))
        }
        _ => Ok(()),
    }
}

/// Returns a page of an import's errors after position `after`, each with its position. `owner` as in [`get`].
pub async fn list_errors(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    after: i32,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<(i32, ImportRowError)>> {
    const OWNER: &str = "-- get_owner_of_import
        SELECT caller_id FROM imports WHERE id = $1";
    const SQL: &str = "-- list_import_errors
        SELECT position, row_number, line_number, byte_offset, column_name, value, code, message
        FROM import_errors
        WHERE import_id = $1 AND position > $2
        ORDER BY position
        LIMIT $3";
    let row = db.query_opt(OWNER, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", "import_id", import_id))?;
    check_owner(row.get("caller_id"), owner)?;
    let from_row = |row: &Row| {
        let error = ImportRowError {
            row_number: row.get("row_number"),
            line_number: row.get("line_number"),
            byte_offset: row.get("byte_offset"),
            column: row.get("column_name"),
            value: row.get("value"),
            code: row.get("code"),
            message: row.get("message"),
        };
        Ok((row.get("position"), error))
    };
    db.query_page(SQL, &[&import_id, &after, &limit], bounds, from_row, |(_, error)| prost::Message::encoded_len(error))
        .await
}
