//! Imports whose credentials end while they run.

use futures_util::future::join_all;
use issue_tracker::pb::{ApiToken, CreateApiTokenRequest, RevokeApiTokenRequest};
use tokio::time::timeout;

use super::*;
use crate::{
    credentials::{ENDS_WITHIN, End},
    h2_client::{H2Client, framed},
    harness::{eventually, limits},
};

/// Opens an import of 12,000 rows, and waits until a batch is committed.
async fn open_and_commit_a_batch(client: &Client, import: &Import) -> OpenImport {
    let mut open = open(client, import.options.clone()).await;
    open.send(chunk(0, &import.file[..80_000])).await;
    let Some(Message::Progress(progress)) = open.responses.message().await.unwrap().unwrap().message else { panic!() };
    assert!(progress.committed_offset > 0);
    open
}

/// Asserts that an import on `server`, whose client only receives, ends when its credentials end on `tracker`.
async fn assert_import_ends(end: End, tracker: &Tracker, server: &Tracker, username: &str) {
    let member = end.member(tracker, username).await;
    let import = import(titles(12_000)).skip_invalid().id(Uuid::now_v7());
    let open = open_and_commit_a_batch(&server.client_with_token(Some(&member.token)), &import).await;

    end.apply(tracker, &member).await;

    let ended = timeout(ENDS_WITHIN, read(open.responses)).await;
    let ended = ended.unwrap_or_else(|_| panic!("{username} is still importing"));
    let (code, reason) = end.error();
    assert_error(ended, code, reason);
    eventually("the import is interrupted", async || {
        let record = get_import(&tracker.admin, &import.options.import_id).await.unwrap();
        record.state() == ImportState::Interrupted && record.committed_offset > 0
    })
    .await;
}

#[tokio::test]
async fn import_ends_within_5_s_of_its_credentials_on_every_replica() {
    // One import each.
    let with_5_imports = || limits(&["--imports", "5", "--pool-connections", "8"]);
    let tracker = Tracker::start_with(with_5_imports()).await;
    let replica = tracker.start_replica_with(with_5_imports()).await;
    let cases = End::ALL.into_iter().flat_map(|end| [(end, &tracker, "here"), (end, &replica, "there")]);
    join_all(cases.map(async |(end, server, place)| {
        assert_import_ends(end, &tracker, server, &format!("{end:?}-{place}")).await;
    }))
    .await;
}

#[tokio::test]
async fn import_that_ends_with_its_token_is_resumed_with_another_token() {
    let tracker = Tracker::start().await;
    let import = import(titles(12_000)).skip_invalid().id(Uuid::now_v7());
    let token = Some(ApiToken { name: "other".to_owned(), ..Default::default() });
    let request = CreateApiTokenRequest { api_token: token, validate_only: false };
    let created = tracker.member.auth().create_api_token(request).await.unwrap().into_inner();
    let open = open_and_commit_a_batch(&tracker.client_with_token(Some(&created.access_token)), &import).await;

    let request = RevokeApiTokenRequest { id: created.api_token.unwrap().id, ..Default::default() };
    tracker.member.auth().revoke_api_token(request).await.unwrap();

    assert_error(read(open.responses).await, Code::Unauthenticated, "UNAUTHENTICATED");
    tracker.wait_until(import_locks!("= 0")).await;
    assert!(issue_count(&tracker).await >= 5_000);
    let responses = resume(&tracker.member, &import).await.unwrap();
    assert_eq!(responses.counts(), (ImportState::Committed, 12_000, 12_000, 0, 0));
    assert_eq!(issue_count(&tracker).await, 12_000);
}

#[tokio::test]
async fn import_with_unread_responses_ends_with_its_credentials() {
    let tracker = Tracker::start().await;
    // The stream's flow-control window is 0: the server cannot send.
    let mut raw = H2Client::open_with(&tracker, 0).await.unwrap();
    let (_response, mut stream) = raw.begin(&tracker, "ImportService/ImportIssues").await.unwrap();
    let opts = ImportOptions { import_id: Uuid::now_v7().to_string(), ..Default::default() };
    stream.send_data(framed(&options(opts)), false).unwrap();
    tracker.wait_until(import_locks!("= 1")).await;

    End::UserDisabled.apply(&tracker, &tracker.member).await;

    let ended = timeout(ENDS_WITHIN, tracker.wait_until(import_locks!("= 0"))).await;
    ended.expect("the import still holds its lock");
}
