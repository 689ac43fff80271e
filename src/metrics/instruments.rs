//! The instruments of the process.

use std::sync::{Arc, OnceLock};

use prometheus::{
    HistogramVec, IntCounter, IntCounterVec, IntGauge, Registry, TextEncoder, process_collector::ProcessCollector,
};

use super::{
    calls::Calls,
    database::{self, Database},
    registration::{Registration, Sources},
    resources::Resources,
};

static METRICS: OnceLock<Metrics> = OnceLock::new();

/// All instruments of the process.
pub struct Metrics {
    registry: Registry,
    sources: Arc<Sources>,
    pub calls: Calls,
    pub database: Database,
    pub resources: Resources,
    /// By reason of the error.
    pub errors: IntCounterVec,
    pub connections: Connections,
    pub batches: Batches,
    pub retries: Retries,
    pub password_checks: PasswordChecks,
    pub imports: Transfers,
    pub exports: Transfers,
    /// By kind of data.
    pub pruned_rows: IntCounterVec,
    /// By kind of data.
    pub prune_failures: IntCounterVec,
}

/// Client connections.
pub struct Connections {
    pub open: IntGauge,
    pub accepted: IntCounter,
    /// Closed immediately, as there are too many.
    pub refused_limit: IntCounter,
    /// Not accepted, as the process or the system has no free file descriptor or memory.
    pub refused_accept: IntCounter,
    pub refused_tls: IntCounter,
    pub evicted: IntCounter,
}

/// Calls that are executed together. By the name of the batch.
pub struct Batches {
    pub size: HistogramVec,
    pub duration: HistogramVec,
}

/// Work that the service has repeated, by cause.
pub struct Retries {
    /// A call: its transaction conflicted with another one.
    pub conflict: IntCounter,
    /// A call: its connection to the database was lost, and nothing was written.
    pub connection_lost: IntCounter,
    /// A call: its session was read-only.
    pub read_only: IntCounter,
    /// A call: the outcome of an earlier attempt is looked up by the request id.
    pub outcome_unknown: IntCounter,
    /// A mutation: another transaction had a lock that it needs.
    pub lock_wait: IntCounter,
    /// The calls of a batch that was rolled back: each is executed individually.
    pub batch_failed: IntCounter,
    /// A call that could not be executed in its batch, because a row was locked, for example: it is executed individually.
    pub batch_left: IntCounter,
    /// A batch: a request id is in use, or was used before.
    pub request_id_in_use: IntCounter,
    /// A batch: responses exceed the budget of a user.
    pub response_budget: IntCounter,
    /// A transaction of an import: it conflicted with a concurrent change.
    pub import_conflict: IntCounter,
    /// A connection to the database: it closed before the server had responded.
    pub connection_closed: IntCounter,
}

/// Attempts to enter a password, by outcome.
pub struct PasswordChecks {
    pub correct: IntCounter,
    pub wrong: IntCounter,
    /// Refused: too many wrong passwords before.
    pub throttled: IntCounter,
    /// Refused: too many concurrent attempts of the user.
    pub concurrent: IntCounter,
    /// Failed for a reason that says nothing about the password.
    pub unchecked: IntCounter,
}

/// Imports or exports.
pub struct Transfers {
    pub in_progress: IntGauge,
    pub rows: IntCounter,
    pub bytes: IntCounter,
}

/// Creates the instruments of the process, once. `methods`: the names of the RPC methods, by the index with which
/// [`Calls::begin`] selects one; the first stands for all others.
pub fn enable(methods: &[String]) -> prometheus::Result<()> {
    let metrics = Metrics::new(methods)?;
    let _ = METRICS.set(metrics);
    Ok(())
}

/// Returns the instruments, or `None` if metrics are not enabled.
pub fn get() -> Option<&'static Metrics> {
    METRICS.get()
}

/// Counts one.
pub fn count(counter: impl FnOnce(&Metrics) -> &IntCounter) {
    count_by(counter, 1);
}

pub fn count_by(counter: impl FnOnce(&Metrics) -> &IntCounter, number: u64) {
    if let Some(metrics) = get() {
        counter(metrics).inc_by(number);
    }
}

/// Counts something as in progress until the result is dropped.
pub fn in_progress(gauge: impl FnOnce(&Metrics) -> &IntGauge) -> InProgress {
    let gauge = get().map(|metrics| gauge(metrics).clone());
    gauge.iter().for_each(IntGauge::inc);
    InProgress(gauge)
}

