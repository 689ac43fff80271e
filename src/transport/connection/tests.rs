use std::net::Ipv4Addr;

use super::*;

/// How long a connection is kept that was told to go, with calls of which one is stuck from the first second on.
async fn kept(others: impl FnOnce(&Arc<Activity>) -> Vec<Call>) -> Duration {
    let activity = Arc::new(Activity::new(OPEN_CALLS_PER_CLIENT_MAX));
    let stuck = begin(&activity);
    stuck.lasts_until(Instant::now() + Duration::from_secs(1));
    let others = others(&activity);
    let ends = tokio::spawn(async move {
        sleep(Duration::from_secs(3)).await;
        drop(others);
    });
    let began = Instant::now();
    until_finished(&activity).await;
    ends.abort();
    began.elapsed()
}

fn begin(activity: &Arc<Activity>) -> Call {
    activity.begin(ClientAddress(Ipv4Addr::LOCALHOST.into()))
}

#[tokio::test(start_paused = true)]
async fn a_connection_with_a_stuck_call_is_kept_for_the_others_and_not_for_ever() {
    let alone = kept(|_| Vec::new()).await;
    assert!(alone <= Duration::from_secs(1), "{alone:?}");
    let with_another = kept(|activity| {
        let call = begin(activity);
        call.lasts();
        vec![call]
    });
    let with_another = with_another.await;
    assert!((3..=3 + LOOK_INTERVAL.as_secs()).contains(&with_another.as_secs()), "{with_another:?}");
    let with_endless = kept(|activity| {
        let call = begin(activity);
        call.lasts();
        // Never dropped.
        std::mem::forget(call);
        Vec::new()
    });
    assert_eq!(with_endless.await.as_secs(), 1 + STUCK_GRACE.as_secs());
}

#[test]
fn calls_without_credentials_are_counted_by_subscriber_and_given_back() {
    let activity = Arc::new(Activity::new(OPEN_CALLS_PER_CLIENT_MAX + 2));
    let enter = |address: &str| {
        let call = activity.begin(ClientAddress(address.parse().unwrap()));
        call.enter_open().then_some(call)
    };
    let mut held: Vec<Call> =
        (0..OPEN_CALLS_PER_CLIENT_MAX).map(|nth| enter(&format!("2001:db8::{nth}")).unwrap()).collect();
    assert!(enter("2001:db8::ffff").is_none());
    held.push(enter("203.0.113.9").unwrap());
    held.push(enter("2001:db8:0:1::").unwrap());
    assert!(enter("203.0.113.10").is_none(), "those of all together");
    held.remove(0);
    assert!(enter("2001:db8::ffff").is_some());
    held.clear();
    assert!(lock(&activity.calls).open.is_empty());
}

/// How long a connection that was told to go is kept for what `calls` makes on it.
async fn kept_by(is_evicted: bool, calls: impl AsyncFnOnce(&Arc<Activity>)) -> Duration {
    let activity = Arc::new(Activity::new(OPEN_CALLS_PER_CLIENT_MAX));
    let began = Instant::now();
    tokio::select! {
        () = until_strange(&activity, is_evicted) => {}
        () = async {
            calls(&activity).await;
            std::future::pending().await
        } => {}
    }
    began.elapsed()
}

/// Does not end by itself.
async fn watch(activity: &Arc<Activity>) {
    let call = begin(activity);
    call.lasts();
    std::mem::forget(call);
}

#[tokio::test(start_paused = true)]
async fn calls_that_nobody_has_signed_in_for_keep_a_connection_that_was_told_to_go_for_a_while_only() {
    assert_eq!(kept_by(true, watch).await, GOODBYE_MAX);
    assert_eq!(kept_by(false, watch).await, STRANGE_GRACE);
    let one_after_another = async |activity: &Arc<Activity>| {
        loop {
            let call = begin(activity);
            sleep(GOODBYE_MAX / 5).await;
            drop(call);
        }
    };
    assert_eq!(kept_by(true, one_after_another).await, GOODBYE_MAX);
    // Told to go for another reason first.
    let evicted_later = async |activity: &Arc<Activity>| {
        watch(activity).await;
        sleep(STRANGE_GRACE / 2).await;
        activity.evicted.notify_one();
    };
    assert_eq!(kept_by(false, evicted_later).await, STRANGE_GRACE / 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_somebody_has_signed_in_for_may_finish_on_a_connection_that_was_told_to_go() {
    let lasts = Duration::from_secs(300);
    let signed_in = async |activity: &Arc<Activity>| {
        watch(activity).await;
        sleep(GOODBYE_MAX / 2).await;
        let call = begin(activity);
        call.signed_in();
        sleep(lasts).await;
    };
    for (is_evicted, grace) in [(true, GOODBYE_MAX), (false, STRANGE_GRACE)] {
        let kept = kept_by(is_evicted, signed_in).await;
        assert!((lasts..=lasts + GOODBYE_MAX + grace).contains(&kept), "{kept:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_of_use_while_it_has_calls_that_somebody_has_signed_in_for_and_shortly_after() {
    let activity = Arc::new(Activity::new(OPEN_CALLS_PER_CLIENT_MAX));
    let is_useless = || activity.useless_since(Instant::now()).is_some();
    let call = begin(&activity);
    call.signed_in();
    sleep(2 * EVICTED_STRANGE_MIN).await;
    assert!(!is_useless());
    drop(call);
    assert!(!is_useless(), "it has just ended");
    sleep(EVICTED_IDLE_MIN).await;
    assert!(is_useless());

    // Strangers' calls, one after another.
    let began = Instant::now();
    while began.elapsed() < EVICTED_STRANGE_MIN - EVICTED_IDLE_MIN {
        drop(begin(&activity));
        assert!(!is_useless(), "{:?}", began.elapsed());
        sleep(EVICTED_IDLE_MIN / 2).await;
    }
    sleep(EVICTED_IDLE_MIN / 2).await;
    drop(begin(&activity));
    assert!(is_useless());
    let _strange = begin(&activity);
    assert!(is_useless());
}
