//! Which database the service and the administrative commands use.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use secrecy::SecretString;

use super::effective::Derived;

/// An external database, or the private one in the data directory.
#[derive(Debug, Args)]
#[command(next_help_heading = "Database")]
pub struct Database {
    /// External PostgreSQL 15 or newer, as a URL or key=value pairs [default: a private PostgreSQL]
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,
    #[command(flatten)]
    pub data_dir: DataDir,
}

#[derive(Debug, Args)]
pub struct DataDir {
    /// Directory of the private PostgreSQL and admin.token [default: /var/lib/issue-tracker for root, else
    /// ~/.local/share/issue-tracker]
    #[arg(long, env = "ISSUE_TRACKER_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl DataDir {
    /// Returns the directory of the flag or the environment variable, else the default: `/var/lib/issue-tracker` for
    /// root, else `issue-tracker` in `$XDG_DATA_HOME` or `~/.local/share`. Fails without a home directory.
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.data_dir {
            return Ok(dir.clone());
        }
        // SAFETY: geteuid has no arguments and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            return Ok("/var/lib/issue-tracker".into());
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data_home = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        Ok(data_home.context("no home directory for the default data directory; set --data-dir")?.join("issue-tracker"))
    }

    /// Returns the default. `None` if there is none.
    pub(super) fn derived(&self) -> Option<Derived> {
        let value = self.path().ok()?.display().to_string();
        Some(Derived { flag: "data-dir", value, from: Some("the user and $HOME") })
    }
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// External PostgreSQL 15 or newer, as a URL or key=value pairs
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: SecretString,
    /// Role that is granted the rights which the service needs, and no others
    #[arg(long, value_name = "ROLE")]
    pub grant_to: Option<String>,
}