/// Something that is counted as in progress until this is dropped.
pub struct InProgress(Option<IntGauge>);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.iter().for_each(IntGauge::dec);
    }
}

impl Metrics {
    fn new(methods: &[String]) -> prometheus::Result<Self> {
        let new = Registration::default();
        let metrics = Self {
            calls: Calls::new(&new, methods)?,
            database: Database::new(&new)?,
            resources: Resources::new(&new)?,
            errors: new.counters(
                "issue_tracker_errors_total",
                "Errors, also of attempts that are retried.",
                &["reason"],
            )?,
            connections: connections(&new)?,
            batches: batches(&new)?,
            retries: retries(&new)?,
            password_checks: password_checks(&new)?,
            imports: Transfers {
                in_progress: new.gauge("issue_tracker_imports_in_progress", "Imports in progress.")?,
                rows: new.counter("issue_tracker_import_rows_total", "Rows that imports have written or rejected.")?,
                bytes: new.counter("issue_tracker_import_bytes_total", "Bytes that imports have received.")?,
            },
            exports: Transfers {
                in_progress: new.gauge("issue_tracker_exports_in_progress", "Exports in progress.")?,
                rows: new.counter("issue_tracker_export_rows_total", "Rows that exports have sent.")?,
                bytes: new.counter("issue_tracker_export_bytes_total", "Bytes that exports have sent.")?,
            },
            pruned_rows: new.counters("issue_tracker_pruned_rows_total", "Old rows that were deleted.", &["data"])?,
            prune_failures: new.counters(
                "issue_tracker_prune_failures_total",
                "Failed deletions of old rows.",
                &["data"],
            )?,
            sources: Arc::clone(&new.sources),
            registry: new.registry.clone(),
        };
        new.gauges("issue_tracker_build_info", "Always 1.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1);
        new.registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(metrics)
    }

    /// Returns all metrics in the text format of Prometheus.
    pub fn encode(&self) -> prometheus::Result<String> {
        self.sources.read();
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

fn connections(new: &Registration) -> prometheus::Result<Connections> {
    let refused =
        new.counters("issue_tracker_connections_refused_total", "Client connections that were refused.", &["reason"])?;
    Ok(Connections {
        open: new.gauge("issue_tracker_connections_open", "Open client connections.")?,
        accepted: new.counter("issue_tracker_connections_accepted_total", "Client connections that were accepted.")?,
        refused_limit: refused.with_label_values(&["limit"]),
        refused_accept: refused.with_label_values(&["accept_failed"]),
        refused_tls: refused.with_label_values(&["tls_handshake"]),
        evicted: new.counter("issue_tracker_connections_evicted_total", "Client connections that were evicted.")?,
    })
}

fn batches(new: &Registration) -> prometheus::Result<Batches> {
    const SIZES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
    let labels = &["batch"];
    Ok(Batches {
        size: new.histograms("issue_tracker_batch_size", "Calls of a batch.", labels, &SIZES)?,
        duration: new.histograms(
            "issue_tracker_batch_duration_seconds",
            "Time to execute a batch.",
            labels,
            &database::DURATIONS,
        )?,
    })
}

fn retries(new: &Registration) -> prometheus::Result<Retries> {
    let retries = new.counters("issue_tracker_retries_total", "Work that the service has repeated.", &["cause"])?;
    let of = |cause| retries.with_label_values(&[cause]);
    Ok(Retries {
        conflict: of("conflict"),
        connection_lost: of("connection_lost"),
        read_only: of("read_only"),
        outcome_unknown: of("outcome_unknown"),
        lock_wait: of("lock_wait"),
        batch_failed: of("batch_failed"),
        batch_left: of("batch_left"),
        request_id_in_use: of("request_id_in_use"),
        response_budget: of("response_budget"),
        import_conflict: of("import_conflict"),
        connection_closed: of("connection_closed"),
    })
}

fn password_checks(new: &Registration) -> prometheus::Result<PasswordChecks> {
    let name = "issue_tracker_password_checks_total";
    let checks = new.counters(name, "Logins and other attempts to enter a password.", &["outcome"])?;
    let of = |outcome| checks.with_label_values(&[outcome]);
    Ok(PasswordChecks {
        correct: of("correct"),
        wrong: of("wrong"),
        throttled: of("throttled"),
        concurrent: of("concurrent"),
        unchecked: of("unchecked"),
    })
}
