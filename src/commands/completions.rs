//! `issue-tracker completions`.

use clap::CommandFactory;
use clap_complete::Generator;

use super::stdout::print;
use crate::config::{Cli, CompletionsArgs};

/// The name of the program where clap_complete 4.6 writes it wrongly into scripts for bash, and as it must be: the hyphen is
/// escaped in two ways, so that bash completes nothing after a subcommand (<https://github.com/clap-rs/clap/issues/6421>).
const WRONG_NAME: &str = "issue__subcmd__tracker";
const NAME: &str = "issue__tracker";

/// Prints a completion script.
pub fn completions(args: &CompletionsArgs) -> anyhow::Result<()> {
    let mut command = Cli::command();
    command.set_bin_name(env!("CARGO_PKG_NAME"));
    command.build();
    let mut script = Vec::new();
    args.shell.try_generate(&command, &mut script)?;
    let script = String::from_utf8(script)?.replace(WRONG_NAME, NAME);
    print(script.as_bytes())
}
