//! Request ids: a mutation's reply is kept with what it wrote, so that a retry gets the same answer and writes nothing.

use std::collections::HashMap;

use prost::Message;
use uuid::Uuid;

use super::{Conn, Db, PooledConn, Tx};
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

/// The transaction of a mutation: it commits together with its reply, or not at all.
pub struct MutationTx {
    scope: Scope,
    caller_id: Uuid,
    key: RequestKey,
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
        let tx = self.begin().await?;
        if let Some((request_id, fingerprint)) = key.request_id {
            let is_used = match key.validate_only {
                true => is_used(&tx, caller_id, request_id).await?,
                false => !claim(&tx, caller_id, request_id, fingerprint).await?,
            };
            if is_used {
                return stored_reply(&tx, caller_id, request_id, fingerprint).await.map(Begun::Replayed);
            }
        }
        Ok(Begun::Fresh(MutationTx { scope: Scope::Transaction(tx), caller_id, key }))
    }

    /// As [`Db::begin_mutation`], for a mutation that is exactly one statement: it needs no transaction around it, unless
    /// its reply is to be kept or it is to be rolled back.
    pub async fn begin_single(&self, caller_id: Uuid, key: RequestKey) -> Result<Begun> {
        if key.request_id.is_some() || key.validate_only {
            return self.begin_mutation(caller_id, key).await;
        }
        let scope = Scope::Statement(self.conn().await?);
        Ok(Begun::Fresh(MutationTx { scope, caller_id, key }))
    }
}

