//! Those who wait for something of which there is not enough. Who would wait for too long is told so at once.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// A queue that has not moved for this long is reckoned to be as slow as it is now.
const STANDSTILL_MIN: Duration = Duration::from_millis(250);
/// How much the latest turn counts: one in so many.
const TURNS_REMEMBERED: u32 = 8;

/// How long it takes is reckoned from how fast the queue has moved of late.
pub(super) struct Queue {
    /// How many are served at the same time.
    served_at_once: u32,
    wait_max: Duration,
    state: Mutex<State>,
}

struct State {
    waiting: u32,
    /// Between two who were served, while others waited.
    turn: Duration,
    /// When somebody was served last, or the first of the queue came.
    moved: Instant,
    /// Whether somebody has waited ever since.
    is_turn: bool,
}

impl Queue {
    pub fn new(served_at_once: u32, wait_max: Duration) -> Self {
        let state = State { waiting: 0, turn: Duration::ZERO, moved: Instant::now(), is_turn: false };
        Self { served_at_once: served_at_once.max(1), wait_max, state: Mutex::new(state) }
    }

    /// A place at the end. None: it would take longer than anybody is to wait.
    pub fn join(&self) -> Option<Place<'_>> {
        let now = Instant::now();
        let mut state = self.lock();
        let standstill = now.duration_since(state.moved);
        let turn = match state.waiting > 0 && standstill >= STANDSTILL_MIN {
            true => state.turn.max(standstill / self.served_at_once),
            false => state.turn,
        };
        if turn.saturating_mul(state.waiting) > self.wait_max {
            return None;
        }
        if state.waiting == 0 {
            state.moved = now;
            state.is_turn = false;
        }
        state.waiting += 1;
        Some(Place { queue: self })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole whatever happened to a holder of the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in a queue, given up when it is dropped.
pub(super) struct Place<'a> {
    queue: &'a Queue,
}

impl Place<'_> {
    /// It is one's turn.
    pub fn served(self) {
        let now = Instant::now();
        let mut state = self.queue.lock();
        let turn = now.duration_since(state.moved);
        // The first of a queue has waited for a part of a turn only: it can show that turns are shorter, not longer.
        if state.is_turn || turn < state.turn {
            state.turn = (state.turn * (TURNS_REMEMBERED - 1) + turn) / TURNS_REMEMBERED;
        }
        state.moved = now;
        state.is_turn = true;
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.queue.lock().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use tokio::time::advance;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_taken_whole_until_it_has_not_moved_for_a_while() {
        let queue = Queue::new(2, 2 * SECOND);
        let mut places = Vec::new();
        for _ in 0..1_000 {
            places.push(queue.join().expect("nothing is known of how slow it goes"));
            advance(STANDSTILL_MIN / 1_001).await;
        }
        advance(STANDSTILL_MIN / 1_000).await;
        assert!(queue.join().is_none(), "a thousand turns of this length take too long");
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_is_taken_as_far_as_it_is_served_in_time() {
        const TURN: Duration = Duration::from_millis(1);
        let queue = Queue::new(2, 2 * SECOND);
        let mut places: VecDeque<_> = (0..200).map(|_| queue.join().unwrap()).collect();
        while let Some(place) = places.pop_front() {
            advance(TURN).await;
            place.served();
        }
        places.extend(std::iter::from_fn(|| queue.join()).take(10_000));
        let taken = u32::try_from(places.len()).unwrap();
        assert!((1_900..=2_100).contains(&taken), "{taken} turns of a millisecond in two seconds");
        // What is given back makes room again.
        drop(places.pop_back());
        let last = queue.join().expect("there is room for as many as before");
        assert!(queue.join().is_none());
        drop(last);
    }

    #[tokio::test(start_paused = true)]
    async fn who_would_wait_too_long_is_refused_and_who_would_not_is_taken() {
        let queue = Queue::new(2, 2 * SECOND);
        let mut places: Vec<_> = (0..100).map(|_| queue.join().unwrap()).collect();
        // A turn takes 100 ms, so that 20 are served within the two seconds.
        for _ in 0..60 {
            advance(SECOND / 10).await;
            places.pop().unwrap().served();
        }
        assert!(queue.join().is_none());
        places.truncate(15);
        assert!(queue.join().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_that_stands_still_is_taken_for_slow() {
        let queue = Queue::new(2, 2 * SECOND);
        let places: Vec<_> = (0..10).map(|_| queue.join().unwrap()).collect();
        advance(SECOND / 5).await;
        assert!(queue.join().is_some());
        advance(SECOND).await;
        assert!(queue.join().is_none());
        drop(places);
        assert!(queue.join().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_slow_once_is_fast_again_when_it_has_moved() {
        let queue = Queue::new(1, SECOND);
        let mut places: Vec<_> = (0..3).map(|_| queue.join().unwrap()).collect();
        for _ in 0..3 {
            advance(5 * SECOND).await;
            places.pop().unwrap().served();
        }
        // The first is always taken, and its like show how fast it goes now.
        for _ in 0..100 {
            let first = queue.join().unwrap();
            let second = queue.join();
            advance(SECOND / 1_000).await;
            first.served();
            if let Some(second) = second {
                second.served();
            }
        }
        let _first = queue.join().unwrap();
        assert!(queue.join().is_some());
    }
}
