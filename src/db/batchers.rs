//! Batchers of the most frequent calls: concurrent calls of a kind share a transaction or a query. See
//! [`crate::batching`].

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    comments::{self, NewComment},
    conn::Conn,
    idempotency::{KeyLock, MutationOptions, StoredResponse, commit_with_responses, try_lock_keys},
    issues::{self, IssueChange, IssueList, NewIssue},
    page::Page,
    pool::Db,
    response_budget,
    row_locks::RowLocks,
};
use crate::{
    batching::{
        coalescer::{BatchAffinity, Bounds, Coalescer, Outcome},
        shared_read::SharedReads,
    },
    error::{Error, Result},
    fairness::Flow,
    metrics,
    pb::{Comment, Issue, IssueView},
};

/// Returns the bounds of a batcher. Batches share the pool with all other requests: more concurrent batches would only make each smaller.
const fn bounds(name: &'static str) -> Bounds {
    Bounds { name, items_max: 64, batches_max: 2, waiting_max: 4_096, runs_inline: true }
}

/// How long a user is remembered whose responses exceeded a budget.
const OVER_BUDGET_REMEMBERED: Duration = Duration::from_secs(10);
/// How many users are remembered.
const USERS_OVER_BUDGET_MAX: usize = 1_024;

/// A mutation that can be executed for many callers in one statement.
pub trait BatchMutation: Clone + Send + Sync + 'static {
    type Response: Message + Default + 'static;

    /// Executes the mutations in one statement, all or none. Returns the outcome of each, in order.
    ///
    /// A mutation that fails without effect on the others is an outcome. An error means that none was executed.
    fn apply(
        db: &Conn,
        mutations: &[Self],
        row_locks: RowLocks,
    ) -> impl Future<Output = Result<Vec<Outcome<Self::Response>>>> + Send;

    /// Returns which mutations may be in the same batch. Those that can wait for locks of other transactions run
    /// individually, so that no other caller waits with them.
    fn affinity(&self) -> BatchAffinity<Uuid>;
}

impl BatchMutation for NewIssue {
    type Response = Issue;

    async fn apply(db: &Conn, mutations: &[Self], _: RowLocks) -> Result<Vec<Outcome<Issue>>> {
        Ok(issues::create(db, mutations).await?.into_iter().map(|issue| Outcome::Done(Ok(issue))).collect())
    }

    fn affinity(&self) -> BatchAffinity<Uuid> {
        // Another transaction may be inserting the same external id, or deleting one of the labels.
        let can_wait = self.external_id.is_some() || !self.label_ids.is_empty();
        if can_wait { BatchAffinity::Individual } else { BatchAffinity::Any }
    }
}

impl BatchMutation for IssueChange {
    type Response = Issue;

    async fn apply(db: &Conn, mutations: &[Self], row_locks: RowLocks) -> Result<Vec<Outcome<Issue>>> {
        issues::update_many(db, mutations, "issue.id", row_locks).await
    }

    fn affinity(&self) -> BatchAffinity<Uuid> {
        if self.external_id.is_some() { BatchAffinity::Individual } else { BatchAffinity::Distinct(self.id) }
    }
}

impl BatchMutation for NewComment {
    type Response = Comment;

    async fn apply(db: &Conn, mutations: &[Self], row_locks: RowLocks) -> Result<Vec<Outcome<Comment>>> {
        comments::create_many(db, mutations, row_locks).await
    }

    fn affinity(&self) -> BatchAffinity<Uuid> {
        BatchAffinity::Any
    }
}

/// A mutation with its caller and options.
#[derive(Clone)]
pub struct MutationCall<M> {
    pub caller_id: Uuid,
    pub options: MutationOptions,
    pub mutation: M,
}

type MutationBatcher<M> = Coalescer<MutationCall<M>, <M as BatchMutation>::Response, Uuid>;

/// The batchers of a server.
pub struct Batchers {
    db: Db,
    gets: Coalescer<(Uuid, IssueView), Issue, ()>,
    lists: SharedReads<(Flow, IssueList), Page<Issue>>,
    pub creates: MutationBatcher<NewIssue>,
    pub updates: MutationBatcher<IssueChange>,
    pub comments: MutationBatcher<NewComment>,
}

impl Batchers {
    pub fn new(db: Db) -> Self {
        Self {
            gets: get_batcher(&db),
            lists: list_reads(&db),
            creates: mutation_batcher("create_issue", &db),
            updates: mutation_batcher("update_issue", &db),
            comments: mutation_batcher("create_comment", &db),
            db,
        }
    }

    /// Returns an issue. See [`issues::get_in_view`].
    pub async fn get(&self, flow: Flow, id: Uuid, view: IssueView) -> Result<Issue> {
        self.gets.call(flow, (id, view)).await
    }

