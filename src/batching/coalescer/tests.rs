//! Tests of the coalescer.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use proptest::prelude::*;
use tokio::sync::Semaphore;

use super::*;

const BOUNDS: Bounds = Bounds { name: "test", items_max: 4, batches_max: 1, waiting_max: 100, runs_inline: true };

/// Doubles numbers. 13 fails the whole batch, 14 fails alone, 15 is executed individually. Each batch takes a permit.
fn doubler(bounds: Bounds, permits: Arc<Semaphore>, batches: Arc<Mutex<Vec<Vec<u32>>>>) -> Coalescer<u32, u32, u32> {
    let batch: RunBatch<u32, u32> = Box::new(move |items| {
        let (permits, batches) = (Arc::clone(&permits), Arc::clone(&batches));
        Box::pin(async move {
            permits.acquire().await.unwrap().forget();
            batches.lock().unwrap().push(items.clone());
            if items.contains(&13) {
                return Err(Error::invalid("item", "13"));
            }
            let outcome = |item| if item == 15 { Outcome::Individual } else { Outcome::Done(double(item)) };
            Ok(items.into_iter().map(outcome).collect())
        })
    });
    Coalescer::new(bounds, |item| BatchAffinity::Distinct(*item), batch, individually())
}

fn individually() -> RunIndividually<u32, u32> {
    Box::new(|_, item| {
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
async fn start(coalescer: &Arc<Coalescer<u32, u32, u32>>, items: &[u32]) -> Vec<tokio::task::JoinHandle<Result<u32>>> {
    let mut calls = Vec::new();
    for item in items.iter().copied() {
        let coalescer = Arc::clone(coalescer);
        calls.push(tokio::spawn(async move { coalescer.call(Flow::Internal, item).await }));
        settle().await;
    }
    calls
}

#[tokio::test(start_paused = true)]
async fn call_without_load_is_a_batch_of_its_own() {
    let batches = Arc::default();
    let coalescer = doubler(BOUNDS, Arc::new(Semaphore::new(100)), Arc::clone(&batches));
    assert_eq!(coalescer.call(Flow::Internal, 1).await.unwrap(), 2);
    assert_eq!(coalescer.call(Flow::Internal, 2).await.unwrap(), 4);
    assert_eq!(*batches.lock().unwrap(), [[1], [2]]);
}

#[tokio::test(start_paused = true)]
async fn calls_during_a_batch_go_out_in_the_next_up_to_the_bound() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let calls = start(&coalescer, &[1, 2, 3, 4, 5, 6, 7]).await;
    permits.add_permits(100);
    for (call, wanted) in calls.into_iter().zip([2, 4, 6, 8, 10, 12, 14]) {
        assert_eq!(call.await.unwrap().unwrap(), wanted);
    }
    assert_eq!(*batches.lock().unwrap(), [vec![1], vec![2, 3, 4, 5], vec![6, 7]]);
}

#[tokio::test(start_paused = true)]
async fn items_with_the_same_key_are_in_different_batches_in_order() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let calls = start(&coalescer, &[1, 2, 2, 3, 2]).await;
    permits.add_permits(100);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(*batches.lock().unwrap(), [vec![1], vec![2, 3], vec![2], vec![2]]);
}

#[tokio::test(start_paused = true)]
async fn call_whose_caller_has_gone_is_not_executed() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let calls = start(&coalescer, &[1, 2, 3]).await;
    calls[1].abort();
    settle().await;
    permits.add_permits(100);
    for call in calls {
        drop(call.await);
    }
    assert_eq!(*batches.lock().unwrap(), [[1], [3]]);
}

#[tokio::test(start_paused = true)]
async fn abandoned_inline_batch_keeps_its_place_until_it_has_ended() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let mut calls = start(&coalescer, &[1, 2]).await;
    calls[0].abort();
    settle().await;
    assert_eq!(coalescer.inner.lock().batches_in_flight, 1);
    permits.add_permits(100);
    assert_eq!(calls.pop().unwrap().await.unwrap().unwrap(), 4);
    assert_eq!(coalescer.call(Flow::Internal, 3).await.unwrap(), 6);
    assert_eq!(*batches.lock().unwrap(), [[1], [2], [3]]);
}

