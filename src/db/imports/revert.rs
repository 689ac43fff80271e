//! Reverts an import: COMMITTED, or interrupted with committed rows, to REVERTED.

use uuid::Uuid;

use super::{
    Conn, already_running,
    read::check_owner,
    state::{check_one_row, lock_for_transaction, state_from_row},
};
use crate::{
    error::{Error, Result},
    pb::{ImportMode, ImportState, RevertImportResponse},
};

/// The maximum number of issues changed since the import that a response or an error names.
pub const IMPORT_CHANGED_SHOWN_MAX: i64 = 100;

/// Reverts an import: deletes the issues that it created, and restores those that it updated. `owner` restricts it to
/// imports of that user. With `force`, issues that changed since the import are kept; without it, they fail the call with
/// `ChangedSince`. An import that is reverted already returns its stored response.
///
/// Takes several statements: call it in a transaction.
pub async fn revert(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    actor_id: Uuid,
    force: bool,
) -> Result<RevertImportResponse> {
    // While this call has the import's lock, no other call changes the import.
    let is_locked = lock_for_transaction(db, import_id).await?;
    if let Some(reverted) = check_state(db, import_id, owner, is_locked).await? {
        return Ok(reverted);
    }
    // A million issues take longer than the default limit; the caller's deadline still applies. An import can be most of a
    // table, which a sequential scan reads fastest.
    db.enqueue("SET LOCAL statement_timeout = 0; SET LOCAL enable_seqscan = on")?;
    lock_issues(db, import_id).await?;
    let (kept_count, kept_ids) = find_changed(db, import_id).await?;
    if kept_count > 0 && !force {
        return Err(Error::ChangedSince { count: kept_count, ids: kept_ids });
    }
    let removed_count = delete_created(db, import_id).await?;
    let restored_count = restore_updated(db, import_id, actor_id).await?;
    let response = RevertImportResponse {
        removed_count,
        restored_count,
        kept_count,
        kept_ids: kept_ids.iter().map(Uuid::to_string).collect(),
    };
    finish_revert(db, import_id, &response, &kept_ids).await?;
    Ok(response)
}

