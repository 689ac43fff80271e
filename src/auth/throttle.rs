//! How often a password may be tried: slower and slower after failures, and so that nobody keeps another out.
//!
//! What is known is kept in memory, so each replica counts for itself, and a restart begins anew. Three things are
//! counted, each until [`FORGOTTEN_AFTER`] without a failure:
//!
//! - A *pair* of a user and an address has a few free failures; then the next try is only taken a delay after the pair's
//!   last failure, which doubles with each one.
//! - The failures of a user at other addresses let the delays of his pairs grow quicker. But a delay always counts from the
//!   pair's own last failure, and there is none before it has failed: whoever attacks a user from elsewhere does not keep
//!   him out.
//! - An address with many failures, of whatever users, is delayed as a whole.
//!
//! A pair that has signed in lately is held up by its own failures only, so that one attacker in an office does not lock
//! out the others. What remains: who shares the attacker's address, and is attacked himself or has not signed in from
//! there, waits with him.
//!
//! Failures do not hold up who has the right password. So a pair has at most [`TRIES_AT_ONCE_MAX`] tries under way, right
//! or wrong, and as many in which a caller gives his password once more: a third of the places in which those who have
//! signed in wait for a processor, where there is only one. It is the pair that is counted, so that whoever tries a user
//! from elsewhere does not take the user's turns. Who is known at several addresses has these turns at each; he had to
//! sign in from there, and an administrator can disable him.

