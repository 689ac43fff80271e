//! How long connecting takes at most, and how long a server that vanishes goes unnoticed.

use std::time::Duration;

use tokio_postgres::Config;

/// Time allowed for a new connection, the TLS handshake and authentication included.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a database server may not acknowledge data before its connections count as lost.
pub(super) const NETWORK_SILENCE_MAX: Duration = Duration::from_secs(10);
/// How often a client probes a server that has sent nothing for [`NETWORK_SILENCE_MAX`], and after how many probes without an
/// acknowledgement the connection counts as lost.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
const KEEPALIVE_RETRIES: u32 = 3;

/// Limits how long the TCP connection takes, and how long a server goes unnoticed that vanishes without closing its
/// connections: it acknowledges neither data nor keepalives.
///
/// The TLS handshake and authentication need another limit: the driver has none.
pub(super) fn set_timeouts(config: &mut Config) {
    // The driver tries several hosts one after the other.
    let hosts = config.get_hosts().len().max(config.get_hostaddrs().len()).max(1);
    config
        .connect_timeout(CONNECT_TIMEOUT / u32::try_from(hosts).unwrap_or(u32::MAX))
        .tcp_user_timeout(NETWORK_SILENCE_MAX)
        .keepalives_idle(NETWORK_SILENCE_MAX)
        .keepalives_interval(KEEPALIVE_INTERVAL)
        .keepalives_retries(KEEPALIVE_RETRIES);
}