    /// Returns a page of issues. See [`issues::list`]. Shared with concurrent calls of the same flow only, so that no caller
    /// waits for a permit of another one.
    pub async fn list(&self, flow: Flow, list: IssueList) -> Result<Page<Issue>> {
        self.lists.read((flow, list)).await
    }

    /// Executes a mutation in the next batch of its kind. A dry run is executed individually and rolled back.
    pub async fn mutate<M: BatchMutation>(
        &self,
        batcher: &MutationBatcher<M>,
        call: MutationCall<M>,
    ) -> Result<M::Response> {
        if call.options.validate_only {
            // Boxed: dry runs are rare and must not enlarge the future of every call.
            return Box::pin(mutate_individually(&self.db, call)).await;
        }
        let options = call.options;
        batcher.call(Flow::User(call.caller_id), call).await.map_err(|error| options.explain(error))
    }
}

fn get_batcher(db: &Db) -> Coalescer<(Uuid, IssueView), Issue, ()> {
    let (batch_db, individual_db) = (db.clone(), db.clone());
    Coalescer::new(
        bounds("get_issue"),
        |_| BatchAffinity::Any,
        Box::new(move |requested| {
            let db = batch_db.clone();
            Box::pin(async move {
                let conn = db.conn().await?;
                match requested[..] {
                    // Two statements instead of three.
                    [(id, view)] => Ok(vec![Outcome::Done(issues::get_in_view(&conn, id, view).await)]),
                    _ => issues::get_many(&conn, &requested).await,
                }
            })
        }),
        Box::new(move |flow, (id, view)| {
            let db = individual_db.for_flow(flow);
            Box::pin(async move { issues::get_in_view(&db.conn().await?, id, view).await })
        }),
    )
}

fn list_reads(db: &Db) -> SharedReads<(Flow, IssueList), Page<Issue>> {
    let db = db.clone();
    SharedReads::new(Box::new(move |(flow, list): (Flow, IssueList)| {
        let db = db.for_flow(flow);
        Box::pin(async move {
            let conn = if list.is_heavy() { db.heavy_conn().await? } else { db.conn().await? };
            issues::list(&conn, &list).await
        })
    }))
}

fn mutation_batcher<M: BatchMutation>(name: &'static str, db: &Db) -> MutationBatcher<M> {
    let (batch_db, individual_db) = (db.clone(), db.clone());
    let over_budget = Arc::<UsersOverBudget>::default();
    Coalescer::new(
        bounds(name),
        |call: &MutationCall<M>| call.mutation.affinity(),
        Box::new(move |calls| {
            let (db, over_budget) = (batch_db.clone(), Arc::clone(&over_budget));
            Box::pin(async move { mutate_batch(&db, &over_budget, calls).await })
        }),
        Box::new(move |_, call| {
            let db = individual_db.clone();
            Box::pin(async move { mutate_individually(&db, call).await })
        }),
    )
}

async fn mutate_individually<M: BatchMutation>(db: &Db, call: MutationCall<M>) -> Result<M::Response> {
    let MutationCall { caller_id, options, mutation } = call;
    db.mutate_by_statement(caller_id, options, async |conn| {
        match M::apply(conn, std::slice::from_ref(&mutation), RowLocks::Wait).await?.pop() {
            Some(Outcome::Done(outcome)) => outcome,
            Some(Outcome::Individual) | None => Err(Error::Internal("a mutation has no outcome")),
        }
    })
    .await
}

