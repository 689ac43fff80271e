//! What every TLS endpoint of this program needs: PEM files, and verification of server certificates.

pub mod pem;
pub mod verify;
