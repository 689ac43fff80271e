//! An import's side of the database: names to ids, rows by COPY, and what is kept of the import itself.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, SecondsFormat, Utc};
use tokio_postgres::{
    binary_copy::BinaryCopyInWriter,
    types::{ToSql, Type},
};
use uuid::{NoContext, Uuid};

use super::{Conn, Db, PooledConn};
use crate::{
    error::{Error, Result},
    import::{ImportRow, RowError, RowErrorCode, shorten},
    pb::{ImportMode, ImportState, ImportSummary, Status},
};

/// How many usernames or labels are remembered during an import.
const NAMES_REMEMBERED_MAX: usize = 10_000;
/// Row errors that an import's client is sent.
pub const IMPORT_ERRORS_SENT_MAX: usize = 1_000;
/// How often a batch is tried when others change what it refers to at the same time.
const BATCH_TRIES_MAX: u32 = 3;

/// What an import is.
#[derive(Clone, Copy, Debug)]
pub struct ImportTask {
    pub import_id: Uuid,
    pub caller_id: Uuid,
    pub mode: ImportMode,
    pub validate_only: bool,
    /// The file's size; 0: not known.
    pub total_bytes: u64,
}

/// What an import has done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct ImportTotals {
    pub offset: u64,
    pub row_count: u64,
    pub created_count: u64,
    pub rejected_count: u64,
    pub error_count: u64,
}

/// An import that may begin, or the summary of the one that was committed under this id.
pub enum Opened {
    Session(Box<ImportSession>),
    Committed(ImportSummary),
}

/// The connection of an import. Dropped before [`ImportSession::finish`], the connection is closed, and with it goes what
/// is not committed.
pub struct ImportSession {
    conn: PooledConn,
    task: ImportTask,
    users: HashMap<String, Option<Uuid>>,
    labels: HashMap<String, Option<Uuid>>,
}

impl ImportTask {
    /// Whether all rows go into one transaction.
    fn is_one_transaction(&self) -> bool {
        self.mode == ImportMode::Atomic || self.validate_only
    }

    fn summary(&self, totals: &ImportTotals, state: ImportState) -> ImportSummary {
        ImportSummary {
            import_id: self.import_id.to_string(),
            state: state.into(),
            row_count: totals.row_count as i64,
            created_count: if state == ImportState::Rejected { 0 } else { totals.created_count as i64 },
            rejected_count: totals.rejected_count as i64,
            error_count: totals.error_count as i64,
            byte_count: totals.offset as i64,
            updated_count: 0,
            skipped_count: 0,
        }
    }
}

impl ImportSession {
    /// Takes the import's lock, and looks whether it was made before.
    pub async fn open(db: &Db, task: ImportTask) -> Result<Opened> {
        const LOCK: &str = "-- lock_import\nSELECT pg_try_advisory_lock(hashtextextended($1, 0))";
        const FIND: &str = "-- find_import
            SELECT caller_id, mode, finish_time IS NOT NULL, committed_offset, row_count, created_count, rejected_count,
                error_count
            FROM imports WHERE id = $1";
        let conn = db.conn().await?;
        conn.set_discard(true);
        let id = task.import_id;
        if !conn.query_one(LOCK, &[&format!("import {id}")]).await?.get::<_, bool>(0) {
            return Err(Error::Aborted {
                reason: "IMPORT_RUNNING",
                message: format!("another stream works on import \"{id}\"; wait until it has ended"),
            });
        }
        let session = Self { conn, task, users: HashMap::new(), labels: HashMap::new() };
        let Some(row) = session.conn.query_opt(FIND, &[&id]).await? else {
            if task.is_one_transaction() {
                // How long it may wait for its client is the stream's matter.
                session.conn.enqueue("BEGIN; SET LOCAL idle_in_transaction_session_timeout = 0")?;
            }
            return Ok(Opened::Session(Box::new(session)));
        };
        let same_file = !row.get::<_, bool>(2) || [0, row.get::<_, i64>(3).cast_unsigned()].contains(&task.total_bytes);
        if row.get::<_, Uuid>(0) != task.caller_id || row.get::<_, i16>(1) != task.mode as i16 || !same_file {
            let message = format!(
                "import \"{id}\" was made with other options, of another file or by another user; take a new import_id"
            );
            return Err(Error::precondition("IMPORT_MISMATCH", "options.import_id", message));
        }
        let count = |index: usize| row.get::<_, i64>(index).cast_unsigned();
        if !row.get::<_, bool>(2) {
            let message = format!("import \"{id}\" was cut behind byte {}; the rows before it are in", count(3));
            return Err(Error::precondition("IMPORT_INCOMPLETE", "options.import_id", message));
        }
        let totals = ImportTotals {
            offset: count(3),
            row_count: count(4),
            created_count: count(5),
            rejected_count: count(6),
            error_count: count(7),
        };
        session.close().await;
        Ok(Opened::Committed(task.summary(&totals, ImportState::Committed)))
    }

