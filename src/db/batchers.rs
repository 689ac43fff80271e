//! The calls that come most often, many at a time: see [`crate::coalesce`].

use prost::Message;
use uuid::Uuid;

use super::{
    Conn, Db, Page,
    comments::{self, NewComment},
    idempotency::{Begun, Claim, KeptReply, RequestKey, claim_many, commit_with_replies, decode_reply},
    issues::{self, IssueChange, IssueList, NewIssue},
};
use crate::{
    batching::coalescer::{Bounds, Coalescer, Company, Outcome},
    batching::shared_read::Flights,
    error::{Error, Result},
    pb::{Comment, Issue, IssueView},
};

/// Rounds share the pool with everything else, and more of them at once only make each smaller.
const BOUNDS: Bounds = Bounds { items_max: 64, rounds_max: 2, waiting_max: 4_096, by_caller: true };

/// Whether a statement waits for rows that others have locked, or leaves them alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locked {
    Wait,
    Skip,
}

/// A mutation that can be made for many callers at once.
pub trait Mutate: Clone + Send + Sync + 'static {
    type Reply: Message + Default + 'static;

    /// Makes the mutations, in one statement and so all or none, and answers what became of each, in order. What fails
    /// without touching the others is an outcome; an error means that nothing was done for any.
    fn apply(
        db: &Conn,
        items: &[Self],
        locked: Locked,
    ) -> impl Future<Output = Result<Vec<Outcome<Self::Reply>>>> + Send;

    /// What might wait for others' locks goes alone, so that nobody has to wait with it.
    fn company(&self) -> Company<Uuid>;
}

impl Mutate for NewIssue {
    type Reply = Issue;

    async fn apply(db: &Conn, items: &[Self], _: Locked) -> Result<Vec<Outcome<Issue>>> {
        Ok(issues::create(db, items).await?.into_iter().map(|issue| Outcome::Done(Ok(issue))).collect())
    }

    fn company(&self) -> Company<Uuid> {
        // Another transaction may be about to take the external id, or to delete a label.
        if self.external_id.is_some() || !self.label_ids.is_empty() { Company::Alone } else { Company::Any }
    }
}

impl Mutate for IssueChange {
    type Reply = Issue;

    async fn apply(db: &Conn, items: &[Self], locked: Locked) -> Result<Vec<Outcome<Issue>>> {
        issues::update_many(db, items, "issue.id", locked).await
    }

    fn company(&self) -> Company<Uuid> {
        if self.external_id.is_some() { Company::Alone } else { Company::Distinct(self.id) }
    }
}

impl Mutate for NewComment {
    type Reply = Comment;

    async fn apply(db: &Conn, items: &[Self], locked: Locked) -> Result<Vec<Outcome<Comment>>> {
        comments::create_many(db, items, locked).await
    }

    fn company(&self) -> Company<Uuid> {
        Company::Any
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
    lists: Flights<IssueList, Page<Issue>>,
    pub creates: Mutations<NewIssue>,
    pub updates: Mutations<IssueChange>,
    pub comments: Mutations<NewComment>,
}

impl Rounds {
    pub fn new(db: Db) -> Self {
        let (of_round, of_one) = (db.clone(), db.clone());
        let gets = Coalescer::new(
            BOUNDS,
            |_| Company::Any,
            Box::new(move |wanted| {
                let db = of_round.clone();
                Box::pin(async move {
                    let conn = db.conn().await?;
                    match wanted[..] {
                        // Two statements instead of three.
                        [(id, view)] => Ok(vec![Outcome::Done(issues::get_in_view(&conn, id, view).await)]),
                        _ => issues::get_many(&conn, &wanted).await,
                    }
                })
            }),
            Box::new(move |(id, view)| {
                let db = of_one.clone();
                Box::pin(async move { issues::get_in_view(&*db.conn().await?, id, view).await })
            }),
        );
        let of_list = db.clone();
        let lists = Flights::new(Box::new(move |list: IssueList| {
            let db = of_list.clone();
            Box::pin(async move {
                let _slot = if list.filter.searches() { Some(db.heavy_slot().await?) } else { None };
                issues::list(&*db.conn().await?, &list).await
            })
        }));
        Self { gets, lists, creates: mutations(&db), updates: mutations(&db), comments: mutations(&db), db }
    }

    pub async fn get(&self, id: Uuid, view: IssueView) -> Result<Issue> {
        self.gets.call((id, view)).await
    }

    pub async fn list(&self, list: IssueList) -> Result<Page<Issue>> {
        self.lists.read(list).await
    }

