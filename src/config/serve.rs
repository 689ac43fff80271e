//! The flags of `serve`.

use std::{net::SocketAddr, time::Duration};

use anyhow::bail;
use clap::{Args, value_parser};

use super::{Database, Limits, ServerTls};

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address to listen on; port 0 picks a free port, which is printed
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub tls: ServerTls,
    #[command(flatten)]
    pub database: Database,
    /// Time to wait for an external database that is not available at the start, in seconds; 0 exits immediately
    #[arg(long, env = "ISSUE_TRACKER_WAIT_FOR_DATABASE", default_value_t = 600, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(0..=86_400), help_heading = "Database")]
    wait_for_database: u64,
    #[command(flatten)]
    pub limits: Limits,
}

impl ServeArgs {
    /// Validates combinations of flags. Fails for an address beyond loopback without TLS or `--insecure-plaintext`, and
    /// as [`Limits::check`].
    pub fn check(&self) -> anyhow::Result<()> {
        let is_loopback = self.listen.ip().to_canonical().is_loopback();
        if !is_loopback && self.tls.tls_cert.is_none() && !self.tls.insecure_plaintext {
            bail!(
                "--listen {}: other machines can connect, and passwords and tokens would be sent unencrypted; set \
                 --tls-cert and --tls-key, or --insecure-plaintext if a proxy in front of the service encrypts",
                self.listen
            );
        }
        self.limits.check()
    }

    /// Returns how long to wait for an external database that is not available at the start.
    pub fn database_wait(&self) -> Duration {
        Duration::from_secs(self.wait_for_database)
    }
}