    /// Writes the rows that are good, and answers the first errors of those that are not. `totals` are those before these
    /// rows, and get their counts. What is committed with the last rows says that the import is finished.
    pub async fn write(
        &mut self,
        rows: &[ImportRow],
        is_last: bool,
        totals: &mut ImportTotals,
    ) -> Result<Vec<RowError>> {
        let before = *totals;
        for attempt in 1.. {
            *totals = before;
            let written = self.try_write(rows, is_last, totals).await;
            match written {
                // Somebody took an external id or deleted a label between the look-up and the COPY, or got in the way of it.
                Err(error) if error.constraint().is_some() || matches!(error, Error::Aborted { .. }) => {
                    if self.task.is_one_transaction() || attempt == BATCH_TRIES_MAX {
                        return Err(Error::Aborted {
                            reason: "CONFLICT",
                            message: "the import got in the way of another request; try again".to_owned(),
                        });
                    }
                    self.conn.client.batch_execute("ROLLBACK").await?;
                    self.users.clear();
                    self.labels.clear();
                }
                written => return written,
            }
        }
        Err(Error::Internal("a batch was tried without end"))
    }

    async fn try_write(
        &mut self,
        rows: &[ImportRow],
        is_last: bool,
        totals: &mut ImportTotals,
    ) -> Result<Vec<RowError>> {
        if !self.task.is_one_transaction() {
            self.conn.enqueue("BEGIN")?;
        }
        let (good, errors, error_count) = self.resolve(rows).await?;
        copy_issues(&self.conn, &self.task, &good).await?;
        copy_labels(&self.conn, &good).await?;
        totals.created_count += good.len() as u64;
        totals.rejected_count += (rows.len() - good.len()) as u64;
        totals.error_count += error_count;
        if !self.task.is_one_transaction() {
            keep_import(&self.conn, &self.task, totals, is_last).await?;
            self.conn.client.batch_execute("COMMIT").await?;
        }
        Ok(errors)
    }

    /// Commits, or rolls back what must not stay.
    pub async fn finish(self, totals: &ImportTotals) -> Result<ImportSummary> {
        let state = if self.task.mode == ImportMode::Atomic && totals.rejected_count > 0 {
            ImportState::Rejected
        } else if self.task.validate_only {
            ImportState::Validated
        } else {
            ImportState::Committed
        };
        if self.task.is_one_transaction() {
            if state == ImportState::Committed {
                keep_import(&self.conn, &self.task, totals, true).await?;
            }
            let end = if state == ImportState::Committed { "COMMIT" } else { "ROLLBACK" };
            self.conn.client.batch_execute(end).await?;
        }
        let summary = self.task.summary(totals, state);
        // It is committed, whatever happens to the connection now.
        self.close().await;
        Ok(summary)
    }

    /// Gives the connection back to the pool, or lets it be closed if its lock cannot be freed.
    async fn close(self) {
        if self.conn.client.batch_execute("SELECT pg_advisory_unlock_all()").await.is_ok() {
            self.conn.set_discard(false);
        }
    }