    /// Makes a mutation with those that are asked for at the same time. A trial is made alone, and rolled back.
    pub async fn make<M: Mutate>(&self, mutations: &Mutations<M>, call: Call<M>) -> Result<M::Reply> {
        if call.key.validate_only {
            // Boxed, as what happens seldom should not make the future of every call large: they are moved about.
            return Box::pin(make_alone(&self.db, call)).await;
        }
        let key = call.key;
        mutations.call(call).await.map_err(|error| key.explain(error))
    }
}

fn mutations<M: Mutate>(db: &Db) -> Mutations<M> {
    let (of_round, of_one) = (db.clone(), db.clone());
    Coalescer::new(
        BOUNDS,
        |call: &Call<M>| call.item.company(),
        Box::new(move |calls| {
            let db = of_round.clone();
            Box::pin(async move { make_many(&db, calls).await })
        }),
        Box::new(move |call| {
            let db = of_one.clone();
            Box::pin(async move { make_alone(&db, call).await })
        }),
    )
}

async fn make_alone<M: Mutate>(db: &Db, call: Call<M>) -> Result<M::Reply> {
    let tx = match db.begin_single(call.caller_id, call.key).await? {
        Begun::Fresh(tx) => tx,
        Begun::Replayed(reply) => return decode_reply(&reply),
    };
    match M::apply(&tx, std::slice::from_ref(&call.item), Locked::Wait).await?.pop() {
        Some(Outcome::Done(outcome)) => {
            let reply = outcome?;
            tx.finish(|| reply.encode_to_vec()).await?;
            Ok(reply)
        }
        Some(Outcome::Alone) | None => Err(Error::Internal("a mutation gave no outcome")),
    }
}

/// Mutations without request ids are one statement; with some, a transaction that also keeps their replies.
async fn make_many<M: Mutate>(db: &Db, calls: Vec<Call<M>>) -> Result<Vec<Outcome<M::Reply>>> {
    if calls.iter().all(|call| call.key.request_id.is_none()) {
        let items: Vec<M> = calls.into_iter().map(|call| call.item).collect();
        return M::apply(&*db.autocommit_conn().await?, &items, Locked::Skip).await;
    }
    let mut claims = vec![Claim::Fresh; calls.len()];
    let tx = db.begin().await?;
    loop {
        let fresh = calls.iter().zip(&claims).filter(|(_, claim)| **claim == Claim::Fresh).map(|(call, _)| call);
        let (keys, items): (Vec<_>, Vec<M>) = fresh.map(|call| ((call.caller_id, call.key), call.item.clone())).unzip();
        if items.is_empty() {
            return Ok(calls.iter().map(|_| Outcome::Alone).collect());
        }
        // Together, as the ids are new but for retries.
        let (found, made) = tokio::join!(biased; claim_many(&tx, &keys), M::apply(&tx, &items, Locked::Skip));
        let found = found?;
        if found.contains(&Claim::Taken) {
            // Made again without these: the others may be fresh no more then, but become fewer.
            tx.restart()?;
            let mut found = found.into_iter();
            for claim in claims.iter_mut().filter(|claim| **claim == Claim::Fresh) {
                *claim = found.next().unwrap_or(Claim::Taken);
            }
            continue;
        }
        let made = made?;
        let kept: Vec<KeptReply> =
            keys.iter().zip(&made).filter_map(|(key, outcome)| kept_reply(key, outcome)).collect();
        commit_with_replies(tx, &kept).await?;
        let mut made = made.into_iter();
        let outcome_of = |(call, claim): (&Call<M>, Claim)| match claim {
            Claim::Taken => Outcome::Alone,
            Claim::Fresh => match made.next() {
                // It may have failed because the first call with its id was just made.
                Some(Outcome::Done(Err(_))) if call.key.request_id.is_some() => Outcome::Alone,
                Some(outcome) => outcome,
                None => Outcome::Done(Err(Error::Internal("a mutation gave no outcome"))),
            },
        };
        return Ok(calls.iter().zip(claims).map(outcome_of).collect());
    }
}

/// None: there is no request id, or nothing that a retry should get.
fn kept_reply<R: Message>((caller_id, key): &(Uuid, RequestKey), outcome: &Outcome<R>) -> Option<KeptReply> {
    let (request_id, fingerprint) = key.request_id?;
    match outcome {
        Outcome::Done(Ok(reply)) => {
            Some(KeptReply { caller_id: *caller_id, request_id, fingerprint, reply: reply.encode_to_vec() })
        }
        Outcome::Done(Err(_)) | Outcome::Alone => None,
    }
}
