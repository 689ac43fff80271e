//! The budget of each user for large stored responses: how many bytes of them may be stored in 24 hours.
//!
//! A large response is charged in the transaction that stores it, so that the budget holds across replicas. Small
//! responses are neither counted nor limited, and calls without a large response never read the budget.

use std::collections::{BTreeMap, HashSet};

use uuid::Uuid;

use super::{
    PRUNE_BATCH_ROWS,
    conn::{Conn, Params},
    row_locks::LockWait,
};
use crate::error::{Error, Result};

/// The size of the largest response that is not counted.
const UNCOUNTED_RESPONSE_BYTES_MAX: usize = 4_096;
/// How many hours of charges count. Charges are summed per hour of the clock, so each counts for 24 to 25 hours.
const COUNTED_HOURS: i32 = 25;
/// Normally, budgets are locked only as long as a commit takes. Calls that hold up others do not wait for longer.
const SET_LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '100ms'";

/// A user whose large responses exceed the budget.
struct Exceeded {
    user_id: Uuid,
    /// With the responses of this transaction.
    bytes: i64,
}

/// A response that is to be stored: its caller and its size in bytes.
pub(super) type ResponseSize = (Uuid, usize);

/// Charges large responses to the budgets of their callers. Waits for another transaction that charges the same user: with
/// [`LockWait::Brief`] up to 100 ms, so that the mutation is rarely repeated for it.
///
/// Fails with `QuotaExceeded` beyond a budget; roll back then.
pub(super) async fn charge(
    db: &Conn,
    responses: impl Iterator<Item = ResponseSize>,
    budget_bytes: i64,
    lock_wait: LockWait,
) -> Result<()> {
    let charges = charges(responses);
    if charges.is_empty() {
        return Ok(());
    }
    if lock_wait == LockWait::Brief {
        db.enqueue(SET_LOCK_TIMEOUT)?;
    }
    match write_charges(db, &charges, budget_bytes).await?.first() {
        Some(exceeded) => Err(quota_exceeded(exceeded.bytes, budget_bytes)),
        None => Ok(()),
    }
}

/// As [`charge`], for the responses of a batch. Returns the users that are beyond their budget or whose budget another
/// transaction has locked for long: without their calls, the batch can be repeated.
pub(super) async fn charge_batch(
    db: &Conn,
    responses: impl Iterator<Item = ResponseSize>,
    budget_bytes: i64,
) -> Result<HashSet<Uuid>> {
    let charges = charges(responses);
    if charges.is_empty() {
        return Ok(HashSet::new());
    }
    db.enqueue(SET_LOCK_TIMEOUT)?;
    match write_charges(db, &charges, budget_bytes).await {
        Ok(exceeded) => Ok(exceeded.iter().map(|exceeded| exceeded.user_id).collect()),
        Err(Error::LockTimeout) => Ok(charges.into_keys().collect()),
        Err(error) => Err(error),
    }
}

/// Returns the bytes of the large responses of each user.
fn charges(responses: impl Iterator<Item = ResponseSize>) -> BTreeMap<Uuid, i64> {
    let mut charges = BTreeMap::new();
    for (user_id, bytes) in responses.filter(|(_, bytes)| *bytes > UNCOUNTED_RESPONSE_BYTES_MAX) {
        *charges.entry(user_id).or_default() += bytes as i64;
    }
    charges
}

async fn write_charges(db: &Conn, charges: &BTreeMap<Uuid, i64>, budget_bytes: i64) -> Result<Vec<Exceeded>> {
    // In the order of the ids, so that two batches do not deadlock.
    const LOCK: &str = "-- lock_response_budgets
        SELECT pg_advisory_xact_lock(hashtextextended('response budget ' || charged.user_id::text, 0))
        FROM unnest($1::uuid[]) AS charged (user_id)";
    const CHARGE: &str = "-- charge_response_budgets
        WITH written AS (
            INSERT INTO stored_response_bytes AS stored (user_id, hour, bytes)
            SELECT user_id, date_trunc('hour', now(), 'UTC'), bytes
            FROM unnest(/* user_ids */ $1::uuid[], /* bytes */ $2::int8[]) AS charged (user_id, bytes)
            ON CONFLICT (user_id, hour) DO UPDATE SET bytes = stored.bytes + excluded.bytes
            RETURNING user_id, hour, bytes
        )
        SELECT written.user_id, (written.bytes + coalesce(sum(other.bytes), 0))::int8 AS total_bytes
        FROM written LEFT JOIN stored_response_bytes other
            ON other.user_id = written.user_id AND other.hour <> written.hour
            AND other.hour > now() - make_interval(hours => /* counted_hours */ $3)
        GROUP BY written.user_id, written.bytes
        HAVING written.bytes + coalesce(sum(other.bytes), 0) > /* budget_bytes */ $4::int8";
    let user_ids: Vec<Uuid> = charges.keys().copied().collect();
    let bytes: Vec<i64> = charges.values().copied().collect();
    // Pipelined: the second statement takes its snapshot when the first one has the locks.
    db.prepare(&[LOCK, CHARGE]).await?;
    let (lock, charge): (Params, Params) = (&[&user_ids], &[&user_ids, &bytes, &COUNTED_HOURS, &budget_bytes]);
    let (locked, charged) = tokio::join!(biased; db.execute(LOCK, lock), db.query(CHARGE, charge));
    locked?;
    let exceeded = |row: &tokio_postgres::Row| Exceeded { user_id: row.get("user_id"), bytes: row.get("total_bytes") };
    Ok(charged?.iter().map(exceeded).collect())
}

fn quota_exceeded(bytes: i64, budget_bytes: i64) -> Error {
    Error::QuotaExceeded {
        reason: "STORED_RESPONSES_EXCEEDED",
        message: format!(
            "request_id: the stored responses over {UNCOUNTED_RESPONSE_BYTES_MAX} bytes of 24 hours would have {bytes} \
             bytes; expected at most {budget_bytes}; retry later, or without request_id"
        ),
        metadata: vec![("bytes", bytes), ("bytes_max", budget_bytes)],
    }
}

/// Deletes up to [`PRUNE_BATCH_ROWS`] charges that do not count any more. Returns how many.
pub async fn prune_response_budgets(db: &Conn) -> Result<u64> {
    const SQL: &str = "-- prune_response_budgets
        DELETE FROM stored_response_bytes WHERE ctid = ANY (ARRAY(
            SELECT ctid FROM stored_response_bytes WHERE hour <= now() - make_interval(hours => $1) LIMIT $2))";
    db.execute(SQL, &[&COUNTED_HOURS, &PRUNE_BATCH_ROWS]).await
}
