//! Interrupted import streams: reset, as by a client's cancellation or deadline, or lost with the connection.

use std::time::Duration;

use h2::{Reason, SendStream, client::ResponseFuture};

use super::*;
use crate::{
    h2_client::{H2Client, framed},
    harness::limits,
    lock_waiters,
};

/// An import stream of `member` over raw HTTP/2, which a test can interrupt.
pub(super) struct RawImport {
    stream: SendStream<bytes::Bytes>,
    _response: ResponseFuture,
    raw: H2Client,
}

impl RawImport {
    pub(super) async fn open(tracker: &Tracker, opts: ImportOptions) -> Self {
        Self::open_with(tracker, opts, 65_535).await
    }

    /// Opens a stream whose responses have this window.
    pub(super) async fn open_with(tracker: &Tracker, opts: ImportOptions, window_bytes: u32) -> Self {
        let mut raw = H2Client::open_with(tracker, window_bytes).await.unwrap();
        let (response, stream) = raw.begin(tracker, "ImportService/ImportIssues").await.unwrap();
        let mut import = Self { stream, _response: response, raw };
        import.send(&options(opts));
        import
    }

    pub(super) fn send(&mut self, message: &ImportIssuesRequest) {
        self.stream.send_data(framed(message), false).unwrap();
    }

    /// Sends a last message and half-closes the stream.
    pub(super) fn send_last(&mut self, message: &ImportIssuesRequest) {
        self.stream.send_data(framed(message), true).unwrap();
    }
}

/// How a stream is interrupted.
#[derive(Clone, Copy, Debug)]
pub(super) enum Interruption {
    Reset(Reason),
    Disconnect,
}

pub(super) const INTERRUPTIONS: [Interruption; 3] =
    [Interruption::Reset(Reason::CANCEL), Interruption::Reset(Reason::NO_ERROR), Interruption::Disconnect];

impl RawImport {
    /// Interrupts the stream and waits until the server has released the import.
    pub(super) async fn interrupt_and_wait(mut self, interruption: Interruption, tracker: &Tracker) {
        self.interrupt(interruption);
        tracker.wait_until(import_locks!("= 0")).await;
        self.raw.connection.abort();
    }

    fn interrupt(&mut self, interruption: Interruption) {
        match interruption {
            Interruption::Reset(reason) => self.stream.send_reset(reason),
            Interruption::Disconnect => self.raw.connection.abort(),
        }
    }
}

