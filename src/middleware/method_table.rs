//! What the middleware knows about each method, declared in `proto/` next to the method.
//!
//! `build.rs` generates the table from the descriptors: the streaming flags, `idempotency_level`, and the options of
//! `options.proto`. Methods of other packages, such as `grpc.health.v1` and `grpc.reflection`, are not in
//! the table, and neither are methods that do not exist.

use crate::pb::Role;

/// What a method declares about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MethodPolicy {
    /// The path of the HTTP request: `/issuetracker.v1.IssueService/GetIssue`.
    pub path: &'static str,
    /// The full name of the service: `issuetracker.v1.IssueService`.
    pub service: &'static str,
    /// The name of the method: `GetIssue`.
    pub method: &'static str,
    /// Whether the request is a stream of messages.
    pub client_streaming: bool,
    /// Whether the response is a stream of messages.
    pub server_streaming: bool,
    /// Whether the method has no side effects (`idempotency_level = NO_SIDE_EFFECTS`).
    pub only_reads: bool,
    /// The lowest role that may call the method.
    pub required_role: RequiredRole,
    /// The deadline of calls whose client sets none, where it differs from the configured default.
    pub default_deadline_seconds: Option<u32>,
    /// The size in KiB that no response of a mutation exceeds. `None`: it is small.
    pub max_response_kib: Option<u32>,
    /// How many times the size of the request a response is at most, beside a small part.
    pub max_response_per_request: Option<u32>,
}

/// The lowest role that may call a method. Each role may also call what the roles before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequiredRole {
    /// Any caller; no credentials are needed.
    Unauthenticated,
    /// Any user with a valid token.
    Viewer,
    /// Users with [`Role::Member`] or [`Role::Admin`].
    Member,
    /// Users with [`Role::Admin`].
    Admin,
}

impl RequiredRole {
    /// Returns the role that the caller must have at least, or `None` if callers need no credentials.
    pub fn role(self) -> Option<Role> {
        match self {
            Self::Unauthenticated => None,
            Self::Viewer => Some(Role::Viewer),
            Self::Member => Some(Role::Member),
            Self::Admin => Some(Role::Admin),
        }
    }
}

/// The methods of `issuetracker.v1`, ordered by path.
pub static METHODS: &[MethodPolicy] = &include!(concat!(env!("OUT_DIR"), "/method_table.rs"));

#[cfg(test)]
mod tests {
    use prost::Message;
    use prost_types::{FileDescriptorSet, MethodDescriptorProto};

    use super::*;

    /// Returns the methods of the package with their paths, and the names of the fields of their requests.
    fn described_methods() -> Vec<(String, MethodDescriptorProto, Vec<String>)> {
        let files = FileDescriptorSet::decode(crate::FILE_DESCRIPTOR_SET).unwrap().file;
        let ours: Vec<_> = files.iter().filter(|file| file.package() == "issuetracker.v1").collect();
        let fields = |message: &str| {
            let mut messages = ours.iter().flat_map(|file| &file.message_type);
            let found = messages.find(|found| message.ends_with(&format!(".{}", found.name()))).unwrap();
            found.field.iter().map(|field| field.name().to_owned()).collect()
        };
        let services = ours.iter().flat_map(|file| &file.service);
        let methods = services.flat_map(|service| service.method.iter().map(move |method| (service, method)));
        methods
            .map(|(service, method)| {
                let path = format!("/issuetracker.v1.{}/{}", service.name(), method.name());
                (path, method.clone(), fields(method.input_type()))
            })
            .collect()
    }

    fn find(path: &str) -> Option<&'static MethodPolicy> {
        METHODS.iter().find(|method| method.path == path)
    }

    #[test]
    fn every_method_is_found_by_its_path_with_the_streaming_flags_of_its_descriptor() {
        let described = described_methods();
        assert_eq!(described.len(), METHODS.len());
        for (path, method, _) in described {
            let policy = find(&path).unwrap_or_else(|| panic!("{path} is not in the table"));
            assert_eq!(policy.path, path);
            assert_eq!(format!("/{}/{}", policy.service, policy.method), path);
            assert_eq!(policy.client_streaming, method.client_streaming(), "{path}");
            assert_eq!(policy.server_streaming, method.server_streaming(), "{path}");
        }
    }

    #[test]
    fn the_table_is_ordered_by_path_without_duplicates() {
        assert!(METHODS.is_sorted_by(|left, right| left.path < right.path));
    }

    #[test]
    fn unknown_methods_and_methods_of_other_packages_are_not_found() {
        for path in [
            "",
            "/",
            "/issuetracker.v1.IssueService/",
            "/issuetracker.v1.IssueService/NoSuchMethod",
            "/issuetracker.v1.IssueService/GetIssue/",
            "issuetracker.v1.IssueService/GetIssue",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(find(path), None, "{path}");
        }
    }

    #[test]
    fn a_method_only_reads_exactly_if_it_has_no_dry_run() {
        let mut reads = 0;
        for (path, _, fields) in described_methods() {
            let policy = find(&path).unwrap();
            // ImportIssues has `validate_only` in its options.
            let writes = policy.client_streaming || fields.iter().any(|field| field == "validate_only");
            assert_eq!(policy.only_reads, !writes, "{path}");
            reads += usize::from(policy.only_reads);
        }
        assert!(reads > 10);
    }

    #[test]
    fn only_login_needs_no_credentials() {
        let unauthenticated = METHODS.iter().filter(|policy| policy.required_role.role().is_none());
        let unauthenticated: Vec<_> = unauthenticated.map(|policy| policy.path).collect();
        assert_eq!(unauthenticated, ["/issuetracker.v1.AuthService/Login"]);
    }
}
