//! Clients that read slowly or cancel, concurrent exports, and the end of the stream in failures.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use issue_tracker::{
    config::Limits,
    pb::{AddIssueLabelsRequest, UpdateIssueRequest, UpdateLabelRequest},
};

use super::*;
use crate::{
    credentials::{ENDS_WITHIN, End},
    h2_client::{H2Client, framed},
    harness::{self, assert_retriable, eventually, limits},
};

/// Minimum size of every chunk but the last.
const CHUNK_BYTES: usize = 64 * 1024;

/// A query that compares the number of active export statements that satisfy `$condition`.
macro_rules! active_exports {
    ($condition:literal, $compare:literal) => {
        concat!(
            "SELECT count(*) ",
            $compare,
            " FROM pg_stat_activity WHERE datname = current_database() AND state <> 'idle'
            AND query LIKE '-- export_issues%' AND ",
            $condition
        )
    };
}

/// One export statement is blocked because its rows are not read.
const EXPORT_BLOCKED_ON_READER: &str = active_exports!("wait_event = 'ClientWrite'", "= 1");
const NO_ACTIVE_EXPORT: &str = active_exports!("true", "= 0");

/// The number and size of the issues of [`large_tracker`]. Few and large, as a test spends its time on rows.
const LARGE_ISSUES: usize = 4_000;
const LARGE_ISSUE_BYTES: usize = 10_000;

/// Starts a tracker with 40 MB of issues: more than all buffers between the database and a client hold.
async fn large_tracker(limits: Limits) -> Tracker {
    let tracker = Tracker::start_with(limits).await;
    let insert = "INSERT INTO issues (id, reporter_id, status, priority, title, description, create_time)
        SELECT ('0190' || lpad(to_hex(n), 8, '0') || '70008000000000000000')::uuid, id, 1, 0, 'issue ' || n,
            repeat('x', $2), timestamptz '2024-05-17 08:30:00' + n * interval '1 second'
        FROM users, generate_series(1, $1) n WHERE username = 'member'";
    tracker.sql(insert, &[&(LARGE_ISSUES as i32), &(LARGE_ISSUE_BYTES as i32)]).await;
    tracker
}

/// Starts an export and returns its stream and first chunk.
async fn start_export(client: &Client) -> (Streaming<ExportIssuesResponse>, Vec<u8>) {
    let mut chunks = open(client, ExportIssuesRequest::default()).await.unwrap();
    let first = chunks.message().await.unwrap().unwrap();
    (chunks, first.data)
}

async fn read_rest(chunks: &mut Streaming<ExportIssuesResponse>, file: &mut Vec<u8>) -> Result<(), Status> {
    while let Some(chunk) = chunks.message().await? {
        file.extend(chunk.data);
    }
    Ok(())
}

#[tokio::test]
async fn chunks_hold_whole_rows_of_about_64_kib_and_a_running_row_count() {
    let tracker = large_tracker(limits(&[])).await;
    let large = Issue { title: "large".to_owned(), description: "\"".repeat(65_536), ..Default::default() };
    tracker.member.file_as(large).await;
    let mut chunks = open(&tracker.viewer, ExportIssuesRequest::default()).await.unwrap();
    let (mut count, mut lengths) = (0, Vec::new());
    while let Some(chunk) = chunks.message().await.unwrap() {
        let text = String::from_utf8(chunk.data).unwrap();
        lengths.push(text.len());
        let rows = if count == 0 { rows(&text) } else { rows(&format!("{HEADER}{text}")) };
        count += rows.len() as i64;
        assert_eq!(chunk.row_count, count);
        assert!(text.ends_with('\n'));
    }
    assert_eq!(count, LARGE_ISSUES as i64 + 1);
    let (last, full) = lengths.split_last().unwrap();
    assert!(full.iter().all(|length| (CHUNK_BYTES..CHUNK_BYTES + 20_000).contains(length)), "{lengths:?}");
    assert!(*last < 300_000, "{last}");
}

#[tokio::test]
async fn export_is_a_snapshot_unaffected_by_concurrent_writes() {
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

    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    tracker.member.file("new").await;
    delete(&tracker.member, &newest[2].id).await;
    let changed = Issue { id: newest[1].id.clone(), title: "changed".to_owned(), ..Default::default() };
    let update = UpdateIssueRequest { issue: Some(changed), ..Default::default() };
    tracker.member.issues().update_issue(update).await.unwrap();
    tracker.member.labels().add_issue_labels(add(&newest[1])).await.unwrap();
    let renamed = issue_tracker::pb::Label { name: "after".to_owned(), ..label.clone() };
    let rename = UpdateLabelRequest { label: Some(renamed), ..Default::default() };
    tracker.member.labels().update_label(rename).await.unwrap();
    read_rest(&mut chunks, &mut file).await.unwrap();

    assert!(file == before.as_bytes(), "the file contains a concurrent write");
    let after = export(&tracker.viewer).await;
    assert!(after.contains(",changed,") && after.contains(",new,") && after.contains(",after,"));
}

