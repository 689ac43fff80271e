//! Rows of issues as messages. Columns are read by name.

use chrono::{DateTime, Utc};
use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    db::time::timestamp,
    pb::{Issue, Label},
};

/// Returns the issue in a row that has its columns, and `comment_count`, `label_ids`, `label_names` and
/// `label_descriptions`: arrays of the same length, or NULL without labels.
pub(super) fn issue_with_labels(row: &Row) -> Issue {
    let ids: Vec<Uuid> = row.get::<_, Option<_>>("label_ids").unwrap_or_default();
    let names: Vec<String> = row.get::<_, Option<_>>("label_names").unwrap_or_default();
    let descriptions: Vec<String> = row.get::<_, Option<_>>("label_descriptions").unwrap_or_default();
    let labels = ids.iter().zip(names).zip(descriptions);
    Issue {
        comment_count: row.get("comment_count"),
        labels: labels.map(|((id, name), description)| Label { id: id.to_string(), name, description }).collect(),
        ..issue_without_labels(row)
    }
}

/// Returns the issue in a row that has its columns, without labels and `comment_count`.
pub(super) fn issue_without_labels(row: &Row) -> Issue {
    let id = |column: &str| row.get::<_, Option<Uuid>>(column).map(|id| id.to_string()).unwrap_or_default();
    let time = |column: &str| row.get::<_, Option<DateTime<Utc>>>(column).map(timestamp);
    Issue {
        id: id("id"),
        title: row.get("title"),
        description: row.get("description"),
        status: i32::from(row.get::<_, i16>("status")),
        priority: i32::from(row.get::<_, i16>("priority")),
        assignee_id: id("assignee_id"),
        reporter_id: id("reporter_id"),
        version: row.get("version"),
        external_id: row.get::<_, Option<_>>("external_id").unwrap_or_default(),
        create_time: time("create_time"),
        update_time: time("update_time"),
        close_time: time("close_time"),
        delete_time: time("delete_time"),
        reopen_count: row.get("reopen_count"),
        ..Issue::default()
    }
}
