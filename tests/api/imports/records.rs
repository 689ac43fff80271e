//! What is told of imports later: how they stand, and their errors.

use super::{
    interruptions::{Cut, RawImport},
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
async fn a_committed_import_is_told_with_its_counts() {
    let tracker = Tracker::start().await;
    import("title,external_id\nold,1\nsame,2\n").by(&tracker.member).await.unwrap();
    let file = "title,external_id\nnew,1\nsame,2\ncreated,3\n,4\n";
    let answer = import(file).skip_invalid().update().by(&tracker.member).await.unwrap();

    let told = get_import(&tracker.member, &answer.summary.import_id).await.unwrap();

    assert_eq!((told.state(), told.mode()), (ImportState::Committed, ImportMode::SkipInvalid));
    assert_eq!((&told.id, &told.caller_id), (&answer.summary.import_id, &tracker.member.user.id));
    assert_eq!((told.committed_offset, told.total_bytes), (file.len() as i64, file.len() as i64));
    let counts = (told.row_count, told.created_count, told.updated_count, told.skipped_count, told.rejected_count);
    assert_eq!((counts, told.error_count), ((4, 1, 1, 1, 1), 1));
    assert!(told.create_time.is_some() && told.finish_time.is_some() && told.revert_time.is_none());
}

#[tokio::test]
async fn a_rejected_import_is_told_as_that_with_nothing_created() {
    let tracker = Tracker::start().await;
    let answer = import("title,status\na,open\nb,opne\n").by(&tracker.member).await.unwrap();

    let told = get_import(&tracker.member, &answer.summary.import_id).await.unwrap();

    assert_eq!((told.state(), told.mode()), (ImportState::Rejected, ImportMode::Atomic));
    let counts = (told.row_count, told.created_count, told.rejected_count, told.error_count, told.committed_offset);
    assert_eq!(counts, (2, 0, 1, 1, 0));
    assert!(told.finish_time.is_some());
}

#[tokio::test]
async fn how_far_an_import_is_is_told_while_it_runs_and_that_it_was_cut() {
    let tracker = Tracker::start().await;
    for mode in [ImportMode::Atomic, ImportMode::SkipInvalid] {
        let opts = ImportOptions { import_id: new_id(), mode: mode.into(), ..Default::default() };
        let mut raw = RawImport::open(&tracker, opts.clone()).await;
        tracker.wait_until("SELECT count(*) > 0 FROM imports").await;
        let told = get_import(&tracker.member, &opts.import_id).await.unwrap();
        assert_eq!((told.state(), told.row_count), (ImportState::Running, 0), "{mode:?}");

        raw.send(&chunk(0, titles(5_010)));
        tracker.wait_until("SELECT count(*) > 0 FROM imports WHERE row_count = 5000").await;
        let told = get_import(&tracker.member, &opts.import_id).await.unwrap();
        assert_eq!(
            (told.state(), told.row_count, told.created_count),
            (ImportState::Running, 5_000, 5_000),
            "{mode:?}"
        );
        let committed = if mode == ImportMode::Atomic { 0 } else { titles(5_000).len() as i64 - 1 };
        assert_eq!((told.committed_offset, told.finish_time), (committed, None), "{mode:?}");

        raw.cut(Cut::Disconnect, &tracker).await;
        let told = get_import(&tracker.member, &opts.import_id).await.unwrap();
        let rows = if mode == ImportMode::Atomic { 0 } else { 5_000 };
        assert_eq!(
            (told.state(), told.row_count, told.created_count),
            (ImportState::Interrupted, rows, rows),
            "{mode:?}"
        );
        assert_eq!(issue_count(&tracker).await, rows, "{mode:?}");
        tracker.sql("TRUNCATE issues, issue_labels, comments, imports", &[]).await;
    }
}

#[tokio::test]
async fn asking_how_an_import_stands_does_not_keep_it_from_going_on() {
    let tracker = Tracker::start().await;
    let import = import("title\na\n").id(Uuid::now_v7());
    open(&tracker.member, import.options.clone()).await.cut();
    tracker.wait_until(locks!("= 0")).await;

    for _ in 0..20 {
        let asked = get_import(&tracker.member, &import.options.import_id);
        let (told, opened) = tokio::join!(asked, open(&tracker.member, import.options.clone()));
        assert!([ImportState::Running, ImportState::Interrupted].contains(&told.unwrap().state()));
        opened.cut();
        tracker.wait_until(locks!("= 0")).await;
    }
}

#[tokio::test]
async fn members_see_their_own_imports_and_administrators_all() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Member).await;
    let answer = import("title,status\nb,opne\n").by(&tracker.member).await.unwrap();
    let id = answer.summary.import_id;

    for client in [&tracker.member, &tracker.admin] {
        assert_eq!(get_import(client, &id).await.unwrap().id, id);
        assert_eq!(list_errors(client, &id, 0, "").await.unwrap().0, answer.errors);
    }
    for client in [&other, &tracker.viewer] {
        assert_error(get_import(client, &id).await, Code::PermissionDenied, "PERMISSION_DENIED");
        assert_error(list_errors(client, &id, 0, "").await, Code::PermissionDenied, "PERMISSION_DENIED");
    }
}

