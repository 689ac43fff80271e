//! Imports in one transaction, which are ATOMIC imports and dry runs: they receive the whole file before they lock rows.

use issue_tracker::{
    db::imports::prune_import_staging,
    pb::{CreateIssueRequest, DeleteLabelRequest, UpdateIssueRequest},
};
use tonic::Request;

use super::{
    interruptions::{INTERRUPTIONS, RawImport},
    repeated_interruptions::{Random, mixed_file, start_with_labels},
    *,
};
use crate::{
    harness::{CANCELLED_WITHIN, eventually, limits},
    lock_waiters,
};

const MIB: usize = 1024 * 1024;

/// Returns a request that fails before a wait for a lock does.
fn without_waiting<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CANCELLED_WITHIN);
    request
}

/// Updates the title of the issue with this external id.
async fn update_title(tracker: &Tracker, external_id: &str) -> Result<(), Status> {
    let rows = tracker.sql("SELECT id FROM issues WHERE external_id = $1", &[&external_id]).await;
    let id = rows[0].get::<_, Uuid>(0).to_string();
    let issue = Issue { id, title: "theirs".to_owned(), ..Default::default() };
    // With a comment, the service does not batch it with other updates.
    let request = UpdateIssueRequest { issue: Some(issue), comment: "changed".to_owned(), ..Default::default() };
    tracker.admin.issues().update_issue(without_waiting(request)).await.map(drop)
}

async fn create(tracker: &Tracker, external_id: &str) -> Result<(), Status> {
    let issue = Issue { title: "theirs".to_owned(), external_id: external_id.to_owned(), ..Default::default() };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    tracker.admin.issues().create_issue(without_waiting(request)).await.map(drop)
}

async fn delete_label(tracker: &Tracker, id: String) -> Result<(), Status> {
    let request = DeleteLabelRequest { id, force: true, ..Default::default() };
    tracker.admin.labels().delete_label(without_waiting(request)).await.map(drop)
}

/// Opens the import, sends all but the last byte of its file, and waits until the first batch is received.
async fn trickle(tracker: &Tracker, import: &Import) -> OpenImport {
    let mut open = open(&tracker.member, import.options.clone()).await;
    open.send(chunk(0, &import.file[..import.file.len() - 1])).await;
    let progress = next_progress(&mut open).await;
    assert_eq!((progress.row_count, progress.written_row_count), (5_000, 0));
    open
}

async fn next_progress(open: &mut OpenImport) -> ImportProgress {
    let message = open.responses.message().await.unwrap().unwrap().message;
    let Some(Message::Progress(progress)) = message else { panic!("{message:?}") };
    progress
}

/// Sends the last byte of the file and returns the remaining responses.
async fn finish(open: OpenImport, import: &Import) -> Responses {
    let last = import.file.len() - 1;
    open.send(chunk(last as i64, &import.file[last..])).await;
    open.finish().await.unwrap()
}

/// Returns a file of 5,010 rows with external ids from 1. The first row has a label.
fn labelled_file() -> String {
    let row = |n: usize| format!("ours {n},{n},{}\n", if n == 1 { "bug" } else { "" });
    (1..=5_010).fold("title,external_id,labels\n".to_owned(), |file, n| file + &row(n))
}

#[tokio::test]
async fn trickling_update_locks_nothing() {
    for import in [import(labelled_file()), import(labelled_file()).validate_only()] {
        let tracker = Tracker::start().await;
        let label = tracker.member.label("bug").await;
        let existing = "title,external_id,labels\n1,1,bug\n2,2,\n3,3,\n";
        super::import(existing).by(&tracker.member).await.unwrap();
        let import = import.update().with(|options| options.create_labels = true);
        let open = trickle(&tracker, &import).await;

        update_title(&tracker, "1").await.expect("an issue of the file can be updated");
        update_title(&tracker, "2").await.expect("an issue of the file can be updated");
        create(&tracker, "5").await.expect("an issue with an external id of the file can be created");
        delete_label(&tracker, label.id).await.expect("a label of the file can be deleted");

        let responses = finish(open, &import).await;
        assert_eq!(responses.outcome(), (5_006, 4, 0, 0), "{:?}", responses.summary);
    }
}

#[tokio::test]
async fn trickling_import_of_new_issues_locks_nothing() {
    for import in [import(labelled_file()), import(labelled_file()).validate_only()] {
        let tracker = Tracker::start().await;
        let label = tracker.member.label("bug").await;
        let open = trickle(&tracker, &import).await;

        create(&tracker, "5").await.expect("an issue with an external id of the file can be created");
        delete_label(&tracker, label.id).await.expect("a label of the file can be deleted");

        let responses = finish(open, &import).await;
        assert_eq!(responses.codes(), [(1, "UNKNOWN_LABEL"), (5, "EXTERNAL_ID_TAKEN")]);
        assert_eq!(responses.counts(), (ImportState::Rejected, 5_010, 0, 2, 2));
    }
}

