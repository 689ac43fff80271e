//! The database: a pool of connections that keep their prepared statements, and transactions on them.
//!
//! A query is a free function in the file of its noun, over [`Conn`]; a [`Tx`] dereferences to [`Conn`], so the same
//! function serves both. Nothing here knows of gRPC.

pub mod audit;
pub mod comments;

mod admission;
pub mod batchers;
mod conn;
pub mod connection_string;
pub mod idempotency;
pub mod imports;
pub mod issues;
pub mod labels;
mod manager;
pub mod migrate;
mod pool;
pub mod reports;
mod tls;
pub mod tokens;
mod transaction;
pub mod users;

pub use self::{
    conn::{Conn, Page, PageBounds, Params},
    connection_string::Target,
    pool::{Db, PoolOptions, PooledConn},
    transaction::Tx,
};

/// How many rows are pruned by one statement.
pub const PRUNED_AT_ONCE: i64 = 10_000;
