//! Connections of clients: TCP, TLS, and the address of a client behind proxies.

pub mod client_address;
pub mod connection;
pub mod tls;
