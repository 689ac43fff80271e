//! Waiting where others are to go on meanwhile.

use std::time::Instant;

use super::bounds::{HANG, TICK};

/// Asks again and again until the answer is yes.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < HANG, "waited in vain until {what}");
        tokio::time::sleep(TICK).await;
    }
}
