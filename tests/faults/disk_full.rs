//! Tests the service while the disk of its embedded database is full.

use std::time::Duration;

use issue_tracker::pb::{CreateIssueRequest, GetIssueRequest, Issue};
use prost::Message;
use tokio::sync::watch;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Settings, call, create_callers, serves},
    load::Load,
    shim::Shim,
    support::{bounds::HANG, database::session, eventually::eventually, process::Dir, service::Service},
    verify::verify,
};

const CLIENTS: usize = 6;
/// Large enough to be stored in TOAST pages, for which the table must grow.
const DESCRIPTION_BYTES: usize = 60_000;
/// Creates that fail while the disk is full.
const LARGE_ISSUES: usize = 10;

/// Returns an issue whose description does not compress.
fn large_issue(rng: &mut fastrand::Rng) -> CreateIssueRequest {
    let description = std::iter::repeat_with(|| rng.alphanumeric()).take(DESCRIPTION_BYTES).collect();
    let issue = Issue { title: "large".to_owned(), description, ..Issue::default() };
    CreateIssueRequest { issue: Some(issue), request_id: Uuid::new_v4().to_string(), ..Default::default() }
}

/// Asserts that the error is retriable and exposes no text from PostgreSQL.
#[track_caller]
fn assert_clear_error(status: &Status) {
    assert!(matches!(status.code(), Code::Unavailable | Code::ResourceExhausted), "{status:?}");
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
    for word in ["space", "disk", "extend", "could not", "relation", "/"] {
        assert!(!status.message().contains(word), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disk_fails_writes_clearly_keeps_reads_working_and_loses_no_data() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let dir = Dir::new();
    let shim = Shim::new(&dir);
    let data = dir.data();
    let command = || shim.program(&["--data-dir", &data, "--bcrypt-cost", "4"]);
    let mut service = Service::start(&dir, command());
    let (channel, token) = (service.channel(), create_callers(&dir.database(), 1).await.remove(0).token);
    let create = "IssueService/CreateIssue";
    let existing = call(&channel, &token, create, &large_issue(&mut rng).encode_to_vec()).await.unwrap();
    let existing = Issue::decode(&*existing).unwrap();
    let get = GetIssueRequest { id: existing.id.clone(), ..Default::default() }.encode_to_vec();

    shim.fill_disk(true);
    let rejected: Vec<Vec<u8>> = (0..LARGE_ISSUES).map(|_| large_issue(&mut rng).encode_to_vec()).collect();
    for message in &rejected {
        assert_clear_error(&call(&channel, &token, create, message).await.unwrap_err());
        let read = call(&channel, &token, "IssueService/GetIssue", &get).await.unwrap();
        assert_eq!(Issue::decode(&*read).unwrap(), existing);
        assert!(serves(&channel).await, "a full disk must not make health fail");
    }
    shim.fill_disk(false);
    for message in &rejected {
        call(&channel, &token, create, message).await.unwrap();
    }
    let rows = session(&dir.database()).await;
    let count: i64 = rows.query_one("SELECT count(*) FROM issues", &[]).await.unwrap().get(0);
    assert_eq!(count as usize, 1 + LARGE_ISSUES);
    rows.batch_execute("TRUNCATE issues, issue_labels, comments, requests").await.unwrap();

    let (_addresses, address) = watch::channel(service.address.clone());
    let load = Load::start(&dir.database(), address, CLIENTS, &mut rng).await;
    for _ in 0..settings.pick(1, 10) {
        load.wait_for_acknowledged(50).await;
        shim.fill_disk(true);
        use_up_wal(&dir).await;
        eventually("health reports NOT_SERVING", async || !serves(&channel).await).await;
        let rejected = call(&channel, &token, create, &large_issue(&mut rng).encode_to_vec()).await;
        assert_clear_error(&rejected.unwrap_err());
        tokio::time::sleep(Duration::from_millis(rng.u64(..1_000))).await;
        shim.fill_disk(false);
        eventually("health reports SERVING", async || serves(&channel).await).await;
    }
    load.wait_for_acknowledged(50).await;
    let mutations = load.finish().await;
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let service = Service::start(&dir, command());
    verify(&dir.database(), &service.channel(), mutations).await;
    service.assert_no_internal_errors();
}

/// Makes the database switch WAL segments until it cannot create another and shuts down.
async fn use_up_wal(dir: &Dir) {
    let rows = session(&dir.database()).await;
    const SQL: &str = "SELECT pg_switch_wal(), pg_logical_emit_message(false, 'faults', 'x')";
    let switches = async { while rows.query(SQL, &[]).await.is_ok() {} };
    tokio::time::timeout(HANG, switches).await.expect("the database survives a full disk");
}
