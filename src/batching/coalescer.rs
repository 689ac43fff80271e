//! A coalescer: concurrent calls of one kind are executed as a batch.
//!
//! Calls that arrive while a batch is in flight go out together in the next batch, as in DataLoader for reads and in group
//! commit for writes: one statement for many calls costs the database far less than a statement for each. Without load no
//! call waits.

use std::{
    collections::HashSet,
    hash::Hash,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, CatchUnwind, join_all},
};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    fairness::{FairQueue, Flow, Refusal, RefusalCounters, SharePercent},
    metrics::{self, Histogram, ResourceUsage, Timer},
};

/// The part of the waiting calls that may be those of one flow.
const WAITING_SHARE: SharePercent = SharePercent(75);
/// How many waiting calls are looked at for each that a batch may have. The others may all be unable to share the batch, such
/// as changes of the same issue.
const SCANNED_PER_ITEM_MAX: usize = 4;
/// A batch that runs longer than this is cancelled once all its callers have stopped waiting.
const CANCELLABLE_AFTER: Duration = Duration::from_millis(100);

/// Executes the items of a batch, and returns the outcome of each, in order. An error means that no item was executed, or
/// that the outcome is unknown: see [`Error::is_undone`].
pub type RunBatch<I, O> = Box<dyn Fn(Vec<I>) -> BoxFuture<'static, Result<Vec<Outcome<O>>>> + Send + Sync>;

/// Executes one item by itself. May wait for row locks.
pub type RunIndividually<I, O> = Box<dyn Fn(Flow, I) -> BoxFuture<'static, Result<O>> + Send + Sync>;

/// The outcome of an item in a batch.
#[derive(Debug)]
pub enum Outcome<O> {
    Done(Result<O>),
    /// The item was not executed, because the others would have waited for it. It is executed individually.
    Individual,
}

/// Which items may be in the same batch as an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchAffinity<K> {
    Any,
    /// Any but items with the same key.
    Distinct(K),
    /// None: the item is executed individually.
    Individual,
}

/// The bounds of a [`Coalescer`].
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The name of the batches in metrics.
    pub name: &'static str,
    /// Maximum items of a batch.
    pub items_max: usize,
    /// Maximum concurrent batches.
    pub batches_max: usize,
    /// Maximum items that wait for a batch. Excess calls fail with `Exhausted`.
    pub waiting_max: usize,
    /// Whether a call that finds no batch in flight runs in the task of its caller. This saves a task.
    pub runs_inline: bool,
}

/// Coalesces calls with items `I` and outputs `O`. `K` is the key of [`BatchAffinity::Distinct`].
pub struct Coalescer<I, O, K> {
    inner: Arc<Inner<I, O, K>>,
}

struct Inner<I, O, K> {
    affinity: fn(&I) -> BatchAffinity<K>,
    run_batch: RunBatch<I, O>,
    run_individually: RunIndividually<I, O>,
    bounds: Bounds,
    state: Mutex<State<I, O>>,
    batch_metrics: Option<BatchMetrics>,
    refusals: RefusalCounters,
}

struct BatchMetrics {
    size: Histogram,
    duration: Histogram,
}

impl BatchMetrics {
    /// Returns `None` if metrics are not enabled.
    fn of(name: &str) -> Option<Self> {
        let batches = &metrics::get()?.batches;
        Some(Self {
            size: batches.size.with_label_values(&[name]),
            duration: batches.duration.with_label_values(&[name]),
        })
    }
}

struct State<I, O> {
    waiting: FairQueue<PendingCall<I, O>>,
    batches_in_flight: usize,
}

struct PendingCall<I, O> {
    flow: Flow,
    item: I,
    outcome: oneshot::Sender<Result<O>>,
}

