//! What standard error can display.

use std::{ffi::OsStr, io::IsTerminal};

/// Returns whether to write colours and progress bars to standard error: it is a terminal, and `NO_COLOR` is unset or
/// empty (<https://no-color.org>).
pub fn is_stderr_styled() -> bool {
    std::io::stderr().is_terminal() && !is_set(std::env::var_os("NO_COLOR").as_deref())
}

fn is_set(variable: Option<&OsStr>) -> bool {
    variable.is_some_and(|value| !value.is_empty())
}
