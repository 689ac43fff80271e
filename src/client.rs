//! The client side of import and export: it talks to whatever server, over gRPC, and needs nothing else of this crate
//! than the messages.

mod chunk_stream;
mod connection;
mod export;
mod file_source;
mod import;
mod output_file;
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

pub use connection::{endpoint, why};
pub use export::export;
pub use import::import;

/// Rows were rejected.
const EXIT_REJECTED: u8 = 1;
/// It did not work; also what clap says of flags that it does not take.
const EXIT_FAILED: u8 = 2;

/// How long work that was interrupted has to come to a point where it can be left.
const INTERRUPTED_WORK_MAX: Duration = Duration::from_secs(1);

/// How a piece of work ended.
enum Ended<T> {
    ByItself(T),
    /// By a signal, of this number.
    Interrupted(i32),
}

/// Works until it is done, or to the first SIGINT or SIGTERM.
async fn unless_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> Ended<anyhow::Result<T>> {
    let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = signals else {
        return Ended::ByItself(Err(anyhow!("cannot listen to signals")));
    };
    let (sender, interrupted) = oneshot::channel();
    tokio::spawn(async move {
        let number = tokio::select! {
            _ = interrupt.recv() => libc::SIGINT,
            _ = terminate.recv() => libc::SIGTERM,
        };
        let _ = sender.send(number);
        // The work may stand in a write to a pipe that nobody reads.
        tokio::time::sleep(INTERRUPTED_WORK_MAX).await;
        end_interrupted(number)
    });
    let work = pin!(work);
    tokio::select! {
        result = work => Ended::ByItself(result),
        Ok(number) = interrupted => Ended::Interrupted(number),
    }
}

/// Ends the program at once, whatever its other threads are waiting for: a pipe that nobody reads, or fills.
fn end_interrupted(number: i32) -> ! {
    std::process::exit(128 + number)
}

fn fail(error: &anyhow::Error) -> ExitCode {
    tell(&format!("issue-tracker: {error:#}"));
    ExitCode::from(EXIT_FAILED)
}

/// Runs what may block for long, in a thread that the program's end does not wait for, as it would for tokio's own.
async fn in_thread<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    let (result, done) = oneshot::channel();
    std::thread::spawn(move || result.send(work()));
    done.await.unwrap_or_else(|_| Err(anyhow!("a thread has failed")))
}

/// Writes a line to standard output. Nobody may be reading it any more; what is being done is done all the same.
fn print(line: &str) {
    let _ = writeln!(io::stdout().lock(), "{line}");
}

/// As [`print`], to standard error.
fn tell(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Text from a file or a server without what would steer a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|char| {
            let escaped = char.is_control().then(|| char.escape_default());
            let plain = escaped.is_none().then_some(char);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}
