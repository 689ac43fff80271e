//! Time is paused: it only passes with `advance`.

use tokio::time::advance;

use super::*;

const FREE: FreeFailures = FreeFailures { of_pair: 3, of_address: 20 };
const HERE: [u8; 4] = [192, 0, 2, 1];
const ELSEWHERE: [u8; 4] = [192, 0, 2, 2];

fn address(bytes: [u8; 4]) -> Option<IpAddr> {
    Some(IpAddr::from(bytes))
}

/// Returns one of many addresses.
fn nth_address(nth: u32) -> Option<IpAddr> {
    address((0x0a00_0000 + nth).to_be_bytes())
}

impl LoginLimits {
    fn attempt(&self, username: &str, from: Option<IpAddr>) -> Result<Attempt, Duration> {
        self.begin(Account::Username(username), from).map_err(|error| match error {
            Error::TooManyTries { delay } => delay,
            error => panic!("{error:?}"),
        })
    }

    /// Attempts with a wrong password. Returns how long it must wait, if it is refused.
    fn fail(&self, username: &str, from: Option<IpAddr>) -> Result<(), Duration> {
        self.attempt(username, from).map(drop)
    }

    fn sign_in(&self, username: &str, from: Option<IpAddr>) -> Result<(), Duration> {
        self.attempt(username, from).map(|mut attempt| attempt.succeeded())
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn after_the_free_failures_the_delay_doubles_up_to_60_s() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    for expected in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
        assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(expected)));
        advance(seconds(expected) - Duration::from_millis(1)).await;
        assert_eq!(limits.fail("ada", address(HERE)), Err(Duration::from_millis(1)), "refused attempts do not count");
        advance(Duration::from_millis(1)).await;
        limits.fail("ada", address(HERE)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn usernames_count_alike_in_any_case_and_whether_they_exist_or_not() {
    let limits = LoginLimits::new(FREE);
    for name in ["Ada", "aDA", "ADA"] {
        limits.fail(name, address(HERE)).unwrap();
    }
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
    limits.fail("ada ", address(HERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_delay_counts_from_the_end_of_the_failed_attempt() {
    let limits = LoginLimits::new(FREE);
    limits.fail("ada", address(HERE)).unwrap();
    let attempts = [(); 2].map(|()| limits.attempt("ada", address(HERE)).unwrap());
    advance(seconds(5)).await;
    drop(attempts);
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
}

#[tokio::test(start_paused = true)]
async fn of_many_concurrent_attempts_only_the_free_ones_are_admitted() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..2 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    let attempts: Vec<_> = (0..100).map(|_| limits.attempt("ada", address(HERE))).collect();
    assert_eq!(attempts.iter().filter(|attempt| attempt.is_ok()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pair_has_at_most_two_attempts_in_flight_whatever_their_outcome() {
    let limits = LoginLimits::new(FREE);
    let attempt = |username, from| limits.begin(Account::Username(username), from);
    let mut in_flight = Vec::new();
    for (username, from) in [("ada", HERE), ("ada", ELSEWHERE), ("alan", HERE)] {
        in_flight.push(attempt(username, address(from)).unwrap());
        in_flight.push(attempt(username, address(from)).unwrap());
        assert!(matches!(attempt(username, address(from)), Err(Error::Exhausted(_))), "{username} at {from:?}");
    }
    // A settled attempt is in flight until its session is created.
    in_flight[0].succeeded();
    in_flight[1].unchecked();
    assert!(matches!(attempt("ada", address(HERE)), Err(Error::Exhausted(_))));
    in_flight.drain(..2);
    for _ in 0..10 {
        let mut attempts = [attempt("ada", address(HERE)).unwrap(), attempt("ada", address(HERE)).unwrap()];
        assert!(
            matches!(attempt("ada", address(HERE)), Err(Error::Exhausted(_))),
            "a success does not raise the limit"
        );
        attempts.iter_mut().for_each(Attempt::succeeded);
    }
    drop(in_flight);
    assert!(lock(&limits.counts).in_flight.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_success_deletes_the_failures_of_its_pair_only() {
    let limits = LoginLimits::new(FREE);
    for name in ["ada", "alan"] {
        for _ in 0..3 {
            limits.fail(name, address(HERE)).unwrap();
        }
    }
    advance(seconds(1)).await;
    limits.sign_in("ada", address(HERE)).unwrap();
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
    limits.fail("alan", address(HERE)).unwrap();
    assert_eq!(limits.fail("alan", address(HERE)), Err(seconds(2)));
}

#[tokio::test(start_paused = true)]
async fn an_unchecked_attempt_does_not_count() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..10 {
        limits.attempt("ada", address(HERE)).unwrap().unchecked();
    }
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    advance(seconds(1)).await;
    limits.attempt("ada", address(HERE)).unwrap().unchecked();
    limits.fail("ada", address(HERE)).expect("the delay is still over");
}

#[tokio::test(start_paused = true)]
async fn failures_are_forgotten_after_15_minutes_without_one() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    advance(FORGOTTEN_AFTER).await;
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
}

#[tokio::test(start_paused = true)]
async fn attacks_from_other_addresses_do_not_lock_out_the_user() {
    let limits = LoginLimits::new(FREE);
    for nth in 0..1_000 {
        limits.fail("ada", nth_address(nth)).unwrap();
    }
    // The first attempt of the pair is admitted. After its failure the delay counts from that failure.
    limits.fail("ada", address(HERE)).unwrap();
    advance(seconds(30)).await;
    for nth in 1_000..1_100 {
        limits.fail("ada", nth_address(nth)).unwrap();
    }
    assert_eq!(limits.sign_in("ada", address(HERE)), Err(seconds(30)));
    advance(seconds(30)).await;
    limits.sign_in("ada", address(HERE)).unwrap();
    // The pair is recognized now.
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    assert_eq!(limits.sign_in("ada", address(HERE)), Err(seconds(1)));
}

#[tokio::test(start_paused = true)]
async fn failures_at_other_addresses_use_up_free_failures_and_then_double_the_delay() {
    // One failure of the pair, and one for each ten elsewhere; three are free.
    for (elsewhere, expected) in
        [(19, None), (20, Some(1)), (29, Some(1)), (30, Some(2)), (50, Some(8)), (900, Some(60))]
    {
        let limits = LoginLimits::new(FREE);
        limits.fail("ada", address(HERE)).unwrap();
        for nth in 0..elsewhere {
            limits.fail("ada", nth_address(nth)).unwrap();
        }
        assert_eq!(limits.fail("ada", address(HERE)).err(), expected.map(seconds), "{elsewhere}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_address_that_fails_for_many_users_is_delayed_except_for_recognized_pairs() {
    let limits = LoginLimits::new(FREE);
    limits.sign_in("ada", address(HERE)).unwrap();
    for nth in 0..20 {
        limits.fail(&format!("user{nth}"), address(HERE)).unwrap();
    }
    for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert_eq!(limits.fail("another", address(HERE)), Err(seconds(expected)));
        limits.sign_in("ada", address(HERE)).unwrap();
        limits.fail("another", address(ELSEWHERE)).unwrap();
        limits.sign_in("another", address(ELSEWHERE)).unwrap();
        advance(seconds(expected)).await;
        limits.fail("yet another", address(HERE)).unwrap();
        limits.sign_in("yet another", address(ELSEWHERE)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_pair_is_recognized_for_seven_days() {
    let limits = LoginLimits::new(FREE);
    limits.sign_in("ada", address(HERE)).unwrap();
    for days in [6, 1] {
        advance(seconds(days * 24 * 3_600)).await;
        for nth in 0..20 {
            limits.fail(&format!("user{nth}"), address(HERE)).unwrap();
        }
        match limits.attempt("ada", address(HERE)) {
            Ok(mut attempt) => {
                assert!(days == 6 && attempt.is_recognized());
                attempt.unchecked();
            }
            Err(_) => assert_eq!(days, 1),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn successes_are_not_failures_of_the_address_or_the_account() {
    let limits = LoginLimits::new(FREE);
    for nth in 0..100 {
        limits.sign_in(&format!("user{nth}"), address(HERE)).unwrap();
        limits.sign_in("ada", nth_address(nth)).unwrap();
    }
    limits.fail("new here", address(HERE)).unwrap();
    limits.fail("ada", address(HERE)).unwrap();
    limits.fail("ada", address(HERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_ipv6_network_and_both_forms_of_an_ipv4_address_count_as_one_address() {
    let limits = LoginLimits::new(FREE);
    let v6 = |text: &str| Some(text.parse::<IpAddr>().unwrap());
    for from in ["2001:db8::1", "2001:db8::2", "2001:db8::ffff:ffff:ffff:ffff"] {
        limits.fail("ada", v6(from)).unwrap();
    }
    assert!(limits.fail("ada", v6("2001:db8::3")).is_err());
    limits.fail("ada", v6("2001:db8:0:1::1")).unwrap();
    for _ in 0..3 {
        limits.fail("alan", address(HERE)).unwrap();
    }
    assert!(limits.fail("alan", v6("::ffff:192.0.2.1")).is_err());
    // Attempts without an address count together.
    for _ in 0..3 {
        limits.fail("ada", None).unwrap();
    }
    assert!(limits.fail("ada", None).is_err());
}

#[tokio::test(start_paused = true)]
async fn password_checks_of_authenticated_callers_are_counted_apart_from_logins() {
    let limits = LoginLimits::new(FREE);
    let id = Uuid::now_v7();
    for _ in 0..3 {
        drop(limits.begin(Account::Caller(id), address(HERE)).unwrap());
    }
    assert!(limits.begin(Account::Caller(id), address(HERE)).is_err());
    drop(limits.begin(Account::Caller(id), address(ELSEWHERE)).unwrap());
    limits.fail(&id.to_string(), address(HERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn filling_the_tables_costs_more_free_failures_than_it_frees_and_delays_no_one_else() {
    let limits = LoginLimits::new(FREE);
    limits.sign_in("ada", address(ELSEWHERE)).unwrap();
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    // New usernames from new addresses, as many as each has free failures.
    let mut addresses = 0;
    while let Err(delay) = limits.fail("ada", address(HERE)) {
        assert!(delay > Duration::ZERO && addresses < 10_000, "{delay:?} after {addresses}");
        for nth in 0..FREE.of_address {
            limits.fail(&format!("user {nth} of {addresses}"), nth_address(addresses)).unwrap();
        }
        advance(Duration::from_micros(1)).await;
        addresses += 1;
    }
    assert!((addresses * FREE.of_address) as usize >= ENTRIES_MAX / 2, "{addresses}");
    for nth in 0..addresses {
        assert!(limits.fail("another user", nth_address(nth)).is_err(), "address {nth} of {addresses} is free again");
    }
    assert!(limits.attempt("ada", address(ELSEWHERE)).unwrap().is_recognized());
    limits.sign_in("alan", address(ELSEWHERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_tables_are_bounded_and_keep_the_newest_entries() {
    let limits = LoginLimits::new(FREE);
    for nth in 0..ENTRIES_MAX as u32 + 10 {
        limits.fail("ada", nth_address(nth)).unwrap();
        if nth % 1_024 == 0 {
            advance(Duration::from_millis(1)).await;
        }
    }
    for _ in 0..3 {
        limits.fail("alan", address(HERE)).unwrap();
    }
    let count = lock(&limits.counts).pairs.entries.len();
    assert!((ENTRIES_MAX / 4..=ENTRIES_MAX).contains(&count), "{count}");
    assert!(limits.fail("alan", address(HERE)).is_err());
}
