//! `issue-tracker import`: sends a file until it is in, through whatever cuts the stream, and tells how it went.

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
    EXIT_REJECTED, Ended,
    chunk_stream::Feeder,
    connection::{Failure, Server, failure},
    end_interrupted, fail,
    file_source::Source,
    in_thread,
    output_file::Output,
    print,
    progress::{Meter, Position},
    rejected_rows::write_rows,
    report,
    retries::Retries,
    tell, unless_interrupted,
};
use crate::{
    backoff::random,
    config::{ImportArgs, ImportModeName},
    pb::{
        self, ImportIssuesResponse, ImportOptions, ImportProgress, ImportRowError, ImportState, ImportSummary,
        ListImportErrorsRequest, import_issues_response::Message, import_service_client::ImportServiceClient,
    },
};

/// Row errors that are shown when nothing else is said.
const ERRORS_SHOWN_ON_TERMINAL: usize = 20;
const ERRORS_SHOWN: usize = 1_000;
/// Errors that one page of the server's list has.
const ERRORS_PAGE: i32 = 1_000;

pub async fn import(args: ImportArgs) -> ExitCode {
    let mut import = match Import::new(args) {
        Ok(import) => import,
        Err(error) => return fail(&error),
    };
    match unless_interrupted(import.run()).await {
        Ended::ByItself(Ok(code)) => ExitCode::from(code),
        Ended::ByItself(Err(error)) => {
            import.meter.clear();
            let code = fail(&error);
            if let Some(how) = import.how_to_go_on() {
                tell(&how);
            }
            code
        }
        Ended::Interrupted(number) => {
            import.meter.clear();
            let how = import.how_to_go_on().unwrap_or_else(|| "nothing was written; run it again".to_owned());
            tell(&format!("interrupted\n{how}"));
            end_interrupted(number)
        }
    }
}

