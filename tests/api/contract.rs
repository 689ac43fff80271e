//! The rules that hold for all RPCs: by the descriptors, so that a new RPC that nobody has thought about fails here.

mod authorization;
mod layers;
mod request_ids;
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

/// The mutations without request id: no secret is kept for a replay; an import has its own id, in its options.
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

    /// A field of the request that says how the request is to be handled.
    fn field(&self, name: &str) -> Option<(u32, Type)> {
        let field = self.request.field.iter().find(|field| field.name() == name)?;
        Some((field.number() as u32, field.r#type()))
    }

    /// The message, with a request id in addition.
    fn with_request_id(&self, message: &[u8], id: &str) -> Vec<u8> {
        let mut message = message.to_vec();
        prost::encoding::string::encode(self.field("request_id").unwrap().0, &id.to_owned(), &mut message);
        message
    }

    /// The message, only to be tried.
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

/// Calls `Service/Method` of ours with one message, whatever that is.
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
fn everything_in_the_contract_has_a_comment() {
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

/// Places of a message and of all that is in it, as `SourceCodeInfo` has them, with their names.
fn expect_message(message: &DescriptorProto, path: &[i32], name: &str, expected: &mut Vec<(Vec<i32>, String)>) {
    expected.push((path.to_vec(), name.to_owned()));
    for (index, field) in (0..).zip(&message.field) {
        expected.push(([path, &[2, index]].concat(), format!("{name}.{}", field.name())));
    }
    // Of a map there is nothing to say but what its field says.
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
fn every_mutation_takes_a_request_id_and_can_be_tried() {
    let methods = our_methods();
    let names: BTreeSet<&str> = methods.iter().map(|method| &*method.name).collect();
    for listed in WITHOUT_REQUEST_ID {
        assert!(names.contains(listed), "{listed} is listed here and does not exist");
    }
    for method in &methods {
        let name = &method.name;
        let takes_id = method.mutates() && !WITHOUT_REQUEST_ID.contains(&&**name);
        assert_eq!(method.field("request_id").map(|field| field.1), takes_id.then_some(Type::String), "{name}");
        // An import is tried by its options.
        let is_tried = method.mutates() && name != "ImportService/ImportIssues";
        assert_eq!(method.field("validate_only").map(|field| field.1), is_tried.then_some(Type::Bool), "{name}");
    }
}

#[tokio::test]
async fn without_credentials_every_method_with_a_required_role_is_unauthenticated_whatever_is_sent() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    let nobody = tracker.client_with_token(None);
    for method in our_methods().iter().filter(|method| method.required_role.is_some()) {
        for message in [&b""[..], b"\xff\xff\xff"] {
            let refused = call(&tracker, &nobody, &method.name, message).await;
            let status = assert_error(refused, Code::Unauthenticated, "UNAUTHENTICATED");
            assert!(status.message().contains("authorization: Bearer"), "{}: {status:?}", method.name);
        }
    }
    // Not from somebody without credentials: what there is and what there is not.
    let unknown = call(&tracker, &nobody, "IssueService/NoSuchMethod", b"").await;
    assert_error(unknown, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn an_empty_mutation_is_invalid_and_names_what_is_missing() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for method in our_methods().iter().filter(|method| method.mutates()) {
        // Login is only told that its credentials are wrong; Logout needs nothing.
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
async fn a_message_that_cannot_be_decoded_is_invalid() {
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
