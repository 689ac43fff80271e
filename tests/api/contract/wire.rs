//! Reflection, health checks, and errors that arise before a handler runs.

use std::collections::{BTreeMap, HashMap};

use futures_util::stream;
use issue_tracker::pb::{CreateIssueRequest, Issue, WhoAmIRequest};
use prost::Message;
use prost_reflect::DescriptorPool;
use prost_types::FileDescriptorProto;
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb;

use super::{call, call_path, our_files, our_methods, required_role};
use crate::harness::{Tracker, assert_error, assert_invalid, error_metadata};

fn our_services() -> Vec<String> {
    let files = our_files();
    let services = files.iter().flat_map(|file| &file.service);
    services.map(|service| format!("issuetracker.v1.{}", service.name())).collect()
}

/// Makes one reflection request. The two versions of the protocol have the same messages under different names.
macro_rules! reflect {
    ($version:ident, $tracker:expr, $request:ident($value:expr)) => {{
        use pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest,
        };
        let message_request = Some(MessageRequest::$request($value.to_owned()));
        let request = ServerReflectionRequest { host: String::new(), message_request };
        let mut client = ServerReflectionClient::new($tracker.channel.clone());
        let responses = client.server_reflection_info(stream::iter([request])).await.unwrap().into_inner();
        { responses }.message().await.unwrap().unwrap().message_response.unwrap()
    }};
}

#[tokio::test]
async fn reflection_lists_all_services_in_both_versions_without_credentials() {
    let tracker = Tracker::start().await;
    use pb::{v1::server_reflection_response as v1, v1alpha::server_reflection_response as v1alpha};
    let v1::MessageResponse::ListServicesResponse(list) = reflect!(v1, tracker, ListServices("")) else { panic!() };
    let listed: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    let v1alpha::MessageResponse::ListServicesResponse(list) = reflect!(v1alpha, tracker, ListServices("")) else {
        panic!()
    };
    let listed_alpha: Vec<String> = list.service.into_iter().map(|service| service.name).collect();

    let mut expected = our_services();
    assert_eq!(expected.len(), 7);
    expected.push("grpc.health.v1.Health".to_owned());
    for service in expected {
        assert!(listed.contains(&service) && listed_alpha.contains(&service), "{service}: {listed:?} {listed_alpha:?}");
    }
}

#[tokio::test]
async fn reflection_includes_comments_and_error_detail_types() {
    let tracker = Tracker::start().await;
    for symbol in ["issuetracker.v1.IssueService", "google.rpc.ErrorInfo", "google.protobuf.Timestamp"] {
        use pb::v1::server_reflection_response::MessageResponse;
        let response = reflect!(v1, tracker, FileContainingSymbol(symbol));
        let MessageResponse::FileDescriptorResponse(files) = response else { panic!("{symbol}: {response:?}") };
        let file = FileDescriptorProto::decode(&*files.file_descriptor_proto[0]).unwrap();
        if symbol.starts_with("issuetracker") {
            let comments = file.source_code_info.unwrap().location;
            assert!(comments.iter().any(|location| location.leading_comments().contains("Creates an issue.")));
        }
    }
}

/// Reflection serves the files as they were compiled: prost would drop the options that are extensions.
#[tokio::test]
async fn reflection_serves_the_required_role_of_every_method() {
    use pb::v1::server_reflection_response::MessageResponse;
    let tracker = Tracker::start().await;
    let mut names: Vec<String> = our_files().iter().map(|file| file.name().to_owned()).collect();
    let mut served = HashMap::new();
    while let Some(name) = names.pop() {
        let response = reflect!(v1, tracker, FileByFilename(name));
        let MessageResponse::FileDescriptorResponse(files) = response else { panic!("{name}: {response:?}") };
        for bytes in files.file_descriptor_proto {
            let file = FileDescriptorProto::decode(&*bytes).unwrap();
            served.insert(file.name().to_owned(), bytes);
            names.extend(file.dependency.into_iter().filter(|name| !served.contains_key(name)));
        }
    }
    // A FileDescriptorSet, without decoding the files: field 1 is the repeated `file`.
    let mut set = Vec::new();
    prost::encoding::bytes::encode_repeated(1, &served.into_values().collect::<Vec<_>>(), &mut set);
    let pool = DescriptorPool::decode(&*set).unwrap();
    let services = pool.services().filter(|service| service.package_name() == "issuetracker.v1");
    let methods = services.flat_map(|service| service.methods().collect::<Vec<_>>());
    let served: BTreeMap<_, _> = methods
        .map(|method| (format!("{}/{}", method.parent_service().name(), method.name()), required_role(&method)))
        .collect();
    let declared = our_methods().into_iter().map(|method| (method.name, method.required_role)).collect();
    assert_eq!(served, declared);
}