#[tokio::test(start_paused = true)]
async fn abandoned_inline_batch_that_hangs_is_cancelled() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let calls = start(&coalescer, &[1, 2]).await;
    calls[0].abort();
    tokio::time::sleep(2 * CANCELLABLE_AFTER).await;
    permits.add_permits(100);
    for call in calls {
        drop(call.await);
    }
    assert_eq!(*batches.lock().unwrap(), [[2]]);
}

#[tokio::test(start_paused = true)]
async fn spawned_batch_outlives_its_caller_until_it_is_cancellable() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let bounds = Bounds { runs_inline: false, ..BOUNDS };
    let coalescer = Arc::new(doubler(bounds, Arc::clone(&permits), Arc::clone(&batches)));
    start(&coalescer, &[1]).await[0].abort();
    settle().await;
    permits.add_permits(1);
    settle().await;
    assert_eq!(*batches.lock().unwrap(), [[1]]);

    start(&coalescer, &[2]).await[0].abort();
    tokio::time::sleep(2 * CANCELLABLE_AFTER).await;
    permits.add_permits(1);
    assert_eq!(coalescer.call(Flow::Internal, 3).await.unwrap(), 6);
    assert_eq!(*batches.lock().unwrap(), [[1], [3]]);
}

#[tokio::test(start_paused = true)]
async fn batch_is_cancelled_when_its_last_caller_has_gone() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let coalescer = Arc::new(doubler(BOUNDS, Arc::clone(&permits), Arc::clone(&batches)));
    let first = start(&coalescer, &[1]).await;
    let together = start(&coalescer, &[2, 3]).await;
    permits.add_permits(1);
    for call in first {
        call.await.unwrap().unwrap();
    }
    together[0].abort();
    tokio::time::sleep(2 * CANCELLABLE_AFTER).await;
    assert!(!together[1].is_finished());
    together[1].abort();
    tokio::time::sleep(2 * CANCELLABLE_AFTER).await;
    let next = start(&coalescer, &[4]).await;
    permits.add_permits(1);
    for call in next {
        assert_eq!(call.await.unwrap().unwrap(), 8);
    }
    assert_eq!(*batches.lock().unwrap(), [[1], [4]]);
}

#[tokio::test(start_paused = true)]
async fn excess_calls_fail_at_once() {
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let bounds = Bounds { waiting_max: 2, ..BOUNDS };
    let coalescer = Arc::new(doubler(bounds, Arc::clone(&permits), batches));
    let _calls = start(&coalescer, &[1, 2, 3]).await;
    assert!(matches!(coalescer.call(Flow::Internal, 4).await, Err(Error::Exhausted(_))));
}

#[tokio::test(start_paused = true)]
async fn waiting_flows_take_turns_and_none_uses_up_the_queue() {
    let [one, two] = [1, 2].map(|id| Flow::User(uuid::Uuid::from_u128(id)));
    let (permits, batches) = (Arc::new(Semaphore::new(0)), Arc::default());
    let bounds = Bounds { items_max: 2, waiting_max: 4, ..BOUNDS };
    let coalescer = Arc::new(doubler(bounds, Arc::clone(&permits), Arc::clone(&batches)));
    let mut calls = start(&coalescer, &[0]).await;
    for (flow, item) in [(one, 1), (one, 2), (one, 3), (two, 4)] {
        let caller = Arc::clone(&coalescer);
        calls.push(tokio::spawn(async move { caller.call(flow, item).await }));
        settle().await;
        if item == 3 {
            assert!(matches!(coalescer.call(one, 9).await, Err(Error::Exhausted(_))), "the share is three");
        }
    }
    permits.add_permits(3);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(*batches.lock().unwrap(), [vec![0], vec![1, 4], vec![2, 3]]);
}

