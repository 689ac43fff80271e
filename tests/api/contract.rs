//! The rules that hold for all RPCs. The tests read the descriptors, so they also cover RPCs that are added later.

mod authorization;
mod compression;
mod error_reasons;
mod layers;
mod migrations;
mod request_ids;
mod response_budget;
mod response_sizes;
mod streaming_rpc;
mod wire;

use std::collections::{BTreeSet, HashSet};

use bytes::Bytes;
use issue_tracker::{
    FILE_DESCRIPTOR_SET,
    pb::{RequiredRole, Role},
};
use prost::Message;
use prost_reflect::{DescriptorPool, MethodDescriptor};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet, field_descriptor_proto::Type,
    method_options::IdempotencyLevel,
};
use tonic::{Code, Request, Status, client::Grpc};

use crate::{
    harness::{Client, Tracker, assert_error, bad_fields},
    support::codec::{BytesCodec, unary},
};

/// The mutations without a request id. Responses with secrets are not stored for retries, and an import has an id of its
/// own in its options.
const WITHOUT_REQUEST_ID: &[&str] = &["AuthService/Login", "AuthService/CreateApiToken", "ImportService/ImportIssues"];
const LOGIN: &str = "AuthService/Login";

/// A method of one of our services.
struct Method {
    /// `Service/Method`.
    name: String,
    request: DescriptorProto,
    only_reads: bool,
    /// The declared option `required_role`. None: the method needs no credentials.
    required_role: Option<Role>,
}

impl Method {
    fn mutates(&self) -> bool {
        !self.only_reads
    }

    /// Returns the number and type of a field of the request.
    fn field(&self, name: &str) -> Option<(u32, Type)> {
        let field = self.request.field.iter().find(|field| field.name() == name)?;
        Some((field.number() as u32, field.r#type()))
    }

    /// Appends a request id to an encoded message.
    fn with_request_id(&self, message: &[u8], id: &str) -> Vec<u8> {
        let mut message = message.to_vec();
        prost::encoding::string::encode(self.field("request_id").unwrap().0, &id.to_owned(), &mut message);
        message
    }

    /// Appends `validate_only = true` to an encoded message.
    fn validate_only(&self, message: &[u8]) -> Vec<u8> {
        let mut message = message.to_vec();
        prost::encoding::bool::encode(self.field("validate_only").unwrap().0, &true, &mut message);
        message
    }
}

fn our_files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    set.file.into_iter().filter(|file| file.package() == "issuetracker.v1").collect()
}

fn our_methods() -> Vec<Method> {
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).unwrap();
    let services = pool.services().filter(|service| service.package_name() == "issuetracker.v1");
    let methods = services.flat_map(|service| service.methods().collect::<Vec<_>>());
    methods
        .map(|method| Method {
            name: format!("{}/{}", method.parent_service().name(), method.name()),
            request: method.input().descriptor_proto().clone(),
            only_reads: idempotency_level(&method) == IdempotencyLevel::NoSideEffects,
            required_role: required_role(&method),
        })
        .collect()
}

fn idempotency_level(method: &MethodDescriptor) -> IdempotencyLevel {
    method.method_descriptor_proto().options.as_ref().unwrap().idempotency_level()
}

fn required_role(method: &MethodDescriptor) -> Option<Role> {
    let option = method.parent_pool().get_extension_by_name("issuetracker.v1.required_role").unwrap();
    let number = method.options().get_extension(&option).as_enum_number().unwrap();
    match RequiredRole::try_from(number).unwrap() {
        RequiredRole::Unspecified => panic!("{}: no required role", method.full_name()),
        RequiredRole::Unauthenticated => None,
        RequiredRole::Viewer => Some(Role::Viewer),
        RequiredRole::Member => Some(Role::Member),
        RequiredRole::Admin => Some(Role::Admin),
    }
}

/// Calls `Service/Method` of this API with one message, valid or not.
async fn call(tracker: &Tracker, client: &Client, method: &str, message: &[u8]) -> Result<Bytes, Status> {
    let mut request = Request::new(message.to_vec());
    if !client.token.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer {}", client.token).parse().unwrap());
    }
    call_path(tracker, &format!("/issuetracker.v1.{method}"), request).await
}

async fn call_path(tracker: &Tracker, path: &str, request: Request<Vec<u8>>) -> Result<Bytes, Status> {
    unary(&tracker.channel, path, request).await
}