#[tokio::test]
async fn interrupted_atomic_import_writes_nothing_and_can_be_sent_again() {
    let tracker = Tracker::start().await;
    for interruption in INTERRUPTIONS {
        // Without total_bytes, the end of the stream is the end of the file.
        let opts = ImportOptions { import_id: Uuid::now_v7().to_string(), ..Default::default() };
        let mut raw = RawImport::open(&tracker, opts.clone()).await;
        raw.send(&chunk(0, "title\nwhole\nhal"));
        // The server takes the lock before it writes the import record.
        tracker.wait_until("SELECT count(*) = 1 FROM imports").await;

        raw.interrupt_and_wait(interruption, &tracker).await;

        assert_eq!(issue_count(&tracker).await, 0, "{interruption:?}");
        let record = get_import(&tracker.member, &opts.import_id).await.unwrap();
        assert_eq!((record.state(), record.committed_offset), (ImportState::Interrupted, 0), "{interruption:?}");
        let again = send(&tracker.member, vec![options(opts), chunk(0, "title\nwhole\nhalf\n")]).await.unwrap();
        assert_eq!(again.counts(), (ImportState::Committed, 2, 2, 0, 0), "{interruption:?}");
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn interrupted_skip_invalid_import_keeps_whole_batches_and_resumes_after_them() {
    let tracker = Tracker::start().await;
    for interruption in INTERRUPTIONS {
        let import = import(titles(5_003)).skip_invalid().id(Uuid::now_v7()).with(|options| options.total_bytes = 0);
        let mut raw = RawImport::open(&tracker, import.options.clone()).await;
        // One batch, two rows, and the beginning of a third row that would be valid by itself.
        raw.send(&chunk(0, titles(5_002) + "issue 50"));
        tracker.wait_until("SELECT count(*) = 5000 FROM issues").await;

        raw.interrupt_and_wait(interruption, &tracker).await;

        assert_eq!(issue_count(&tracker).await, 5_000, "{interruption:?}");
        let record = get_import(&tracker.member, &import.options.import_id).await.unwrap();
        let committed = titles(5_000).len() as i64 - 1;
        assert_eq!((record.state(), record.row_count), (ImportState::Interrupted, 5_000), "{interruption:?}");
        assert_eq!((record.committed_offset, record.finish_time), (committed, None), "{interruption:?}");
        let again = resume(&tracker.member, &import).await.unwrap();
        let first = &again.progress[0];
        assert!(first.row_count > 5_000, "{interruption:?}: {first:?}");
        assert_eq!(again.counts(), (ImportState::Committed, 5_003, 5_003, 0, 0), "{interruption:?}");
        assert_eq!(tracker.count("SELECT count(DISTINCT title) FROM issues").await, 5_003, "{interruption:?}");
        assert_eq!(issue_count(&tracker).await, 5_003, "{interruption:?}");
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn interrupted_import_that_waits_for_a_lock_is_rolled_back() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "600000"])).await;
    let other = hold_external_id(&tracker).await;
    let opts = ImportOptions { mode: ImportMode::SkipInvalid.into(), ..Default::default() };
    let mut raw = RawImport::open(&tracker, opts).await;
    let rows = (0..5_001).fold("title,external_id\nours,X-1\n".to_owned(), |file, n| file + &format!("issue {n},\n"));
    raw.send(&chunk(0, rows));
    tracker.wait_until(lock_waiters!("> 0")).await;

    raw.stream.send_reset(Reason::CANCEL);
    tracker.wait_until_no_locks().await;

    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(issue_count(&tracker).await, 1);
}

/// Returns a file of one batch that succeeds, one that is blocked by [`hold_external_id`], and more rows than the server
/// reads while it writes a batch.
fn full_pipeline() -> Import {
    let mut file = "title,external_id\n".to_owned();
    file.extend((1..=5_000).map(|n| format!("issue {n},\n")));
    file += "ours,X-1\n";
    file.extend((5_002..=27_000).map(|n| format!("issue {n},\n")));
    import(file).id(Uuid::now_v7()).with(|options| options.total_bytes = 0)
}

/// Starts a tracker whose statement timeout no test reaches.
async fn tracker_without_statement_timeout() -> Tracker {
    Tracker::start_with(limits(&["--statement-ms", "600000"])).await
}

