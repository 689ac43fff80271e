//! Kills the service and its embedded database repeatedly while many clients write.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use issue_tracker::postgres::Durability;
use tokio::{sync::watch, task::JoinHandle};
use tokio_postgres::{Config, NoTls};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    harness::{Settings, serves},
    load::Load,
    support::{
        bounds::{HANG, TICK},
        database::session,
        eventually::eventually,
        external::External,
        process::{Dir, signal},
        service::{Service, channel, program},
    },
    verify::verify,
};

const CLIENTS: usize = 16;
/// The longest time that the health check may lag behind the state of the database.
const HEALTH_LAG_MAX: Duration = Duration::from_secs(2);
/// Additional lag allowed for scheduling on a busy machine.
const SCHEDULING_MARGIN: Duration = Duration::from_secs(1);
/// The length of an outage that the health check must report.
const OUTAGE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Service,
    Database,
    /// The database is killed each time it restarts, for [`OUTAGE`].
    DatabaseOutage,
}

/// Returns the faults of a run in random order.
fn faults(settings: Settings, rng: &mut fastrand::Rng) -> Vec<Fault> {
    let services = std::iter::repeat_n(Fault::Service, settings.pick(4, 50));
    let databases = std::iter::repeat_n(Fault::Database, settings.pick(1, 18));
    let long = std::iter::repeat_n(Fault::DatabaseOutage, settings.pick(1, 2));
    let mut faults: Vec<Fault> = services.chain(databases).chain(long).collect();
    rng.shuffle(&mut faults);
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_crashes_exactly_once_and_health_is_accurate() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let dir = Dir::new();
    let data = dir.data();
    let command = || program(&["--data-dir", &data, "--bcrypt-cost", "4"]);
    let mut service = Service::start(&dir, command());
    assert_durable(&dir.database()).await;
    let (addresses, address) = watch::channel(service.address.clone());
    let monitor = HealthMonitor::start(dir.database(), address.clone());
    let load = Load::start(&dir.database(), address, CLIENTS, &mut rng).await;
    load.wait_for_acknowledged(100).await;

    let mut recoveries = Vec::new();
    for fault in faults(settings, &mut rng) {
        tokio::time::sleep(Duration::from_millis(rng.u64(100..600))).await;
        let began = Instant::now();
        match fault {
            Fault::Service => {
                service.kill();
                if rng.u32(..4) == 0 {
                    // Kill it again during its start.
                    let mut half_started = Service::spawn(&dir, command());
                    tokio::time::sleep(Duration::from_millis(rng.u64(..500))).await;
                    half_started.kill();
                }
                service = Service::start(&dir, command());
                addresses.send_replace(service.address.clone());
            }
            Fault::Database => kill_database(&dir).await,
            Fault::DatabaseOutage => {
                while began.elapsed() < OUTAGE {
                    let _ = dir.server_pid().is_some_and(|pid| signal(pid, libc::SIGKILL));
                    tokio::time::sleep(TICK).await;
                }
            }
        }
        // Sometimes the next fault comes before the service has recovered.
        if rng.u32(..5) > 0 {
            recoveries.push((fault, load.wait_for_acknowledged_since(began).await));
        }
    }
    load.wait_for_acknowledged_since(Instant::now()).await;
    // Give the health check time to report the final state.
    tokio::time::sleep(HEALTH_LAG_MAX + SCHEDULING_MARGIN * 2).await;
    let mutations = load.finish().await;
    print_report(&recoveries, &mutations);
    monitor.assert_accurate().await;
    assert!(
        mutations.iter().any(|mutations| mutations.tries > 1 && mutations.response.is_some()),
        "no acknowledged call needed a retry"
    );

    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let mut service = Service::start(&dir, command());
    verify(&dir.database(), &service.channel(), mutations).await;
    assert_eq!(service.stop().code(), Some(0));
    service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_fails_while_the_database_is_frozen() {
    let external = External::start(Durability::Throwaway);
    let service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let channel = service.channel();
    eventually("health reports SERVING", async || serves(&channel).await).await;
    for _ in 0..Settings::from_environment().pick(2, 10) {
        let frozen = Frozen::freeze(external.cluster.server_pid());
        tokio::time::sleep(HEALTH_LAG_MAX + SCHEDULING_MARGIN).await;
        let reported = serves(&channel).await;
        drop(frozen);
        assert!(
            !reported,
            "health reports SERVING {:?} after the database was frozen",
            HEALTH_LAG_MAX + SCHEDULING_MARGIN
        );
        eventually("health reports SERVING again", async || serves(&channel).await).await;
    }
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

async fn kill_database(dir: &Dir) {
    let killed = async || dir.server_pid().is_some_and(|pid| signal(pid, libc::SIGKILL));
    eventually("the database runs", killed).await;
}

/// Asserts the settings that make acknowledged commits survive a crash of the machine.
async fn assert_durable(database: &Config) {
    let rows = session(database).await;
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        let value: String = rows.query_one("SELECT current_setting($1)", &[&setting]).await.unwrap().get(0);
        assert_eq!(value, "on", "{setting}");
    }
}

fn print_report(recoveries: &[(Fault, Duration)], mutations: &[crate::load::CompletedMutation]) {
    let acknowledged = mutations.iter().filter(|mutations| mutations.response.is_some()).count();
    let retried = mutations.iter().filter(|mutations| mutations.tries > 1).count();
    println!("{} mutations: {acknowledged} acknowledged, {retried} retried", mutations.len());
    for fault in [Fault::Service, Fault::Database] {
        let mut times: Vec<u128> =
            recoveries.iter().filter(|(of, _)| *of == fault).map(|(_, time)| time.as_millis()).collect();
        times.sort_unstable();
        if let (Some(min), Some(max)) = (times.first(), times.last()) {
            let median = times[times.len() / 2];
            println!("{fault:?}: recovery took {min} / {median} / {max} ms (min / median / max of {})", times.len());
        }
    }
}

/// A result, and the times at which its request started and ended.
#[derive(Clone, Copy, Debug)]
struct Observation<T> {
    from: Instant,
    to: Instant,
    value: T,
}

/// Polls the health check and the database concurrently.
struct HealthMonitor {
    stop: Arc<AtomicBool>,
    health: JoinHandle<Vec<Observation<Option<bool>>>>,
    database: JoinHandle<Vec<Observation<bool>>>,
}

impl HealthMonitor {
    fn start(database: Config, address: watch::Receiver<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        Self {
            health: tokio::spawn(watch_health(address, Arc::clone(&stop))),
            database: tokio::spawn(watch_database(database, Arc::clone(&stop))),
            stop,
        }
    }

    /// Asserts that whenever the database was up, or down, for longer than the allowed lag while the service was
    /// reachable, the health check reported it.
    async fn assert_accurate(self) {
        self.stop.store(true, Ordering::SeqCst);
        let (health, database) = (self.health.await.unwrap(), self.database.await.unwrap());
        let comparison = HealthComparison::with_lag(&health, &database, HEALTH_LAG_MAX + SCHEDULING_MARGIN);
        println!(
            "health was accurate {} times with the database up, {} with it down",
            comparison.serving, comparison.not_serving
        );
        assert_eq!(comparison.first_mismatch, None, "the health check lagged too long (time since the first poll)");
        assert!(
            comparison.serving > 0 && comparison.not_serving > 0,
            "no health check was comparable in one of the two states"
        );
        let is_right = |lag: &Duration| HealthComparison::with_lag(&health, &database, *lag).first_mismatch.is_none();
        let lag = (0..).map(|nth| POLL_INTERVAL * nth).find(is_right).unwrap();
        println!("the health check lagged by {lag:?} at most");
    }
}

/// Counts of accurate health checks, and the first inaccurate one.
#[derive(Default)]
struct HealthComparison {
    serving: usize,
    not_serving: usize,
    /// The time of the first check that was wrong beyond the allowed lag, since the first poll.
    first_mismatch: Option<Duration>,
}

impl HealthComparison {
    fn with_lag(health: &[Observation<Option<bool>>], database: &[Observation<bool>], lag: Duration) -> Self {
        let mut comparison = Self::default();
        for observation in health {
            let Some(reported) = observation.value else { continue };
            let since = observation.from.checked_sub(lag).unwrap();
            let during = |from: Instant, to: Instant| to >= since && from <= observation.to;
            let unreachable = health.iter().any(|other| other.value.is_none() && during(other.from, other.to));
            let mut actual_values =
                database.iter().filter(|probe| during(probe.from, probe.to)).map(|probe| probe.value);
            let Some(actual) = actual_values.next().filter(|actual| actual_values.all(|other| other == *actual)) else {
                continue;
            };
            // Gaps between the probes show that the machine was too busy to judge the health check.
            let stalled = database.windows(2).any(|pair| {
                during(pair[0].from, pair[1].from) && pair[1].from - pair[0].from > PROBE_TIMEOUT + SCHEDULING_MARGIN
            });
            if unreachable || stalled || health[0].from > since {
                continue;
            }
            match actual {
                _ if reported != actual => {
                    comparison.first_mismatch.get_or_insert(observation.from - health[0].from);
                }
                true => comparison.serving += 1,
                false => comparison.not_serving += 1,
            }
        }
        comparison
    }
}

/// Polls the health check until `stop`. The value is `None` while the service is unreachable.
async fn watch_health(address: watch::Receiver<String>, stop: Arc<AtomicBool>) -> Vec<Observation<Option<bool>>> {
    let mut observations = Vec::new();
    let mut connected = (String::new(), None);
    while !stop.load(Ordering::SeqCst) {
        let current = address.borrow().clone();
        if connected.0 != current {
            connected = (current.clone(), Some(HealthClient::new(channel(&current))));
        }
        let from = Instant::now();
        let client = connected.1.as_mut().unwrap();
        let checked = tokio::time::timeout(HANG, client.check(HealthCheckRequest::default())).await.unwrap();
        let value = checked.ok().map(|checked| checked.into_inner().status() == ServingStatus::Serving);
        observations.push(Observation { from, to: Instant::now(), value });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    observations
}

/// Polls the database until `stop`.
async fn watch_database(config: Config, stop: Arc<AtomicBool>) -> Vec<Observation<bool>> {
    let mut observations = Vec::new();
    let mut client = None;
    while !stop.load(Ordering::SeqCst) {
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
