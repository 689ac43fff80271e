//! The privileges of the PostgreSQL role that the server runs as. Every test uses it; these show what it cannot do.

use issue_tracker::{
    db::migrate::{grant_rights, migrate},
    pb::AddIssueLabelsRequest,
};
use tokio_postgres::{Client, error::SqlState};

use crate::{
    harness::{Tracker, eventually, new_database, owner_config, service_config},
    lock_waiters,
    support::database::session,
};

async fn tables(client: &Client) -> Vec<String> {
    names(client, "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").await
}

async fn names(client: &Client, sql: &str) -> Vec<String> {
    client.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Returns the tables and privileges that `rights.sql` grants to the role.
fn documented_privileges() -> Vec<(String, String)> {
    let rows = include_str!("../../src/db/rights.sql").lines().filter_map(|line| line.trim().strip_prefix("('"));
    let rows = rows.map(|row| {
        let mut quoted = row.split('\'');
        (quoted.next().unwrap().to_owned(), quoted.nth(1).unwrap().to_owned())
    });
    rows.collect()
}

async fn assert_insufficient_privilege(client: &Client, statement: &str) {
    let error = client.batch_execute(statement).await.expect_err(statement);
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{statement}: {error:?}");
}

#[tokio::test]
async fn server_role_has_exactly_the_documented_table_privileges() {
    let tracker = Tracker::start().await;
    let documented = documented_privileges();
    let client = tracker.session().await;
    let tables = tables(&client).await;
    assert!(tables.len() > 10, "{tables:?}");
    for table in tables {
        let (_, rights) = documented.iter().find(|(name, _)| *name == table).expect(&table);
        for right in ["SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"] {
            let sql = "SELECT has_table_privilege('tracker', $1::text, $2)";
            let has: bool = client.query_one(sql, &[&table, &right]).await.unwrap().get(0);
            assert_eq!(has, rights.split(", ").any(|named| named == right), "{right} on {table}");
        }
    }
}

#[tokio::test]
async fn server_role_cannot_change_the_schema_or_truncate_a_table() {
    let tracker = Tracker::start().await;
    let service = session(&service_config(&tracker.config).await).await;
    for table in tables(&service).await {
        for statement in [
            "ALTER TABLE % ADD COLUMN x int",
            "ALTER TABLE % DISABLE TRIGGER ALL",
            "ALTER TABLE % OWNER TO tracker",
            "CREATE INDEX ON % ((1))",
            "DROP TABLE % CASCADE",
            "TRUNCATE % CASCADE",
        ] {
            assert_insufficient_privilege(&service, &statement.replace('%', &table)).await;
        }
    }
    for statement in [
        "CREATE TABLE x ()",
        "CREATE TEMPORARY TABLE x ()",
        "CREATE SCHEMA x",
        "CREATE FUNCTION x() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE ROLE x",
        "CREATE DATABASE x",
        "DROP FUNCTION issues_before_update() CASCADE",
        "DROP TRIGGER issues_before_update ON issues",
        "ALTER DATABASE template_of_tests SET jit = off",
        "SET session_replication_role = replica",
        "COPY labels TO PROGRAM 'cat'",
        "SELECT pg_read_file('/etc/passwd')",
    ] {
        assert_insufficient_privilege(&service, statement).await;
    }
}

#[tokio::test]
async fn server_role_cannot_rewrite_history() {
    let tracker = Tracker::start().await;
    let service = session(&service_config(&tracker.config).await).await;
    for statement in [
        "INSERT INTO refinery_schema_history VALUES (999, 'x', 'x', '1')",
        "UPDATE refinery_schema_history SET checksum = '1'",
        "DELETE FROM refinery_schema_history",
        "UPDATE issue_events SET new_value = 'x'",
        "DELETE FROM issue_events",
        "UPDATE requests SET reply = ''",
        "DELETE FROM comments",
        "DELETE FROM users",
    ] {
        assert_insufficient_privilege(&service, statement).await;
    }
}

#[tokio::test]
async fn default_privileges_cover_tables_of_later_migrations() {
    let config = new_database().await;
    session(&owner_config(&config)).await.batch_execute("CREATE TABLE later (x int)").await.unwrap();

    let service = session(&service_config(&config).await).await;

    let use_all = "INSERT INTO later VALUES (1); UPDATE later SET x = 2; DELETE FROM later; SELECT x FROM later";
    service.batch_execute(use_all).await.unwrap();
    assert_insufficient_privilege(&service, "DROP TABLE later").await;
}

#[tokio::test]
async fn server_role_executes_functions_that_public_may_not() {
    let tracker = Tracker::start().await;
    let owner = session(&owner_config(&tracker.config)).await;
    owner.batch_execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC").await.unwrap();
    let (issue, label) = (tracker.member.file("crash").await, tracker.member.label("bug").await);

    let request = AddIssueLabelsRequest { issue_id: issue.id, label_ids: vec![label.id], ..Default::default() };
    let issue = tracker.member.labels().add_issue_labels(request).await.unwrap().into_inner();

    assert_eq!(issue.version, 2);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events WHERE field = 'label'").await, 1);
}

#[tokio::test]
async fn server_role_may_use_every_function_view_and_sequence() {
    let tracker = Tracker::start().await;
    let owner = session(&owner_config(&tracker.config)).await;
    owner.batch_execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC").await.unwrap();

    // PostgreSQL checks the privilege on a trigger's function when the trigger is created, and none on the sequence of an
    // identity column.
    let unusable = "SELECT proname::text FROM pg_proc
            WHERE pronamespace = 'public'::regnamespace AND prorettype <> 'trigger'::regtype
                AND NOT has_function_privilege('tracker', oid, 'EXECUTE')
        UNION ALL SELECT relname FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('v', 'm', 'f')
                AND NOT has_table_privilege('tracker', oid, 'SELECT')
        UNION ALL SELECT relname FROM pg_class
            WHERE relnamespace = 'public'::regnamespace
                AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_class.oid AND deptype = 'i')
                AND CASE WHEN relkind = 'S' THEN NOT has_sequence_privilege('tracker', oid, 'USAGE') END";
    assert_eq!(names(&owner, unusable).await, [""; 0], "src/db/rights.sql does not grant them");
}

