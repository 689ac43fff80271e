//! Tests that the service deletes old data, and what the options on retention keep.

use super::*;

/// Stored responses of these ages in hours, and audit events of these ages in days.
const OLD_DATA: &str = "
    INSERT INTO requests (caller_id, request_id, fingerprint, reply, create_time)
        SELECT gen_random_uuid(), gen_random_uuid(), sha256('x'), 'x', now() - make_interval(hours => age)
        FROM unnest(ARRAY[23, 30, 49]) AS age;
    INSERT INTO audit_events (action, create_time)
        SELECT 'LOGIN_FAILED', now() - make_interval(days => age) FROM unnest(ARRAY[399, 430, 451]) AS age";
/// The ages of what is stored.
const RESPONSE_HOURS: &str = "SELECT string_agg(hours::text, ' ' ORDER BY hours)
    FROM (SELECT extract(epoch FROM now() - create_time)::int / 3600 AS hours FROM requests) AS stored";
const AUDIT_DAYS: &str = "SELECT string_agg(days::text, ' ' ORDER BY days)
    FROM (SELECT extract(epoch FROM now() - create_time)::int / 86400 AS days FROM audit_events) AS stored";

/// Returns a migrated database with old data.
async fn database_with_old_data() -> (External, tokio_postgres::Client) {
    let external = External::start(Durability::Throwaway);
    let migrated = run(&["migrate", "--database-url", &external.url()]);
    assert!(migrated.status.success(), "{migrated:?}");
    let sql = session(&external.config()).await;
    sql.batch_execute(OLD_DATA).await.unwrap();
    (external, sql)
}

async fn ages(sql: &tokio_postgres::Client, of: &str) -> String {
    sql.query_one(of, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_responses_and_audit_events_are_deleted_after_their_default_retention() {
    let (external, sql) = database_with_old_data().await;

    let _service = Service::on(&external, &[]);

    eventually("audit events are deleted", async || ages(&sql, AUDIT_DAYS).await == "399").await;
    // These are deleted before.
    assert_eq!(ages(&sql, RESPONSE_HOURS).await, "23");
}

#[tokio::test(flavor = "multi_thread")]
async fn options_keep_stored_responses_and_audit_events_for_longer() {
    let (external, sql) = database_with_old_data().await;

    let _service = Service::on(&external, &["--stored-response-hours", "48", "--audit-days", "450"]);

    eventually("audit events are deleted", async || ages(&sql, AUDIT_DAYS).await == "399 430").await;
    assert_eq!(ages(&sql, RESPONSE_HOURS).await, "23 30");
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_of_old_data_is_retried_soon_after_it_failed() {
    const WAITING: &str =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '-- prune_requests%' AND wait_event_type = 'Lock'";
    let (external, sql) = database_with_old_data().await;
    let lock_holder = session(&external.config()).await;
    // Inserts, such as that of the health check, do not conflict with this lock.
    lock_holder.batch_execute("BEGIN; SELECT FROM requests FOR UPDATE").await.unwrap();
    let service = Service::on(&external, &[]);
    let waiting = async || sql.query_one(WAITING, &[]).await.unwrap().get::<_, i64>(0) > 0;
    eventually("the deletion waits", waiting).await;
    eventually("the deletion has failed", async || !waiting().await).await;
    lock_holder.batch_execute("COMMIT").await.unwrap();

    // Otherwise it would be repeated after five minutes.
    eventually("stored responses are deleted", async || ages(&sql, RESPONSE_HOURS).await == "23").await;
    assert!(!service.log().contains("pruning failed"), "{}", service.log());
}
