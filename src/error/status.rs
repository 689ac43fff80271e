//! The gRPC status of an error: its code, its reason, and what is sent with it. The only place that makes a status.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio_postgres::error::DbError;
use tonic::{Code, Status};
use tonic_types::{
    BadRequest, ErrorDetail, ErrorInfo, FieldViolation, PreconditionFailure, PreconditionViolation, ResourceInfo,
    RetryInfo, StatusExt,
};
use uuid::Uuid;

use super::{
    Error, Resource, Violation,
    refusals::count_call_refusal,
    text::{indices, named},
};
use crate::metrics;

/// `ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "issuetracker";
/// The delay in `RetryInfo`: long enough for a queue to drain, short enough for a person.
pub const RETRY_DELAY: Duration = Duration::from_millis(500);

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        log(&error);
        if let Some(metrics) = metrics::get() {
            metrics.errors.with_label_values(&[error.reason()]).inc();
        }
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

    /// Returns the error that a status was made from, or `None` for a status of another library.
    pub fn of_status(status: &Status) -> Option<&Self> {
        std::error::Error::source(status)?.downcast_ref()
    }

    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::InvalidReason { .. } => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::VersionMismatch(_) | Self::Aborted { .. } | Self::LockTimeout | Self::Conflict(_) => Code::Aborted,
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
            Self::LockTimeout | Self::Conflict(_) => "CONFLICT",
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
            | Self::LockTimeout
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

impl Resource {
    fn problem(&self) -> &'static str {
        if self.taken.is_empty() { "does not exist" } else { "is taken" }
    }
}

fn bad_request<'a>(violations: impl IntoIterator<Item = (&'a str, &'a str)>) -> ErrorDetail {
    let violations = violations.into_iter().map(|(field, message)| FieldViolation::new(field, message));
    BadRequest::new(violations.collect::<Vec<_>>()).into()
}

#[cfg(test)]
mod tests {
    use super::{super::quote, *};

    fn assert_fits_a_header(error: Error) {
        let mut headers = http::HeaderMap::new();
        Status::from(error).add_header(&mut headers).unwrap();
        let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        assert!(bytes < 8 * 1024, "{bytes} bytes");
    }

    #[test]
    fn error_about_100_changed_issues_fits_in_the_trailers() {
        let ids = (0..100).map(|_| Uuid::now_v7()).collect();
        assert_fits_a_header(Error::ChangedSince { count: 1_000_000, ids });
    }

    #[test]
    fn error_about_1000_items_fits_in_the_trailers() {
        // Twenty are described one by one, and the indices of every other are the longest.
        for indices in [(0..20).collect(), (0..1_000).step_by(2).collect::<Vec<_>>()] {
            let indices = || indices.iter();
            let missing = indices().map(|i| Resource::missing("issue", format!("ids[{i}]"), Uuid::now_v7()));
            assert_fits_a_header(Error::NotFound(missing.collect()));
            for char in ["x", "é", "漢", "😀", "\u{7f}"] {
                let name = char.repeat(255);
                let field = |i: &usize| format!("issues[{i}].external_id");
                let taken = indices().map(|i| Resource::taken("issue", "external id", field(i), &name));
                assert_fits_a_header(Error::AlreadyExists(taken.collect()));
                let message = format!("\"{}\" is not a UUID such as {}", quote(&name), Uuid::nil());
                let invalid = indices().map(|i| Violation::new(field(i), &message));
                assert_fits_a_header(Error::Invalid(invalid.collect()));
            }
        }
    }
}