impl<I, O, K> Coalescer<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    pub fn new(
        bounds: Bounds,
        affinity: fn(&I) -> BatchAffinity<K>,
        run_batch: RunBatch<I, O>,
        run_individually: RunIndividually<I, O>,
    ) -> Self {
        let state = Mutex::new(State { waiting: FairQueue::default(), batches_in_flight: 0 });
        let queue = format!("{} queue", bounds.name);
        let inner = Arc::new(Inner {
            affinity,
            run_batch,
            run_individually,
            bounds,
            state,
            batch_metrics: BatchMetrics::of(bounds.name),
            refusals: RefusalCounters::new(&queue),
        });
        if let Some(metrics) = metrics::get() {
            let observed = Arc::downgrade(&inner);
            metrics.resources.observe(&queue, u32::try_from(bounds.waiting_max).unwrap_or(u32::MAX), move || {
                let in_use = u32::try_from(observed.upgrade()?.lock().waiting.len()).unwrap_or(u32::MAX);
                // No call waits for a place in the queue.
                Some(ResourceUsage { in_use, waiting: 0 })
            });
        }
        Self { inner }
    }

    /// Executes the item in the next batch that has room for it. If the future is dropped before that batch starts, the
    /// item is not executed. The flows that wait take turns.
    pub async fn call(&self, flow: Flow, item: I) -> Result<O> {
        if (self.inner.affinity)(&item) == BatchAffinity::Individual {
            return (self.inner.run_individually)(flow, item).await;
        }
        match self.enqueue(flow, item)? {
            Enqueued::Inline(item) => InlineBatch::run(Arc::clone(&self.inner), flow, item).await,
            Enqueued::Waiting(outcome) => {
                outcome.await.map_err(|_| Error::Internal("a batch ended without an outcome"))?
            }
        }
    }

    fn enqueue(&self, flow: Flow, item: I) -> Result<Enqueued<I, O>> {
        let mut state = self.inner.lock();
        let is_free = state.batches_in_flight < self.inner.bounds.batches_max;
        if is_free && state.waiting.is_empty() && self.inner.bounds.runs_inline {
            state.batches_in_flight += 1;
            return Ok(Enqueued::Inline(item));
        }
        let waiting_max = self.inner.bounds.waiting_max;
        let share = WAITING_SHARE.of(u32::try_from(waiting_max).unwrap_or(u32::MAX)) as usize;
        let has_used_up_share = flow != Flow::Internal && state.waiting.len_of(flow) >= share;
        if state.waiting.len() >= waiting_max || has_used_up_share {
            self.inner.refusals.count(if has_used_up_share { Refusal::Share } else { Refusal::Total });
            return Err(Error::Exhausted(format!(
                "too many calls of this kind wait (limit {waiting_max}, for one caller {share})"
            )));
        }
        let (sender, outcome) = oneshot::channel();
        state.waiting.push_back(flow, PendingCall { flow, item, outcome: sender });
        if is_free {
            state.batches_in_flight += 1;
            tokio::spawn(Arc::clone(&self.inner).run_batches());
        }
        Ok(Enqueued::Waiting(outcome))
    }
}

/// Where a call is executed.
enum Enqueued<I, O> {
    /// In the task of its caller. Counts as a batch in flight.
    Inline(I),
    /// In a batch with other calls.
    Waiting(oneshot::Receiver<Result<O>>),
}

/// A batch of one call in the task of its caller: see [`Bounds::runs_inline`]. When it has ended, the calls that have arrived
/// meanwhile are executed next.
struct InlineBatch<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    inner: Arc<Inner<I, O, K>>,
    /// `None` when it has ended. With the timer of its duration.
    running: Option<(BatchInFlight<O>, Timer)>,
}

type BatchInFlight<O> = CatchUnwind<AssertUnwindSafe<BoxFuture<'static, Result<Vec<Outcome<O>>>>>>;

impl<I, O, K> InlineBatch<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    async fn run(inner: Arc<Inner<I, O, K>>, flow: Flow, item: I) -> Result<O> {
        let timer = inner.begin_batch(1);
        let running = AssertUnwindSafe((inner.run_batch)(vec![item.clone()])).catch_unwind();
        let mut batch = Self { inner: Arc::clone(&inner), running: Some((running, timer)) };
        let outcomes = match &mut batch.running {
            Some((running, _)) => running.await,
            None => return Err(Error::Internal("a batch has no future")),
        };
        batch.running = None;
        drop(batch);
        match outcomes.unwrap_or(Err(Error::Internal("a batch panicked"))).map(|mut outcomes| outcomes.pop()) {
            Ok(Some(Outcome::Done(outcome))) => outcome,
            Ok(Some(Outcome::Individual)) => {
                metrics::count(|metrics| &metrics.retries.batch_left);
                (inner.run_individually)(flow, item).await
            }
            Ok(None) => Err(Error::Internal("a batch ended without an outcome")),
            Err(error) if error.is_undone() => {
                metrics::count(|metrics| &metrics.retries.batch_failed);
                (inner.run_individually)(flow, item).await
            }
            Err(error) => Err(error),
        }
    }
}

impl<I, O, K> Drop for InlineBatch<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    fn drop(&mut self) {
        if self.running.is_none() {
            let mut state = self.inner.lock();
            if state.waiting.is_empty() {
                state.batches_in_flight -= 1;
                return;
            }
        }
        // Without a runtime the process is ending, and no caller waits.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (inner, running) = (Arc::clone(&self.inner), self.running.take());
        runtime.spawn(async move {
            // The caller has stopped waiting. The batch counts as in flight until it has ended, so that calls with short
            // deadlines do not run more batches than may be in flight.
            if let Some((running, _timer)) = running {
                let _ = tokio::time::timeout(CANCELLABLE_AFTER, running).await;
            }
            inner.run_batches().await;
        });
    }
}