impl MutationTx {
    /// Keeps the reply if there is a request id, and commits; rolls back if it was only a trial.
    pub async fn finish(self, reply: impl FnOnce() -> Vec<u8>) -> Result<()> {
        let Scope::Transaction(tx) = self.scope else { return Ok(()) };
        if self.key.validate_only {
            return Ok(());
        }
        if let Some((request_id, _)) = self.key.request_id {
            keep_reply(&tx, self.caller_id, request_id, &reply()).await?;
        }
        tx.commit().await
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

/// Taken by whoever claims a request id, until the end of the transaction, so that it can be told without waiting
/// whether another call with the id is under way.
macro_rules! claim_lock {
    () => {
        "uuid_hash_extended(request_id, uuid_hash_extended(caller_id, 0))"
    };
}

/// Whether the id is new; waits for a transaction that has claimed it and is not yet done.
async fn claim(db: &Conn, caller_id: Uuid, request_id: Uuid, fingerprint: [u8; 32]) -> Result<bool> {
    const SQL: &str = concat!(
        "-- claim_request
        WITH locked AS MATERIALIZED (
            SELECT caller_id, request_id, pg_advisory_xact_lock(",
        claim_lock!(),
        ") FROM (VALUES ($1::uuid, $2::uuid)) AS n (caller_id, request_id)
        )
        INSERT INTO requests (caller_id, request_id, fingerprint) SELECT caller_id, request_id, $3 FROM locked
        ON CONFLICT DO NOTHING"
    );
    Ok(db.execute(SQL, &[&caller_id, &request_id, &&fingerprint[..]]).await? == 1)
}

/// What a trial asks instead of [`claim`]: nothing is used up by it.
async fn is_used(db: &Conn, caller_id: Uuid, request_id: Uuid) -> Result<bool> {
    const SQL: &str = "-- is_request_used
        SELECT EXISTS (SELECT FROM requests WHERE caller_id = $1 AND request_id = $2)";
    Ok(db.query_one(SQL, &[&caller_id, &request_id]).await?.get(0))
}

/// What came of a claim that does not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The id is new, or there is none.
    Fresh,
    /// The id was used before.
    Made,
    /// Another call with the id is under way.
    Busy,
}

/// What [`claim`] says, of many. Of those with the same id the first may be new.
pub(super) async fn claim_many(db: &Conn, keys: &[(Uuid, RequestKey)]) -> Result<Vec<Claim>> {
    const SQL: &str = concat!(
        "-- claim_requests
        WITH n AS MATERIALIZED (
            SELECT caller_id, request_id, fingerprint, pg_try_advisory_xact_lock(",
        claim_lock!(),
        ") AS locked
            FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS n (caller_id, request_id, fingerprint)
        ), claimed AS (
            INSERT INTO requests (caller_id, request_id, fingerprint)
            SELECT caller_id, request_id, fingerprint FROM n WHERE locked
            ON CONFLICT DO NOTHING RETURNING caller_id, request_id
        )
        SELECT n.caller_id, n.request_id, n.locked, c.request_id IS NOT NULL
        FROM n LEFT JOIN claimed c ON c.caller_id = n.caller_id AND c.request_id = n.request_id"
    );
    let mut wanted = HashMap::new();
    for (caller_id, key) in keys {
        if let Some((request_id, fingerprint)) = &key.request_id {
            wanted.entry((*caller_id, *request_id)).or_insert(&fingerprint[..]);
        }
    }
    let (ids, fingerprints): (Vec<(Uuid, Uuid)>, Vec<&[u8]>) = wanted.into_iter().unzip();
    let (caller_ids, request_ids): (Vec<Uuid>, Vec<Uuid>) = ids.into_iter().unzip();
    let rows = db.query(SQL, &[&caller_ids, &request_ids, &fingerprints]).await?;
    let mut claims: HashMap<(Uuid, Uuid), Claim> = HashMap::new();
    for row in rows {
        let claim = match (row.get(2), row.get(3)) {
            (false, _) => Claim::Busy,
            (true, false) => Claim::Made,
            (true, true) => Claim::Fresh,
        };
        claims.insert((row.get(0), row.get(1)), claim);
    }
    let claim_of = |(caller_id, key): &(Uuid, RequestKey)| match key.request_id {
        // The second of two with one id comes after the first, which is under way.
        Some((request_id, _)) => claims.insert((*caller_id, request_id), Claim::Busy).unwrap_or(Claim::Busy),
        None => Claim::Fresh,
    };
    Ok(keys.iter().map(claim_of).collect())
}

/// Keeps the replies of those that have one, and gives up the claims of those that have failed.
pub(super) async fn keep_replies(db: &Conn, replies: &[(Uuid, Uuid, Option<Vec<u8>>)]) -> Result<()> {
    const SQL: &str = "-- keep_replies
        WITH n AS (
            SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::bytea[]) AS n (caller_id, request_id, reply)
        ), failed AS (
            DELETE FROM requests r USING n
            WHERE n.reply IS NULL AND r.caller_id = n.caller_id AND r.request_id = n.request_id RETURNING 1
        ), kept AS (
            UPDATE requests r SET reply = n.reply FROM n
            WHERE n.reply IS NOT NULL AND r.caller_id = n.caller_id AND r.request_id = n.request_id RETURNING 1
        )
        SELECT (SELECT count(*) FROM failed) + (SELECT count(*) FROM kept)";
    if replies.is_empty() {
        return Ok(());
    }
    let caller_ids: Vec<Uuid> = replies.iter().map(|(caller_id, ..)| *caller_id).collect();
    let request_ids: Vec<Uuid> = replies.iter().map(|(_, request_id, _)| *request_id).collect();
    let bytes: Vec<Option<&[u8]>> = replies.iter().map(|(.., reply)| reply.as_deref()).collect();
    let touched: i64 = db.query_one(SQL, &[&caller_ids, &request_ids, &bytes]).await?.get(0);
    if touched == replies.len() as i64 { Ok(()) } else { Err(Error::Internal("the claim of a request id is gone")) }
}

async fn stored_reply(db: &Conn, caller_id: Uuid, request_id: Uuid, fingerprint: [u8; 32]) -> Result<Vec<u8>> {
    const SQL: &str = "-- stored_reply
        SELECT fingerprint, reply FROM requests WHERE caller_id = $1 AND request_id = $2";
    // None: it was pruned between the claim and now, after a day or more.
    let row = db.query_opt(SQL, &[&caller_id, &request_id]).await?;
    let row = row.ok_or_else(|| Error::Aborted {
        reason: "CONFLICT",
        message: "the request id has just been forgotten; try again".to_owned(),
    })?;
    if row.get::<_, &[u8]>(0) != fingerprint {
        return Err(Error::InvalidReason {
            reason: "REQUEST_ID_REUSED",
            field: "request_id",
            message: format!("\"{request_id}\" was used for another request; take a new one for a new request"),
        });
    }
    row.get::<_, Option<Vec<u8>>>(1).ok_or(Error::Internal("a request was committed without its reply"))
}

async fn keep_reply(db: &Conn, caller_id: Uuid, request_id: Uuid, reply: &[u8]) -> Result<()> {
    const SQL: &str = "-- keep_reply
        UPDATE requests SET reply = $3 WHERE caller_id = $1 AND request_id = $2";
    match db.execute(SQL, &[&caller_id, &request_id, &reply]).await? {
        1 => Ok(()),
        _ => Err(Error::Internal("the claim of a request id is gone")),
    }
}

pub fn decode_reply<R: Message + Default>(reply: &[u8]) -> Result<R> {
    R::decode(reply).map_err(|_| Error::Internal("a stored reply cannot be decoded"))
}

/// Forgets request ids of more than a day ago, and how many these were.
pub async fn prune_requests(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_requests
        DELETE FROM requests WHERE create_time < now() - make_interval(hours => $1)";
    db.execute(SQL, &[&REQUEST_KEPT_HOURS]).await
}