#[tokio::test]
async fn health_check_reports_every_service_as_serving_without_credentials() {
    let tracker = Tracker::start().await;
    let mut health = HealthClient::new(tracker.channel.clone());
    for service in our_services().into_iter().chain([String::new()]) {
        let response = health.check(HealthCheckRequest { service: service.clone() }).await.unwrap().into_inner();
        assert_eq!(response.status(), ServingStatus::Serving, "{service}");
    }
    for unknown in ["issuetracker.v1.NoSuchService", "issuetracker.v1", "issues"] {
        let response = health.check(HealthCheckRequest { service: unknown.to_owned() }).await;
        assert_eq!(response.unwrap_err().code(), Code::NotFound);
    }
}

#[tokio::test]
async fn unknown_method_is_unimplemented() {
    let tracker = Tracker::start().await;
    for unknown in ["IssueService/CreateIssues", "IssueService/createIssue", "NoService/Get", "IssueService/"] {
        let status =
            assert_error(call(&tracker, &tracker.member, unknown, b"").await, Code::Unimplemented, "UNIMPLEMENTED");
        assert!(status.message().contains("no such method"), "{status:?}");
    }
    // Without credentials, only the methods of this package are secret.
    for (path, code) in [
        ("/tracker.v1.Issues/Get", Code::Unimplemented),
        ("/", Code::Unimplemented),
        ("/issuetracker.v1.IssueService", Code::Unauthenticated),
    ] {
        let refused = call_path(&tracker, path, Request::new(Vec::new())).await;
        assert_eq!(refused.unwrap_err().code(), code, "{path}");
    }
}

#[tokio::test]
async fn message_above_4_mib_is_invalid() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    let request = |bytes: usize| {
        let issue = Some(Issue { title: "large".into(), description: "x".repeat(bytes), ..Issue::default() });
        CreateIssueRequest { issue, ..Default::default() }
    };
    let mut issues = tracker.member.issues();
    let status = assert_invalid(issues.create_issue(request(4 * 1024 * 1024)).await, &["request"]);
    assert!(status.message().contains("too large"), "{status:?}");
    // A message within the limit is decoded and validated.
    assert_invalid(issues.create_issue(request(4 * 1024 * 1024 - 100)).await, &["issue.description"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn metadata_above_16_kib_is_rejected_and_later_calls_succeed() {
    let tracker = Tracker::start().await;
    let with_metadata = |bytes: usize| {
        let mut request = Request::new(WhoAmIRequest {});
        request.metadata_mut().insert("x-long", "x".repeat(bytes).parse().unwrap());
        request
    };
    let mut auth = tracker.member.auth();
    auth.who_am_i(with_metadata(15 * 1024)).await.unwrap();
    auth.who_am_i(with_metadata(17 * 1024)).await.unwrap_err();
    auth.who_am_i(with_metadata(1024 * 1024)).await.unwrap_err();
    auth.who_am_i(with_metadata(0)).await.unwrap();
}

#[tokio::test]
async fn metadata_over_the_limit_is_resource_exhausted_with_details() {
    let tracker = Tracker::start().await;
    let who_am_i = async |bytes: usize| {
        let mut request = Request::new(WhoAmIRequest::default());
        request.metadata_mut().insert("x-large", "x".repeat(bytes).parse().unwrap());
        tracker.viewer.auth().who_am_i(request).await.map(drop)
    };
    who_am_i(15_000).await.unwrap();
    for bytes in [17_000, 100_000] {
        let status = assert_error(who_am_i(bytes).await, Code::ResourceExhausted, "METADATA_TOO_LARGE");
        assert_eq!(error_metadata(&status, "bytes_max").as_deref(), Some("16384"));
    }
    who_am_i(10).await.unwrap();
}
