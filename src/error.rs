//! The errors of requests, and the only place that turns them into gRPC statuses.

pub mod refusals;
mod text;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use tokio_postgres::error::{DbError, Severity, SqlState};
use tonic::{Code, Status};
use tonic_types::{
    BadRequest, ErrorDetail, ErrorInfo, FieldViolation, PreconditionFailure, PreconditionViolation, ResourceInfo,
    RetryInfo, StatusExt,
};
use uuid::Uuid;

pub use self::text::{is_invisible, quote};
use self::{
    refusals::{count_call_refusal, count_refused_statement},
    text::{indices, join, named},
};

/// `ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "issuetracker";
/// The delay in `RetryInfo`: long enough for a queue to drain, short enough for a person.
pub const RETRY_DELAY: Duration = Duration::from_millis(500);

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Fields of the request are invalid. Lists all violations.
    #[error("{}", join(.0))]
    Invalid(Vec<Violation>),
    /// A field is invalid in a way that clients handle by its reason.
    #[error("{message}")]
    InvalidReason { reason: &'static str, field: &'static str, message: String },
    /// Lists all resources that do not exist, and with them those that exist already.
    #[error("{}", join(.0))]
    NotFound(Vec<Resource>),
    /// Lists all resources that exist already.
    #[error("{}", join(.0))]
    AlreadyExists(Vec<Resource>),
    /// Lists all issues whose version is not the expected one.
    #[error("{}", join(.0))]
    VersionMismatch(Vec<StaleVersion>),
    /// A resource is in a state that does not allow the change.
    #[error("{}", join(.violations))]
    Precondition { reason: &'static str, violations: Vec<Violation> },
    /// A concurrent request prevents it. A retry may succeed.
    #[error("{message}")]
    Aborted { reason: &'static str, message: String },
    /// The transaction conflicted with another one and was rolled back. The server itself retries it.
    #[error("{0}; try again")]
    Conflict(&'static str),
    /// An offset in a stream is beyond the data received so far.
    #[error("{message}")]
    OffsetGap { message: String, expected_offset: i64 },
    /// Issues of an import were changed since. Has their number and the first of their ids.
    #[error("import_id: {count} issues were changed or commented since; set force to leave these and undo the rest")]
    ChangedSince { count: i64, ids: Vec<Uuid> },
    /// The method or the compression is not supported.
    #[error("{0}")]
    Unimplemented(&'static str),
    #[error("{0}")]
    Unauthenticated(&'static str),
    #[error("{0}")]
    PermissionDenied(String),
    /// All request slots are taken. The client is asked to retry after the delay.
    #[error("too many concurrent requests (limit {requests_max}); try again later")]
    Overloaded { requests_max: u32, delay: Duration },
    /// A limit on concurrent work is reached.
    #[error("{0}")]
    Exhausted(String),
    /// A limit on stored data is reached. `metadata` has the numbers.
    #[error("{message}")]
    QuotaExceeded { reason: &'static str, message: String, metadata: Vec<(&'static str, i64)> },
    /// The metadata of the call is too large.
    #[error("metadata: larger than {bytes_max} bytes; expected less metadata")]
    MetadataTooLarge { bytes_max: usize },
    /// Too many wrong passwords. The next attempt is admitted after the delay.
    #[error("too many wrong passwords; try again in {} s", seconds_up(.delay))]
    TooManyTries { delay: Duration },
    /// A time limit is exceeded.
    #[error("{message}")]
    Timeout { reason: &'static str, message: String },
    /// The client has disconnected or reset the stream.
    #[error("the client cancelled the call")]
    Cancelled,
    /// The database is unavailable.
    #[error("the database is not available; try again")]
    Unavailable,
    /// The session of the database is read-only: during a failover, for example. Nothing was written.
    #[error("the database accepts no writes; nothing was written, try again")]
    ReadOnly,
    /// The connection to the database was lost, and nothing was written.
    #[error("the connection to the database was lost; nothing was written, try again")]
    ConnectionLost,
    /// The connection to the database was lost during the commit of a mutation.
    #[error("{}", outcome_unknown(*.has_request_id))]
    OutcomeUnknown { has_request_id: bool },
    /// The server is shutting down.
    #[error("the server is stopping; retry on another one or later")]
    Stopping,
    /// Any other database error. Its text does not reach the client.
    #[error("database error")]
    Database(Arc<tokio_postgres::Error>),
    /// A bug in the server.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// Whether the server itself repeats a call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    No,
    /// Nothing was written.
    Again,
    /// The outcome is looked up by the request id.
    Lookup,
}

fn outcome_unknown(has_request_id: bool) -> &'static str {
    match has_request_id {
        true => {
            "the connection to the database was lost; retry with the same request_id or import_id to learn the outcome"
        }
        false => "the connection to the database was lost; the change may have been made, check before you retry",
    }
}

/// A field and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Violation {
    pub field: String,
    pub message: String,
}

/// A resource that is missing or exists already.
#[derive(Clone, Debug)]
pub struct Resource {
    /// `issue`, `user`, `label`, `comment`, `api token`.
    pub kind: &'static str,
    /// Its id or name.
    pub name: String,
    /// The field of the request that refers to it.
    pub field: String,
    /// The property that is taken, such as `external id`. Empty if the resource is missing.
    pub taken: &'static str,
}

/// An issue whose version is not the expected one.
#[derive(Clone, Debug)]
pub struct StaleVersion {
    pub field: String,
    pub id: Uuid,
    pub expected: i64,
    pub current: i64,
}

impl Error {
    pub fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation::new(field, message)])
    }

    pub fn not_found(kind: &'static str, field: impl Into<String>, name: impl fmt::Display) -> Self {
        Self::NotFound(vec![Resource::missing(kind, field, name)])
    }

    pub fn already_exists(
        kind: &'static str,
        taken: &'static str,
        field: impl Into<String>,
        name: impl fmt::Display,
    ) -> Self {
        Self::AlreadyExists(vec![Resource::taken(kind, taken, field, name)])
    }

    pub fn precondition(reason: &'static str, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Precondition { reason, violations: vec![Violation::new(field, message)] }
    }

    /// Returns the error of the contract for a status that tonic itself has made, or `None` if the status stands as it is.
    pub fn from_bare(status: &Status) -> Option<Self> {
        match status.code() {
            // Before and after decompression.
            Code::OutOfRange | Code::ResourceExhausted => Some(Self::invalid("request", "a message is too large")),
            Code::Internal | Code::InvalidArgument => Some(Self::undecodable()),
            // tonic has a message for an unsupported compression, and none for an unknown method.
            Code::Unimplemented if status.message().is_empty() => {
                Some(Self::Unimplemented("no such method; reflection lists the methods that exist"))
            }
            Code::Unimplemented => Some(Self::Unimplemented("grpc-encoding: not supported; expected gzip or identity")),
            _ => None,
        }
    }

    /// Returns the error of a message that cannot be decoded. The decoder's own message can quote what was sent.
    pub fn undecodable() -> Self {
        Self::invalid("request", "the message cannot be decoded as the request of the method")
    }

    /// Returns `error()` if this is the violation of the constraint `name`, and the same error otherwise.
    pub fn on_constraint(self, name: &str, error: impl FnOnce() -> Error) -> Self {
        match &self {
            Self::Database(source) if constraint(source) == Some(name) => error(),
            _ => self,
        }
    }

    /// Returns whether it is certain that the transaction was rolled back.
    pub fn is_undone(&self) -> bool {
        match self {
            // PostgreSQL reports errors of transactions that it has rolled back.
            Self::Database(error) => error.as_db_error().is_some(),
            Self::Aborted { .. }
            | Self::Conflict(_)
            | Self::Invalid(_)
            | Self::InvalidReason { .. }
            | Self::NotFound(_)
            | Self::AlreadyExists(_)
            | Self::VersionMismatch(_)
            | Self::Precondition { .. }
            | Self::QuotaExceeded { .. }
            | Self::ChangedSince { .. } => true,
            Self::OffsetGap { .. }
            | Self::Unimplemented(_)
            | Self::Unauthenticated(_)
            | Self::PermissionDenied(_)
            | Self::Exhausted(_)
            | Self::Overloaded { .. }
            | Self::MetadataTooLarge { .. }
            | Self::TooManyTries { .. }
            | Self::Timeout { .. }
            | Self::Cancelled
            | Self::Unavailable
            | Self::ReadOnly
            | Self::ConnectionLost
            | Self::OutcomeUnknown { .. }
            | Self::Stopping
            | Self::Internal(_) => false,
        }
    }

    /// Returns whether the server itself repeats the call.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Conflict(_) | Self::ConnectionLost | Self::ReadOnly => Retry::Again,
            Self::OutcomeUnknown { has_request_id: true } => Retry::Lookup,
            _ => Retry::No,
        }
    }

    /// Returns whether the condition is transient and independent of the caller.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Conflict(_)
                | Self::ConnectionLost
                | Self::OutcomeUnknown { .. }
                | Self::Unavailable
                | Self::ReadOnly
                | Self::Exhausted(_)
                | Self::Overloaded { .. }
        )
    }

    /// Returns whether the error shows the outcome of an earlier attempt when a mutation is repeated by its request id.
    pub fn is_decided(&self) -> bool {
        match self {
            Self::Aborted { reason, .. } => *reason != "CONFLICT",
            Self::Timeout { .. } | Self::Database(_) | Self::Internal(_) => false,
            error => !error.is_passing(),
        }
    }

    /// Turns a lost connection into an unknown outcome, for errors of a commit.
    pub fn in_commit(self) -> Self {
        match self {
            Self::ConnectionLost => Self::OutcomeUnknown { has_request_id: false },
            error => error,
        }
    }

    /// Records that the call with the unknown outcome has a request id: a retry with it finds out the outcome. Returns other
    /// errors unchanged.
    pub fn with_request_id(self) -> Self {
        match self {
            Self::OutcomeUnknown { .. } => Self::OutcomeUnknown { has_request_id: true },
            error => error,
        }
    }

    /// Returns the error that a status was made from, or `None` for a status of another library.
    pub fn of_status(status: &Status) -> Option<&Self> {
        std::error::Error::source(status)?.downcast_ref()
    }

    /// Returns the error of a message with more than `bytes_max` bytes.
    pub fn too_large(bytes_max: usize) -> Self {
        Self::invalid("request", format!("the message is too large; expected at most {bytes_max} bytes"))
    }

    /// Returns the name of the violated constraint, if the error is such a violation.
    pub fn constraint(&self) -> Option<&str> {
        match self {
            Self::Database(source) => constraint(source),
            _ => None,
        }
    }
}

