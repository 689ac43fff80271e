//! Graceful shutdown.

use issue_tracker::{
    db::{Db, PoolOptions},
    pb::ListIssuesRequest,
    server,
};
use tokio::net::TcpListener;
use tokio_postgres::Config;
use tonic::transport::Endpoint;

use super::{connections::H2Client, *};

#[tokio::test]
async fn shutdown_finishes_calls_in_flight_refuses_new_ones_and_reports_not_serving() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "60"])).await;
    let (lock, update) = start_blocked_update(&tracker).await;
    let mut health_updates =
        HealthClient::new(tracker.channel.clone()).watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health_updates.message().await.unwrap().unwrap().status(), ServingStatus::Serving);

    tracker.stop();

    assert_eq!(health_updates.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // A connection opened after the shutdown began.
    let channel = Endpoint::try_from(format!("http://{}", tracker.address)).unwrap().connect_lazy();
    let late = Tracker::client_on(channel.clone(), &tracker.member.token);
    let listed = late.issues().list_issues(ListIssuesRequest::default()).await;
    assert_retriable(listed, Code::Unavailable, "STOPPING");
    assert_retriable(try_file(&late, "late").await, Code::Unavailable, "STOPPING");
    let checked = HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(checked.into_inner().status(), ServingStatus::NotServing);

    assert_retriable(health_updates.message().await, Code::Unavailable, "STOPPING");
    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 1);
    tracker.wait_until_stopped().await;
}

#[tokio::test]
async fn shutdown_closes_idle_connections_and_does_not_wait_for_them() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "60"])).await;
    let mut raw = H2Client::open(&tracker).await;
    assert!(raw.is_served(&tracker).await);
    tracker.stop();
    raw.closed().await;
    tracker.wait_until_stopped().await;
}

#[tokio::test]
async fn calls_still_in_flight_after_drain_seconds_are_abandoned() {
    let mut tracker = Tracker::start_with(limits(&["--drain-seconds", "1"])).await;
    let (lock, _update) = start_blocked_update(&tracker).await;
    tracker.stop();
    tracker.wait_until_stopped().await;
    let blocked = lock.0.query_one(lock_waiters!("= 1"), &[]).await.unwrap();
    assert!(blocked.get::<_, bool>(0), "the server stopped while the call was still blocked");
}

#[tokio::test]
async fn server_fails_when_the_database_is_no_longer_probed() {
    // The probe ends with the runtime that it was started in.
    let db = std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { Db::new(Config::new(), PoolOptions::SMALL) })
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();

    let limits = limits(&[]);
    let served = server::run(listener, db.join().unwrap(), &limits, std::future::pending());

    served.await.unwrap_err();
}
