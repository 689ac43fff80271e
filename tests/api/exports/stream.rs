//! Readers that are slow, go away or are too many.

use std::{sync::Arc, time::Duration};

use issue_tracker::{
    config::Limits,
    pb::{AddIssueLabelsRequest, UpdateIssueRequest, UpdateLabelRequest},
};

use super::*;
use crate::harness::{assert_retriable, eventually, limits};

/// About how large pieces are.
const PIECE_BYTES: usize = 64 * 1024;

/// How many statements of exports are under way, and are so.
macro_rules! exporting {
    ($so:literal, $is:literal) => {
        concat!(
            "SELECT count(*) ",
            $is,
            " FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'
            AND query LIKE '-- export_issues%' AND ",
            $so
        )
    };
}

/// What the database does when nobody takes its rows.
const WAITS_FOR_READER: &str = exporting!("wait_event = 'ClientWrite'", "= 1");
const NONE_LEFT: &str = exporting!("true", "= 0");

/// A tracker with 40 MB of issues, far more than is kept anywhere between the database and a client.
async fn large_tracker(limits: Limits) -> Tracker {
    let tracker = Tracker::start_with(limits).await;
    let insert = "INSERT INTO issues (id, reporter_id, status, priority, title, description, create_time)
        SELECT ('0190' || lpad(to_hex(n), 8, '0') || '70008000000000000000')::uuid, id, 1, 0, 'issue ' || n,
            repeat('x', 2000), timestamptz '2024-05-17 08:30:00' + n * interval '1 second'
        FROM users, generate_series(1, 20000) n WHERE username = 'member'";
    tracker.sql(insert, &[]).await;
    tracker
}

/// An export of which one piece was read.
async fn begin(client: &Client) -> (Streaming<ExportIssuesResponse>, Vec<u8>) {
    let mut pieces = open(client, ExportIssuesRequest::default()).await.unwrap();
    let first = pieces.message().await.unwrap().unwrap();
    (pieces, first.data)
}

async fn read_on(pieces: &mut Streaming<ExportIssuesResponse>, file: &mut Vec<u8>) -> Result<(), Status> {
    while let Some(piece) = pieces.message().await? {
        file.extend(piece.data);
    }
    Ok(())
}

#[tokio::test]
async fn pieces_are_small_and_cut_between_rows_and_say_how_many_there_are() {
    let tracker = large_tracker(limits(&[])).await;
    let large = Issue { title: "large".to_owned(), description: "\"".repeat(65_536), ..Default::default() };
    tracker.member.file_as(large).await;
    let mut pieces = open(&tracker.viewer, ExportIssuesRequest::default()).await.unwrap();
    let (mut count, mut lengths) = (0, Vec::new());
    while let Some(piece) = pieces.message().await.unwrap() {
        let text = String::from_utf8(piece.data).unwrap();
        lengths.push(text.len());
        let rows = if count == 0 { rows(&text) } else { rows(&format!("{HEADER}{text}")) };
        count += rows.len() as i64;
        assert_eq!(piece.row_count, count);
        assert!(text.ends_with('\n'));
    }
    assert_eq!(count, 20_001);
    let (last, full) = lengths.split_last().unwrap();
    assert!(full.iter().all(|length| (PIECE_BYTES..PIECE_BYTES + 20_000).contains(length)), "{lengths:?}");
    assert!(*last < 300_000, "{last}");
}

#[tokio::test]
async fn an_export_is_of_one_instant_whatever_is_written_while_it_is_read() {
    let tracker = large_tracker(limits(&[])).await;
    let label = tracker.member.label("before").await;
    let list = ListIssuesRequest { page_size: 3, ..Default::default() };
    let newest = tracker.viewer.issues().list_issues(list).await.unwrap().into_inner().issues;
    let add = |issue: &Issue| AddIssueLabelsRequest {
        issue_id: issue.id.clone(),
        label_ids: vec![label.id.clone()],
        ..Default::default()
    };
    tracker.member.labels().add_issue_labels(add(&newest[0])).await.unwrap();
    let before = export(&tracker.viewer).await;

    let (mut pieces, mut file) = begin(&tracker.viewer).await;
    tracker.wait_until(WAITS_FOR_READER).await;
    tracker.member.file("new").await;
    delete(&tracker.member, &newest[2].id).await;
    let changed = Issue { id: newest[1].id.clone(), title: "changed".to_owned(), ..Default::default() };
    let update = UpdateIssueRequest { issue: Some(changed), ..Default::default() };
    tracker.member.issues().update_issue(update).await.unwrap();
    tracker.member.labels().add_issue_labels(add(&newest[1])).await.unwrap();
    let renamed = issue_tracker::pb::Label { name: "after".to_owned(), ..label.clone() };
    let rename = UpdateLabelRequest { label: Some(renamed), ..Default::default() };
    tracker.member.labels().update_label(rename).await.unwrap();
    read_on(&mut pieces, &mut file).await.unwrap();

    assert!(file == before.as_bytes(), "something of what was written is in the file");
    let after = export(&tracker.viewer).await;
    assert!(after.contains(",changed,") && after.contains(",new,") && after.contains(",after,"));
}

