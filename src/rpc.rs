//! The RPCs, one file a service: who calls, what they want, one call of the database, the answer.

mod auth;
mod comments;
mod exports;
mod imports;
mod issues;
mod labels;
mod reports;
mod streaming;
mod users;

pub use users::check_username;

use std::{net::IpAddr, sync::Arc};

use prost::Message;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    auth::Auth,
    auth::throttle::LoginLimits,
    db::{
        Db,
        batchers::Rounds,
        idempotency::{MutationTx, decode_reply},
    },
    error::Result,
    transport::client_address::ClientAddress,
};

/// What the services work with.
pub struct Api {
    pub db: Db,
    pub auth: Auth,
    pub login_limits: LoginLimits,
    pub rounds: Rounds,
    pub session_hours: i32,
    /// A permit for each import under way.
    pub imports: Arc<Semaphore>,
    /// A permit for each export under way.
    pub exports: Arc<Semaphore>,
    /// Ends what may take long: its client can go on elsewhere.
    pub stopping: CancellationToken,
}

type Reply<T> = Result<Response<T>, Status>;

/// The transaction of a mutation that has begun; returns the stored reply of one that was made before.
macro_rules! fresh {
    ($begun:expr) => {
        match $begun {
            $crate::db::idempotency::Begun::Fresh(tx) => tx,
            $crate::db::idempotency::Begun::Replayed(reply) => return $crate::rpc::replay(&reply),
        }
    };
}
use fresh;

fn replay<T: Message + Default>(reply: &[u8]) -> Reply<T> {
    Ok(Response::new(decode_reply(reply)?))
}

/// Where a request comes from. None: not through [`crate::middleware`].
fn address_of<T>(request: &Request<T>) -> Option<IpAddr> {
    request.extensions().get().map(|ClientAddress(address)| *address)
}

/// Commits a mutation together with its reply.
async fn finish<T: Message>(tx: MutationTx, reply: T) -> Reply<T> {
    tx.finish(|| reply.encode_to_vec()).await?;
    Ok(Response::new(reply))
}
