//! Measurements that need a million issues: whether latency grows with the data, and the cost of reports.

use std::time::Instant;

use anyhow::{Context, ensure};
use issue_tracker::pb::{
    GetResolutionLatencyRequest, GetTopAssigneesRequest, LatencyGroupBy, get_resolution_latency_response::Group,
    get_top_assignees_response::Assignee, report_service_client::ReportServiceClient,
};
use prost_types::Duration;
use tonic::transport::Channel;

use crate::{
    baseline,
    comparisons::{Bench, median_ms, remove_issues, single},
    load::{self, Call, ONE_AT_A_TIME, Operation},
    results::{Outcome, Single, Table, median},
    service::Service,
};

const FEW_ISSUES: u32 = 10_000;
const MANY_ISSUES: u32 = 1_000_000;

/// The baseline of these operations is the service with few issues.
pub const GROWTH: &[Operation] = &[
    Operation { name: "Growth: GetIssue p50, 1,000,000 / 10,000 issues", target: "<= 1.3", ..ONE_AT_A_TIME },
    Operation {
        name: "Growth: ListIssues page 1 p50, 1,000,000 / 10,000 issues",
        target: "<= 1.3",
        call: Call::ListIssues,
        ..ONE_AT_A_TIME
    },
    Operation {
        name: "Growth: CreateIssue p50, 1,000,000 / 10,000 issues",
        target: "<= 1.3",
        call: Call::CreateIssue,
        ..ONE_AT_A_TIME
    },
];

/// A report, and the fastest known SQL for it. The first columns are the figures, the others describe the group.
struct Report {
    name: &'static str,
    request_kind: ReportRequest,
    sql: &'static str,
}

#[derive(Clone, Copy)]
enum ReportRequest {
    TopAssignees,
    Latency(LatencyGroupBy),
}

/// Uses `date_part`, which returns a float; `extract` returns a numeric, which is slower.
macro_rules! latency {
    () => {
        "date_part('epoch', i.close_time - i.create_time)"
    };
}

macro_rules! latency_figures {
    ($seconds:expr) => {
        concat!(
            "count(*), avg(",
            $seconds,
            "), percentile_cont(ARRAY[0.5, 0.9, 0.95, 0.99]) WITHIN GROUP (ORDER BY ",
            $seconds,
            ")"
        )
    };
}

/// Filters by status rather than by the equivalent close_time, because the planner would then scan an index whose order
/// does not match the table.
macro_rules! closed {
    () => {
        "FROM issues i WHERE i.status = 3 AND i.delete_time IS NULL"
    };
}

const REPORTS: &[Report] = &[
    Report {
        name: "Report: GetTopAssignees, 1,000,000 issues",
        request_kind: ReportRequest::TopAssignees,
        sql: "SELECT n.issues, n.open, n.in_progress, 0, u.id, u.username, u.role, u.disabled, u.create_time, u.update_time
            FROM (
                SELECT assignee_id, count(*) AS issues, count(*) FILTER (WHERE status = 1) AS open,
                    count(*) FILTER (WHERE status = 2) AS in_progress
                FROM issues WHERE assignee_id IS NOT NULL AND delete_time IS NULL AND status < 3 GROUP BY assignee_id
            ) n JOIN users u ON u.id = n.assignee_id
            ORDER BY n.issues DESC, lower(u.username) LIMIT 10",
    },
    Report {
        name: "Report: GetResolutionLatency, 1,000,000 issues",
        request_kind: ReportRequest::Latency(LatencyGroupBy::None),
        sql: concat!("SELECT ", latency_figures!(latency!()), " ", closed!()),
    },
    Report {
        name: "Report: GetResolutionLatency by priority, 1,000,000 issues",
        request_kind: ReportRequest::Latency(LatencyGroupBy::Priority),
        sql: concat!(
            "SELECT ",
            latency_figures!(latency!()),
            ", i.priority ",
            closed!(),
            " GROUP BY i.priority ORDER BY 1 DESC, i.priority"
        ),
    },
    Report {
        name: "Report: GetResolutionLatency by assignee, 1,000,000 issues",
        request_kind: ReportRequest::Latency(LatencyGroupBy::Assignee),
        sql: concat!(
            "SELECT n.*, u.username, u.role, u.disabled, u.create_time, u.update_time FROM (SELECT ",
            latency_figures!(latency!()),
            ", i.assignee_id ",
            closed!(),
            " GROUP BY i.assignee_id) n LEFT JOIN users u ON u.id = n.assignee_id
            ORDER BY n.count DESC, u.username LIMIT 1000"
        ),
    },
    // Ordering by id makes the planner merge two indexes instead of hashing the labels of all issues.
    Report {
        name: "Report: GetResolutionLatency by label, 1,000,000 issues",
        request_kind: ReportRequest::Latency(LatencyGroupBy::Label),
        sql: concat!(
            "SELECT n.*, l.name, l.description FROM (SELECT ",
            latency_figures!("i.seconds"),
            ", i.label_id FROM (SELECT ",
            latency!(),
            " AS seconds, il.label_id FROM (SELECT i.* ",
            closed!(),
            ") i LEFT JOIN issue_labels il ON il.issue_id = i.id ORDER BY i.id OFFSET 0) i GROUP BY i.label_id) n
            LEFT JOIN labels l ON l.id = n.label_id ORDER BY n.count DESC, l.name LIMIT 1000"
        ),
    },
];

