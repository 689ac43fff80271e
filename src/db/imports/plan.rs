//! Decides what to do with each row of a batch: insert, update, skip or reject it.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use super::{
    Conn, ImportSpec,
    references::{References, references_changed},
};
use crate::{
    csv::{Batch, Column, ImportRow, RowError, RowErrorCode, shorten},
    error::Result,
    pb::{OnExisting, Status},
};

/// What to do with the rows of a batch.
pub(super) struct BatchPlan<'a> {
    pub inserts: Vec<InsertRow<'a>>,
    pub updates: Vec<UpdateRow<'a>>,
    /// Existing issues that stay unchanged.
    pub skips: Vec<Uuid>,
    /// The first errors of the rejected rows.
    pub errors: Vec<RowError>,
    pub error_count: u64,
}

/// A row that creates an issue.
pub(super) struct InsertRow<'a> {
    pub row: &'a ImportRow,
    pub id: Uuid,
    pub status: Status,
    pub create_time: DateTime<Utc>,
    pub close_time: Option<DateTime<Utc>>,
    pub assignee_id: Option<Uuid>,
    pub label_ids: Vec<Uuid>,
}

/// A row that updates an issue, if any value differs.
pub(super) struct UpdateRow<'a> {
    pub row: &'a ImportRow,
    pub id: Uuid,
    pub assignee_id: Option<Uuid>,
    pub label_ids: Vec<Uuid>,
}

/// The owner of an external id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExternalIdOwner {
    /// An earlier row of the file.
    EarlierRow,
    Issue {
        id: Uuid,
        deleted: bool,
    },
}

/// The limits of a plan.
#[derive(Clone, Copy)]
pub(super) struct PlanLimits {
    /// The maximum number of errors that are returned. All are counted.
    pub errors_max: usize,
    /// The maximum number of labels that exist.
    pub labels_max: i64,
}

/// Plans a batch. Creates missing labels if the import may, and locks the issues and labels that its updates depend on
/// until the end of the transaction.
pub(super) async fn plan_batch<'a>(
    db: &Conn,
    spec: &ImportSpec,
    references: &mut References,
    default_assignee_id: Option<Uuid>,
    batch: &'a Batch,
    PlanLimits { errors_max, labels_max }: PlanLimits,
) -> Result<BatchPlan<'a>> {
    const NOW: &str = "-- import_time\nSELECT now() AS now";

    references.look_up(db, &batch.rows).await?;
    let owners = find_external_ids(db, spec, &batch.rows).await?;
    let now = db.query_one(NOW, &[]).await?.get("now");
    let mut planner = Planner {
        spec,
        default_assignee_id,
        references,
        owners: owners.clone(),
        now,
        plan: BatchPlan {
            inserts: Vec::with_capacity(batch.rows.len()),
            updates: Vec::new(),
            skips: Vec::new(),
            errors: Vec::new(),
            error_count: 0,
        },
        errors_max,
    };
    for row in &batch.rows {
        planner.add(row);
    }
    let mut plan = planner.plan;
    if spec.create_labels {
        let rows = plan.inserts.iter().map(|insert| insert.row).chain(plan.updates.iter().map(|update| update.row));
        let names = rows.flat_map(|row| row.labels.iter().map(String::as_str));
        references.create_labels(db, labels_max, names).await?;
    }
    for insert in &mut plan.inserts {
        insert.label_ids = references.label_ids(insert.row)?;
    }
    for update in &mut plan.updates {
        update.label_ids = references.label_ids(update.row)?;
    }
    if !plan.updates.is_empty() {
        let sets_labels = batch.header.as_ref().is_some_and(|header| header.has(Column::Labels));
        lock_updated(db, &plan, &owners, sets_labels).await?;
    }
    Ok(plan)
}

async fn find_external_ids(
    db: &Conn,
    spec: &ImportSpec,
    rows: &[ImportRow],
) -> Result<HashMap<String, ExternalIdOwner>> {
    // An issue that this import has created or touched is an earlier row's.
    const SQL: &str = "-- import_external_ids
        SELECT i.external_id, i.id, i.delete_time IS NOT NULL AS deleted,
            coalesce(i.import_id = $2, false)
                OR EXISTS (SELECT FROM import_issues o WHERE o.import_id = $2 AND o.issue_id = i.id) AS in_earlier_row
        FROM issues i
        WHERE i.external_id = ANY($1)";
    let external_ids: Vec<&str> = rows.iter().filter_map(|row| row.external_id.as_deref()).collect();
    if external_ids.is_empty() {
        return Ok(HashMap::new());
    }
    let found = db.query(SQL, &[&external_ids, &spec.import_id]).await?;
    let owner = |row: &tokio_postgres::Row| match row.get("in_earlier_row") {
        true => ExternalIdOwner::EarlierRow,
        false => ExternalIdOwner::Issue { id: row.get("id"), deleted: row.get("deleted") },
    };
    Ok(found.iter().map(|row| (row.get("external_id"), owner(row))).collect())
}