#[tokio::test(start_paused = true)]
async fn batch_looks_at_a_few_times_its_size_of_waiting_calls() {
    static LOOKED_AT: AtomicUsize = AtomicUsize::new(0);
    let batch: RunBatch<u32, u32> = Box::new(|items| {
        Box::pin(async move {
            settle().await;
            Ok(items.into_iter().map(|item| Outcome::Done(double(item))).collect())
        })
    });
    let affinity = |item: &u32| {
        LOOKED_AT.fetch_add(1, Ordering::Relaxed);
        BatchAffinity::Distinct(*item)
    };
    let coalescer = Arc::new(Coalescer::new(BOUNDS, affinity, batch, individually()));
    let calls: Vec<_> = (0..80)
        .map(|_| {
            let coalescer = Arc::clone(&coalescer);
            tokio::spawn(async move { coalescer.call(Flow::Internal, 7).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap(), 14);
    }
    // Once for each call when it arrives, and then for each batch, which has one.
    let looked_at = LOOKED_AT.load(Ordering::Relaxed);
    assert!(looked_at <= 80 + 80 * SCANNED_PER_ITEM_MAX * BOUNDS.items_max, "{looked_at}");
}

#[tokio::test(start_paused = true)]
async fn batch_with_an_unknown_outcome_is_not_repeated() {
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let batch: RunBatch<u32, u32> = Box::new(move |_| {
        let nth = counted.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if nth == 0 { Ok(vec![Outcome::Done(Ok(0))]) } else { Err(Error::Unavailable) }
        })
    });
    let coalescer = Arc::new(Coalescer::new(BOUNDS, |item| BatchAffinity::Distinct(*item), batch, individually()));
    let calls = start(&coalescer, &[1, 2, 3]).await;
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap().map_err(|error| error.code()));
    }
    assert_eq!(outcomes, [Ok(0), Err(tonic::Code::Unavailable), Err(tonic::Code::Unavailable)]);
    assert_eq!(runs.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn panicking_batch_fails_only_its_own_calls() {
    let batch: RunBatch<u32, u32> = Box::new(|items| {
        Box::pin(async move {
            settle().await;
            assert!(!items.contains(&13), "13");
            Ok(items.into_iter().map(|item| Outcome::Done(double(item))).collect())
        })
    });
    let bounds = Bounds { items_max: 1, ..BOUNDS };
    let coalescer = Arc::new(Coalescer::new(bounds, |item| BatchAffinity::Distinct(*item), batch, individually()));
    let calls = start(&coalescer, &[13, 1]).await;
    let mut outcomes = Vec::new();
    for call in calls {
        outcomes.push(call.await.unwrap().map_err(|error| error.code()));
    }
    assert_eq!(outcomes, [Err(tonic::Code::Internal), Ok(2)]);
    assert_eq!(coalescer.call(Flow::Internal, 3).await.unwrap(), 6);
}

#[tokio::test(start_paused = true)]
async fn individual_call_does_not_delay_batches_and_is_cancelled_with_its_caller() {
    let finished = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&finished);
    let batch: RunBatch<u32, u32> = Box::new(|items| {
        let outcome = |item| if item == 15 { Outcome::Individual } else { Outcome::Done(double(item)) };
        Box::pin(async move { Ok(items.into_iter().map(outcome).collect()) })
    });
    let slow: RunIndividually<u32, u32> = Box::new(move |_, item| {
        let counted = Arc::clone(&counted);
        Box::pin(async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            counted.fetch_add(1, Ordering::Relaxed);
            double(item)
        })
    });
    let coalescer = Arc::new(Coalescer::new(BOUNDS, |item| BatchAffinity::Distinct(*item), batch, slow));
    let calls = start(&coalescer, &[15, 15]).await;
    assert_eq!(coalescer.call(Flow::Internal, 1).await.unwrap(), 2);
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
    fn any_mix_returns_what_each_call_returns_individually(
        items in prop::collection::vec(prop_oneof![4 => 0_u32..12, 1 => 13_u32..16], 0..40),
        items_max in 1_usize..8,
        batches_max in 1_usize..4,
        runs_inline: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let bounds = Bounds { name: "test", items_max, batches_max, waiting_max: 100, runs_inline };
            let coalescer = Arc::new(doubler(bounds, Arc::new(Semaphore::new(1_000)), Arc::default()));
            let calls: Vec<_> = items
                .iter()
                .map(|item| {
                    let (coalescer, item) = (Arc::clone(&coalescer), *item);
                    tokio::spawn(async move { coalescer.call(Flow::Internal, item).await })
                })
                .collect();
            for (call, item) in calls.into_iter().zip(&items) {
                let wanted = if *item == 13 { Err(Error::invalid("item", "13")) } else { double(*item) };
                assert_eq!(shown(&call.await.unwrap()), shown(&wanted));
            }
        });
    }
}
