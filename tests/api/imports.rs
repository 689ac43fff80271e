//! `ImportService`: the issues that a file creates, and the responses of the import stream.

/// A query that compares the number of advisory locks. The server holds one for each import in progress.
macro_rules! import_locks {
    ($compare:literal) => {
        concat!(
            "SELECT count(*) ",
            $compare,
            " FROM pg_locks l JOIN pg_database d ON d.oid = l.database
            WHERE locktype = 'advisory' AND datname = current_database()"
        )
    };
}

mod existing;
mod interruptions;
mod label_limit;
mod mapping;
mod records;
mod repeated_interruptions;
mod resume;
mod retention;
mod revert;
mod revocation;
mod rows;
mod single_transaction;
mod stream;

use std::collections::BTreeMap;

use issue_tracker::pb::{
    GetImportRequest, GetIssueRequest, ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportMode,
    ImportOptions, ImportProgress, ImportRowError, ImportState, ImportSummary, Issue, ListImportErrorsRequest,
    ListIssuesRequest, OnExisting, Priority, RevertImportRequest, RevertImportResponse, Role, Status as IssueStatus,
    import_issues_request, import_issues_response::Message,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

use crate::{
    harness::{Client, Tracker, assert_error},
    labels::deletion::mark,
};

/// A complete import: its options, its file and the chunks it is sent in.
#[derive(Clone)]
struct Import {
    options: ImportOptions,
    file: Vec<u8>,
    /// The offsets at which all chunks but the first begin.
    chunk_offsets: Vec<usize>,
}

/// Returns an ATOMIC import of this file in chunks of 1 MiB.
fn import(file: impl Into<Vec<u8>>) -> Import {
    let file = file.into();
    let options = ImportOptions { total_bytes: file.len() as i64, ..Default::default() };
    let chunk_offsets = (0..file.len()).step_by(1024 * 1024).skip(1).collect();
    Import { options, file, chunk_offsets }
}

impl Import {
    fn skip_invalid(mut self) -> Self {
        self.options.mode = ImportMode::SkipInvalid.into();
        self
    }

    fn validate_only(mut self) -> Self {
        self.options.validate_only = true;
        self
    }

    fn update(mut self) -> Self {
        self.options.on_existing = OnExisting::Update.into();
        self
    }

    fn skip_existing(mut self) -> Self {
        self.options.on_existing = OnExisting::Skip.into();
        self
    }

    /// Changes the options.
    fn with(mut self, change: impl FnOnce(&mut ImportOptions)) -> Self {
        change(&mut self.options);
        self
    }

    fn id(mut self, id: Uuid) -> Self {
        self.options.import_id = id.to_string();
        self
    }

    fn chunks_at(mut self, offsets: impl IntoIterator<Item = usize>) -> Self {
        self.chunk_offsets = offsets.into_iter().collect();
        self
    }

    /// Sends the import in one stream and returns its responses.
    async fn by(self, client: &Client) -> Result<Responses, Status> {
        let mut messages = vec![options(self.options)];
        let mut begin = 0;
        for end in self.chunk_offsets.into_iter().chain([self.file.len()]) {
            messages.push(chunk(begin as i64, self.file[begin..end].to_vec()));
            begin = end;
        }
        send(client, messages).await
    }

    /// Runs [`Import::by`] in a task.
    fn spawn_by(self, client: &Client) -> JoinHandle<Result<Responses, Status>> {
        let client = client.clone();
        tokio::spawn(async move { self.by(&client).await })
    }
}

/// All responses of an import stream that ended OK.
#[derive(Debug, Default, PartialEq)]
struct Responses {
    progress: Vec<ImportProgress>,
    errors: Vec<ImportRowError>,
    summary: ImportSummary,
}

impl Responses {
    /// Returns the state and the numbers of rows, created issues, rejected rows and errors.
    fn counts(&self) -> (ImportState, i64, i64, i64, i64) {
        let summary = &self.summary;
        (summary.state(), summary.row_count, summary.created_count, summary.rejected_count, summary.error_count)
    }

    /// Returns the numbers of created, updated, skipped and rejected rows.
    fn outcome(&self) -> (i64, i64, i64, i64) {
        let summary = &self.summary;
        (summary.created_count, summary.updated_count, summary.skipped_count, summary.rejected_count)
    }

    /// Returns the responses of a dry run with the import id of the real import, and the state COMMITTED for VALIDATED.
    fn normalized_to(mut self, real: &Responses) -> Self {
        if self.summary.state() == ImportState::Validated {
            self.summary.state = ImportState::Committed.into();
        }
        self.summary.import_id = real.summary.import_id.clone();
        for progress in &mut self.progress {
            progress.import_id = real.summary.import_id.clone();
        }
        self
    }

    /// Leaves out all progress between the first and the last: a dry run receives the file before it checks rows.
    fn without_intermediate_progress(mut self) -> Self {
        let last = self.progress.split_off(1).pop();
        self.progress.extend(last);
        self
    }

    /// Returns row number and code of each error.
    fn codes(&self) -> Vec<(i64, &str)> {
        self.errors.iter().map(|error| (error.row_number, error.code.as_str())).collect()
    }
}

fn options(options: ImportOptions) -> ImportIssuesRequest {
    ImportIssuesRequest { message: Some(import_issues_request::Message::Options(options)) }
}

fn chunk(offset: i64, data: impl Into<Vec<u8>>) -> ImportIssuesRequest {
    let chunk = ImportChunk { offset, data: data.into().into() };
    ImportIssuesRequest { message: Some(import_issues_request::Message::Chunk(chunk)) }
}

/// Sends these messages, half-closes the stream, and reads the responses.
async fn send(client: &Client, messages: Vec<ImportIssuesRequest>) -> Result<Responses, Status> {
    let stream = client.imports().import_issues(tokio_stream::iter(messages)).await?.into_inner();
    read(stream).await
}

async fn read(mut stream: Streaming<ImportIssuesResponse>) -> Result<Responses, Status> {
    let mut responses = Responses::default();
    let mut summaries = 0;
    while let Some(ImportIssuesResponse { message }) = stream.message().await? {
        assert_eq!(summaries, 0, "the summary is the last message");
        match message.expect("the message is set") {
            Message::Progress(progress) => responses.progress.push(progress),
            Message::RowError(error) => responses.errors.push(error),
            Message::Summary(summary) => {
                summaries += 1;
                responses.summary = summary;
            }
        }
    }
    assert_eq!(summaries, 1, "a stream that ends OK ends with a summary");
    Ok(responses)
}

/// An import stream to which the test sends single messages. Dropping `requests` half-closes it.
struct OpenImport {
    first: ImportProgress,
    requests: mpsc::Sender<ImportIssuesRequest>,
    responses: Streaming<ImportIssuesResponse>,
}

/// Opens an import stream and waits for its first response: the server has then locked the import.
async fn open(client: &Client, opts: ImportOptions) -> OpenImport {
    let (requests, stream) = mpsc::channel(16);
    requests.send(options(opts)).await.unwrap();
    let responses = client.imports().import_issues(ReceiverStream::new(stream)).await.unwrap();
    let mut responses = responses.into_inner();
    let first = responses.message().await.unwrap().unwrap();
    let Some(Message::Progress(first)) = first.message else { panic!("{first:?}") };
    OpenImport { first, requests, responses }
}

/// Resumes the import: sends the file from the committed offset on.
async fn resume(client: &Client, import: &Import) -> Result<Responses, Status> {
    let open = open(client, import.options.clone()).await;
    let offset = open.first.committed_offset;
    for (nth, data) in import.file[offset as usize..].chunks(1024 * 1024).enumerate() {
        open.send(chunk(offset + (nth * 1024 * 1024) as i64, data)).await;
    }
    open.finish().await
}

async fn get_import(client: &Client, id: &str) -> Result<issue_tracker::pb::Import, Status> {
    Ok(client.imports().get_import(GetImportRequest { id: id.to_owned() }).await?.into_inner())
}

/// Returns all stored errors of an import, page by page.
async fn stored_errors(client: &Client, import_id: &str) -> Vec<ImportRowError> {
    let mut errors = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListImportErrorsRequest { import_id: import_id.to_owned(), page_size: 1_000, page_token };
        let page = client.imports().list_import_errors(request).await.unwrap().into_inner();
        errors.extend(page.errors);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return errors;
        }
    }
}

