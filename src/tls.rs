//! Certificates: the service's own, and whom its clients and it trust.

pub mod pem;
pub mod verify;