/// Waits until the import is blocked on a lock, and then until the server has read as much as it buffers.
async fn until_pipeline_is_full(tracker: &Tracker) {
    tracker.wait_until(lock_waiters!("> 0")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn interrupted_import_with_full_buffers_is_rolled_back_and_can_be_resumed() {
    let tracker = tracker_without_statement_timeout().await;
    for interruption in INTERRUPTIONS {
        for (import, committed) in [(full_pipeline(), 0), (full_pipeline().skip_invalid(), 5_000)] {
            let other = hold_external_id(&tracker).await;
            let mut raw = RawImport::open(&tracker, import.options.clone()).await;
            // An atomic import writes only complete files.
            match import.options.mode() {
                ImportMode::SkipInvalid => raw.send(&chunk(0, &*import.file)),
                _ => raw.send_last(&chunk(0, &*import.file)),
            }
            until_pipeline_is_full(&tracker).await;

            raw.interrupt(interruption);
            tracker.wait_until_no_locks().await;

            assert_eq!(issue_count(&tracker).await, committed, "{interruption:?}");
            other.batch_execute("ROLLBACK").await.unwrap();
            raw.raw.connection.abort();
            let again = resume(&tracker.member, &import).await.unwrap();
            assert_eq!(again.counts(), (ImportState::Committed, 27_000, 27_000, 0, 0), "{interruption:?}");
            assert_eq!(tracker.count("SELECT count(DISTINCT title) FROM issues").await, 27_000, "{interruption:?}");
            delete_all_issues_and_imports(&tracker).await;
        }
    }
}

/// Blocks the last statement of imports, which deletes the rows of `import_issues` for unchanged issues, until the returned
/// session commits.
async fn block_last_statement(tracker: &Tracker) -> tokio_postgres::Client {
    let other = tracker.session().await;
    let hold = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN PERFORM FROM held FOR SHARE; RETURN NULL; END $$;
        CREATE TRIGGER wait BEFORE DELETE ON import_issues EXECUTE FUNCTION wait();
        CREATE TABLE held (); INSERT INTO held DEFAULT VALUES; BEGIN; SELECT FROM held FOR UPDATE";
    other.batch_execute(hold).await.unwrap();
    other
}

#[tokio::test]
async fn import_interrupted_after_its_last_row_is_not_committed() {
    for import in [import("title,external_id\nours,X-2\n"), import("title,external_id\nours,X-2\n").skip_invalid()] {
        let tracker = tracker_without_statement_timeout().await;
        import.clone().by(&tracker.member).await.unwrap();
        let import = Import { file: b"title,external_id\nours,X-2\nnew,\n".to_vec(), ..import };
        let import = import.skip_existing().id(Uuid::now_v7()).with(|options| options.total_bytes = 0);
        let other = block_last_statement(&tracker).await;
        let mut raw = RawImport::open(&tracker, import.options.clone()).await;
        raw.send_last(&chunk(0, &*import.file));
        tracker.wait_until(lock_waiters!("> 0")).await;

        raw.interrupt(Interruption::Reset(Reason::CANCEL));
        tracker.wait_until_no_locks().await;

        other.batch_execute("COMMIT").await.unwrap();
        assert_eq!(issue_count(&tracker).await, 1, "{:?}", import.options.mode());
        let again = import.by(&tracker.member).await.unwrap();
        assert_eq!(again.outcome(), (1, 0, 1, 0));
        assert_eq!(issue_count(&tracker).await, 2);
    }
}

#[tokio::test]
async fn expired_deadline_rolls_back_the_import() {
    let tracker = tracker_without_statement_timeout().await;
    for (import, committed) in [(full_pipeline(), 0), (full_pipeline().skip_invalid(), 5_000)] {
        let other = hold_external_id(&tracker).await;
        let messages = vec![options(import.options.clone()), chunk(0, &*import.file)];
        let mut request = tonic::Request::new(tokio_stream::iter(messages));
        request.set_timeout(Duration::from_secs(2));
        let responses = tracker.member.imports().import_issues(request).await.unwrap().into_inner();
        tracker.wait_until(lock_waiters!("> 0")).await;

        assert_error(read(responses).await, Code::DeadlineExceeded, "DEADLINE");
        tracker.wait_until_no_locks().await;

        assert_eq!(issue_count(&tracker).await, committed);
        other.batch_execute("ROLLBACK").await.unwrap();
        let again = resume(&tracker.member, &import).await.unwrap();
        assert_eq!(again.counts(), (ImportState::Committed, 27_000, 27_000, 0, 0));
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn half_closed_stream_is_not_an_interruption() {
    let tracker = tracker_without_statement_timeout().await;
    let other = hold_external_id(&tracker).await;
    let import = full_pipeline().spawn_by(&tracker.member);
    until_pipeline_is_full(&tracker).await;

    other.batch_execute("ROLLBACK").await.unwrap();

    assert_eq!(import.await.unwrap().unwrap().counts(), (ImportState::Committed, 27_000, 27_000, 0, 0));
}
