//! Who the service is to its own database.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_service_is_not_the_superuser_of_its_own_database() {
    let dir = Dir::new();
    let service = Service::embedded(&dir);
    create_issue(&service, &service.admin_token(), "first").await;
    let mut config = dir.database();
    let client = session(&config).await;

    let sql = "SELECT DISTINCT usename::text, usesuper FROM pg_stat_activity JOIN pg_user USING (usename)
        WHERE application_name = 'issue-tracker'";
    let who: Vec<(String, bool)> =
        client.query(sql, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(who, [("issue_tracker".to_owned(), false)]);

    config.user("issue_tracker");
    let client = session(&config).await;
    for statement in ["DROP TABLE issues CASCADE", "CREATE TABLE x ()", "DELETE FROM refinery_schema_history"] {
        let error = client.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code(), Some(&tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE), "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_gives_a_role_what_it_needs_to_serve_and_no_more() {
    let external = External::start(Durability::Throwaway);
    session(&external.config()).await.batch_execute("CREATE ROLE serving LOGIN").await.unwrap();
    let migrated = run(&["migrate", "--grant-to", "serving", "--database-url", &external.url()]);
    assert!(migrated.status.success(), "{migrated:?}");
    create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
    let url = external.url().replace("user=postgres", "user=serving");

    let mut service = Service::start(&external.dir, program(&["--database-url", &url]));

    let token = login(&service, "ada", SECRET).await.unwrap();
    create_issue(&service, &token, "first").await;
    assert_eq!(service.stop().code(), Some(0));
    assert!(!service.log().contains("refuses"), "{}", service.log());
    assert_refused(&run(&["migrate", "--grant-to", "nobody", "--database-url", &external.url()]), "the role nobody");
    assert_refused(&run(&["migrate", "--grant-to", "serving", "--database-url", &url]), "cannot grant rights");
}

#[tokio::test(flavor = "multi_thread")]
async fn that_the_database_refuses_the_service_is_logged_with_the_reason_and_without_its_words() {
    let external = External::start(Durability::Throwaway);
    let sql = session(&external.config()).await;
    sql.batch_execute("CREATE ROLE serving LOGIN SUPERUSER").await.unwrap();
    let url = external.url().replace("user=postgres", "user=serving");
    let service = Service::start(&external.dir, program(&["--database-url", &url]));
    assert_eq!(text(&run(&["health", "--listen", &service.address]).stdout), "SERVING\n");

    // Committed before the sessions end, or the service would connect again while it still may; and the sessions that
    // began at that moment are ended by the next round.
    sql.batch_execute("ALTER ROLE serving NOLOGIN").await.unwrap();
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'serving'";
    // invalid_authorization_specification
    eventually("the refusal is logged", async || {
        sql.batch_execute(terminate).await.unwrap();
        service.log().contains("the database refuses a connection sqlstate=\"28000\"")
    })
    .await;
    assert!(!service.log().contains("serving\""), "{}", service.log());
    // A connection of the pool may be refused first, and the probe only at its next interval.
    wait_until("it reports NOT_SERVING", || {
        let health = run(&["health", "--listen", &service.address]);
        !health.status.success() && text(&health.stderr).contains("NOT_SERVING")
    });
    sql.batch_execute("ALTER ROLE serving LOGIN").await.unwrap();
    wait_until("it serves again", || run(&["health", "--listen", &service.address]).status.success());
}
