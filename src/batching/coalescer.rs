//! Concurrent calls of one kind, done together: what arrives while a round is under way goes out in the next one.
//!
//! The idea is DataLoader's for reads and group commit's for writes: one statement for many calls costs the database far
//! less than a statement for each. Without load nothing waits: a call that finds a free round begins it at once.

use std::{
    collections::{HashSet, VecDeque},
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// After this a round is given up when nobody waits for it any more.
const ROUND_LONG: Duration = Duration::from_millis(100);

/// Does the items of a round, and answers what became of each, in order. An error means that nothing was done for any of
/// them, or that it is not known: see [`Error::is_undone`].
pub type Round<I, O> = Box<dyn Fn(Vec<I>) -> BoxFuture<'static, Result<Vec<Outcome<O>>>> + Send + Sync>;

/// Does one item by itself, however long it has to wait for others' locks.
pub type Alone<I, O> = Box<dyn Fn(I) -> BoxFuture<'static, Result<O>> + Send + Sync>;

/// What became of an item in a round.
#[derive(Debug)]
pub enum Outcome<O> {
    Done(Result<O>),
    /// Nothing: it would have held up the others, and is to be done alone.
    Alone,
}

/// Whom an item goes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company<K> {
    Any,
    /// All but items with the same key: no two of them are in one round.
    Distinct(K),
    /// None: it may have to wait for others' locks.
    Alone,
}

/// The bounds of a [`Coalescer`].
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Items of one round.
    pub items_max: usize,
    /// Rounds under way at once.
    pub rounds_max: usize,
    /// Items that wait for a round; more are told that it is too much.
    pub waiting_max: usize,
    /// Whether a call that finds nothing under way is made by its caller, which saves a task, and ends with it: whoever
    /// calls has to be trusted not to go away again and again, as what is cut short costs a connection.
    pub by_caller: bool,
}

/// Puts calls together.
pub struct Coalescer<I, O, K> {
    shared: Arc<Shared<I, O, K>>,
}

struct Shared<I, O, K> {
    company: fn(&I) -> Company<K>,
    round: Round<I, O>,
    alone: Alone<I, O>,
    bounds: Bounds,
    queue: Mutex<Queue<I, O>>,
}

struct Queue<I, O> {
    waiting: VecDeque<Call<I, O>>,
    rounds: usize,
}

struct Call<I, O> {
    item: I,
    caller: oneshot::Sender<Result<O>>,
}

impl<I, O, K> Coalescer<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    pub fn new(bounds: Bounds, company: fn(&I) -> Company<K>, round: Round<I, O>, alone: Alone<I, O>) -> Self {
        let queue = Mutex::new(Queue { waiting: VecDeque::new(), rounds: 0 });
        Self { shared: Arc::new(Shared { company, round, alone, bounds, queue }) }
    }

    /// Does the item in the next round that has room for it. Dropped before the round begins, it is not done.
    pub async fn call(&self, item: I) -> Result<O> {
        if (self.shared.company)(&item) == Company::Alone {
            return (self.shared.alone)(item).await;
        }
        match self.enter(item)? {
            Entry::Lone(item) => Lone(Arc::clone(&self.shared)).run(item).await,
            Entry::Waits(outcome) => outcome.await.map_err(|_| Error::Internal("a round ended without an outcome"))?,
        }
    }

    fn enter(&self, item: I) -> Result<Entry<I, O>> {
        let mut queue = self.shared.lock();
        let free = queue.rounds < self.shared.bounds.rounds_max;
        if free && queue.waiting.is_empty() && self.shared.bounds.by_caller {
            queue.rounds += 1;
            return Ok(Entry::Lone(item));
        }
        if queue.waiting.len() >= self.shared.bounds.waiting_max {
            return Err(Error::Exhausted(format!("{} calls of this kind wait already", queue.waiting.len())));
        }
        let (caller, outcome) = oneshot::channel();
        queue.waiting.push_back(Call { item, caller });
        if free {
            queue.rounds += 1;
            tokio::spawn(Arc::clone(&self.shared).rounds());
        }
        Ok(Entry::Waits(outcome))
    }
}

/// How a call goes on.
enum Entry<I, O> {
    /// As a round of its own, which counts as under way.
    Lone(I),
    /// In a round of others.
    Waits(oneshot::Receiver<Result<O>>),
}

/// The round of a call that has found nothing under way, see [`Bounds::by_caller`]. When it ends, or its caller goes away,
/// what has come meanwhile is next.
struct Lone<I, O, K>(Arc<Shared<I, O, K>>)
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static;