fn constraint(error: &tokio_postgres::Error) -> Option<&str> {
    error.as_db_error().and_then(DbError::constraint)
}

impl Violation {
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

impl Resource {
    pub fn missing(kind: &'static str, field: impl Into<String>, name: impl fmt::Display) -> Self {
        Self::taken(kind, "", field, name)
    }

    pub fn taken(kind: &'static str, taken: &'static str, field: impl Into<String>, name: impl fmt::Display) -> Self {
        Self { kind, name: quote(&name.to_string()), field: field.into(), taken }
    }
}

impl Resource {
    /// Returns whether the resource does not exist. Otherwise it is taken.
    pub fn is_missing(&self) -> bool {
        self.taken.is_empty()
    }

    fn problem(&self) -> &'static str {
        if self.taken.is_empty() { "does not exist" } else { "is taken" }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, name, field, taken } = self;
        match *taken {
            "" => write!(f, "{field}: there is no {kind} \"{name}\""),
            taken => write!(f, "{field}: {taken} \"{name}\" is taken by another {kind}"),
        }
    }
}

impl fmt::Display for StaleVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { field, id, expected, current } = self;
        write!(f, "{field}: issue \"{id}\" has version {current}, not {expected}; read it again")
    }
}

/// Whether the server ends the connection in whatever it was doing, be it a commit: not when it did not let one in.
fn ends_the_session(error: &tokio_postgres::Error) -> bool {
    let severity = error.as_db_error().and_then(DbError::parsed_severity);
    let not_begun = [SqlState::CANNOT_CONNECT_NOW, SqlState::TOO_MANY_CONNECTIONS];
    let is_refusal = error
        .code()
        .is_some_and(|code| not_begun.contains(code) || code.code().starts_with("28") || code.code().starts_with("3D"));
    matches!(severity, Some(Severity::Fatal | Severity::Panic)) && !is_refusal
}

