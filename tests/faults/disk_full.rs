//! The disk of the private database is full, for a while.

use std::time::Duration;

use issue_tracker::pb::{CreateIssueRequest, GetIssueRequest, Issue};
use prost::Message;
use tokio::sync::watch;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Form, call, callers, serves},
    load::Load,
    shim::Shim,
    support::{bounds::HANG, database::session, eventually::eventually, process::Dir, service::Service},
    verify::verify,
};

const CLIENTS: usize = 6;
/// Kept outside of the table, in pages of which none is free.
const DESCRIPTION_BYTES: usize = 60_000;
/// What the disk has no room for, tried so often.
const LARGE_ISSUES: usize = 10;

/// What cannot be compressed to fit somewhere after all.
fn large(rng: &mut fastrand::Rng) -> CreateIssueRequest {
    let description = std::iter::repeat_with(|| rng.alphanumeric()).take(DESCRIPTION_BYTES).collect();
    let issue = Issue { title: "large".to_owned(), description, ..Issue::default() };
    CreateIssueRequest { issue: Some(issue), request_id: Uuid::new_v4().to_string(), ..Default::default() }
}

/// Clear to the caller, and in nobody else's words.
#[track_caller]
fn assert_clear(status: &Status) {
    assert!(matches!(status.code(), Code::Unavailable | Code::ResourceExhausted), "{status:?}");
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
    for word in ["space", "disk", "extend", "could not", "relation", "/"] {
        assert!(!status.message().contains(word), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_full_disk_writes_fail_clearly_reads_go_on_and_with_space_all_is_well_and_nothing_lost() {
    let form = Form::of_environment();
    let mut rng = form.rng();
    let dir = Dir::new();
    let shim = Shim::new(&dir);
    let data = dir.data();
    let command = || shim.program(&["--data-dir", &data, "--bcrypt-cost", "4"]);
    let mut service = Service::start(&dir, command());
    let (channel, token) = (service.channel(), callers(&dir.database(), 1).await.remove(0).token);
    let create = "IssueService/CreateIssue";
    let kept = call(&channel, &token, create, &large(&mut rng).encode_to_vec()).await.unwrap();
    let kept = Issue::decode(&*kept).unwrap();
    let get = GetIssueRequest { id: kept.id.clone(), ..Default::default() }.encode_to_vec();

    shim.fill_disk(true);
    let refused: Vec<Vec<u8>> = (0..LARGE_ISSUES).map(|_| large(&mut rng).encode_to_vec()).collect();
    for message in &refused {
        assert_clear(&call(&channel, &token, create, message).await.unwrap_err());
        let read = call(&channel, &token, "IssueService/GetIssue", &get).await.unwrap();
        assert_eq!(Issue::decode(&*read).unwrap(), kept);
        assert!(serves(&channel).await, "it is only full");
    }
    shim.fill_disk(false);
    for message in &refused {
        call(&channel, &token, create, message).await.unwrap();
    }
    let rows = session(&dir.database()).await;
    let count: i64 = rows.query_one("SELECT count(*) FROM issues", &[]).await.unwrap().get(0);
    assert_eq!(count as usize, 1 + LARGE_ISSUES);
    rows.batch_execute("TRUNCATE issues, issue_labels, comments, requests").await.unwrap();

    let (_addresses, address) = watch::channel(service.address.clone());
    let load = Load::start(&dir.database(), address, CLIENTS, &mut rng).await;
    for _ in 0..form.pick(1, 10) {
        load.acknowledges(50).await;
        shim.fill_disk(true);
        use_up_wal(&dir).await;
        eventually("health says that the database is away", async || !serves(&channel).await).await;
        let refused = call(&channel, &token, create, &large(&mut rng).encode_to_vec()).await;
        assert_clear(&refused.unwrap_err());
        tokio::time::sleep(Duration::from_millis(rng.u64(..1_000))).await;
        shim.fill_disk(false);
        eventually("health says that the database is back", async || serves(&channel).await).await;
    }
    load.acknowledges(50).await;
    let made = load.finish().await;
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let service = Service::start(&dir, command());
    verify(&dir.database(), &service.channel(), made).await;
    service.assert_sound();
}

/// Has the database begin file after file of its log, until there is no room for another, which it does not survive.
async fn use_up_wal(dir: &Dir) {
    let rows = session(&dir.database()).await;
    const SQL: &str = "SELECT pg_switch_wal(), pg_logical_emit_message(false, 'faults', 'x')";
    let switches = async { while rows.query(SQL, &[]).await.is_ok() {} };
    tokio::time::timeout(HANG, switches).await.expect("the disk is never full");
}
