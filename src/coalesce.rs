//! Concurrent calls of one kind, done together: what arrives while a round is under way goes out in the next one.
//!
//! The idea is DataLoader's for reads and group commit's for writes: one statement for many calls costs the database far
//! less than a statement for each. Without load nothing waits: a call that finds a free round begins it at once.

use std::{
    collections::{HashSet, VecDeque},
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// Does the items of a round, and answers an outcome for each, in order. An error means that nothing was done for any
/// of them, or that it is not known: see [`Error::is_undone`].
pub type Round<I, O> = Box<dyn Fn(Vec<I>) -> BoxFuture<'static, Result<Vec<Result<O>>>> + Send + Sync>;

/// The bounds of a [`Coalescer`].
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Items of one round.
    pub items_max: usize,
    /// Rounds under way at once.
    pub rounds_max: usize,
    /// Items that wait for a round; more are told that it is too much.
    pub waiting_max: usize,
}

/// Puts calls together. Cheap to clone.
pub struct Coalescer<I, O, K> {
    shared: Arc<Shared<I, O, K>>,
}

struct Shared<I, O, K> {
    round: Round<I, O>,
    /// Items with the same key are never in one round, and keep their order.
    key: fn(&I) -> Option<K>,
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
    pub fn new(bounds: Bounds, key: fn(&I) -> Option<K>, round: Round<I, O>) -> Self {
        let queue = Mutex::new(Queue { waiting: VecDeque::new(), rounds: 0 });
        Self { shared: Arc::new(Shared { round, key, bounds, queue }) }
    }

    /// Does the item in the next round that has room for it. Dropped before the round begins, it is not done.
    pub async fn call(&self, item: I) -> Result<O> {
        let (caller, outcome) = oneshot::channel();
        let begins_round = {
            let mut queue = self.shared.lock();
            if queue.waiting.len() >= self.shared.bounds.waiting_max {
                return Err(Error::Exhausted(format!("{} calls of this kind wait already", queue.waiting.len())));
            }
            queue.waiting.push_back(Call { item, caller });
            let free = queue.rounds < self.shared.bounds.rounds_max;
            queue.rounds += usize::from(free);
            free
        };
        if begins_round {
            tokio::spawn(Arc::clone(&self.shared).rounds());
        }
        outcome.await.map_err(|_| Error::Internal("a round ended without an outcome"))?
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
            match (self.key)(&call.item) {
                Some(key) if !keys.insert(key) => later.push_back(call),
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

    async fn run(&self, calls: Vec<Call<I, O>>) {
        let (items, callers): (Vec<I>, Vec<_>) = calls.into_iter().map(|call| (call.item, call.caller)).unzip();
        let alone = if items.len() > 1 { items.clone() } else { Vec::new() };
        match self.outcomes(items).await {
            Ok(outcomes) => {
                for (caller, outcome) in callers.into_iter().zip(outcomes) {
                    // A caller that has gone away does not want it.
                    let _ = caller.send(outcome);
                }
            }
            // One of them has made it fail for all: each has its own try.
            Err(error) if error.is_undone() && !alone.is_empty() => {
                for (caller, item) in callers.into_iter().zip(alone) {
                    let outcome = self.outcomes(vec![item]).await.and_then(|mut outcomes| {
                        outcomes.pop().unwrap_or(Err(Error::Internal("a round of one gave no outcome")))
                    });
                    let _ = caller.send(outcome);
                }
            }
            Err(error) => {
                for caller in callers {
                    let _ = caller.send(Err(error.clone()));
                }
            }
        }
    }

    /// A panic costs the round, not those that follow.
    async fn outcomes(&self, items: Vec<I>) -> Result<Vec<Result<O>>> {
        let round = AssertUnwindSafe(async { (self.round)(items).await });
        round.catch_unwind().await.unwrap_or(Err(Error::Internal("a round panicked")))
    }
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

    const BOUNDS: Bounds = Bounds { items_max: 4, rounds_max: 1, waiting_max: 100 };

    /// Doubles numbers. 13 makes its whole round fail, 14 has a failure of its own; a round waits for a permit.
    fn doubler(bounds: Bounds, gate: Arc<Semaphore>, rounds: Arc<Mutex<Vec<Vec<u32>>>>) -> Coalescer<u32, u32, u32> {
        let round: Round<u32, u32> = Box::new(move |items| {
            let (gate, rounds) = (Arc::clone(&gate), Arc::clone(&rounds));
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                rounds.lock().unwrap().push(items.clone());
                if items.contains(&13) {
                    return Err(Error::invalid("item", "13"));
                }
                Ok(items.into_iter().map(double).collect())
            })
        });
        Coalescer::new(bounds, |item| Some(*item), round)
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
                if nth == 0 { Ok(vec![Ok(0)]) } else { Err(Error::Unavailable) }
            })
        });
        let coalescer = Arc::new(Coalescer::new(BOUNDS, |item| Some(*item), round));
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
                Ok(items.into_iter().map(double).collect())
            })
        });
        let coalescer = Arc::new(Coalescer::new(Bounds { items_max: 1, ..BOUNDS }, |item| Some(*item), round));
        let calls = start(&coalescer, &[13, 1]).await;
        let mut outcomes = Vec::new();
        for call in calls {
            outcomes.push(call.await.unwrap().map_err(|error| error.code()));
        }
        assert_eq!(outcomes, [Err(tonic::Code::Internal), Ok(2)]);
        assert_eq!(coalescer.call(3).await.unwrap(), 6);
    }

    proptest! {
        #[test]
        fn any_mix_gives_what_each_would_have_given_alone(
            items in prop::collection::vec(prop_oneof![4 => 0_u32..12, 1 => 13_u32..15], 0..40),
            items_max in 1_usize..8,
            rounds_max in 1_usize..4,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let bounds = Bounds { items_max, rounds_max, waiting_max: 100 };
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
