//! `GetImport` and `ListImportErrors`: the state of an import and its stored errors.

use super::{
    interruptions::{Interruption, RawImport},
    *,
};
use crate::harness::assert_invalid;

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

async fn list_errors(
    client: &Client,
    import_id: &str,
    page_size: i32,
    page_token: &str,
) -> Result<(Vec<ImportRowError>, String), Status> {
    let request =
        ListImportErrorsRequest { import_id: import_id.to_owned(), page_size, page_token: page_token.to_owned() };
    let page = client.imports().list_import_errors(request).await?.into_inner();
    Ok((page.errors, page.next_page_token))
}

#[tokio::test]
async fn committed_import_has_its_counts() {
    let tracker = Tracker::start().await;
    import("title,external_id\nold,1\nsame,2\n").by(&tracker.member).await.unwrap();
    let file = "title,external_id\nnew,1\nsame,2\ncreated,3\n,4\n";
    let responses = import(file).skip_invalid().update().by(&tracker.member).await.unwrap();

    let record = get_import(&tracker.member, &responses.summary.import_id).await.unwrap();

    assert_eq!((record.state(), record.mode()), (ImportState::Committed, ImportMode::SkipInvalid));
    assert_eq!((&record.id, &record.caller_id), (&responses.summary.import_id, &tracker.member.user.id));
    assert_eq!((record.committed_offset, record.total_bytes), (file.len() as i64, file.len() as i64));
    let counts =
        (record.row_count, record.created_count, record.updated_count, record.skipped_count, record.rejected_count);
    assert_eq!((counts, record.error_count), ((4, 1, 1, 1, 1), 1));
    assert!(record.create_time.is_some() && record.finish_time.is_some() && record.revert_time.is_none());
}

#[tokio::test]
async fn rejected_import_has_created_nothing() {
    let tracker = Tracker::start().await;
    let responses = import("title,status\na,open\nb,opne\n").by(&tracker.member).await.unwrap();

    let record = get_import(&tracker.member, &responses.summary.import_id).await.unwrap();

    assert_eq!((record.state(), record.mode()), (ImportState::Rejected, ImportMode::Atomic));
    let counts =
        (record.row_count, record.created_count, record.rejected_count, record.error_count, record.committed_offset);
    assert_eq!(counts, (2, 0, 1, 1, 0));
    assert!(record.finish_time.is_some());
}

#[tokio::test]
async fn running_import_has_its_progress_and_is_interrupted_after_a_disconnect() {
    let tracker = Tracker::start().await;
    for mode in [ImportMode::Atomic, ImportMode::SkipInvalid] {
        let opts = ImportOptions { import_id: new_id(), mode: mode.into(), ..Default::default() };
        let mut raw = RawImport::open(&tracker, opts.clone()).await;
        tracker.wait_until("SELECT count(*) > 0 FROM imports").await;
        let record = get_import(&tracker.member, &opts.import_id).await.unwrap();
        assert_eq!((record.state(), record.row_count), (ImportState::Running, 0), "{mode:?}");

        raw.send(&chunk(0, titles(5_010)));
        tracker.wait_until("SELECT count(*) > 0 FROM imports WHERE row_count = 5000").await;
        let record = get_import(&tracker.member, &opts.import_id).await.unwrap();
        // An atomic import writes no row before the file is complete.
        let (created, committed) =
            if mode == ImportMode::Atomic { (0, 0) } else { (5_000, titles(5_000).len() as i64 - 1) };
        assert_eq!(
            (record.state(), record.row_count, record.created_count),
            (ImportState::Running, 5_000, created),
            "{mode:?}"
        );
        assert_eq!((record.committed_offset, record.finish_time), (committed, None), "{mode:?}");

        raw.interrupt_and_wait(Interruption::Disconnect, &tracker).await;
        let record = get_import(&tracker.member, &opts.import_id).await.unwrap();
        let rows = if mode == ImportMode::Atomic { 0 } else { 5_000 };
        assert_eq!(
            (record.state(), record.row_count, record.created_count),
            (ImportState::Interrupted, rows, rows),
            "{mode:?}"
        );
        assert_eq!(issue_count(&tracker).await, rows, "{mode:?}");
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn get_import_does_not_block_resuming() {
    let tracker = Tracker::start().await;
    let import = import("title\na\n").id(Uuid::now_v7());
    open(&tracker.member, import.options.clone()).await.cancel();
    tracker.wait_until(import_locks!("= 0")).await;

    for _ in 0..20 {
        let call = get_import(&tracker.member, &import.options.import_id);
        let (record, opened) = tokio::join!(call, open(&tracker.member, import.options.clone()));
        assert!([ImportState::Running, ImportState::Interrupted].contains(&record.unwrap().state()));
        opened.cancel();
        tracker.wait_until(import_locks!("= 0")).await;
    }
}

#[tokio::test]
async fn members_read_their_own_imports_and_administrators_all() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Member).await;
    let responses = import("title,status\nb,opne\n").by(&tracker.member).await.unwrap();
    let id = responses.summary.import_id;

    for client in [&tracker.member, &tracker.admin] {
        assert_eq!(get_import(client, &id).await.unwrap().id, id);
        assert_eq!(list_errors(client, &id, 0, "").await.unwrap().0, responses.errors);
    }
    for client in [&other, &tracker.viewer] {
        assert_error(get_import(client, &id).await, Code::PermissionDenied, "PERMISSION_DENIED");
        assert_error(list_errors(client, &id, 0, "").await, Code::PermissionDenied, "PERMISSION_DENIED");
    }
}