    /// Looks up what the rows refer to: those that can go in, with ids for names, and of the others the
    /// first errors and how many there are.
    async fn resolve<'a>(&mut self, rows: &'a [ImportRow]) -> Result<(Vec<ResolvedRow<'a>>, Vec<RowError>, u64)> {
        const USERS: &str = "-- import_users
            SELECT n.name, u.id FROM unnest($1::text[]) AS n (name) JOIN users u ON lower(u.username) = lower(n.name)";
        const LABELS: &str = "-- import_labels
            SELECT n.name, l.id FROM unnest($1::text[]) AS n (name) JOIN labels l ON lower(l.name) = lower(n.name)";
        const EXTERNAL_IDS: &str = "-- import_external_ids
            SELECT external_id, coalesce(import_id = $2, false) FROM issues WHERE external_id = ANY($1)";

        let usernames: HashSet<&str> = rows.iter().filter_map(|row| row.assignee.as_deref()).collect();
        look_up(&self.conn, USERS, &mut self.users, usernames).await?;
        let labels: HashSet<&str> = rows.iter().flat_map(|row| row.labels.iter().map(String::as_str)).collect();
        look_up(&self.conn, LABELS, &mut self.labels, labels).await?;
        let external_ids: Vec<&str> = rows.iter().filter_map(|row| row.external_id.as_deref()).collect();
        let mut taken: HashMap<String, RowErrorCode> = HashMap::new();
        if !external_ids.is_empty() {
            for row in self.conn.query(EXTERNAL_IDS, &[&external_ids, &self.task.import_id]).await? {
                let ours: bool = row.get(1);
                let code = if ours { RowErrorCode::DuplicateExternalId } else { RowErrorCode::ExternalIdTaken };
                taken.insert(row.get(0), code);
            }
        }
        let now: DateTime<Utc> = self.conn.query_one("-- import_time\nSELECT now()", &[]).await?.get(0);
        let mut resolver =
            Resolver { users: &self.users, labels: &self.labels, taken, now, errors: Vec::new(), error_count: 0 };
        let good = rows.iter().filter_map(|row| resolver.row(row)).collect();
        Ok((good, resolver.errors, resolver.error_count))
    }
}

/// Asks for the names that are not known yet.
async fn look_up(db: &Conn, sql: &str, known: &mut HashMap<String, Option<Uuid>>, wanted: HashSet<&str>) -> Result<()> {
    if known.len() + wanted.len() > NAMES_REMEMBERED_MAX {
        known.clear();
    }
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

/// A row whose names are ids.
struct ResolvedRow<'a> {
    row: &'a ImportRow,
    id: Uuid,
    create_time: DateTime<Utc>,
    close_time: Option<DateTime<Utc>>,
    assignee_id: Option<Uuid>,
    label_ids: Vec<Uuid>,
}

struct Resolver<'a> {
    users: &'a HashMap<String, Option<Uuid>>,
    labels: &'a HashMap<String, Option<Uuid>>,
    taken: HashMap<String, RowErrorCode>,
    now: DateTime<Utc>,
    /// The first [`IMPORT_ERRORS_SENT_MAX`].
    errors: Vec<RowError>,
    error_count: u64,
}

