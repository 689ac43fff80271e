//! What the subcommands of the command line do.

pub mod serve;
