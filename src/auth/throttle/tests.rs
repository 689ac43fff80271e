//! Time stands still unless it is told to go on.

use tokio::time::advance;

use super::*;

const FREE: FreeFailures = FreeFailures { of_pair: 3, of_address: 20 };
const HERE: [u8; 4] = [192, 0, 2, 1];
const ELSEWHERE: [u8; 4] = [192, 0, 2, 2];

fn address(bytes: [u8; 4]) -> Option<IpAddr> {
    Some(IpAddr::from(bytes))
}

/// The one with this number, of many.
fn nth_address(nth: u32) -> Option<IpAddr> {
    address((0x0a00_0000 + nth).to_be_bytes())
}

impl LoginLimits {
    fn try_as(&self, username: &str, from: Option<IpAddr>) -> Result<Try, Duration> {
        self.begin(Subject::Username(username), from).map_err(|error| match error {
            Error::TooManyTries { delay } => delay,
            error => panic!("{error:?}"),
        })
    }

    /// A wrong password; answers how long it would have had to wait.
    fn fail(&self, username: &str, from: Option<IpAddr>) -> Result<(), Duration> {
        self.try_as(username, from).map(drop)
    }

    fn sign_in(&self, username: &str, from: Option<IpAddr>) -> Result<(), Duration> {
        self.try_as(username, from).map(|mut tried| tried.succeeded())
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn behind_the_free_failures_the_delay_doubles_up_to_a_minute() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    for expected in [1, 2, 4, 8, 16, 32, 60, 60, 60] {
        assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(expected)));
        advance(seconds(expected) - Duration::from_millis(1)).await;
        assert_eq!(
            limits.fail("ada", address(HERE)),
            Err(Duration::from_millis(1)),
            "what is refused counts for nothing"
        );
        advance(Duration::from_millis(1)).await;
        limits.fail("ada", address(HERE)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn unknown_names_and_whatever_case_count_alike() {
    let limits = LoginLimits::new(FREE);
    for name in ["Ada", "aDA", "ADA"] {
        limits.fail(name, address(HERE)).unwrap();
    }
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
    limits.fail("ada ", address(HERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_delay_counts_from_when_the_failure_was_found_out() {
    let limits = LoginLimits::new(FREE);
    limits.fail("ada", address(HERE)).unwrap();
    let tries = [(); 2].map(|()| limits.try_as("ada", address(HERE)).unwrap());
    advance(seconds(5)).await;
    drop(tries);
    assert_eq!(limits.fail("ada", address(HERE)), Err(seconds(1)));
}

#[tokio::test(start_paused = true)]
async fn of_many_tries_at_once_only_the_free_ones_are_taken() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..2 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    let tries: Vec<_> = (0..100).map(|_| limits.try_as("ada", address(HERE))).collect();
    assert_eq!(tries.iter().filter(|tried| tried.is_ok()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pair_has_two_tries_under_way_right_or_wrong_and_takes_none_of_anothers() {
    let limits = LoginLimits::new(FREE);
    let try_as = |username, from| limits.begin(Subject::Username(username), from);
    let mut under_way = Vec::new();
    for (username, from) in [("ada", HERE), ("ada", ELSEWHERE), ("alan", HERE)] {
        under_way.push(try_as(username, address(from)).unwrap());
        under_way.push(try_as(username, address(from)).unwrap());
        assert!(matches!(try_as(username, address(from)), Err(Error::Exhausted(_))), "{username} at {from:?}");
    }
    // What is settled is still under way until its session is made.
    under_way[0].succeeded();
    under_way[1].unchecked();
    assert!(matches!(try_as("ada", address(HERE)), Err(Error::Exhausted(_))));
    under_way.drain(..2);
    for _ in 0..10 {
        let mut tries = [try_as("ada", address(HERE)).unwrap(), try_as("ada", address(HERE)).unwrap()];
        assert!(matches!(try_as("ada", address(HERE)), Err(Error::Exhausted(_))), "a success makes room for no more");
        tries.iter_mut().for_each(Try::succeeded);
    }
    drop(under_way);
    assert!(lock(&limits.tries).under_way.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_success_makes_the_pairs_failures_forgotten_and_no_others() {
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
async fn a_try_that_was_not_checked_counts_for_nothing() {
    let limits = LoginLimits::new(FREE);
    for _ in 0..10 {
        limits.try_as("ada", address(HERE)).unwrap().unchecked();
    }
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    advance(seconds(1)).await;
    limits.try_as("ada", address(HERE)).unwrap().unchecked();
    limits.fail("ada", address(HERE)).expect("the delay was over, and is");
}

#[tokio::test(start_paused = true)]
async fn failures_are_forgotten_after_a_quarter_of_an_hour_without_one() {
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
async fn whoever_attacks_a_user_from_elsewhere_does_not_keep_him_out() {
    let limits = LoginLimits::new(FREE);
    for nth in 0..1_000 {
        limits.fail("ada", nth_address(nth)).unwrap();
    }
    // Her first try is taken; after a mistake she waits, however much goes on elsewhere, from her own mistake on.
    limits.fail("ada", address(HERE)).unwrap();
    advance(seconds(30)).await;
    for nth in 1_000..1_100 {
        limits.fail("ada", nth_address(nth)).unwrap();
    }
    assert_eq!(limits.sign_in("ada", address(HERE)), Err(seconds(30)));
    advance(seconds(30)).await;
    limits.sign_in("ada", address(HERE)).unwrap();
    // And now she is known there.
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    assert_eq!(limits.sign_in("ada", address(HERE)), Err(seconds(1)));
}

#[tokio::test(start_paused = true)]
async fn the_failures_of_a_user_elsewhere_take_free_failures_away_and_then_double_the_delay() {
    // One failure of her own, and one for each ten elsewhere; three are free.
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
async fn an_address_that_tries_many_users_is_delayed_but_for_those_who_have_signed_in_there() {
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
async fn who_has_signed_in_is_known_for_a_week() {
    let limits = LoginLimits::new(FREE);
    limits.sign_in("ada", address(HERE)).unwrap();
    for days in [6, 1] {
        advance(seconds(days * 24 * 3_600)).await;
        for nth in 0..20 {
            limits.fail(&format!("user{nth}"), address(HERE)).unwrap();
        }
        match limits.try_as("ada", address(HERE)) {
            Ok(mut tried) => {
                assert!(days == 6 && tried.is_known());
                tried.unchecked();
            }
            Err(_) => assert_eq!(days, 1),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_tries_of_a_pair_that_succeed_are_no_failures_of_its_address_or_user() {
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
async fn an_ipv6_subscriber_is_one_address_and_ipv4_is_the_same_in_either_form() {
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
    // Those without an address are one.
    for _ in 0..3 {
        limits.fail("ada", None).unwrap();
    }
    assert!(limits.fail("ada", None).is_err());
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_gives_his_password_again_is_counted_apart_from_signing_in() {
    let limits = LoginLimits::new(FREE);
    let id = Uuid::now_v7();
    for _ in 0..3 {
        drop(limits.begin(Subject::Caller(id), address(HERE)).unwrap());
    }
    assert!(limits.begin(Subject::Caller(id), address(HERE)).is_err());
    drop(limits.begin(Subject::Caller(id), address(ELSEWHERE)).unwrap());
    limits.fail(&id.to_string(), address(HERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_fills_the_tables_spends_more_free_failures_than_he_gets_back_and_nobody_else_is_held_up() {
    let limits = LoginLimits::new(FREE);
    limits.sign_in("ada", address(ELSEWHERE)).unwrap();
    for _ in 0..3 {
        limits.fail("ada", address(HERE)).unwrap();
    }
    // New names from new addresses, as many as each has free.
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
        assert!(limits.fail("somebody", nth_address(nth)).is_err(), "address {nth} of {addresses} is free again");
    }
    assert!(limits.try_as("ada", address(ELSEWHERE)).unwrap().is_known());
    limits.sign_in("alan", address(ELSEWHERE)).unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_is_bounded_and_the_newest_stay() {
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
    let kept = lock(&limits.tries).pairs.entries.len();
    assert!((ENTRIES_MAX / 4..=ENTRIES_MAX).contains(&kept), "{kept}");
    assert!(limits.fail("alan", address(HERE)).is_err());
}