#[tokio::test]
async fn the_database_waits_for_a_slow_reader_without_the_bound_of_other_statements() {
    let tracker = large_tracker(limits(&["--statement-ms", "1000"])).await;
    let (mut pieces, mut file) = begin(&tracker.viewer).await;
    tracker.wait_until(WAITS_FOR_READER).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    // The rest is still there, not in the memory of the service.
    tracker.wait_until(WAITS_FOR_READER).await;
    read_on(&mut pieces, &mut file).await.unwrap();
    assert_eq!(titles(std::str::from_utf8(&file).unwrap()).len(), 20_000);
}

#[tokio::test]
async fn a_reader_that_does_not_read_for_a_minute_is_let_go() {
    let tracker = large_tracker(limits(&[])).await;
    let (mut pieces, mut file) = begin(&tracker.viewer).await;
    tracker.wait_until(WAITS_FOR_READER).await;

    pass(Duration::from_secs(50)).await;
    tracker.wait_until(WAITS_FOR_READER).await;
    // The last piece that found room may have done so just now.
    for _ in 0..6 {
        pass(Duration::from_secs(10)).await;
    }
    tracker.wait_until(NONE_LEFT).await;

    let result = read_on(&mut pieces, &mut file).await;
    let status = assert_error(result, Code::DeadlineExceeded, "EXPORT_IDLE");
    assert!(status.message().contains("60 s"), "{status:?}");
    // The only place is free again.
    assert_eq!(titles(&export(&tracker.viewer).await).len(), 20_000);
}

/// Lets time pass, for the service too: it runs in the test's own runtime.
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_statement_and_leaves_its_connection_fit_for_use() {
    let limits = ["--pool-connections", "4", "--imports", "1", "--exports", "2", "--pool-wait-ms", "5000"];
    let tracker = Arc::new(large_tracker(limits_with_patience(&limits)).await);
    // More often than there are connections.
    for _ in 0..12 {
        eventually("there is a place for another", async || {
            match open(&tracker.viewer, ExportIssuesRequest::default()).await {
                Ok(mut pieces) => pieces.message().await.unwrap().is_some(),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    false
                }
            }
        })
        .await;
    }
    tracker.wait_until(NONE_LEFT).await;
    let calls = (0..8).map(|n| {
        let tracker = Arc::clone(&tracker);
        tokio::spawn(async move { tracker.member.file(&format!("after {n}")).await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert_eq!(titles(&export(&tracker.viewer).await).len(), 20_008);
}

/// With no bound that would end a statement by itself.
fn limits_with_patience(args: &[&str]) -> Limits {
    limits(&[args, &["--statement-ms", "600000"]].concat())
}

#[tokio::test]
async fn exports_beyond_the_bound_are_refused_until_one_ends() {
    let tracker = large_tracker(limits(&["--exports", "1"])).await;
    let (first, _) = begin(&tracker.viewer).await;

    let second = open(&tracker.viewer, ExportIssuesRequest::default()).await;

    assert_retriable(second, Code::ResourceExhausted, "OVERLOADED");
    drop(first);
    eventually("the place of the first export is free", async || {
        open(&tracker.viewer, ExportIssuesRequest::default()).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_database_that_goes_away_ends_the_file_with_an_error() {
    let tracker = large_tracker(limits(&[])).await;
    let (mut pieces, mut file) = begin(&tracker.viewer).await;
    tracker.wait_until(WAITS_FOR_READER).await;
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '-- export_issues%'";
    tracker.sql(terminate, &[]).await;

    let cut = read_on(&mut pieces, &mut file).await;

    assert_error(cut, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert_eq!(titles(&export(&tracker.viewer).await).len(), 20_000);
}

#[tokio::test]
async fn a_service_that_stops_ends_the_file_with_an_error() {
    let mut tracker = large_tracker(limits(&["--drain-seconds", "60"])).await;
    let (mut pieces, mut file) = begin(&tracker.viewer).await;
    tracker.wait_until(WAITS_FOR_READER).await;
    tracker.stop();
    assert_error(read_on(&mut pieces, &mut file).await, Code::Unavailable, "STOPPING");
    drop(pieces);
    tracker.ended().await;
}