#[tokio::test]
async fn slow_reader_blocks_the_export_beyond_the_statement_timeout() {
    let tracker = large_tracker(limits(&["--statement-ms", "1000"])).await;
    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    // The remaining rows are still in the database, not in the memory of the server.
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    read_rest(&mut chunks, &mut file).await.unwrap();
    assert_eq!(titles(std::str::from_utf8(&file).unwrap()).len(), LARGE_ISSUES);
}

#[tokio::test]
async fn export_not_read_for_60_s_fails_and_frees_its_permit() {
    let tracker = large_tracker(limits(&[])).await;
    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;

    advance_clock(Duration::from_secs(50)).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    // A last chunk may have entered a buffer just now, which restarts the stall timeout.
    for _ in 0..6 {
        advance_clock(Duration::from_secs(10)).await;
    }
    tracker.wait_until(NO_ACTIVE_EXPORT).await;

    let result = read_rest(&mut chunks, &mut file).await;
    let status = assert_error(result, Code::DeadlineExceeded, "EXPORT_IDLE");
    assert!(status.message().contains("60 s"), "{status:?}");
    // The only export permit is free again.
    assert_eq!(titles(&export(&tracker.viewer).await).len(), LARGE_ISSUES);
}

#[tokio::test]
async fn export_read_below_the_minimum_rate_fails_and_frees_its_permit() {
    let tracker = large_tracker(limits(&[])).await;
    let mut raw = H2Client::open(&tracker).await;
    let (response, mut request) = raw.begin(&tracker, "IssueService/ExportIssues").await.unwrap();
    request.send_data(framed(&ExportIssuesRequest::default()), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;

    let mut ended_after = Duration::ZERO;
    while tracker.count(active_exports!("true", "")).await == 1 {
        assert!(ended_after < Duration::from_secs(600), "the export is still served");
        // A window of data, 64 KiB, every 20 s.
        let mut read = 0;
        while read < 64_000 {
            let Some(data) = body.data().await.transpose().unwrap() else { break };
            body.flow_control().release_capacity(data.len()).unwrap();
            read += data.len();
        }
        advance_clock(Duration::from_secs(20)).await;
        ended_after += Duration::from_secs(20);
    }

    assert!(ended_after >= Duration::from_secs(120), "{ended_after:?}");
    while let Some(data) = body.data().await {
        body.flow_control().release_capacity(data.unwrap().len()).unwrap();
    }
    let trailers = body.trailers().await.unwrap().unwrap();
    let status = Status::from_header_map(&trailers).unwrap();
    let status = assert_error(Err::<(), _>(status), Code::DeadlineExceeded, "EXPORT_IDLE");
    assert!(status.message().contains("fewer than 1920 KiB read in 120 s"), "{status:?}");
    assert_eq!(titles(&export(&tracker.viewer).await).len(), LARGE_ISSUES);
}

#[tokio::test]
async fn export_beyond_its_maximum_duration_fails_and_frees_its_permit() {
    let tracker = large_tracker(limits(&["--export-seconds", "40"])).await;
    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    advance_clock(Duration::from_secs(39)).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;

    advance_clock(Duration::from_secs(2)).await;

    tracker.wait_until(NO_ACTIVE_EXPORT).await;
    let result = read_rest(&mut chunks, &mut file).await;
    let status = assert_error(result, Code::DeadlineExceeded, "EXPORT_TIMEOUT");
    assert!(status.message().contains("40 s"), "{status:?}");
    assert_eq!(titles(&export(&tracker.viewer).await).len(), LARGE_ISSUES);
}

/// Advances the clock, and leaves the export time to fill buffers or to time out.
async fn advance_clock(time: Duration) {
    harness::advance_clock(time).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
}

#[tokio::test]
async fn cancelled_export_ends_its_statement_and_returns_a_usable_connection() {
    let limits = ["--pool-connections", "4", "--imports", "1", "--exports", "2", "--pool-wait-ms", "5000"];
    let tracker = Arc::new(large_tracker(limits_without_statement_timeout(&limits)).await);
    // More exports than the pool has connections.
    for _ in 0..12 {
        eventually("another export starts", async || {
            match open(&tracker.viewer, ExportIssuesRequest::default()).await {
                Ok(mut chunks) => chunks.message().await.unwrap().is_some(),
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    false
                }
            }
        })
        .await;
    }
    tracker.wait_until(NO_ACTIVE_EXPORT).await;
    let calls = (0..8).map(|n| {
        let tracker = Arc::clone(&tracker);
        tokio::spawn(async move { tracker.member.file(&format!("after {n}")).await })
    });
    for call in calls.collect::<Vec<_>>() {
        call.await.unwrap();
    }
    assert_eq!(titles(&export(&tracker.viewer).await).len(), LARGE_ISSUES + 8);
}