/// Returns whether the database cannot be reached, refuses connections for now, or accepts no writes. A retry can succeed.
pub fn is_unavailable(error: &tokio_postgres::Error) -> bool {
    let io_error = std::error::Error::source(error).and_then(|source| source.downcast_ref::<std::io::Error>());
    match error.code() {
        Some(state) => {
            const STATES: [SqlState; 3] = [
                SqlState::READ_ONLY_SQL_TRANSACTION,
                SqlState::LOCK_NOT_AVAILABLE,
                SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT,
            ];
            // 08: connections; 53: no memory, disk space or connections; 57P: starting or stopping.
            STATES.contains(state) || ["08", "53", "57P"].iter().any(|class| state.code().starts_with(class))
        }
        // TLS reports a certificate that it refuses as invalid data.
        None => error.is_closed() || io_error.is_some_and(|error| error.kind() != std::io::ErrorKind::InvalidData),
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(state) = error.code() else {
            // Not an answer of the server: the connection is lost, or a value does not have the type that the program
            // takes for granted.
            return if error.is_closed() || std::error::Error::source(&error).is_some_and(|s| s.is::<std::io::Error>()) {
                Self::ConnectionLost
            } else {
                Self::Database(Arc::new(error))
            };
        };
        if ends_the_session(&error) {
            return Self::ConnectionLost;
        }
        match *state {
            SqlState::T_R_SERIALIZATION_FAILURE | SqlState::T_R_DEADLOCK_DETECTED => {
                Self::Conflict("the request conflicts with a concurrent one")
            }
            SqlState::LOCK_NOT_AVAILABLE => Self::Aborted {
                reason: "CONFLICT",
                message: "a concurrent request holds a lock; nothing was written, try again".to_owned(),
            },
            SqlState::QUERY_CANCELED => Self::Timeout {
                reason: "STATEMENT_TIMEOUT",
                message: "a statement exceeded the time limit; nothing was written".to_owned(),
            },
            SqlState::READ_ONLY_SQL_TRANSACTION => {
                count_refused_statement(&error);
                Self::ReadOnly
            }
            // Class 08: connections; class 53: no memory, disk space or connections.
            SqlState::CANNOT_CONNECT_NOW | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => {
                count_refused_statement(&error);
                Self::Unavailable
            }
            _ if state.code().starts_with("08") || state.code().starts_with("53") => {
                count_refused_statement(&error);
                Self::Unavailable
            }
            _ => Self::Database(Arc::new(error)),
        }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        log(&error);
        let message = error.to_string();
        let code = error.code();
        let mut details = vec![ErrorInfo::new(error.reason(), ERROR_DOMAIN, error.metadata()).into()];
        details.extend(error.details());
        let mut status = Status::with_error_details_vec(code, message, details);
        status.set_source(Arc::new(error));
        status
    }
}