#[tokio::test]
async fn an_import_that_does_not_exist_is_not_found_and_an_id_that_is_none_is_invalid() {
    let tracker = Tracker::start().await;
    let trial = import("title\n\"\"\n").validate_only().id(Uuid::now_v7());
    trial.clone().by(&tracker.member).await.unwrap();

    for id in [new_id(), trial.options.import_id] {
        assert_error(get_import(&tracker.member, &id).await, Code::NotFound, "NOT_FOUND");
        assert_error(list_errors(&tracker.member, &id, 0, "").await, Code::NotFound, "NOT_FOUND");
    }
    assert_invalid(get_import(&tracker.member, "1").await, &["id"]);
    assert_invalid(list_errors(&tracker.member, "1", -1, "x").await, &["import_id", "page_size", "page_token"]);
}

#[tokio::test]
async fn errors_are_listed_as_they_were_sent_in_both_modes() {
    let tracker = Tracker::start().await;
    let file = "title,status,assignee\na,open,\nb,open,nobody\nc,opne,\n,opne,\n\"ü\n2\",closed,nobody\nf,,nobody,\n";
    for import in [import(file), import(file).skip_invalid()] {
        let answer = import.by(&tracker.member).await.unwrap();
        assert_eq!(answer.errors.len(), 6);
        assert_eq!(kept_errors(&tracker.member, &answer.summary.import_id).await, answer.errors);
    }
}

#[tokio::test]
async fn errors_come_in_pages_in_the_order_of_the_file() {
    let tracker = Tracker::start().await;
    let file = "title,status\n".to_owned() + &"x,opne\n".repeat(7);
    let answer = import(file).by(&tracker.member).await.unwrap();
    let id = answer.summary.import_id;

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
    assert_eq!(listed, answer.errors);
    assert_eq!(list_errors(&tracker.member, &id, 0, "").await.unwrap().0.len(), 7);
}

#[tokio::test]
async fn a_page_token_is_of_one_import() {
    let tracker = Tracker::start().await;
    let file = "title,status\nx,opne\ny,opne\n";
    let [first, second] = [import(file).by(&tracker.member).await, import(file).by(&tracker.member).await]
        .map(|answer| answer.unwrap().summary.import_id);
    let (_, token) = list_errors(&tracker.member, &first, 1, "").await.unwrap();

    assert_invalid(list_errors(&tracker.member, &second, 1, &token).await, &["page_token"]);
    assert_eq!(list_errors(&tracker.member, &first, 1, &token).await.unwrap().0[0].row_number, 2);
}

#[tokio::test]
async fn the_first_ten_thousand_errors_are_kept() {
    let tracker = Tracker::start().await;
    // Two errors a row, in three batches, and one more that the database finds, among the first.
    let file = "title,status,priority,assignee\nx,,,nobody\n".to_owned() + &"x,opne,hihg,\n".repeat(11_000);
    for import in [import(&*file), import(&*file).skip_invalid()] {
        let answer = import.by(&tracker.member).await.unwrap();
        assert_eq!((answer.errors.len(), answer.summary.error_count), (1_000, 22_001));

        let kept = kept_errors(&tracker.member, &answer.summary.import_id).await;

        assert_eq!(kept.len(), 10_000);
        assert_eq!(kept[..1_000], answer.errors);
        assert_eq!((kept[0].row_number, &*kept[0].code), (1, "UNKNOWN_ASSIGNEE"));
        // Rows 2 to 5,000 have two each, and then there is room for one more.
        assert_eq!((kept[9_998].row_number, &*kept[9_998].column), (5_000, "status"));
        assert_eq!((kept[9_999].row_number, &*kept[9_999].column), (5_001, "priority"));
    }
}

#[tokio::test]
async fn a_rejected_file_is_mended_and_sent_again_and_its_record_replaced() {
    let tracker = Tracker::start().await;
    let id = Uuid::now_v7();
    let first = import("title,status\na,opne\nb,opne\n").id(id).by(&tracker.member).await.unwrap();
    assert_eq!(first.summary.state(), ImportState::Rejected);
    let begun = get_import(&tracker.member, &id.to_string()).await.unwrap().create_time;

    // Of another size; still with an error, another one.
    let second = import("title,status\na,open\nb,open\n,open\n").id(id).by(&tracker.member).await.unwrap();

    assert_eq!(second.summary.state(), ImportState::Rejected);
    assert_eq!(kept_errors(&tracker.member, &id.to_string()).await, second.errors);
    let told = get_import(&tracker.member, &id.to_string()).await.unwrap();
    assert_eq!((told.row_count, told.error_count), (3, 1));
    assert_ne!(told.create_time, begun);

    let third = import("title\na\n").id(id).by(&tracker.member).await.unwrap();
    assert_eq!(third.counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(kept_errors(&tracker.member, &id.to_string()).await, []);
    assert_eq!(get_import(&tracker.member, &id.to_string()).await.unwrap().state(), ImportState::Committed);
}

#[tokio::test]
async fn a_trial_of_a_rejected_import_leaves_its_record() {
    let tracker = Tracker::start().await;
    let rejected = import("title,status\na,opne\n").id(Uuid::now_v7());
    rejected.clone().by(&tracker.member).await.unwrap();
    let before = tracker.contents().await;

    let trial = import("title,status\na,open\n").with(|options| options.import_id = rejected.options.import_id);
    let trial = trial.validate_only().by(&tracker.member).await.unwrap();

    assert_eq!(trial.summary.state(), ImportState::Validated);
    assert_eq!(tracker.contents().await, before);
}
