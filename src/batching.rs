//! Concurrent calls executed together: mutations in one transaction, equal reads as one.

pub mod coalescer;
pub mod shared_read;
