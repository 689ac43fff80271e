//! `issue-tracker export`: writes what the server streams, to standard output or to a file that is there whole or not at
//! all.

use std::{
    io::{self, ErrorKind, IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use anyhow::{Context, bail};
use tokio::io::AsyncWriteExt;

use super::{
    Ended,
    connection::{Failure, Server, failure},
    end_interrupted, fail,
    output_file::Output,
    progress::{Meter, Position},
    retries::Retries,
    unless_interrupted,
};
use crate::{
    backoff::random,
    config::ExportArgs,
    pb::{ExportIssuesRequest, issue_service_client::IssueServiceClient},
};

pub async fn export(args: ExportArgs) -> ExitCode {
    let path = args.file.filter(|path| path != Path::new("-"));
    let request = ExportIssuesRequest {
        filter: args.filter,
        show_deleted: args.show_deleted,
        escape_formulas: args.escape_formulas,
    };
    let run = async {
        let server = Server::new(&args.connection)?;
        let retries = Retries::new(args.connection.retry_max(), Instant::now());
        let sink = Sink::open(path)?;
        // A bar would stand in the middle of what is written to the same terminal.
        let is_mixed = matches!(sink, Sink::Stdout { .. }) && io::stdout().is_terminal();
        let meter = if is_mixed { Meter::silent("issue") } else { Meter::new("issue") };
        Export { server, request, retries, meter, sink }.run().await
    };
    match unless_interrupted(run).await {
        Ended::ByItself(Ok(())) => ExitCode::SUCCESS,
        Ended::ByItself(Err(error)) => fail(&error),
        Ended::Interrupted(number) => end_interrupted(number),
    }
}

struct Export {
    server: Server,
    request: ExportIssuesRequest,
    retries: Retries,
    meter: Meter,
    sink: Sink,
}

impl Export {
    /// Tries until everything has come, from the start each time: an export is of one instant.
    async fn run(mut self) -> anyhow::Result<()> {
        loop {
            let (why, wait) = match self.try_once().await {
                Ok(()) => break,
                Err(Failure::Final(error)) if is_broken_pipe(&error) => {
                    self.meter.clear();
                    return Ok(());
                }
                Err(Failure::Final(error)) => {
                    self.meter.clear();
                    return Err(error);
                }
                Err(Failure::Passing { why, wait }) => (why, wait),
            };
            let delay = self.retries.next_delay(wait, random(), Instant::now());
            match (delay, self.sink.restart()?) {
                (Some(delay), true) => {
                    self.meter.say(&format!("{why}; trying again in {:.1} s", delay.as_secs_f64()));
                    tokio::time::sleep(delay).await;
                }
                (Some(_), false) => {
                    self.meter.clear();
                    bail!("{why}; what is written is not whole, and cannot be taken back");
                }
                (None, _) => {
                    self.meter.clear();
                    bail!("{why}; given up");
                }
            }
        }
        self.meter.finish();
        self.sink.finish().await
    }

    async fn try_once(&mut self) -> Result<(), Failure> {
        let mut client = IssueServiceClient::new(self.server.connect().await?);
        let request = self.server.request(self.request.clone());
        let mut pieces = client.export_issues(request).await.map_err(|status| failure(&status))?.into_inner();
        let mut position = Position::default();
        self.retries.reached(0, Instant::now());
        // The stream ends without an error only when it is whole.
        while let Some(piece) = pieces.message().await.map_err(|status| failure(&status))? {
            self.sink.write(&piece.data).await?;
            position.bytes += piece.data.len() as u64;
            position.rows = u64::try_from(piece.row_count).unwrap_or(0);
            self.retries.reached(position.bytes, Instant::now());
            self.meter.update(position);
        }
        self.meter.update(position);
        Ok(())
    }
}

/// Where it is written.
enum Sink {
    Stdout { stdout: tokio::io::Stdout, is_begun: bool },
    File { output: Output, path: PathBuf, is_begun: bool },
}

impl Sink {
    fn open(path: Option<PathBuf>) -> anyhow::Result<Self> {
        match path {
            None => Ok(Self::Stdout { stdout: tokio::io::stdout(), is_begun: false }),
            Some(path) => Ok(Self::File { output: Output::create(&path)?, path, is_begun: false }),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Stdout { stdout, is_begun } => {
                *is_begun = true;
                let written = async {
                    stdout.write_all(bytes).await?;
                    stdout.flush().await
                };
                written.await.context("cannot write to standard output")
            }
            Self::File { output, path, is_begun } => {
                *is_begun = true;
                output.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))
            }
        }
    }

    /// Forgets what was written; returns whether that could be done.
    fn restart(&mut self) -> anyhow::Result<bool> {
        match self {
            Self::Stdout { is_begun, .. } => Ok(!*is_begun),
            Self::File { is_begun: false, .. } => Ok(true),
            Self::File { output, path, .. } => {
                output.restart().with_context(|| format!("cannot write {}", path.display()))
            }
        }
    }

    async fn finish(self) -> anyhow::Result<()> {
        match self {
            Self::Stdout { .. } => Ok(()),
            Self::File { output, .. } => output.finish(),
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}