#[test]
fn every_element_of_the_proto_files_has_a_comment() {
    let mut missing = Vec::new();
    for file in our_files() {
        let info = file.source_code_info.as_ref().unwrap();
        let commented = info.location.iter().filter(|location| !location.leading_comments().trim().is_empty());
        let mut commented: HashSet<&[i32]> = commented.map(|location| &*location.path).collect();
        let mut expected = Vec::new();
        for (index, message) in (0..).zip(&file.message_type) {
            expect_message(message, &[4, index], message.name(), &mut expected);
        }
        for (index, item) in (0..).zip(&file.enum_type) {
            expect_enum(item, &[5, index], item.name(), &mut expected);
        }
        for (index, extension) in (0..).zip(&file.extension) {
            expected.push((vec![7, index], extension.name().to_owned()));
        }
        for (index, service) in (0..).zip(&file.service) {
            expected.push((vec![6, index], service.name().to_owned()));
            for (nth, method) in (0..).zip(&service.method) {
                expected.push((vec![6, index, 2, nth], format!("{}/{}", service.name(), method.name())));
            }
        }
        assert!(!expected.is_empty(), "{}", file.name());
        missing.extend(expected.into_iter().filter(|(path, _)| !commented.remove(&**path)).map(|(_, name)| name));
    }
    assert!(missing.is_empty(), "without a comment: {missing:?}");
}

/// Collects the `SourceCodeInfo` paths and the names of a message and everything in it.
fn expect_message(message: &DescriptorProto, path: &[i32], name: &str, expected: &mut Vec<(Vec<i32>, String)>) {
    expected.push((path.to_vec(), name.to_owned()));
    for (index, field) in (0..).zip(&message.field) {
        expected.push(([path, &[2, index]].concat(), format!("{name}.{}", field.name())));
    }
    // A map's generated entry type cannot have a comment.
    let is_map = |nested: &DescriptorProto| nested.options.as_ref().is_some_and(|options| options.map_entry());
    for (index, nested) in (0..).zip(&message.nested_type).filter(|(_, nested)| !is_map(nested)) {
        expect_message(nested, &[path, &[3, index]].concat(), &format!("{name}.{}", nested.name()), expected);
    }
    for (index, nested) in (0..).zip(&message.enum_type) {
        expect_enum(nested, &[path, &[4, index]].concat(), &format!("{name}.{}", nested.name()), expected);
    }
}

fn expect_enum(item: &EnumDescriptorProto, path: &[i32], name: &str, expected: &mut Vec<(Vec<i32>, String)>) {
    expected.push((path.to_vec(), name.to_owned()));
    for (index, value) in (0..).zip(&item.value) {
        expected.push(([path, &[2, index]].concat(), value.name().to_owned()));
    }
}

#[test]
fn every_mutation_has_request_id_and_validate_only() {
    let methods = our_methods();
    let names: BTreeSet<&str> = methods.iter().map(|method| &*method.name).collect();
    for listed in WITHOUT_REQUEST_ID {
        assert!(names.contains(listed), "{listed} is listed here but does not exist");
    }
    for method in &methods {
        let name = &method.name;
        let takes_id = method.mutates() && !WITHOUT_REQUEST_ID.contains(&&**name);
        assert_eq!(method.field("request_id").map(|field| field.1), takes_id.then_some(Type::String), "{name}");
        // An import has validate_only in its options.
        let has_dry_run = method.mutates() && name != "ImportService/ImportIssues";
        assert_eq!(method.field("validate_only").map(|field| field.1), has_dry_run.then_some(Type::Bool), "{name}");
    }
}

#[tokio::test]
async fn every_method_with_a_required_role_requires_credentials_before_the_request_is_decoded() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    let unauthenticated = tracker.client_with_token(None);
    for method in our_methods().iter().filter(|method| method.required_role.is_some()) {
        for message in [&b""[..], b"\xff\xff\xff"] {
            let refused = call(&tracker, &unauthenticated, &method.name, message).await;
            let status = assert_error(refused, Code::Unauthenticated, "UNAUTHENTICATED");
            assert!(status.message().contains("authorization: Bearer"), "{}: {status:?}", method.name);
        }
    }
    // Unauthenticated callers cannot find out which methods exist.
    let unknown = call(&tracker, &unauthenticated, "IssueService/NoSuchMethod", b"").await;
    assert_error(unknown, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn empty_mutation_is_invalid_and_names_the_missing_fields() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for method in our_methods().iter().filter(|method| method.mutates()) {
        // Login fails with UNAUTHENTICATED, and Logout has no required field.
        if [LOGIN, "AuthService/Logout"].contains(&&*method.name) {
            continue;
        }
        let status =
            assert_error(call(&tracker, &tracker.admin, &method.name, b"").await, Code::InvalidArgument, "INVALID");
        assert!(!bad_fields(&status).is_empty(), "{}: {status:?}", method.name);
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn undecodable_message_is_invalid() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for method in our_methods() {
        // A field number of 0, a string that is not UTF-8, a length beyond the end.
        for message in [&b"\x00"[..], b"\x0a\x02\xc3\x28\x0a", b"\x0a\xff"] {
            let refused = call(&tracker, &tracker.admin, &method.name, message).await;
            assert_error(refused, Code::InvalidArgument, "INVALID");
        }
    }
    assert_eq!(tracker.contents().await, before);
}
