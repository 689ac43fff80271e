//! Signals to a service that has not started yet.

use super::*;

/// Waits for a database that takes its time to be made.
fn starting(dir: &Dir) -> Child {
    let (bin_dir, begun) = (dir.path("bin"), dir.path("begun"));
    fs::create_dir(&bin_dir).unwrap();
    fs::set_permissions(&**dir, fs::Permissions::from_mode(0o777)).unwrap();
    for name in ["initdb", "postgres"] {
        let slow = format!("#!/bin/sh\n[ \"$1\" = --version ] || {{ touch {}; exec sleep 30; }}\n", begun.display());
        fs::write(bin_dir.join(name), slow).unwrap();
        fs::set_permissions(bin_dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    let child = command.env("PG_BINDIR", bin_dir).spawn().unwrap();
    wait_until("a database is being made", || begun.exists());
    child
}

#[test]
fn a_second_signal_ends_a_start_that_takes_long() {
    let dir = Dir::new();
    let mut child = starting(&dir);

    assert!(signal(child.id(), libc::SIGTERM));
    // The first one is not to be taken for the second.
    std::thread::sleep(TICK * 10);
    assert!(child.try_wait().unwrap().is_none(), "what is half made is not left behind at the first signal");
    // On a busy machine it is, all the same.
    wait_until("another signal ends it", || {
        let _ = signal(child.id(), libc::SIGTERM);
        child.try_wait().unwrap().is_some()
    });

    let output = finished(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""), "{output:?}");
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
