//! Compares the health check with the state of the database, and with what callers receive.

use std::{
    fs,
    time::{Duration, Instant},
};

use issue_tracker::{
    pb::{CreateIssueRequest, Issue, ListIssuesRequest},
    postgres::Durability,
};
use prost::Message;
use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::{Client, Config, NoTls};
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    harness::{Caller, Settings, call_within, create_callers},
    support::{
        bounds::{HANG, TICK},
        database::session,
        external::External,
        process::signal,
        service::{Service, channel, program},
    },
};

/// The longest time that the health check may lag behind what it reports.
pub const LAG_MAX: Duration = Duration::from_secs(2);
/// Additional lag allowed for scheduling on a busy machine.
pub const SCHEDULING_MARGIN: Duration = Duration::from_secs(1);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long each fault lasts, and each pause between two. Longer than the allowed lag.
const PHASE: Duration = Duration::from_millis(4_500);

/// A fault of the database, and which calls it makes fail.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Writes.
    ReadOnly,
    /// All.
    Frozen,
    /// All. The database is killed whenever it restarts.
    Killed,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_of_reads_and_writes_is_what_callers_receive_during_faults_of_the_database() {
    let phases = Settings::from_environment().pick(1, 6);
    tokio::join!(
        assert_health_is_accurate(Fault::ReadOnly, phases),
        assert_health_is_accurate(Fault::Frozen, phases),
        assert_health_is_accurate(Fault::Killed, phases)
    );
}

/// Compares the health of a service with calls, while its database has a fault repeatedly.
async fn assert_health_is_accurate(fault: Fault, phases: u32) {
    let external = External::start(Durability::Throwaway);
    let service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let caller = create_callers(&external.config(), 1).await.remove(0);
    let (_addresses, address) = watch::channel(service.address.clone());
    let monitors = [CallKind::Read, CallKind::Write].map(|kind| {
        let (channel, caller) = (service.channel(), caller.clone());
        let start = |stop| poll_calls(channel, caller, kind, stop);
        (kind, HealthMonitor::start(kind.health_name(), address.clone(), start))
    });

    tokio::time::sleep(PHASE).await;
    for _ in 0..phases {
        fault.last(&external, PHASE).await;
        tokio::time::sleep(PHASE).await;
    }

    for (kind, monitor) in monitors {
        println!("{fault:?}: calls that {kind:?}");
        let comparison = monitor.finish().await;
        let is_failing = !matches!((fault, kind), (Fault::ReadOnly, CallKind::Read));
        assert!(comparison.serving > 0, "{fault:?} {kind:?}: health was never comparable while calls succeeded");
        assert_eq!(comparison.not_serving > 0, is_failing, "{fault:?} {kind:?}: calls that failed");
    }
    service.assert_no_internal_errors();
}

impl Fault {
    /// Injects the fault for a time.
    async fn last(self, external: &External, time: Duration) {
        let superuser = session(&external.config()).await;
        match self {
            Self::ReadOnly => {
                set_read_only(&superuser, "= on").await;
                tokio::time::sleep(time).await;
                set_read_only(&superuser, "= off").await;
            }
            Self::Frozen => {
                let _frozen = Frozen::freeze(external.cluster.server_pid());
                tokio::time::sleep(time).await;
            }
            Self::Killed => {
                let began = Instant::now();
                while began.elapsed() < time {
                    let _ = signal(external.cluster.server_pid(), libc::SIGKILL);
                    tokio::time::sleep(TICK).await;
                }
            }
        }
    }
}

/// Changes the default of all sessions, those that exist included.
async fn set_read_only(superuser: &Client, setting: &str) {
    // Not together: ALTER SYSTEM runs in no transaction block.
    superuser.batch_execute(&format!("ALTER SYSTEM SET default_transaction_read_only {setting}")).await.unwrap();
    superuser.batch_execute("SELECT pg_reload_conf()").await.unwrap();
}

/// A PostgreSQL server whose processes are stopped until this is dropped.
struct Frozen(Vec<u32>);

impl Frozen {
    fn freeze(server: u32) -> Self {
        let mut frozen = Self(vec![server]);
        // Stopped first, so that it forks no more backends.
        assert!(signal(server, libc::SIGSTOP));
        let children = fs::read_to_string(format!("/proc/{server}/task/{server}/children")).unwrap();
        frozen.0.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
        frozen.0[1..].iter().for_each(|pid| assert!(signal(*pid, libc::SIGSTOP)));
        frozen
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = signal(*pid, libc::SIGCONT);
        }
    }
}

/// A result, and the times at which its request started and ended.
#[derive(Clone, Copy, Debug)]
pub struct Observation<T> {
    from: Instant,
    to: Instant,
    value: T,
}

/// Polls the health check, and concurrently what it reports.
pub struct HealthMonitor {
    stop: watch::Sender<bool>,
    health: JoinHandle<Vec<Observation<Option<bool>>>>,
    actual: JoinHandle<Vec<Observation<bool>>>,
}

impl HealthMonitor {
    /// Compares the health of a name with the results of `poll`, which runs until the monitor is finished.
    fn start<P>(
        name: &'static str,
        address: watch::Receiver<String>,
        poll: impl FnOnce(watch::Receiver<bool>) -> P,
    ) -> Self
    where
        P: Future<Output = Vec<Observation<bool>>> + Send + 'static,
    {
        let stop = watch::Sender::new(false);
        let health = tokio::spawn(poll_health(name, address, stop.subscribe()));
        Self { health, actual: tokio::spawn(poll(stop.subscribe())), stop }
    }

    /// Compares the health of the whole service with the state of the database.
    pub fn of_database(database: Config, address: watch::Receiver<String>) -> Self {
        Self::start("", address, |stop| poll_database(database, stop))
    }