impl Resolver<'_> {
    fn row<'a>(&mut self, row: &'a ImportRow) -> Option<ResolvedRow<'a>> {
        let errors_before = self.error_count;
        let assignee_id = row.assignee.as_deref().and_then(|username| {
            let id = self.users.get(username).copied().flatten();
            if id.is_none() {
                self.error(
                    row,
                    "assignee",
                    username,
                    RowErrorCode::UnknownAssignee,
                    "there is no user with this username",
                );
            }
            id
        });
        let mut label_ids = Vec::with_capacity(row.labels.len());
        for name in &row.labels {
            match self.labels.get(name).copied().flatten() {
                // Names that only the database takes for the same.
                Some(id) if label_ids.contains(&id) => {}
                Some(id) => label_ids.push(id),
                None => self.error(row, "labels", name, RowErrorCode::UnknownLabel, "there is no label with this name"),
            }
        }
        if let Some(external_id) = &row.external_id {
            match self.taken.get(external_id).copied() {
                Some(code @ RowErrorCode::DuplicateExternalId) => {
                    self.error(row, "external_id", external_id, code, "a row before this one has the same external_id");
                }
                Some(code) => self.error(row, "external_id", external_id, code, "another issue has this external_id"),
                None => {}
            }
        }
        let create_time = row.create_time.unwrap_or(self.now);
        if let Some(close_time) = row.close_time.filter(|close_time| *close_time < create_time) {
            let (value, code) =
                (close_time.to_rfc3339_opts(SecondsFormat::AutoSi, true), RowErrorCode::CloseTimeBeforeCreateTime);
            self.error(
                row,
                "close_time",
                &value,
                code,
                "the issue would be created now, after this; give its create_time",
            );
        }
        if self.error_count > errors_before {
            return None;
        }
        if let Some(external_id) = &row.external_id {
            self.taken.insert(external_id.clone(), RowErrorCode::DuplicateExternalId);
        }
        let closed_now = (row.status == Status::Closed).then(|| self.now.max(create_time));
        Some(ResolvedRow {
            row,
            id: row.create_time.map_or_else(Uuid::now_v7, uuid_at),
            create_time,
            close_time: row.close_time.or(closed_now),
            assignee_id,
            label_ids,
        })
    }

    fn error(&mut self, row: &ImportRow, column: &str, value: &str, code: RowErrorCode, message: &str) {
        self.error_count += 1;
        if self.errors.len() >= IMPORT_ERRORS_SENT_MAX {
            return;
        }
        self.errors.push(RowError {
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

/// An id that sorts where an issue of this time belongs.
fn uuid_at(time: DateTime<Utc>) -> Uuid {
    let seconds = u64::try_from(time.timestamp()).unwrap_or_default();
    Uuid::new_v7(uuid::Timestamp::from_unix(NoContext, seconds, time.timestamp_subsec_nanos()))
}

async fn copy_issues(db: &Conn, task: &ImportTask, rows: &[ResolvedRow<'_>]) -> Result<()> {
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
    for ResolvedRow { row, id, create_time, close_time, assignee_id, .. } in rows {
        let values: [&(dyn ToSql + Sync); 12] = [
            id,
            &task.import_id,
            create_time,
            create_time,
            close_time,
            &task.caller_id,
            assignee_id,
            &(row.status as i16),
            &(row.priority as i16),
            &row.title,
            &row.description,
            &row.external_id,
        ];
        writer.as_mut().write(&values).await?;
    }
    written(writer.as_mut().finish().await?, rows.len())
}

async fn copy_labels(db: &Conn, rows: &[ResolvedRow<'_>]) -> Result<()> {
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

/// Keeps how far the import is, in the transaction of the rows.
async fn keep_import(db: &Conn, task: &ImportTask, totals: &ImportTotals, finished: bool) -> Result<()> {
    const SQL: &str = "-- keep_import
        INSERT INTO imports (id, caller_id, mode, committed_offset, row_count, created_count, rejected_count, error_count,
            finish_time)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, CASE WHEN $9 THEN now() END)
        ON CONFLICT (id) DO UPDATE SET committed_offset = excluded.committed_offset, row_count = excluded.row_count,
            created_count = excluded.created_count, rejected_count = excluded.rejected_count,
            error_count = excluded.error_count, finish_time = excluded.finish_time";
    let [offset, rows, created, rejected, errors] =
        [totals.offset, totals.row_count, totals.created_count, totals.rejected_count, totals.error_count]
            .map(u64::cast_signed);
    db.execute(
        SQL,
        &[
            &task.import_id,
            &task.caller_id,
            &(task.mode as i16),
            &offset,
            &rows,
            &created,
            &rejected,
            &errors,
            &finished,
        ],
    )
    .await
    .map(drop)
}
