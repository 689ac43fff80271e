//! What errors of the database mean for a request.

use std::sync::Arc;

use tokio_postgres::error::{DbError, Severity, SqlState};

use super::{Error, refusals::count_refused_statement};

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(state) = error.code() else {
            // Not an error of the server: the connection is lost, or a value does not have the expected type.
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
            SqlState::LOCK_NOT_AVAILABLE => Self::LockTimeout,
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

/// Returns whether the server ended an established session, possibly during a commit. Refused connections are not.
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
