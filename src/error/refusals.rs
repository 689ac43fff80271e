//! Log lines about refusals: what the database refuses the service, and what the service refuses its callers.
//!
//! PostgreSQL's message is not logged, because it can quote values.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio_postgres::error::SqlState;

/// The interval of log lines with the same cause.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of causes that are counted one by one. Further ones share a count.
const CAUSES_MAX: usize = 64;
const OTHER_CAUSES: &str = "other";

static COUNTS: Mutex<Counts> = Mutex::new(Counts(BTreeMap::new()));

/// Counts a connection that the database refused or that failed, and logs it at most once a minute per cause.
pub fn count_refused_connection(error: &tokio_postgres::Error) {
    let cause = cause(error);
    if let Some(count) = due_count(&format!("connection: {cause}")) {
        tracing::warn!(sqlstate = sqlstate(error), cause, count, "database refused connection");
    }
}

/// Counts a statement that the database refused, and logs it at most once a minute per SQLSTATE.
pub(super) fn count_refused_statement(error: &tokio_postgres::Error) {
    let cause = cause(error);
    if let Some(count) = due_count(&format!("statement: {cause}")) {
        tracing::warn!(sqlstate = sqlstate(error), count, "database refused statement");
    }
}

/// Counts a call that is refused because of a limit or because the database is unavailable, and logs it at most once a
/// minute per cause.
pub(super) fn count_call_refusal(reason: &str, cause: &str) {
    if let Some(count) = due_count(cause) {
        tracing::warn!(reason, cause, count, "calls refused");
    }
}

fn sqlstate(error: &tokio_postgres::Error) -> Option<&str> {
    error.code().map(SqlState::code)
}

/// Returns what an error of the driver means, in words that quote nothing: the SQLSTATE, or the kind of the I/O error.
pub fn cause(error: &tokio_postgres::Error) -> String {
    let io_error = std::error::Error::source(error).and_then(|source| source.downcast_ref::<io::Error>());
    match (error.code(), io_error) {
        (Some(code), _) => format!("sqlstate {}", code.code()),
        (None, Some(io_error)) => io_error.kind().to_string(),
        (None, None) if error.is_closed() => "connection closed".to_owned(),
        (None, None) => "connection failed".to_owned(),
    }
}

fn due_count(cause: &str) -> Option<u64> {
    COUNTS.lock().unwrap_or_else(PoisonError::into_inner).count(cause, Instant::now())
}

/// Refusals by cause.
struct Counts(BTreeMap<String, Count>);

struct Count {
    logged: Instant,
    /// Refusals since then.
    since: u64,
}

impl Counts {
    /// Counts one refusal. Returns how many there were since the latest log line if another one is due.
    fn count(&mut self, cause: &str, now: Instant) -> Option<u64> {
        let cause = if self.0.len() < CAUSES_MAX || self.0.contains_key(cause) { cause } else { OTHER_CAUSES };
        let Some(count) = self.0.get_mut(cause) else {
            self.0.insert(cause.to_owned(), Count { logged: now, since: 0 });
            return Some(1);
        };
        count.since += 1;
        if now.duration_since(count.logged) < LOG_INTERVAL {
            return None;
        }
        count.logged = now;
        Some(std::mem::take(&mut count.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_refusal_is_logged_at_once_and_further_ones_are_counted_for_a_minute() {
        let mut counts = Counts(BTreeMap::new());
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(counts.count("a", began), Some(1));
        assert_eq!(counts.count("b", began), Some(1));
        assert_eq!([1, 2, 59].map(|seconds| counts.count("a", after(seconds))), [None; 3]);
        assert_eq!(counts.count("a", after(60)), Some(4));
        assert_eq!(counts.count("a", after(61)), None);
        assert_eq!(counts.count("a", after(200)), Some(2));
    }

    #[test]
    fn causes_beyond_the_maximum_share_a_count() {
        let mut counts = Counts(BTreeMap::new());
        let now = Instant::now();
        for nth in 0..CAUSES_MAX {
            assert_eq!(counts.count(&nth.to_string(), now), Some(1));
        }
        assert_eq!(counts.count("one more", now), Some(1));
        assert_eq!(counts.count("and another", now), None);
        assert_eq!(counts.0.len(), CAUSES_MAX + 1);
    }
}
