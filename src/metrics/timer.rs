//! Measures durations.

use std::time::Instant;

use prometheus::Histogram;

/// Measures a duration until it is dropped.
pub struct Timer(Option<(Histogram, Instant)>);

impl Timer {
    /// Returns a timer that measures nothing.
    pub fn none() -> Self {
        Self(None)
    }

    pub fn start(duration: Option<Histogram>) -> Self {
        Self(duration.map(|duration| (duration, Instant::now())))
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some((duration, began)) = &self.0 {
            duration.observe(began.elapsed().as_secs_f64());
        }
    }
}
