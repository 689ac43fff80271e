//! The command line: which subcommand, and how its end is told.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use issue_tracker::{
    config::{Cli, Command, UserCommand},
    start,
};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,refinery_core=warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();

    let result = match Cli::parse().command() {
        Command::Serve(args) => start::serve(args).await,
        Command::Migrate(args) => start::migrate_external(args).await,
        Command::User(UserCommand::Create(args)) => start::create_user(args).await,
        Command::Health(args) => start::health(args).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("issue-tracker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
