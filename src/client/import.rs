//! `issue-tracker import`: sends a file, resumes after interruptions, and reports the result.

use std::{
    collections::{HashMap, HashSet},
    env,
    io::IsTerminal,
    path::Path,
    pin::pin,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use anyhow::{Context, anyhow, bail};
use tonic::Streaming;
use uuid::Uuid;

use super::{
    Ended,
    chunk_stream::ChunkStream,
    connection::{Failure, Server, failure},
    eprint_line, exit_interrupted,
    file_source::FileSource,
    output_file::OutputFile,
    print_line,
    progress::{Position, Progress},
    rejected_rows::write_rows,
    report, report_failure,
    retries::Retries,
    run_in_thread, run_until_interrupted,
};
use crate::{
    backoff::random,
    config::{ImportArgs, ImportModeName, exit_code},
    pb::{
        self, ImportIssuesResponse, ImportOptions, ImportProgress, ImportRowError, ImportState, ImportSummary,
        ListImportErrorsRequest, import_issues_response::Message, import_service_client::ImportServiceClient,
    },
};

/// The numbers of row errors printed without --errors.
const ERRORS_SHOWN_ON_TERMINAL: usize = 20;
const ERRORS_SHOWN: usize = 1_000;
/// The page size of ListImportErrors.
const ERRORS_PAGE_SIZE: i32 = 1_000;

/// Runs the import and returns its exit code: 0, `NEGATIVE` if rows were rejected, `FAILED`, or that of the signal
/// that has interrupted it.
pub async fn import(args: ImportArgs) -> ExitCode {
    let mut import = match Import::new(args) {
        Ok(import) => import,
        Err(error) => return report_failure(&error),
    };
    match run_until_interrupted(import.run()).await {
        Ended::Completed(Ok(code)) => ExitCode::from(code),
        Ended::Completed(Err(error)) => {
            import.progress.clear();
            let code = report_failure(&error);
            if let Some(hint) = import.resume_hint() {
                eprint_line(&hint);
            }
            code
        }
        Ended::Interrupted(number) => {
            import.progress.clear();
            let hint = import.resume_hint().unwrap_or_else(|| "nothing was written; run the command again".to_owned());
            eprint_line(&format!("interrupted\n{hint}"));
            exit_interrupted(number)
        }
    }
}

struct Import {
    args: ImportArgs,
    server: Server,
    options: ImportOptions,
    retries: Retries,
    progress: Progress,
    errors: RowErrors,
    /// Where the server continues after a cut.
    committed_offset: u64,
    /// Whether the server may have started the import, in this process or an earlier one.
    may_have_started: bool,
    /// Whether the last attempt that the server has responded to, in this process or an earlier one, may have sent the whole
    /// file. The import may then be committed even if its summary was not received.
    all_sent: Arc<AtomicBool>,
    /// Whether the server has responded to the current attempt.
    has_response: bool,
    summary: Option<ImportSummary>,
}

impl Import {
    fn new(args: ImportArgs) -> anyhow::Result<Self> {
        let server = Server::new(&args.connection)?;
        let options = options(&args)?;
        Ok(Self {
            server,
            options,
            retries: Retries::new(args.connection.retry_max(), Instant::now()),
            progress: if args.json { Progress::silent("row") } else { Progress::new("row") },
            errors: RowErrors::default(),
            committed_offset: 0,
            may_have_started: args.import_id.is_some(),
            all_sent: Arc::new(AtomicBool::new(args.import_id.is_some())),
            has_response: false,
            summary: None,
            args,
        })
    }

    async fn run(&mut self) -> anyhow::Result<u8> {
        let path = self.args.file.clone();
        let source = run_in_thread(move || FileSource::open(&path)).await?;
        if let Some(size) = source.size().with_context(|| format!("cannot read {}", self.args.file.display()))? {
            self.options.total_bytes = i64::try_from(size)?;
            self.progress.set_total_bytes(size);
        }
        if self.args.validate_only {
            self.progress.set_second_phase("checked");
        } else if self.args.mode == ImportModeName::Atomic {
            self.progress.set_second_phase("written");
        }
        // Before the import: an unwritable path must not fail it afterwards.
        let rejected = match self.args.rejected.clone() {
            Some(path) => {
                let to = path.clone();
                Some((run_in_thread(move || OutputFile::create(&to)).await?, path))
            }
            None => None,
        };
        let stream = ChunkStream::new(source);
        // Opening a pipe may have taken long.
        self.retries = self.new_retries();
        let summary = self.send(&stream).await?;
        self.summary = Some(summary.clone());
        self.progress.finish();
        self.complete_errors(&summary).await;
        self.report(&summary);
        if let Some((output, path)) = rejected {
            self.write_rejected(&summary, stream, output, &path).await?;
        }
        exit_code(&summary)
    }

    fn new_retries(&self) -> Retries {
        Retries::new(self.args.connection.retry_max(), Instant::now())
    }

    /// Retries until the server has sent the summary.
    async fn send(&mut self, stream: &ChunkStream) -> anyhow::Result<ImportSummary> {
        loop {
            let (why, wait) = match self.attempt(stream).await {
                Ok(summary) => return Ok(summary),
                Err(Failure::Final(error)) => {
                    if self.has_response {
                        // The outcome is known: nothing was written but what the checkpoint says.
                        self.all_sent.store(false, Ordering::Relaxed);
                        self.may_have_started = self.committed_offset > 0;
                    }
                    return Err(error);
                }
                Err(Failure::Retryable { why, wait }) => (why, wait),
            };
            let Some(delay) = self.retries.next_delay(wait, random(), Instant::now()) else {
                bail!("{why}; gave up after {} s without progress", self.retries.limit().as_secs());
            };
            self.progress.message(&format!("{why}; retrying in {:.1} s", delay.as_secs_f64()));
            tokio::time::sleep(delay).await;
        }
    }

    async fn attempt(&mut self, stream: &ChunkStream) -> Result<ImportSummary, Failure> {
        self.has_response = false;
        let mut client = ImportServiceClient::new(self.server.connect().await?);
        self.retries.connected();
        let (mut attempt, requests) = stream.requests(self.options.clone(), Arc::clone(&self.all_sent));
        let responses = client.import_issues(self.server.request(requests)).await;
        let mut responses = responses.map_err(|status| failure(&status))?.into_inner();
        let start = match next_response(&mut responses).await? {
            Message::Progress(progress) => progress,
            Message::Summary(summary) => return Ok(summary),
            Message::RowError(_) => {
                return Err(anyhow!("the server has sent a row error before its first progress").into());
            }
        };
        let offset = u64::try_from(start.committed_offset).unwrap_or(0);
        self.may_have_started = true;
        self.has_response = true;
        self.all_sent.store(false, Ordering::Relaxed);
        // Errors of rows that are sent again are reported again.
        self.errors.remove_from(offset);
        self.show_progress(&start);
        let failed = attempt.start(offset);
        let mut failed = pin!(async {
            match failed.await {
                Ok(error) => error,
                Err(_) => std::future::pending().await,
            }
        });
        loop {
            let message = tokio::select! {
                message = next_response(&mut responses) => message?,
                error = &mut failed => {
                    // The server may still commit what it has received.
                    self.has_response = false;
                    let what = format!("cannot read {}", self.args.file.display());
                    return Err(anyhow::Error::new(error).context(what).into());
                }
            };
            match message {
                Message::Progress(progress) => self.show_progress(&progress),
                Message::RowError(error) => {
                    if self.errors.add(error.clone()) && self.args.json {
                        print_line(&report::row_error_json(&error).to_string());
                    }
                }
                Message::Summary(summary) => return Ok(summary),
            }
        }
    }

    fn show_progress(&mut self, progress: &ImportProgress) {
        let count = |value: i64| u64::try_from(value).unwrap_or(0);
        let position = Position {
            bytes: count(progress.offset),
            rows: count(progress.row_count),
            rejected: count(progress.rejected_count),
            processed: count(progress.written_row_count),
        };
        self.committed_offset = count(progress.committed_offset);
        // Rows may be written long after the last byte was received.
        self.retries.reached(position.bytes + position.processed, Instant::now());
        self.progress.update(position);
        if self.args.json {
            print_line(&report::progress_json(progress).to_string());
        }
    }

    fn errors_shown(&self) -> usize {
        match self.args.errors {
            Some(count) => count as usize,
            None if std::io::stdout().is_terminal() => ERRORS_SHOWN_ON_TERMINAL,
            None => ERRORS_SHOWN,
        }
    }

    /// Fetches the errors that the stream has left out: those beyond the first 1,000, and those that an earlier process
    /// has received. The server stores none for a dry run.
    async fn complete_errors(&mut self, summary: &ImportSummary) {
        let all = usize::try_from(summary.error_count).unwrap_or(0);
        let wanted = if self.args.json || self.args.rejected.is_some() { all } else { all.min(self.errors_shown()) };
        if self.errors.list.len() >= wanted || self.options.validate_only {
            return;
        }
        let mut retries = self.new_retries();
        retries.connected();
        loop {
            let (why, wait) = match self.list_errors(wanted).await {
                Ok(list) if list.len() > self.errors.list.len() => {
                    self.errors.list = list;
                    return;
                }
                Ok(_) => return,
                // The report counts the missing errors.
                Err(Failure::Final(error)) => {
                    return self.progress.message(&format!("cannot list the errors: {error:#}"));
                }
                Err(Failure::Retryable { why, wait }) => (why, wait),
            };
            let Some(delay) = retries.next_delay(wait, random(), Instant::now()) else {
                return self.progress.message(&format!("cannot list the errors: {why}"));
            };
            tokio::time::sleep(delay).await;
        }
    }

    async fn list_errors(&self, wanted: usize) -> Result<Vec<ImportRowError>, Failure> {
        let mut client = ImportServiceClient::new(self.server.connect().await?);
        let mut errors = Vec::new();
        let mut request = ListImportErrorsRequest {
            import_id: self.options.import_id.clone(),
            page_size: ERRORS_PAGE_SIZE,
            page_token: String::new(),
        };
        while errors.len() < wanted {
            let page = client.list_import_errors(self.server.request(request.clone())).await;
            let page = page.map_err(|status| failure(&status))?.into_inner();
            errors.extend(page.errors);
            if page.next_page_token.is_empty() {
                break;
            }
            request.page_token = page.next_page_token;
        }
        Ok(errors)
    }

    fn report(&mut self, summary: &ImportSummary) {
        if self.args.json {
            for error in &self.errors.list {
                if self.errors.seen.insert(key(error)) {
                    print_line(&report::row_error_json(error).to_string());
                }
            }
            print_line(&report::summary_json(summary).to_string());
            return;
        }
        let errors = &self.errors.list;
        let shown = errors.len().min(self.errors_shown());
        if shown > 0 {
            print_line(report::table(&errors[..shown]).trim_end());
        }
        let rest = report::rest(shown, errors.len(), summary.error_count.max(0).cast_unsigned());
        if !rest.is_empty() {
            print_line(&rest);
        }
        print_line(&report::outcome(summary));
    }

    async fn write_rejected(
        &self,
        summary: &ImportSummary,
        stream: ChunkStream,
        mut output: OutputFile,
        path: &Path,
    ) -> anyhow::Result<()> {
        let mut offsets: Vec<u64> =
            self.errors.list.iter().filter_map(|error| error.byte_offset.try_into().ok()).collect();
        offsets.sort_unstable();
        offsets.dedup();
        let count = offsets.len();
        let separator = self.options.separator.bytes().next().unwrap_or(b',');
        let source = stream.into_source().await?;
        let what = format!("cannot write {}", path.display());
        run_in_thread(move || {
            write_rows(source, separator, &offsets, &mut output).context(what)?;
            output.finish()
        })
        .await?;
        let all = summary.rejected_count;
        let mut line = format!("{} has {count} of {all} rejected rows", path.display());
        if (count as i64) < all {
            line += "; the positions of the others are unknown";
        }
        if summary.state() == ImportState::Rejected {
            line += "; the other rows were not written either";
        }
        eprint_line(&line);
        Ok(())
    }

    /// Returns how to finish an import that may have been started; `None` if nothing was written.
    fn resume_hint(&self) -> Option<String> {
        if self.summary.is_some() {
            return Some("the import has finished; only its report failed".to_owned());
        }
        let what = match self.args.mode {
            _ if self.args.validate_only => return None,
            ImportModeName::Atomic if self.all_sent.load(Ordering::Relaxed) => {
                "all rows or none may be written; this command completes the import and repeats no row:"
            }
            ImportModeName::SkipInvalid if self.may_have_started => {
                "some rows may be written; this command resumes the import and repeats no row:"
            }
            ImportModeName::Atomic | ImportModeName::SkipInvalid => return None,
        };
        let mut command: Vec<String> = env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        if self.args.import_id.is_none() {
            let after = command.iter().position(|arg| arg == "import").map_or(command.len(), |index| index + 1);
            command.splice(after..after, ["--import-id".to_owned(), self.options.import_id.clone()]);
        }
        let input = if self.args.file == Path::new("-") { "\n(with the same input, from its start)" } else { "" };
        Some(format!("{what}\n  {}{input}", report::command_line(command)))
    }
}

async fn next_response(responses: &mut Streaming<ImportIssuesResponse>) -> Result<Message, Failure> {
    match responses.message().await {
        Ok(Some(ImportIssuesResponse { message: Some(message) })) => Ok(message),
        Ok(Some(_)) => Err(anyhow!("the server has sent a message that this client does not know").into()),
        Ok(None) => Err(Failure::retryable("the stream ended without a summary")),
        Err(status) => Err(failure(&status)),
    }
}

fn exit_code(summary: &ImportSummary) -> anyhow::Result<u8> {
    match summary.state() {
        ImportState::Committed | ImportState::Validated if summary.rejected_count == 0 => Ok(0),
        ImportState::Committed | ImportState::Validated | ImportState::Rejected => Ok(exit_code::NEGATIVE),
        ImportState::Reverted => bail!("--import-id: the import was reverted; expected a new id, or none"),
        ImportState::Unspecified | ImportState::Running | ImportState::Interrupted => {
            bail!("the import has not finished: {}", summary.state().as_str_name())
        }
    }
}

fn options(args: &ImportArgs) -> anyhow::Result<ImportOptions> {
    let mut column_names = HashMap::new();
    for (theirs, column) in &args.map {
        if column_names.insert(theirs.clone(), column.clone()).is_some() {
            bail!("--map: column \"{theirs}\" is mapped twice; expected each column once");
        }
    }
    Ok(ImportOptions {
        import_id: args.import_id.unwrap_or_else(Uuid::now_v7).to_string(),
        mode: pb::ImportMode::from(args.mode).into(),
        validate_only: args.validate_only,
        // Set when the file is opened, if its size is known.
        total_bytes: 0,
        on_existing: pb::OnExisting::from(args.on_existing).into(),
        column_names,
        separator: args.separator.clone().unwrap_or_default(),
        label_separator: args.label_separator.clone().unwrap_or_default(),
        default_status: args.default_status.map_or(pb::Status::Unspecified, Into::into).into(),
        default_priority: args.default_priority.map_or(pb::Priority::Unspecified, Into::into).into(),
        default_assignee: args.default_assignee.clone().unwrap_or_default(),
        ignore_unknown_columns: args.ignore_unknown_columns,
        create_labels: args.create_labels,
    })
}

/// The row errors, without duplicates.
#[derive(Default)]
struct RowErrors {
    list: Vec<ImportRowError>,
    /// All errors ever added, including those removed since.
    seen: HashSet<ErrorKey>,
}

type ErrorKey = (i64, String, String, String);

fn key(error: &ImportRowError) -> ErrorKey {
    (error.byte_offset, error.column.clone(), error.code.clone(), error.value.clone())
}

impl RowErrors {
    /// Adds an error, and returns whether it is new. A server may send an error again after a cut.
    fn add(&mut self, error: ImportRowError) -> bool {
        let is_new = self.seen.insert(key(&error));
        if is_new || !self.list.contains(&error) {
            self.list.push(error);
        }
        is_new
    }

    /// Removes the errors of rows at or after an offset.
    fn remove_from(&mut self, offset: u64) {
        self.list.retain(|error| u64::try_from(error.byte_offset).is_ok_and(|begin| begin < offset));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(byte_offset: i64, value: &str) -> ImportRowError {
        ImportRowError { byte_offset, value: value.to_owned(), ..ImportRowError::default() }
    }

    #[test]
    fn an_error_that_is_sent_again_counts_once() {
        let mut errors = RowErrors::default();
        assert!(errors.add(error(10, "a")) && errors.add(error(10, "b")) && errors.add(error(20, "a")));
        errors.remove_from(20);
        assert!(!errors.add(error(10, "a")), "sent before the cut");
        assert!(!errors.add(error(20, "a")), "sent again after it");
        assert_eq!(errors.list, [error(10, "a"), error(10, "b"), error(20, "a")]);
    }

    #[test]
    fn errors_of_rows_that_are_sent_again_are_removed() {
        let mut errors = RowErrors::default();
        errors.add(error(10, "a"));
        errors.add(error(20, "a"));
        errors.remove_from(20);
        assert_eq!(errors.list, [error(10, "a")]);
    }

    #[test]
    fn exit_code_is_1_with_rejected_rows_and_0_without() {
        let code = |state: ImportState, rejected_count| {
            exit_code(&ImportSummary { state: state.into(), rejected_count, ..ImportSummary::default() }).ok()
        };
        assert_eq!(code(ImportState::Committed, 0), Some(0));
        assert_eq!(code(ImportState::Validated, 0), Some(0));
        assert_eq!(code(ImportState::Committed, 1), Some(1));
        assert_eq!(code(ImportState::Validated, 1), Some(1));
        assert_eq!(code(ImportState::Rejected, 1), Some(1));
        assert_eq!(code(ImportState::Reverted, 0), None);
        assert_eq!(code(ImportState::Interrupted, 0), None);
    }
}
