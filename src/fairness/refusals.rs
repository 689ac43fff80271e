//! Logs who is refused, and why.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::flow::Flow;

/// Minimum time between two log lines about one flow.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of flows that are counted. Past it, those that were not refused for [`LOG_INTERVAL`] are removed.
const FLOWS_MAX: usize = 1_024;

/// Why a permit was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The flow holds the share that one flow may hold.
    Share,
    /// All permits are held, or too few are free.
    Total,
    /// The wait would have been too long, or was.
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
pub(super) struct RefusalLog(HashMap<Flow, Refused>);

struct Refused {
    logged: Instant,
    count: u64,
}

impl RefusalLog {
    /// Counts a refusal. Logs it, with all that were counted before, if the last line is a minute old.
    pub fn record(&mut self, resource: &'static str, flow: Flow, refusal: Refusal) {
        let now = Instant::now();
        let count = match self.0.get_mut(&flow) {
            Some(refused) if now.duration_since(refused.logged) < LOG_INTERVAL => {
                refused.count += 1;
                return;
            }
            Some(refused) => std::mem::take(&mut refused.count) + 1,
            None => 1,
        };
        if self.0.len() >= FLOWS_MAX {
            self.0.retain(|_, refused| now.duration_since(refused.logged) < LOG_INTERVAL);
        }
        if self.0.len() < FLOWS_MAX || self.0.contains_key(&flow) {
            self.0.insert(flow, Refused { logged: now, count: 0 });
            let reason = refusal.as_str();
            match flow {
                Flow::User(user_id) => tracing::warn!(resource, %user_id, reason, count, "caller limited"),
                Flow::Address(client) => tracing::warn!(resource, %client, reason, count, "caller limited"),
                Flow::Internal => tracing::warn!(resource, reason, count, "batches limited"),
            }
        }
    }
}