/// Runs the selected operations. Creates the databases only if there is one.
pub fn run(bench: &Bench<'_>, table: &mut Table) -> anyhow::Result<()> {
    let args = bench.args;
    let growth: Vec<_> = GROWTH.iter().filter(|operation| args.includes_slow(operation.name)).collect();
    let reports: Vec<_> = REPORTS.iter().filter(|report| args.includes_slow(report.name)).collect();
    if growth.is_empty() && reports.is_empty() {
        return Ok(());
    }
    let few = Service::start(bench.cluster, bench.dir, "few_issues", FEW_ISSUES)?;
    let many = Service::start(bench.cluster, bench.dir, "many_issues", MANY_ISSUES)?;
    let (few, many) = (Bench { service: &few, ..*bench }, Bench { service: &many, ..*bench });
    for operation in growth {
        let rounds = args.in_rounds(operation.name, || {
            Ok((run_and_clean_up(&few, operation)?, run_and_clean_up(&many, operation)?))
        })?;
        table.add(operation, &rounds);
    }
    for report in reports {
        let rounds = args.in_rounds(report.name, || compare(&many, report))?;
        table.add_single(report.name, "<= 1.2", &rounds);
    }
    Ok(())
}

/// Runs an operation and deletes the issues that it created, so that the size of the data stays the same.
fn run_and_clean_up(bench: &Bench<'_>, operation: &Operation) -> anyhow::Result<Outcome> {
    let outcome = load::run(operation, bench.service, bench.args.duration())?;
    remove_issues(bench, load::TITLE)?;
    Ok(outcome)
}

/// Compares medians in milliseconds. Each side makes one call at a time on one connection.
fn compare(bench: &Bench<'_>, report: &Report) -> anyhow::Result<Single> {
    // PostgreSQL may change the plan of a prepared statement after five executions. Most calls come after that.
    const CALLS: usize = 15;
    let (rows, by_psql) = baseline::psql_timed(bench, report.sql, CALLS)?;
    let by_service = bench.block_on(async |channel| {
        let mut latencies = Vec::new();
        for _ in 0..CALLS {
            let started = Instant::now();
            let groups = request_report(bench, channel.clone(), report.request_kind).await?;
            latencies.push(started.elapsed());
            ensure!(groups.len() == rows.len(), "the report has {} groups instead of {}", groups.len(), rows.len());
            for (group, row) in groups.iter().zip(&rows) {
                check_figures(group, row)?;
            }
        }
        Ok(latencies)
    })?;
    Ok(single("ms", median(by_psql), median_ms(by_service)))
}

/// Requests a report. Returns the figures of each group.
async fn request_report(
    bench: &Bench<'_>,
    channel: Channel,
    request_kind: ReportRequest,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let mut reports = ReportServiceClient::new(channel);
    match request_kind {
        ReportRequest::TopAssignees => {
            let request = bench.request(GetTopAssigneesRequest { limit: 10, ..Default::default() })?;
            let response = reports.get_top_assignees(request).await?.into_inner();
            let counts = |a: &Assignee| [a.issue_count, a.open_count, a.in_progress_count, a.closed_count];
            Ok(response.assignees.iter().map(|assignee| counts(assignee).map(|n| n as f64).to_vec()).collect())
        }
        ReportRequest::Latency(group_by) => {
            let request = GetResolutionLatencyRequest { group_by: group_by.into(), ..Default::default() };
            let response = reports.get_resolution_latency(bench.request(request)?).await?.into_inner();
            response.groups.iter().map(|group| latency_figures(group).context("a group without figures")).collect()
        }
    }
}

fn latency_figures(group: &Group) -> Option<Vec<f64>> {
    let seconds = |duration: Option<Duration>| Some(duration?.seconds as f64 + f64::from(duration?.nanos) / 1e9);
    let Group { count, average, p50, p90, p95, p99, .. } = *group;
    Some(vec![count as f64, seconds(average)?, seconds(p50)?, seconds(p90)?, seconds(p95)?, seconds(p99)?])
}

/// Compares the figures of a group with a row from psql.
fn check_figures(figures: &[f64], row: &str) -> anyhow::Result<()> {
    let mut expected = row.split(['\t', '{', ',', '}']).filter(|text| !text.is_empty());
    for figure in figures {
        let expected: f64 = expected.next().context("psql printed fewer figures")?.parse()?;
        // The service rounds to microseconds.
        ensure!((figure - expected).abs() < 2e-6, "a report has {figure} instead of {expected}");
    }
    Ok(())
}
