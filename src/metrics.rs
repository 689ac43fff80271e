//! Metrics in the text format of Prometheus. `docs/operations.md` lists them.
//!
//! The process has one set of instruments, which [`enable`] creates. Without it, recording costs one atomic load. Names
//! follow OpenTelemetry's conventions for RPC and database clients, with their units, where these have one; the others begin
//! with `issue_tracker_`. Labels have values that the service itself defines, never what a client sends.

mod calls;
mod database;
mod instruments;
pub mod listener;
mod registration;
mod resources;
mod timer;

pub use self::{
    calls::CallTimer,
    database::{PoolMetrics, PoolUsage},
    instruments::{count, count_by, enable, get, in_progress},
    resources::ResourceUsage,
    timer::Timer,
};
pub use prometheus::{Histogram, IntCounter};

/// The label value that OpenTelemetry defines for all values but the known ones.
pub const OTHER: &str = "_OTHER";
