//! Requests and responses that are compressed with gzip.

use bytes::Bytes;
use futures_util::{TryStreamExt, stream};
use issue_tracker::pb::{
    CreateIssueRequest, GetIssueRequest, ImportChunk, ImportIssuesRequest, ImportOptions, Issue,
    import_issues_request::Message as ImportMessage,
};
use tonic::{Code, Request, Status, client::Grpc, codec::CompressionEncoding::Gzip};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use uuid::Uuid;

use super::call_path;
use crate::{
    harness::{Client, Tracker, assert_error, assert_invalid},
    support::codec::BytesCodec,
};

/// Compresses to less than 100 KiB.
const BOMB_BYTES: usize = 64 * 1024 * 1024;
/// Maximum size of a request that needs no credentials.
const UNAUTHENTICATED_BYTES_MAX: usize = 16 * 1024;

#[tokio::test]
async fn gzip_is_accepted_and_sent_to_clients_that_ask_for_it() {
    let tracker = Tracker::start().await;
    let mut plain = tracker.member.issues();
    let mut gzip = tracker.member.issues().send_compressed(Gzip).accept_compressed(Gzip);
    let issue = Issue { title: "long".into(), description: "word ".repeat(2_000), ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(issue), request_id: Uuid::now_v7().into(), ..Default::default() };

    let created = gzip.create_issue(request.clone()).await.unwrap();
    assert_eq!(created.metadata().get("grpc-encoding").unwrap(), "gzip");
    let created = created.into_inner();
    assert_eq!(created.description.len(), 10_000);

    let request_by_id = GetIssueRequest { id: created.id.clone(), view: 0 };
    let got = plain.get_issue(request_by_id.clone()).await.unwrap();
    assert!(got.metadata().get("grpc-encoding").is_none());
    assert_eq!(got.into_inner(), created);
    assert_eq!(gzip.get_issue(request_by_id).await.unwrap().into_inner(), created);
    // The payload of a request id is the decompressed message.
    assert_eq!(plain.create_issue(request).await.unwrap().into_inner(), created);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
}

#[tokio::test]
async fn small_responses_are_not_compressed() {
    let tracker = Tracker::start().await;
    let mut gzip = tracker.member.issues().send_compressed(Gzip).accept_compressed(Gzip);
    // Less than 1 KiB, although it would get smaller.
    let issue = Issue { title: "short".into(), description: "word ".repeat(100), ..Issue::default() };
    let created = gzip.create_issue(CreateIssueRequest { issue: Some(issue), ..Default::default() }).await.unwrap();
    assert!(created.metadata().get("grpc-encoding").is_none());
    assert_eq!(created.into_inner().title, "short");
}

#[tokio::test]
async fn health_checks_may_be_compressed() {
    let tracker = Tracker::start().await;
    let mut health = HealthClient::new(tracker.channel.clone()).send_compressed(Gzip).accept_compressed(Gzip);
    let status = health.check(HealthCheckRequest::default()).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::Serving);
}

async fn call_compressed(tracker: &Tracker, client: &Client, method: &str, message: Vec<u8>) -> Result<Bytes, Status> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {}", client.token).parse().unwrap());
    let mut grpc = Grpc::new(tracker.channel.clone()).send_compressed(Gzip);
    grpc.ready().await.unwrap();
    let path = format!("/issuetracker.v1.{method}").parse().unwrap();
    Ok(grpc.unary(request, path, BytesCodec).await?.into_inner())
}

#[tokio::test]
async fn a_message_that_is_too_large_after_decompression_is_invalid() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for (method, bytes) in [
        ("IssueService/CreateIssue", BOMB_BYTES),
        ("AuthService/Login", BOMB_BYTES),
        ("AuthService/Login", UNAUTHENTICATED_BYTES_MAX + 1),
    ] {
        let refused = call_compressed(&tracker, &tracker.member, method, vec![0; bytes]).await;
        let status = assert_invalid(refused, &["request"]);
        assert!(status.message().contains("too large"), "{status:?}");
    }
    assert_eq!(tracker.contents().await, before);
}

fn import(chunks: &[Vec<u8>]) -> Vec<ImportIssuesRequest> {
    let options = ImportOptions { import_id: Uuid::now_v7().into(), ..Default::default() };
    let mut offset = 0;
    let chunks = chunks.iter().map(|data| {
        let chunk = ImportChunk { offset, data: data.clone().into() };
        offset += data.len() as i64;
        ImportMessage::Chunk(chunk)
    });
    let messages = [ImportMessage::Options(options)].into_iter().chain(chunks);
    messages.map(|message| ImportIssuesRequest { message: Some(message) }).collect()
}

#[tokio::test]
async fn import_streams_may_be_compressed_and_each_message_is_bounded() {
    let tracker = Tracker::start().await;
    let mut imports = tracker.member.imports().send_compressed(Gzip).accept_compressed(Gzip);
    let file = format!("title\n{}", "an issue\n".repeat(1_000));
    let responses = imports.import_issues(stream::iter(import(&[file.into_bytes()]))).await.unwrap().into_inner();
    responses.try_collect::<Vec<_>>().await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1_000);

    let bomb = import(&[b"title\n".to_vec(), vec![b'x'; BOMB_BYTES]]);
    let responses = imports.import_issues(stream::iter(bomb)).await.unwrap().into_inner();
    let status = assert_invalid(responses.try_collect::<Vec<_>>().await, &["request"]);
    assert!(status.message().contains("too large"), "{status:?}");
}

#[tokio::test]
async fn an_unsupported_encoding_is_unimplemented_and_names_the_supported_ones() {
    let tracker = Tracker::start().await;
    let mut request = Request::new(Vec::new());
    request.metadata_mut().insert("authorization", format!("Bearer {}", tracker.member.token).parse().unwrap());
    request.metadata_mut().insert("grpc-encoding", "deflate".parse().unwrap());
    let refused = call_path(&tracker, "/issuetracker.v1.AuthService/WhoAmI", request).await;
    let status = assert_error(refused, Code::Unimplemented, "UNIMPLEMENTED");
    assert!(status.message().contains("grpc-encoding"), "{status:?}");
    assert_eq!(status.metadata().get("grpc-accept-encoding").unwrap(), "gzip,identity");
}
