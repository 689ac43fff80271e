//! The command line and environment.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum, value_parser};
use tracing::level_filters::LevelFilter;

use crate::{db::PoolOptions, pb};

/// An issue tracker over gRPC, on PostgreSQL.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
    /// What is logged to standard error: error, warn, info, debug or off.
    #[arg(long, env = "ISSUE_TRACKER_LOG", default_value = "info", value_name = "LEVEL", global = true)]
    pub log_level: LevelFilter,
}

impl Cli {
    /// Serving is what happens when nothing else is asked for.
    pub fn command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve until SIGINT or SIGTERM (the default).
    Serve(ServeArgs),
    /// Bring the schema of an external database up to date, and end.
    Migrate(ExternalDatabase),
    /// Manage the users of an external database.
    #[command(subcommand)]
    User(UserCommand),
    /// Ask a running service whether it serves: exit code 0 if it does.
    Health(HealthArgs),
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make a user, for example the first administrator; reads the password from standard input.
    Create(UserCreateArgs),
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub limits: Limits,
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
}

/// Which database: an external one, or the one that the service runs by itself.
#[derive(Debug, Args)]
pub struct Database {
    /// PostgreSQL 15 or newer to work on, as a URL or `key=value` pairs. Default: a private one in the data directory.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Where the private PostgreSQL and the administrator's token are kept. Default: /var/lib/issue-tracker for root,
    /// else $XDG_DATA_HOME/issue-tracker or ~/.local/share/issue-tracker.
    #[arg(long, env = "ISSUE_TRACKER_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// A database that somebody else runs.
#[derive(Debug, Args)]
pub struct ExternalDatabase {
    /// PostgreSQL 15 or newer, as a URL or `key=value` pairs.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: String,
}

/// The bounds that can be set.
#[derive(Clone, Debug, Args)]
pub struct Limits {
    /// Connections to the database.
    #[arg(long, env = "ISSUE_TRACKER_POOL_CONNECTIONS", default_value_t = 20, value_name = "N",
        value_parser = value_parser!(u32).range(2..=1000))]
    pool_connections: u32,
    /// How long a call waits for a connection, in milliseconds.
    #[arg(long, env = "ISSUE_TRACKER_POOL_WAIT_MS", default_value_t = 2_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=60_000))]
    pool_wait_ms: u64,
    /// How long one statement may take, in milliseconds.
    #[arg(long, env = "ISSUE_TRACKER_STATEMENT_MS", default_value_t = 30_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=600_000))]
    statement_ms: u64,
    /// Requests at once; more are told RESOURCE_EXHAUSTED.
    #[arg(long, env = "ISSUE_TRACKER_REQUESTS", default_value_t = 1_024, value_name = "N",
        value_parser = value_parser!(u32).range(1..=100_000))]
    pub requests: u32,
    /// Imports at once, each of which holds a connection; more are told RESOURCE_EXHAUSTED.
    #[arg(long, env = "ISSUE_TRACKER_IMPORTS", default_value_t = 10, value_name = "N",
        value_parser = value_parser!(u32).range(1..=999))]
    pub imports: u32,
    /// bcrypt's cost for new passwords: each step doubles the time, 12 takes a quarter of a second.
    #[arg(long, env = "ISSUE_TRACKER_BCRYPT_COST", default_value_t = 12, value_name = "COST",
        value_parser = value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,
    /// How long a session lasts, in hours.
    #[arg(long, env = "ISSUE_TRACKER_SESSION_HOURS", default_value_t = 12, value_name = "HOURS",
        value_parser = value_parser!(i32).range(1..=8_760))]
    pub session_hours: i32,
    /// How long requests under way may take to finish when the service stops, in seconds.
    #[arg(long, env = "ISSUE_TRACKER_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(0..=3_600))]
    drain_seconds: u64,
}

impl Limits {
    /// What only makes sense together.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.imports >= self.pool_connections {
            bail!(
                "--imports {} must be less than --pool-connections {}: each import holds a connection",
                self.imports,
                self.pool_connections
            );
        }
        Ok(())
    }

    pub fn pool(&self) -> PoolOptions {
        PoolOptions {
            connections_max: self.pool_connections,
            wait_max: Duration::from_millis(self.pool_wait_ms),
            statement_max: Duration::from_millis(self.statement_ms),
        }
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// The values that the command line has when nothing is said.
impl Default for Limits {
    fn default() -> Self {
        Self {
            pool_connections: 20,
            pool_wait_ms: 2_000,
            statement_ms: 30_000,
            requests: 1_024,
            imports: 10,
            bcrypt_cost: 12,
            session_hours: 12,
            drain_seconds: 30,
        }
    }
}

#[derive(Debug, Args)]
pub struct UserCreateArgs {
    #[command(flatten)]
    pub database: ExternalDatabase,
    /// The new user's name.
    pub username: String,
    /// What the user may do.
    #[arg(long, value_enum, default_value_t = RoleName::Member)]
    pub role: RoleName,
    /// bcrypt's cost, as the service has it.
    #[arg(long, env = "ISSUE_TRACKER_BCRYPT_COST", default_value_t = 12, value_name = "COST",
        value_parser = value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RoleName {
    Viewer,
    Member,
    Admin,
}

impl From<RoleName> for pb::Role {
    fn from(role: RoleName) -> Self {
        match role {
            RoleName::Viewer => Self::Viewer,
            RoleName::Member => Self::Member,
            RoleName::Admin => Self::Admin,
        }
    }
}

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Where the service listens.
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
}

impl Database {
    pub fn data_dir(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.data_dir {
            return Ok(dir.clone());
        }
        // SAFETY: it only asks for a number, and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            return Ok("/var/lib/issue-tracker".into());
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data_home = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        Ok(data_home.context("no home directory to keep data in; give --data-dir")?.join("issue-tracker"))
    }
}
