//! Kills the first start of a service, which creates its private database.

use std::{path::Path, time::Duration};

use issue_tracker::pb::{CreateIssueRequest, Issue};
use prost::Message;

use crate::{
    harness::{Settings, call},
    support::{
        database::session,
        process::{Dir, signal},
        service::{Service, program},
    },
};

/// About as long as a first start takes.
const FIRST_START_MS: u64 = 2_500;

fn command(dir: &Dir) -> std::process::Command {
    program(&["--data-dir", &dir.data(), "--bcrypt-cost", "4"])
}

/// Returns how far a start has come.
fn progress(dir: &Dir) -> &'static str {
    let exists = |name: &str| Path::new(&dir.data()).join(name).exists();
    match () {
        () if exists("admin.token") => "the administrator was created",
        () if exists("cluster/postmaster.pid") => "the database was started",
        () if exists("cluster") => "the cluster was created",
        () => "nothing was created",
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn service_whose_first_start_was_killed_starts() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    for _ in 0..settings.pick(2, 40) {
        let dir = Dir::new();
        for _ in 0..rng.usize(1..3) {
            let mut half_started = Service::spawn(&dir, command(&dir));
            tokio::time::sleep(Duration::from_millis(rng.u64(..FIRST_START_MS))).await;
            let has_database = dir.server_pid().filter(|_| rng.bool());
            // Sometimes the database is killed first: the service may restart it.
            let _ = has_database.is_some_and(|pid| signal(pid, libc::SIGKILL));
            half_started.kill();
            println!("killed when {}", progress(&dir));
        }

        let mut service = Service::start(&dir, command(&dir));

        let issue = Some(Issue { title: "first".to_owned(), ..Issue::default() });
        let message = CreateIssueRequest { issue, ..Default::default() }.encode_to_vec();
        call(&service.channel(), &service.admin_token(), "IssueService/CreateIssue", &message).await.unwrap();
        let rows = session(&dir.database()).await;
        let administrators: i64 = rows.query_one("SELECT count(*) FROM users", &[]).await.unwrap().get(0);
        assert_eq!(administrators, 1);
        drop(rows);
        assert_eq!(service.stop().code(), Some(0), "{}", service.log());
        service.assert_no_internal_errors();
    }
}
