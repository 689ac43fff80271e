//! Pseudo-terminals.

use std::{
    fs::File,
    io::Read,
    os::fd::{FromRawFd, OwnedFd},
};

/// Opens a pseudo-terminal. Returns the end for the test, which types and reads, and the end for a program.
pub fn open_terminal() -> (File, OwnedFd) {
    let (mut test_end, mut program_end) = (0, 0);
    let (no_name, no_termios, no_size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: openpty writes two descriptors, and the other pointers may be null.
    let opened = unsafe { libc::openpty(&raw mut test_end, &raw mut program_end, no_name, no_termios, no_size) };
    assert_eq!(opened, 0);
    // SAFETY: both descriptors were just opened and have no other owner.
    unsafe { (File::from_raw_fd(test_end), OwnedFd::from_raw_fd(program_end)) }
}

/// Reads the output of a program until no process has its end open, which the kernel reports as an I/O error.
///
/// `on_output` is called with all output so far, each time more arrives.
pub fn read_terminal(terminal: &mut File, mut on_output: impl FnMut(&mut File, &str)) -> String {
    let (mut output, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        output.extend_from_slice(&buffer[..count]);
        on_output(terminal, &String::from_utf8_lossy(&output));
    }
    String::from_utf8_lossy(&output).into_owned()
}
