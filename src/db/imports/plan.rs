//! What rows refer to: names to ids, external ids to issues, and the errors of the rows that refer to nothing.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, SecondsFormat, Utc};
use uuid::Uuid;

use super::{Conn, ImportSession, ImportTask};
use crate::{
    csv::{Column, Columns, ImportRow, RowError, RowErrorCode, shorten},
    error::{Error, Result},
    pb::{OnExisting, Status},
};

/// How many usernames or labels are remembered during an import.
const NAMES_REMEMBERED_MAX: usize = 10_000;

/// What is to become of the rows of a batch.
pub(super) struct Resolved<'a> {
    pub new: Vec<NewRow<'a>>,
    pub existing: Vec<ExistingRow<'a>>,
    /// Issues that are left as they are.
    pub skipped: Vec<Uuid>,
    /// The first of them.
    pub errors: Vec<RowError>,
    pub error_count: u64,
}

/// An issue to create.
pub(super) struct NewRow<'a> {
    pub row: &'a ImportRow,
    pub id: Uuid,
    pub status: Status,
    pub create_time: DateTime<Utc>,
    pub close_time: Option<DateTime<Utc>>,
    pub assignee_id: Option<Uuid>,
    pub label_ids: Vec<Uuid>,
}

/// An issue that gets what the row has, where that is anything else.
pub(super) struct ExistingRow<'a> {
    pub row: &'a ImportRow,
    pub id: Uuid,
    pub assignee_id: Option<Uuid>,
    pub label_ids: Vec<Uuid>,
}

/// The user with this name, in any case.
pub(super) async fn user_id(db: &Conn, username: &str) -> Result<Option<Uuid>> {
    let mut known = HashMap::new();
    look_up_users(db, &mut known, HashSet::from([username])).await?;
    Ok(known.into_values().next().flatten())
}

async fn look_up_users(db: &Conn, known: &mut HashMap<String, Option<Uuid>>, wanted: HashSet<&str>) -> Result<()> {
    const SQL: &str = "-- import_users
        SELECT n.name, u.id FROM unnest($1::text[]) AS n (name) JOIN users u ON lower(u.username) = lower(n.name)";
    look_up(db, SQL, known, wanted).await
}

async fn look_up_labels(db: &Conn, known: &mut HashMap<String, Option<Uuid>>, wanted: HashSet<&str>) -> Result<()> {
    const SQL: &str = "-- import_labels
        SELECT n.name, l.id FROM unnest($1::text[]) AS n (name) JOIN labels l ON lower(l.name) = lower(n.name)";
    look_up(db, SQL, known, wanted).await
}

/// Asks for the names that are not known yet.
async fn look_up(db: &Conn, sql: &str, known: &mut HashMap<String, Option<Uuid>>, wanted: HashSet<&str>) -> Result<()> {
    let new: Vec<&str> = wanted.into_iter().filter(|name| !known.contains_key(*name)).collect();
    if new.is_empty() {
        return Ok(());
    }
    for row in db.query(sql, &[&new]).await? {
        known.insert(row.get(0), Some(row.get(1)));
    }
    for name in new {
        known.entry(name.to_owned()).or_insert(None);
    }
    Ok(())
}

/// An external id that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// A row before this one has it.
    InFile,
    Issue {
        id: Uuid,
        deleted: bool,
    },
}

