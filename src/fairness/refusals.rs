//! Logs which flows are refused permits, and why.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::flow::Flow;

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
    /// The wait was too long, or expected to be.
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

/// Counts the refusals of each flow since the last log line about it.
#[derive(Default)]
pub(super) struct RefusalLog(Mutex<HashMap<Flow, Refused>>);

struct Refused {
    logged: Instant,
    count: u64,
}

impl RefusalLog {
    /// Counts a refusal. Logs the count since the last line about the flow, if that line is a minute old.
    pub fn record(&self, resource: &'static str, flow: Flow, refusal: Refusal) {
        let Some(count) = self.count_to_log(flow) else { return };
        let reason = refusal.as_str();
        match flow {
            Flow::User(user_id) => tracing::warn!(resource, %user_id, reason, count, "caller limited"),
            Flow::Address(client) => tracing::warn!(resource, %client, reason, count, "caller limited"),
            Flow::Internal => tracing::warn!(resource, reason, count, "internal work limited"),
        }
    }

    fn count_to_log(&self, flow: Flow) -> Option<u64> {
        let now = Instant::now();
        let mut flows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(refused) = flows.get_mut(&flow) {
            refused.count += 1;
            let is_due = now.duration_since(refused.logged) >= LOG_INTERVAL;
            return is_due.then(|| {
                refused.logged = now;
                std::mem::take(&mut refused.count)
            });
        }
        if flows.len() >= FLOWS_MAX {
            flows.retain(|_, refused| now.duration_since(refused.logged) < LOG_INTERVAL);
        }
        if flows.len() >= FLOWS_MAX {
            return None;
        }
        flows.insert(flow, Refused { logged: now, count: 0 });
        Some(1)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn refusals_of_a_flow_are_logged_once_a_minute_with_their_count() {
        let log = RefusalLog::default();
        let other = Flow::Address([192, 0, 2, 1].into());
        let counts = [Flow::Internal, Flow::Internal, other, Flow::Internal].map(|flow| log.count_to_log(flow));
        assert_eq!(counts, [Some(1), None, Some(1), None]);
        advance(LOG_INTERVAL).await;
        assert_eq!([log.count_to_log(Flow::Internal), log.count_to_log(Flow::Internal)], [Some(3), None]);
    }
}
