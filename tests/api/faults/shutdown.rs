//! A service that is told to stop.

use issue_tracker::pb::ListIssuesRequest;
use tonic::transport::Endpoint;

use super::{connections::Raw, *};

#[tokio::test]
async fn calls_under_way_finish_new_ones_are_refused_and_health_tells() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "60"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.until_blocked().await;
    let mut watched =
        HealthClient::new(tracker.channel.clone()).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    tracker.stop();

    assert_eq!(watched.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // On a connection that is made only now.
    let channel = Endpoint::try_from(format!("http://{}", tracker.address)).unwrap().connect_lazy();
    let late = Tracker::client_on(channel.clone(), &tracker.member.token);
    let listed = late.issues().list_issues(ListIssuesRequest::default()).await;
    assert_retriable(listed, Code::Unavailable, "STOPPING");
    assert_retriable(try_file(&late, "late").await, Code::Unavailable, "STOPPING");
    let checked = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(checked.into_inner().status(), ServingStatus::NotServing);

    assert_retriable(watched.message().await, Code::Unavailable, "STOPPING");
    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
    tracker.ended().await;
}

#[tokio::test]
async fn clients_are_asked_to_go_elsewhere_and_idle_ones_do_not_hold_it_up() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "60"])).await;
    let mut raw = Raw::open(&tracker).await;
    assert!(raw.is_served(&tracker).await);
    tracker.stop();
    raw.closed().await;
    tracker.ended().await;
}

#[tokio::test]
async fn a_call_that_takes_too_long_is_cut_at_the_bound() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "1"])).await;
    let issue = tracker.member.file("slow").await;
    let lock = Lock::all_issues(&tracker).await;
    let _update = spawn_update(&tracker.member, retitle(&issue, "changed"));
    tracker.until_blocked().await;
    tracker.stop();
    tracker.ended().await;
    let waits = lock.0.query_one(lock_waiters!("= 1"), &[]).await.unwrap();
    assert!(waits.get::<_, bool>(0), "it was waited for no longer than the bound");
}