/// Locks the issues to update, and fails with a `CONFLICT` unless they are as they were when the rows were planned.
async fn lock_updated(
    db: &Conn,
    plan: &BatchPlan<'_>,
    owners: &HashMap<String, ExternalIdOwner>,
    sets_labels: bool,
) -> Result<()> {
    // Labels before issues, in the order in which DeleteLabel locks them: the opposite order would deadlock.
    const LABELS: &str = "-- lock_labels_of_import
        SELECT id FROM labels WHERE id = ANY($1) ORDER BY id FOR KEY SHARE";
    const ISSUES: &str = "-- lock_existing_issues
        SELECT external_id, id, delete_time IS NOT NULL AS deleted
        FROM issues
        WHERE id = ANY($1)
        ORDER BY id FOR NO KEY UPDATE";
    if sets_labels {
        let of_inserts = plan.inserts.iter().flat_map(|insert| insert.label_ids.iter().copied());
        let of_updates = plan.updates.iter().flat_map(|update| update.label_ids.iter().copied());
        let ids: HashSet<Uuid> = of_inserts.chain(of_updates).collect();
        let ids: Vec<Uuid> = ids.into_iter().collect();
        db.query(LABELS, &[&ids]).await?;
    }
    let ids: Vec<Uuid> = plan.updates.iter().map(|update| update.id).collect();
    let locked = db.query(ISSUES, &[&ids]).await?;
    let is_unchanged = |row: &tokio_postgres::Row| {
        let external_id: Option<&str> = row.get("external_id");
        let owner = ExternalIdOwner::Issue { id: row.get("id"), deleted: row.get("deleted") };
        external_id.and_then(|external_id| owners.get(external_id)) == Some(&owner)
    };
    if locked.len() == ids.len() && locked.iter().all(is_unchanged) { Ok(()) } else { Err(references_changed()) }
}

/// What to do with a row, as far as its external id decides it.
#[derive(Clone, Copy)]
enum RowAction {
    Insert,
    Update(Uuid),
    Skip(Uuid),
    Reject(RowErrorCode),
}

struct Planner<'a, 'r> {
    spec: &'a ImportSpec,
    default_assignee_id: Option<Uuid>,
    references: &'a References,
    owners: HashMap<String, ExternalIdOwner>,
    now: DateTime<Utc>,
    plan: BatchPlan<'r>,
    errors_max: usize,
}

