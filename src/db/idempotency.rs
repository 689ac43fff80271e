//! Idempotency keys: the response of a mutation is stored in the transaction of the mutation, so that a retry with the same
//! key returns the same response and writes nothing.

use std::{collections::HashSet, convert::Infallible};

use chrono::{DateTime, Utc};
use prost::Message;
use uuid::Uuid;

use super::{
    PRUNE_BATCH_ROWS,
    conn::{CommitMode, Conn},
    pool::Db,
    response_budget::{self, ResponseSize},
    row_locks::LockWait,
    transaction::{BriefLockWaits, Tx},
};
use crate::{
    error::{Error, Result},
    fairness::Flow,
    metrics,
};

/// The idempotency key of a mutation.
#[derive(Clone, Copy, Debug)]
pub struct IdempotencyKey {
    /// Chosen by the caller. Keys of different callers are independent.
    pub request_id: Uuid,
    /// SHA-256 of the method and the payload: the same id with another payload is an error.
    pub fingerprint: [u8; 32],
}

/// How a mutation is to be executed.
#[derive(Clone, Copy, Debug, Default)]
pub struct MutationOptions {
    pub key: Option<IdempotencyKey>,
    /// A dry run: execute everything, then roll back.
    pub validate_only: bool,
}

impl MutationOptions {
    /// Adds to an unknown outcome that a retry with the same key returns it.
    pub(super) fn explain(&self, error: Error) -> Error {
        if self.key.is_some() { error.with_request_id() } else { error }
    }
}

/// The response of a mutation.
pub struct Mutated<R> {
    pub response: R,
    /// Whether an earlier call with the same key has executed the mutation.
    pub is_retry: bool,
}

/// What a transaction of a mutation has done.
pub enum Step<R, S> {
    /// Executed the rest of the mutation.
    Done(R),
    /// Executed a part of it. Another transaction is to continue from this state.
    Continue(S),
}

impl Db {
    /// Executes a mutation in a transaction, and returns its response.
    ///
    /// With a key that was used before, `work` is not called: returns the stored response, after the transaction of a
    /// call in flight with the same key has ended. If `work` fails, the transaction is rolled back and its locks are
    /// released before the error is returned.
    ///
    /// The first attempt does not wait for locks. If another transaction has a lock that it needs, it is rolled back and
    /// `work` is called again, with a permit for lock waits. So only mutations that really wait need one.
    pub async fn mutate<R: Message + Default>(
        &self,
        caller_id: Uuid,
        options: MutationOptions,
        work: impl AsyncFnOnce(&Tx) -> Result<R> + Clone,
    ) -> Result<R> {
        Ok(self.mutate_or_find(caller_id, options, work).await?.response)
    }

    /// As [`Db::mutate`]. Also returns whether the call is a retry.
    pub async fn mutate_or_find<R: Message + Default>(
        &self,
        caller_id: Uuid,
        options: MutationOptions,
        work: impl AsyncFnOnce(&Tx) -> Result<R> + Clone,
    ) -> Result<Mutated<R>> {
        let work = async |tx: &Tx| Ok(Step::<R, Infallible>::Done(work.clone()(tx).await?));
        let Step::Done(mutated) = self.mutate_step(caller_id, options, work).await?;
        Ok(mutated)
    }

    /// As [`Db::mutate_or_find`], for one transaction of a mutation that needs several. Only the last one stores the response.
    ///
    /// Each of them looks up the response first, because another call with the key may have executed the last one.
    pub async fn mutate_step<R: Message + Default, S>(
        &self,
        caller_id: Uuid,
        options: MutationOptions,
        work: impl AsyncFnOnce(&Tx) -> Result<Step<R, S>> + Clone,
    ) -> Result<Step<Mutated<R>, S>> {
        let db = self.for_flow(Flow::User(caller_id));
        let mut lock_wait = LockWait::Brief;
        loop {
            match db.try_mutate(caller_id, options, work.clone(), lock_wait).await {
                Err(Error::LockTimeout) if lock_wait == LockWait::Brief => lock_wait = retry_with_lock_wait(),
                outcome => return outcome,
            }
        }
    }

