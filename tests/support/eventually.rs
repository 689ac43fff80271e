//! Polling in asynchronous tests.

use std::time::Instant;

use super::bounds::{HANG, TICK};

/// Polls a condition until it holds. Panics after [`HANG`]; `what` describes the condition.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !condition().await {
        assert!(began.elapsed() < HANG, "timed out waiting until {what}");
        tokio::time::sleep(TICK).await;
    }
}
