//! Throttles password attempts: the delays grow with failures, and an attacker does not lock out the user.
//!
//! The counts are in memory: each replica counts for itself, and a restart forgets them. There are three, each of which
//! lasts [`FORGOTTEN_AFTER`] beyond the last failure:
//!
//! - A *pair* of an account and an address has a few free failures. After these, each attempt must wait for a delay since
//!   the pair's last failure, which doubles with each further failure.
//! - Failures of the account at other addresses make the delays of its pairs grow faster. But a delay always counts from
//!   the pair's own last failure, and a pair without failures has none: attacks from elsewhere do not lock out the user.
//! - An address with many failures of any accounts is delayed as a whole.
//!
//! A pair that has signed in recently is *recognized*: only its own failures delay it, so that one attacker in an office does
//! not lock out the others. What remains: a user who shares the attacker's address, and is attacked or has not signed in
//! from there, waits as well.
//!
//! Failures do not limit attackers who know the password. So a pair has at most [`CONCURRENT_ATTEMPTS_MAX`] attempts in
//! flight, and as many in which an authenticated caller enters the password again: together a third of the recognized
//! lane where there is one thread. The limit is per pair, so that attempts from elsewhere do not use it up. A user who is
//! recognized at several addresses has this limit at each; an administrator can disable the user.

use std::{
    collections::{
        HashMap,
        hash_map::{Entry, RandomState},
    },
    hash::{BuildHasher, Hash},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    error::{Error, Result},
    metrics,
    transport::client_address::ClientAddress,
};

/// How long failures count after the last one.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(15 * 60);
/// How long a pair is recognized after it has signed in.
const RECOGNIZED_FOR: Duration = Duration::from_secs(7 * 24 * 3_600);
/// The delay after the first failure that is not free. It doubles with each further one.
const DELAY_FIRST: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(60);
/// How many failures of an account at other addresses count like one of the pair's own.
const FAILURES_ELSEWHERE_PER_FAILURE: u32 = 10;
/// Maximum concurrent attempts of a pair: one, and a retry whose first response was lost.
const CONCURRENT_ATTEMPTS_MAX: u32 = 2;
/// Maximum number of pairs, accounts, addresses and recognized pairs, each: a few megabytes. When a table is full, its older
/// half is deleted.
///
/// Failures fill the tables as fast as calls arrive: a call that is cancelled while it waits counts, and bcrypt does not
/// slow it down. But an address has few free failures, so 65,536 failures take more than a thousand addresses (or IPv6
/// networks) within [`FORGOTTEN_AFTER`]. An attacker gains that the oldest delays of pairs are deleted, which is worth fewer
/// free failures than the attacker's addresses have themselves; delays of addresses are deleted only for as many other
/// addresses. No other caller is delayed by it: only delays are deleted. Recognized pairs are deleted only for as many correct
/// passwords, which bcrypt does slow down; they are recognized again after the next login.
const ENTRIES_MAX: usize = 65_536;

/// How many failures cause no delay.
#[derive(Clone, Copy, Debug)]
pub struct FreeFailures {
    /// Failures of one account from one address.
    pub of_pair: u32,
    /// Failures from one address, of any accounts.
    pub of_address: u32,
}

/// The account whose password is checked.
#[derive(Clone, Copy, Debug)]
pub enum Account<'a> {
    /// The username of a login, whether the user exists or not.
    Username(&'a str),
    /// An authenticated caller that enters the password again.
    Caller(Uuid),
}

/// Counts password attempts and their failures.
pub struct LoginLimits {
    free: FreeFailures,
    hasher: RandomState,
    counts: Arc<Mutex<Counts>>,
}

impl LoginLimits {
    pub fn new(free: FreeFailures) -> Self {
        Self { free, hasher: RandomState::new(), counts: Arc::default() }
    }

