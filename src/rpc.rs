//! The RPCs, one file per service. A handler parses the request, calls [`crate::db`] directly, usually one function, and
//! returns the response.

mod auth;
mod comments;
mod exports;
mod imports;
mod issues;
mod labels;
mod reports;
mod stall_timeout;
mod streaming;
mod users;

pub use users::check_username;

use std::{net::IpAddr, time::Duration};

use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::{
    auth::Auth,
    auth::throttle::LoginLimits,
    db::{Db, batchers::Batchers},
    error::Result,
    fairness::FairSemaphore,
    transport::client_address::ClientAddress,
};

/// The state of all services.
pub struct Api {
    pub db: Db,
    pub auth: Auth,
    pub login_limits: LoginLimits,
    pub batchers: Batchers,
    pub session_hours: i32,
    pub stream_limits: StreamLimits,
    /// One permit per concurrent import.
    pub imports: FairSemaphore,
    /// One permit per ImportIssues call whose first message has not arrived.
    pub import_starts: FairSemaphore,
    /// One permit per concurrent export.
    pub exports: FairSemaphore,
    /// Cancelled when the server stops: streams end, and their clients resume on another server.
    pub stopping: CancellationToken,
}

/// How long streams may last.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// Maximum duration of an import, which can be resumed then.
    pub import_duration_max: Duration,
    /// Maximum duration of an export, and so the maximum age of its snapshot.
    pub export_duration_max: Duration,
}

type RpcResult<T> = Result<Response<T>, Status>;

/// Returns the address of the client. `None` if the request did not come through [`crate::middleware`].
fn client_address<T>(request: &Request<T>) -> Option<IpAddr> {
    request.extensions().get().map(|ClientAddress(address)| *address)
}

/// Returns the page key of lists by id.
fn id_key(id: Option<&str>) -> Option<Vec<u8>> {
    Some(Uuid::try_parse(id?).ok()?.into_bytes().to_vec())
}
