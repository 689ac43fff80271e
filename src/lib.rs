//! An issue tracker: gRPC outside, PostgreSQL underneath, raw SQL in transactions in between.
//!
//! A request comes in by [`middleware`], is parsed in [`rpc`] with the help of [`request`], and answered by one function
//! of [`db`]. [`error`] says what callers are told when it cannot be. [`client`] is on the other side of the wire.

pub mod commands;
pub mod config;
pub mod server;

pub mod transport;

pub mod middleware;

pub mod auth;
pub mod error;
pub mod request;
pub mod rpc;

pub mod batching;
pub mod db;

pub mod csv;
pub mod filter;

pub mod postgres;

pub mod client;

pub mod pb;

/// The descriptors of `proto/`, with comments, as reflection serves them.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");