impl<I, O, K> Lone<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    async fn run(self, item: I) -> Result<O> {
        let shared = Arc::clone(&self.0);
        let outcome = shared.outcomes(vec![item.clone()]).await.map(|mut outcomes| outcomes.pop());
        drop(self);
        match outcome {
            Ok(Some(Outcome::Done(outcome))) => outcome,
            Ok(Some(Outcome::Alone)) => (shared.alone)(item).await,
            Ok(None) => Err(Error::Internal("a round ended without an outcome")),
            Err(error) if error.is_undone() => (shared.alone)(item).await,
            Err(error) => Err(error),
        }
    }
}

impl<I, O, K> Drop for Lone<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        if queue.waiting.is_empty() {
            queue.rounds -= 1;
            return;
        }
        drop(queue);
        // Without a runtime it ends, and nobody waits any more.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(Arc::clone(&self.0).rounds());
        }
    }
}

impl<I, O, K> Shared<I, O, K> {
    fn lock(&self) -> MutexGuard<'_, Queue<I, O>> {
        // The queue is whole whatever happened to a holder of the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<I, O, K> Shared<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    /// One round after the other, until nothing waits.
    async fn rounds(self: Arc<Self>) {
        while let Some(calls) = self.next_round() {
            self.run(calls).await;
        }
    }

    /// The calls of the next round, without those whose callers have gone away; none when nothing waits: then this is
    /// one round less.
    fn next_round(&self) -> Option<Vec<Call<I, O>>> {
        let mut queue = self.lock();
        let mut calls = Vec::new();
        let mut keys = HashSet::new();
        let mut later = VecDeque::new();
        while calls.len() < self.bounds.items_max {
            let Some(call) = queue.waiting.pop_front() else { break };
            if call.caller.is_closed() {
                continue;
            }
            match (self.company)(&call.item) {
                Company::Distinct(key) if !keys.insert(key) => later.push_back(call),
                _ => calls.push(call),
            }
        }
        while let Some(call) = later.pop_back() {
            queue.waiting.push_front(call);
        }
        if calls.is_empty() {
            queue.rounds -= 1;
            return None;
        }
        Some(calls)
    }

    async fn run(self: &Arc<Self>, mut calls: Vec<Call<I, O>>) {
        let items: Vec<I> = calls.iter().map(|call| call.item.clone()).collect();
        let outcomes = tokio::select! {
            biased;
            outcomes = self.outcomes(items) => outcomes,
            () = abandoned(&mut calls) => return,
        };
        match outcomes {
            Ok(outcomes) => {
                for (call, outcome) in calls.into_iter().zip(outcomes) {
                    match outcome {
                        // A caller that has gone away does not want it.
                        Outcome::Done(outcome) => drop(call.caller.send(outcome)),
                        Outcome::Alone => self.run_alone(call),
                    }
                }
            }
            // One of them has made it fail for all: each has its own try.
            Err(error) if error.is_undone() => calls.into_iter().for_each(|call| self.run_alone(call)),
            Err(error) => {
                for call in calls {
                    let _ = call.caller.send(Err(error.clone()));
                }
            }
        }
    }

    /// Beside the rounds, and only as long as its caller waits for it.
    fn run_alone(self: &Arc<Self>, mut call: Call<I, O>) {
        let doing = (self.alone)(call.item);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = doing => outcome,
                () = call.caller.closed() => return,
            };
            let _ = call.caller.send(outcome);
        });
    }

    /// A panic costs the round, not those that follow.
    async fn outcomes(&self, items: Vec<I>) -> Result<Vec<Outcome<O>>> {
        let round = AssertUnwindSafe(async { (self.round)(items).await });
        round.catch_unwind().await.unwrap_or(Err(Error::Internal("a round panicked")))
    }
}