async fn revert(client: &Client, import_id: &str, force: bool) -> Result<RevertImportResponse, Status> {
    let request = RevertImportRequest { import_id: import_id.to_owned(), force, ..Default::default() };
    Ok(client.imports().revert_import(request).await?.into_inner())
}

/// Returns all issues as text, without ids and without times from 2025 on, which the server set.
async fn issue_rows(tracker: &Tracker) -> Vec<String> {
    const SQL: &str = "SELECT jsonb_build_array(i.title, i.description, i.status, i.priority, a.username, r.username,
            i.external_id, i.version, i.reopen_count, i.close_time IS NULL, i.delete_time IS NULL,
            CASE WHEN i.create_time < '2025-01-01' THEN i.create_time END,
            CASE WHEN i.close_time < '2025-01-01' THEN i.close_time END,
            (SELECT array_agg(l.name ORDER BY lower(l.name)) FROM issue_labels il JOIN labels l ON l.id = il.label_id
                WHERE il.issue_id = i.id),
            (SELECT jsonb_agg(jsonb_build_array(e.version, e.field,
                    CASE e.field WHEN 'label' THEN '' ELSE e.old_value END,
                    CASE e.field WHEN 'label' THEN '' ELSE e.new_value END) ORDER BY e.version, e.field)
                FROM issue_events e WHERE e.issue_id = i.id AND e.field <> 'assignee_id'))::text
        FROM issues i JOIN users r ON r.id = i.reporter_id LEFT JOIN users a ON a.id = i.assignee_id ORDER BY 1";
    tracker.sql(SQL, &[]).await.iter().map(|row| row.get(0)).collect()
}