struct Import {
    args: ImportArgs,
    server: Server,
    options: ImportOptions,
    retries: Retries,
    meter: Meter,
    errors: RowErrors,
    /// Where the server has said that it goes on after a cut.
    committed_offset: u64,
    /// Whether the server may have begun to work on it, in this run or one before.
    is_begun: bool,
    /// Whether the last try that the server has answered, here or in a run before, may have sent the whole file: then
    /// the import may be in, whether or not its summary has come.
    all_sent: Arc<AtomicBool>,
    /// Whether the server has answered the present try.
    is_answered: bool,
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
            meter: if args.json { Meter::silent("row") } else { Meter::new("row") },
            errors: RowErrors::default(),
            committed_offset: 0,
            is_begun: args.import_id.is_some(),
            all_sent: Arc::new(AtomicBool::new(args.import_id.is_some())),
            is_answered: false,
            summary: None,
            args,
        })
    }

    async fn run(&mut self) -> anyhow::Result<u8> {
        let path = self.args.file.clone();
        let source = in_thread(move || Source::open(&path)).await?;
        if let Some(size) = source.size().with_context(|| format!("cannot read {}", self.args.file.display()))? {
            self.options.total_bytes = i64::try_from(size)?;
            self.meter.expect(size);
        }
        // Before the import, as it may not be possible.
        let rejected = match self.args.rejected.clone() {
            Some(path) => {
                let to = path.clone();
                Some((in_thread(move || Output::create(&to)).await?, path))
            }
            None => None,
        };
        let feeder = Feeder::new(source);
        // A pipe may have been waited for.
        self.retries = self.new_retries();
        let summary = self.send(&feeder).await?;
        self.summary = Some(summary.clone());
        self.meter.finish();
        self.complete_errors(&summary).await;
        self.report(&summary);
        if let Some((output, path)) = rejected {
            self.write_rejected(&summary, feeder, output, &path).await?;
        }
        exit_code(&summary)
    }

    fn new_retries(&self) -> Retries {
        Retries::new(self.args.connection.retry_max(), Instant::now())
    }

    /// Tries until there is a summary.
    async fn send(&mut self, feeder: &Feeder) -> anyhow::Result<ImportSummary> {
        loop {
            let (why, wait) = match self.try_once(feeder).await {
                Ok(summary) => return Ok(summary),
                Err(Failure::Final(error)) => {
                    if self.is_answered {
                        // There is no doubt any more: what was not committed before is not in.
                        self.all_sent.store(false, Ordering::Relaxed);
                        self.is_begun = self.committed_offset > 0;
                    }
                    return Err(error);
                }
                Err(Failure::Passing { why, wait }) => (why, wait),
            };
            let Some(delay) = self.retries.next_delay(wait, random(), Instant::now()) else {
                bail!("{why}; given up after {} s without progress", self.args.connection.retry_max().as_secs());
            };
            self.meter.say(&format!("{why}; trying again in {:.1} s", delay.as_secs_f64()));
            tokio::time::sleep(delay).await;
        }
    }

    async fn try_once(&mut self, feeder: &Feeder) -> Result<ImportSummary, Failure> {
        self.is_answered = false;
        let mut client = ImportServiceClient::new(self.server.connect().await?);
        let (mut feed, requests) = feeder.requests(self.options.clone(), Arc::clone(&self.all_sent));
        let answers = client.import_issues(self.server.request(requests)).await.map_err(|status| failure(&status))?;
        let mut answers = answers.into_inner();
        let begin = match next_answer(&mut answers).await? {
            Message::Progress(progress) => progress,
            Message::Summary(summary) => return Ok(summary),
            Message::RowError(_) => return Err(anyhow!("the server does not say where to begin").into()),
        };
        let offset = u64::try_from(begin.committed_offset).unwrap_or(0);
        self.is_begun = true;
        self.is_answered = true;
        self.all_sent.store(false, Ordering::Relaxed);
        // What is sent again is told again.
        self.errors.forget_from(offset);
        self.progress(&begin);
        let failed = feed.begin(offset);
        let mut failed = pin!(async {
            match failed.await {
                Ok(error) => error,
                Err(_) => std::future::pending().await,
            }
        });
        loop {
            let message = tokio::select! {
                message = next_answer(&mut answers) => message?,
                error = &mut failed => {
                    // The server may still be at work on what it has got.
                    self.is_answered = false;
                    let what = format!("cannot read {}", self.args.file.display());
                    return Err(anyhow::Error::new(error).context(what).into());
                }
            };
            match message {
                Message::Progress(progress) => self.progress(&progress),
                Message::RowError(error) => {
                    if self.errors.add(error.clone()) && self.args.json {
                        print(&report::row_error_json(&error).to_string());
                    }
                }
                Message::Summary(summary) => return Ok(summary),
            }
        }
    }

    fn progress(&mut self, progress: &ImportProgress) {
        let count = |value: i64| u64::try_from(value).unwrap_or(0);
        self.committed_offset = count(progress.committed_offset);
        self.retries.reached(count(progress.offset), Instant::now());
        self.meter.update(Position {
            bytes: count(progress.offset),
            rows: count(progress.row_count),
            rejected: count(progress.rejected_count),
        });
        if self.args.json {
            print(&report::progress_json(progress).to_string());
        }
    }

    fn errors_shown(&self) -> usize {
        match self.args.errors {
            Some(count) => count as usize,
            None if std::io::stdout().is_terminal() => ERRORS_SHOWN_ON_TERMINAL,
            None => ERRORS_SHOWN,
        }
    }

    /// The stream has the first errors, and those before a cut only if it was ours; the server keeps more, but for a
    /// dry run.
    async fn complete_errors(&mut self, summary: &ImportSummary) {
        let all = usize::try_from(summary.error_count).unwrap_or(0);
        let wanted = if self.args.json || self.args.rejected.is_some() { all } else { all.min(self.errors_shown()) };
        if self.errors.list.len() >= wanted || self.options.validate_only {
            return;
        }
        let mut retries = self.new_retries();
        loop {
            let (why, wait) = match self.list_errors(wanted).await {
                Ok(list) if list.len() > self.errors.list.len() => {
                    self.errors.list = list;
                    return;
                }
                Ok(_) => return,
                // What is not told is counted in the report.
                Err(Failure::Final(error)) => return self.meter.say(&format!("cannot list the errors: {error:#}")),
                Err(Failure::Passing { why, wait }) => (why, wait),
            };
            let Some(delay) = retries.next_delay(wait, random(), Instant::now()) else {
                return self.meter.say(&format!("cannot list the errors: {why}"));
            };
            tokio::time::sleep(delay).await;
        }
    }

    async fn list_errors(&self, wanted: usize) -> Result<Vec<ImportRowError>, Failure> {
        let mut client = ImportServiceClient::new(self.server.connect().await?);
        let mut errors = Vec::new();
        let mut request = ListImportErrorsRequest {
            import_id: self.options.import_id.clone(),
            page_size: ERRORS_PAGE,
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
                if self.errors.told.insert(key(error)) {
                    print(&report::row_error_json(error).to_string());
                }
            }
            print(&report::summary_json(summary).to_string());
            return;
        }
        let errors = &self.errors.list;
        let shown = errors.len().min(self.errors_shown());
        if shown > 0 {
            print(report::table(&errors[..shown]).trim_end());
        }
        let rest = report::rest(shown, errors.len(), summary.error_count.max(0).cast_unsigned());
        if !rest.is_empty() {
            print(&rest);
        }
        print(&report::outcome(summary));
    }

    async fn write_rejected(
        &self,
        summary: &ImportSummary,
        feeder: Feeder,
        mut output: Output,
        path: &Path,
    ) -> anyhow::Result<()> {
        let mut offsets: Vec<u64> =
            self.errors.list.iter().filter_map(|error| error.byte_offset.try_into().ok()).collect();
        offsets.sort_unstable();
        offsets.dedup();
        let count = offsets.len();
        let separator = self.options.separator.bytes().next().unwrap_or(b',');
        let source = feeder.into_source().await?;
        let what = format!("cannot write {}", path.display());
        in_thread(move || {
            write_rows(source, separator, &offsets, &mut output).context(what)?;
            output.finish()
        })
        .await?;
        let all = summary.rejected_count;
        let mut line = format!("{} has {count} of {all} rejected rows", path.display());
        if (count as i64) < all {
            line += ": of the others it is not known where they are";
        }
        if summary.state() == ImportState::Rejected {
            line += "; the rest of the file is not in either";
        }
        tell(&line);
        Ok(())
    }

    /// How to come to an end with an import that was begun; `None` if nothing was written.
    fn how_to_go_on(&self) -> Option<String> {
        if self.summary.is_some() {
            return Some("the import itself has ended; only its report has not".to_owned());
        }
        let what = match self.args.mode {
            _ if self.args.validate_only => return None,
            ImportModeName::Atomic if self.all_sent.load(Ordering::Relaxed) => {
                "all of it may be in, or nothing; this tells, and imports nothing twice:"
            }
            ImportModeName::SkipInvalid if self.is_begun => {
                "some rows may be in; this goes on with the rest, and imports nothing twice:"
            }
            ImportModeName::Atomic | ImportModeName::SkipInvalid => return None,
        };
        let mut command: Vec<String> = env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        if self.args.import_id.is_none() {
            let behind = command.iter().position(|arg| arg == "import").map_or(command.len(), |index| index + 1);
            command.splice(behind..behind, ["--import-id".to_owned(), self.options.import_id.clone()]);
        }
        let input = if self.args.file == Path::new("-") { "\n(with the same input, from its start)" } else { "" };
        Some(format!("{what}\n  {}{input}", report::command_line(command)))
    }
}