#[tokio::test]
async fn owner_grants_privileges_to_any_existing_role_repeatedly() {
    let config = new_database().await;
    let owner = owner_config(&config);
    let rights = async |role: &str| {
        let sql =
            "SELECT count(*) FROM pg_tables CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS may
            WHERE schemaname = 'public' AND has_table_privilege($1, tablename, may)";
        session(&config).await.query_one(sql, &[&role]).await.unwrap().get::<_, i64>(0)
    };
    // The name has to be quoted.
    let other = "an \"Other' role";
    session(&config).await.batch_execute(&format!("CREATE ROLE \"{}\"", other.replace('"', "\"\""))).await.unwrap();
    assert_eq!(rights(other).await, 0);

    let both = (grant_rights(&owner, other), grant_rights(&owner, other));
    let both = tokio::join!(both.0, both.1);

    both.0.unwrap();
    both.1.unwrap();
    assert!(rights(other).await > 0);
    assert_eq!(rights(other).await, rights("tracker").await);
    let error = format!("{:#}", grant_rights(&owner, "absent").await.unwrap_err());
    assert!(error.contains("cannot grant rights to the role absent"), "{error}");
    let error = grant_rights(service_config(&config).await, other).await.unwrap_err();
    assert!(format!("{error:#}").contains("cannot grant rights"), "{error:#}");
}

