//! The command line: parses the arguments, starts logging and runs the subcommand. `import` and `export` are in
//! [`crate::client`].

mod bootstrap;
mod completions;
mod health;
mod man;
mod migrate;
mod serve;
mod stdout;
mod user;

use std::process::ExitCode;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

use crate::{
    client,
    config::{Cli, Command, UserCommand, exit_code, terminal},
};

/// Runs the subcommand of the process's arguments and returns its exit code, as [`exit_code`] defines it.
pub async fn run() -> ExitCode {
    let (args, matches) = Cli::of_process();
    start_logging(args.log_level);
    for variable in Cli::unknown_variables() {
        tracing::warn!(name = variable.name, nearest = variable.nearest, "unknown environment variable ignored");
    }
    let result = match args.into_command() {
        Command::Serve(args) if args.print_config => serve::print_config(&args, &matches).map(|()| ExitCode::SUCCESS),
        Command::Serve(args) => serve::serve(args).await.map(|()| ExitCode::SUCCESS),
        Command::Migrate(args) => migrate::migrate(args).await.map(|()| ExitCode::SUCCESS),
        Command::User(UserCommand::Create(args)) => user::create_user(args).await.map(|()| ExitCode::SUCCESS),
        Command::User(UserCommand::ResetPassword(args)) => user::reset_password(args).await.map(|()| ExitCode::SUCCESS),
        Command::Health(args) => health::health(args).await,
        Command::Import(args) => return client::import(*args).await,
        Command::Export(args) => return client::export(args).await,
        Command::Completions(args) => completions::completions(&args).map(|()| ExitCode::SUCCESS),
        Command::Man(args) => man::man(&args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("issue-tracker: {error:#}");
        ExitCode::from(exit_code::FAILED)
    })
}

/// Logs to standard error. Only this crate's events are logged: libraries log what clients send, credentials included.
fn start_logging(level: LevelFilter) {
    let own = Targets::new().with_target("issue_tracker", level);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(terminal::is_stderr_styled());
    tracing_subscriber::registry().with(lines.with_filter(own)).init();
}
