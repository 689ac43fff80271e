//! Who the service is to its own database.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_service_is_not_the_superuser_of_its_own_database() {
    let dir = Dir::new();
    let service = Service::embedded(&dir);
    file(&service, &service.admin_token(), "first").await;
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
