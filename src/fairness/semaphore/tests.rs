use std::{future::Future, pin::Pin};

use futures_util::FutureExt;
use tokio::time::advance;
use uuid::Uuid;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const SHARE: SharePercent = SharePercent(75);

fn user(id: u128) -> Flow {
    Flow::User(Uuid::from_u128(id))
}

type Acquiring = Pin<Box<dyn Future<Output = Result<FairPermit, Refusal>> + Send>>;

/// Begins to wait for a permit. Fails if it is granted or refused immediately.
fn wait(semaphore: &FairSemaphore, flow: Flow) -> Acquiring {
    let semaphore = semaphore.clone();
    let mut waiting: Acquiring = Box::pin(async move { semaphore.acquire(flow, 2 * SECOND).await });
    assert!((&mut waiting).now_or_never().is_none(), "{flow:?} does not wait");
    waiting
}

fn refusal(semaphore: &FairSemaphore, flow: Flow) -> Option<Refusal> {
    let waiting = semaphore.acquire(flow, 2 * SECOND).now_or_never()?;
    waiting.err()
}

#[tokio::test(start_paused = true)]
async fn permits_can_be_given_back_one_by_one() {
    let semaphore = FairSemaphore::new("permits", 4, SHARE);
    let mut held = semaphore.try_acquire(user(1), 2).unwrap();
    held.merge(semaphore.try_acquire(user(1), 1).unwrap());
    let _last = semaphore.try_acquire(user(2), 1).unwrap();
    let mut waiting = wait(&semaphore, user(3));
    held.give_back(1);
    let _granted = (&mut waiting).now_or_never().expect("a permit is free").unwrap();
    assert_eq!((held.count(), semaphore.has_free()), (2, false));
    held.give_back(3);
    assert_eq!((held.count(), semaphore.inner.lock().free), (0, 2));
    drop(held);
    assert_eq!(semaphore.inner.lock().free, 2);
}

#[tokio::test(start_paused = true)]
async fn one_flow_holds_no_more_than_its_share_even_if_no_flow_waits() {
    let semaphore = FairSemaphore::new("permits", 4, SHARE);
    let held: Vec<_> = (0..3).map(|_| semaphore.try_acquire(user(1), 1).unwrap()).collect();
    assert_eq!(semaphore.try_acquire(user(1), 1).unwrap_err(), Refusal::Share);
    let other = semaphore.try_acquire(user(2), 1).unwrap();
    assert_eq!(semaphore.try_acquire(user(3), 1).unwrap_err(), Refusal::Total);
    assert!(!semaphore.has_free());
    drop(held);
    assert_eq!(semaphore.try_acquire(user(2), 3).unwrap_err(), Refusal::Share);
    drop((other, semaphore.try_acquire(user(2), 2).unwrap()));
    assert_eq!(semaphore.inner.lock().free, 4);
    assert!(semaphore.inner.lock().held.is_empty());
}