impl OpenImport {
    /// Cancels the call, which resets the stream.
    fn cancel(self) {
        drop(self.responses);
        drop(self.requests);
    }

    async fn send(&self, message: ImportIssuesRequest) {
        self.requests.send(message).await.unwrap();
    }

    async fn finish(self) -> Result<Responses, Status> {
        drop(self.requests);
        read(self.responses).await
    }
}

/// Returns a file with the titles `issue 1`, `issue 2` …
fn titles(rows: usize) -> String {
    (1..=rows).fold("title\n".to_owned(), |file, row| file + &format!("issue {row}\n"))
}

/// Returns up to 1,000 issues by title.
async fn issues(tracker: &Tracker) -> BTreeMap<String, Issue> {
    let request = ListIssuesRequest { page_size: 1_000, ..Default::default() };
    let issues = tracker.viewer.issues().list_issues(request).await.unwrap().into_inner().issues;
    issues.into_iter().map(|issue| (issue.title.clone(), issue)).collect()
}

async fn delete_all_issues_and_imports(tracker: &Tracker) {
    tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
}

async fn issue_count(tracker: &Tracker) -> i64 {
    tracker.count("SELECT count(*) FROM issues").await
}

/// Inserts an issue with the external id `X-1` and returns the session, whose transaction is open.
async fn hold_external_id(tracker: &Tracker) -> tokio_postgres::Client {
    let other = tracker.session().await;
    let insert = format!(
        "BEGIN; INSERT INTO issues (id, reporter_id, status, priority, title, description, external_id)
         VALUES (gen_random_uuid(), '{}', 1, 0, 'theirs', '', 'X-1')",
        tracker.member.user.id
    );
    other.batch_execute(&insert).await.unwrap();
    other
}

