//! The messages and clients of the issue tracker's gRPC API, and, with the default feature `server`, the service itself.
//!
//! Rust programs that call the service need [`pb`] alone: without default features, neither the service nor its
//! dependencies are built. The feature `internals`, off by default, makes the modules of the service public for its own
//! tests, benchmarks and fuzz targets; they are not a stable interface. ARCHITECTURE.md maps the modules.

// Documentation of the modules is for maintainers, who see private items.
#![allow(rustdoc::private_intra_doc_links)]

pub mod pb;

#[cfg(feature = "internals")]
pub mod auth;
#[cfg(feature = "internals")]
pub mod backoff;
#[cfg(feature = "internals")]
pub mod batching;
#[cfg(feature = "internals")]
pub mod client;
#[cfg(feature = "internals")]
pub mod commands;
#[cfg(feature = "internals")]
pub mod config;
#[cfg(feature = "internals")]
pub mod csv;
#[cfg(feature = "internals")]
pub mod db;
#[cfg(feature = "internals")]
pub mod error;
#[cfg(feature = "internals")]
pub mod fairness;
#[cfg(feature = "internals")]
pub mod filter;
#[cfg(feature = "internals")]
pub mod hash;
#[cfg(feature = "internals")]
pub mod limits;
#[cfg(feature = "internals")]
pub mod metrics;
#[cfg(feature = "internals")]
pub mod middleware;
#[cfg(feature = "internals")]
pub mod postgres;
#[cfg(feature = "internals")]
pub mod request;
#[cfg(feature = "internals")]
pub mod rpc;
#[cfg(feature = "internals")]
pub mod server;
#[cfg(feature = "internals")]
pub mod tls;
#[cfg(feature = "internals")]
pub mod transport;

#[cfg(all(feature = "server", not(feature = "internals")))]
mod auth;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod backoff;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod batching;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod client;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod commands;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod config;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod csv;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod db;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod error;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod fairness;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod filter;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod hash;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod limits;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod metrics;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod middleware;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod postgres;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod request;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod rpc;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod server;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod tls;
#[cfg(all(feature = "server", not(feature = "internals")))]
mod transport;

#[cfg(feature = "server")]
pub use commands::run;

/// The descriptors of `proto/` with comments, as reflection serves them: an encoded `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");