    /// Begins an attempt, which is in flight until the result is dropped.
    ///
    /// It counts as a failure until it is reported to be none, so that of many concurrent attempts only the free ones are
    /// admitted. Fails with `TooManyTries` during a delay, and with `Exhausted` if the pair has two attempts in flight.
    pub fn begin(&self, account: Account<'_>, address: Option<IpAddr>) -> Result<Attempt> {
        let address = address.map(|address| ClientAddress(address).network());
        // Hashed with a key of this process: bounded whatever was typed, and the text is not stored. Usernames are ASCII, so
        // ASCII lower case is enough.
        let user = match account {
            Account::Username(username) => self.hasher.hash_one((0_u8, username.to_ascii_lowercase())),
            Account::Caller(id) => self.hasher.hash_one((1_u8, id)),
        };
        let pair = (user, address);
        let now = Instant::now();
        let mut counts = lock(&self.counts);
        let delay = counts.delay(self.free, pair, now);
        if !delay.is_zero() {
            metrics::count(|metrics| &metrics.password_checks.throttled);
            return Err(Error::TooManyTries { delay });
        }
        let in_flight = counts.in_flight.entry(pair).or_default();
        if *in_flight >= CONCURRENT_ATTEMPTS_MAX {
            metrics::count(|metrics| &metrics.password_checks.concurrent);
            let message = format!(
                "too many concurrent password checks of this user (limit {CONCURRENT_ATTEMPTS_MAX}); try again"
            );
            return Err(Error::Exhausted(message));
        }
        *in_flight += 1;
        let attempt = Attempt {
            counts: Arc::clone(&self.counts),
            is_recognized: counts.recognized.get(pair, now, RECOGNIZED_FOR).is_some(),
            pair,
            began: now,
            pair_before: counts.pairs.count(pair, now),
            user_before: counts.users.count(user, now),
            address_before: counts.addresses.count(address, now),
            settled: false,
        };
        Ok(attempt)
    }
}

/// A password attempt, which is in flight until this is dropped.
///
/// Unless [`Attempt::succeeded`] or [`Attempt::unchecked`] is called it is a failure, also if the client cancels the call.
#[must_use]
pub struct Attempt {
    counts: Arc<Mutex<Counts>>,
    pair: Pair,
    began: Instant,
    pair_before: Option<Instant>,
    user_before: Option<Instant>,
    address_before: Option<Instant>,
    is_recognized: bool,
    settled: bool,
}

impl Attempt {
    /// Returns whether the account has signed in from the address recently.
    pub fn is_recognized(&self) -> bool {
        self.is_recognized
    }

    /// Reports that the password was correct: the pair's failures are deleted, and it is recognized from now on.
    pub fn succeeded(&mut self) {
        metrics::count(|metrics| &metrics.password_checks.correct);
        self.take_back();
        let mut counts = lock(&self.counts);
        counts.pairs.entries.remove(&self.pair);
        let now = Instant::now();
        counts.recognized.insert(self.pair, now, RECOGNIZED_FOR, Failures { count: 0, last: now });
    }

    /// Reports that the password was not checked.
    pub fn unchecked(&mut self) {
        metrics::count(|metrics| &metrics.password_checks.unchecked);
        self.take_back();
    }

    fn take_back(&mut self) {
        self.settled = true;
        let mut counts = lock(&self.counts);
        counts.pairs.take_back(self.pair, self.began, self.pair_before);
        counts.users.take_back(self.pair.0, self.began, self.user_before);
        counts.addresses.take_back(self.pair.1, self.began, self.address_before);
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        let mut counts = lock(&self.counts);
        counts.end(self.pair);
        if self.settled {
            return;
        }
        metrics::count(|metrics| &metrics.password_checks.wrong);
        // The failure happens now, not when the attempt began.
        let now = Instant::now();
        counts.pairs.touch(self.pair, now);
        counts.users.touch(self.pair.0, now);
        counts.addresses.touch(self.pair.1, now);
    }
}

/// The hash of an account, and an address.
type Pair = (u64, Option<IpAddr>);

#[derive(Default)]
struct Counts {
    pairs: Recent<Pair>,
    users: Recent<u64>,
    addresses: Recent<Option<IpAddr>>,
    /// The pairs that have signed in, with the time of the last login.
    recognized: Recent<Pair>,
    /// The attempts of each pair in flight: no more pairs than calls.
    in_flight: HashMap<Pair, u32>,
}

