//! Looks up what is declared about the method of a request.

use std::{
    collections::HashMap,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Request;
use prost::Message;
use prost_types::FileDescriptorSet;
use tower::{Layer, Service};

use super::method_table::{METHODS, MethodPolicy, RequiredRole};
use crate::{metrics, pb::Role};

/// The largest response of a mutation that declares no size.
const SMALL_RESPONSE_BYTES_MAX: usize = 4 * 1024;
/// The index of all methods that are not in the table.
const UNKNOWN_METHOD: u16 = 0;

/// What the layers know about the method of a request. It is in the extensions of each request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallPolicy {
    /// The index of the method in [`MethodTable::names`].
    pub method: u16,
    /// Whether the method belongs to this service. Health, reflection and methods that do not exist do not.
    pub is_own: bool,
    /// Whether the request is a stream of messages.
    pub client_streaming: bool,
    /// Whether the response is a stream of messages.
    pub server_streaming: bool,
    /// Whether the method has no side effects.
    pub only_reads: bool,
    /// The lowest role that may call the method.
    pub required_role: RequiredRole,
    /// The deadline of calls whose client sets none, where it differs from the configured default.
    pub default_deadline: Option<Duration>,
    /// The size of the responses of a mutation.
    pub response_size: ResponseSize,
}

/// How large the response of a mutation can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseSize {
    bytes_max: usize,
    /// If not 0: the response has at most so many bytes for each one of the request, besides [`SMALL_RESPONSE_BYTES_MAX`].
    bytes_per_request_byte_max: usize,
}

impl ResponseSize {
    pub const SMALL: Self = Self { bytes_max: SMALL_RESPONSE_BYTES_MAX, bytes_per_request_byte_max: 0 };

    /// Returns how large the response to a request of this size can be, in bytes.
    pub fn max(self, request_bytes: usize) -> usize {
        match self.bytes_per_request_byte_max {
            0 => self.bytes_max,
            factor => self.bytes_max.min(SMALL_RESPONSE_BYTES_MAX + factor * request_bytes),
        }
    }
}

impl CallPolicy {
    /// The policy of methods of other packages that are not in the table.
    const UNKNOWN: Self = Self {
        method: UNKNOWN_METHOD,
        is_own: false,
        client_streaming: true,
        server_streaming: true,
        only_reads: false,
        required_role: RequiredRole::Unauthenticated,
        default_deadline: None,
        response_size: ResponseSize::SMALL,
    };

    /// The policy of requests that did not pass [`MethodPolicyLayer`]: a stack without it serves administrators only.
    const MISSING: Self = Self { required_role: RequiredRole::Admin, ..Self::UNKNOWN_OWN };

    /// The policy of methods of this package that do not exist. Only authenticated callers can find out that they do not.
    const UNKNOWN_OWN: Self = Self {
        is_own: true,
        client_streaming: false,
        server_streaming: false,
        required_role: RequiredRole::Viewer,
        ..Self::UNKNOWN
    };

    /// Returns the policy that [`MethodPolicyLayer`] has attached to the request.
    pub fn of<B>(request: &Request<B>) -> Self {
        request.extensions().get().copied().unwrap_or(Self::MISSING)
    }

    /// Returns the role that the caller must have at least, or `None` if the method needs no credentials.
    pub fn role(&self) -> Option<Role> {
        self.required_role.role()
    }

    /// Returns whether the request or the response is a stream of messages.
    pub fn is_streaming(&self) -> bool {
        self.client_streaming || self.server_streaming
    }
}

impl From<&MethodPolicy> for CallPolicy {
    fn from(declared: &MethodPolicy) -> Self {
        Self {
            method: UNKNOWN_METHOD,
            is_own: true,
            client_streaming: declared.client_streaming,
            server_streaming: declared.server_streaming,
            only_reads: declared.only_reads,
            required_role: declared.required_role,
            default_deadline: declared.default_deadline_seconds.map(|seconds| Duration::from_secs(seconds.into())),
            response_size: ResponseSize {
                bytes_max: declared.max_response_kib.map_or(SMALL_RESPONSE_BYTES_MAX, |kib| kib as usize * 1024),
                bytes_per_request_byte_max: declared.max_response_per_request.unwrap_or(0) as usize,
            },
        }
    }
}

/// The policies of methods by their paths.
#[derive(Clone, Debug)]
pub struct MethodTable {
    policies: HashMap<String, CallPolicy>,
    names: Vec<String>,
    /// How the paths of this package's methods begin: `/issuetracker.v1.`.
    own_prefix: Option<String>,
}

impl MethodTable {
    /// Returns the methods of this service.
    pub fn of_own_methods() -> Self {
        let package = METHODS.first().and_then(|method| method.service.rsplit_once('.'));
        let empty = Self {
            policies: HashMap::new(),
            names: vec![metrics::OTHER.to_owned()],
            own_prefix: package.map(|(package, _)| format!("/{package}.")),
        };
        METHODS.iter().fold(empty, |table, method| table.with_method(method.path, method.into()))
    }

