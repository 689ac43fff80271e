//! Rows of issues as messages. Columns are read by name.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    db::time::timestamp,
    error::{Error, Result},
    pb::{Issue, Label},
};

/// The positions of the columns of issues in the rows of a result, resolved once per result instead of once per row.
pub(super) struct IssueColumns {
    id: usize,
    title: usize,
    description: usize,
    status: usize,
    priority: usize,
    assignee_id: usize,
    reporter_id: usize,
    version: usize,
    external_id: usize,
    create_time: usize,
    update_time: usize,
    close_time: usize,
    delete_time: usize,
    reopen_count: usize,
}

impl IssueColumns {
    /// Resolves the columns by their names in any row of the result.
    pub fn of(row: &Row) -> Result<Self> {
        let position = |name: &str| {
            let position = row.columns().iter().position(|column| column.name() == name);
            position.ok_or(Error::Internal("a column of an issue is missing"))
        };
        Ok(Self {
            id: position("id")?,
            title: position("title")?,
            description: position("description")?,
            status: position("status")?,
            priority: position("priority")?,
            assignee_id: position("assignee_id")?,
            reporter_id: position("reporter_id")?,
            version: position("version")?,
            external_id: position("external_id")?,
            create_time: position("create_time")?,
            update_time: position("update_time")?,
            close_time: position("close_time")?,
            delete_time: position("delete_time")?,
            reopen_count: position("reopen_count")?,
        })
    }

    /// Returns the issue in a row of the result, without labels and `comment_count`.
    pub fn issue(&self, row: &Row) -> Issue {
        let id = |column: usize| row.get::<_, Option<Uuid>>(column).map(|id| id.to_string()).unwrap_or_default();
        let time = |column: usize| row.get::<_, Option<DateTime<Utc>>>(column).map(timestamp);
        Issue {
            id: id(self.id),
            title: row.get(self.title),
            description: row.get(self.description),
            status: i32::from(row.get::<_, i16>(self.status)),
            priority: i32::from(row.get::<_, i16>(self.priority)),
            assignee_id: id(self.assignee_id),
            reporter_id: id(self.reporter_id),
            version: row.get(self.version),
            external_id: row.get::<_, Option<_>>(self.external_id).unwrap_or_default(),
            create_time: time(self.create_time),
            update_time: time(self.update_time),
            close_time: time(self.close_time),
            delete_time: time(self.delete_time),
            reopen_count: row.get(self.reopen_count),
            ..Issue::default()
        }
    }
}

/// Returns the issue in a row that has its columns, and `comment_count`, `label_ids`, `label_names` and
/// `label_descriptions`: arrays of the same length, or NULL without labels.
pub(super) fn issue_with_labels(row: &Row) -> Result<Issue> {
    let ids: Vec<Uuid> = row.get::<_, Option<_>>("label_ids").unwrap_or_default();
    let names: Vec<String> = row.get::<_, Option<_>>("label_names").unwrap_or_default();
    let descriptions: Vec<String> = row.get::<_, Option<_>>("label_descriptions").unwrap_or_default();
    let labels = ids.iter().zip(names).zip(descriptions);
    Ok(Issue {
        comment_count: row.get("comment_count"),
        labels: labels.map(|((id, name), description)| Label { id: id.to_string(), name, description }).collect(),
        ..IssueColumns::of(row)?.issue(row)
    })
}
