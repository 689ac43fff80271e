//! Undoing an import.

use uuid::Uuid;

use super::{
    Conn, running,
    state::{check_owner, lock_in_transaction, state_column, state_from_row},
};
use crate::{
    error::{Error, Result},
    pb::{ImportMode, ImportState, RevertImportResponse},
};

/// How many of the issues that were changed since are named.
pub const IMPORT_CHANGED_SHOWN_MAX: i64 = 100;

/// Whether an issue `i` that the import has created was changed or commented since.
macro_rules! created_was_changed {
    () => {
        "(i.version <> 1 OR EXISTS (SELECT FROM comments c WHERE c.issue_id = i.id))"
    };
}

/// Whether an issue `i` that the import has updated, with `b` kept of it, was changed or commented since.
macro_rules! updated_was_changed {
    () => {
        "(i.version <> b.version OR (SELECT count(*) FROM comments c WHERE c.issue_id = i.id) <> b.comment_count)"
    };
}

/// Undoes an import: one of `owner`'s, or anybody's if there is no `owner`. With `force` the issues that were changed
/// since are left.
///
/// Takes more than one statement: call it in a transaction.
pub async fn revert(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    actor_id: Uuid,
    force: bool,
) -> Result<RevertImportResponse> {
    // Nobody else changes the record of an import while its lock is held.
    let is_ours = lock_in_transaction(db, import_id).await?;
    if let Some(reverted) = check_state(db, import_id, owner, is_ours).await? {
        return Ok(reverted);
    }
    // As long as a million issues take; a caller who gives up ends it. Most of a table is better read as a whole.
    db.enqueue("SET LOCAL statement_timeout = 0; SET LOCAL enable_seqscan = on")?;
    lock_issues(db, import_id).await?;
    let (kept_count, kept_ids) = changed_since(db, import_id).await?;
    if kept_count > 0 && !force {
        return Err(Error::ChangedSince { count: kept_count, ids: kept_ids });
    }
    let removed_count = remove_created(db, import_id).await?;
    let restored_count = restore_updated(db, import_id, actor_id).await?;
    let response = RevertImportResponse {
        removed_count,
        restored_count,
        kept_count,
        kept_ids: kept_ids.iter().map(Uuid::to_string).collect(),
    };
    keep(db, import_id, &response, &kept_ids).await?;
    Ok(response)
}

/// The response of the call that has undone the import already, if one has.
async fn check_state(
    db: &Conn,
    import_id: Uuid,
    owner: Option<Uuid>,
    is_ours: bool,
) -> Result<Option<RevertImportResponse>> {
    const SQL: &str = concat!(
        "-- get_import_to_revert
        SELECT caller_id, mode, ",
        state_column!(),
        ", removed_count, restored_count, kept_count, kept_ids FROM imports WHERE id = $1"
    );
    let row = db.query_opt(SQL, &[&import_id]).await?;
    let row = row.ok_or_else(|| Error::not_found("import", "import_id", import_id))?;
    check_owner(row.get(0), owner)?;
    if !is_ours {
        return Err(running(import_id));
    }
    let state = state_from_row(&row, 2)?;
    if state == ImportState::Reverted {
        return Ok(Some(RevertImportResponse {
            removed_count: row.get(3),
            restored_count: row.get(4),
            kept_count: row.get(5),
            kept_ids: row.get::<_, Vec<Uuid>>(6).iter().map(Uuid::to_string).collect(),
        }));
    }
    let has_rows = match state {
        ImportState::Committed => true,
        ImportState::Running => row.get::<_, i16>(1) == ImportMode::SkipInvalid as i16,
        _ => false,
    };
    if !has_rows {
        let message = format!("no row of import \"{import_id}\" is in: there is nothing to undo");
        return Err(Error::precondition("IMPORT_NOT_COMMITTED", "import_id", message));
    }
    Ok(None)
}

/// Holds all that the import has made, so that it stays as it is found.
async fn lock_issues(db: &Conn, import_id: Uuid) -> Result<()> {
    // Labels before issues, as a deletion of a label locks them: the other order would deadlock with it.
    const LABELS: &str = "-- lock_labels_to_restore
        SELECT count(*) FROM (
            SELECT FROM labels WHERE id IN (SELECT unnest(label_ids) FROM import_issues WHERE import_id = $1)
            ORDER BY id FOR KEY SHARE) locked";
    const ISSUES: &str = "-- lock_issues_of_import
        SELECT count(*) FROM (
            SELECT FROM issues WHERE id IN (
                SELECT id FROM issues WHERE import_id = $1
                UNION ALL SELECT issue_id FROM import_issues WHERE import_id = $1 AND version IS NOT NULL)
            ORDER BY id FOR UPDATE) locked";
    db.query_one(LABELS, &[&import_id]).await?;
    db.query_one(ISSUES, &[&import_id]).await.map(drop)
}