#[tokio::test]
async fn import_holds_no_locks_while_its_responses_are_unread() {
    let tracker = Tracker::start().await;
    // More progress while rows are written than the server buffers; and an import with errors.
    let valid = import("title\n".to_owned() + &"x\n".repeat(60_000)).id(Uuid::now_v7());
    let invalid = import("title,status\n".to_owned() + &"x,opne\n".repeat(6_000)).id(Uuid::now_v7());
    for (import, state) in [(&valid, 1), (&invalid, 2)] {
        let mut raw = RawImport::open_with(&tracker, import.options.clone(), 0).await;
        raw.send_last(&chunk(0, &*import.file));

        let ended =
            format!("SELECT count(*) = 1 FROM imports WHERE state = {state} AND id = '{}'", import.options.import_id);
        tracker.wait_until(&ended).await;
        tracker.wait_until_no_locks().await;
    }
    assert_eq!(issue_count(&tracker).await, 60_000);
}

/// Returns an import of this many rows of about 1 KiB, with external ids from 1.
fn large(rows: usize) -> Import {
    let row = |n: usize| format!("issue {n},{n},{}\n", "x".repeat(1_000));
    import((1..=rows).fold("title,external_id,description\n".to_owned(), |file, n| file + &row(n)))
}

async fn part_count(tracker: &Tracker) -> i64 {
    tracker.count("SELECT count(*) FROM import_staging").await
}

async fn prune(tracker: &Tracker) {
    let db = tracker.db.conn().await.unwrap();
    while prune_import_staging(&db).await.unwrap() > 0 {}
}

/// Opens the import, sends 5 MiB of its file, and waits until parts are stored.
async fn open_and_store_parts(tracker: &Tracker, import: &Import) -> OpenImport {
    let open = open(&tracker.member, import.options.clone()).await;
    for nth in 0..5 {
        open.send(chunk((nth * MIB) as i64, &import.file[nth * MIB..(nth + 1) * MIB])).await;
    }
    tracker.wait_until("SELECT count(*) = 2 FROM import_staging").await;
    open
}

/// Ends the database sessions of imports.
async fn end_sessions(tracker: &Tracker) {
    let end = "SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE locktype = 'advisory' AND datname = current_database()";
    tracker.sql(end, &[]).await;
    tracker.wait_until(import_locks!("= 0")).await;
}

#[tokio::test]
async fn parts_of_an_interrupted_import_are_pruned_and_those_of_a_running_one_are_not() {
    let tracker = Tracker::start().await;
    let interrupted = large(6_000).id(Uuid::now_v7());
    let _open = open_and_store_parts(&tracker, &interrupted).await;
    prune(&tracker).await;
    assert_eq!(part_count(&tracker).await, 2, "the import is running");
    end_sessions(&tracker).await;
    assert_eq!(part_count(&tracker).await, 2);
    let running = import(interrupted.file.clone());
    let open = open(&tracker.member, running.options.clone()).await;

    prune(&tracker).await;

    assert_eq!(part_count(&tracker).await, 0);
    for (nth, data) in running.file.chunks(MIB).enumerate() {
        open.send(chunk((nth * MIB) as i64, data)).await;
        prune(&tracker).await;
    }
    assert_eq!(open.finish().await.unwrap().counts(), (ImportState::Committed, 6_000, 6_000, 0, 0));
    assert_eq!(part_count(&tracker).await, 0);
}

