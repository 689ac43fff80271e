//! Metrics of limited resources.

use std::sync::Arc;

use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Result};

use super::registration::{Registration, Sources};

/// Metrics of limited resources.
pub struct Resources {
    sources: Arc<Sources>,
    limit: IntGaugeVec,
    in_use: IntGaugeVec,
    waiting: IntGaugeVec,
    refusals: IntCounterVec,
}

/// How much of a resource is used.
pub struct ResourceUsage {
    pub in_use: u32,
    pub waiting: usize,
}

impl Resources {
    pub(super) fn new(new: &Registration) -> Result<Self> {
        let labels = &["resource"];
        Ok(Self {
            sources: Arc::clone(&new.sources),
            limit: new.gauges("issue_tracker_resource_limit", "Maximum of a limited resource.", labels)?,
            in_use: new.gauges("issue_tracker_resource_in_use", "What is in use of a limited resource.", labels)?,
            waiting: new.gauges("issue_tracker_resource_waiting", "Calls that wait for a limited resource.", labels)?,
            refusals: new.counters(
                "issue_tracker_resource_refusals_total",
                "Refusals of a limited resource.",
                &["resource", "reason"],
            )?,
        })
    }

    /// Shows the usage of a resource at each scrape, until `usage` returns `None`.
    pub fn observe(&self, resource: &str, limit: u32, usage: impl Fn() -> Option<ResourceUsage> + Send + 'static) {
        self.limit.with_label_values(&[resource]).set(limit.into());
        let [in_use, waiting] = [&self.in_use, &self.waiting].map(|gauges| gauges.with_label_values(&[resource]));
        self.sources.add(move || {
            let usage = usage()?;
            in_use.set(usage.in_use.into());
            waiting.set(usage.waiting as i64);
            Some(())
        });
    }

    /// Returns a counter of refusals for each of the reasons.
    pub fn refusal_counters<const N: usize>(&self, resource: &str, reasons: [&str; N]) -> [IntCounter; N] {
        reasons.map(|reason| self.refusals.with_label_values(&[resource, reason]))
    }
}
