//! Removes old imports, and row errors that are old or too many.

use uuid::Uuid;

use super::Conn;
use crate::{
    db::PRUNE_BATCH_ROWS,
    error::{Error, Result},
};

/// The maximum number of imports that a statement removes. Each is locked meanwhile.
const IMPORTS_EXPIRED_MAX: i64 = 500;
/// The maximum number of imports whose errors a statement removes.
const IMPORTS_CLEARED_MAX: i64 = 20;

/// Removes row errors of the user's older imports while the user has more than `errors_max` of them. Those of imports in
/// progress count first and are kept. Clears at most [`IMPORTS_CLEARED_MAX`] imports, so that a backlog does not fail the call.
pub(super) async fn evict_import_errors(db: &Conn, caller_id: Uuid, errors_max: i64) -> Result<()> {
    const SQL: &str = "-- evict_import_errors
        WITH stored AS MATERIALIZED (
            SELECT id, create_time, stored_error_count, hashtextextended('import ' || id::text, 0) IN (
                    SELECT l.classid::int8 << 32 | l.objid::int8
                    FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                    WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                ) AS is_running
            FROM imports
            WHERE caller_id = /* caller_id */ $1 AND stored_error_count > 0
        ), counted AS (
            SELECT id, is_running,
                sum(stored_error_count) OVER (ORDER BY is_running DESC, create_time DESC, id DESC) AS error_count
            FROM stored
        ), evicted AS MATERIALIZED (
            SELECT id FROM imports
            WHERE id IN (SELECT id FROM counted WHERE NOT is_running AND error_count > /* errors_max */ $2)
            ORDER BY create_time
            LIMIT /* imports_max */ $3
            FOR NO KEY UPDATE SKIP LOCKED
        ), cleared AS (
            UPDATE imports SET stored_error_count = 0 WHERE id IN (SELECT id FROM evicted)
        )
        DELETE FROM import_errors WHERE import_id IN (SELECT id FROM evicted)";
    db.execute(SQL, &[&caller_id, &errors_max, &IMPORTS_CLEARED_MAX]).await.map(drop)
}

/// Removes the row errors of up to [`IMPORTS_CLEARED_MAX`] imports that have ended more than `days` ago. Returns how many
/// imports.
pub async fn prune_import_errors(db: &Conn, days: i32) -> Result<u64> {
    const SQL: &str = "-- prune_import_errors
        WITH old AS MATERIALIZED (
            SELECT id FROM imports
            WHERE stored_error_count > 0
                AND coalesce(revert_time, finish_time, create_time) < now() - make_interval(days => $1)
            LIMIT $2
            FOR NO KEY UPDATE SKIP LOCKED
        ), cleared AS (
            UPDATE imports SET stored_error_count = 0 WHERE id IN (SELECT id FROM old)
        ), deleted AS (
            DELETE FROM import_errors WHERE import_id IN (SELECT id FROM old)
        )
        SELECT count(*) AS import_count FROM old";
    let row = db.query_one(SQL, &[&days, &IMPORTS_CLEARED_MAX]).await?;
    Ok(row.get::<_, i64>("import_count").cast_unsigned())
}

/// Removes up to [`IMPORTS_EXPIRED_MAX`] imports that have ended more than `days` ago, and a batch of the rows that belong to
/// removed imports. Returns how many rows; 0 if there is nothing left to remove.
///
/// An import that is removed cannot be read or reverted, although its other rows are removed later.
pub async fn prune_imports(db: &Conn, days: i32) -> Result<u64> {
    // Not while a call has the import's lock: it may be resuming or reverting the import.
    const EXPIRE: &str = "-- expire_imports
        WITH old AS MATERIALIZED (
            SELECT id FROM imports
            WHERE coalesce(revert_time, finish_time, create_time) < now() - make_interval(days => $1)
            LIMIT $2
        ), locked AS MATERIALIZED (
            SELECT id FROM old WHERE pg_try_advisory_xact_lock(hashtextextended('import ' || id::text, 0))
        ), expired AS (
            DELETE FROM imports i USING locked
            WHERE i.id = locked.id
                AND coalesce(i.revert_time, i.finish_time, i.create_time) < now() - make_interval(days => $1)
            RETURNING i.id
        )
        INSERT INTO expired_imports (import_id) SELECT id FROM expired";
    const ERRORS: &str = "-- prune_errors_of_expired_imports
        DELETE FROM import_errors WHERE ctid = ANY (ARRAY(
            SELECT stored.ctid FROM expired_imports expired JOIN import_errors stored USING (import_id) LIMIT $1))";
    const ISSUES: &str = "-- prune_issues_of_expired_imports
        DELETE FROM import_issues WHERE ctid = ANY (ARRAY(
            SELECT stored.ctid FROM expired_imports expired JOIN import_issues stored USING (import_id) LIMIT $1))";
    const FINISH: &str = "-- prune_expired_imports
        DELETE FROM expired_imports expired
        WHERE NOT EXISTS (SELECT FROM import_errors stored WHERE stored.import_id = expired.import_id)
            AND NOT EXISTS (SELECT FROM import_issues stored WHERE stored.import_id = expired.import_id)";
    let mut removed = db.execute(EXPIRE, &[&days, &IMPORTS_EXPIRED_MAX]).await?;
    for sql in [ERRORS, ISSUES] {
        removed += db.execute(sql, &[&PRUNE_BATCH_ROWS]).await?;
    }
    Ok(removed + db.execute(FINISH, &[]).await?)
}

/// Fails with `IMPORT_MISMATCH` if the id belongs to an import that was removed: its issues would be taken for those of the
/// new one.
pub(super) async fn check_not_removed(db: &Conn, import_id: Uuid) -> Result<()> {
    const SQL: &str = "-- is_import_removed
        SELECT EXISTS (SELECT FROM issues WHERE import_id = $1)
            OR EXISTS (SELECT FROM expired_imports WHERE import_id = $1) AS is_removed";
    if !db.query_one(SQL, &[&import_id]).await?.get::<_, bool>("is_removed") {
        return Ok(());
    }
    let message = format!("import \"{import_id}\" is too old to be stored; expected a new import_id");
    Err(Error::precondition("IMPORT_MISMATCH", "options.import_id", message))
}
