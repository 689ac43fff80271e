//! A database that accepts no writes for a while: a failover, or a full disk elsewhere.

use super::*;

/// The setting of the database that new sessions take over. Sessions keep it until they end.
struct ReadOnlyPhase {
    /// Began before the phase, so it can end it.
    superuser: tokio_postgres::Client,
    database: String,
}

impl ReadOnlyPhase {
    /// Begins a phase. The service's sessions end, so that all are read-only from here on.
    async fn begin(tracker: &Tracker) -> Self {
        let superuser = tracker.session().await;
        let database: String = superuser.query_one("SELECT current_database()", &[]).await.unwrap().get(0);
        let phase = Self { superuser, database };
        phase.execute("SET default_transaction_read_only = on").await;
        let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND datname = current_database()";
        phase.superuser.query(terminate, &[]).await.unwrap();
        phase
    }

    /// Ends the phase for new sessions. Existing ones stay read-only.
    async fn end(&self) {
        self.execute("RESET default_transaction_read_only").await;
    }

    async fn execute(&self, setting: &str) {
        self.superuser.batch_execute(&format!("ALTER DATABASE {} {setting}", self.database)).await.unwrap();
    }
}

async fn health_of(tracker: &Tracker, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(tracker.channel.clone()).check(request).await.unwrap().into_inner().status()
}

async fn wait_for_health_of_writes(tracker: &Tracker, status: ServingStatus) {
    eventually(status.as_str_name(), async || health_of(tracker, "issuetracker.writes").await == status).await;
}

#[tokio::test]
async fn read_only_database_fails_writes_and_keeps_reads_and_writes_recover_by_themselves() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("before").await;
    assert_eq!(health_of(&tracker, "issuetracker.writes").await, ServingStatus::Serving);

    let phase = ReadOnlyPhase::begin(&tracker).await;

    wait_for_health_of_writes(&tracker, ServingStatus::NotServing).await;
    for service in ["", "issuetracker.reads", "issuetracker.v1.IssueService", "issuetracker.v1.AuthService"] {
        assert_eq!(health_of(&tracker, service).await, ServingStatus::Serving, "{service:?}");
    }
    for _ in 0..10 {
        assert_unavailable(try_file(&tracker.member, "meanwhile").await);
        assert_unavailable(spawn_update(&tracker.member, retitle(&issue, "meanwhile")).await.unwrap());
        assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
    }

    phase.end().await;

    wait_for_health_of_writes(&tracker, ServingStatus::Serving).await;
    for nth in 0..30 {
        try_file(&tracker.member, &format!("after {nth}")).await.unwrap();
    }
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 31);
}

#[tokio::test]
async fn sessions_that_stayed_read_only_are_replaced_and_fail_no_write() {
    let tracker = Tracker::start().await;
    tracker.member.file("before").await;
    let phase = ReadOnlyPhase::begin(&tracker).await;
    // Opens sessions that stay read-only.
    let held = [tracker.db.conn().await.unwrap(), tracker.db.conn().await.unwrap(), tracker.db.conn().await.unwrap()];
    phase.end().await;
    // The probe's own session is writable. It knows nothing of the others.
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND datname = current_database() AND query LIKE '%write_probe%'";
    phase.superuser.query(terminate, &[]).await.unwrap();
    drop(held);

    let mut failures = 0;
    for nth in 0..30 {
        failures += u32::from(try_file(&tracker.member, &format!("after {nth}")).await.is_err());
    }

    assert!(failures <= 1, "{failures} of 30 writes failed");
    wait_for_health_of_writes(&tracker, ServingStatus::Serving).await;
}

#[tokio::test]
async fn write_probes_that_hang_leave_no_sessions() {
    const HANGING_INSERTS: &str = "CREATE SEQUENCE probes;
        CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$ BEGIN PERFORM nextval('probes'); PERFORM pg_sleep(600); RETURN NEW; END $$;
        CREATE TRIGGER hang BEFORE INSERT ON requests FOR EACH ROW EXECUTE FUNCTION hang()";
    let tracker = Tracker::start().await;
    let superuser = tracker.session().await;
    superuser.batch_execute(HANGING_INSERTS).await.unwrap();
    wait_for_health_of_writes(&tracker, ServingStatus::NotServing).await;

    tracker.wait_until("SELECT last_value >= 5 FROM probes").await;

    let sessions = "SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE '-- write_probe%' AND state = 'active'";
    let hanging = tracker.count(sessions).await;
    assert!(hanging <= 2, "{hanging} sessions of write probes hang");
    superuser.batch_execute("DROP TRIGGER hang ON requests").await.unwrap();
    wait_for_health_of_writes(&tracker, ServingStatus::Serving).await;
}

#[tokio::test]
async fn sessions_are_kept_after_writes_were_slow() {
    let tracker = Tracker::start().await;
    let mut pids = Vec::new();
    for conn in tracker.hold_connections(3).await {
        pids.push(conn.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get::<_, i32>(0));
    }
    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE requests IN ACCESS EXCLUSIVE MODE").await.unwrap();
    wait_for_health_of_writes(&tracker, ServingStatus::NotServing).await;

    session.batch_execute("COMMIT").await.unwrap();

    wait_for_health_of_writes(&tracker, ServingStatus::Serving).await;
    // Retired sessions would be closed when they are checked out.
    drop(tracker.hold_connections(6).await);
    let open = tracker.sql("SELECT FROM pg_stat_activity WHERE pid = ANY ($1)", &[&pids]).await.len();
    assert_eq!(open, 3);
}
