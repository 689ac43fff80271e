//! Reports over all issues that are not deleted.

use tokio_postgres::Row;
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
    const SQL: &str = "-- top_assignees
        SELECT u.id, u.username, u.role, u.disabled, u.create_time, u.update_time, n.issues, n.open, n.in_progress, n.closed
        FROM (
            SELECT assignee_id, count(*) AS issues, count(*) FILTER (WHERE status = 1) AS open,
                count(*) FILTER (WHERE status = 2) AS in_progress, count(*) FILTER (WHERE status = 3) AS closed
            FROM issues
            WHERE assignee_id IS NOT NULL AND delete_time IS NULL AND (NOT $4 OR status IN (1, 2))
                AND ($2::timestamptz IS NULL OR create_time >= $2) AND ($3::timestamptz IS NULL OR create_time < $3)
            GROUP BY assignee_id
        ) n JOIN users u ON u.id = n.assignee_id
        ORDER BY n.issues DESC, lower(u.username) LIMIT $1";
    let rows = db.query(SQL, &[&limit, &window.start, &window.end, &open_only]).await?;
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

/// From creation to closing in seconds: a float from the start, where `extract` computes a numeric. Numbers, because the
/// sum of a few million intervals is more days than an interval holds.
macro_rules! latency {
    () => {
        "date_part('epoch', i.close_time - i.create_time)"
    };
}

/// The figures of a group: count, and the average and percentiles of its latencies.
macro_rules! latency_figures {
    ($latency:expr) => {
        concat!(
            "count(*), avg(",
            $latency,
            "), percentile_cont(ARRAY[0.5, 0.9, 0.95, 0.99]) WITHIN GROUP (ORDER BY ",
            $latency,
            ")"
        )
    };
}

/// Issues that were closed in the window. By their status, as without a window the planner would read them in the order
/// of their close_time, which has little to do with where they are.
macro_rules! closed_in_window {
    () => {
        "i.status = 3 AND i.delete_time IS NULL
        AND ($1::timestamptz IS NULL OR i.close_time >= $1) AND ($2::timestamptz IS NULL OR i.close_time < $2)"
    };
}

/// From `create_time` to `close_time` of the issues that were closed in the window, most issues first.
pub async fn resolution_latency(db: &Conn, window: TimeWindow, group_by: LatencyGroupBy) -> Result<Vec<Group>> {
    const TOTAL: &str = concat!(
        "-- resolution_latency\nSELECT ",
        latency_figures!(latency!()),
        " FROM issues i WHERE ",
        closed_in_window!(),
        " LIMIT $3"
    );
    const BY_PRIORITY: &str = concat!(
        "-- resolution_latency_by_priority\nSELECT ",
        latency_figures!(latency!()),
        ", i.priority FROM issues i WHERE ",
        closed_in_window!(),
        " GROUP BY i.priority ORDER BY 1 DESC, i.priority LIMIT $3"
    );
    const BY_ASSIGNEE: &str = concat!(
        "-- resolution_latency_by_assignee
        SELECT n.*, u.id, u.username, u.role, u.disabled, u.create_time, u.update_time FROM (SELECT ",
        latency_figures!(latency!()),
        ", i.assignee_id FROM issues i WHERE ",
        closed_in_window!(),
        " GROUP BY i.assignee_id) n LEFT JOIN users u ON u.id = n.assignee_id ORDER BY n.count DESC, u.username LIMIT $3"
    );
    // In the order of the ids two indexes are merged; without it the labels of all issues are hashed.
    const BY_LABEL: &str = concat!(
        "-- resolution_latency_by_label
        SELECT n.*, l.id, l.name, l.description FROM (SELECT ",
        latency_figures!("i.seconds"),
        ", i.label_id FROM (
            SELECT ",
        latency!(),
        " AS seconds, il.label_id FROM (SELECT i.* FROM issues i WHERE ",
        closed_in_window!(),
        ") i LEFT JOIN issue_labels il ON il.issue_id = i.id ORDER BY i.id OFFSET 0
        ) i GROUP BY i.label_id) n LEFT JOIN labels l ON l.id = n.label_id ORDER BY n.count DESC, l.name LIMIT $3"
    );
    let (sql, key): (&str, fn(&Row) -> Option<Key>) = match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => (TOTAL, |_| None),
        LatencyGroupBy::Priority => (BY_PRIORITY, |row| Some(Key::Priority(i32::from(row.get::<_, i16>(3))))),
        LatencyGroupBy::Assignee => {
            (BY_ASSIGNEE, |row| row.get::<_, Option<Uuid>>(3).map(|_| Key::Assignee(user_at(row, 4))))
        }
        LatencyGroupBy::Label => (BY_LABEL, |row| {
            row.get::<_, Option<Uuid>>(3)
                .map(|id| Key::Label(Label { id: id.to_string(), name: row.get(5), description: row.get(6) }))
        }),
    };
    let rows = db.query(sql, &[&window.start, &window.end, &GROUPS_MAX]).await?;
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