impl<I, O, K> Inner<I, O, K> {
    fn lock(&self) -> MutexGuard<'_, State<I, O>> {
        // A panic of another holder leaves the state valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records the size of a batch. Returns the timer of its duration.
    fn begin_batch(&self, size: usize) -> Timer {
        let metrics = self.batch_metrics.as_ref();
        metrics.iter().for_each(|metrics| metrics.size.observe(size as f64));
        Timer::start(metrics.map(|metrics| metrics.duration.clone()))
    }
}

impl<I, O, K> Inner<I, O, K>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
    K: Copy + Eq + Hash + Send + 'static,
{
    /// Runs one batch after the other until no call waits.
    async fn run_batches(self: Arc<Self>) {
        while let Some(calls) = self.next_batch() {
            self.run(calls).await;
        }
    }

    /// Returns the calls of the next batch, without those whose callers have stopped waiting. `None` if no call waits:
    /// then one batch less is in flight.
    fn next_batch(&self) -> Option<Vec<PendingCall<I, O>>> {
        let mut state = self.lock();
        let mut calls = Vec::new();
        let mut keys = HashSet::new();
        let mut later = Vec::new();
        while calls.len() < self.bounds.items_max
            && calls.len() + later.len() < SCANNED_PER_ITEM_MAX * self.bounds.items_max
        {
            let Some(call) = state.waiting.pop_front() else { break };
            if call.outcome.is_closed() {
                continue;
            }
            match (self.affinity)(&call.item) {
                BatchAffinity::Distinct(key) if !keys.insert(key) => later.push((call.flow, call)),
                _ => calls.push(call),
            }
        }
        state.waiting.put_back(later);
        if calls.is_empty() {
            state.batches_in_flight -= 1;
            return None;
        }
        Some(calls)
    }

    async fn run(self: &Arc<Self>, mut calls: Vec<PendingCall<I, O>>) {
        let items: Vec<I> = calls.iter().map(|call| call.item.clone()).collect();
        let outcomes = tokio::select! {
            biased;
            outcomes = self.outcomes(items) => outcomes,
            () = all_callers_gone(&mut calls) => return,
        };
        match outcomes {
            Ok(outcomes) => {
                for (call, outcome) in calls.into_iter().zip(outcomes) {
                    match outcome {
                        // Sending fails if the caller has stopped waiting.
                        Outcome::Done(outcome) => drop(call.outcome.send(outcome)),
                        Outcome::Individual => {
                            metrics::count(|metrics| &metrics.retries.batch_left);
                            self.spawn_individually(call);
                        }
                    }
                }
            }
            // One item made the whole batch fail: each is executed individually.
            Err(error) if error.is_undone() => {
                metrics::count_by(|metrics| &metrics.retries.batch_failed, calls.len() as u64);
                calls.into_iter().for_each(|call| self.spawn_individually(call));
            }
            Err(error) => {
                for call in calls {
                    let _ = call.outcome.send(Err(error.clone()));
                }
            }
        }
    }

    /// Executes a call in a task of its own, which is cancelled when the caller stops waiting.
    fn spawn_individually(self: &Arc<Self>, mut call: PendingCall<I, O>) {
        let running = (self.run_individually)(call.flow, call.item);
        tokio::spawn(async move {
            let outcome = tokio::select! {
                outcome = running => outcome,
                () = call.outcome.closed() => return,
            };
            let _ = call.outcome.send(outcome);
        });
    }

    /// Runs a batch. A panic fails this batch only.
    async fn outcomes(&self, items: Vec<I>) -> Result<Vec<Outcome<O>>> {
        let _timer = self.begin_batch(items.len());
        let batch = AssertUnwindSafe(async { (self.run_batch)(items).await });
        batch.catch_unwind().await.unwrap_or(Err(Error::Internal("a batch panicked")))
    }
}

/// Waits until all callers of a batch have stopped waiting, but at least [`CANCELLABLE_AFTER`].
async fn all_callers_gone<I, O>(calls: &mut [PendingCall<I, O>]) {
    // Most batches end before, and never watch their callers.
    tokio::time::sleep(CANCELLABLE_AFTER).await;
    join_all(calls.iter_mut().map(|call| call.outcome.closed())).await;
}

#[cfg(test)]
mod tests;
