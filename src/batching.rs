//! Concurrent calls that are executed together: calls of one kind as a batch, equal reads as one. Contains no SQL.

pub mod coalescer;
pub mod shared_read;
