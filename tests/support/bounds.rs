//! How long tests wait.

use std::time::Duration;

/// A test that waits longer than this hangs.
pub const HANG: Duration = Duration::from_secs(120);
/// Between two looks at whether something is so.
pub const TICK: Duration = Duration::from_millis(20);
