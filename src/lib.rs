//! An issue tracker: gRPC outside, PostgreSQL underneath, raw SQL in transactions in between.
//!
//! A request comes in by [`gate`], is parsed in [`rpc`] with the help of [`request`], and answered by one function
//! of [`db`]. [`error`] says what callers are told when it cannot be. [`cli`] is on the other side of the wire.

pub mod config;
pub mod server;
pub mod start;

pub mod auth;
pub mod coalesce;
pub mod connections;
pub mod error;
pub mod gate;
pub mod request;
pub mod rpc;
pub mod singleflight;
pub mod tls;

pub mod db;
pub mod export;
pub mod filter;
pub mod import;

pub mod cli;

/// The messages, clients and service traits generated from `proto/`.
pub mod pb {
    // The generator does not keep the indentation of lists in comments.
    #![allow(clippy::doc_lazy_continuation)]

    tonic::include_proto!("issuetracker.v1");
}

/// The descriptors of `proto/`, with comments, as reflection serves them.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");

/// The README's Rust code compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
