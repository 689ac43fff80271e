//! The command line and its environment variables, parsed and validated before anything starts.

mod client;
mod database;
mod effective;
mod environment;
pub mod exit_code;
mod limits;
mod serve;
pub mod terminal;
mod tls;
mod user;

use std::env;

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use tracing::level_filters::LevelFilter;

pub use self::{
    client::{Connection, ExportArgs, HealthArgs, ImportArgs, ImportModeName, TOKEN_VARIABLE},
    database::{Database, MigrateArgs},
    environment::UnknownVariable,
    limits::Limits,
    serve::ServeArgs,
    tls::{ClientTls, ServerTls},
    user::{ResetPasswordArgs, UserCommand, UserCreateArgs},
};

/// An issue tracker as a gRPC service on PostgreSQL.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    // Before the flattened flags, whose last heading would apply to it.
    /// Least severe level that is logged to standard error: error, warn, info, debug or off
    #[arg(
        long,
        env = "ISSUE_TRACKER_LOG",
        default_value = "info",
        value_name = "LEVEL",
        global = true,
        help_heading = "Logging"
    )]
    pub log_level: LevelFilter,
    #[command(flatten)]
    serve: ServeArgs,
}

impl Cli {
    /// Parses the arguments and environment of the process: a flag takes precedence over its variable, and the variable over
    /// the default. Exits for `--help`, `--version` and errors.
    pub fn of_process() -> (Self, ArgMatches) {
        let mut command = environment::prepared(Self::command(), env::args_os());
        let parsed = command
            .try_get_matches_from_mut(env::args_os())
            .and_then(|matches| Ok((Self::from_arg_matches(&matches)?, matches)));
        parsed.unwrap_or_else(|error| environment::with_tips(error, &mut command).exit())
    }

    /// Returns the variables of the process that look like those of flags, but are none.
    pub fn unknown_variables() -> Vec<UnknownVariable> {
        environment::unknown_variables(&Self::command(), env::vars_os())
    }

    /// Returns the subcommand; `serve` where none is given.
    pub fn into_command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve until SIGINT or SIGTERM (the default command)
    Serve(ServeArgs),
    /// Apply pending migrations to an external database
    Migrate(MigrateArgs),
    /// Create users and reset passwords in the database
    #[command(subcommand)]
    User(UserCommand),
    /// Check the health of a running service
    ///
    /// Exit codes: 0, it is SERVING; 1, it is not; 2, it cannot be reached, or the check failed.
    Health(HealthArgs),
    /// Import issues from a CSV file into a running service
    ///
    /// Exit codes: 0, every row was imported (with --validate-only: is valid); 1, rows were rejected; 2, the import
    /// failed; 130 or 143, a signal interrupted it, and standard error shows the command that resumes it.
    Import(Box<ImportArgs>),
    /// Export issues from a running service as CSV
    ///
    /// Exit codes: 0, the file is complete; 2, the export failed; 130 or 143, a signal interrupted it.
    Export(ExportArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the manual page of the program or a command, in roff
    Man(ManArgs),
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell that runs the script
    pub shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Command that the page describes, such as import or user create [default: the program]
    #[arg(value_name = "COMMAND")]
    pub command: Vec<String>,
}
