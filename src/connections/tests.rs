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