/// Executes a batch: one statement if no call has an idempotency key, else a transaction that also stores the responses.
async fn mutate_batch<M: BatchMutation>(
    db: &Db,
    over_budget: &UsersOverBudget,
    calls: Vec<MutationCall<M>>,
) -> Result<Vec<Outcome<M::Response>>> {
    if calls.iter().all(|call| call.options.key.is_none()) {
        let mutations: Vec<M> = calls.into_iter().map(|call| call.mutation).collect();
        return M::apply(&db.autocommit_conn().await?, &mutations, RowLocks::Skip).await;
    }
    let mut locks = over_budget.locks(&calls);
    if !locks.contains(&KeyLock::Acquired) {
        return Ok(calls.iter().map(|_| Outcome::Individual).collect());
    }
    let tx = db.begin().await?;
    loop {
        let remaining = calls.iter().zip(&locks).filter(|(_, lock)| **lock == KeyLock::Acquired).map(|(call, _)| call);
        let (keys, mutations): (Vec<_>, Vec<M>) =
            remaining.map(|call| ((call.caller_id, call.options), call.mutation.clone())).unzip();
        if mutations.is_empty() {
            return Ok(calls.iter().map(|_| Outcome::Individual).collect());
        }
        // Pipelined: except for retries, the keys are new.
        let (acquired, applied) =
            tokio::join!(biased; try_lock_keys(&tx, &keys), M::apply(&tx, &mutations, RowLocks::Skip));
        let acquired = acquired?;
        if acquired.contains(&KeyLock::Unavailable) {
            // Repeated without these calls. Other keys may be unavailable by then, but the calls become fewer each time.
            metrics::count(|metrics| &metrics.retries.request_id_in_use);
            tx.restart()?;
            let mut acquired = acquired.into_iter();
            for lock in locks.iter_mut().filter(|lock| **lock == KeyLock::Acquired) {
                *lock = acquired.next().unwrap_or(KeyLock::Unavailable);
            }
            continue;
        }
        let applied = applied?;
        let stored: Vec<StoredResponse> =
            keys.iter().zip(&applied).filter_map(|(key, outcome)| stored_response(key, outcome)).collect();
        let budget_bytes = db.storage_limits().response_bytes_per_user_max;
        let uncharged =
            response_budget::charge_batch(&tx, stored.iter().map(StoredResponse::size), budget_bytes).await?;
        if !uncharged.is_empty() {
            metrics::count(|metrics| &metrics.retries.response_budget);
            tx.restart()?;
            over_budget.add(&uncharged);
            for (call, lock) in calls.iter().zip(&mut locks) {
                if call.options.key.is_some() && uncharged.contains(&call.caller_id) {
                    *lock = KeyLock::Unavailable;
                }
            }
            continue;
        }
        commit_with_responses(tx, &stored).await?;
        return Ok(outcomes(&calls, &locks, applied));
    }
}

/// The users whose responses a batch could not charge to their budgets of late. Their calls with idempotency keys are
/// executed individually: a batch with one of them would be executed twice.
#[derive(Default)]
struct UsersOverBudget {
    /// With the time until which they are remembered.
    users: Mutex<HashMap<Uuid, Instant>>,
}

impl UsersOverBudget {
    /// Returns [`KeyLock::Unavailable`] for the calls that are to be executed individually.
    fn locks<M>(&self, calls: &[MutationCall<M>]) -> Vec<KeyLock> {
        let (users, now) = (self.lock(), Instant::now());
        let is_over = |call: &MutationCall<M>| users.get(&call.caller_id).is_some_and(|until| now < *until);
        let lock_of = |call: &MutationCall<M>| match call.options.key {
            Some(_) if is_over(call) => KeyLock::Unavailable,
            Some(_) | None => KeyLock::Acquired,
        };
        calls.iter().map(lock_of).collect()
    }

    fn add(&self, user_ids: &HashSet<Uuid>) {
        let (mut users, now) = (self.lock(), Instant::now());
        if users.len() + user_ids.len() > USERS_OVER_BUDGET_MAX {
            users.retain(|_, until| now < *until);
        }
        let room = USERS_OVER_BUDGET_MAX.saturating_sub(users.len());
        users.extend(user_ids.iter().take(room).map(|user_id| (*user_id, now + OVER_BUDGET_REMEMBERED)));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, Instant>> {
        // The map is valid even if a holder of the lock has panicked.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the outcome of every call of a batch, given those of the calls whose keys were locked.
fn outcomes<M: BatchMutation>(
    calls: &[MutationCall<M>],
    locks: &[KeyLock],
    applied: Vec<Outcome<M::Response>>,
) -> Vec<Outcome<M::Response>> {
    let mut applied = applied.into_iter();
    let outcome_of = |(call, lock): (&MutationCall<M>, &KeyLock)| match lock {
        KeyLock::Unavailable => Outcome::Individual,
        KeyLock::Acquired => match applied.next() {
            // The first call with the same key may have just been committed, and be the reason for the failure.
            Some(Outcome::Done(Err(_))) if call.options.key.is_some() => Outcome::Individual,
            Some(outcome) => outcome,
            None => Outcome::Done(Err(Error::Internal("a mutation has no outcome"))),
        },
    };
    calls.iter().zip(locks).map(outcome_of).collect()
}

/// Returns what to store for a retry, or `None` without a key or after a failure.
fn stored_response<R: Message>(
    (caller_id, options): &(Uuid, MutationOptions),
    outcome: &Outcome<R>,
) -> Option<StoredResponse> {
    let key = options.key?;
    match outcome {
        Outcome::Done(Ok(response)) => {
            Some(StoredResponse { caller_id: *caller_id, key, response: response.encode_to_vec() })
        }
        Outcome::Done(Err(_)) | Outcome::Individual => None,
    }
}