impl<'r> Planner<'_, 'r> {
    fn add(&mut self, row: &'r ImportRow) {
        let errors_before = self.plan.error_count;
        let action = self.action(row);
        let is_insert = matches!(action, RowAction::Insert);
        if row.title.is_empty() && is_insert {
            let message = "title: required; the row creates an issue".to_owned();
            self.push_error(row, "title", "", RowErrorCode::Required, message);
        }
        let assignee_id = self.assignee_id(row);
        self.check_labels(row);
        if let RowAction::Reject(code) = action {
            let problem = match code {
                RowErrorCode::DuplicateExternalId => "is in an earlier row; expected a unique value",
                RowErrorCode::IssueDeleted => "belongs to a deleted issue; undelete the issue first",
                _ => "is taken by another issue; expected an unused value, or on_existing skip or update",
            };
            self.reject(row, "external_id", row.external_id.as_deref().unwrap_or_default(), code, problem);
        }
        let create_time = row.create_time.unwrap_or(self.now);
        if let Some(close_time) = row.close_time.filter(|close_time| *close_time < create_time)
            && is_insert
        {
            let value = close_time.to_rfc3339_opts(SecondsFormat::AutoSi, true);
            let problem = "is before create_time, which defaults to now; expected a create_time in the row";
            self.reject(row, "close_time", &value, RowErrorCode::CloseTimeBeforeCreateTime, problem);
        }
        if self.plan.error_count > errors_before {
            return;
        }
        if let Some(external_id) = &row.external_id {
            self.owners.insert(external_id.clone(), ExternalIdOwner::EarlierRow);
        }
        match action {
            RowAction::Insert => {
                let status = row.status.unwrap_or(self.spec.format.default_status);
                let closed_now = (status == Status::Closed).then(|| self.now.max(create_time));
                self.plan.inserts.push(InsertRow {
                    row,
                    id: issue_id(create_time, row.row_number),
                    status,
                    create_time,
                    close_time: row.close_time.or(closed_now),
                    assignee_id: assignee_id.or(self.default_assignee_id),
                    label_ids: Vec::new(),
                });
            }
            RowAction::Update(id) => {
                self.plan.updates.push(UpdateRow { row, id, assignee_id, label_ids: Vec::new() });
            }
            RowAction::Skip(id) => self.plan.skips.push(id),
            RowAction::Reject(_) => {}
        }
    }

    fn action(&self, row: &ImportRow) -> RowAction {
        use ExternalIdOwner::{EarlierRow, Issue};
        let Some(external_id) = &row.external_id else { return RowAction::Insert };
        match (self.owners.get(external_id), self.spec.on_existing) {
            (None, _) => RowAction::Insert,
            (Some(EarlierRow), _) => RowAction::Reject(RowErrorCode::DuplicateExternalId),
            (Some(Issue { id, .. }), OnExisting::Skip) => RowAction::Skip(*id),
            (Some(Issue { id, deleted: false }), OnExisting::Update) => RowAction::Update(*id),
            (Some(Issue { deleted: true, .. }), OnExisting::Update) => RowAction::Reject(RowErrorCode::IssueDeleted),
            (Some(Issue { .. }), OnExisting::Fail | OnExisting::Unspecified) => {
                RowAction::Reject(RowErrorCode::ExternalIdTaken)
            }
        }
    }

    fn assignee_id(&mut self, row: &ImportRow) -> Option<Uuid> {
        let username = row.assignee.as_deref()?;
        let id = self.references.user_id(username);
        if id.is_none() {
            let problem = "is not a user; expected an existing username";
            self.reject(row, "assignee", username, RowErrorCode::UnknownAssignee, problem);
        }
        id
    }

    fn check_labels(&mut self, row: &ImportRow) {
        for name in &row.labels {
            if self.references.label_id(name).is_some() {
                continue;
            }
            if !self.spec.create_labels {
                let problem = "is not a label; expected an existing label, or create_labels";
                self.reject(row, "labels", name, RowErrorCode::UnknownLabel, problem);
            } else if name.contains(';') {
                let problem = "is not a label and cannot be created; expected a name without \";\"";
                self.reject(row, "labels", name, RowErrorCode::UnknownLabel, problem);
            }
        }
    }

    fn reject(&mut self, row: &ImportRow, column: &str, value: &str, code: RowErrorCode, problem: &str) {
        let message = format!("{column}: \"{}\" {problem}", shorten(value.as_bytes()));
        self.push_error(row, column, value, code, message);
    }

    fn push_error(&mut self, row: &ImportRow, column: &str, value: &str, code: RowErrorCode, message: String) {
        self.plan.error_count += 1;
        if self.plan.errors.len() >= self.errors_max {
            return;
        }
        self.plan.errors.push(RowError {
            row_number: row.row_number,
            line_number: row.line_number,
            byte_offset: row.byte_offset,
            column: column.to_owned(),
            value: shorten(value.as_bytes()),
            code,
            message,
        });
    }
}

/// Returns a UUID of version 7 that sorts by creation time, and then by the file's order: 48 bits of milliseconds, the
/// remaining microseconds, 32 bits of row number, 30 random bits.
fn issue_id(time: DateTime<Utc>, row_number: u64) -> Uuid {
    const RANDOM_BITS: u32 = 30;
    let millis = time.timestamp_millis().cast_unsigned();
    let micros = u64::from(time.timestamp_subsec_micros() % 1_000);
    let row_number = row_number.min(u64::from(u32::MAX));
    let random = Uuid::new_v4().as_u64_pair().1 & ((1 << RANDOM_BITS) - 1);
    Uuid::from_u64_pair(millis << 16 | 7 << 12 | micros, 0b10 << 62 | row_number << RANDOM_BITS | random)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_version_7_and_sort_by_time_and_then_by_row() {
        let micros = |micros: i64| DateTime::from_timestamp_micros(1_700_000_000_000_000 + micros).unwrap();
        let keys = [(0, 1), (0, 2), (0, 1 << 31), (1, 1), (999, 7), (1_000, 1), (1_000, 3), (2_000_001, 2)];
        let ids = keys.map(|(time, row)| issue_id(micros(time), row));
        assert!(ids.is_sorted(), "{ids:?}");
        for (id, (time, _)) in ids.iter().zip(keys) {
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
            let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
            assert_eq!(seconds * 1_000 + u64::from(nanos) / 1_000_000, (1_700_000_000_000 + time as u64 / 1_000));
        }
        assert_ne!(issue_id(micros(0), 1), issue_id(micros(0), 1));
    }
}