async fn next_answer(answers: &mut Streaming<ImportIssuesResponse>) -> Result<Message, Failure> {
    match answers.message().await {
        Ok(Some(ImportIssuesResponse { message: Some(message) })) => Ok(message),
        Ok(Some(_)) => Err(anyhow!("the server says something that this client does not know").into()),
        Ok(None) => Err(Failure::passing("the stream has ended before the import has")),
        Err(status) => Err(failure(&status)),
    }
}

fn exit_code(summary: &ImportSummary) -> anyhow::Result<u8> {
    match summary.state() {
        ImportState::Committed | ImportState::Validated if summary.rejected_count == 0 => Ok(0),
        ImportState::Committed | ImportState::Validated | ImportState::Rejected => Ok(EXIT_REJECTED),
        ImportState::Reverted => bail!("this import was undone; a new --import-id begins another"),
        ImportState::Unspecified | ImportState::Running | ImportState::Interrupted => {
            bail!("the import has not ended: {}", summary.state().as_str_name())
        }
    }
}

fn options(args: &ImportArgs) -> anyhow::Result<ImportOptions> {
    let mut column_names = HashMap::new();
    for (theirs, ours) in &args.map {
        if column_names.insert(theirs.clone(), ours.clone()).is_some() {
            bail!("--map has the column \"{theirs}\" twice");
        }
    }
    Ok(ImportOptions {
        import_id: args.import_id.unwrap_or_else(Uuid::now_v7).to_string(),
        mode: pb::ImportMode::from(args.mode).into(),
        validate_only: args.validate_only,
        // That of a file whose size is known.
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

/// What is wrong with the rows, each error once.
#[derive(Default)]
struct RowErrors {
    list: Vec<ImportRowError>,
    /// All that were ever added, also those that were forgotten since.
    told: HashSet<ErrorKey>,
}

type ErrorKey = (i64, String, String, String);

fn key(error: &ImportRowError) -> ErrorKey {
    (error.byte_offset, error.column.clone(), error.code.clone(), error.value.clone())
}

impl RowErrors {
    /// Returns whether it is new. A server may tell again after a cut.
    fn add(&mut self, error: ImportRowError) -> bool {
        let is_new = self.told.insert(key(&error));
        if is_new || !self.list.contains(&error) {
            self.list.push(error);
        }
        is_new
    }

    fn forget_from(&mut self, offset: u64) {
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
    fn an_error_counts_once_however_often_it_is_told() {
        let mut errors = RowErrors::default();
        assert!(errors.add(error(10, "a")) && errors.add(error(10, "b")) && errors.add(error(20, "a")));
        errors.forget_from(20);
        assert!(!errors.add(error(10, "a")), "before the cut");
        assert!(!errors.add(error(20, "a")), "after it");
        assert_eq!(errors.list, [error(10, "a"), error(10, "b"), error(20, "a")]);
    }

    #[test]
    fn a_row_that_is_good_the_second_time_has_no_error() {
        let mut errors = RowErrors::default();
        errors.add(error(10, "a"));
        errors.add(error(20, "a"));
        errors.forget_from(20);
        assert_eq!(errors.list, [error(10, "a")]);
    }

    #[test]
    fn only_an_import_without_bad_rows_is_a_success() {
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
