//! The command line: which subcommand, and how its end is told.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use issue_tracker::{
    client, commands,
    config::{Cli, Command, UserCommand},
};
use tracing_subscriber::{Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    let args = Cli::parse();
    // Only this program's own lines, whose fields are chosen: libraries log what clients send, credentials included.
    let own = Targets::new().with_target("issue_tracker", args.log_level);
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry().with(lines.with_filter(own)).init();

    let result = match args.command() {
        Command::Serve(args) => commands::serve(args).await,
        Command::Migrate(args) => commands::migrate(args).await,
        Command::User(UserCommand::Create(args)) => commands::create_user(args).await,
        Command::Health(args) => commands::health(args).await,
        Command::Import(args) => return client::import(*args).await,
        Command::Export(args) => return client::export(args).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("issue-tracker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
