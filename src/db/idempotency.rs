//! Request ids: a mutation's reply is kept with what it wrote, so that a retry gets the same answer and writes nothing.

use std::collections::HashSet;

use prost::Message;
use tokio::sync::OwnedSemaphorePermit;
use uuid::Uuid;

use super::{Conn, Db, PRUNED_AT_ONCE, PooledConn, Tx};
use crate::error::{Error, Result};

/// How long request ids are kept at least.
pub const REQUEST_KEPT_HOURS: i32 = 24;

/// What a mutation's request says about itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestKey {
    /// The request id, and the SHA-256 of method and payload.
    pub request_id: Option<(Uuid, [u8; 32])>,
    /// Do everything, then roll back.
    pub validate_only: bool,
}

impl RequestKey {
    /// With a request id, an outcome that is not known can be found out.
    pub fn explain(&self, error: Error) -> Error {
        if self.request_id.is_some() { error.with_request_id() } else { error }
    }
}

/// The transaction of a mutation: it commits together with its reply, or not at all.
pub struct MutationTx {
    scope: Scope,
    caller_id: Uuid,
    key: RequestKey,
    /// It may wait for others' locks.
    _slot: OwnedSemaphorePermit,
}

enum Scope {
    Transaction(Tx),
    /// One statement, which is its own transaction.
    Statement(PooledConn),
}

/// A mutation that is to be done, or the reply of the one that was.
#[expect(clippy::large_enum_variant, reason = "it is taken apart where it is made")]
pub enum Begun {
    Fresh(MutationTx),
    Replayed(Vec<u8>),
}

impl Db {
    /// Begins a mutation, which may be several statements.
    ///
    /// With a request id that was used before, answers the reply of that time; a call with the same id that is still
    /// under way is waited for.
    pub async fn begin_mutation(&self, caller_id: Uuid, key: RequestKey) -> Result<Begun> {
        let slot = self.lock_slot().await?;
        let tx = self.begin().await?;
        if let Some((request_id, fingerprint)) = key.request_id {
            let stored = stored_reply(&tx, caller_id, request_id, fingerprint);
            let stored = match key.validate_only {
                true => stored.await?,
                false => {
                    // They go out together, and the second looks when the first has waited.
                    tx.prepare(&[LOCK, STORED_REPLY]).await?;
                    let (locked, stored) = tokio::join!(biased; lock(&tx, caller_id, request_id), stored);
                    locked.and(stored)?
                }
            };
            if let Some(reply) = stored {
                return Ok(Begun::Replayed(reply));
            }
        }
        Ok(Begun::Fresh(MutationTx { scope: Scope::Transaction(tx), caller_id, key, _slot: slot }))
    }

    /// As [`Db::begin_mutation`], for a mutation that is exactly one statement: it needs no transaction around it, unless
    /// its reply is to be kept or it is to be rolled back.
    pub async fn begin_single(&self, caller_id: Uuid, key: RequestKey) -> Result<Begun> {
        if key.request_id.is_some() || key.validate_only {
            return self.begin_mutation(caller_id, key).await;
        }
        let slot = self.lock_slot().await?;
        let scope = Scope::Statement(self.autocommit_conn().await?);
        Ok(Begun::Fresh(MutationTx { scope, caller_id, key, _slot: slot }))
    }
}

impl MutationTx {
    /// Keeps the reply if there is a request id, and commits; rolls back if it was only a trial.
    pub async fn finish(self, reply: impl FnOnce() -> Vec<u8>) -> Result<()> {
        let Scope::Transaction(tx) = self.scope else { return Ok(()) };
        if self.key.validate_only {
            return tx.rollback().await;
        }
        let kept = self.key.request_id.map(|(request_id, fingerprint)| KeptReply {
            caller_id: self.caller_id,
            request_id,
            fingerprint,
            reply: reply(),
        });
        let committed = commit_with_replies(tx, kept.as_slice()).await;
        committed.map_err(|error| self.key.explain(error))
    }

    /// See [`Tx::rollback`].
    pub async fn rollback(self) -> Result<()> {
        match self.scope {
            Scope::Transaction(tx) => tx.rollback().await,
            Scope::Statement(_) => Ok(()),
        }
    }
}

impl std::ops::Deref for MutationTx {
    type Target = Conn;

    fn deref(&self) -> &Conn {
        match &self.scope {
            Scope::Transaction(tx) => tx,
            Scope::Statement(conn) => conn,
        }
    }
}

/// Taken by whoever makes a mutation with a request id, until the end of its transaction.
macro_rules! request_lock {
    () => {
        "uuid_hash_extended(n.request_id, uuid_hash_extended(n.caller_id, 0))"
    };
}

const LOCK: &str = concat!(
    "-- lock_request\nSELECT pg_advisory_xact_lock(",
    request_lock!(),
    ") FROM (VALUES ($1::uuid, $2::uuid)) AS n (caller_id, request_id)"
);

