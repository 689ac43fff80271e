//! Times as messages have them.

use chrono::{DateTime, Utc};
use prost_types::Timestamp;

/// Converts a time of the database, which has microseconds.
pub fn timestamp(time: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: time.timestamp(), nanos: time.timestamp_subsec_nanos() as i32 }
}
