//! The command-line client: import, export and health checks over gRPC. Of this crate, it uses the messages, the
//! command-line flags and the TLS verifier.

mod chunk_stream;
mod connection;
mod export;
mod file_source;
mod health;
mod import;
mod output_file;
mod plaintext;
mod progress;
mod rejected_rows;
mod report;
mod retries;

use std::{
    io::{self, Write},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use anyhow::anyhow;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

pub use export::export;
pub use health::check_health;
pub use import::import;

use crate::config::exit_code;

/// How long interrupted work may take to reach a point where it can be abandoned.
const INTERRUPTED_WORK_MAX: Duration = Duration::from_secs(1);

/// How work ended.
enum Ended<T> {
    Completed(T),
    /// Interrupted by the signal with this number.
    Interrupted(i32),
}

/// Runs work until it completes, or until the first SIGINT or SIGTERM.
async fn run_until_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> Ended<anyhow::Result<T>> {
    let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = signals else {
        return Ended::Completed(Err(anyhow!("cannot listen for signals")));
    };
    let (sender, interrupted) = oneshot::channel();
    tokio::spawn(async move {
        let number = tokio::select! {
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
        };
        let _ = sender.send(number);
        // The work may block in a write to a pipe that no process reads.
        tokio::time::sleep(INTERRUPTED_WORK_MAX).await;
        exit_interrupted(number)
    });
    let work = pin!(work);
    tokio::select! {
        result = work => Ended::Completed(result),
        Ok(number) = interrupted => Ended::Interrupted(number),
    }
}

/// Exits without waiting for threads, which may be blocked on a pipe.
fn exit_interrupted(number: i32) -> ! {
    std::process::exit(exit_code::interrupted(number).into())
}

/// Prints an error, and returns the exit code of a failure.
fn report_failure(error: &anyhow::Error) -> ExitCode {
    eprint_line(&format!("issue-tracker: {error:#}"));
    ExitCode::from(exit_code::FAILED)
}

/// Runs work that may block for long in a thread of its own. The process can exit without it, unlike with tokio's blocking
/// threads.
async fn run_in_thread<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let (result, done) = oneshot::channel();
    std::thread::spawn(move || result.send(work()));
    done.await.unwrap_or_else(|_| Err(anyhow!("a thread has failed")))
}

/// Writes a line to standard output. Ignores errors: if the reader is gone, the work continues.
fn print_line(line: &str) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// Writes a line to standard error, as [`print_line`].
fn eprint_line(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Returns text from a file or a server with its control characters escaped, so that it cannot control the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|char| {
            let escaped = char.is_control().then(|| char.escape_default());
            let plain = escaped.is_none().then_some(char);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}