impl ImportSession {
    /// Looks up what the rows refer to, and holds it until the end of the transaction where it must not change.
    pub(super) async fn resolve<'a>(
        &mut self,
        rows: &'a [ImportRow],
        columns: &Columns,
        errors_max: usize,
    ) -> Result<Resolved<'a>> {
        const NOW: &str = "-- import_time\nSELECT now()";

        for known in [&mut self.users, &mut self.labels] {
            if known.len() > NAMES_REMEMBERED_MAX {
                known.clear();
            }
        }

        let usernames: HashSet<&str> = rows.iter().filter_map(|row| row.assignee.as_deref()).collect();
        look_up_users(&self.conn, &mut self.users, usernames).await?;
        let labels: HashSet<&str> = rows.iter().flat_map(|row| row.labels.iter().map(String::as_str)).collect();
        look_up_labels(&self.conn, &mut self.labels, labels).await?;
        let known = self.look_up_external_ids(rows).await?;
        let now: DateTime<Utc> = self.conn.query_one(NOW, &[]).await?.get(0);

        let mut judge = Judge {
            task: &self.task,
            default_assignee_id: self.default_assignee_id,
            users: &self.users,
            labels: &self.labels,
            known: known.clone(),
            now,
            resolved: Resolved {
                new: Vec::with_capacity(rows.len()),
                existing: Vec::new(),
                skipped: Vec::new(),
                errors: Vec::new(),
                error_count: 0,
            },
            errors_max,
        };
        for row in rows {
            judge.row(row);
        }
        let mut resolved = judge.resolved;
        if self.task.create_labels {
            self.create_labels(&resolved).await?;
        }
        self.set_label_ids(&mut resolved)?;
        if !resolved.existing.is_empty() {
            self.lock_existing(&resolved, &known, columns).await?;
        }
        Ok(resolved)
    }

    async fn look_up_external_ids(&self, rows: &[ImportRow]) -> Result<HashMap<String, Known>> {
        const SQL: &str = "-- import_external_ids
            SELECT i.external_id, i.id, i.delete_time IS NOT NULL, coalesce(i.import_id = $2, false)
                OR EXISTS (SELECT FROM import_issues o WHERE o.import_id = $2 AND o.issue_id = i.id)
            FROM issues i WHERE i.external_id = ANY($1)";
        let external_ids: Vec<&str> = rows.iter().filter_map(|row| row.external_id.as_deref()).collect();
        if external_ids.is_empty() {
            return Ok(HashMap::new());
        }
        let found = self.conn.query(SQL, &[&external_ids, &self.task.import_id]).await?;
        let known = |row: &tokio_postgres::Row| match row.get(3) {
            true => Known::InFile,
            false => Known::Issue { id: row.get(1), deleted: row.get(2) },
        };
        Ok(found.iter().map(|row| (row.get(0), known(row))).collect())
    }

    /// Creates the labels that the rows name and that there are not.
    async fn create_labels(&mut self, resolved: &Resolved<'_>) -> Result<()> {
        // In an order, so that two imports that create the same ones wait for each other and not in a circle.
        const SQL: &str = "-- create_labels
            INSERT INTO labels (id, name)
            SELECT id, name FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS n (id, name, nth) ORDER BY lower(name), nth
            ON CONFLICT DO NOTHING";
        let mut seen = HashSet::new();
        let mut missing: Vec<&str> = resolved.labels().filter(|name| self.labels.get(*name) == Some(&None)).collect();
        missing.retain(|name| seen.insert(*name));
        if missing.is_empty() {
            return Ok(());
        }
        let ids: Vec<Uuid> = missing.iter().map(|_| Uuid::now_v7()).collect();
        self.conn.execute(SQL, &[&ids, &missing]).await?;
        for name in &missing {
            self.labels.remove(*name);
        }
        look_up_labels(&self.conn, &mut self.labels, seen).await
    }

    fn set_label_ids(&self, resolved: &mut Resolved<'_>) -> Result<()> {
        let ids_of = |row: &ImportRow| {
            let mut ids: Vec<Uuid> = Vec::with_capacity(row.labels.len());
            for name in &row.labels {
                // One that was found a moment ago and is gone: somebody has deleted it.
                let id = self.labels.get(name).copied().flatten().ok_or_else(changed_meanwhile)?;
                // Names that only the database takes for the same.
                if !ids.contains(&id) {
                    ids.push(id);
                }
            }
            Ok::<_, Error>(ids)
        };
        for new in &mut resolved.new {
            new.label_ids = ids_of(new.row)?;
        }
        for existing in &mut resolved.existing {
            existing.label_ids = ids_of(existing.row)?;
        }
        Ok(())
    }

    /// Locks the issues that are to be changed, and makes sure that they are still what the rows were judged by.
    async fn lock_existing(
        &self,
        resolved: &Resolved<'_>,
        known: &HashMap<String, Known>,
        columns: &Columns,
    ) -> Result<()> {
        // Labels before issues, as a deletion of a label locks them: the other order would deadlock with it.
        const LABELS: &str =
            "-- lock_labels_of_import\nSELECT id FROM labels WHERE id = ANY($1) ORDER BY id FOR KEY SHARE";
        const ISSUES: &str = "-- lock_existing_issues
            SELECT external_id, id, delete_time IS NOT NULL FROM issues WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE";
        if columns.index(Column::Labels).is_some() {
            let of_existing = resolved.existing.iter().flat_map(|row| row.label_ids.iter().copied());
            let ids: HashSet<Uuid> =
                resolved.new.iter().flat_map(|row| row.label_ids.iter().copied()).chain(of_existing).collect();
            let ids: Vec<Uuid> = ids.into_iter().collect();
            self.conn.query(LABELS, &[&ids]).await?;
        }
        let ids: Vec<Uuid> = resolved.existing.iter().map(|row| row.id).collect();
        let locked = self.conn.query(ISSUES, &[&ids]).await?;
        let is_same = |row: &tokio_postgres::Row| {
            let external_id: Option<&str> = row.get(0);
            let now = Known::Issue { id: row.get(1), deleted: row.get(2) };
            external_id.and_then(|external_id| known.get(external_id)) == Some(&now)
        };
        if locked.len() == ids.len() && locked.iter().all(is_same) { Ok(()) } else { Err(changed_meanwhile()) }
    }
}

