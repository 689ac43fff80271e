//! The calls that come most often, many at a time: see [`crate::coalesce`].

use prost::Message;
use uuid::Uuid;

use super::{
    Conn, Db,
    comments::{self, NewComment},
    issues::{self, IssueChange, NewIssue},
    requests::{RequestKey, claim_many, keep_replies, stored_reply},
};
use crate::{
    coalesce::{Bounds, Coalescer},
    error::{Error, Result},
    pb::{Comment, Issue, IssueView},
};

/// Rounds share the pool with everything else, and more of them at once only make each smaller.
const READS: Bounds = Bounds { items_max: 64, rounds_max: 2, waiting_max: 4_096 };
const WRITES: Bounds = Bounds { items_max: 64, rounds_max: 2, waiting_max: 4_096 };

/// A mutation that can be made for many callers at once.
pub trait Mutate: Clone + Send + Sync + 'static {
    type Reply: Message + Default + 'static;

    /// Makes the mutations, in one statement and so all or none, and answers an outcome for each, in order. What fails
    /// without touching the others is an outcome; an error means that nothing was done for any.
    fn apply(db: &Conn, items: &[Self]) -> impl Future<Output = Result<Vec<Result<Self::Reply>>>> + Send;

    /// What no two mutations of a round have in common.
    fn subject(&self) -> Option<Uuid>;
}

impl Mutate for NewIssue {
    type Reply = Issue;

    async fn apply(db: &Conn, items: &[Self]) -> Result<Vec<Result<Issue>>> {
        Ok(issues::create(db, items).await?.into_iter().map(Ok).collect())
    }

    fn subject(&self) -> Option<Uuid> {
        None
    }
}

impl Mutate for IssueChange {
    type Reply = Issue;

    async fn apply(db: &Conn, items: &[Self]) -> Result<Vec<Result<Issue>>> {
        issues::update_many(db, items, "issue.id").await
    }

    fn subject(&self) -> Option<Uuid> {
        Some(self.id)
    }
}

impl Mutate for NewComment {
    type Reply = Comment;

    async fn apply(db: &Conn, items: &[Self]) -> Result<Vec<Result<Comment>>> {
        comments::create_many(db, items).await
    }

    fn subject(&self) -> Option<Uuid> {
        None
    }
}

/// A mutation with who asks for it, and how.
#[derive(Clone)]
pub struct Call<M> {
    pub caller_id: Uuid,
    pub key: RequestKey,
    pub item: M,
}

type Mutations<M> = Coalescer<Call<M>, <M as Mutate>::Reply, Uuid>;

/// The coalescers of a service.
pub struct Rounds {
    db: Db,
    gets: Coalescer<(Uuid, IssueView), Issue, ()>,
    pub creates: Mutations<NewIssue>,
    pub updates: Mutations<IssueChange>,
    pub comments: Mutations<NewComment>,
}

impl Rounds {
    pub fn new(db: Db) -> Self {
        let reader = db.clone();
        let gets = Coalescer::new(
            READS,
            |_| None,
            Box::new(move |wanted| {
                let db = reader.clone();
                Box::pin(async move { issues::get_many(&*db.conn().await?, &wanted).await })
            }),
        );
        Self { gets, creates: mutations(&db), updates: mutations(&db), comments: mutations(&db), db }
    }

    pub async fn get(&self, id: Uuid, view: IssueView) -> Result<Issue> {
        self.gets.call((id, view)).await
    }

    /// Makes a mutation with those that are asked for at the same time. A trial is made by itself, and rolled back.
    pub async fn make<M: Mutate>(&self, mutations: &Mutations<M>, call: Call<M>) -> Result<M::Reply> {
        if !call.key.validate_only {
            return mutations.call(call).await;
        }
        let tx = self.db.begin().await?;
        let mut outcomes = M::apply(&tx, std::slice::from_ref(&call.item)).await?;
        outcomes.pop().unwrap_or(Err(Error::Internal("a mutation gave no outcome")))
    }
}

fn mutations<M: Mutate>(db: &Db) -> Mutations<M> {
    let db = db.clone();
    Coalescer::new(
        WRITES,
        |call: &Call<M>| call.item.subject(),
        Box::new(move |calls| {
            let db = db.clone();
            Box::pin(async move { round(&db, calls).await })
        }),
    )
}

/// Mutations without request ids are one statement; with some, a transaction that also keeps their replies.
async fn round<M: Mutate>(db: &Db, calls: Vec<Call<M>>) -> Result<Vec<Result<M::Reply>>> {
    if calls.iter().all(|call| call.key.request_id.is_none()) {
        let items: Vec<M> = calls.into_iter().map(|call| call.item).collect();
        return M::apply(&*db.conn().await?, &items).await;
    }
    let tx = db.begin().await?;
    let keys: Vec<_> = calls.iter().map(|call| (call.caller_id, call.key)).collect();
    let fresh = claim_many(&tx, &keys).await?;
    let items: Vec<M> =
        (calls.iter().zip(&fresh)).filter(|(_, fresh)| **fresh).map(|(call, _)| call.item.clone()).collect();
    let mut made = if items.is_empty() { Vec::new() } else { M::apply(&tx, &items).await? }.into_iter();
    let mut outcomes: Vec<Option<Result<M::Reply>>> = Vec::with_capacity(calls.len());
    let mut replies = Vec::new();
    for ((caller_id, key), fresh) in keys.iter().zip(fresh) {
        let outcome = if fresh { made.next() } else { None };
        if let (Some(outcome), Some((request_id, _))) = (&outcome, key.request_id) {
            replies.push((*caller_id, request_id, outcome.as_ref().ok().map(Message::encode_to_vec)));
        }
        outcomes.push(outcome);
    }
    keep_replies(&tx, &replies).await?;
    tx.commit().await?;

    let mut all = Vec::with_capacity(calls.len());
    for (outcome, (caller_id, key)) in outcomes.into_iter().zip(keys) {
        all.push(match (outcome, key.request_id) {
            (Some(outcome), _) => outcome,
            (None, Some((request_id, fingerprint))) => replay(db, caller_id, request_id, fingerprint).await,
            (None, None) => Err(Error::Internal("a mutation gave no outcome")),
        });
    }
    Ok(all)
}

/// What the call with the same request id has answered.
async fn replay<R: Message + Default>(db: &Db, caller_id: Uuid, request_id: Uuid, fingerprint: [u8; 32]) -> Result<R> {
    let reply = stored_reply(&*db.conn().await?, caller_id, request_id, fingerprint).await?;
    R::decode(&*reply).map_err(|_| Error::Internal("a stored reply cannot be decoded"))
}
