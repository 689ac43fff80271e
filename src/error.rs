//! Everything that can go wrong with a request, and the only place that says how a caller is told.

mod text;

use std::{collections::HashMap, fmt, sync::Arc, time::Duration};

use tokio_postgres::error::{DbError, Severity, SqlState};
use tonic::{Code, Status};
use tonic_types::{
    BadRequest, ErrorDetail, ErrorInfo, FieldViolation, PreconditionFailure, PreconditionViolation, ResourceInfo,
    RetryInfo, StatusExt,
};
use uuid::Uuid;

use self::text::{indices, join, named};
pub use self::text::{is_invisible, quote};

/// `ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "issuetracker";
/// What `RetryInfo` proposes: long enough for a queue to drain, short enough for a person.
pub const RETRY_DELAY: Duration = Duration::from_millis(500);

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The request itself is wrong: all that is wrong with it.
    #[error("{}", join(.0))]
    Invalid(Vec<Violation>),
    /// The request is wrong in a way that programs handle.
    #[error("{message}")]
    InvalidReason { reason: &'static str, field: &'static str, message: String },
    /// All that does not exist.
    #[error("{}", join(.0))]
    NotFound(Vec<Resource>),
    /// All that exists already.
    #[error("{}", join(.0))]
    AlreadyExists(Vec<Resource>),
    /// All issues whose version is not the expected one.
    #[error("{}", join(.0))]
    VersionMismatch(Vec<StaleVersion>),
    /// What it is about is in a state that does not allow it.
    #[error("{}", join(.violations))]
    Precondition { reason: &'static str, violations: Vec<Violation> },
    /// Somebody else is at it; a retry may work.
    #[error("{message}")]
    Aborted { reason: &'static str, message: String },
    /// It got in the way of another one and was rolled back; made again, it may work.
    #[error("{0}; try again")]
    Conflict(&'static str),
    /// A position in a stream is beyond what was received.
    #[error("{message}")]
    OffsetGap { message: String, expected_offset: i64 },
    /// What an import has made was changed since: how many issues, and the first of them.
    #[error("import_id: {count} issues were changed or commented since; set force to leave these and undo the rest")]
    ChangedSince { count: i64, ids: Vec<Uuid> },
    /// There is no such RPC, or it is not spoken in this way.
    #[error("{0}")]
    Unimplemented(&'static str),
    #[error("{0}")]
    Unauthenticated(&'static str),
    #[error("{0}")]
    PermissionDenied(String),
    /// As many requests are under way as are taken at once; those that are refused are asked to stay away for so long.
    #[error("{requests_max} requests are under way, which is as many as are taken at once")]
    Overloaded { requests_max: usize, delay: Duration },
    /// A bound on work at once is reached.
    #[error("{0}")]
    Exhausted(String),
    /// Passwords were tried and wrong too often; the next try is taken after the delay.
    #[error("the password was wrong too often; try again in {} s", seconds_up(.delay))]
    TooManyTries { delay: Duration },
    /// It took too long.
    #[error("{message}")]
    Timeout { reason: &'static str, message: String },
    /// The client has gone away.
    #[error("the stream was cut")]
    Cancelled,
    /// The database is away.
    #[error("the database is not available; try again")]
    Unavailable,
    /// The connection to the database was lost, and nothing was written.
    #[error("the connection to the database was lost; nothing was written, try again")]
    ConnectionLost,
    /// The connection to the database was lost when the mutation was being committed.
    #[error("{}", outcome_unknown(*.has_request_id))]
    OutcomeUnknown { has_request_id: bool },
    /// The service is about to end.
    #[error("the service is stopping; go on with another one, or when it is back")]
    Stopping,
    /// Whatever else the database says.
    #[error("database error")]
    Database(Arc<tokio_postgres::Error>),
    /// A fault of the program.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// Whether a call that has failed is made again, by the service itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    No,
    /// Nothing was written.
    Again,
    /// By its request id, it is found out what became of it.
    Lookup,
}

fn outcome_unknown(has_request_id: bool) -> &'static str {
    match has_request_id {
        true => {
            "the connection to the database was lost; send it again with the same request_id or import_id to learn whether it was done"
        }
        false => "the connection to the database was lost, and it may have been done; look before you send it again",
    }
}

/// A field and what is wrong with it.
#[derive(Clone, Debug)]
pub struct Violation {
    pub field: String,
    pub message: String,
}

/// Something that is missing or taken.
#[derive(Clone, Debug)]
pub struct Resource {
    /// `issue`, `user`, `label`, `comment`, `api token`.
    pub kind: &'static str,
    /// Its id or name.
    pub name: String,
    /// The field of the request that names it.
    pub field: String,
    /// What of it is taken; empty when it is missing.
    pub taken: &'static str,
}

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

    /// An error that tonic itself has made, in this service's terms. None: it stands as it is.
    pub fn from_bare(status: &Status) -> Option<Self> {
        let request = |message: &str| Some(Self::invalid("request", message));
        match status.code() {
            Code::OutOfRange => request("a message is too large"),
            // The decoder's own text can quote what was sent.
            Code::Internal | Code::InvalidArgument => request("the message cannot be decoded as what the method takes"),
            // tonic has a text for a compression that is not supported, and none for an unknown method.
            Code::Unimplemented if status.message().is_empty() => {
                Some(Self::Unimplemented("there is no such method; reflection lists those there are"))
            }
            Code::Unimplemented => {
                Some(Self::Unimplemented("compressed messages are not taken; send them as they are"))
            }
            _ => None,
        }
    }

    /// What a violated constraint means to the caller, said where the statement is.
    pub fn on_constraint(self, name: &str, error: impl FnOnce() -> Error) -> Self {
        match &self {
            Self::Database(source) if constraint(source) == Some(name) => error(),
            _ => self,
        }
    }

    /// Whether it is certain that nothing was written, and another try may fare better.
    pub fn is_undone(&self) -> bool {
        match self {
            // What the server itself says, it says of a transaction that it has rolled back.
            Self::Database(error) => error.as_db_error().is_some(),
            Self::Aborted { .. }
            | Self::Conflict(_)
            | Self::Invalid(_)
            | Self::InvalidReason { .. }
            | Self::NotFound(_)
            | Self::AlreadyExists(_)
            | Self::VersionMismatch(_)
            | Self::Precondition { .. }
            | Self::ChangedSince { .. } => true,
            Self::OffsetGap { .. }
            | Self::Unimplemented(_)
            | Self::Unauthenticated(_)
            | Self::PermissionDenied(_)
            | Self::Exhausted(_)
            | Self::Overloaded { .. }
            | Self::TooManyTries { .. }
            | Self::Timeout { .. }
            | Self::Cancelled
            | Self::Unavailable
            | Self::ConnectionLost
            | Self::OutcomeUnknown { .. }
            | Self::Stopping
            | Self::Internal(_) => false,
        }
    }

    /// Whether the service itself makes the call again.
    pub fn retry(&self) -> Retry {
        match self {
            Self::Conflict(_) | Self::ConnectionLost => Retry::Again,
            Self::OutcomeUnknown { has_request_id: true } => Retry::Lookup,
            _ => Retry::No,
        }
    }

    /// Whether it may be otherwise soon, whoever calls.
    pub fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::Conflict(_)
                | Self::ConnectionLost
                | Self::OutcomeUnknown { .. }
                | Self::Unavailable
                | Self::Exhausted(_)
                | Self::Overloaded { .. }
        )
    }

    /// Whether it says what became of a call that was made once more to find that out.
    pub fn is_decided(&self) -> bool {
        match self {
            Self::Aborted { reason, .. } => *reason != "CONFLICT",
            Self::Timeout { .. } | Self::Database(_) | Self::Internal(_) => false,
            error => !error.is_passing(),
        }
    }

    /// A connection that was lost when a mutation was being committed: whether that was done is not known.
    pub fn in_commit(self) -> Self {
        match self {
            Self::ConnectionLost => Self::OutcomeUnknown { has_request_id: false },
            error => error,
        }
    }

    /// Of a mutation with a request id, by which its outcome can be found out.
    pub fn with_request_id(self) -> Self {
        match self {
            Self::OutcomeUnknown { .. } => Self::OutcomeUnknown { has_request_id: true },
            error => error,
        }
    }

    /// What a status of ours was made of.
    pub fn behind(status: &Status) -> Option<&Self> {
        std::error::Error::source(status)?.downcast_ref()
    }

    /// A message of more bytes than are taken.
    pub fn too_large(bytes_max: usize) -> Self {
        Self::invalid("request", format!("the message is too large, at most {bytes_max} bytes are taken"))
    }

    /// The constraint that was violated, if that is what went wrong.
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
                Self::Conflict("the request got in the way of another one")
            }
            SqlState::LOCK_NOT_AVAILABLE => Self::Aborted {
                reason: "CONFLICT",
                message: "another request is changing the same for long; nothing was written, try again".to_owned(),
            },
            SqlState::QUERY_CANCELED => Self::Timeout {
                reason: "STATEMENT_TIMEOUT",
                message: "the database took too long; nothing was written".to_owned(),
            },
            SqlState::CANNOT_CONNECT_NOW
            | SqlState::READ_ONLY_SQL_TRANSACTION
            | SqlState::TOO_MANY_CONNECTIONS
            | SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => Self::Unavailable,
            _ if state.code().starts_with("08") || state.code().starts_with("53") => Self::Unavailable,
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

/// Logged once, here, and only what is not the caller's fault. Never the driver's text: it can quote values.
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
            Self::Exhausted(_) | Self::Overloaded { .. } | Self::TooManyTries { .. } => Code::ResourceExhausted,
            Self::Timeout { .. } => Code::DeadlineExceeded,
            Self::Cancelled => Code::Cancelled,
            Self::Unavailable | Self::ConnectionLost | Self::OutcomeUnknown { .. } | Self::Stopping => {
                Code::Unavailable
            }
            Self::Database(_) | Self::Internal(_) => Code::Internal,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID",
            Self::InvalidReason { reason, .. }
            | Self::Precondition { reason, .. }
            | Self::Aborted { reason, .. }
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
            Self::TooManyTries { .. } => "TOO_MANY_TRIES",
            Self::Cancelled => "CANCELLED",
            Self::Conflict(_) => "CONFLICT",
            Self::Unavailable | Self::ConnectionLost => "DATABASE_UNAVAILABLE",
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
            | Self::ConnectionLost
            | Self::OutcomeUnknown { has_request_id: true }
            | Self::Stopping
            | Self::Conflict(_)
            | Self::Aborted { .. } => vec![RetryInfo::new(Some(RETRY_DELAY)).into()],
            Self::TooManyTries { delay } | Self::Overloaded { delay, .. } => vec![RetryInfo::new(Some(*delay)).into()],
            Self::OffsetGap { .. }
            | Self::Unimplemented(_)
            | Self::Unauthenticated(_)
            | Self::PermissionDenied(_)
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
            Self::ChangedSince { count, ids } => {
                add("changed_count", count.to_string());
                add("changed_ids", ids.iter().map(Uuid::to_string).collect::<Vec<_>>().join(","));
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

/// Whole seconds, not before the delay is over.
fn seconds_up(delay: &Duration) -> u64 {
    delay.as_secs() + u64::from(delay.subsec_nanos() > 0)
}

fn bad_request<'a>(violations: impl IntoIterator<Item = (&'a str, &'a str)>) -> ErrorDetail {
    let violations = violations.into_iter().map(|(field, message)| FieldViolation::new(field, message));
    BadRequest::new(violations.collect::<Vec<_>>()).into()
}

#[cfg(test)]
mod tests;
