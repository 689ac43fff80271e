//! Suspends the service by SIGSTOP, as a frozen virtual machine would be, while clients write.

use std::{
    fs,
    time::{Duration, Instant},
};

use issue_tracker::{
    pb::{CreateIssueRequest, Issue, UpdateIssueRequest},
    postgres::Durability,
};
use prost::Message;
use tokio::sync::watch;
use tonic::{Code, transport::Channel};
use uuid::Uuid;

use crate::{
    harness::{Caller, Settings, assert_retriable, call, call_within, create_callers, serves},
    load::Load,
    support::{
        database::session,
        eventually::eventually,
        external::External,
        process::wait_until,
        service::{Service, program},
    },
    verify::verify,
};

const CLIENTS: usize = 8;
/// Longer than PostgreSQL keeps a session whose transaction waits for its next statement, which is 60 s.
const LONG_SUSPENSION: Duration = Duration::from_secs(65);
/// Longer than [`LONG_SUSPENSION`].
const DEADLINE: Duration = Duration::from_secs(90);

/// A service that is stopped until this is dropped.
struct Suspended<'a>(&'a Service);

impl<'a> Suspended<'a> {
    fn suspend(service: &'a Service) -> Self {
        service.signal(libc::SIGSTOP);
        // Threads on other processors stop a moment later.
        wait_until("all threads are suspended", || thread_states(service.pid()).iter().all(|state| *state == 'T'));
        Self(service)
    }
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        self.0.signal(libc::SIGCONT);
    }
}

/// Returns the states of the threads of a process, as in `/proc/PID/stat`: `T` is suspended.
fn thread_states(pid: u32) -> Vec<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
    // The state follows the name, which can have any characters.
    stats.filter_map(|stat| stat.rsplit_once(')')?.1.trim_start().chars().next()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_are_stored_once_while_the_service_is_suspended_under_load() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let external = External::start(Durability::Throwaway);
    let service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let (_addresses, address) = watch::channel(service.address.clone());
    let load = Load::start(&external.config(), address, CLIENTS, &mut rng).await;
    let mut suspensions: Vec<Duration> =
        (0..settings.pick(2, 10)).map(|_| Duration::from_millis(rng.u64(500..2_500))).collect();
    suspensions.extend(settings.long.then_some(LONG_SUSPENSION));
    for time in suspensions {
        load.wait_for_acknowledged(rng.u64(20..100)).await;
        let suspended = Suspended::suspend(&service);
        tokio::time::sleep(time).await;
        drop(suspended);
        let recovery = load.wait_for_acknowledged_since(Instant::now()).await;
        println!("suspended for {time:?}, and recovered within {recovery:?}");
        eventually("health reports SERVING", async || serves(&service.channel()).await).await;
    }
    let mutations = load.finish().await;
    verify(&external.config(), &service.channel(), mutations).await;
    service.assert_no_internal_errors();
}

async fn create(channel: &Channel, caller: &Caller) -> Issue {
    let issue = Some(Issue { title: "as created".to_owned(), ..Issue::default() });
    let message = CreateIssueRequest { issue, ..Default::default() }.encode_to_vec();
    Issue::decode(&*call(channel, &caller.token, "IssueService/CreateIssue", &message).await.unwrap()).unwrap()
}

fn retitle(issue: &Issue, title: &str) -> UpdateIssueRequest {
    let issue = Some(Issue { id: issue.id.clone(), title: title.to_owned(), ..Issue::default() });
    UpdateIssueRequest { issue, request_id: Uuid::new_v4().to_string(), ..Default::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suspended_replica_blocks_only_the_issues_that_it_has_locked_for_at_most_a_minute() {
    const UPDATE: &str = "IssueService/UpdateIssue";
    let settings = Settings::from_environment();
    let external = External::start(Durability::Throwaway);
    let start = || Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let (suspended, other) = (start(), start());
    let caller = create_callers(&external.config(), 1).await.remove(0);
    let channel = other.channel();
    let (locked, free) = (create(&channel, &caller).await, create(&channel, &caller).await);
    let lock = session(&external.config()).await;
    // Mutations first wait for a lock briefly, and then again.
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker'
        AND wait_event_type = 'Lock' AND state_change < clock_timestamp() - interval '300 ms'";
    lock.batch_execute(&format!("BEGIN; SELECT FROM issues WHERE id = '{}' FOR UPDATE", locked.id)).await.unwrap();
    let first = retitle(&locked, "of the suspended replica").encode_to_vec();
    let update = {
        let (channel, token, message) = (suspended.channel(), caller.token.clone(), first.clone());
        tokio::spawn(async move { call_within(&channel, &token, UPDATE, &message, DEADLINE).await })
    };
    eventually("the update waits", async || lock.query_one(waits, &[]).await.unwrap().get::<_, i64>(0) == 1).await;

    // The statement gets the lock, and its service is not there to commit.
    let suspension = Suspended::suspend(&suspended);
    lock.batch_execute("COMMIT").await.unwrap();
    let second = retitle(&locked, "of the other replica").encode_to_vec();
    let blocked = call(&channel, &caller.token, UPDATE, &second);
    let unaffected = async {
        for nth in 0..20 {
            let message = retitle(&free, &format!("change {nth}")).encode_to_vec();
            call(&channel, &caller.token, UPDATE, &message).await.unwrap();
            create(&channel, &caller).await;
        }
        assert!(serves(&channel).await);
    };
    let (blocked, ()) = tokio::join!(blocked, unaffected);
    assert_retriable(&blocked.unwrap_err(), Code::Aborted, "CONFLICT");
    let is_freed = settings.long;
    if is_freed {
        eventually("PostgreSQL has ended the transaction of the suspended replica", async || {
            call(&channel, &caller.token, UPDATE, &second).await.is_ok()
        })
        .await;
    }
    drop(suspension);

    update.await.unwrap().unwrap();
    eventually("the other replica changes the issue", async || {
        call(&channel, &caller.token, UPDATE, &second).await.is_ok()
    })
    .await;
    for message in [first, second] {
        call(&suspended.channel(), &caller.token, UPDATE, &message).await.unwrap();
    }
    let rows = session(&external.config()).await;
    let sql = "SELECT string_agg(new_value, ', ' ORDER BY version) FROM issue_events WHERE issue_id = $1::text::uuid";
    let titles: String = rows.query_one(sql, &[&locked.id]).await.unwrap().get(0);
    let expected = match is_freed {
        true => "of the other replica, of the suspended replica",
        false => "of the suspended replica, of the other replica",
    };
    assert_eq!(titles, expected);
    for service in [suspended, other] {
        service.assert_no_internal_errors();
    }
}