use std::{
    collections::{
        HashMap,
        hash_map::{Entry, RandomState},
    },
    hash::{BuildHasher, Hash},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use uuid::Uuid;

use crate::error::{Error, Result};

/// How long after the last failure failures are forgotten.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(15 * 60);
/// How long after it has signed in a pair is held up by its own failures only.
const KNOWN_FOR: Duration = Duration::from_secs(7 * 24 * 3_600);
/// The delay behind the first failure that is not free; it doubles with each one more.
const DELAY_FIRST: Duration = Duration::from_secs(1);
const DELAY_MAX: Duration = Duration::from_secs(60);
/// So many failures of a user at other addresses count for a pair as one of its own.
const FAILURES_ELSEWHERE_PER_FAILURE: u32 = 10;
/// Whatever is sent at once: who signs in, and once more as the answer did not come.
const TRIES_AT_ONCE_MAX: u32 = 2;
/// How many pairs, users, addresses and known pairs are remembered, each: some megabytes. Past these the older half is
/// forgotten.
///
/// Failures fill these tables as fast as calls come: one that is cut while it waits counts, and bcrypt does not slow it
/// down. But an address has few that are free, so that 65,536 failures take more than a thousand addresses, or networks of
/// IPv6, within [`FORGOTTEN_AFTER`]. What is gained by them is that the oldest delays of pairs are forgotten, and so some
/// free failures at addresses that have more of their own to spend; those of an address are only forgotten for as many
/// other addresses. None of it holds others up: what is forgotten of them are delays. Known pairs are only forgotten for
/// as many passwords that were right, which bcrypt does slow down; they are then strangers until they sign in again.
const ENTRIES_MAX: usize = 65_536;
/// The bits of an IPv6 address that are one subscriber.
const IPV6_PREFIX_BITS: u32 = 64;

/// How many failures are free.
#[derive(Clone, Copy, Debug)]
pub struct FreeFailures {
    /// Of one user from one address.
    pub of_pair: u32,
    /// Of one address, whoever is tried.
    pub of_address: u32,
}

/// Whose password is tried.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// Who signs in says this name, whether there is such a user or not.
    Username(&'a str),
    /// Who has signed in gives his password once more.
    Caller(Uuid),
}

/// Counts tries.
pub struct LoginLimits {
    free: FreeFailures,
    hasher: RandomState,
    tries: Arc<Mutex<Tries>>,
}

impl LoginLimits {
    pub fn new(free: FreeFailures) -> Self {
        Self { free, hasher: RandomState::new(), tries: Arc::default() }
    }

    /// Begins a try, which is under way until it is dropped, and counts as a failure until it is said to be none: of many
    /// at once only as many are taken as are free. Refuses one that comes too soon, or beside too many of its pair.
    pub fn begin(&self, subject: Subject<'_>, address: Option<IpAddr>) -> Result<Try> {
        let address = address.map(subscriber);
        // Hashed with a key of this process: short, whatever was typed, and it is not kept. No username has a letter of
        // another alphabet that would be the same in lower case.
        let user = match subject {
            Subject::Username(username) => self.hasher.hash_one((0_u8, username.to_ascii_lowercase())),
            Subject::Caller(id) => self.hasher.hash_one((1_u8, id)),
        };
        let pair = (user, address);
        let now = Instant::now();
        let mut tries = lock(&self.tries);
        let delay = tries.delay(self.free, pair, now);
        if !delay.is_zero() {
            return Err(Error::TooManyTries { delay });
        }
        let under_way = tries.under_way.entry(pair).or_default();
        if *under_way >= TRIES_AT_ONCE_MAX {
            let message = format!("{TRIES_AT_ONCE_MAX} passwords of this user are being checked already; try again");
            return Err(Error::Exhausted(message));
        }
        *under_way += 1;
        let tried = Try {
            tries: Arc::clone(&self.tries),
            is_known: tries.known.get(pair, now, KNOWN_FOR).is_some(),
            pair,
            began: now,
            pair_before: tries.pairs.count(pair, now),
            user_before: tries.users.count(user, now),
            address_before: tries.addresses.count(address, now),
            settled: false,
        };
        Ok(tried)
    }
}

/// A try of a password, which is under way until it is dropped. Dropped without a word it stays a failure, as it does when
/// its client did not wait for the answer.
#[must_use]
pub struct Try {
    tries: Arc<Mutex<Tries>>,
    pair: Pair,
    began: Instant,
    pair_before: Option<Instant>,
    user_before: Option<Instant>,
    address_before: Option<Instant>,
    is_known: bool,
    settled: bool,
}

impl Try {
    /// Whether the user has signed in from the address lately.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// The password was right: the pair's failures are forgotten, and it is known from now on.
    pub fn succeeded(&mut self) {
        self.take_back();
        let mut tries = lock(&self.tries);
        tries.pairs.entries.remove(&self.pair);
        let now = Instant::now();
        tries.known.insert(self.pair, now, KNOWN_FOR, Failures { count: 0, last: now });
    }

    /// The password was not checked.
    pub fn unchecked(&mut self) {
        self.take_back();
    }

    fn take_back(&mut self) {
        self.settled = true;
        let mut tries = lock(&self.tries);
        tries.pairs.take_back(self.pair, self.began, self.pair_before);
        tries.users.take_back(self.pair.0, self.began, self.user_before);
        tries.addresses.take_back(self.pair.1, self.began, self.address_before);
    }
}

impl Drop for Try {
    fn drop(&mut self) {
        let mut tries = lock(&self.tries);
        tries.end(self.pair);
        if self.settled {
            return;
        }
        // It failed now, not when it began.
        let now = Instant::now();
        tries.pairs.touch(self.pair, now);
        tries.users.touch(self.pair.0, now);
        tries.addresses.touch(self.pair.1, now);
    }
}

/// A user, by the hash of his name, and an address.
type Pair = (u64, Option<IpAddr>);

#[derive(Default)]
struct Tries {
    pairs: Recent<Pair>,
    users: Recent<u64>,
    addresses: Recent<Option<IpAddr>>,
    /// The pairs that have signed in, each with the time of the last one.
    known: Recent<Pair>,
    /// How many tries of a pair are under way: no more pairs than there are calls.
    under_way: HashMap<Pair, u32>,
}

impl Tries {
    /// How long the pair has to wait.
    fn delay(&self, free: FreeFailures, pair: Pair, now: Instant) -> Duration {
        let own = self.pairs.get(pair, now, FORGOTTEN_AFTER);
        let count = own.map_or(0, |own| own.count);
        let remaining = |failures: Option<Failures>, counted: u32, free: u32| {
            failures.map_or(Duration::ZERO, |failures| (failures.last + delay(counted, free)).duration_since(now))
        };
        if self.known.get(pair, now, KNOWN_FOR).is_some() {
            return remaining(own, count, free.of_pair);
        }
        let of_user = self.users.get(pair.0, now, FORGOTTEN_AFTER).map_or(0, |user| user.count);
        let heat = of_user.saturating_sub(count) / FAILURES_ELSEWHERE_PER_FAILURE;
        let of_address = self.addresses.get(pair.1, now, FORGOTTEN_AFTER);
        let by_address = remaining(of_address, of_address.map_or(0, |address| address.count), free.of_address);
        remaining(own, count.saturating_add(heat), free.of_pair).max(by_address)
    }

    /// A try of the pair is not under way any more.
    fn end(&mut self, pair: Pair) {
        if let Entry::Occupied(mut under_way) = self.under_way.entry(pair) {
            *under_way.get_mut() -= 1;
            if *under_way.get() == 0 {
                under_way.remove();
            }
        }
    }
}

/// The delay behind the last of so many failures.
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

/// Failures that are not forgotten yet. At most [`ENTRIES_MAX`]: past these the oldest make room.
struct Recent<K> {
    entries: HashMap<K, Failures>,
}

impl<K> Default for Recent<K> {
    fn default() -> Self {
        Self { entries: HashMap::new() }
    }
}

impl<K: Copy + Eq + Hash> Recent<K> {
    fn get(&self, key: K, now: Instant, kept: Duration) -> Option<Failures> {
        self.entries.get(&key).copied().filter(|failures| now.duration_since(failures.last) < kept)
    }

    /// Counts one more; answers when the one before was.
    fn count(&mut self, key: K, now: Instant) -> Option<Instant> {
        let before = self.get(key, now, FORGOTTEN_AFTER);
        let count = before.map_or(0, |before| before.count).saturating_add(1);
        self.insert(key, now, FORGOTTEN_AFTER, Failures { count, last: now });
        before.map(|before| before.last)
    }

    fn insert(&mut self, key: K, now: Instant, kept: Duration, failures: Failures) {
        if self.entries.len() >= ENTRIES_MAX && !self.entries.contains_key(&key) {
            self.make_room(now, kept);
        }
        self.entries.insert(key, failures);
    }

    /// Drops what is forgotten; if that is little, the older half, so that it is seldom done.
    fn make_room(&mut self, now: Instant, kept: Duration) {
        self.entries.retain(|_, failures| now.duration_since(failures.last) < kept);
        if self.entries.len() > ENTRIES_MAX / 2 {
            let mut lasts: Vec<Instant> = self.entries.values().map(|failures| failures.last).collect();
            let (_, middle, _) = lasts.select_nth_unstable(ENTRIES_MAX / 2);
            let middle = *middle;
            self.entries.retain(|_, failures| failures.last > middle);
        }
    }

    /// Undoes the [`Recent::count`] of `began`.
    fn take_back(&mut self, key: K, began: Instant, before: Option<Instant>) {
        let Some(failures) = self.entries.get_mut(&key) else { return };
        failures.count = failures.count.saturating_sub(1);
        // Unless there was another one since.
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

/// The address, or of IPv6 the network that one subscriber has.
pub fn subscriber(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - IPV6_PREFIX_BITS))).into(),
    }
}

fn lock(tries: &Mutex<Tries>) -> MutexGuard<'_, Tries> {
    // The counts are whole whatever happened to a holder of the lock.
    tries.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
