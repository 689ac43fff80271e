//! Who signed in, and who changed users and tokens. The events are written by the statements that make the changes, in
//! the files of their nouns, so that there is no change without its event; here are those without a change.

use std::net::IpAddr;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, PRUNED_AT_ONCE, Page, PageBounds};
use crate::{
    error::{Error, Result},
    pb::{AuditAction, AuditEvent},
    request::timestamp,
};

/// How long events are kept; the table's trigger refuses to delete younger ones.
pub const AUDIT_EVENTS_KEPT_DAYS: i32 = 400;

/// Who makes a change, and from where, as events tell it.
#[derive(Clone, Copy, Debug)]
pub struct By {
    actor_id: Option<Uuid>,
    address: Option<IpAddr>,
}

impl By {
    /// Whoever runs the program: the first administrator, `issue-tracker user create`.
    pub const COMMAND_LINE: Self = Self { actor_id: None, address: None };

    pub fn user(id: Uuid, address: Option<IpAddr>) -> Self {
        Self { actor_id: Some(id), address }
    }

    /// Somebody who has not signed in.
    pub fn nobody(address: Option<IpAddr>) -> Self {
        Self { actor_id: None, address }
    }

    pub(super) fn actor_id(&self) -> Option<Uuid> {
        self.actor_id
    }

    /// For a parameter of `::text::inet`.
    pub(super) fn address(&self) -> Option<String> {
        self.address.map(|address| address.to_canonical().to_string())
    }
}

/// Somebody has tried to sign in: as this user, if there is one of the name that he gave. The name itself is not kept, as
/// people type passwords there.
pub async fn login_failed(db: &Conn, user_id: Option<Uuid>, by: By) -> Result<()> {
    const SQL: &str = "-- login_failed
        INSERT INTO audit_events (action, actor_id, address, user_id) VALUES ('LOGIN_FAILED', $1, $2::text::inet, $3)";
    db.execute(SQL, &[&by.actor_id(), &by.address(), &user_id]).await.map(drop)
}

/// The columns of [`from_row`].
macro_rules! event_columns {
    () => {
        "id, create_time, action, actor_id, user_id, token_id, host(address), old_value, new_value"
    };
}

/// Events about a user, or about all, newest first, from below the id `after`.
pub async fn list(
    db: &Conn,
    user_id: Option<Uuid>,
    after: i64,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<AuditEvent>> {
    const ALL: &str = concat!(
        "-- list_audit_events\nSELECT ",
        event_columns!(),
        " FROM audit_events WHERE id < $1 ORDER BY id DESC LIMIT $2"
    );
    // A statement of its own, so that its plan goes by the index of users.
    const OF_USER: &str = concat!(
        "-- list_audit_events_of_user\nSELECT ",
        event_columns!(),
        " FROM audit_events WHERE user_id = $3 AND id < $1 ORDER BY id DESC LIMIT $2"
    );
    match user_id {
        None => db.query_page(ALL, &[&after, &limit], bounds, from_row, prost::Message::encoded_len).await,
        Some(id) => db.query_page(OF_USER, &[&after, &limit, &id], bounds, from_row, prost::Message::encoded_len).await,
    }
}

/// Forgets events that are old enough, and how many these were.
pub async fn prune_audit_events(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_audit_events
        DELETE FROM audit_events WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM audit_events WHERE create_time < now() - make_interval(days => $1) LIMIT $2))";
    db.execute(SQL, &[&AUDIT_EVENTS_KEPT_DAYS, &PRUNED_AT_ONCE]).await
}

fn from_row(row: &Row) -> Result<AuditEvent> {
    let action = format!("AUDIT_ACTION_{}", row.get::<_, &str>(2));
    let action = AuditAction::from_str_name(&action).ok_or(Error::Internal("unknown audit action"))?;
    let id = |column| row.get::<_, Option<Uuid>>(column).map(|id| id.to_string()).unwrap_or_default();
    let text = |column| row.get::<_, Option<String>>(column).unwrap_or_default();
    Ok(AuditEvent {
        id: row.get(0),
        create_time: Some(timestamp(row.get(1))),
        action: action.into(),
        actor_id: id(3),
        user_id: id(4),
        token_id: id(5),
        address: text(6),
        old_value: text(7),
        new_value: text(8),
    })
}
