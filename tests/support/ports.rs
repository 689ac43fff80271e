//! Ports that a test binds more than once.

use std::net::TcpListener;

/// Returns a port of 127.0.0.1 that is unused. It is below the range from which the kernel assigns ports to connections
/// and to listeners on port 0, so no other test gets it before the caller binds it, or between two binds.
pub fn unused_port() -> u16 {
    std::iter::repeat_with(|| fastrand::u16(10_000..30_000))
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .unwrap()
}
