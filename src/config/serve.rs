//! The flags of `serve`.

use std::net::SocketAddr;

use anyhow::bail;
use clap::Args;

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
}