    /// Returns the names of the methods, such as `issuetracker.v1.IssueService/GetIssue`, by [`CallPolicy::method`]. The first
    /// one stands for methods that are not in the table.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Adds the methods of another package, such as gRPC health, from its encoded descriptors. They need no credentials.
    pub fn with_third_party(mut self, descriptor_set: &[u8]) -> Result<Self, prost::DecodeError> {
        for file in FileDescriptorSet::decode(descriptor_set)?.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let policy = CallPolicy {
                        client_streaming: method.client_streaming(),
                        server_streaming: method.server_streaming(),
                        ..CallPolicy::UNKNOWN
                    };
                    self = self.with_method(path, policy);
                }
            }
        }
        Ok(self)
    }

    /// Adds one method.
    pub fn with_method(mut self, path: impl Into<String>, policy: CallPolicy) -> Self {
        let path = path.into();
        // A table of more methods would call the others unknown.
        let method = u16::try_from(self.names.len()).unwrap_or(UNKNOWN_METHOD);
        self.names.push(path.trim_start_matches('/').to_owned());
        self.policies.insert(path, CallPolicy { method, ..policy });
        self
    }

    fn policy(&self, path: &str) -> CallPolicy {
        let is_own = || self.own_prefix.as_ref().is_some_and(|prefix| path.starts_with(prefix));
        match self.policies.get(path) {
            Some(policy) => *policy,
            None if is_own() => CallPolicy::UNKNOWN_OWN,
            None => CallPolicy::UNKNOWN,
        }
    }
}

/// Attaches the [`CallPolicy`] of its method to each request.
#[derive(Clone, Debug)]
pub struct MethodPolicyLayer {
    methods: Arc<MethodTable>,
}

impl MethodPolicyLayer {
    pub fn new(methods: MethodTable) -> Self {
        Self { methods: Arc::new(methods) }
    }
}

impl<S> Layer<S> for MethodPolicyLayer {
    type Service = MethodPolicies<S>;

    fn layer(&self, inner: S) -> MethodPolicies<S> {
        MethodPolicies { methods: Arc::clone(&self.methods), inner }
    }
}

/// The service of [`MethodPolicyLayer`].
#[derive(Clone)]
pub struct MethodPolicies<S> {
    methods: Arc<MethodTable>,
    inner: S,
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for MethodPolicies<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        let policy = self.methods.policy(request.uri().path());
        request.extensions_mut().insert(policy);
        self.inner.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_of_other_packages_need_no_credentials_and_stream_as_their_descriptors_say() {
        let table = MethodTable::of_own_methods().with_third_party(tonic_health::pb::FILE_DESCRIPTOR_SET).unwrap();
        let check = table.policy("/grpc.health.v1.Health/Check");
        assert!(!check.is_own && !check.is_streaming() && check.role().is_none());
        let watch = table.policy("/grpc.health.v1.Health/Watch");
        assert!(!watch.client_streaming && watch.server_streaming);
        assert!(table.policy("/issuetracker.v1.IssueService/GetIssue").only_reads);
    }

    #[test]
    fn methods_are_named_by_their_index() {
        let table = MethodTable::of_own_methods().with_third_party(tonic_health::pb::FILE_DESCRIPTOR_SET).unwrap();
        let name = |path: &str| &*table.names()[usize::from(table.policy(path).method)];
        for method in ["issuetracker.v1.IssueService/GetIssue", "grpc.health.v1.Health/Check"] {
            assert_eq!(name(&format!("/{method}")), method);
        }
        assert_eq!(name("/issuetracker.v1.IssueService/Nothing"), "_OTHER");
        assert_eq!(table.names().len(), table.policies.len() + 1);
    }

    #[test]
    fn response_sizes_are_bounded_by_the_declaration_and_the_request() {
        let table = MethodTable::of_own_methods();
        let max =
            |method: &str, bytes| table.policy(&format!("/issuetracker.v1.{method}")).response_size.max(bytes) / 1024;
        assert_eq!(["IssueService/UpdateIssue", "LabelService/CreateLabel"].map(|method| max(method, 1024)), [400, 4]);
        assert_eq!([0, 1024, 1024 * 1024].map(|bytes| max("IssueService/CreateIssue", bytes)), [4, 44, 400]);
    }

    #[test]
    fn methods_that_do_not_exist_need_credentials_in_this_package_only() {
        let table = MethodTable::of_own_methods();
        for path in ["/issuetracker.v1.IssueService/Nothing", "/issuetracker.v1.NoService/Get"] {
            assert_eq!(table.policy(path), CallPolicy::UNKNOWN_OWN, "{path}");
        }
        for path in ["/grpc.health.v1.Health/Check", "/issuetracker.v2.IssueService/GetIssue", "/", ""] {
            assert_eq!(table.policy(path), CallPolicy::UNKNOWN, "{path}");
        }
    }
}