/// Returns the stored response if the import is reverted already. Fails if it cannot be reverted.
async fn check_state(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    is_locked: bool,
) -> Result<Option<RevertImportResponse>> {
    // Imports of older versions have no state: 4 is RUNNING, 1 is COMMITTED.
    const SQL: &str = "-- get_import_to_revert
        SELECT caller_id, mode, coalesce(state, CASE WHEN finish_time IS NULL THEN 4 ELSE 1 END::smallint) AS state,
            removed_count, restored_count, kept_count, kept_ids
        FROM imports
        WHERE id = $1";
    let row = db.query_opt(SQL, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", "import_id", import_id))?;
    check_owner(row.get("caller_id"), owner)?;
    if !is_locked {
        return Err(already_running(import_id));
    }
    let state = state_from_row(&row)?;
    if state == ImportState::Reverted {
        return Ok(Some(RevertImportResponse {
            removed_count: row.get("removed_count"),
            restored_count: row.get("restored_count"),
            kept_count: row.get("kept_count"),
            kept_ids: row.get::<_, Vec<Uuid>>("kept_ids").iter().map(Uuid::to_string).collect(),
        }));
    }
    let has_committed_rows = match state {
        ImportState::Committed => true,
        ImportState::Running => row.get::<_, i16>("mode") == ImportMode::SkipInvalid as i16,
        _ => false,
    };
    if !has_committed_rows {
        let message = format!("import \"{import_id}\" has no committed rows; expected a committed import");
        return Err(Error::precondition("IMPORT_NOT_COMMITTED", "import_id", message));
    }
    Ok(None)
}

/// Locks the issues of the import, and the labels that it may restore, until the end of the transaction.
async fn lock_issues(db: &Conn, import_id: Uuid) -> Result<()> {
    // Labels before issues, in the order in which DeleteLabel locks them: the opposite order would deadlock.
    const LABELS: &str = "-- lock_labels_to_restore
        SELECT count(*) FROM (
            SELECT FROM labels
            WHERE id IN (SELECT unnest(label_ids) FROM import_issues WHERE import_id = $1)
            ORDER BY id
            FOR KEY SHARE
        ) locked";
    const ISSUES: &str = "-- lock_issues_of_import
        SELECT count(*) FROM (
            SELECT FROM issues
            WHERE id IN (
                SELECT id FROM issues WHERE import_id = $1
                UNION ALL
                SELECT issue_id FROM import_issues WHERE import_id = $1 AND version IS NOT NULL)
            ORDER BY id
            FOR UPDATE
        ) locked";
    db.query_one(LABELS, &[&import_id]).await?;
    db.query_one(ISSUES, &[&import_id]).await.map(drop)
}

/// Returns how many of the import's issues were changed or commented since, and the first
/// [`IMPORT_CHANGED_SHOWN_MAX`] of them.
async fn find_changed(db: &Conn, import_id: Uuid) -> Result<(i64, Vec<Uuid>)> {
    const SQL: &str = "-- find_issues_changed_since_import
        WITH changed AS MATERIALIZED (
            SELECT i.id
            FROM issues i
            WHERE i.import_id = $1
                AND (i.version <> 1 OR EXISTS (SELECT FROM comments c WHERE c.issue_id = i.id))
            UNION ALL
            SELECT i.id
            FROM import_issues p JOIN issues i ON i.id = p.issue_id
            WHERE p.import_id = $1 AND p.version IS NOT NULL
                AND (i.version <> p.version
                    OR (SELECT count(*) FROM comments c WHERE c.issue_id = i.id) <> p.comment_count)
        )
        SELECT (SELECT count(*) FROM changed) AS changed_count,
            ARRAY(SELECT id FROM changed ORDER BY id LIMIT $2) AS changed_ids";
    let row = db.query_one(SQL, &[&import_id, &IMPORT_CHANGED_SHOWN_MAX]).await?;
    Ok((row.get("changed_count"), row.get("changed_ids")))
}

/// Deletes the issues that the import has created and that have not changed since; returns their number.
async fn delete_created(db: &Conn, import_id: Uuid) -> Result<i64> {
    // Issues in version 1 without comments: nothing refers to them but their labels, and they have no events.
    const LABELS: &str = "-- delete_labels_of_created_issues
        DELETE FROM issue_labels il USING issues i
        WHERE i.id = il.issue_id AND i.import_id = $1 AND i.version = 1
            AND NOT EXISTS (SELECT FROM comments c WHERE c.issue_id = i.id)";
    const ISSUES: &str = "-- delete_created_issues
        DELETE FROM issues i
        WHERE i.import_id = $1 AND i.version = 1
            AND NOT EXISTS (SELECT FROM comments c WHERE c.issue_id = i.id)";
    db.execute(LABELS, &[&import_id]).await?;
    Ok(db.execute(ISSUES, &[&import_id]).await?.cast_signed())
}

/// Restores the issues that the import has updated and that have not changed since; returns how many it has restored.
async fn restore_updated(db: &Conn, import_id: Uuid, actor_id: Uuid) -> Result<i64> {
    const SQL: &str = include_str!("restore_updated_issues.sql");
    // The trigger on issues then takes close_time and reopen_count from the statement.
    db.enqueue("SET LOCAL issue_tracker.restores_status = 'on'")?;
    let restored = db.query_one(SQL, &[&import_id, &actor_id]).await?.get("restored_count");
    db.enqueue("SET LOCAL issue_tracker.restores_status = 'off'")?;
    Ok(restored)
}

/// Moves the import to REVERTED, stores the response, and deletes the previous values of its issues.
async fn finish_revert(db: &Conn, import_id: Uuid, response: &RevertImportResponse, kept_ids: &[Uuid]) -> Result<()> {
    const SQL: &str = "-- finish_import_revert
        UPDATE imports SET
            state = /* state */ $2,
            revert_time = now(),
            removed_count = /* removed_count */ $3,
            restored_count = /* restored_count */ $4,
            kept_count = /* kept_count */ $5,
            kept_ids = /* kept_ids */ $6
        WHERE id = /* id */ $1";
    const DELETE_ISSUES: &str = "-- delete_import_issues
        DELETE FROM import_issues WHERE import_id = $1";
    let RevertImportResponse { removed_count, restored_count, kept_count, .. } = response;
    let state = ImportState::Reverted as i16;
    check_one_row(db.execute(SQL, &[&import_id, &state, removed_count, restored_count, kept_count, &kept_ids]).await?)?;
    db.execute(DELETE_ISSUES, &[&import_id]).await.map(drop)
}
