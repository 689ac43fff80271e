//! Tests starts while the external database is not available.

use std::net::TcpListener;

use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use issue_tracker::postgres::Cluster;

use super::*;

/// Stops a database that has been created. Returns its directory and its connection string.
fn stopped_database() -> (Dir, String) {
    let external = External::start(Durability::Throwaway);
    let url = external.url();
    let External { cluster, dir } = external;
    cluster.stop().unwrap();
    (dir, url)
}

/// Returns the code with which a call with an unknown token fails.
async fn call_error(service: &Service) -> Code {
    let (token, _) = issue_tracker::auth::new_token().unwrap();
    let listed = service.issues().list_issues(with_token(&token, ListIssuesRequest::default())).await;
    listed.expect_err("the token is unknown").code()
}

async fn status(service: &Service) -> ServingStatus {
    let checked = HealthClient::new(service.channel()).check(HealthCheckRequest::default()).await.unwrap();
    checked.into_inner().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn start_without_a_database_waits_for_it_alive_but_not_ready() {
    let (dir, url) = stopped_database();
    let mut service = Service::start(&dir, program(&["--database-url", &url]));

    assert_eq!(status(&service).await, ServingStatus::NotServing);
    assert_eq!(call_error(&service).await, Code::Unavailable);

    let _cluster = Cluster::start(&dir.path("external"), Durability::Throwaway).unwrap();
    eventually("health reports SERVING", async || status(&service).await == ServingStatus::Serving).await;
    assert_eq!(call_error(&service).await, Code::Unauthenticated);
    assert!(service.log().contains("database was unavailable at start"), "{}", service.log());
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn signal_stops_a_start_that_waits_for_its_external_database() {
    let (dir, url) = stopped_database();
    let mut service = Service::start(&dir, program(&["--database-url", &url]));

    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

#[test]
fn start_without_a_database_fails_at_once_if_it_must_not_wait_or_a_retry_cannot_help() {
    let serve = |url: &str, wait: &str| {
        finished(
            program(&["--listen", "127.0.0.1:0", "--database-url", url, "--wait-for-database", wait]).spawn().unwrap(),
        )
    };

    let external = External::start(Durability::Throwaway);
    let output = serve(&external.url().replace("dbname=postgres", "dbname=missing"), "600");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{output:?}");

    let (_dir, url) = stopped_database();
    let output = serve(&url, "0");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{output:?}");
    assert!(text(&output.stderr).contains("cannot connect to the database"), "{output:?}");
}

/// A database server that accepts connections and never responds.
fn silent_database() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, format!("host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable"))
}

#[tokio::test(flavor = "multi_thread")]
async fn start_with_a_database_that_does_not_respond_waits_for_it_alive_but_not_ready() {
    let (_listener, url) = silent_database();
    let dir = Dir::new();
    let mut service = Service::start(&dir, program(&["--database-url", &url]));

    assert_eq!(status(&service).await, ServingStatus::NotServing);
    assert_eq!(call_error(&service).await, Code::Unavailable);
    assert!(service.log().contains("database was unavailable at start"), "{}", service.log());
    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
}

#[test]
fn start_with_a_database_that_does_not_respond_fails_if_it_must_not_wait() {
    let (_listener, url) = silent_database();
    let serve = ["--listen", "127.0.0.1:0", "--database-url", &url, "--wait-for-database", "0"];
    for args in [&serve[..], &["migrate", "--database-url", &url]] {
        let output = finished(program(args).spawn().unwrap());
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{args:?} {output:?}");
        assert!(text(&output.stderr).contains("the server does not respond"), "{args:?} {output:?}");
    }
}
