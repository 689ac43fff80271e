//! Tests the database roles of the service and the privileges that they need.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn service_role_of_the_embedded_database_has_least_privilege() {
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
async fn migrate_grant_to_gives_a_role_the_privileges_to_serve() {
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
    assert_refused(&run(&["migrate", "--grant-to", "absent", "--database-url", &external.url()]), "the role absent");
    assert_refused(&run(&["migrate", "--grant-to", "serving", "--database-url", &url]), "cannot grant rights");
}

#[tokio::test(flavor = "multi_thread")]
async fn rejected_database_login_is_logged_with_its_sqlstate_and_without_the_server_message() {
    let external = External::start(Durability::Throwaway);
    let sql = session(&external.config()).await;
    sql.batch_execute("CREATE ROLE serving LOGIN SUPERUSER").await.unwrap();
    let url = external.url().replace("user=postgres", "user=serving");
    let service = Service::start(&external.dir, program(&["--database-url", &url]));
    assert_eq!(text(&run(&["health", "--listen", &service.address]).stdout), "SERVING\n");

    // NOLOGIN is committed before the sessions are terminated, so that the service cannot reconnect. A session that started
    // before the commit is terminated by the next iteration.
    sql.batch_execute("ALTER ROLE serving NOLOGIN").await.unwrap();
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = 'serving'";
    // SQLSTATE 28000 is invalid_authorization_specification.
    eventually("the rejected login is logged", async || {
        sql.batch_execute(terminate).await.unwrap();
        service.log().contains("database refused connection sqlstate=\"28000\"")
    })
    .await;
    assert!(!service.log().contains("serving\""), "{}", service.log());
    // A pooled connection may be rejected before the health probe, which fails only at its next interval.
    wait_until("the health check reports NOT_SERVING", || {
        let health = run(&["health", "--listen", &service.address]);
        health.status.code() == Some(1) && text(&health.stdout) == "NOT_SERVING\n"
    });
    sql.batch_execute("ALTER ROLE serving LOGIN").await.unwrap();
    wait_until("the health check reports SERVING", || run(&["health", "--listen", &service.address]).status.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statement_refused_for_a_full_disk_is_logged_with_its_sqlstate_and_without_the_server_message() {
    let external = External::start(Durability::Throwaway);
    let service = Service::on(&external, &[]);
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN RAISE 'the row has sesame' USING ERRCODE = '53100'; END$$;
        CREATE TRIGGER refuse BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION refuse()";
    session(&external.config()).await.batch_execute(refuse).await.unwrap();

    for _ in 0..3 {
        let error = login(&service, "absent", "a password").await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    }

    let log = service.log();
    assert_eq!(log.matches("database refused statement sqlstate=\"53100\" count=1").count(), 1, "{log}");
    assert_eq!(log.matches("calls refused reason=\"DATABASE_UNAVAILABLE\"").count(), 1, "{log}");
    assert!(!log.contains("sesame"), "{log}");
}