    async fn try_mutate<R: Message + Default, S>(
        &self,
        caller_id: Uuid,
        options: MutationOptions,
        work: impl AsyncFnOnce(&Tx) -> Result<Step<R, S>>,
        lock_wait: LockWait,
    ) -> Result<Step<Mutated<R>, S>> {
        let tx = self.begin_mutation(lock_wait).await?;
        if let Some(key) = options.key
            && let Some(stored) = find_response(&tx, caller_id, key, options.validate_only).await?
        {
            let response = R::decode(&*stored).map_err(|_| Error::Internal("a stored response cannot be decoded"))?;
            return Ok(Step::Done(Mutated { response, is_retry: true }));
        }
        let response = match work(&tx).await {
            Ok(Step::Done(response)) => response,
            Ok(Step::Continue(state)) => {
                tx.commit().await.map_err(|error| options.explain(error))?;
                return Ok(Step::Continue(state));
            }
            Err(error) => {
                // The error of the work matters to the caller, whatever happens to the rollback.
                let _ = tx.rollback().await;
                return Err(error);
            }
        };
        if options.validate_only {
            tx.rollback().await?;
            return Ok(Step::Done(Mutated { response, is_retry: false }));
        }
        let stored = options.key.map(|key| StoredResponse { caller_id, key, response: response.encode_to_vec() });
        let budget_bytes = self.storage_limits().response_bytes_per_user_max;
        let sizes = stored.iter().map(StoredResponse::size);
        if let Err(error) = response_budget::charge(&tx, sizes, budget_bytes, lock_wait).await {
            let _ = tx.rollback().await;
            return Err(error);
        }
        commit_with_responses(tx, stored.as_slice()).await.map_err(|error| options.explain(error))?;
        Ok(Step::Done(Mutated { response, is_retry: false }))
    }

    /// As [`Db::mutate`], for `work` that executes exactly one statement. Without key and dry run the statement is its own
    /// transaction, which saves a round trip.
    pub async fn mutate_by_statement<R: Message + Default>(
        &self,
        caller_id: Uuid,
        options: MutationOptions,
        work: impl AsyncFnOnce(&Conn) -> Result<R> + Clone,
    ) -> Result<R> {
        if options.key.is_some() || options.validate_only {
            return self.mutate(caller_id, options, async |tx| work.clone()(tx).await).await;
        }
        let db = self.for_flow(Flow::User(caller_id));
        let mut lock_wait = LockWait::Brief;
        loop {
            let conn = db.mutation_conn(CommitMode::EachStatement, lock_wait).await?;
            let brief = (lock_wait == LockWait::Brief).then(|| BriefLockWaits::on(&conn)).transpose()?;
            match work.clone()(&conn).await {
                Err(Error::LockTimeout) if brief.is_some() => lock_wait = retry_with_lock_wait(),
                outcome => return outcome,
            }
        }
    }

    /// Returns whether the caller has used the key of these options before. Waits for a call in flight with it.
    pub async fn is_retry(&self, caller_id: Uuid, options: MutationOptions) -> Result<bool> {
        let Some(key) = options.key else { return Ok(false) };
        let db = self.for_flow(Flow::User(caller_id));
        let mut lock_wait = LockWait::Brief;
        loop {
            let tx = db.begin_mutation(lock_wait).await?;
            match find_response(&tx, caller_id, key, options.validate_only).await {
                Err(Error::LockTimeout) if lock_wait == LockWait::Brief => lock_wait = retry_with_lock_wait(),
                found => return Ok(found?.is_some()),
            }
        }
    }
}

/// Returns how the second attempt of a mutation waits for locks, and counts it.
fn retry_with_lock_wait() -> LockWait {
    metrics::count(|metrics| &metrics.retries.lock_wait);
    LockWait::Full
}

