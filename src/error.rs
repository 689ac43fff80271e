//! The errors of requests.

mod database;
pub mod refusals;
mod status;
mod text;

use std::{fmt, sync::Arc, time::Duration};

use tokio_postgres::error::DbError;
use uuid::Uuid;

use self::text::join;
pub use self::{
    database::is_unavailable,
    status::{ERROR_DOMAIN, RETRY_DELAY},
    text::{is_invisible, quote},
};

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
    /// A statement waited too long for a lock of another transaction. Nothing was written.
    #[error("a concurrent request holds a lock; nothing was written, try again")]
    LockTimeout,
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

/// Returns the delay in seconds, rounded up.
fn seconds_up(delay: &Duration) -> u64 {
    delay.as_secs() + u64::from(delay.subsec_nanos() > 0)
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
            | Self::LockTimeout
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
            Self::LockTimeout | Self::Timeout { .. } | Self::Database(_) | Self::Internal(_) => false,
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

    /// Returns whether the resource does not exist. Otherwise it is taken.
    pub fn is_missing(&self) -> bool {
        self.taken.is_empty()
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