impl Counts {
    /// Returns how long the pair must wait.
    fn delay(&self, free: FreeFailures, pair: Pair, now: Instant) -> Duration {
        let own = self.pairs.get(pair, now, FORGOTTEN_AFTER);
        let count = own.map_or(0, |own| own.count);
        let remaining = |failures: Option<Failures>, counted: u32, free: u32| {
            failures.map_or(Duration::ZERO, |failures| (failures.last + delay(counted, free)).duration_since(now))
        };
        if self.recognized.get(pair, now, RECOGNIZED_FOR).is_some() {
            return remaining(own, count, free.of_pair);
        }
        let of_user = self.users.get(pair.0, now, FORGOTTEN_AFTER).map_or(0, |user| user.count);
        let from_elsewhere = of_user.saturating_sub(count) / FAILURES_ELSEWHERE_PER_FAILURE;
        let of_address = self.addresses.get(pair.1, now, FORGOTTEN_AFTER);
        let by_address = remaining(of_address, of_address.map_or(0, |address| address.count), free.of_address);
        remaining(own, count.saturating_add(from_elsewhere), free.of_pair).max(by_address)
    }

    /// Ends an attempt of the pair.
    fn end(&mut self, pair: Pair) {
        if let Entry::Occupied(mut in_flight) = self.in_flight.entry(pair) {
            *in_flight.get_mut() -= 1;
            if *in_flight.get() == 0 {
                in_flight.remove();
            }
        }
    }
}

/// Returns the delay after the last of `failures` failures, of which `free` cause none.
fn delay(failures: u32, free: u32) -> Duration {
    match failures.checked_sub(free) {
        None => Duration::ZERO,
        Some(doublings) => DELAY_FIRST.saturating_mul(1_u32.checked_shl(doublings).unwrap_or(u32::MAX)).min(DELAY_MAX),
    }
}

#[derive(Clone, Copy)]
struct Failures {
    count: u32,
    last: Instant,
}

/// The failures by key, at most [`ENTRIES_MAX`]: beyond these, the oldest are deleted.
struct Recent<K> {
    entries: HashMap<K, Failures>,
}

impl<K> Default for Recent<K> {
    fn default() -> Self {
        Self { entries: HashMap::new() }
    }
}

impl<K: Copy + Eq + Hash> Recent<K> {
    fn get(&self, key: K, now: Instant, retention: Duration) -> Option<Failures> {
        self.entries.get(&key).copied().filter(|failures| now.duration_since(failures.last) < retention)
    }

    /// Counts one more failure and returns when the previous one was.
    fn count(&mut self, key: K, now: Instant) -> Option<Instant> {
        let before = self.get(key, now, FORGOTTEN_AFTER);
        let count = before.map_or(0, |before| before.count).saturating_add(1);
        self.insert(key, now, FORGOTTEN_AFTER, Failures { count, last: now });
        before.map(|before| before.last)
    }

    fn insert(&mut self, key: K, now: Instant, retention: Duration, failures: Failures) {
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&key) {
            self.shrink(now, retention);
        }
        self.entries.insert(key, failures);
    }

    /// Deletes expired entries. If few are, deletes the older half as well, so that this is rare.
    fn shrink(&mut self, now: Instant, retention: Duration) {
        self.entries.retain(|_, failures| now.duration_since(failures.last) < retention);
        if self.entries.len() > ENTRIES_MAX / 2 {
            let mut lasts: Vec<Instant> = self.entries.values().map(|failures| failures.last).collect();
            let (_, middle, _) = lasts.select_nth_unstable(ENTRIES_MAX / 2);
            let middle = *middle;
            self.entries.retain(|_, failures| failures.last > middle);
        }
    }

    /// Undoes the [`Recent::count`] of the attempt that began at `began`.
    fn take_back(&mut self, key: K, began: Instant, before: Option<Instant>) {
        let Some(failures) = self.entries.get_mut(&key) else { return };
        failures.count = failures.count.saturating_sub(1);
        // Unless another one began since.
        if failures.last == began
            && let Some(before) = before
        {
            failures.last = before;
        }
        if failures.count == 0 {
            self.entries.remove(&key);
        }
    }

    fn touch(&mut self, key: K, now: Instant) {
        if let Some(failures) = self.entries.get_mut(&key) {
            failures.last = now;
        }
    }
}

fn lock(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // The counts are consistent even if a holder of the lock has panicked.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
