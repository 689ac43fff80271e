//! Time bounds of tests.

use std::time::Duration;

/// Time after which a test that waits fails.
pub const HANG: Duration = Duration::from_secs(120);
/// Interval between two polls of a condition.
pub const TICK: Duration = Duration::from_millis(20);