/// Logs errors that are not the caller's fault; refusals at most once a minute per cause. Never logs the driver's text: it can
/// quote values.
fn log(error: &Error) {
    match error {
        Error::Database(source) => {
            let source = source.as_db_error();
            tracing::error!(
                sqlstate = source.map(|error| error.code().code()),
                table = source.and_then(DbError::table),
                constraint = source.and_then(DbError::constraint),
                "database error"
            );
        }
        Error::Internal(what) => tracing::error!(what, "internal error"),
        Error::Overloaded { .. }
        | Error::Exhausted(_)
        | Error::Unavailable
        | Error::ReadOnly
        | Error::ConnectionLost
        | Error::OutcomeUnknown { .. }
        | Error::Timeout { reason: "STATEMENT_TIMEOUT", .. } => {
            count_call_refusal(error.reason(), &error.to_string());
        }
        _ => {}
    }
}

impl Error {
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::InvalidReason { .. } => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::VersionMismatch(_) | Self::Aborted { .. } | Self::Conflict(_) => Code::Aborted,
            Self::Precondition { .. } | Self::ChangedSince { .. } => Code::FailedPrecondition,
            Self::OffsetGap { .. } => Code::OutOfRange,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::Unauthenticated(_) => Code::Unauthenticated,
            Self::PermissionDenied(_) => Code::PermissionDenied,
            Self::Exhausted(_)
            | Self::Overloaded { .. }
            | Self::QuotaExceeded { .. }
            | Self::MetadataTooLarge { .. }
            | Self::TooManyTries { .. } => Code::ResourceExhausted,
            Self::Timeout { .. } => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unavailable
            | Self::ReadOnly
            | Self::ConnectionLost
            | Self::OutcomeUnknown { .. }
            | Self::Stopping => Code::Unavailable,
            Self::Database(_) | Self::Internal(_) => Code::Internal,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID",
            Self::InvalidReason { reason, .. }
            | Self::Precondition { reason, .. }
            | Self::Aborted { reason, .. }
            | Self::QuotaExceeded { reason, .. }
            | Self::Timeout { reason, .. } => reason,
            Self::NotFound(_) => "NOT_FOUND",
            Self::AlreadyExists(_) => "ALREADY_EXISTS",
            Self::VersionMismatch(_) => "VERSION_MISMATCH",
            Self::OffsetGap { .. } => "IMPORT_OFFSET_GAP",
            Self::ChangedSince { .. } => "IMPORT_CHANGED_SINCE",
            Self::Unimplemented(_) => "UNIMPLEMENTED",
            Self::Unauthenticated(_) => "UNAUTHENTICATED",
            Self::PermissionDenied(_) => "PERMISSION_DENIED",
            Self::Exhausted(_) | Self::Overloaded { .. } => "OVERLOADED",
            Self::MetadataTooLarge { .. } => "METADATA_TOO_LARGE",
            Self::TooManyTries { .. } => "TOO_MANY_TRIES",
            Self::Cancelled => "CANCELLED",
            Self::Conflict(_) => "CONFLICT",
            Self::Unavailable | Self::ReadOnly | Self::ConnectionLost => "DATABASE_UNAVAILABLE",
            Self::OutcomeUnknown { .. } => "OUTCOME_UNKNOWN",
            Self::Stopping => "STOPPING",
            Self::Database(_) | Self::Internal(_) => "INTERNAL",
        }
    }

    fn details(&self) -> Vec<ErrorDetail> {
        match self {
            Self::Invalid(items) => vec![bad_request(named(items).iter().map(|item| (&*item.field, &*item.message)))],
            Self::InvalidReason { field, message, .. } => vec![bad_request([(*field, &**message)])],
            Self::NotFound(items) | Self::AlreadyExists(items) => {
                let items = named(items);
                let info = |item: &Resource| ResourceInfo::new(item.kind, &item.name, "", item.problem()).into();
                let mut details: Vec<ErrorDetail> = items.iter().map(info).collect();
                details.push(bad_request(items.iter().map(|item| (&*item.field, item.problem()))));
                details
            }
            Self::VersionMismatch(items) => {
                vec![bad_request(named(items).iter().map(|item| (&*item.field, "stale version")))]
            }
            Self::Precondition { reason, violations } => {
                let violation = |item: &Violation| PreconditionViolation::new(*reason, &item.field, &item.message);
                vec![PreconditionFailure::new(named(violations).iter().map(violation).collect::<Vec<_>>()).into()]
            }
            Self::ChangedSince { .. } => {
                let violation = PreconditionViolation::new(self.reason(), "import_id", self.to_string());
                vec![PreconditionFailure::new(vec![violation]).into()]
            }
            Self::Exhausted(_)
            | Self::Unavailable
            | Self::ReadOnly
            | Self::ConnectionLost
            | Self::OutcomeUnknown { has_request_id: true }
            | Self::Stopping
            | Self::Conflict(_)
            | Self::Aborted { .. } => vec![RetryInfo::new(Some(RETRY_DELAY)).into()],
            Self::TooManyTries { delay } | Self::Overloaded { delay, .. } => vec![RetryInfo::new(Some(*delay)).into()],
            Self::OffsetGap { .. }
            | Self::QuotaExceeded { .. }
            | Self::Unimplemented(_)
            | Self::Unauthenticated(_)
            | Self::PermissionDenied(_)
            | Self::MetadataTooLarge { .. }
            | Self::Timeout { .. }
            | Self::Cancelled
            | Self::OutcomeUnknown { has_request_id: false }
            | Self::Database(_)
            | Self::Internal(_) => Vec::new(),
        }
    }

    fn metadata(&self) -> HashMap<String, String> {
        let mut metadata = HashMap::new();
        let mut add = |key: &str, value: String| drop(metadata.insert(key.to_owned(), value));
        let (fields, named_count): (Vec<&str>, usize) = match self {
            Self::Invalid(items) | Self::Precondition { violations: items, .. } => {
                (items.iter().map(|item| &*item.field).collect(), named(items).len())
            }
            Self::NotFound(items) | Self::AlreadyExists(items) => {
                (items.iter().map(|item| &*item.field).collect(), named(items).len())
            }
            Self::VersionMismatch(items) => {
                if let Some(first) = items.first() {
                    add("current_version", first.current.to_string());
                }
                (items.iter().map(|item| &*item.field).collect(), named(items).len())
            }
            Self::OffsetGap { expected_offset, .. } => {
                add("expected_offset", expected_offset.to_string());
                (Vec::new(), 0)
            }
            Self::MetadataTooLarge { bytes_max } => {
                add("bytes_max", bytes_max.to_string());
                (Vec::new(), 0)
            }
            Self::ChangedSince { count, ids } => {
                add("changed_count", count.to_string());
                add("changed_ids", ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(","));
                (Vec::new(), 0)
            }
            Self::QuotaExceeded { metadata, .. } => {
                metadata.iter().for_each(|(key, value)| add(key, value.to_string()));
                (Vec::new(), 0)
            }
            _ => (Vec::new(), 0),
        };
        if fields.len() > named_count {
            add("indices", indices(&fields));
        }
        metadata
    }
}

/// Returns the delay in seconds, rounded up.
fn seconds_up(delay: &Duration) -> u64 {
    delay.as_secs() + u64::from(delay.subsec_nanos() > 0)
}

fn bad_request<'a>(violations: impl IntoIterator<Item = (&'a str, &'a str)>) -> ErrorDetail {
    let violations = violations.into_iter().map(|(field, message)| FieldViolation::new(field, message));
    BadRequest::new(violations.collect::<Vec<_>>()).into()
}

#[cfg(test)]
mod tests;
