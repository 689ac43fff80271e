//! Connections from clients: TCP, TLS, HTTP/2, and the client's address behind proxies.
//!
//! The transport serves any [`tower::Service`] over HTTP requests and knows nothing of gRPC. Each request carries a
//! [`client_address::ClientAddress`] and an [`activity::CallHandle`] in its extensions. Through the handle the service
//! reports what the rules for idle, stalled and evictable connections depend on.

pub mod activity;
pub mod client_address;
pub mod connection;
mod eviction;
pub mod listener;
pub mod tls;
