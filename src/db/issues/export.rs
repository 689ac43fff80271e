//! Issues as they are at one instant, one by one.

use std::{collections::HashMap, pin::Pin};

use futures_util::TryStreamExt;
use tokio_postgres::{Row, RowStream, types::ToSql};
use uuid::Uuid;

use super::ListQuery;
use crate::{
    csv::export_writer::ExportRow,
    db::{Conn, Db, PooledConn},
    error::{Error, Result},
    filter::Filter,
};

/// The connection of an export. Dropped before [`ExportSession::finish`], the connection is closed, and its statement
/// cancelled. Rows are read as they are asked for: while nobody asks, the database waits.
pub struct ExportSession {
    conn: PooledConn,
    labels: Labels,
    rows: Pin<Box<RowStream>>,
    row: Option<Row>,
    /// The labels of `row`.
    label_names: String,
}

impl ExportSession {
    /// Oldest first.
    pub async fn open(db: &Db, filter: &Filter, show_deleted: bool) -> Result<Self> {
        let query = ListQuery::new(filter, show_deleted);
        // Names of labels are put in where the rows are read: joined and sorted for each issue, they would take the
        // database as long again as all the rest.
        let sql = format!(
            "-- export_issues\nSELECT i.external_id, i.title, i.description, i.priority, i.status, u.username,
                (SELECT array_agg(il.label_id) FROM issue_labels il WHERE il.issue_id = i.id), i.create_time, i.close_time
            FROM issues i{} LEFT JOIN users u ON u.id = i.assignee_id WHERE {} ORDER BY i.create_time, i.id",
            query.joins,
            query.conditions.join(" AND "),
        );
        let params: Vec<&(dyn ToSql + Sync)> = query.params.iter().map(|param| &**param as _).collect();

        let conn = db.conn().await?;
        conn.set_discard(true);
        // How long it may take is a matter of its client. All statements see what the first one sees.
        conn.enqueue("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY; SET LOCAL statement_timeout = 0")?;
        let labels = Labels::load(&conn).await?;
        let statement = conn.statement(&sql).await?;
        let rows = Box::pin(conn.client.query_raw(&statement, params.iter().copied()).await?);
        Ok(Self { conn, labels, rows, row: None, label_names: String::new() })
    }

    pub async fn next(&mut self) -> Result<Option<ExportRow<'_>>> {
        self.row = self.rows.try_next().await?;
        let Some(row) = &self.row else { return Ok(None) };
        self.label_names.clear();
        if let Some(ids) = row.get::<_, Option<Vec<Uuid>>>(6) {
            self.labels.join(&ids, &mut self.label_names);
        }
        let unknown = |_| Error::Internal("an issue has an unknown status or priority");
        Ok(Some(ExportRow {
            external_id: row.get::<_, Option<_>>(0).unwrap_or_default(),
            title: row.get(1),
            description: row.get(2),
            priority: i32::from(row.get::<_, i16>(3)).try_into().map_err(unknown)?,
            status: i32::from(row.get::<_, i16>(4)).try_into().map_err(unknown)?,
            assignee: row.get::<_, Option<_>>(5).unwrap_or_default(),
            labels: &self.label_names,
            create_time: row.get(7),
            close_time: row.get(8),
        }))
    }

    /// Gives the connection back, when there are no more rows.
    pub async fn finish(self) -> Result<()> {
        self.conn.client.batch_execute("COMMIT").await?;
        self.conn.set_discard(false);
        Ok(())
    }
}

/// The names of all labels.
struct Labels {
    /// In order.
    names: Vec<String>,
    /// Where each is in `names`.
    places: HashMap<Uuid, usize>,
}

impl Labels {
    async fn load(db: &Conn) -> Result<Self> {
        // In an order that does not depend on the database's locale.
        const SQL: &str = "-- export_labels\nSELECT name, id FROM labels ORDER BY lower(name) COLLATE \"C\"";
        let rows = db.query(SQL, &[]).await?;
        Ok(Self {
            names: rows.iter().map(|row| row.get(0)).collect(),
            places: rows.iter().enumerate().map(|(place, row)| (row.get(1), place)).collect(),
        })
    }

    fn join(&self, ids: &[Uuid], joined: &mut String) {
        let mut places: Vec<usize> = ids.iter().filter_map(|id| self.places.get(id).copied()).collect();
        places.sort_unstable();
        for (nth, place) in places.into_iter().enumerate() {
            if nth > 0 {
                joined.push(';');
            }
            joined.push_str(&self.names[place]);
        }
    }
}
