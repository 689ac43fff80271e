use std::net::Ipv4Addr;

use super::*;
use crate::transport::client_address::ClientAddress;

/// Returns how long a closing connection is kept with a call that is stalled after 1 s, and with the calls that `others`
/// makes. These end after 3 s.
async fn kept_with_stalled_call(others: impl FnOnce(&Arc<Activity>) -> Vec<CallGuard>) -> Duration {
    let activity = Arc::new(Activity::new(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX));
    let stalled = begin(&activity);
    stalled.handle().expect_progress_by(Instant::now() + Duration::from_secs(1));
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

fn begin(activity: &Arc<Activity>) -> CallGuard {
    activity.begin(ClientAddress(Ipv4Addr::LOCALHOST.into()))
}

#[tokio::test(start_paused = true)]
async fn a_closing_connection_with_a_stalled_call_is_kept_for_its_other_calls_up_to_a_limit() {
    let alone = kept_with_stalled_call(|_| Vec::new()).await;
    assert!(alone <= Duration::from_secs(1), "{alone:?}");
    let with_another = kept_with_stalled_call(|activity| {
        let call = begin(activity);
        call.handle().expect_no_progress();
        vec![call]
    });
    let with_another = with_another.await;
    assert!((3..=3 + CHECK_INTERVAL.as_secs()).contains(&with_another.as_secs()), "{with_another:?}");
    let with_endless = kept_with_stalled_call(|activity| {
        let call = begin(activity);
        call.handle().expect_no_progress();
        // Never dropped.
        std::mem::forget(call);
        Vec::new()
    });
    assert_eq!(with_endless.await.as_secs(), 1 + STALLED_GRACE.as_secs());
}

/// Returns how long a closing connection is kept for the calls that `calls` makes on it.
async fn kept_by(is_evicted: bool, calls: impl AsyncFnOnce(&Arc<Activity>)) -> Duration {
    let activity = Arc::new(Activity::new(UNAUTHENTICATED_CALLS_PER_CLIENT_MAX));
    let began = Instant::now();
    tokio::select! {
        () = until_unauthenticated(&activity, is_evicted) => {}
        () = async {
            calls(&activity).await;
            std::future::pending().await
        } => {}
    }
    began.elapsed()
}

/// Begins a call that does not end.
async fn watch(activity: &Arc<Activity>) {
    let call = begin(activity);
    call.handle().expect_no_progress();
    std::mem::forget(call);
}

#[tokio::test(start_paused = true)]
async fn unauthenticated_calls_keep_a_closing_connection_for_a_limited_time() {
    assert_eq!(kept_by(true, watch).await, CLOSE_GRACE);
    assert_eq!(kept_by(false, watch).await, UNAUTHENTICATED_GRACE);
    let one_after_another = async |activity: &Arc<Activity>| {
        loop {
            let call = begin(activity);
            sleep(CLOSE_GRACE / 5).await;
            drop(call);
        }
    };
    assert_eq!(kept_by(true, one_after_another).await, CLOSE_GRACE);
    // Closing for another reason first, then evicted.
    let evicted_later = async |activity: &Arc<Activity>| {
        watch(activity).await;
        sleep(UNAUTHENTICATED_GRACE / 2).await;
        activity.evicted.notify_one();
    };
    assert_eq!(kept_by(false, evicted_later).await, UNAUTHENTICATED_GRACE / 2);
}

#[tokio::test(start_paused = true)]
async fn an_authenticated_call_may_finish_on_a_closing_connection() {
    let lasts = Duration::from_secs(300);
    let authenticated = async |activity: &Arc<Activity>| {
        watch(activity).await;
        sleep(CLOSE_GRACE / 2).await;
        let call = begin(activity);
        call.handle().mark_authenticated();
        sleep(lasts).await;
    };
    for (is_evicted, grace) in [(true, CLOSE_GRACE), (false, UNAUTHENTICATED_GRACE)] {
        let kept = kept_by(is_evicted, authenticated).await;
        assert!((lasts..=lasts + CLOSE_GRACE + grace).contains(&kept), "{kept:?}");
    }
}