/// The batch is to be tried again.
fn changed_meanwhile() -> Error {
    Error::Aborted { reason: "CONFLICT", message: "what the rows refer to is being changed; try again".to_owned() }
}

impl Resolved<'_> {
    /// The labels of the rows that go in.
    fn labels(&self) -> impl Iterator<Item = &str> {
        let rows = self.new.iter().map(|new| new.row).chain(self.existing.iter().map(|existing| existing.row));
        rows.flat_map(|row| row.labels.iter().map(String::as_str))
    }
}

/// What a row is about.
#[derive(Clone, Copy)]
enum Target {
    New,
    Existing(Uuid),
    Skipped(Uuid),
    /// Nothing that it could be about.
    Bad(RowErrorCode),
}

struct Judge<'a, 'r> {
    task: &'a ImportTask,
    default_assignee_id: Option<Uuid>,
    users: &'a HashMap<String, Option<Uuid>>,
    labels: &'a HashMap<String, Option<Uuid>>,
    known: HashMap<String, Known>,
    now: DateTime<Utc>,
    resolved: Resolved<'r>,
    errors_max: usize,
}

impl<'r> Judge<'_, 'r> {
    fn row(&mut self, row: &'r ImportRow) {
        let errors_before = self.resolved.error_count;
        let target = self.target(row);
        if row.title.is_empty() && matches!(target, Target::New) {
            let message = "is required: the issue would be a new one";
            self.error(row, "title", "", RowErrorCode::Required, message);
        }
        let assignee_id = self.assignee(row);
        self.check_labels(row);
        if let Target::Bad(code) = target {
            let message = match code {
                RowErrorCode::DuplicateExternalId => "a row before this one has the same external_id",
                RowErrorCode::IssueDeleted => "the issue with this external_id is deleted; bring it back first",
                _ => "another issue has this external_id",
            };
            self.error(row, "external_id", row.external_id.as_deref().unwrap_or_default(), code, message);
        }
        let create_time = row.create_time.unwrap_or(self.now);
        if let Some(close_time) = row.close_time.filter(|close_time| *close_time < create_time)
            && matches!(target, Target::New)
        {
            let value = close_time.to_rfc3339_opts(SecondsFormat::AutoSi, true);
            let message = "the issue would be created now, after this; give its create_time";
            self.error(row, "close_time", &value, RowErrorCode::CloseTimeBeforeCreateTime, message);
        }
        if self.resolved.error_count > errors_before {
            return;
        }
        if let Some(external_id) = &row.external_id {
            self.known.insert(external_id.clone(), Known::InFile);
        }
        match target {
            Target::New => {
                let status = row.status.unwrap_or(self.task.format.default_status);
                let closed_now = (status == Status::Closed).then(|| self.now.max(create_time));
                self.resolved.new.push(NewRow {
                    row,
                    id: issue_id(create_time, row.row_number),
                    status,
                    create_time,
                    close_time: row.close_time.or(closed_now),
                    assignee_id: assignee_id.or(self.default_assignee_id),
                    label_ids: Vec::new(),
                });
            }
            Target::Existing(id) => {
                self.resolved.existing.push(ExistingRow { row, id, assignee_id, label_ids: Vec::new() });
            }
            Target::Skipped(id) => self.resolved.skipped.push(id),
            Target::Bad(_) => {}
        }
    }

    fn target(&self, row: &ImportRow) -> Target {
        let Some(external_id) = &row.external_id else { return Target::New };
        match (self.known.get(external_id), self.task.on_existing) {
            (None, _) => Target::New,
            (Some(Known::InFile), _) => Target::Bad(RowErrorCode::DuplicateExternalId),
            (Some(Known::Issue { id, .. }), OnExisting::Skip) => Target::Skipped(*id),
            (Some(Known::Issue { id, deleted: false }), OnExisting::Update) => Target::Existing(*id),
            (Some(Known::Issue { deleted: true, .. }), OnExisting::Update) => Target::Bad(RowErrorCode::IssueDeleted),
            (Some(Known::Issue { .. }), OnExisting::Fail | OnExisting::Unspecified) => {
                Target::Bad(RowErrorCode::ExternalIdTaken)
            }
        }
    }

    fn assignee(&mut self, row: &ImportRow) -> Option<Uuid> {
        let username = row.assignee.as_deref()?;
        let id = self.users.get(username).copied().flatten();
        if id.is_none() {
            let message = "there is no user with this username";
            self.error(row, "assignee", username, RowErrorCode::UnknownAssignee, message);
        }
        id
    }

    fn check_labels(&mut self, row: &ImportRow) {
        for name in &row.labels {
            if self.labels.get(name).copied().flatten().is_some() {
                continue;
            }
            if !self.task.create_labels {
                self.error(row, "labels", name, RowErrorCode::UnknownLabel, "there is no label with this name");
            } else if name.contains(';') {
                let message = "there is no label with this name, and none with a \";\" in it is created";
                self.error(row, "labels", name, RowErrorCode::UnknownLabel, message);
            }
        }
    }

    fn error(&mut self, row: &ImportRow, column: &str, value: &str, code: RowErrorCode, message: &str) {
        self.resolved.error_count += 1;
        if self.resolved.errors.len() >= self.errors_max {
            return;
        }
        self.resolved.errors.push(RowError {
            row_number: row.row_number,
            line_number: row.line_number,
            byte_offset: row.byte_offset,
            column: column.to_owned(),
            value: shorten(value.as_bytes()),
            code,
            message: message.to_owned(),
        });
    }
}

/// An id of version 7 that sorts where an issue of this time belongs, and among those of the same time in the order of
/// the file: 48 bits of milliseconds, the microseconds beyond, 32 bits of row number, 30 random bits.
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
    fn ids_are_of_version_7_and_sort_by_time_and_then_by_row() {
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