/// Returns limits with a statement timeout that no test reaches.
fn limits_without_statement_timeout(args: &[&str]) -> Limits {
    limits(&[args, &["--statement-ms", "600000"]].concat())
}

#[tokio::test]
async fn exports_beyond_the_limit_fail_until_one_ends() {
    let tracker = large_tracker(limits(&["--exports", "1"])).await;
    let (first, _) = start_export(&tracker.viewer).await;

    let second = open(&tracker.viewer, ExportIssuesRequest::default()).await;

    assert_retriable(second, Code::ResourceExhausted, "OVERLOADED");
    drop(first);
    eventually("the permit of the first export is free", async || {
        open(&tracker.viewer, ExportIssuesRequest::default()).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn lost_database_connection_ends_the_stream_with_an_error() {
    let tracker = large_tracker(limits(&[])).await;
    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '-- export_issues%'";
    tracker.sql(terminate, &[]).await;

    let result = read_rest(&mut chunks, &mut file).await;

    assert_error(result, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert_eq!(titles(&export(&tracker.viewer).await).len(), LARGE_ISSUES);
}

#[tokio::test]
async fn shutdown_ends_the_stream_with_an_error() {
    let mut tracker = large_tracker(limits(&["--drain-seconds", "60"])).await;
    let (mut chunks, mut file) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;
    tracker.stop();
    assert_error(read_rest(&mut chunks, &mut file).await, Code::Unavailable, "STOPPING");
    drop(chunks);
    tracker.wait_until_stopped().await;
}

/// Asserts that an export on `server`, whose client does not read, ends when its credentials end on `tracker`.
async fn assert_export_ends(end: End, tracker: &Tracker, server: &Tracker, username: &str) {
    let member = end.member(tracker, username).await;
    let on_server = server.client_with_token(Some(&member.token));
    let (mut chunks, mut file) = start_export(&on_server).await;

    end.apply(tracker, &member).await;
    tokio::time::sleep(ENDS_WITHIN).await;

    let (code, reason) = end.error();
    assert_error(read_rest(&mut chunks, &mut file).await, code, reason);
    assert!(file.len() < LARGE_ISSUES * LARGE_ISSUE_BYTES, "{username} has received the whole file");
}

#[tokio::test]
async fn export_ends_within_5_s_of_its_credentials_on_every_replica() {
    let with_3_exports = || limits(&["--exports", "3", "--imports", "1"]);
    let tracker = large_tracker(with_3_exports()).await;
    let replica = tracker.start_replica_with(with_3_exports()).await;
    let ends = [End::TokenRevoked, End::SessionLoggedOut, End::UserDisabled];
    let cases = ends.into_iter().flat_map(|end| [(end, &tracker, "here"), (end, &replica, "there")]);
    join_all(cases.map(async |(end, server, place)| {
        assert_export_ends(end, &tracker, server, &format!("{end:?}-{place}")).await;
    }))
    .await;
}

#[tokio::test]
async fn unread_export_of_a_disabled_user_frees_its_connection_within_5_s() {
    let tracker = large_tracker(limits(&[])).await;
    let (_chunks, _) = start_export(&tracker.viewer).await;
    tracker.wait_until(EXPORT_BLOCKED_ON_READER).await;

    End::UserDisabled.apply(&tracker, &tracker.viewer).await;

    let ended = tokio::time::timeout(ENDS_WITHIN, tracker.wait_until(NO_ACTIVE_EXPORT)).await;
    ended.expect("the export still holds its connection");
}

#[tokio::test]
async fn export_of_a_member_who_becomes_a_viewer_continues() {
    let tracker = large_tracker(limits(&[])).await;
    let (mut chunks, mut file) = start_export(&tracker.member).await;

    End::Demoted.apply(&tracker, &tracker.member).await;
    for _ in 0..5 {
        advance_clock(Duration::from_secs(1)).await;
    }

    read_rest(&mut chunks, &mut file).await.unwrap();
    assert_eq!(titles(std::str::from_utf8(&file).unwrap()).len(), LARGE_ISSUES);
}
