//! Reports on all issues that are not deleted.

use chrono::{DateTime, Utc};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{conn::Conn, labels, users};
use crate::{
    error::{Error, Result},
    pb::{
        GetTopAssigneesResponse, LatencyGroupBy,
        get_resolution_latency_response::{Group, group::Key},
        get_top_assignees_response::Assignee,
    },
};

/// Maximum groups of a report.
const GROUPS_MAX: i64 = 1_000;

/// A half-open window: from `start`, before `end`. Without an end it is unbounded there.
#[derive(Clone, Copy, Debug)]
pub struct TimeWindow {
    pub start: Option<DateTime<Utc>>,
    pub end: Option<DateTime<Utc>>,
}

/// Returns the users with the most assigned issues that were created in the window.
pub async fn top_assignees(
    db: &Conn,
    limit: i64,
    window: TimeWindow,
    open_only: bool,
) -> Result<GetTopAssigneesResponse> {
    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&limit];
    let created = within("create_time", &window, &mut params);
    let statuses = if open_only { " AND status IN (1, 2)" } else { "" };
    let sql = format!(
        "-- top_assignees
        SELECT assignee.id, assignee.username, assignee.role, assignee.disabled, assignee.create_time,
            assignee.update_time, assigned.issue_count, assigned.open_count, assigned.in_progress_count,
            assigned.closed_count
        FROM (
            SELECT assignee_id, count(*) AS issue_count, count(*) FILTER (WHERE status = 1) AS open_count,
                count(*) FILTER (WHERE status = 2) AS in_progress_count, count(*) FILTER (WHERE status = 3) AS closed_count
            FROM issues WHERE assignee_id IS NOT NULL AND delete_time IS NULL{statuses}{created} GROUP BY assignee_id
        ) assigned JOIN users assignee ON assignee.id = assigned.assignee_id
        ORDER BY assigned.issue_count DESC, lower(assignee.username) LIMIT $1"
    );
    let rows = db.query(&sql, &params).await?;
    let assignee = |row: &Row| Assignee {
        user: Some(users::from_row(row)),
        issue_count: row.get("issue_count"),
        open_count: row.get("open_count"),
        in_progress_count: row.get("in_progress_count"),
        closed_count: row.get("closed_count"),
    };
    Ok(GetTopAssigneesResponse { assignees: rows.iter().map(assignee).collect() })
}

/// Returns the conditions of a window on a column, each preceded by AND. An unbounded end has none: the planner cannot
/// estimate the selectivity of a condition that a parameter may switch off.
fn within<'a>(column: &str, window: &'a TimeWindow, params: &mut Vec<&'a (dyn ToSql + Sync)>) -> String {
    let mut conditions = String::new();
    for (end, operator) in [(&window.start, ">="), (&window.end, "<")] {
        if let Some(time) = end {
            params.push(time);
            conditions += &format!(" AND {column} {operator} ${}", params.len());
        }
    }
    conditions
}

/// The seconds from creation to closing. Floats from the start, where `extract` would compute numerics. Not intervals: the
/// sum of a few million of them can exceed the range of their days.
const LATENCY: &str = "date_part('epoch', issue.close_time - issue.create_time)";

/// Returns the aggregates of a group of latencies: count, average and percentiles.
fn aggregates(latency: &str) -> String {
    format!(
        "count(*) AS issue_count, avg({latency}) AS average,
        percentile_cont(ARRAY[0.5, 0.9, 0.95, 0.99]) WITHIN GROUP (ORDER BY {latency}) AS percentiles"
    )
}

