//! The flags of `serve`.

use std::{net::SocketAddr, time::Duration};

use anyhow::{anyhow, bail};
use clap::{ArgMatches, Args, Command, value_parser};
use secrecy::ExposeSecret;

use super::{
    Database, Limits, ServerTls,
    effective::{Derived, effective},
};
use crate::db::ConnectionString;

#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Print the value of each flag and its source, and exit
    #[arg(long)]
    pub print_config: bool,
    /// Address to listen on; port 0 picks a free port, which is printed
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS",
        value_parser = parse_listen)]
    pub listen: SocketAddr,
    /// Address to serve metrics for Prometheus on, unencrypted; off without it
    #[arg(long, env = "ISSUE_TRACKER_METRICS_LISTEN", value_name = "ADDRESS")]
    pub metrics_listen: Option<SocketAddr>,
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
    /// Validates combinations of flags, without opening a file. The error names all that are impossible, each with a remedy.
    pub fn check(&self) -> anyhow::Result<()> {
        let own = [self.listen_problem(), self.database_problem()].into_iter().flatten();
        let problems: Vec<String> = own.chain(self.tls.problems()).chain(self.limits.problems()).collect();
        match &*problems {
            [] => Ok(()),
            [problem] => Err(anyhow!(problem.clone())),
            several => bail!("{} settings are impossible:\n{}", several.len(), several.join("\n")),
        }
    }

    fn listen_problem(&self) -> Option<String> {
        let is_loopback = self.listen.ip().to_canonical().is_loopback();
        (!is_loopback && !self.tls.is_wanted() && !self.tls.insecure_plaintext).then(|| {
            format!(
                "--listen {}: other machines can connect, and passwords and tokens would be sent unencrypted; set \
                 --tls-cert and --tls-key, or --insecure-plaintext if a proxy in front of the service encrypts",
                self.listen
            )
        })
    }

    fn database_problem(&self) -> Option<String> {
        match &self.database.database_url {
            Some(url) => {
                ConnectionString::check(url.expose_secret()).err().map(|error| format!("--database-url: {error:#}"))
            }
            None => self.database.data_dir.path().err().map(|error| format!("--data-dir: {error:#}")),
        }
    }

    /// Returns the lines of `--print-config`. `command`, `matches`: the program, and those of its arguments.
    pub fn effective(&self, command: &Command, matches: &ArgMatches) -> String {
        let mut derived: Vec<Derived> = self.limits.derived();
        derived.extend(self.database.data_dir.derived());
        effective(command, matches, &derived)
    }

    /// Returns how long to wait for an external database that is not available at the start.
    pub fn database_wait(&self) -> Duration {
        Duration::from_secs(self.wait_for_database)
    }
}

/// Parses an address to listen on. Names are refused: they can have several addresses.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        "expected an IP address and a port, such as 127.0.0.1:50051; 0.0.0.0:50051 and [::]:50051 are all addresses"
            .to_owned()
    })
}
