//! `issue-tracker man`.

use anyhow::anyhow;
use clap::{Command, CommandFactory};
use clap_mangen::Man;

use super::stdout::print;
use crate::config::{Cli, ManArgs};

/// Prints the manual page of the program, which lists those of its commands, or of a command.
pub fn man(args: &ManArgs) -> anyhow::Result<()> {
    let mut program = Cli::command().disable_help_subcommand(true);
    program.build();
    let mut command = &program;
    for name in &args.command {
        command = command.find_subcommand(name).ok_or_else(|| {
            let names: Vec<_> = command.get_subcommands().map(Command::get_name).collect();
            anyhow!("COMMAND: {name:?} is unknown; expected one of: {}", names.join(", "))
        })?;
    }
    let mut page = Vec::new();
    Man::new(command.clone()).render(&mut page)?;
    print(&page)
}