/// Returns the latencies from `create_time` to `close_time` of the issues that were closed in the window, by group. The
/// group with the most issues is first.
pub async fn resolution_latency(db: &Conn, window: TimeWindow, group_by: LatencyGroupBy) -> Result<Vec<Group>> {
    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&GROUPS_MAX];
    // By status: without a window, the planner would read the rows in the order of close_time, which is far from their
    // physical order.
    let window = within("issue.close_time", &window, &mut params);
    let closed = format!("issue.status = 3 AND issue.delete_time IS NULL{window}");
    let sql = match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => total_latency(&closed),
        LatencyGroupBy::Priority => latency_by_priority(&closed),
        LatencyGroupBy::Assignee => latency_by_assignee(&closed),
        LatencyGroupBy::Label => latency_by_label(&closed),
    };
    let key = |row: &Row| match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => None,
        LatencyGroupBy::Priority => Some(Key::Priority(i32::from(row.get::<_, i16>("priority")))),
        LatencyGroupBy::Assignee => row.get::<_, Option<Uuid>>("id").map(|_| Key::Assignee(users::from_row(row))),
        LatencyGroupBy::Label => row.get::<_, Option<Uuid>>("id").map(|_| Key::Label(labels::from_row(row))),
    };
    let rows = db.query(&sql, &params).await?;
    rows.iter().map(|row| group(row, key(row))).collect()
}

fn total_latency(closed: &str) -> String {
    let aggregates = aggregates(LATENCY);
    format!("-- resolution_latency\nSELECT {aggregates} FROM issues issue WHERE {closed} LIMIT $1")
}

fn latency_by_priority(closed: &str) -> String {
    let aggregates = aggregates(LATENCY);
    format!(
        "-- resolution_latency_by_priority
        SELECT {aggregates}, issue.priority FROM issues issue WHERE {closed}
        GROUP BY issue.priority ORDER BY 1 DESC, issue.priority LIMIT $1"
    )
}

fn latency_by_assignee(closed: &str) -> String {
    let aggregates = aggregates(LATENCY);
    format!(
        "-- resolution_latency_by_assignee
        SELECT latency.issue_count, latency.average, latency.percentiles, assignee.id, assignee.username, assignee.role,
            assignee.disabled, assignee.create_time, assignee.update_time
        FROM (
            SELECT {aggregates}, issue.assignee_id FROM issues issue WHERE {closed} GROUP BY issue.assignee_id
        ) latency LEFT JOIN users assignee ON assignee.id = latency.assignee_id
        ORDER BY latency.issue_count DESC, assignee.username LIMIT $1"
    )
}

/// Sorted by id, two indexes are merged. Without the order, the planner would hash the labels of all issues.
fn latency_by_label(closed: &str) -> String {
    let aggregates = aggregates("labelled.seconds");
    format!(
        "-- resolution_latency_by_label
        SELECT latency.issue_count, latency.average, latency.percentiles, label.id, label.name, label.description
        FROM (
            SELECT {aggregates}, labelled.label_id FROM (
                SELECT {LATENCY} AS seconds, issue_label.label_id
                FROM (SELECT issue.* FROM issues issue WHERE {closed}) issue
                LEFT JOIN issue_labels issue_label ON issue_label.issue_id = issue.id ORDER BY issue.id OFFSET 0
            ) labelled GROUP BY labelled.label_id
        ) latency LEFT JOIN labels label ON label.id = latency.label_id
        ORDER BY latency.issue_count DESC, label.name LIMIT $1"
    )
}

fn group(row: &Row, key: Option<Key>) -> Result<Group> {
    let mut group = Group { key, count: row.get("issue_count"), ..Group::default() };
    let average: Option<f64> = row.get("average");
    let (Some(average), Some(percentiles)) = (average, row.get::<_, Option<Vec<f64>>>("percentiles")) else {
        return Ok(group);
    };
    let &[p50, p90, p95, p99] = &percentiles[..] else { return Err(Error::Internal("percentiles are four")) };
    group.average = Some(duration(average));
    group.p50 = Some(duration(p50));
    group.p90 = Some(duration(p90));
    group.p95 = Some(duration(p95));
    group.p99 = Some(duration(p99));
    Ok(group)
}

/// Returns a duration, rounded to microseconds, the precision of times in the database.
fn duration(seconds: f64) -> prost_types::Duration {
    let microseconds = (seconds * 1e6).round() as i64;
    prost_types::Duration { seconds: microseconds / 1_000_000, nanos: (microseconds % 1_000_000) as i32 * 1_000 }
}
