//! Streams that break off: by a reset of the stream, as a client's cancellation or deadline sends it, or with the connection.

use std::time::Duration;

use h2::{Reason, SendStream, client::ResponseFuture};

use super::*;
use crate::{
    h2_client::{H2Client, framed},
    harness::limits,
    lock_waiters,
};

/// A stream of the member's that can be broken off.
pub(super) struct RawImport {
    stream: SendStream<bytes::Bytes>,
    _response: ResponseFuture,
    raw: H2Client,
}

impl RawImport {
    pub(super) async fn open(tracker: &Tracker, opts: ImportOptions) -> Self {
        let mut raw = H2Client::open(tracker).await;
        let (response, stream) = raw.begin(tracker, "ImportService/ImportIssues").await.unwrap();
        let mut import = Self { stream, _response: response, raw };
        import.send(&options(opts));
        import
    }

    pub(super) fn send(&mut self, message: &ImportIssuesRequest) {
        self.stream.send_data(framed(message), false).unwrap();
    }
}

/// How a stream can break off.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    Reset(Reason),
    Disconnect,
}

pub(super) const CUTS: [Cut; 3] = [Cut::Reset(Reason::CANCEL), Cut::Reset(Reason::NO_ERROR), Cut::Disconnect];

impl RawImport {
    /// Returns when the server no longer works on the import.
    pub(super) async fn cut(mut self, cut: Cut, tracker: &Tracker) {
        self.break_off(cut);
        tracker.wait_until(locks!("= 0")).await;
        self.raw.connection.abort();
    }

    fn break_off(&mut self, cut: Cut) {
        match cut {
            Cut::Reset(reason) => self.stream.send_reset(reason),
            Cut::Disconnect => self.raw.connection.abort(),
        }
    }
}

#[tokio::test]
async fn an_atomic_import_that_is_cut_leaves_nothing_and_can_be_sent_again() {
    let tracker = Tracker::start().await;
    for cut in CUTS {
        // The size of the file is not known, so the end of the stream would be the end of the file.
        let opts = ImportOptions { import_id: Uuid::now_v7().to_string(), ..Default::default() };
        let mut raw = RawImport::open(&tracker, opts.clone()).await;
        raw.send(&chunk(0, "title\nwhole\nhal"));
        // It holds its lock before there is a record of it.
        tracker.wait_until("SELECT count(*) = 1 FROM imports").await;

        raw.cut(cut, &tracker).await;

        assert_eq!(issue_count(&tracker).await, 0, "{cut:?}");
        let kept = get_import(&tracker.member, &opts.import_id).await.unwrap();
        assert_eq!((kept.state(), kept.committed_offset), (ImportState::Interrupted, 0), "{cut:?}");
        let again = send(&tracker.member, vec![options(opts), chunk(0, "title\nwhole\nhalf\n")]).await.unwrap();
        assert_eq!(again.counts(), (ImportState::Committed, 2, 2, 0, 0), "{cut:?}");
        tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
    }
}

#[tokio::test]
async fn a_skip_invalid_import_that_is_cut_leaves_whole_batches_and_goes_on_behind_them() {
    let tracker = Tracker::start().await;
    for cut in CUTS {
        let import = import(titles(5_003)).skip_invalid().id(Uuid::now_v7()).with(|options| options.total_bytes = 0);
        let mut raw = RawImport::open(&tracker, import.options.clone()).await;
        // One batch, two rows, and the beginning of a third that would pass for a whole one.
        raw.send(&chunk(0, titles(5_002) + "issue 50"));
        tracker.wait_until("SELECT count(*) = 5000 FROM issues").await;

        raw.cut(cut, &tracker).await;

        assert_eq!(issue_count(&tracker).await, 5_000, "{cut:?}");
        let kept = get_import(&tracker.member, &import.options.import_id).await.unwrap();
        let committed = titles(5_000).len() as i64 - 1;
        assert_eq!((kept.state(), kept.row_count), (ImportState::Interrupted, 5_000), "{cut:?}");
        assert_eq!((kept.committed_offset, kept.finish_time), (committed, None), "{cut:?}");
        let again = go_on(&tracker.member, &import).await.unwrap();
        let first = &again.progress[0];
        assert!(first.row_count > 5_000, "{cut:?}: {first:?}");
        assert_eq!(again.counts(), (ImportState::Committed, 5_003, 5_003, 0, 0), "{cut:?}");
        assert_eq!(tracker.count("SELECT count(DISTINCT title) FROM issues").await, 5_003, "{cut:?}");
        assert_eq!(issue_count(&tracker).await, 5_003, "{cut:?}");
        tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
    }
}