#[tokio::test]
async fn next_run_replaces_the_parts_of_an_interrupted_one() {
    let tracker = Tracker::start().await;
    for import in [large(6_000), large(6_000).validate_only()] {
        let import = import.id(Uuid::now_v7());
        let _open = open_and_store_parts(&tracker, &import).await;
        end_sessions(&tracker).await;
        assert_eq!(part_count(&tracker).await, 2);

        // A dry run of another file, and then the same file.
        let other = super::import(large(7_000).file).validate_only().with(|options| {
            options.import_id = import.options.import_id.clone();
            options.total_bytes = 0;
        });
        let other = other.by(&tracker.member).await.unwrap();
        let again = import.clone().by(&tracker.member).await.unwrap();

        assert_eq!(other.outcome(), (7_000, 0, 0, 0));
        assert_eq!((again.summary.row_count, again.outcome()), (6_000, (6_000, 0, 0, 0)));
        assert_eq!(part_count(&tracker).await, 0);
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn import_interrupted_while_it_receives_or_writes_has_written_nothing() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "600000"])).await;
    for interruption in INTERRUPTIONS {
        for is_complete in [false, true] {
            let import = import([&large(5_500).file[..], b"ours,X-1,\n"].concat());
            let import = import.id(Uuid::now_v7()).with(|options| options.total_bytes = 0);
            let other = hold_external_id(&tracker).await;
            let mut raw = RawImport::open(&tracker, import.options.clone()).await;
            for (nth, data) in import.file.chunks(MIB).enumerate() {
                raw.send(&chunk((nth * MIB) as i64, data));
            }
            tracker.wait_until("SELECT count(*) = 2 FROM import_staging").await;
            if is_complete {
                raw.send_last(&chunk(0, ""));
                tracker.wait_until(lock_waiters!("> 0")).await;
            }

            raw.interrupt_and_wait(interruption, &tracker).await;

            assert_eq!(issue_count(&tracker).await, 0, "{interruption:?}");
            let record = get_import(&tracker.member, &import.options.import_id).await.unwrap();
            assert_eq!((record.state(), record.row_count), (ImportState::Interrupted, 0), "{interruption:?}");
            other.batch_execute("ROLLBACK").await.unwrap();
            let again = import.by(&tracker.member).await.unwrap();
            assert_eq!(again.counts(), (ImportState::Committed, 5_501, 5_501, 0, 0), "{interruption:?}");
            assert_eq!(part_count(&tracker).await, 0, "{interruption:?}");
            delete_all_issues_and_imports(&tracker).await;
        }
    }
}

#[tokio::test]
async fn failed_import_leaves_no_parts() {
    let tracker = Tracker::start().await;
    let truncated = large(6_000).with(|options| options.total_bytes += 1);

    assert_error(truncated.by(&tracker.member).await, Code::InvalidArgument, "IMPORT_TRUNCATED");

    assert_eq!((part_count(&tracker).await, issue_count(&tracker).await), (0, 0));
}