/// Waits for a transaction with the same request id that is not yet done.
async fn lock(db: &Conn, caller_id: Uuid, request_id: Uuid) -> Result<()> {
    db.execute(LOCK, &[&caller_id, &request_id]).await.map(drop)
}

/// Whether a mutation can be made with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Its request id is new, or it has none.
    Fresh,
    /// Its request id was used before, or another call with it is under way.
    Taken,
}

/// As [`lock`], for many, and without waiting. Of those with the same id the first may be fresh.
pub(super) async fn claim_many(db: &Conn, keys: &[(Uuid, RequestKey)]) -> Result<Vec<Claim>> {
    // What was committed between the statement's snapshot and the lock is not seen: then keeping the reply fails, or the
    // mutation has, and is looked at alone.
    const SQL: &str = concat!(
        "-- claim_requests
        SELECT n.caller_id, n.request_id FROM unnest($1::uuid[], $2::uuid[]) AS n (caller_id, request_id)
        LEFT JOIN requests r ON r.caller_id = n.caller_id AND r.request_id = n.request_id
        WHERE r.request_id IS NULL AND pg_try_advisory_xact_lock(",
        request_lock!(),
        ")"
    );
    let wanted: HashSet<(Uuid, Uuid)> =
        keys.iter().filter_map(|(caller_id, key)| Some((*caller_id, key.request_id?.0))).collect();
    let (caller_ids, request_ids): (Vec<Uuid>, Vec<Uuid>) = wanted.into_iter().unzip();
    let rows = db.query(SQL, &[&caller_ids, &request_ids]).await?;
    let mut fresh: HashSet<(Uuid, Uuid)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let claim_of = |(caller_id, key): &(Uuid, RequestKey)| match key.request_id {
        // The second of two with one id comes after the first, which is under way.
        Some((request_id, _)) if !fresh.remove(&(*caller_id, request_id)) => Claim::Taken,
        Some(_) | None => Claim::Fresh,
    };
    Ok(keys.iter().map(claim_of).collect())
}

/// What a retry of a mutation is to get.
pub(super) struct KeptReply {
    pub caller_id: Uuid,
    pub request_id: Uuid,
    pub fingerprint: [u8; 32],
    pub reply: Vec<u8>,
}

/// Commits mutations together with their replies.
pub(super) async fn commit_with_replies(tx: Tx, kept: &[KeptReply]) -> Result<()> {
    const SQL: &str = "-- keep_replies
        INSERT INTO requests (caller_id, request_id, fingerprint, reply)
        SELECT caller_id, request_id, fingerprint, reply
        FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::bytea[]) AS n (caller_id, request_id, fingerprint, reply)";
    if kept.is_empty() {
        return tx.commit().await;
    }
    let caller_ids: Vec<Uuid> = kept.iter().map(|kept| kept.caller_id).collect();
    let request_ids: Vec<Uuid> = kept.iter().map(|kept| kept.request_id).collect();
    let fingerprints: Vec<&[u8]> = kept.iter().map(|kept| &kept.fingerprint[..]).collect();
    let replies: Vec<&[u8]> = kept.iter().map(|kept| &kept.reply[..]).collect();
    tx.commit_after(SQL, &[&caller_ids, &request_ids, &fingerprints, &replies]).await.map_err(|error| {
        error.on_constraint("requests_pkey", || {
            Error::Conflict("another call with the request id was made at this moment")
        })
    })
}

const STORED_REPLY: &str = "-- stored_reply
    SELECT fingerprint, reply FROM requests WHERE caller_id = $1 AND request_id = $2";

/// None: the id was not used yet.
async fn stored_reply(db: &Conn, caller_id: Uuid, request_id: Uuid, fingerprint: [u8; 32]) -> Result<Option<Vec<u8>>> {
    let Some(row) = db.query_opt(STORED_REPLY, &[&caller_id, &request_id]).await? else { return Ok(None) };
    if row.get::<_, &[u8]>(0) != fingerprint {
        return Err(request_id_reused(request_id));
    }
    row.get::<_, Option<Vec<u8>>>(1).map(Some).ok_or(Error::Internal("a request was committed without its reply"))
}

/// Returns the error of a request id that was used for a request with another payload.
pub fn request_id_reused(request_id: Uuid) -> Error {
    Error::InvalidReason {
        reason: "REQUEST_ID_REUSED",
        field: "request_id",
        message: format!("request_id: \"{request_id}\" was used for another request; use a new UUID for a new request"),
    }
}

pub fn decode_reply<R: Message + Default>(reply: &[u8]) -> Result<R> {
    R::decode(reply).map_err(|_| Error::Internal("a stored reply cannot be decoded"))
}

/// Forgets request ids of more than a day ago, and how many these were.
pub async fn prune_requests(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_requests
        DELETE FROM requests WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM requests WHERE create_time < now() - make_interval(hours => $1) LIMIT $2))";
    db.execute(SQL, &[&REQUEST_KEPT_HOURS, &PRUNED_AT_ONCE]).await
}
