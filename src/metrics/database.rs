//! Metrics of the database client.

use std::sync::Arc;

use prometheus::{Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Result};

use super::{
    OTHER,
    registration::{Registration, Sources},
};

/// The boundaries that OpenTelemetry recommends, and some between them.
pub(super) const DURATIONS: [f64; 13] =
    [0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0];
const POOL: &str = "db_client_connection_pool_name";

/// Metrics of the database client.
pub struct Database {
    sources: Arc<Sources>,
    statements: HistogramVec,
    connections: IntGaugeVec,
    connections_max: IntGaugeVec,
    pending: IntGaugeVec,
    timeouts: IntCounterVec,
    wait_time: HistogramVec,
    available: IntGaugeVec,
}

impl Database {
    pub(super) fn new(new: &Registration) -> Result<Self> {
        let statements = HistogramOpts::new(
            "db_client_operation_duration_seconds",
            "Time from sending a statement to its last row, or until its caller stops waiting.",
        );
        let statements = statements.buckets(DURATIONS.to_vec()).const_label("db_system_name", "postgresql");
        Ok(Self {
            sources: Arc::clone(&new.sources),
            statements: new.register_histograms(statements, &["db_query_summary"])?,
            connections: new.gauges(
                "db_client_connection_count",
                "Connections to the database.",
                &[POOL, "db_client_connection_state"],
            )?,
            connections_max: new.gauges("db_client_connection_max", "Maximum connections to the database.", &[POOL])?,
            pending: new.gauges(
                "db_client_connection_pending_requests",
                "Requests that wait for a connection to the database.",
                &[POOL],
            )?,
            timeouts: new.counters(
                "db_client_connection_timeouts_total",
                "Requests that did not get a connection to the database in time.",
                &[POOL],
            )?,
            wait_time: new.histograms(
                "db_client_connection_wait_time_seconds",
                "Time that requests waited for a connection to the database.",
                &[POOL],
                &DURATIONS,
            )?,
            available: new.gauges(
                "issue_tracker_database_available",
                "Whether the database responds to reads and writes.",
                &["access"],
            )?,
        })
    }

    /// Returns the histogram of a statement's durations, by the name in its first line, `-- name`.
    pub fn statement_duration(&self, sql: &str) -> Histogram {
        self.statements.with_label_values(&[name(sql)])
    }

    /// Shows the usage of a pool at each scrape, until `usage` returns `None`. Returns what the pool records itself.
    pub fn observe_pool(
        &self,
        name: &'static str,
        connections_max: u32,
        usage: impl Fn() -> Option<PoolUsage> + Send + 'static,
    ) -> PoolMetrics {
        let [idle, used] = ["idle", "used"].map(|state| self.connections.with_label_values(&[name, state]));
        let pending = self.pending.with_label_values(&[name]);
        self.connections_max.with_label_values(&[name]).set(connections_max.into());
        self.sources.add(move || {
            let usage = usage()?;
            idle.set(usage.idle.into());
            used.set(usage.used.into());
            pending.set(usage.pending as i64);
            Some(())
        });
        PoolMetrics {
            timeouts: self.timeouts.with_label_values(&[name]),
            wait_time: self.wait_time.with_label_values(&[name]),
        }
    }

    /// Shows at each scrape whether reads and writes work, until `works` returns `None`.
    pub fn observe_availability(&self, works: impl Fn() -> Option<[bool; 2]> + Send + 'static) {
        let gauges = ["read", "write"].map(|access| self.available.with_label_values(&[access]));
        self.sources.add(move || {
            gauges.iter().zip(works()?).for_each(|(gauge, works)| gauge.set(works.into()));
            Some(())
        });
    }
}

/// Returns the name of a statement or command.
fn name(sql: &str) -> &str {
    match sql {
        "COMMIT" => "commit",
        "ROLLBACK" => "rollback",
        _ => {
            let name = sql.strip_prefix("-- ").and_then(|sql| sql.lines().next()).unwrap_or_default();
            let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            if is_name { name } else { OTHER }
        }
    }
}

/// The metrics that a pool records itself.
pub struct PoolMetrics {
    pub timeouts: IntCounter,
    pub wait_time: Histogram,
}

/// How much of a pool is used.
pub struct PoolUsage {
    pub idle: u32,
    pub used: u32,
    pub pending: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_named_by_their_first_line_and_others_share_a_name() {
        assert_eq!(name("-- get_issue\n    SELECT 1"), "get_issue");
        assert_eq!(name("-- users_exist"), "users_exist");
        assert_eq!(name("COMMIT"), "commit");
        for sql in ["SELECT 1", "", "-- ", "-- \nSELECT 1", "-- get 1 issue\nSELECT 1", "--get_issue\nSELECT 1"] {
            assert_eq!(name(sql), OTHER, "{sql:?}");
        }
    }
}
