//! Executes the plan of a batch: new issues by COPY, updates in one statement.

use tokio_postgres::{
    binary_copy::BinaryCopyInWriter,
    types::{ToSql, Type},
};
use uuid::Uuid;

use super::{
    Conn, ImportSpec,
    plan::{BatchPlan, InsertRow, UpdateRow},
};
use crate::{
    csv::{Column, Header},
    error::{Error, Result},
    pb::Priority,
};

/// Executes the plan of a batch in the connection's transaction, and returns how many issues were updated.
pub(super) async fn execute(db: &Conn, spec: &ImportSpec, header: &Header, plan: &BatchPlan<'_>) -> Result<u64> {
    copy_issues(db, spec, &plan.inserts).await?;
    copy_labels(db, &plan.inserts).await?;
    insert_skipped(db, spec, &plan.skips).await?;
    update_issues(db, spec, header, &plan.updates).await
}

async fn copy_issues(db: &Conn, spec: &ImportSpec, inserts: &[InsertRow<'_>]) -> Result<()> {
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
    if inserts.is_empty() {
        return Ok(());
    }
    let _timer = db.start_timer(SQL);
    let mut writer = Box::pin(BinaryCopyInWriter::new(db.copy_in(SQL).await?, &TYPES));
    for InsertRow { row, id, status, create_time, close_time, assignee_id, .. } in inserts {
        let priority = if row.priority == Priority::Unspecified { spec.default_priority } else { row.priority };
        let values: [&(dyn ToSql + Sync); 12] = [
            id,
            &spec.import_id,
            create_time,
            create_time,
            close_time,
            &spec.caller_id,
            assignee_id,
            &(*status as i16),
            &(priority as i16),
            &row.title,
            &row.description,
            &row.external_id,
        ];
        db.run(writer.as_mut().write(&values)).await?;
    }
    check_copied(db.run(writer.as_mut().finish()).await?, inserts.len())
}

async fn copy_labels(db: &Conn, inserts: &[InsertRow<'_>]) -> Result<()> {
    const SQL: &str = "-- copy_issue_labels
        COPY issue_labels (issue_id, label_id) FROM STDIN (FORMAT binary)";
    let count: usize = inserts.iter().map(|insert| insert.label_ids.len()).sum();
    if count == 0 {
        return Ok(());
    }
    let _timer = db.start_timer(SQL);
    let mut writer = Box::pin(BinaryCopyInWriter::new(db.copy_in(SQL).await?, &[Type::UUID, Type::UUID]));
    for insert in inserts {
        for label_id in &insert.label_ids {
            db.run(writer.as_mut().write(&[&insert.id, label_id])).await?;
        }
    }
    check_copied(db.run(writer.as_mut().finish()).await?, count)
}

fn check_copied(copied: u64, expected: usize) -> Result<()> {
    if copied == expected as u64 { Ok(()) } else { Err(Error::Internal("COPY has written another number of rows")) }
}

/// Stores that the file has rows for these issues, so that a second row for one of them is detected.
async fn insert_skipped(db: &Conn, spec: &ImportSpec, ids: &[Uuid]) -> Result<()> {
    const SQL: &str = "-- insert_skipped_issues
        INSERT INTO import_issues (import_id, issue_id) SELECT $1, unnest($2::uuid[])";
    if ids.is_empty() {
        return Ok(());
    }
    db.execute(SQL, &[&spec.import_id, &ids]).await.map(drop)
}

/// Updates locked issues whose values differ, and stores their previous values; returns how many were updated.
async fn update_issues(db: &Conn, spec: &ImportSpec, header: &Header, updates: &[UpdateRow<'_>]) -> Result<u64> {
    const SQL: &str = include_str!("update_existing_issues.sql");
    if updates.is_empty() {
        return Ok(0);
    }
    let [has_description, has_priority, has_assignee, has_labels] =
        [Column::Description, Column::Priority, Column::Assignee, Column::Labels].map(|column| header.has(column));
    let ids: Vec<Uuid> = updates.iter().map(|update| update.id).collect();
    // A title is empty only if the file does not have the column.
    let titles: Vec<Option<&str>> =
        updates.iter().map(|update| Some(&*update.row.title).filter(|title| !title.is_empty())).collect();
    let descriptions: Vec<Option<&str>> =
        updates.iter().map(|update| has_description.then_some(&*update.row.description)).collect();
    let priorities: Vec<Option<i16>> =
        updates.iter().map(|update| has_priority.then_some(update.row.priority as i16)).collect();
    let statuses: Vec<Option<i16>> =
        updates.iter().map(|update| update.row.status.map(|status| status as i16)).collect();
    let assignee_ids: Vec<Option<Uuid>> = updates.iter().map(|update| update.assignee_id).collect();
    let labels = updates.iter().flat_map(|update| update.label_ids.iter().map(|label_id| (update.id, *label_id)));
    let (labelled_ids, label_ids): (Vec<Uuid>, Vec<Uuid>) = labels.unzip();
    // A generic plan assumes arrays of ten elements, and would be slow for thousands.
    db.enqueue("SET LOCAL plan_cache_mode = force_custom_plan")?;
    #[rustfmt::skip]
    let row = db.query_one(SQL, &[
        &spec.import_id, &spec.caller_id, &ids, &titles, &descriptions, &priorities, &statuses, &assignee_ids,
        &has_assignee, &has_labels, &labelled_ids, &label_ids,
    ]).await?;
    db.enqueue("SET LOCAL plan_cache_mode = auto")?;
    Ok(row.get::<_, i64>("updated_count").cast_unsigned())
}
