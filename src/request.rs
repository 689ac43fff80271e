//! Parsing and bounds that the RPCs share. Past here there are no raw strings for ids, enums or bounded text.

mod check;
mod idempotency;
mod limits;
mod mask;
mod page;

use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use sha2::{Digest, Sha256};

pub(crate) use self::idempotency::mutation;
pub use self::{
    check::{Check, TimeWindow},
    idempotency::Mutation,
    limits::*,
    page::PageRequest,
};

/// SHA-256 over parts, each with its length.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// A time as messages have it, kept at microseconds by the database.
pub fn timestamp(time: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: time.timestamp(), nanos: time.timestamp_subsec_nanos() as i32 }
}
