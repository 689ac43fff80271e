//! Exporting issues from one snapshot, row by row.

use std::{collections::HashMap, pin::Pin};

use futures_util::TryStreamExt;
use tokio_postgres::{Row, RowStream, Statement, types::ToSql};
use uuid::Uuid;

use super::list::FilterQuery;
use crate::{
    csv::export_writer::ExportRow,
    db::{
        conn::{Conn, ExclusiveConn},
        pool::Db,
    },
    error::{Error, Result},
    filter::Filter,
    metrics::Timer,
};

/// An export. Rows are read as they are requested: while none is requested, the database waits.
///
/// Dropped before [`ExportSession::finish`], it cancels its statement and closes its connection.
pub struct ExportSession {
    conn: ExclusiveConn,
    labels: LabelNames,
    columns: ExportColumns,
    /// Of the query, which lasts as long as the client reads.
    _timer: Timer,
    rows: Pin<Box<RowStream>>,
    row: Option<Row>,
    /// The names of the labels of `row`.
    label_names: String,
}

impl ExportSession {
    /// Starts an export, oldest issue first.
    pub async fn open(db: &Db, filter: &Filter, show_deleted: bool) -> Result<Self> {
        let FilterQuery { joins, conditions, params } = FilterQuery::new(filter, show_deleted);
        let conditions = conditions.join(" AND ");
        // Only the ids of labels: joining and sorting their names would double the time of the query.
        let sql = format!(
            "-- export_issues
            SELECT issue.external_id, issue.title, issue.description, issue.priority, issue.status,
                assignee.username AS assignee,
                (SELECT array_agg(issue_label.label_id) FROM issue_labels issue_label
                    WHERE issue_label.issue_id = issue.id) AS label_ids,
                issue.create_time, issue.close_time
            FROM issues issue{joins} LEFT JOIN users assignee ON assignee.id = issue.assignee_id
            WHERE {conditions} ORDER BY issue.create_time, issue.id"
        );
        let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|param| &**param as _).collect();

        let conn = db.conn().await?.into_exclusive();
        // The client decides how long the export takes. All statements read the snapshot of the first one.
        conn.enqueue("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL statement_timeout = 0")?;
        let labels = LabelNames::load(&conn).await?;
        let statement = conn.statement(&sql).await?;
        let columns = ExportColumns::of(&statement)?;
        let timer = statement.start_timer();
        let rows = Box::pin(conn.run(conn.client().query_raw(&*statement, params.iter().copied())).await?);
        Ok(Self { conn, labels, columns, _timer: timer, rows, row: None, label_names: String::new() })
    }

    /// Returns the next row, or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<ExportRow<'_>>> {
        self.row = self.conn.run(self.rows.try_next()).await?;
        let Some(row) = &self.row else { return Ok(None) };
        let columns = &self.columns;
        self.label_names.clear();
        if let Some(ids) = row.get::<_, Option<Vec<Uuid>>>(columns.label_ids) {
            self.labels.join(&ids, &mut self.label_names);
        }
        let unknown = |_| Error::Internal("an issue has an unknown status or priority");
        Ok(Some(ExportRow {
            external_id: row.get::<_, Option<_>>(columns.external_id).unwrap_or_default(),
            title: row.get(columns.title),
            description: row.get(columns.description),
            priority: i32::from(row.get::<_, i16>(columns.priority)).try_into().map_err(unknown)?,
            status: i32::from(row.get::<_, i16>(columns.status)).try_into().map_err(unknown)?,
            assignee: row.get::<_, Option<_>>(columns.assignee).unwrap_or_default(),
            labels: &self.label_names,
            create_time: row.get(columns.create_time),
            close_time: row.get(columns.close_time),
        }))
    }

    /// Returns the connection to the pool, after the last row.
    pub async fn finish(self) -> Result<()> {
        self.conn.execute_command("COMMIT").await?;
        self.conn.release();
        Ok(())
    }
}

/// The positions of the columns, resolved once per export instead of once per row.
struct ExportColumns {
    external_id: usize,
    title: usize,
    description: usize,
    priority: usize,
    status: usize,
    assignee: usize,
    label_ids: usize,
    create_time: usize,
    close_time: usize,
}

impl ExportColumns {
    fn of(statement: &Statement) -> Result<Self> {
        let position = |name: &str| {
            let position = statement.columns().iter().position(|column| column.name() == name);
            position.ok_or(Error::Internal("a column of the export is missing"))
        };
        Ok(Self {
            external_id: position("external_id")?,
            title: position("title")?,
            description: position("description")?,
            priority: position("priority")?,
            status: position("status")?,
            assignee: position("assignee")?,
            label_ids: position("label_ids")?,
            create_time: position("create_time")?,
            close_time: position("close_time")?,
        })
    }
}

/// The names of all labels.
struct LabelNames {
    /// Sorted.
    names: Vec<String>,
    /// The position of each label in `names`.
    positions: HashMap<Uuid, usize>,
}

impl LabelNames {
    async fn load(db: &Conn) -> Result<Self> {
        // Sorted independently of the locale of the database.
        const SQL: &str = "-- export_labels\nSELECT name, id FROM labels ORDER BY lower(name) COLLATE \"C\"";
        let rows = db.query(SQL, &[]).await?;
        Ok(Self {
            names: rows.iter().map(|row| row.get("name")).collect(),
            positions: rows.iter().enumerate().map(|(position, row)| (row.get("id"), position)).collect(),
        })
    }

    fn join(&self, ids: &[Uuid], joined: &mut String) {
        let mut positions: Vec<usize> = ids.iter().filter_map(|id| self.positions.get(id).copied()).collect();
        positions.sort_unstable();
        for (index, position) in positions.into_iter().enumerate() {
            if index > 0 {
                joined.push(';');
            }
            joined.push_str(&self.names[position]);
        }
    }
}
