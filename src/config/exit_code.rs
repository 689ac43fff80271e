//! Exit codes, the same for every subcommand. 0 is success.

/// The command ran, with a negative result: rows were rejected, or the service is not SERVING.
pub const NEGATIVE: u8 = 1;
/// The command failed, or its arguments are invalid; clap uses the same code.
pub const FAILED: u8 = 2;

/// Returns the exit code of a command that a signal interrupted: 130 for SIGINT, 143 for SIGTERM.
pub const fn interrupted(signal: i32) -> u8 {
    128 + signal as u8
}
