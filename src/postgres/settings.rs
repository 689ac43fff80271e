//! The settings of the private PostgreSQL.

/// Part of the socket's name; the server opens no TCP port.
pub(super) const PORT: u16 = 5432;

/// Whether commits must survive a crash of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    Durable,
    /// For tests: a power failure may lose the cluster, and a killed server the commits of its last second. A killed
    /// service loses nothing, as the server then shuts down cleanly.
    Throwaway,
}

/// The log settings keep statements and values out of the log: an ERROR can quote a row, and a LOG message about a crash
/// quotes the statement. So only FATAL and PANIC are logged, and a statement is added to PANIC only.
pub(super) const SETTINGS: [&str; 6] = [
    "timezone=UTC",
    "log_timezone=UTC",
    "log_min_messages=fatal",
    "log_min_error_statement=panic",
    "log_parameter_max_length_on_error=0",
    // Needs memory that is writable and executable, which the systemd unit in deploy/ forbids. Statements are too short to gain.
    "jit=off",
];
pub(super) const DURABLE_SETTINGS: [&str; 6] = [
    "fsync=on",
    "synchronous_commit=on",
    "full_page_writes=on",
    "shared_buffers=256MB",
    "max_wal_size=2GB",
    "max_connections=100",
];
/// `max_connections` is higher because many tests share one server.
pub(super) const THROWAWAY_SETTINGS: [&str; 4] =
    ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200"];
