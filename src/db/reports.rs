//! Reports over all issues that are not deleted.

use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::Conn;
use crate::{
    error::{Error, Result},
    pb::{
        GetTopAssigneesResponse, Label, LatencyGroupBy, User,
        get_resolution_latency_response::{Group, group::Key},
        get_top_assignees_response::Assignee,
    },
    request::{TimeWindow, timestamp},
};

/// How many lines a grouped report has at most.
const GROUPS_MAX: i64 = 1_000;

/// Users by the number of issues that are assigned to them and were filed in the window.
pub async fn top_assignees(
    db: &Conn,
    limit: i64,
    window: TimeWindow,
    open_only: bool,
) -> Result<GetTopAssigneesResponse> {
    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&limit];
    let filed = within("create_time", &window, &mut params);
    let statuses = if open_only { " AND status IN (1, 2)" } else { "" };
    let sql = format!(
        "-- top_assignees
        SELECT u.id, u.username, u.role, u.disabled, u.create_time, u.update_time, n.issues, n.open, n.in_progress, n.closed
        FROM (
            SELECT assignee_id, count(*) AS issues, count(*) FILTER (WHERE status = 1) AS open,
                count(*) FILTER (WHERE status = 2) AS in_progress, count(*) FILTER (WHERE status = 3) AS closed
            FROM issues WHERE assignee_id IS NOT NULL AND delete_time IS NULL{statuses}{filed} GROUP BY assignee_id
        ) n JOIN users u ON u.id = n.assignee_id
        ORDER BY n.issues DESC, lower(u.username) LIMIT $1"
    );
    let rows = db.query(&sql, &params).await?;
    let assignee = |row: &Row| Assignee {
        user: Some(user_at(row, 0)),
        issue_count: row.get(6),
        open_count: row.get(7),
        in_progress_count: row.get(8),
        closed_count: row.get(9),
    };
    Ok(GetTopAssigneesResponse { assignees: rows.iter().map(assignee).collect() })
}

fn user_at(row: &Row, at: usize) -> User {
    User {
        id: row.get::<_, Uuid>(at).to_string(),
        username: row.get(at + 1),
        role: i32::from(row.get::<_, i16>(at + 2)),
        disabled: row.get(at + 3),
        create_time: Some(timestamp(row.get(at + 4))),
        update_time: Some(timestamp(row.get(at + 5))),
    }
}

/// What a window asks of a column. Only of the ends that it has: of a condition that may not count the planner does not
/// know how much it leaves.
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

/// From creation to closing in seconds: a float from the start, where `extract` computes a numeric. Numbers, because the
/// sum of a few million intervals is more days than an interval holds.
const LATENCY: &str = "date_part('epoch', i.close_time - i.create_time)";

/// The figures of a group: count, and the average and percentiles of its latencies.
fn figures(latency: &str) -> String {
    format!(
        "count(*), avg({latency}),
        percentile_cont(ARRAY[0.5, 0.9, 0.95, 0.99]) WITHIN GROUP (ORDER BY {latency})"
    )
}

/// From `create_time` to `close_time` of the issues that were closed in the window, most issues first.
pub async fn resolution_latency(db: &Conn, window: TimeWindow, group_by: LatencyGroupBy) -> Result<Vec<Group>> {
    let mut params: Vec<&(dyn ToSql + Sync)> = vec![&GROUPS_MAX];
    // By their status, as without a window the planner would read them in the order of their close_time, which has little
    // to do with where they are.
    let closed = format!("i.status = 3 AND i.delete_time IS NULL{}", within("i.close_time", &window, &mut params));
    let of_issue = figures(LATENCY);
    let total = || format!("-- resolution_latency\nSELECT {of_issue} FROM issues i WHERE {closed} LIMIT $1");
    let by_priority = || {
        format!(
            "-- resolution_latency_by_priority
            SELECT {of_issue}, i.priority FROM issues i WHERE {closed}
            GROUP BY i.priority ORDER BY 1 DESC, i.priority LIMIT $1"
        )
    };
    let by_assignee = || {
        format!(
            "-- resolution_latency_by_assignee
            SELECT n.*, u.id, u.username, u.role, u.disabled, u.create_time, u.update_time FROM (
                SELECT {of_issue}, i.assignee_id FROM issues i WHERE {closed} GROUP BY i.assignee_id
            ) n LEFT JOIN users u ON u.id = n.assignee_id ORDER BY n.count DESC, u.username LIMIT $1"
        )
    };
    // In the order of the ids two indexes are merged; without it the labels of all issues are hashed.
    let by_label = || {
        format!(
            "-- resolution_latency_by_label
            SELECT n.*, l.id, l.name, l.description FROM (
                SELECT {}, i.label_id FROM (
                    SELECT {LATENCY} AS seconds, il.label_id FROM (SELECT i.* FROM issues i WHERE {closed}) i
                    LEFT JOIN issue_labels il ON il.issue_id = i.id ORDER BY i.id OFFSET 0
                ) i GROUP BY i.label_id
            ) n LEFT JOIN labels l ON l.id = n.label_id ORDER BY n.count DESC, l.name LIMIT $1",
            figures("i.seconds")
        )
    };
    let (sql, key): (String, fn(&Row) -> Option<Key>) = match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => (total(), |_| None),
        LatencyGroupBy::Priority => (by_priority(), |row| Some(Key::Priority(i32::from(row.get::<_, i16>(3))))),
        LatencyGroupBy::Assignee => {
            (by_assignee(), |row| row.get::<_, Option<Uuid>>(3).map(|_| Key::Assignee(user_at(row, 4))))
        }
        LatencyGroupBy::Label => (by_label(), |row| {
            row.get::<_, Option<Uuid>>(3)
                .map(|id| Key::Label(Label { id: id.to_string(), name: row.get(5), description: row.get(6) }))
        }),
    };
    let rows = db.query(&sql, &params).await?;
    rows.iter().map(|row| group(row, key(row))).collect()
}

fn group(row: &Row, key: Option<Key>) -> Result<Group> {
    let mut group = Group { key, count: row.get(0), ..Group::default() };
    let (Some(average), Some(percentiles)) = (row.get::<_, Option<f64>>(1), row.get::<_, Option<Vec<f64>>>(2)) else {
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

/// At microseconds, as times are kept.
fn duration(seconds: f64) -> prost_types::Duration {
    let microseconds = (seconds * 1e6).round() as i64;
    prost_types::Duration { seconds: microseconds / 1_000_000, nanos: (microseconds % 1_000_000) as i32 * 1_000 }
}