/// How many of the import's issues were changed or commented since, and the first of them.
async fn changed_since(db: &Conn, import_id: Uuid) -> Result<(i64, Vec<Uuid>)> {
    const SQL: &str = concat!(
        "-- changed_since_import
        WITH changed AS MATERIALIZED (
            SELECT i.id FROM issues i WHERE i.import_id = $1 AND ",
        created_was_changed!(),
        " UNION ALL
            SELECT i.id FROM import_issues b JOIN issues i ON i.id = b.issue_id
            WHERE b.import_id = $1 AND b.version IS NOT NULL AND ",
        updated_was_changed!(),
        ")
        SELECT (SELECT count(*) FROM changed), ARRAY(SELECT id FROM changed ORDER BY id LIMIT $2)"
    );
    let row = db.query_one(SQL, &[&import_id, &IMPORT_CHANGED_SHOWN_MAX]).await?;
    Ok((row.get(0), row.get(1)))
}

async fn remove_created(db: &Conn, import_id: Uuid) -> Result<i64> {
    // An issue in its first version has no history: every change of it would be another version.
    const LABELS: &str = concat!(
        "-- remove_labels_of_created_issues
        DELETE FROM issue_labels il USING issues i WHERE i.id = il.issue_id AND i.import_id = $1 AND NOT ",
        created_was_changed!()
    );
    const ISSUES: &str = concat!(
        "-- remove_created_issues\nDELETE FROM issues i WHERE i.import_id = $1 AND NOT ",
        created_was_changed!()
    );
    db.execute(LABELS, &[&import_id]).await?;
    Ok(db.execute(ISSUES, &[&import_id]).await?.cast_signed())
}

async fn restore_updated(db: &Conn, import_id: Uuid, actor_id: Uuid) -> Result<i64> {
    // A label that was deleted since cannot be put on again.
    const SQL: &str = concat!(
        "-- restore_updated_issues
        WITH b AS MATERIALIZED (
            SELECT b.* FROM import_issues b JOIN issues i ON i.id = b.issue_id
            WHERE b.import_id = $1 AND b.version IS NOT NULL AND NOT ",
        updated_was_changed!(),
        "), removed AS (
            DELETE FROM issue_labels il USING b WHERE il.issue_id = b.issue_id AND il.label_id <> ALL (b.label_ids)
            RETURNING il.issue_id, il.label_id
        ), added AS (
            INSERT INTO issue_labels (issue_id, label_id)
            SELECT b.issue_id, l.id FROM b CROSS JOIN unnest(b.label_ids) AS had (label_id) JOIN labels l ON l.id = had.label_id
            ON CONFLICT DO NOTHING RETURNING issue_id, label_id
        ), changed AS (
            UPDATE issues i SET
                change_actor_id = $2,
                title = b.title,
                description = b.description,
                priority = b.priority,
                status = b.status,
                assignee_id = b.assignee_id,
                close_time = b.close_time,
                reopen_count = b.reopen_count
            FROM b WHERE i.id = b.issue_id RETURNING i.id, i.version
        ), told AS (
            INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
            SELECT c.id, c.version, $2, 'label', r.old_value, r.new_value
            FROM changed c JOIN (
                SELECT issue_id, label_id::text AS old_value, NULL AS new_value FROM removed
                UNION ALL SELECT issue_id, NULL, label_id::text FROM added
            ) r ON r.issue_id = c.id
        )
        SELECT count(*) FROM changed"
    );
    db.enqueue("SET LOCAL issue_tracker.restores_status = 'on'")?;
    let restored = db.query_one(SQL, &[&import_id, &actor_id]).await?.get(0);
    db.enqueue("SET LOCAL issue_tracker.restores_status = 'off'")?;
    Ok(restored)
}

/// Keeps what was answered; what the issues had is of no more use.
async fn keep(db: &Conn, import_id: Uuid, response: &RevertImportResponse, kept_ids: &[Uuid]) -> Result<()> {
    const KEEP: &str = "-- keep_reverted_import
        UPDATE imports SET state = $2, revert_time = now(), removed_count = $3, restored_count = $4, kept_count = $5,
            kept_ids = $6
        WHERE id = $1";
    const FORGET: &str = "-- forget_issues_of_import\nDELETE FROM import_issues WHERE import_id = $1";
    let RevertImportResponse { removed_count, restored_count, kept_count, .. } = response;
    let state = ImportState::Reverted as i16;
    let kept = db.execute(KEEP, &[&import_id, &state, removed_count, restored_count, kept_count, &kept_ids]).await?;
    if kept != 1 {
        return Err(Error::Internal("the record of an import is gone"));
    }
    db.execute(FORGET, &[&import_id]).await.map(drop)
}