#[tokio::test(start_paused = true)]
async fn internal_work_leaves_one_permit_and_is_served_first() {
    let semaphore = FairSemaphore::new("permits", 3, SHARE);
    let _internal = semaphore.try_acquire(Flow::Internal, 1).unwrap();
    let last = semaphore.try_acquire(Flow::Internal, 1).unwrap();
    assert_eq!(semaphore.try_acquire(Flow::Internal, 1).unwrap_err(), Refusal::Share);
    let _of_user = semaphore.try_acquire(user(2), 1).unwrap();
    let mut of_user = wait(&semaphore, user(1));
    let mut internal = wait(&semaphore, Flow::Internal);
    drop(last);
    assert!((&mut of_user).now_or_never().is_none());
    assert!((&mut internal).now_or_never().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn free_permit_goes_to_the_waiting_flow_that_holds_fewest() {
    let semaphore = FairSemaphore::new("permits", 4, SHARE);
    let mut held: Vec<_> = (0..3).map(|_| semaphore.try_acquire(user(1), 1).unwrap()).collect();
    let of_two = semaphore.try_acquire(user(2), 1).unwrap();
    let mut first = [wait(&semaphore, user(1)), wait(&semaphore, user(1))];
    let mut second = wait(&semaphore, user(2));
    let mut third = wait(&semaphore, user(3));
    drop(held.pop());
    assert!((&mut first[0]).now_or_never().is_none() && (&mut second).now_or_never().is_none());
    let third = (&mut third).now_or_never().expect("the third flow holds none").unwrap();
    drop(held.pop());
    // Both hold one: the flow that began to wait first.
    let _first = (&mut first[0]).now_or_never().expect("the first flow has waited longest").unwrap();
    drop(third);
    let _second = (&mut second).now_or_never().expect("the second flow holds one, the first two").unwrap();
    drop(of_two);
    assert!((&mut first[1]).now_or_never().is_some());
}

#[tokio::test(start_paused = true)]
async fn flow_that_has_used_up_its_share_waits_while_permits_are_free() {
    let semaphore = FairSemaphore::new("permits", 4, SHARE);
    let mut held: Vec<_> = (0..3).map(|_| semaphore.try_acquire(user(1), 1).unwrap()).collect();
    let mut waiting = wait(&semaphore, user(1));
    assert!(semaphore.has_free());
    drop(held.pop());
    held.push((&mut waiting).now_or_never().unwrap().unwrap());
    // The reason is logged.
    assert_eq!(semaphore.acquire(user(1), SECOND).await.unwrap_err(), Refusal::Share);
}

#[tokio::test(start_paused = true)]
async fn wait_ends_after_its_maximum_and_leaves_the_queue() {
    let semaphore = FairSemaphore::new("permits", 1, SHARE);
    let held = semaphore.try_acquire(user(1), 1).unwrap();
    let began = Instant::now();
    assert_eq!(semaphore.acquire(user(2), 2 * SECOND).await.unwrap_err(), Refusal::Wait);
    assert_eq!(began.elapsed(), 2 * SECOND);
    assert!(semaphore.inner.lock().waiting.is_empty());
    // A waiter that leaves is skipped.
    let abandoned = wait(&semaphore, user(2));
    let mut next = wait(&semaphore, user(3));
    drop(abandoned);
    drop(held);
    assert!((&mut next).now_or_never().unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn permit_that_was_granted_to_a_waiter_that_left_goes_to_the_next() {
    let semaphore = FairSemaphore::new("permits", 1, SHARE);
    let held = semaphore.try_acquire(user(1), 1).unwrap();
    let granted = wait(&semaphore, user(2));
    let mut next = wait(&semaphore, user(3));
    drop(held);
    // Was granted the permit, and is dropped without having been polled.
    drop(granted);
    assert!((&mut next).now_or_never().unwrap().is_ok());
}

/// A semaphore with one permit, which is held, and the requests of one user that wait for it.
struct Busy {
    semaphore: FairSemaphore,
    held: Option<FairPermit>,
    waiting: VecDeque<Acquiring>,
}

impl Busy {
    fn new(waiting: usize) -> Self {
        let semaphore = FairSemaphore::new("permits", 1, SHARE);
        let held = semaphore.try_acquire(Flow::Internal, 1).ok();
        let waiting = (0..waiting).map(|_| wait(&semaphore, user(1))).collect();
        Self { semaphore, held, waiting }
    }

    /// Passes the permit on to the next request.
    fn serve_next(&mut self) {
        self.held = None;
        let next = self.waiting.pop_front().expect("a request waits");
        self.held = next.now_or_never().expect("the permit is free").ok();
    }
}

#[tokio::test(start_paused = true)]
async fn burst_waits_until_the_queue_stands_still() {
    let busy = Busy::new(1_000);
    advance(STANDSTILL_MIN - SECOND / 1_000).await;
    let _last = wait(&busy.semaphore, user(1));
    advance(SECOND / 1_000).await;
    assert_eq!(refusal(&busy.semaphore, user(1)), Some(Refusal::Wait));
}

#[tokio::test(start_paused = true)]
async fn burst_waits_as_far_as_it_is_served_in_time() {
    let mut busy = Busy::new(200);
    while !busy.waiting.is_empty() {
        advance(SECOND / 1_000).await;
        busy.serve_next();
    }
    let semaphore = busy.semaphore.clone();
    while busy.waiting.len() < 10_000 && refusal(&semaphore, user(1)).is_none() {
        busy.waiting.push_back(wait(&semaphore, user(1)));
    }
    let waiting = busy.waiting.len();
    assert!((1_900..=2_100).contains(&waiting), "{waiting} intervals of a millisecond in two seconds");
    // A waiter that leaves makes room for another.
    drop(busy.waiting.pop_back());
    busy.waiting.push_back(wait(&semaphore, user(1)));
    assert!(refusal(&semaphore, user(1)).is_some());
}

#[tokio::test(start_paused = true)]
async fn first_requests_of_many_flows_wait_as_far_as_they_are_served_in_time() {
    let mut busy = Busy::new(60);
    while !busy.waiting.is_empty() {
        advance(SECOND / 20).await;
        busy.serve_next();
    }
    let semaphore = busy.semaphore.clone();
    let mut refused = 0;
    for id in 2..502 {
        match refusal(&semaphore, user(id)) {
            None => busy.waiting.push_back(wait(&semaphore, user(id))),
            Some(refusal) => {
                assert_eq!(refusal, Refusal::Wait);
                refused += 1;
            }
        }
    }
    let waiting = busy.waiting.len();
    assert!((38..=42).contains(&waiting), "{waiting} intervals of 50 ms in two seconds");
    assert_eq!(waiting + refused, 500);
    while !busy.waiting.is_empty() {
        advance(SECOND / 20).await;
        busy.serve_next();
    }
}

#[tokio::test(start_paused = true)]
async fn flow_that_holds_nothing_waits_however_many_others_wait_for_more() {
    let semaphore = FairSemaphore::new("permits", 8, SHARE);
    let mut held: Vec<_> = (0..8).map(|nth| semaphore.try_acquire(user(nth % 4), 1).unwrap()).collect();
    semaphore.inner.lock().progress.interval = 2 * SECOND;
    let waiting: Vec<_> = (0..4).map(|nth| semaphore.inner.lock().enqueue(&semaphore.inner, user(nth))).collect();
    let mut newcomer = wait(&semaphore, user(9));
    drop(held.pop());
    assert!((&mut newcomer).now_or_never().expect("it holds the fewest").is_ok());
    // Flows that hold as few are ahead. Two for each permit may wait, whatever the interval.
    let mut newcomers: Vec<_> = (20..37).map(|nth| wait(&semaphore, user(nth))).collect();
    assert_eq!(refusal(&semaphore, user(40)), Some(Refusal::Wait));
    newcomers.pop();
    newcomers.push(wait(&semaphore, user(40)));
    drop(waiting);
}

#[tokio::test(start_paused = true)]
async fn long_queue_of_one_flow_refuses_its_own_requests_only() {
    let mut busy = Busy::new(100);
    for _ in 0..18 {
        advance(SECOND / 10).await;
        busy.serve_next();
    }
    assert!(refusal(&busy.semaphore, user(1)).is_some(), "82 intervals of 100 ms exceed two seconds");
    // Another user waits for the first of them only.
    let mut other = wait(&busy.semaphore, user(2));
    busy.serve_next();
    assert!((&mut other).now_or_never().is_none());
    busy.held = None;
    assert!((&mut other).now_or_never().expect("it is the turn of the other user").is_ok());
}

#[tokio::test(start_paused = true)]
async fn average_recovers_after_fast_grants() {
    let mut busy = Busy::new(3);
    for _ in 0..3 {
        advance(2 * SECOND - SECOND / 100).await;
        busy.serve_next();
        busy.waiting.extend(busy.waiting.is_empty().then(|| wait(&busy.semaphore, user(1))));
    }
    busy.waiting.clear();
    // The first request of a flow always waits, and shortens the average.
    for _ in 0..100 {
        busy.waiting.push_back(wait(&busy.semaphore, user(1)));
        advance(SECOND / 1_000).await;
        busy.serve_next();
    }
    busy.waiting.push_back(wait(&busy.semaphore, user(1)));
    assert_eq!(refusal(&busy.semaphore, user(1)), None);
}