#[tokio::test]
async fn missing_import_is_not_found_and_malformed_id_is_invalid() {
    let tracker = Tracker::start().await;
    let dry_run = import("title\n\"\"\n").validate_only().id(Uuid::now_v7());
    dry_run.clone().by(&tracker.member).await.unwrap();

    for id in [new_id(), dry_run.options.import_id] {
        assert_error(get_import(&tracker.member, &id).await, Code::NotFound, "NOT_FOUND");
        assert_error(list_errors(&tracker.member, &id, 0, "").await, Code::NotFound, "NOT_FOUND");
    }
    assert_invalid(get_import(&tracker.member, "1").await, &["id"]);
    assert_invalid(list_errors(&tracker.member, "1", -1, "x").await, &["import_id", "page_size", "page_token"]);
}

#[tokio::test]
async fn errors_are_listed_as_they_were_sent_in_both_modes() {
    let tracker = Tracker::start().await;
    let file = "title,status,assignee\na,open,\nb,open,absent\nc,opne,\n,opne,\n\"ü\n2\",closed,absent\nf,,absent,\n";
    for import in [import(file), import(file).skip_invalid()] {
        let responses = import.by(&tracker.member).await.unwrap();
        assert_eq!(responses.errors.len(), 6);
        assert_eq!(stored_errors(&tracker.member, &responses.summary.import_id).await, responses.errors);
    }
}

#[tokio::test]
async fn errors_are_paged_in_the_order_of_the_file() {
    let tracker = Tracker::start().await;
    let file = "title,status\n".to_owned() + &"x,opne\n".repeat(7);
    let responses = import(file).by(&tracker.member).await.unwrap();
    let id = responses.summary.import_id;

    let mut listed = Vec::new();
    let mut sizes = Vec::new();
    let mut token = String::new();
    loop {
        let (errors, next) = list_errors(&tracker.member, &id, 3, &token).await.unwrap();
        sizes.push(errors.len());
        listed.extend(errors);
        if next.is_empty() {
            break;
        }
        token = next;
    }

    assert_eq!(sizes, [3, 3, 1]);
    assert_eq!(listed, responses.errors);
    assert_eq!(list_errors(&tracker.member, &id, 0, "").await.unwrap().0.len(), 7);
}

#[tokio::test]
async fn page_token_of_another_import_is_invalid() {
    let tracker = Tracker::start().await;
    let file = "title,status\nx,opne\ny,opne\n";
    let [first, second] = [import(file).by(&tracker.member).await, import(file).by(&tracker.member).await]
        .map(|responses| responses.unwrap().summary.import_id);
    let (_, token) = list_errors(&tracker.member, &first, 1, "").await.unwrap();

    assert_invalid(list_errors(&tracker.member, &second, 1, &token).await, &["page_token"]);
    assert_eq!(list_errors(&tracker.member, &first, 1, &token).await.unwrap().0[0].row_number, 2);
}

#[tokio::test]
async fn first_10000_errors_are_stored() {
    let tracker = Tracker::start().await;
    // Two errors per row in three batches, and one error that the database finds in the first row.
    let file = "title,status,priority,assignee\nx,,,absent\n".to_owned() + &"x,opne,hihg,\n".repeat(11_000);
    for import in [import(&*file), import(&*file).skip_invalid()] {
        let responses = import.by(&tracker.member).await.unwrap();
        assert_eq!((responses.errors.len(), responses.summary.error_count), (1_000, 22_001));

        let stored = stored_errors(&tracker.member, &responses.summary.import_id).await;

        assert_eq!(stored.len(), 10_000);
        assert_eq!(stored[..1_000], responses.errors);
        assert_eq!((stored[0].row_number, &*stored[0].code), (1, "UNKNOWN_ASSIGNEE"));
        // Row 1 has one error and rows 2 to 5,000 have two each, which leaves room for one of row 5,001.
        assert_eq!((stored[9_998].row_number, &*stored[9_998].column), (5_000, "status"));
        assert_eq!((stored[9_999].row_number, &*stored[9_999].column), (5_001, "priority"));
    }
}

#[tokio::test]
async fn resending_a_rejected_import_replaces_its_record() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    let first = import("title,status\na,opne\nb,opne\n").id(id).by(&tracker.member).await.unwrap();
    assert_eq!(first.summary.state(), ImportState::Rejected);
    let first_create_time = get_import(&tracker.member, &id.to_string()).await.unwrap().create_time;

    // A file of another size with another error.
    let second = import("title,status\na,open\nb,open\n,open\n").id(id).by(&tracker.member).await.unwrap();

    assert_eq!(second.summary.state(), ImportState::Rejected);
    assert_eq!(stored_errors(&tracker.member, &id.to_string()).await, second.errors);
    let record = get_import(&tracker.member, &id.to_string()).await.unwrap();
    assert_eq!((record.row_count, record.error_count), (3, 1));
    assert_ne!(record.create_time, first_create_time);

    let third = import("title\na\n").id(id).by(&tracker.member).await.unwrap();
    assert_eq!(third.counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(stored_errors(&tracker.member, &id.to_string()).await, []);
    assert_eq!(get_import(&tracker.member, &id.to_string()).await.unwrap().state(), ImportState::Committed);
}

#[tokio::test]
async fn dry_run_of_a_rejected_import_keeps_its_record() {
    let tracker = Tracker::start().await;
    let rejected = import("title,status\na,opne\n").id(Uuid::now_v7());
    rejected.clone().by(&tracker.member).await.unwrap();
    let before = tracker.contents().await;

    let dry_run = import("title,status\na,open\n").with(|options| options.import_id = rejected.options.import_id);
    let dry_run = dry_run.validate_only().by(&tracker.member).await.unwrap();

    assert_eq!(dry_run.summary.state(), ImportState::Validated);
    assert_eq!(tracker.contents().await, before);
}