const LOCK_KEY: &str = "-- lock_idempotency_key
    SELECT pg_advisory_xact_lock(uuid_hash_extended(requested.request_id, uuid_hash_extended(requested.caller_id, 0)))
    FROM (VALUES ($1::uuid, $2::uuid)) AS requested (caller_id, request_id)";

const STORED_RESPONSE: &str = "-- stored_response
    SELECT fingerprint, reply FROM requests WHERE caller_id = $1 AND request_id = $2";

/// Returns the stored response of a key, or `None` if the key is new. A dry run does not lock the key.
async fn find_response(tx: &Tx, caller_id: Uuid, key: IdempotencyKey, validate_only: bool) -> Result<Option<Vec<u8>>> {
    if validate_only {
        return stored_response(tx, caller_id, key).await;
    }
    // Pipelined: the second statement takes its snapshot when the first one has the lock.
    tx.prepare(&[LOCK_KEY, STORED_RESPONSE]).await?;
    let (locked, stored) =
        tokio::join!(biased; lock_key(tx, caller_id, key.request_id), stored_response(tx, caller_id, key));
    locked.and(stored)
}

/// Locks a key until the transaction ends. Waits for another transaction with the same key.
async fn lock_key(db: &Conn, caller_id: Uuid, request_id: Uuid) -> Result<()> {
    db.execute(LOCK_KEY, &[&caller_id, &request_id]).await.map(drop)
}

/// Returns the stored response of a key, or `None` if there is none.
pub(super) async fn stored_response(db: &Conn, caller_id: Uuid, key: IdempotencyKey) -> Result<Option<Vec<u8>>> {
    let Some(row) = db.query_opt(STORED_RESPONSE, &[&caller_id, &key.request_id]).await? else { return Ok(None) };
    if row.get::<_, &[u8]>("fingerprint") != key.fingerprint {
        return Err(request_id_reused(key.request_id));
    }
    let response: Option<Vec<u8>> = row.get("reply");
    response.map(Some).ok_or(Error::Internal("a mutation was committed without its response"))
}

/// Returns the error for a request id that was used with another payload.
pub fn request_id_reused(request_id: Uuid) -> Error {
    Error::InvalidReason {
        reason: "REQUEST_ID_REUSED",
        field: "request_id",
        message: format!(
            "request_id: \"{request_id}\" was used for a request with another payload; use a new UUID for a new request"
        ),
    }
}

/// Whether a mutation of a batch has its key for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyLock {
    /// The key is new and locked until the transaction ends, or the mutation has none.
    Acquired,
    /// The key was used before, or another call with it is in flight, or its response cannot be stored by a batch.
    Unavailable,
}

/// Locks the keys of a batch without waiting, in order. Of mutations with the same key, the first may acquire it.
pub(super) async fn try_lock_keys(db: &Conn, mutations: &[(Uuid, MutationOptions)]) -> Result<Vec<KeyLock>> {
    // A response that is committed between the snapshot of this statement and the lock is not seen. Then storing the
    // response fails, or the mutation does, and each mutation is executed individually.
    const SQL: &str = "-- try_lock_idempotency_keys
        SELECT requested.caller_id, requested.request_id
        FROM unnest($1::uuid[], $2::uuid[]) AS requested (caller_id, request_id)
        LEFT JOIN requests stored
            ON stored.caller_id = requested.caller_id AND stored.request_id = requested.request_id
        WHERE stored.request_id IS NULL
            AND pg_try_advisory_xact_lock(
                uuid_hash_extended(requested.request_id, uuid_hash_extended(requested.caller_id, 0)))";
    let requested: HashSet<(Uuid, Uuid)> =
        mutations.iter().filter_map(|(caller_id, options)| Some((*caller_id, options.key?.request_id))).collect();
    let (caller_ids, request_ids): (Vec<Uuid>, Vec<Uuid>) = requested.into_iter().unzip();
    let rows = db.query(SQL, &[&caller_ids, &request_ids]).await?;
    let mut locked: HashSet<(Uuid, Uuid)> =
        rows.iter().map(|row| (row.get("caller_id"), row.get("request_id"))).collect();
    let lock_of = |(caller_id, options): &(Uuid, MutationOptions)| match options.key {
        Some(key) if !locked.remove(&(*caller_id, key.request_id)) => KeyLock::Unavailable,
        Some(_) | None => KeyLock::Acquired,
    };
    Ok(mutations.iter().map(lock_of).collect())
}

