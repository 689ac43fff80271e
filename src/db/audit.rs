//! The audit log: logins, and changes of users and tokens.
//!
//! The statement that makes a change also writes its event, in the file of its noun: no change is without an event. This
//! file writes the events without a change.

use std::net::IpAddr;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    PRUNE_BATCH_ROWS,
    conn::Conn,
    page::{Page, PageBounds},
    time::timestamp,
};
use crate::{
    error::{Error, Result},
    pb::{AuditAction, AuditEvent},
};

/// The actor of a change and its address, as events record them.
#[derive(Clone, Copy, Debug)]
pub struct By {
    actor_id: Option<Uuid>,
    address: Option<IpAddr>,
}

impl By {
    /// A command of the program, such as `issue-tracker user create`.
    pub const COMMAND_LINE: Self = Self { actor_id: None, address: None };

    pub fn user(id: Uuid, address: Option<IpAddr>) -> Self {
        Self { actor_id: Some(id), address }
    }

    /// An unauthenticated caller.
    pub fn unauthenticated(address: Option<IpAddr>) -> Self {
        Self { actor_id: None, address }
    }

    pub(super) fn actor_id(&self) -> Option<Uuid> {
        self.actor_id
    }

    /// Returns the address for a parameter of `::text::inet`.
    pub(super) fn address(&self) -> Option<String> {
        self.address.map(|address| address.to_canonical().to_string())
    }
}

/// Logs a failed login: as this user, if one has the given name. The name itself is not logged, because people type
/// passwords there.
pub async fn login_failed(db: &Conn, user_id: Option<Uuid>, by: By) -> Result<()> {
    const SQL: &str = "-- login_failed
        INSERT INTO audit_events (action, actor_id, address, user_id) VALUES ('LOGIN_FAILED', $1, $2::text::inet, $3)";
    db.execute(SQL, &[&by.actor_id(), &by.address(), &user_id]).await.map(drop)
}

/// Returns a page of the events about a user, or of all events, newest first, with ids below `after`.
pub async fn list(
    db: &Conn,
    user_id: Option<Uuid>,
    after: i64,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<AuditEvent>> {
    const ALL: &str = "-- list_audit_events
        SELECT id, create_time, action, actor_id, user_id, token_id, host(address) AS address, old_value, new_value
        FROM audit_events WHERE id < $1 ORDER BY id DESC LIMIT $2";
    // A statement of its own: its plan uses the index by user.
    const OF_USER: &str = "-- list_audit_events_of_user
        SELECT id, create_time, action, actor_id, user_id, token_id, host(address) AS address, old_value, new_value
        FROM audit_events WHERE user_id = $3 AND id < $1 ORDER BY id DESC LIMIT $2";
    match user_id {
        None => db.query_page(ALL, &[&after, &limit], bounds, from_row, prost::Message::encoded_len).await,
        Some(id) => db.query_page(OF_USER, &[&after, &limit, &id], bounds, from_row, prost::Message::encoded_len).await,
    }
}

/// Deletes up to [`PRUNE_BATCH_ROWS`] events that are older than `days`. Returns how many. A trigger refuses to delete events of
/// the last 400 days.
pub async fn prune_audit_events(db: &Conn, days: i32) -> Result<u64> {
    const SQL: &str = "-- prune_audit_events
        DELETE FROM audit_events WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM audit_events WHERE create_time < now() - make_interval(days => $1) LIMIT $2))";
    db.execute(SQL, &[&days, &PRUNE_BATCH_ROWS]).await
}

fn from_row(row: &Row) -> Result<AuditEvent> {
    let action = format!("AUDIT_ACTION_{}", row.get::<_, &str>("action"));
    let action = AuditAction::from_str_name(&action).ok_or(Error::Internal("unknown audit action"))?;
    let id = |column: &str| row.get::<_, Option<Uuid>>(column).map(|id| id.to_string()).unwrap_or_default();
    let text = |column: &str| row.get::<_, Option<String>>(column).unwrap_or_default();
    Ok(AuditEvent {
        id: row.get("id"),
        create_time: Some(timestamp(row.get("create_time"))),
        action: action.into(),
        actor_id: id("actor_id"),
        user_id: id("user_id"),
        token_id: id("token_id"),
        address: text("address"),
        old_value: text("old_value"),
        new_value: text("new_value"),
    })
}
