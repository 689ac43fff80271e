//! Standard output of commands that print a text.

use std::io::{self, ErrorKind, Write};

/// Prints to standard output. A reader that has closed it is no error.
pub fn print(text: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}