/// Waits until all callers of a round have gone away, if it takes long.
async fn abandoned<I, O>(calls: &mut [Call<I, O>]) {
    // Most rounds are done before that, and spared the looking.
    tokio::time::sleep(ROUND_LONG).await;
    join_all(calls.iter_mut().map(|call| call.caller.closed())).await;
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use proptest::prelude::*;
    use tokio::sync::Semaphore;

    use super::*;

    const BOUNDS: Bounds = Bounds { items_max: 4, rounds_max: 1, waiting_max: 100, by_caller: true };

    /// Doubles numbers. 13 makes its whole round fail, 14 has a failure of its own, 15 wants to be alone; a round waits
    /// for a permit.
    fn doubler(bounds: Bounds, gate: Arc<Semaphore>, rounds: Arc<Mutex<Vec<Vec<u32>>>>) -> Coalescer<u32, u32, u32> {
        let round: Round<u32, u32> = Box::new(move |items| {
            let (gate, rounds) = (Arc::clone(&gate), Arc::clone(&rounds));
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                rounds.lock().unwrap().push(items.clone());
                if items.contains(&13) {
                    return Err(Error::invalid("item", "13"));
                }
                let outcome = |item| if item == 15 { Outcome::Alone } else { Outcome::Done(double(item)) };
                Ok(items.into_iter().map(outcome).collect())
            })
        });
        Coalescer::new(bounds, |item| Company::Distinct(*item), round, alone())
    }

    fn alone() -> Alone<u32, u32> {
        Box::new(|item| {
            Box::pin(async move { if item == 13 { Err(Error::invalid("item", "13")) } else { double(item) } })
        })
    }

    fn double(item: u32) -> Result<u32> {
        if item == 14 { Err(Error::invalid("item", "14")) } else { Ok(2 * item) }
    }

    fn shown(outcome: &Result<u32>) -> String {
        format!("{outcome:?}")
    }

    async fn settle() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    /// Starts these calls one after the other.
    async fn start(
        coalescer: &Arc<Coalescer<u32, u32, u32>>,
        items: &[u32],
    ) -> Vec<tokio::task::JoinHandle<Result<u32>>> {
        let mut calls = Vec::new();
        for item in items.iter().copied() {
            let coalescer = Arc::clone(coalescer);
            calls.push(tokio::spawn(async move { coalescer.call(item).await }));
            settle().await;
        }
        calls
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_without_load_is_a_round_of_its_own() {
        let rounds = Arc::default();
        let coalescer = doubler(BOUNDS, Arc::new(Semaphore::new(100)), Arc::clone(&rounds));
        assert_eq!(coalescer.call(1).await.unwrap(), 2);
        assert_eq!(coalescer.call(2).await.unwrap(), 4);
        assert_eq!(*rounds.lock().unwrap(), [[1], [2]]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_during_a_round_goes_out_in_the_next_up_to_the_bound() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&gate), Arc::clone(&rounds)));
        let calls = start(&coalescer, &[1, 2, 3, 4, 5, 6, 7]).await;
        gate.add_permits(100);
        for (call, wanted) in calls.into_iter().zip([2, 4, 6, 8, 10, 12, 14]) {
            assert_eq!(call.await.unwrap().unwrap(), wanted);
        }
        assert_eq!(*rounds.lock().unwrap(), [vec![1], vec![2, 3, 4, 5], vec![6, 7]]);
    }

    #[tokio::test(start_paused = true)]
    async fn items_with_the_same_key_are_in_different_rounds_in_order() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&gate), Arc::clone(&rounds)));
        let calls = start(&coalescer, &[1, 2, 2, 3, 2]).await;
        gate.add_permits(100);
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert_eq!(*rounds.lock().unwrap(), [vec![1], vec![2, 3], vec![2], vec![2]]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_has_gone_away_is_dropped() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&gate), Arc::clone(&rounds)));
        let calls = start(&coalescer, &[1, 2, 3]).await;
        calls[1].abort();
        settle().await;
        gate.add_permits(100);
        for call in calls {
            drop(call.await);
        }
        assert_eq!(*rounds.lock().unwrap(), [[1], [3]]);
    }

    #[tokio::test(start_paused = true)]
    async fn when_the_caller_of_a_lone_round_goes_away_the_next_round_begins() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&gate), Arc::clone(&rounds)));
        let mut calls = start(&coalescer, &[1, 2]).await;
        calls[0].abort();
        settle().await;
        gate.add_permits(100);
        assert_eq!(calls.pop().unwrap().await.unwrap().unwrap(), 4);
        assert_eq!(coalescer.call(3).await.unwrap(), 6);
        assert_eq!(*rounds.lock().unwrap(), [[2], [3]]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_round_that_is_not_by_its_caller_outlives_him_unless_it_takes_long() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let bounds = Bounds { by_caller: false, ..BOUNDS };
        let coalescer = Arc::new(doubler(bounds, Arc::clone(&gate), Arc::clone(&rounds)));
        start(&coalescer, &[1]).await[0].abort();
        settle().await;
        gate.add_permits(1);
        settle().await;
        assert_eq!(*rounds.lock().unwrap(), [[1]]);

        start(&coalescer, &[2]).await[0].abort();
        tokio::time::sleep(2 * ROUND_LONG).await;
        gate.add_permits(1);
        assert_eq!(coalescer.call(3).await.unwrap(), 6);
        assert_eq!(*rounds.lock().unwrap(), [[1], [3]]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_nobody_waits_for_any_more_is_given_up() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&gate), Arc::clone(&rounds)));
        let first = start(&coalescer, &[1]).await;
        let together = start(&coalescer, &[2, 3]).await;
        gate.add_permits(1);
        for call in first {
            call.await.unwrap().unwrap();
        }
        together[0].abort();
        tokio::time::sleep(2 * ROUND_LONG).await;
        assert!(!together[1].is_finished());
        together[1].abort();
        tokio::time::sleep(2 * ROUND_LONG).await;
        let next = start(&coalescer, &[4]).await;
        gate.add_permits(1);
        for call in next {
            assert_eq!(call.await.unwrap().unwrap(), 8);
        }
        assert_eq!(*rounds.lock().unwrap(), [[1], [4]]);
    }

    #[tokio::test(start_paused = true)]
    async fn too_many_that_wait_are_told_so_at_once() {
        let (gate, rounds) = (Arc::new(Semaphore::new(0)), Arc::default());
        let bounds = Bounds { waiting_max: 2, ..BOUNDS };
        let coalescer = Arc::new(doubler(bounds, Arc::clone(&gate), rounds));
        let _calls = start(&coalescer, &[1, 2, 3]).await;
        assert!(matches!(coalescer.call(4).await, Err(Error::Exhausted(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn when_it_is_not_known_what_a_round_has_done_it_is_not_done_again() {
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let round: Round<u32, u32> = Box::new(move |_| {
            let nth = counted.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                if nth == 0 { Ok(vec![Outcome::Done(Ok(0))]) } else { Err(Error::Unavailable) }
            })
        });
        let coalescer = Arc::new(Coalescer::new(BOUNDS, |item| Company::Distinct(*item), round, alone()));
        let calls = start(&coalescer, &[1, 2, 3]).await;
        let mut outcomes = Vec::new();
        for call in calls {
            outcomes.push(call.await.unwrap().map_err(|error| error.code()));
        }
        assert_eq!(outcomes, [Ok(0), Err(tonic::Code::Unavailable), Err(tonic::Code::Unavailable)]);
        assert_eq!(runs.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_round_that_panics_costs_only_its_own_calls() {
        let round: Round<u32, u32> = Box::new(|items| {
            Box::pin(async move {
                settle().await;
                assert!(!items.contains(&13), "13");
                Ok(items.into_iter().map(|item| Outcome::Done(double(item))).collect())
            })
        });
        let bounds = Bounds { items_max: 1, ..BOUNDS };
        let coalescer = Arc::new(Coalescer::new(bounds, |item| Company::Distinct(*item), round, alone()));
        let calls = start(&coalescer, &[13, 1]).await;
        let mut outcomes = Vec::new();
        for call in calls {
            outcomes.push(call.await.unwrap().map_err(|error| error.code()));
        }
        assert_eq!(outcomes, [Err(tonic::Code::Internal), Ok(2)]);
        assert_eq!(coalescer.call(3).await.unwrap(), 6);
    }

    #[tokio::test(start_paused = true)]
    async fn an_item_that_goes_alone_does_not_hold_up_the_rounds_and_ends_with_its_caller() {
        let finished = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&finished);
        let round: Round<u32, u32> = Box::new(|items| {
            let outcome = |item| if item == 15 { Outcome::Alone } else { Outcome::Done(double(item)) };
            Box::pin(async move { Ok(items.into_iter().map(outcome).collect()) })
        });
        let slow: Alone<u32, u32> = Box::new(move |item| {
            let counted = Arc::clone(&counted);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(60)).await;
                counted.fetch_add(1, Ordering::Relaxed);
                double(item)
            })
        });
        let coalescer = Arc::new(Coalescer::new(BOUNDS, |item| Company::Distinct(*item), round, slow));
        let calls = start(&coalescer, &[15, 15]).await;
        assert_eq!(coalescer.call(1).await.unwrap(), 2);
        calls[0].abort();
        let mut outcomes = Vec::new();
        for call in calls {
            outcomes.push(call.await.ok().map(|outcome| outcome.unwrap()));
        }
        assert_eq!(outcomes, [None, Some(30)]);
        assert_eq!(finished.load(Ordering::Relaxed), 1);
    }

    proptest! {
        #[test]
        fn any_mix_gives_what_each_would_have_given_alone(
            items in prop::collection::vec(prop_oneof![4 => 0_u32..12, 1 => 13_u32..16], 0..40),
            items_max in 1_usize..8,
            rounds_max in 1_usize..4,
            by_caller: bool,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let bounds = Bounds { items_max, rounds_max, waiting_max: 100, by_caller };
                let coalescer = Arc::new(doubler(bounds, Arc::new(Semaphore::new(1_000)), Arc::default()));
                let calls: Vec<_> = items
                    .iter()
                    .map(|item| {
                        let (coalescer, item) = (Arc::clone(&coalescer), *item);
                        tokio::spawn(async move { coalescer.call(item).await })
                    })
                    .collect();
                for (call, item) in calls.into_iter().zip(&items) {
                    let wanted = if *item == 13 { Err(Error::invalid("item", "13")) } else { double(*item) };
                    assert_eq!(shown(&call.await.unwrap()), shown(&wanted));
                }
            });
        }
    }
}