    /// Stops. Asserts that whenever calls succeeded, or failed, for longer than the allowed lag while the service was
    /// reachable, the health check reported it.
    pub async fn finish(self) -> HealthComparison {
        self.stop.send_replace(true);
        let (health, actual) = (self.health.await.unwrap(), self.actual.await.unwrap());
        let comparison = HealthComparison::with_lag(&health, &actual, LAG_MAX + SCHEDULING_MARGIN);
        println!("health was right {} times as SERVING, {} as NOT_SERVING", comparison.serving, comparison.not_serving);
        assert_eq!(comparison.first_mismatch, None, "the health check lagged too long (time since the first poll)");
        let is_right = |lag: &Duration| HealthComparison::with_lag(&health, &actual, *lag).first_mismatch.is_none();
        let lag = (0..).map(|nth| POLL_INTERVAL * nth).find(is_right).unwrap();
        println!("the health check lagged by {lag:?} at most");
        comparison
    }
}

/// Counts of accurate health checks, and the first inaccurate one.
#[derive(Default)]
pub struct HealthComparison {
    pub serving: usize,
    pub not_serving: usize,
    /// The time of the first check that was wrong beyond the allowed lag, since the first poll.
    first_mismatch: Option<Duration>,
}

impl HealthComparison {
    fn with_lag(health: &[Observation<Option<bool>>], actual: &[Observation<bool>], lag: Duration) -> Self {
        let mut comparison = Self::default();
        for observation in health {
            let Some(reported) = observation.value else { continue };
            let since = observation.from.checked_sub(lag).unwrap();
            // The health check may report a fault that no call has met yet.
            let until = observation.to + PROBE_TIMEOUT;
            let during = |from: Instant, to: Instant| to >= since && from <= until;
            let unreachable = health.iter().any(|other| other.value.is_none() && during(other.from, other.to));
            let mut values = actual.iter().filter(|probe| during(probe.from, probe.to)).map(|probe| probe.value);
            let Some(value) = values.next().filter(|value| values.all(|other| other == *value)) else {
                continue;
            };
            // Gaps between the probes show that the machine was too busy to judge the health check.
            let stalled = actual.windows(2).any(|pair| {
                during(pair[0].from, pair[1].from) && pair[1].from - pair[0].from > PROBE_TIMEOUT + SCHEDULING_MARGIN
            });
            if unreachable || stalled || health[0].from > since {
                continue;
            }
            match value {
                _ if reported != value => {
                    comparison.first_mismatch.get_or_insert(observation.from - health[0].from);
                }
                true => comparison.serving += 1,
                false => comparison.not_serving += 1,
            }
        }
        comparison
    }
}

/// Polls the health check. The value is `None` while the service is unreachable.
async fn poll_health(
    name: &str,
    address: watch::Receiver<String>,
    stop: watch::Receiver<bool>,
) -> Vec<Observation<Option<bool>>> {
    let mut observations = Vec::new();
    let mut connected = (String::new(), None);
    while !*stop.borrow() {
        let current = address.borrow().clone();
        if connected.0 != current {
            connected = (current.clone(), Some(HealthClient::new(channel(&current))));
        }
        let from = Instant::now();
        let client = connected.1.as_mut().unwrap();
        let request = HealthCheckRequest { service: name.to_owned() };
        let checked = tokio::time::timeout(HANG, client.check(request)).await.unwrap();
        let value = checked.ok().map(|checked| checked.into_inner().status() == ServingStatus::Serving);
        observations.push(Observation { from, to: Instant::now(), value });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    observations
}

/// Polls the database.
async fn poll_database(config: Config, stop: watch::Receiver<bool>) -> Vec<Observation<bool>> {
    let mut observations = Vec::new();
    let mut client = None;
    while !*stop.borrow() {
        let from = Instant::now();
        let probe = async {
            if client.is_none() {
                let (connected, connection) = config.connect(NoTls).await.ok()?;
                tokio::spawn(connection);
                client = Some(connected);
            }
            client.as_ref()?.simple_query("SELECT 1").await.ok()
        };
        let value = matches!(tokio::time::timeout(PROBE_TIMEOUT, probe).await, Ok(Some(_)));
        if !value {
            client = None;
        }
        observations.push(Observation { from, to: Instant::now(), value });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    observations
}

/// What a call does with the database.
#[derive(Clone, Copy, Debug)]
enum CallKind {
    Read,
    Write,
}

impl CallKind {
    fn health_name(self) -> &'static str {
        match self {
            Self::Read => "issuetracker.reads",
            Self::Write => "issuetracker.writes",
        }
    }

    /// Returns the method and the message.
    fn call(self) -> (&'static str, Vec<u8>) {
        match self {
            Self::Read => {
                ("IssueService/ListIssues", ListIssuesRequest { page_size: 1, ..Default::default() }.encode_to_vec())
            }
            Self::Write => {
                let issue = Some(Issue { title: "health".to_owned(), ..Issue::default() });
                ("IssueService/CreateIssue", CreateIssueRequest { issue, ..Default::default() }.encode_to_vec())
            }
        }
    }
}

/// Polls the service by calls. The value is whether a call succeeds.
async fn poll_calls(
    channel: Channel,
    caller: Caller,
    kind: CallKind,
    stop: watch::Receiver<bool>,
) -> Vec<Observation<bool>> {
    let (method, message) = kind.call();
    let mut observations = Vec::new();
    while !*stop.borrow() {
        let from = Instant::now();
        let value = call_within(&channel, &caller.token, method, &message, PROBE_TIMEOUT).await.is_ok();
        observations.push(Observation { from, to: Instant::now(), value });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    observations
}
