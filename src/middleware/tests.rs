use super::*;

#[test]
fn large_messages_are_counted_beyond_their_first_bytes_and_given_back() {
    let payload = Payload::new(PAYLOAD_FREE_BYTES, 100);
    assert!(payload.take(0, PAYLOAD_FREE_BYTES).unwrap().is_none());
    let first = payload.take(PAYLOAD_FREE_BYTES, 60 * 1024).unwrap();
    let second = payload.take(0, PAYLOAD_FREE_BYTES + 40 * 1024).unwrap();
    assert!(first.is_some() && second.is_some());
    assert!(matches!(payload.take(0, PAYLOAD_FREE_BYTES + 1), Err(Error::Exhausted(_))));
    assert!(payload.take(0, PAYLOAD_FREE_BYTES).unwrap().is_none());
    drop(first);
    assert!(payload.take(0, PAYLOAD_FREE_BYTES + 60 * 1024).unwrap().is_some());
}

#[test]
fn the_more_are_refused_the_longer_they_are_asked_to_stay_away() {
    let began = Instant::now();
    let mut refusals = Refusals::new(began);
    let few = refusals.delay(began);
    assert!(few >= RETRY_DELAY && few < RETRY_DELAY.mul_f64(1.1));
    let many = (0..2_000).map(|_| refusals.delay(began)).last().unwrap();
    assert!(many > 4 * RETRY_DELAY && many <= RETRY_DELAY_MAX);
    // As long as it goes on, and for a second.
    assert!(refusals.delay(began + Duration::from_secs(1)) > 4 * RETRY_DELAY);
    assert!(refusals.delay(began + Duration::from_secs(4)) < RETRY_DELAY.mul_f64(1.1));
    assert_eq!((0..100_000).map(|_| refusals.delay(began + Duration::from_secs(4))).last(), Some(RETRY_DELAY_MAX));
}

#[test]
fn passing_failures_are_tried_again_up_to_a_bound_and_others_never() {
    let tries_of = |error: Error| {
        let mut tries = Tries::default();
        (1..).take_while(|_| tries.pause_after(&error).is_some()).count() as u32 + 1
    };
    assert_eq!(tries_of(Error::ConnectionLost), TRIES_MAX);
    assert_eq!(tries_of(Error::Conflict("they met")), TRIES_MAX);
    for error in [
        Error::Unavailable,
        Error::Exhausted(String::new()),
        Error::OutcomeUnknown { has_request_id: false },
        Error::Aborted { reason: "CONFLICT", message: String::new() },
        deadline_passed(),
        Error::Internal("a fault"),
    ] {
        assert_eq!(tries_of(error.clone()), 1, "{error:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_with_a_request_id_is_asked_for_until_it_is_known_or_it_takes_too_long() {
    let began = Instant::now();
    let mut tries = Tries::default();
    let mut pause = tries.pause_after(&Error::OutcomeUnknown { has_request_id: true });
    while let Some(time) = pause {
        assert!(time <= PAUSE_MAX);
        tokio::time::sleep(time).await;
        pause = tries.pause_after(&Error::Unavailable);
    }
    assert!(began.elapsed() >= LOOKUP_MAX && began.elapsed() < LOOKUP_MAX + 2 * PAUSE_MAX);
    assert!(tries.unknown_since.is_some());

    // What is told then is either what became of it, or that this is still not known.
    let locked = Error::Aborted { reason: "CONFLICT", message: "nothing was written".to_owned() };
    let stale = Error::Aborted { reason: "IMPORT_RUNNING", message: String::new() };
    for (error, is_decided) in [
        (Error::invalid("id", "is wrong"), true),
        (Error::not_found("issue", "id", "x"), true),
        (stale, true),
        (locked, false),
        (deadline_passed(), false),
        (Error::Unavailable, false),
        (Error::Internal("a fault"), false),
    ] {
        let mut tries = Tries::default();
        assert!(tries.pause_after(&Error::OutcomeUnknown { has_request_id: true }).is_some());
        assert_eq!(tries.pause_after(&error).is_some(), error.is_passing(), "{error:?}");
        assert_eq!(error.is_decided(), is_decided, "{error:?}");
    }
}

#[test]
fn a_grpc_timeout_is_up_to_eight_digits_and_a_unit() {
    for (value, wanted) in [
        ("1H", Some(Duration::from_secs(3_600))),
        ("2M", Some(Duration::from_secs(120))),
        ("3S", Some(Duration::from_secs(3))),
        ("4m", Some(Duration::from_millis(4))),
        ("5u", Some(Duration::from_micros(5))),
        ("99999999n", Some(Duration::from_nanos(99_999_999))),
        ("0S", Some(Duration::ZERO)),
        ("", None),
        ("S", None),
        ("1", None),
        ("1s", None),
        ("-1S", None),
        ("+1S", None),
        ("1.5S", None),
        ("123456789S", None),
        ("1 S", None),
        ("1é", None),
    ] {
        assert_eq!(grpc_timeout(value), wanted, "{value}");
    }
}
