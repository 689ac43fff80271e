//! The database: a pool of connections that keep their prepared statements, and transactions on them.
//!
//! A query is a free function on [`Conn`], in the file of its noun. A [`Tx`] dereferences to [`Conn`]: the same function
//! runs with or without a transaction. Nothing in this module depends on gRPC.

mod activity;
mod availability;
mod cancellation;
mod conn;
mod dedicated_client;
mod manager;
mod page;
mod pool;
mod probe;
mod session;
mod timeouts;
mod tls;
mod transaction;

pub mod batchers;
pub mod connection_string;
pub mod idempotency;
pub mod migrate;
pub mod response_budget;
pub mod row_locks;
pub mod time;

pub mod audit;
pub mod comments;
pub mod imports;
pub mod issues;
pub mod labels;
pub mod reports;
pub mod tokens;
pub mod users;

pub use self::{
    availability::Health,
    conn::Conn,
    connection_string::ConnectionString,
    page::{Page, PageBounds},
    pool::{Db, PoolOptions, StorageLimits},
};
#[cfg(feature = "internals")]
pub use self::{conn::Params, transaction::Tx};

/// How many rows one statement prunes.
pub const PRUNE_BATCH_ROWS: i64 = 10_000;