#[tokio::test]
async fn missing_table_fails_the_grant_and_grants_nothing() {
    let config = new_database().await;
    let superuser = session(&config).await;
    // The migrations create tables in another schema if the connection string sets a search_path.
    superuser.batch_execute("CREATE SCHEMA elsewhere; ALTER TABLE comments SET SCHEMA elsewhere").await.unwrap();
    superuser.batch_execute("CREATE ROLE ungranted").await.unwrap();

    let error = format!("{:#}", grant_rights(&owner_config(&config), "ungranted").await.unwrap_err());

    assert!(error.contains("no table comments in the schema public"), "{error}");
    let granted = "SELECT count(*) FROM pg_tables
        WHERE has_table_privilege('ungranted', schemaname || '.' || tablename, 'INSERT')";
    assert_eq!(superuser.query_one(granted, &[]).await.unwrap().get::<_, i64>(0), 0);
}

#[tokio::test]
async fn migrate_accepts_a_current_schema_without_ddl_privileges() {
    let config = new_database().await;
    let service = service_config(&config).await;
    migrate(&service).await.unwrap();

    let superuser = session(&config).await;
    let row = "INSERT INTO refinery_schema_history VALUES (999, 'from_the_future', '2026-01-01T00:00:00Z', '1')";
    superuser.batch_execute(row).await.unwrap();
    let message = migrate(&service).await.unwrap_err().to_string();
    assert!(message.contains("newer") && message.contains("999 (from_the_future)"), "{message}");

    let other = "DELETE FROM refinery_schema_history WHERE version = 999;
        UPDATE refinery_schema_history SET checksum = '1' WHERE version = 1";
    superuser.batch_execute(other).await.unwrap();
    let message = migrate(&service).await.unwrap_err().to_string();
    assert!(message.contains("migration 1 (issue_tracker)") && message.contains("other contents"), "{message}");
}

#[tokio::test]
async fn missing_migration_is_named_to_a_role_that_cannot_apply_it() {
    let config = new_database().await;
    let service = service_config(&config).await;
    session(&config).await.batch_execute("DELETE FROM refinery_schema_history WHERE version > 1").await.unwrap();

    let message = migrate(&service).await.unwrap_err().to_string();
    assert!(message.contains("lacks migration 2 (imports_resumed_and_reverted)"), "{message}");
    assert!(message.contains("run `issue-tracker migrate` as its owner"), "{message}");

    session(&config).await.batch_execute("DROP TABLE refinery_schema_history").await.unwrap();
    let message = migrate(&service).await.unwrap_err().to_string();
    assert!(message.contains("lacks migration 1 (issue_tracker)"), "{message}");
}

#[tokio::test]
async fn server_that_starts_during_a_migration_waits_for_it() {
    let tracker = Tracker::start().await;
    let mut empty = tracker.config.clone();
    empty.dbname(format!("{}_empty", tracker.config.get_dbname().unwrap()));
    let create = format!("CREATE DATABASE {} TEMPLATE template0 OWNER tracker_owner", empty.get_dbname().unwrap());
    session(&tracker.config).await.batch_execute(&create).await.unwrap();
    let owner = owner_config(&empty);
    // The server's role must be able to read tables that do not exist yet.
    let grant = "ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO tracker";
    session(&owner).await.batch_execute(grant).await.unwrap();
    // The key of the advisory lock that migrations hold: "issuetra" in ASCII.
    let lock = session(&empty).await;
    lock.execute("SELECT pg_advisory_lock(x'6973737565747261'::bigint)", &[]).await.unwrap();
    let waiting = async |sql: &str| eventually(sql, async || lock.query_one(sql, &[]).await.unwrap().get(0)).await;

    let migrated = tokio::spawn(migrate(owner));
    waiting(lock_waiters!(">= 1")).await;
    let started = tokio::spawn(migrate(service_config(&empty).await));
    waiting(lock_waiters!(">= 2")).await;
    drop(lock);

    migrated.await.unwrap().unwrap();
    started.await.unwrap().unwrap();
}
