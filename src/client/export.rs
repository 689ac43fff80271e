//! `issue-tracker export`: writes the exported file to standard output, or to a file that appears when it is complete.

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
    exit_interrupted,
    output_file::OutputFile,
    progress::{Position, Progress},
    report_failure,
    retries::Retries,
    run_until_interrupted,
};
use crate::{
    backoff::random,
    config::ExportArgs,
    pb::{ExportIssuesRequest, issue_service_client::IssueServiceClient},
};

/// Runs the export and returns its exit code: 0, `FAILED`, or that of the signal that has interrupted it.
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
        // A bar would mix with the file on the same terminal.
        let is_mixed = matches!(sink, Sink::Stdout { .. }) && io::stdout().is_terminal();
        let progress = if is_mixed { Progress::silent("issue") } else { Progress::new("issue") };
        Export { server, request, retries, progress, sink }.run().await
    };
    match run_until_interrupted(run).await {
        Ended::Completed(Ok(())) => ExitCode::SUCCESS,
        Ended::Completed(Err(error)) => report_failure(&error),
        Ended::Interrupted(number) => exit_interrupted(number),
    }
}

struct Export {
    server: Server,
    request: ExportIssuesRequest,
    retries: Retries,
    progress: Progress,
    sink: Sink,
}

impl Export {
    /// Retries until the file is complete, each time from the start: an export is one snapshot.
    async fn run(mut self) -> anyhow::Result<()> {
        loop {
            let (why, wait) = match self.attempt().await {
                Ok(()) => break,
                Err(Failure::Final(error)) if is_broken_pipe(&error) => {
                    self.progress.clear();
                    return Ok(());
                }
                Err(Failure::Final(error)) => {
                    self.progress.clear();
                    return Err(error);
                }
                Err(Failure::Retryable { why, wait }) => (why, wait),
            };
            let delay = self.retries.next_delay(wait, random(), Instant::now());
            match (delay, self.sink.restart()?) {
                (Some(delay), true) => {
                    self.progress.message(&format!("{why}; retrying in {:.1} s", delay.as_secs_f64()));
                    tokio::time::sleep(delay).await;
                }
                (Some(_), false) => {
                    self.progress.clear();
                    bail!("{why}; standard output has an incomplete file");
                }
                (None, _) => {
                    self.progress.clear();
                    bail!("{why}; gave up after {} s without progress", self.retries.limit().as_secs());
                }
            }
        }
        self.progress.finish();
        self.sink.finish().await
    }

    async fn attempt(&mut self) -> Result<(), Failure> {
        let mut client = IssueServiceClient::new(self.server.connect().await?);
        self.retries.connected();
        let request = self.server.request(self.request.clone());
        let chunks = client.export_issues(request).await;
        let mut chunks = chunks.map_err(|status| failure(&status))?.into_inner();
        let mut position = Position::default();
        self.retries.reached(0, Instant::now());
        // The stream ends without an error only if the file is complete.
        while let Some(chunk) = chunks.message().await.map_err(|status| failure(&status))? {
            self.sink.write(&chunk.data).await?;
            position.bytes += chunk.data.len() as u64;
            position.rows = u64::try_from(chunk.row_count).unwrap_or(0);
            self.retries.reached(position.bytes, Instant::now());
            self.progress.update(position);
        }
        self.progress.update(position);
        Ok(())
    }
}

/// The destination of the file.
enum Sink {
    Stdout { stdout: tokio::io::Stdout, has_data: bool },
    File { output: OutputFile, path: PathBuf, has_data: bool },
}

impl Sink {
    fn open(path: Option<PathBuf>) -> anyhow::Result<Self> {
        match path {
            None => Ok(Self::Stdout { stdout: tokio::io::stdout(), has_data: false }),
            Some(path) => Ok(Self::File { output: OutputFile::create(&path)?, path, has_data: false }),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        match self {
            Self::Stdout { stdout, has_data } => {
                *has_data = true;
                let written = async {
                    stdout.write_all(bytes).await?;
                    stdout.flush().await
                };
                written.await.context("cannot write to standard output")
            }
            Self::File { output, path, has_data } => {
                *has_data = true;
                output.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))
            }
        }
    }

    /// Discards what was written; returns whether that was possible.
    fn restart(&mut self) -> anyhow::Result<bool> {
        match self {
            Self::Stdout { has_data, .. } => Ok(!*has_data),
            Self::File { has_data: false, .. } => Ok(true),
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