/// The response that a retry of a mutation returns.
pub(super) struct StoredResponse {
    pub caller_id: Uuid,
    pub key: IdempotencyKey,
    pub response: Vec<u8>,
}

impl StoredResponse {
    /// Returns the caller and the size of the response in bytes.
    pub(super) fn size(&self) -> ResponseSize {
        (self.caller_id, self.response.len())
    }
}

/// Commits mutations together with their responses.
pub(super) async fn commit_with_responses(tx: Tx, stored: &[StoredResponse]) -> Result<()> {
    const SQL: &str = "-- store_responses
        INSERT INTO requests (caller_id, request_id, fingerprint, reply)
        SELECT caller_id, request_id, fingerprint, response
        FROM unnest($1::uuid[], $2::uuid[], $3::bytea[], $4::bytea[])
            AS stored (caller_id, request_id, fingerprint, response)";
    if stored.is_empty() {
        return tx.commit().await;
    }
    let caller_ids: Vec<Uuid> = stored.iter().map(|stored| stored.caller_id).collect();
    let request_ids: Vec<Uuid> = stored.iter().map(|stored| stored.key.request_id).collect();
    let fingerprints: Vec<&[u8]> = stored.iter().map(|stored| &stored.key.fingerprint[..]).collect();
    let responses: Vec<&[u8]> = stored.iter().map(|stored| &stored.response[..]).collect();
    tx.commit_after(SQL, &[&caller_ids, &request_ids, &fingerprints, &responses]).await.map_err(|error| {
        error.on_constraint("requests_pkey", || {
            Error::Conflict("another call with the same request id was committed concurrently")
        })
    })
}

/// Stores the response of a mutation that another call has begun and this one ends, in the transaction that ends it.
pub(super) async fn store_response_of_other_call(tx: &Tx, stored: &StoredResponse) -> Result<()> {
    // Nothing reserves the key until then: a call with another payload may have used it.
    const SQL: &str = "-- store_response_of_other_call
        INSERT INTO requests (caller_id, request_id, fingerprint, reply) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
    let StoredResponse { caller_id, key, response } = stored;
    tx.execute(SQL, &[caller_id, &key.request_id, &&key.fingerprint[..], response]).await.map(drop)
}

/// What [`prune_requests`] has deleted.
#[derive(Clone, Copy, Debug)]
pub struct PrunedRequests {
    pub count: u64,
    /// When the youngest of them was stored.
    pub last_time: Option<DateTime<Utc>>,
}

/// Deletes up to [`PRUNE_BATCH_ROWS`] stored responses that are older than `hours`, oldest first, from `begin` on.
///
/// The next statement begins at `last_time` of this one. Until the table is vacuumed, it would otherwise read again what the
/// statements before it have deleted.
pub async fn prune_requests(db: &Conn, hours: i32, begin: Option<DateTime<Utc>>) -> Result<PrunedRequests> {
    const SQL: &str = "-- prune_requests
        WITH expired AS MATERIALIZED (
            SELECT ctid, create_time FROM requests
            WHERE create_time >= coalesce(/* begin */ $1::timestamptz, '-infinity')
                AND create_time < now() - make_interval(hours => $2)
            ORDER BY create_time LIMIT $3
        ), deleted AS (
            DELETE FROM requests WHERE ctid = ANY (ARRAY(SELECT ctid FROM expired))
        )
        SELECT count(*) AS expired_count, max(create_time) AS last_time FROM expired";
    let row = db.query_one(SQL, &[&begin, &hours, &PRUNE_BATCH_ROWS]).await?;
    let count: i64 = row.get("expired_count");
    Ok(PrunedRequests { count: count.cast_unsigned(), last_time: row.get("last_time") })
}