#[tokio::test]
async fn quoted_fields_and_enum_names_in_any_case_are_imported() {
    let tracker = Tracker::start().await;
    let file = "title,description,priority,status\n\
        crash on start,\"says: \"\"no\"\"\nthen, nothing\",high,open\n\
        typo,,,\n\
        old,gone,LOW,Closed\n";

    let responses = import(file).by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 3, 3, 0, 0));
    assert_eq!(responses.summary.byte_count, file.len() as i64);
    let issues = issues(&tracker).await;
    let shown: Vec<_> = issues.values().map(|i| (&*i.title, &*i.description, i.priority(), i.status())).collect();
    assert_eq!(
        shown,
        [
            ("crash on start", "says: \"no\"\nthen, nothing", Priority::High, IssueStatus::Open),
            ("old", "gone", Priority::Low, IssueStatus::Closed),
            ("typo", "", Priority::Unspecified, IssueStatus::Open),
        ]
    );
    assert!(issues["old"].close_time.is_some());
}

#[tokio::test]
async fn header_names_may_have_any_order_case_and_surrounding_space() {
    let tracker = Tracker::start().await;
    let (bug, ui) = (tracker.member.label("Bug").await, tracker.member.label("ui").await);
    let file = "\u{feff}LABELS, Assignee ,external_id,close_time,create_time,Status,priority,title,description\r\n\
        ui; bug ;UI,VIEWER,JIRA-7,2024-05-18T09:00:00.123456+02:00,2024-05-17T08:30:00Z,STATUS_CLOSED,PRIORITY_critical,crash,why\r\n";

    let responses = import(file).by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 1, 1, 0, 0), "{responses:?}");
    let issue = issues(&tracker).await.remove("crash").unwrap();
    assert_eq!(issue.labels, [bug, ui]);
    assert_eq!(issue.assignee_id, tracker.viewer.user.id);
    assert_eq!(issue.external_id, "JIRA-7");
    assert_eq!((issue.status(), issue.priority()), (IssueStatus::Closed, Priority::Critical));
    assert_eq!(issue.description, "why");
    assert_eq!(issue.create_time.unwrap().to_string(), "2024-05-17T08:30:00Z");
    assert_eq!(issue.close_time.unwrap().to_string(), "2024-05-18T07:00:00.123456Z");
}

#[tokio::test]
async fn imported_issues_are_listed_by_their_create_time() {
    let tracker = Tracker::start().await;
    tracker.member.file("created now").await;
    let file =
        "title,create_time\nmiddle,2020-06-01T00:00:00Z\noldest,1999-01-01T00:00:00Z\nlate,2021-01-01T00:00:00Z\n";

    import(file).by(&tracker.member).await.unwrap();

    let listed = tracker.viewer.issues().list_issues(ListIssuesRequest::default()).await.unwrap().into_inner();
    let listed: Vec<_> = listed.issues.iter().map(|issue| issue.title.as_str()).collect();
    assert_eq!(listed, ["created now", "late", "middle", "oldest"]);
}

#[tokio::test]
async fn imported_issue_has_the_caller_as_reporter_version_1_and_no_history() {
    let tracker = Tracker::start().await;

    import("title\nimported\n").by(&tracker.member).await.unwrap();

    let listed = issues(&tracker).await.remove("imported").unwrap();
    assert_eq!((listed.version, &listed.reporter_id), (1, &tracker.member.user.id));
    let request = GetIssueRequest { id: listed.id.clone(), ..Default::default() };
    assert_eq!(tracker.viewer.issues().get_issue(request).await.unwrap().into_inner(), listed);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 0);
}

#[tokio::test]
async fn rejected_atomic_import_can_be_corrected_under_the_same_id() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    let file = "title,status\ngood,open\nbad,opne\ngood too,closed\n";

    let rejected = import(file).id(id).by(&tracker.member).await.unwrap();

    assert_eq!(rejected.counts(), (ImportState::Rejected, 3, 0, 1, 1));
    assert_eq!(rejected.codes(), [(2, "INVALID_STATUS")]);
    assert_eq!(issue_count(&tracker).await, 0);

    let corrected = import(file.replace("opne", "open")).id(id).by(&tracker.member).await.unwrap();
    assert_eq!(corrected.counts(), (ImportState::Committed, 3, 3, 0, 0));
    assert_eq!(issue_count(&tracker).await, 3);
}

