//! The rows of a batch into the database: new issues by COPY, changes of issues in one statement.

use tokio_postgres::{
    binary_copy::BinaryCopyInWriter,
    types::{ToSql, Type},
};
use uuid::Uuid;

use super::{
    Conn, ImportTask,
    plan::{ExistingRow, NewRow, Resolved},
};
use crate::{
    csv::{Column, Columns},
    error::{Error, Result},
    pb::Priority,
};

/// Writes a batch, and answers how many issues it has updated.
pub(super) async fn write(db: &Conn, task: &ImportTask, columns: &Columns, rows: &Resolved<'_>) -> Result<u64> {
    copy_issues(db, task, &rows.new).await?;
    copy_labels(db, &rows.new).await?;
    leave(db, task, &rows.skipped).await?;
    update(db, task, columns, &rows.existing).await
}

async fn copy_issues(db: &Conn, task: &ImportTask, rows: &[NewRow<'_>]) -> Result<()> {
    const SQL: &str = "-- copy_issues
        COPY issues (id, import_id, create_time, update_time, close_time, reporter_id, assignee_id, status, priority, title,
            description, external_id) FROM STDIN (FORMAT binary)";
    const TYPES: [Type; 12] = [
        Type::UUID,
        Type::UUID,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
        Type::UUID,
        Type::UUID,
        Type::INT2,
        Type::INT2,
        Type::TEXT,
        Type::TEXT,
        Type::TEXT,
    ];
    if rows.is_empty() {
        return Ok(());
    }
    let mut writer = Box::pin(BinaryCopyInWriter::new(db.copy_in(SQL).await?, &TYPES));
    for NewRow { row, id, status, create_time, close_time, assignee_id, .. } in rows {
        let priority = if row.priority == Priority::Unspecified { task.default_priority } else { row.priority };
        let values: [&(dyn ToSql + Sync); 12] = [
            id,
            &task.import_id,
            create_time,
            create_time,
            close_time,
            &task.caller_id,
            assignee_id,
            &(*status as i16),
            &(priority as i16),
            &row.title,
            &row.description,
            &row.external_id,
        ];
        writer.as_mut().write(&values).await?;
    }
    written(writer.as_mut().finish().await?, rows.len())
}

async fn copy_labels(db: &Conn, rows: &[NewRow<'_>]) -> Result<()> {
    const SQL: &str = "-- copy_issue_labels\nCOPY issue_labels (issue_id, label_id) FROM STDIN (FORMAT binary)";
    let count: usize = rows.iter().map(|row| row.label_ids.len()).sum();
    if count == 0 {
        return Ok(());
    }
    let mut writer = Box::pin(BinaryCopyInWriter::new(db.copy_in(SQL).await?, &[Type::UUID, Type::UUID]));
    for row in rows {
        for label_id in &row.label_ids {
            writer.as_mut().write(&[&row.id, label_id]).await?;
        }
    }
    written(writer.as_mut().finish().await?, count)
}

fn written(rows: u64, wanted: usize) -> Result<()> {
    if rows == wanted as u64 { Ok(()) } else { Err(Error::Internal("COPY took another number of rows")) }
}

/// Notes that the import has had a row for these issues, so that a second one is known as that.
async fn leave(db: &Conn, task: &ImportTask, ids: &[Uuid]) -> Result<()> {
    const SQL: &str = "-- leave_issues
        INSERT INTO import_issues (import_id, issue_id) SELECT $1, unnest($2::uuid[])";
    if ids.is_empty() {
        return Ok(());
    }
    db.execute(SQL, &[&task.import_id, &ids]).await.map(drop)
}

/// Gives issues, which are locked, what the file has of them, and keeps what they had; answers how many were changed.
async fn update(db: &Conn, task: &ImportTask, columns: &Columns, rows: &[ExistingRow<'_>]) -> Result<u64> {
    // A column that is null in `n` stays as it is. All parts see the issues as they were before the statement.
    const SQL: &str = "-- import_update_issues
        WITH n AS MATERIALIZED (
            SELECT * FROM unnest($3::uuid[], $4::text[], $5::text[], $6::int2[], $7::int2[], $8::uuid[])
                AS n (id, title, description, priority, status, assignee_id)
        ), wanted AS MATERIALIZED (
            SELECT * FROM unnest($11::uuid[], $12::uuid[]) AS w (issue_id, label_id)
        ), removed AS (
            DELETE FROM issue_labels il USING n WHERE $10 AND il.issue_id = n.id
                AND NOT EXISTS (SELECT FROM wanted w WHERE w.issue_id = il.issue_id AND w.label_id = il.label_id)
            RETURNING il.issue_id, il.label_id
        ), added AS (
            INSERT INTO issue_labels (issue_id, label_id) SELECT issue_id, label_id FROM wanted
            ON CONFLICT DO NOTHING RETURNING issue_id, label_id
        ), relabelled AS (
            SELECT issue_id, label_id::text AS old_value, NULL AS new_value FROM removed
            UNION ALL SELECT issue_id, NULL, label_id::text FROM added
        ), kept AS (
            INSERT INTO import_issues (import_id, issue_id, version, title, description, priority, status, assignee_id,
                close_time, reopen_count, label_ids, comment_count)
            SELECT $1, i.id, i.version + 1, i.title, i.description, i.priority, i.status, i.assignee_id, i.close_time,
                i.reopen_count, ARRAY(SELECT il.label_id FROM issue_labels il WHERE il.issue_id = i.id),
                (SELECT count(*) FROM comments c WHERE c.issue_id = i.id)
            FROM n JOIN issues i ON i.id = n.id
            WHERE n.title <> i.title OR n.description <> i.description OR n.priority <> i.priority OR n.status <> i.status
                OR $9 AND n.assignee_id IS DISTINCT FROM i.assignee_id
                OR i.id IN (SELECT issue_id FROM relabelled)
            RETURNING issue_id
        ), left_alone AS (
            INSERT INTO import_issues (import_id, issue_id)
            SELECT $1, n.id FROM n WHERE n.id NOT IN (SELECT issue_id FROM kept)
        ), changed AS (
            UPDATE issues i SET
                change_actor_id = $2,
                title = coalesce(n.title, i.title),
                description = coalesce(n.description, i.description),
                priority = coalesce(n.priority, i.priority),
                status = coalesce(n.status, i.status),
                assignee_id = CASE WHEN $9 THEN n.assignee_id ELSE i.assignee_id END
            FROM n JOIN kept k ON k.issue_id = n.id WHERE i.id = n.id
            RETURNING i.id, i.version
        ), told AS (
            INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
            SELECT c.id, c.version, $2, 'label', r.old_value, r.new_value
            FROM changed c JOIN relabelled r ON r.issue_id = c.id
        )
        SELECT count(*) FROM changed";
    if rows.is_empty() {
        return Ok(0);
    }
    let has = |column: Column| columns.index(column).is_some();
    let has_description = has(Column::Description);
    let has_priority = has(Column::Priority);
    let has_labels = has(Column::Labels);
    let ids: Vec<Uuid> = rows.iter().map(|row| row.id).collect();
    // No title is empty where the file has them.
    let titles: Vec<Option<&str>> =
        rows.iter().map(|row| Some(&*row.row.title).filter(|title| !title.is_empty())).collect();
    let descriptions: Vec<Option<&str>> =
        rows.iter().map(|row| has_description.then_some(&*row.row.description)).collect();
    let priorities: Vec<Option<i16>> = rows.iter().map(|row| has_priority.then_some(row.row.priority as i16)).collect();
    let statuses: Vec<Option<i16>> = rows.iter().map(|row| row.row.status.map(|status| status as i16)).collect();
    let assignee_ids: Vec<Option<Uuid>> = rows.iter().map(|row| row.assignee_id).collect();
    let labels = rows.iter().flat_map(|row| row.label_ids.iter().map(|label_id| (row.id, *label_id)));
    let (labelled_ids, label_ids): (Vec<Uuid>, Vec<Uuid>) = labels.unzip();
    // A plan for any number of rows would be one for ten.
    db.enqueue("SET LOCAL plan_cache_mode = force_custom_plan")?;
    let changed = db
        .query_one(
            SQL,
            &[
                &task.import_id,
                &task.caller_id,
                &ids,
                &titles,
                &descriptions,
                &priorities,
                &statuses,
                &assignee_ids,
                &has(Column::Assignee),
                &has_labels,
                &labelled_ids,
                &label_ids,
            ],
        )
        .await?;
    db.enqueue("SET LOCAL plan_cache_mode = auto")?;
    Ok(changed.get::<_, i64>(0).cast_unsigned())
}
