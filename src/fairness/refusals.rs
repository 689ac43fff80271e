//! Logs which flows are refused permits, and why.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::flow::Flow;
use crate::metrics::{self, IntCounter};

/// Minimum time between two log lines about one flow.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of flows that are counted. Beyond it, flows without a refusal for [`LOG_INTERVAL`] are removed.
const FLOWS_MAX: usize = 1_024;

/// Why a permit was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The flow holds the share that one flow may hold.
    Share,
    /// All permits are held, or too few are free.
    Total,
    /// All permits are held, and the wait was too long, or expected to be.
    Wait,
}

impl Refusal {
    fn as_str(self) -> &'static str {
        match self {
            Self::Share => "share used up",
            Self::Total => "all in use",
            Self::Wait => "wait too long",
        }
    }
}

/// Counts the refusals of a resource by their reasons, for the metrics.
pub struct RefusalCounters(Option<[IntCounter; 3]>);

impl RefusalCounters {
    /// `resource`: its name in the metrics.
    pub fn new(resource: &str) -> Self {
        let reasons = [Refusal::Share, Refusal::Total, Refusal::Wait].map(Refusal::as_str);
        Self(metrics::get().map(|metrics| metrics.resources.refusal_counters(resource, reasons)))
    }

    pub fn count(&self, refusal: Refusal) {
        if let Some([share, total, wait]) = &self.0 {
            let counter = match refusal {
                Refusal::Share => share,
                Refusal::Total => total,
                Refusal::Wait => wait,
            };
            counter.inc();
        }
    }
}

/// Counts the refusals of each flow since the last log line about it, and all of them for the metrics.
pub(super) struct RefusalLog {
    /// The name of the resource in log lines.
    resource: &'static str,
    counters: RefusalCounters,
    flows: Arc<Mutex<HashMap<Flow, Refused>>>,
}

struct Refused {
    logged: Instant,
    /// Those since then.
    count: u64,
    latest: Refusal,
}

/// When a refusal is logged.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Now,
    /// At this time, together with the refusals until then.
    At(Instant),
    /// With an earlier refusal, or never if there are too many flows.
    ByAnother,
}

impl RefusalLog {
    pub fn new(resource: &'static str) -> Self {
        Self { resource, counters: RefusalCounters::new(resource), flows: Arc::default() }
    }

    /// Logs a refusal now if the last line about the flow is a minute old, else one minute after that line, together with all
    /// refusals until then.
    pub fn record(&self, flow: Flow, refusal: Refusal) {
        self.counters.count(refusal);
        match self.count(flow, refusal) {
            Due::Now => log(self.resource, flow, refusal, 1),
            Due::At(time) => {
                let (resource, flows) = (self.resource, Arc::clone(&self.flows));
                tokio::spawn(async move {
                    sleep_until(time).await;
                    if let Some((refusal, count)) = take_count(&flows, flow) {
                        log(resource, flow, refusal, count);
                    }
                });
            }
            Due::ByAnother => {}
        }
    }

    fn count(&self, flow: Flow, refusal: Refusal) -> Due {
        let now = Instant::now();
        let mut flows = lock(&self.flows);
        if let Some(refused) = flows.get_mut(&flow) {
            refused.latest = refusal;
            let due = refused.logged + LOG_INTERVAL;
            if refused.count == 0 && now >= due {
                refused.logged = now;
                return Due::Now;
            }
            refused.count += 1;
            return if refused.count == 1 { Due::At(due) } else { Due::ByAnother };
        }
        if flows.len() >= FLOWS_MAX {
            flows.retain(|_, refused| now.duration_since(refused.logged) < LOG_INTERVAL);
        }
        if flows.len() >= FLOWS_MAX {
            return Due::ByAnother;
        }
        flows.insert(flow, Refused { logged: now, count: 0, latest: refusal });
        Due::Now
    }
}

/// Returns the refusals that were counted since the last log line about the flow, and begins a new count.
fn take_count(flows: &Mutex<HashMap<Flow, Refused>>, flow: Flow) -> Option<(Refusal, u64)> {
    let mut flows = lock(flows);
    let refused = flows.get_mut(&flow)?;
    refused.logged = Instant::now();
    Some((refused.latest, std::mem::take(&mut refused.count)))
}

fn lock(flows: &Mutex<HashMap<Flow, Refused>>) -> MutexGuard<'_, HashMap<Flow, Refused>> {
    // The counts are valid even if a holder of the lock has panicked.
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}

fn log(resource: &'static str, flow: Flow, refusal: Refusal, count: u64) {
    let reason = refusal.as_str();
    match flow {
        Flow::User(user_id) => tracing::warn!(resource, %user_id, reason, count, "caller limited"),
        Flow::Address(client) => tracing::warn!(resource, %client, reason, count, "caller limited"),
        Flow::Internal => tracing::warn!(resource, reason, count, "internal work limited"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusals_of_a_flow_are_logged_once_a_minute_with_their_count() {
        let log = RefusalLog::new("permits");
        let (one, other) = (Flow::Internal, Flow::Address([192, 0, 2, 1].into()));
        let due = Instant::now() + LOG_INTERVAL;
        let logged = [one, one, other, one].map(|flow| log.count(flow, Refusal::Wait));
        assert_eq!(logged, [Due::Now, Due::At(due), Due::Now, Due::ByAnother]);
        log.count(one, Refusal::Share);
        advance(LOG_INTERVAL).await;
        // Also if no other refusal follows.
        assert_eq!(take_count(&log.flows, one), Some((Refusal::Share, 3)));
        assert_eq!(log.count(one, Refusal::Wait), Due::At(due + LOG_INTERVAL));
        assert_eq!(log.count(other, Refusal::Wait), Due::Now);
    }
}