#[tokio::test]
async fn skip_invalid_imports_valid_rows_and_reports_invalid_ones_in_order() {
    let tracker = Tracker::start().await;
    // The database finds unknown assignees, after the parser has found the other errors.
    let file = "title,status,assignee\na,open,\nb,open,absent\nc,opne,\n,opne,\ne,closed,member\nf,,absent\n";

    let responses = import(file).skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 6, 2, 4, 5));
    let codes = [
        (2, "UNKNOWN_ASSIGNEE"),
        (3, "INVALID_STATUS"),
        (4, "REQUIRED"),
        (4, "INVALID_STATUS"),
        (6, "UNKNOWN_ASSIGNEE"),
    ];
    assert_eq!(responses.codes(), codes);
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["a", "e"]);
}

#[tokio::test]
async fn dry_run_has_the_responses_of_the_real_import_and_writes_nothing() {
    let tracker = Tracker::start().await;
    tracker.member.label("bug").await;
    let good = "title,labels,external_id\na,bug,1\nb,,2\n";
    let bad = "title,labels,external_id\na,bug,1\nb,feature,2\nc,,1\n,,\n";
    for import in [import(good), import(bad), import(good).skip_invalid(), import(bad).skip_invalid()] {
        let dry_run = import.clone().validate_only().by(&tracker.member).await.unwrap();
        assert_eq!(issue_count(&tracker).await, 0);
        assert_eq!(tracker.count("SELECT count(*) FROM imports").await, 0);

        let real = import.by(&tracker.member).await.unwrap();

        let dry_run = dry_run.normalized_to(&real).without_intermediate_progress();
        assert_eq!(dry_run, real.without_intermediate_progress());
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn import_can_follow_its_dry_run_under_the_same_id() {
    let tracker = Tracker::start().await;
    let import = import("title\na\n").id(Uuid::now_v7());

    let dry_run = import.clone().validate_only().by(&tracker.member).await.unwrap();
    let real = import.by(&tracker.member).await.unwrap();

    assert_eq!(dry_run.counts(), (ImportState::Validated, 1, 1, 0, 0));
    assert_eq!(real.counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(issue_count(&tracker).await, 1);
}

#[tokio::test]
async fn first_1000_errors_are_sent_and_all_are_counted() {
    let tracker = Tracker::start().await;
    // Two errors per row, and more rows than one batch of 5,000.
    let file = "title,status,priority\n".to_owned() + &"x,opne,hihg\n".repeat(6_000) + "good,open,high\n";

    let responses = import(file).skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(responses.errors.len(), 1_000);
    assert_eq!(responses.errors.last().map(|error| (error.row_number, &*error.code)), Some((500, "INVALID_STATUS")));
    assert_eq!(responses.counts(), (ImportState::Committed, 6_001, 1, 6_000, 12_000));
    assert_eq!(issue_count(&tracker).await, 1);
}

#[tokio::test]
async fn progress_grows_to_the_end_of_the_file() {
    let tracker = Tracker::start().await;
    let file = titles(12_000);

    let responses = import(&*file).skip_invalid().by(&tracker.member).await.unwrap();

    let progress: Vec<_> = responses.progress.iter().map(|p| (p.row_count, p.offset, p.rejected_count)).collect();
    assert_eq!(progress.iter().map(|p| p.0).collect::<Vec<_>>(), [0, 5_000, 10_000, 12_000]);
    assert!(progress.is_sorted(), "{progress:?}");
    assert_eq!(progress.last(), Some(&(12_000, file.len() as i64, 0)));
    assert!(responses.progress.iter().all(|p| p.import_id == responses.summary.import_id));
}

#[tokio::test]
async fn chunk_boundaries_do_not_affect_the_import() {
    let tracker = Tracker::start().await;
    let mut file = "\u{feff}title,description,status\r\n".to_owned();
    for row in 0..200 {
        file += &match row % 5 {
            0 => format!("t{row},\"é \"\"quoted\"\"\r\nsecond, line\",open\r\n"),
            1 => format!("t{row},ü,closed\r\n\r\n"),
            2 => format!("t{row},x,opne\n"),
            3 => format!("t{row},too,many,fields\r"),
            _ => format!("\"t{row}\",,IN_PROGRESS\r\n"),
        };
    }
    let mut single_chunk = import(&*file).skip_invalid().by(&tracker.member).await.unwrap();
    assert_eq!(single_chunk.counts(), (ImportState::Committed, 200, 120, 80, 80));
    let contents = |issues: BTreeMap<String, Issue>| -> Vec<_> {
        issues.into_values().map(|issue| (issue.title, issue.description, issue.status)).collect()
    };
    let rows = contents(issues(&tracker).await);

    for seed in 1..=4_usize {
        delete_all_issues_and_imports(&tracker).await;
        // Chunks of 1 to 40 bytes, in a different sequence for each seed.
        let sizes = (0_usize..).map(|n| 1 + (n * n * 7 + n * seed * 13) % (seed * 10));
        let offsets = sizes.scan(0, |at, size| {
            *at += size;
            Some(*at)
        });
        let import = import(&*file).skip_invalid().chunks_at(offsets.take_while(|offset| *offset < file.len()));
        let chunked = import.by(&tracker.member).await.unwrap();
        single_chunk.summary.import_id = chunked.summary.import_id.clone();
        assert_eq!((&chunked.errors, &chunked.summary), (&single_chunk.errors, &single_chunk.summary), "seed {seed}");
        assert_eq!(contents(issues(&tracker).await), rows, "seed {seed}");
    }
}

#[tokio::test]
async fn viewers_cannot_import() {
    let tracker = Tracker::start().await;

    let refused = import("title\na\n").by(&tracker.viewer).await;

    assert_error(refused, Code::PermissionDenied, "PERMISSION_DENIED");
    assert_eq!(issue_count(&tracker).await, 0);
}

#[tokio::test]
async fn imported_issue_can_be_updated() {
    let tracker = Tracker::start().await;
    import("title,status\nimported,closed\n").by(&tracker.member).await.unwrap();
    let issue = issues(&tracker).await.remove("imported").unwrap();

    let reopened = Issue { id: issue.id, status: IssueStatus::Open.into(), ..Default::default() };
    let request =
        issue_tracker::pb::UpdateIssueRequest { issue: Some(reopened), expected_version: 1, ..Default::default() };
    let updated = tracker.member.issues().update_issue(request).await.unwrap().into_inner();

    assert_eq!((updated.version, updated.reopen_count, updated.close_time), (2, 1, None));
}

#[tokio::test]
async fn users_and_labels_created_between_two_imports_are_found() {
    let tracker = Tracker::start().await;
    let file = "title,assignee,labels\na,alice,new\n";
    let before = import(file).skip_invalid().by(&tracker.member).await.unwrap();
    assert_eq!(before.codes(), [(1, "UNKNOWN_ASSIGNEE"), (1, "UNKNOWN_LABEL")]);
    tracker.user("Alice", Role::Viewer).await;
    tracker.member.label("NEW").await;

    let after = import(file).skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(after.counts(), (ImportState::Committed, 1, 1, 0, 0));
}

#[tokio::test]
async fn label_that_is_being_deleted_is_unknown_to_imports() {
    let tracker = Tracker::start().await;
    let label = tracker.member.label("bug").await;
    mark(&tracker, &label.id, 0.0).await;

    let imported = import("title,labels\na,bug\n").skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(imported.codes(), [(1, "UNKNOWN_LABEL")]);
}
