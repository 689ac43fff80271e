//! Tests signals and failures during startup.

use super::*;

/// Spawns a service whose PostgreSQL programs sleep for longer than the test. Returns once one of them runs.
fn spawn_with_slow_postgres(dir: &Dir) -> Service {
    let (bin_dir, started) = (dir.path("bin"), dir.path("started"));
    fs::create_dir(&bin_dir).unwrap();
    fs::set_permissions(&**dir, fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["initdb", "postgres"] {
        let slow = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] || {{ touch {}; exec sleep {}; }}\n",
            started.display(),
            2 * HANG.as_secs()
        );
        fs::write(bin_dir.join(name), slow).unwrap();
        fs::set_permissions(bin_dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = program(&["--data-dir", &dir.data()]);
    command.env("PG_BINDIR", bin_dir);
    let service = Service::spawn(dir, command);
    wait_until("PostgreSQL runs", || started.exists());
    service
}

#[test]
fn second_signal_aborts_a_slow_start() {
    let dir = Dir::new();
    let mut service = spawn_with_slow_postgres(&dir);

    service.signal(libc::SIGTERM);
    // Two pending signals of the same number are delivered once.
    std::thread::sleep(TICK * 10);
    assert!(service.child.try_wait().unwrap().is_none(), "the first signal must let initdb finish and clean up");
    // On a busy machine the pause may be too short, so the signal is repeated.
    wait_until("another signal stops the service", || {
        let _ = signal(service.child.id(), libc::SIGTERM);
        service.child.try_wait().unwrap().is_some()
    });

    assert_eq!(service.wait().code(), Some(143));
    assert!(
        !service.log().contains("issue-tracker: "),
        "the service exited with an error of its own: {}",
        service.log()
    );
}

#[test]
fn signal_stops_a_start_that_waits_for_its_database() {
    let dir = Dir::new();
    assert_eq!(Service::embedded(&dir).stop().code(), Some(0));
    // Its programs sleep for longer than `stop` waits.
    let mut service = spawn_with_slow_postgres(&dir);

    let status = service.stop();

    assert_eq!(status.code(), Some(0), "{}", service.log());
}

/// Parses the password from the line about the first administrator.
fn printed_password(line: &str) -> String {
    let (_, rest) = line.split_once("the user \"admin\" with the password ").expect(line);
    rest.split(' ').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn password_is_printed_before_the_commit_and_a_start_after_a_failed_one_prints_a_new_one() {
    let dir = Dir::new();
    let refuse = "TRUNCATE users CASCADE;
        CREATE SEQUENCE tries;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
            $$BEGIN IF nextval('public.tries') = 1 THEN RAISE 'refused'; END IF; RETURN NULL; END$$;
        CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON users INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse()";
    let mut service = Service::embedded(&dir);
    session(&dir.database()).await.batch_execute(refuse).await.unwrap();
    service.stop();
    fs::remove_file(dir.path(TOKEN_FILE)).unwrap();

    let failed = run(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    assert_eq!(failed.status.code(), Some(2), "{failed:?}");
    let lost = printed_password(text(&failed.stdout));
    assert!(!dir.path(TOKEN_FILE).exists());

    let mut service = Service::embedded(&dir);
    let password = printed_password(&service.stdout[0]);
    login(&service, "admin", &password).await.unwrap();
    assert!(login(&service, "admin", &lost).await.is_err());
    assert_eq!(titles(&service, &service.admin_token()).await, [""; 0]);
    service.stop();

    // The state after a start that was killed before it wrote the file.
    fs::remove_file(dir.path(TOKEN_FILE)).unwrap();
    let mut service = Service::embedded(&dir);
    assert!(!service.stdout.concat().contains("password"), "{:?}", service.stdout);
    login(&service, "admin", &password).await.unwrap();
    assert_eq!(titles(&service, &service.admin_token()).await, [""; 0]);
    service.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn signal_stops_a_start_that_waits_for_the_migration_lock() {
    let external = External::start(Durability::Throwaway);
    let sql = session(&external.config()).await;
    // The advisory lock of the migrations: "issuetra" in ASCII.
    sql.batch_execute("SELECT pg_advisory_lock(x'6973737565747261'::bigint)").await.unwrap();
    let child = program(&["--listen", "127.0.0.1:0", "--database-url", &external.url()]).spawn().unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    eventually("the start waits for the lock", async || {
        sql.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;

    assert!(signal(child.id(), libc::SIGTERM));

    let output = finished(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), ""), "{output:?}");
}
