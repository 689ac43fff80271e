//! Signals to a service that has not started yet.

use super::*;

/// Whose PostgreSQL takes longer than the test, and ends with it. Returns when it is at work.
fn starting(dir: &Dir) -> Service {
    let (bin_dir, begun) = (dir.path("bin"), dir.path("begun"));
    fs::create_dir(&bin_dir).unwrap();
    fs::set_permissions(&**dir, fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["initdb", "postgres"] {
        let slow = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] || {{ touch {}; exec sleep {}; }}\n",
            begun.display(),
            2 * HANG.as_secs()
        );
        fs::write(bin_dir.join(name), slow).unwrap();
        fs::set_permissions(bin_dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = program(&["--data-dir", &dir.data()]);
    command.env("PG_BINDIR", bin_dir);
    let service = Service::spawn(dir, command);
    wait_until("PostgreSQL is at work", || begun.exists());
    service
}

#[test]
fn a_second_signal_ends_a_start_that_takes_long() {
    let dir = Dir::new();
    let mut service = starting(&dir);

    service.signal(libc::SIGTERM);
    // The first one is not to be taken for the second.
    std::thread::sleep(TICK * 10);
    assert!(service.child.try_wait().unwrap().is_none(), "what is half made is not left behind at the first signal");
    // On a busy machine it is, all the same.
    wait_until("another signal ends it", || {
        let _ = signal(service.child.id(), libc::SIGTERM);
        service.child.try_wait().unwrap().is_some()
    });

    assert_eq!(service.wait().code(), Some(1));
    assert!(!service.log().contains("issue-tracker: "), "it has ended by itself: {}", service.log());
}

#[test]
fn a_signal_ends_a_start_that_waits_for_its_database_to_be_ready() {
    let dir = Dir::new();
    assert_eq!(Service::embedded(&dir).stop().code(), Some(0));
    let mut service = starting(&dir);
    let began = Instant::now();

    let status = service.stop();

    assert_eq!(status.code(), Some(0), "{}", service.log());
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

/// Of the line that tells of the first administrator.
fn told_password(line: &str) -> String {
    let (_, rest) = line.split_once("the user \"admin\" with the password ").expect(line);
    rest.split(' ').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_password_is_told_before_it_holds_and_again_by_a_start_after_one_that_failed() {
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
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    let lost = told_password(text(&failed.stdout));
    assert!(!dir.path(TOKEN_FILE).exists());

    let mut service = Service::embedded(&dir);
    let password = told_password(&service.stdout[0]);
    login(&service, "admin", &password).await.unwrap();
    assert!(login(&service, "admin", &lost).await.is_err());
    assert_eq!(titles(&service, &service.admin_token()).await, [""; 0]);
    service.stop();

    // As after a start that was killed before it wrote the file.
    fs::remove_file(dir.path(TOKEN_FILE)).unwrap();
    let mut service = Service::embedded(&dir);
    assert!(!service.stdout.concat().contains("password"), "{:?}", service.stdout);
    login(&service, "admin", &password).await.unwrap();
    assert_eq!(titles(&service, &service.admin_token()).await, [""; 0]);
    service.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_start_that_waits_for_the_schema() {
    let external = External::start(Durability::Throwaway);
    let sql = session(&external.config()).await;
    // "issuetra" in ASCII, which migrations hold.
    sql.batch_execute("SELECT pg_advisory_lock(x'6973737565747261'::bigint)").await.unwrap();
    let child = program(&["--listen", "127.0.0.1:0", "--database-url", &external.url()]).spawn().unwrap();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    eventually("it waits", async || sql.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) > 0).await;

    assert!(signal(child.id(), libc::SIGTERM));

    let output = finished(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(0), ""), "{output:?}");
}