#[tokio::test]
async fn an_import_that_is_cut_while_it_waits_for_a_lock_lets_go_at_once() {
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

/// One batch that goes in, one that waits for [`hold_external_id`], and more than is read while a batch is written.
fn full_pipeline() -> Import {
    let mut file = "title,external_id\n".to_owned();
    file.extend((1..=5_000).map(|n| format!("issue {n},\n")));
    file += "ours,X-1\n";
    file.extend((5_002..=27_000).map(|n| format!("issue {n},\n")));
    import(file).id(Uuid::now_v7()).with(|options| options.total_bytes = 0)
}

/// Nothing ends a statement by itself, so that it is seen who does.
async fn patient_tracker() -> Tracker {
    Tracker::start_with(limits(&["--statement-ms", "600000"])).await
}

/// Waits until a statement has waited for its lock long enough for all that can be read to be read.
async fn until_pipeline_is_full(tracker: &Tracker) {
    tracker.wait_until(lock_waiters!("> 0")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
}

#[tokio::test]
async fn an_import_that_is_cut_while_it_reads_no_further_lets_go_at_once_and_goes_on() {
    let tracker = patient_tracker().await;
    for cut in CUTS {
        for (import, committed) in [(full_pipeline(), 0), (full_pipeline().skip_invalid(), 5_000)] {
            let other = hold_external_id(&tracker).await;
            let mut raw = RawImport::open(&tracker, import.options.clone()).await;
            raw.send(&chunk(0, &*import.file));
            until_pipeline_is_full(&tracker).await;

            raw.break_off(cut);
            tracker.wait_until_no_locks().await;

            assert_eq!(issue_count(&tracker).await, committed, "{cut:?}");
            other.batch_execute("ROLLBACK").await.unwrap();
            raw.raw.connection.abort();
            let again = go_on(&tracker.member, &import).await.unwrap();
            assert_eq!(again.counts(), (ImportState::Committed, 27_000, 27_000, 0, 0), "{cut:?}");
            assert_eq!(tracker.count("SELECT count(DISTINCT title) FROM issues").await, 27_000, "{cut:?}");
            tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
        }
    }
}

/// Keeps imports from their end, where they forget the rows that left issues as they were, until the session is closed.
async fn hold_the_end(tracker: &Tracker) -> tokio_postgres::Client {
    let other = tracker.session().await;
    let hold = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN PERFORM FROM held FOR SHARE; RETURN NULL; END $$;
        CREATE TRIGGER wait BEFORE DELETE ON import_issues EXECUTE FUNCTION wait();
        CREATE TABLE held (); INSERT INTO held DEFAULT VALUES; BEGIN; SELECT FROM held FOR UPDATE";
    other.batch_execute(hold).await.unwrap();
    other
}

#[tokio::test]
async fn an_import_whose_caller_goes_away_after_the_last_row_is_not_committed() {
    for import in [import("title,external_id\nours,X-2\n"), import("title,external_id\nours,X-2\n").skip_invalid()] {
        let tracker = patient_tracker().await;
        import.clone().by(&tracker.member).await.unwrap();
        let import = Import { file: b"title,external_id\nours,X-2\nnew,\n".to_vec(), ..import };
        let import = import.skip_existing().id(Uuid::now_v7()).with(|options| options.total_bytes = 0);
        let other = hold_the_end(&tracker).await;
        let mut raw = RawImport::open(&tracker, import.options.clone()).await;
        raw.stream.send_data(framed(&chunk(0, &*import.file)), true).unwrap();
        tracker.wait_until(lock_waiters!("> 0")).await;

        raw.break_off(Cut::Reset(Reason::CANCEL));
        tracker.wait_until_no_locks().await;

        other.batch_execute("COMMIT").await.unwrap();
        assert_eq!(issue_count(&tracker).await, 1, "{:?}", import.options.mode());
        let again = import.by(&tracker.member).await.unwrap();
        assert_eq!(again.outcome(), (1, 0, 1, 0));
        assert_eq!(issue_count(&tracker).await, 2);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_work_of_an_import_and_not_only_its_answer() {
    let tracker = patient_tracker().await;
    for (import, committed) in [(full_pipeline(), 0), (full_pipeline().skip_invalid(), 5_000)] {
        let other = hold_external_id(&tracker).await;
        let messages = vec![options(import.options.clone()), chunk(0, &*import.file)];
        let mut request = tonic::Request::new(tokio_stream::iter(messages));
        request.set_timeout(Duration::from_secs(2));
        let answers = tracker.member.imports().import_issues(request).await.unwrap().into_inner();
        tracker.wait_until(lock_waiters!("> 0")).await;

        assert_error(read(answers).await, Code::DeadlineExceeded, "DEADLINE");
        tracker.wait_until_no_locks().await;

        assert_eq!(issue_count(&tracker).await, committed);
        other.batch_execute("ROLLBACK").await.unwrap();
        let again = go_on(&tracker.member, &import).await.unwrap();
        assert_eq!(again.counts(), (ImportState::Committed, 27_000, 27_000, 0, 0));
        tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
    }
}

#[tokio::test]
async fn a_caller_that_has_sent_all_is_not_gone() {
    let tracker = patient_tracker().await;
    let other = hold_external_id(&tracker).await;
    let import = tokio::spawn({
        let client = tracker.member.clone();
        async move { full_pipeline().by(&client).await }
    });
    until_pipeline_is_full(&tracker).await;

    other.batch_execute("ROLLBACK").await.unwrap();

    assert_eq!(import.await.unwrap().unwrap().counts(), (ImportState::Committed, 27_000, 27_000, 0, 0));
}