/// Returns random text with all that CSV has to quote, and characters of up to four bytes.
fn random_text(random: &mut Random) -> String {
    const PARTS: [&str; 12] = ["\"", ",", "\r\n", "\n", "\r", "é", "日本", "🦀", "x", " ", "\"\"", ";"];
    (0..random.below(300)).map(|_| PARTS[random.below(PARTS.len())]).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn file_in_several_parts_is_imported_byte_by_byte() {
    let tracker = Tracker::start().await;
    let mut random = Random(11);
    let rows: Vec<_> = (0..16_000).map(|n| (format!("issue {n:05}"), random_text(&mut random))).collect();
    let mut file = "title,description\r\n".to_owned();
    for (title, description) in &rows {
        let end = ["\r\n", "\n", "\r\n\r\n"][random.below(3)];
        file += &format!("{title},\"{}\"{end}", description.replace('"', "\"\""));
    }
    assert!(file.len() > 5 * MIB, "{}", file.len());
    let mut offsets: Vec<_> = (0..60).map(|_| random.below(file.len())).collect();
    offsets.sort_unstable();

    let responses = import(&*file).chunks_at(offsets).by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 16_000, 16_000, 0, 0));
    assert_eq!(responses.summary.byte_count, file.len() as i64);
    let stored = tracker.sql("SELECT title, description FROM issues ORDER BY title", &[]).await;
    for (row, expected) in stored.iter().zip(&rows) {
        assert_eq!((row.get(0), row.get(1)), (expected.0.clone(), expected.1.clone()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn file_in_several_parts_has_the_outcome_of_single_batches() {
    let tracker = start_with_labels().await;
    import(mixed_file(2, 3_000)).skip_invalid().by(&tracker.member).await.unwrap();
    let import = import(mixed_file(3, 60_000)).skip_invalid().update();
    assert!(import.file.len() > 2 * MIB, "{}", import.file.len());

    let dry_run = import.clone().validate_only().by(&tracker.member).await.unwrap();
    let atomic = import.clone().with(|options| options.mode = ImportMode::Atomic.into());
    let atomic = atomic.by(&tracker.member).await.unwrap();
    let atomic_errors = stored_errors(&tracker.member, &atomic.summary.import_id).await;
    let real = import.by(&tracker.member).await.unwrap();

    assert!(real.summary.rejected_count > 500, "{:?}", real.summary);
    assert_eq!(atomic.errors, real.errors);
    assert_eq!(atomic_errors, stored_errors(&tracker.member, &real.summary.import_id).await);
    assert_eq!(atomic.summary.rejected_count, real.summary.rejected_count);
    let dry_run = dry_run.normalized_to(&real).without_intermediate_progress();
    assert_eq!(dry_run, real.without_intermediate_progress());
}

/// Has the first inserts of an issue with the title `conflict` fail as if its external id had just been taken.
async fn fail_inserts(tracker: &Tracker, count: i32) {
    let fail = format!(
        "CREATE SEQUENCE conflicts;
        CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
        BEGIN
            IF NEW.title = 'conflict' AND nextval('conflicts') <= {count} THEN
                RAISE unique_violation USING CONSTRAINT = 'issues_external_id_key';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER conflict BEFORE INSERT ON issues FOR EACH ROW EXECUTE FUNCTION conflict()"
    );
    tracker.session().await.batch_execute(&fail).await.unwrap();
}

#[tokio::test]
async fn conflict_is_retried_from_the_start_of_the_file() {
    for rows in [10, 12_000] {
        let file = String::from_utf8(large(rows).file).unwrap() + "conflict,X-1,\n";
        let with_error = file.replacen("issue 1,1,", ",1,", 1);
        let tracker = Tracker::start().await;
        fail_inserts(&tracker, 2).await;

        let dry_run = import(with_error).skip_invalid().validate_only().by(&tracker.member).await.unwrap();
        tracker.sql("ALTER SEQUENCE conflicts RESTART", &[]).await;
        let real = import(file).by(&tracker.member).await.unwrap();

        let rows = rows as i64;
        assert_eq!(dry_run.codes(), [(1, "REQUIRED")]);
        assert_eq!(dry_run.counts(), (ImportState::Validated, rows + 1, rows, 1, 1));
        assert_eq!(real.counts(), (ImportState::Committed, rows + 1, rows + 1, 0, 0));
        assert_eq!(issue_count(&tracker).await, rows + 1);
    }
}

#[tokio::test]
async fn import_that_conflicts_three_times_is_aborted() {
    let tracker = Tracker::start().await;
    fail_inserts(&tracker, 3).await;
    let file = String::from_utf8(large(6_000).file).unwrap() + "conflict,X-1,\n";
    let import = import(file).id(Uuid::now_v7());

    assert_error(import.clone().by(&tracker.member).await, Code::Aborted, "CONFLICT");

    let record = get_import(&tracker.member, &import.options.import_id).await.unwrap();
    assert_eq!((record.state(), record.row_count), (ImportState::Interrupted, 0));
    assert_eq!((issue_count(&tracker).await, part_count(&tracker).await), (0, 0));
    let again = import.by(&tracker.member).await.unwrap();
    assert_eq!(again.counts(), (ImportState::Committed, 6_001, 6_001, 0, 0));
}

#[tokio::test]
async fn progress_and_record_count_the_rows_received_and_then_the_rows_written() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "600000"])).await;
    let other = hold_external_id(&tracker).await;
    // The database rejects the first row, the parser the last but one. The last one is blocked.
    let mut file = "title,assignee,external_id\nissue,mallory,\n".to_owned();
    file.extend((2..=5_008).map(|n| format!("issue {n},,\n")));
    file += ",,\nissue,,X-1\n";
    let import = import(file).id(Uuid::now_v7());
    let mut open = trickle(&tracker, &import).await;
    let record = async || get_import(&tracker.member, &import.options.import_id).await.unwrap();
    let counts = |record: issue_tracker::pb::Import| (record.row_count, record.created_count, record.rejected_count);

    assert_eq!(record().await.state(), ImportState::Running);
    assert_eq!(counts(record().await), (5_000, 0, 0));
    let last = import.file.len() - 1;
    open.send(chunk(last as i64, &import.file[last..])).await;
    drop(std::mem::replace(&mut open.requests, mpsc::channel(1).0));
    let mut progress = Vec::new();
    for _ in 0..2 {
        let next = next_progress(&mut open).await;
        progress.push((next.offset, next.row_count, next.written_row_count, next.rejected_count));
    }
    let size = import.file.len() as i64;
    assert_eq!(progress, [(size, 5_010, 0, 1), (size, 5_010, 5_000, 2)]);
    tracker.wait_until(lock_waiters!("> 0")).await;
    eventually("the record has the first batch", async || counts(record().await) == (5_010, 4_999, 2)).await;

    other.batch_execute("ROLLBACK").await.unwrap();
    let responses = open.finish().await.unwrap();

    assert_eq!(responses.codes(), [(1, "UNKNOWN_ASSIGNEE"), (5_009, "REQUIRED")]);
    let [end] = &responses.progress[..] else { panic!("{:?}", responses.progress) };
    assert_eq!((end.offset, end.row_count, end.written_row_count, end.rejected_count), (size, 5_010, 5_010, 2));
    assert_eq!(responses.counts(), (ImportState::Rejected, 5_010, 0, 2, 2));
}
