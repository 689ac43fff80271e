//! Tests of shared reads.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use super::*;

const READ: Duration = Duration::from_secs(1);

/// Returns the number of the read, after a second. Key 13 panics, key 14 fails.
fn counting() -> (Arc<AtomicUsize>, Arc<SharedReads<u32, usize>>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let reads = SharedReads::new(Box::new(move |key| {
        let nth = counter.fetch_add(1, Ordering::SeqCst) + 1;
        Box::pin(async move {
            tokio::time::sleep(READ).await;
            assert_ne!(key, 13, "a read panics");
            if key == 14 { Err(Error::Unavailable) } else { Ok(nth) }
        })
    }));
    (count, Arc::new(reads))
}

fn spawn(reads: &Arc<SharedReads<u32, usize>>, key: u32) -> tokio::task::JoinHandle<Result<usize>> {
    let reads = Arc::clone(reads);
    tokio::spawn(async move { reads.read(key).await })
}

#[tokio::test(start_paused = true)]
async fn callers_during_a_read_share_the_next_and_never_the_one_in_flight() {
    let (count, reads) = counting();
    let first = spawn(&reads, 1);
    tokio::time::sleep(READ / 2).await;
    let later: Vec<_> = (0..10).map(|_| spawn(&reads, 1)).collect();
    assert_eq!(first.await.unwrap().unwrap(), 1);
    for caller in later {
        assert_eq!(caller.await.unwrap().unwrap(), 2);
    }
    assert_eq!(count.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn different_keys_do_not_wait_for_each_other() {
    let (_, reads) = counting();
    let started = tokio::time::Instant::now();
    let callers: Vec<_> = (20..30).map(|key| spawn(&reads, key)).collect();
    for caller in callers {
        caller.await.unwrap().unwrap();
    }
    assert_eq!(started.elapsed(), READ);
}

#[tokio::test(start_paused = true)]
async fn cancelled_caller_does_not_cancel_others() {
    let (_, reads) = counting();
    let first = spawn(&reads, 1);
    tokio::time::sleep(READ / 2).await;
    let (gone, second) = (spawn(&reads, 1), spawn(&reads, 1));
    tokio::task::yield_now().await;
    first.abort();
    gone.abort();
    assert_eq!(second.await.unwrap().unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn no_read_starts_without_callers_and_nothing_is_kept() {
    let (count, reads) = counting();
    let first = spawn(&reads, 1);
    tokio::time::sleep(READ / 2).await;
    let gone = spawn(&reads, 1);
    tokio::task::yield_now().await;
    gone.abort();
    assert_eq!(first.await.unwrap().unwrap(), 1);
    tokio::time::sleep(READ * 3).await;
    assert_eq!(count.load(Ordering::SeqCst), 1);
    assert!(reads.inner.lock().is_empty());
}

#[tokio::test(start_paused = true)]
async fn shared_read_is_cancelled_with_its_last_caller() {
    let (_, reads) = counting();
    let first = spawn(&reads, 1);
    tokio::time::sleep(READ / 2).await;
    let shared = [spawn(&reads, 1), spawn(&reads, 1)];
    first.await.unwrap().unwrap();
    tokio::time::sleep(READ / 2).await;
    shared.iter().for_each(tokio::task::JoinHandle::abort);
    tokio::time::sleep(READ / 4).await;
    assert!(reads.inner.lock().is_empty(), "the read is still in flight");
}

#[test]
fn runtime_shutdown_does_not_wait_for_callers() {
    let (_, reads) = counting();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let (_first, _second) = (spawn(&reads, 1), spawn(&reads, 1));
        tokio::time::sleep(READ / 10).await;
    });
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(runtime);
        sender.send(()).unwrap();
    });
    ended.recv_timeout(READ * 10).expect("the runtime has ended");
}

#[tokio::test(start_paused = true)]
async fn error_and_panic_are_returned_and_the_next_read_starts_anew() {
    let (_, reads) = counting();
    for key in [13, 14] {
        let first = spawn(&reads, key);
        tokio::time::sleep(READ / 2).await;
        let second = spawn(&reads, key);
        assert!(!matches!(first.await, Ok(Ok(_))));
        assert!(second.await.unwrap().is_err());
        assert!(reads.inner.lock().is_empty());
    }
}
