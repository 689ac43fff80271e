//! The service and its private database are killed again and again while many clients write.

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
    harness::{Form, serves},
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
/// How long health may say what is no longer so.
const TRUTH_AFTER: Duration = Duration::from_secs(2);
/// What a busy machine may add to that.
const TRUTH_MARGIN: Duration = Duration::from_secs(1);
/// How long the database is kept from coming back, once, so that health has to tell of it.
const LONG_OUTAGE: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(50);
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Service,
    Database,
    /// Killed whenever it comes back, for a while.
    DatabaseForLong,
}

/// Each kind of kill so often, in an order of the seed.
fn faults(form: Form, rng: &mut fastrand::Rng) -> Vec<Fault> {
    let services = std::iter::repeat_n(Fault::Service, form.pick(4, 50));
    let databases = std::iter::repeat_n(Fault::Database, form.pick(1, 18));
    let long = std::iter::repeat_n(Fault::DatabaseForLong, form.pick(1, 2));
    let mut faults: Vec<Fault> = services.chain(databases).chain(long).collect();
    rng.shuffle(&mut faults);
    faults
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_killed_every_acknowledged_write_is_there_once_and_health_tells_the_truth() {
    let form = Form::of_environment();
    let mut rng = form.rng();
    let dir = Dir::new();
    let data = dir.data();
    let command = || program(&["--data-dir", &data, "--bcrypt-cost", "4"]);
    let mut service = Service::start(&dir, command());
    assert_durable(&dir.database()).await;
    let (addresses, address) = watch::channel(service.address.clone());
    let watched = Watched::start(dir.database(), address.clone());
    let load = Load::start(&dir.database(), address, CLIENTS, &mut rng).await;
    load.acknowledges(100).await;

    let mut recoveries = Vec::new();
    for fault in faults(form, &mut rng) {
        tokio::time::sleep(Duration::from_millis(rng.u64(100..600))).await;
        let began = Instant::now();
        match fault {
            Fault::Service => {
                service.kill();
                if rng.u32(..4) == 0 {
                    // Once more, while it starts.
                    let mut half_started = Service::spawn(&dir, command());
                    tokio::time::sleep(Duration::from_millis(rng.u64(..500))).await;
                    half_started.kill();
                }
                service = Service::start(&dir, command());
                addresses.send_replace(service.address.clone());
            }
            Fault::Database => kill_database(&dir).await,
            Fault::DatabaseForLong => {
                while began.elapsed() < LONG_OUTAGE {
                    let _ = dir.server_pid().is_some_and(|pid| signal(pid, libc::SIGKILL));
                    tokio::time::sleep(TICK).await;
                }
            }
        }
        // Now and then the next one comes while this one is not yet over.
        if rng.u32(..5) > 0 {
            recoveries.push((fault, load.acknowledged_after(began).await));
        }
    }
    load.acknowledged_after(Instant::now()).await;
    // Long enough for health to be held to it.
    tokio::time::sleep(TRUTH_AFTER + TRUTH_MARGIN * 2).await;
    let made = load.finish().await;
    report(&recoveries, &made);
    watched.assert_truth().await;
    assert!(made.iter().any(|made| made.tries > 1 && made.reply.is_some()), "no call was ever in danger");

    assert_eq!(service.stop().code(), Some(0), "{}", service.log());
    let mut service = Service::start(&dir, command());
    verify(&dir.database(), &service.channel(), made).await;
    assert_eq!(service.stop().code(), Some(0));
    service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_tells_of_a_database_that_neither_answers_nor_dies() {
    let external = External::start(Durability::Throwaway);
    let service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let channel = service.channel();
    eventually("it serves", async || serves(&channel).await).await;
    for _ in 0..Form::of_environment().pick(2, 10) {
        let frozen = Frozen::freeze(external.cluster.server_pid());
        tokio::time::sleep(TRUTH_AFTER + TRUTH_MARGIN).await;
        let told = serves(&channel).await;
        drop(frozen);
        assert!(!told, "it says that it serves, {:?} after the database has stopped", TRUTH_AFTER + TRUTH_MARGIN);
        eventually("it serves again", async || serves(&channel).await).await;
    }
}

/// A server none of whose processes does anything until this is dropped.
struct Frozen(Vec<u32>);

impl Frozen {
    fn freeze(server: u32) -> Self {
        let mut frozen = Self(vec![server]);
        // First, so that it makes no more.
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
    eventually("there is a database to kill", killed).await;
}

/// A kill may not cost an acknowledged commit, and the machine's failure neither.
async fn assert_durable(database: &Config) {
    let rows = session(database).await;
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        let value: String = rows.query_one("SELECT current_setting($1)", &[&setting]).await.unwrap().get(0);
        assert_eq!(value, "on", "{setting}");
    }
}

fn report(recoveries: &[(Fault, Duration)], made: &[crate::load::Made]) {
    let acknowledged = made.iter().filter(|made| made.reply.is_some()).count();
    let retried = made.iter().filter(|made| made.tries > 1).count();
    println!("{} mutations: {acknowledged} acknowledged, {retried} of all only after a retry", made.len());
    for fault in [Fault::Service, Fault::Database] {
        let mut times: Vec<u128> =
            recoveries.iter().filter(|(of, _)| *of == fault).map(|(_, time)| time.as_millis()).collect();
        times.sort_unstable();
        if let (Some(min), Some(max)) = (times.first(), times.last()) {
            let median = times[times.len() / 2];
            println!("{fault:?}: back after {min} / {median} / {max} ms (min / median / max of {})", times.len());
        }
    }
}

/// What was seen at a moment, from when it was asked until it was answered.
#[derive(Clone, Copy, Debug)]
struct Seen<T> {
    from: Instant,
    to: Instant,
    what: T,
}

/// Health as a client sees it, and the database as it is, side by side.
struct Watched {
    stop: Arc<AtomicBool>,
    health: JoinHandle<Vec<Seen<Option<bool>>>>,
    database: JoinHandle<Vec<Seen<bool>>>,
}

impl Watched {
    fn start(database: Config, address: watch::Receiver<String>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        Self {
            health: tokio::spawn(watch_health(address, Arc::clone(&stop))),
            database: tokio::spawn(watch_database(database, Arc::clone(&stop))),
            stop,
        }
    }

    /// Whenever the database has been up, or away, for longer than health may lag behind, and the service was there
    /// throughout, health has said so.
    async fn assert_truth(self) {
        self.stop.store(true, Ordering::SeqCst);
        let (health, database) = (self.health.await.unwrap(), self.database.await.unwrap());
        let judged = Judged::with_lag(&health, &database, TRUTH_AFTER + TRUTH_MARGIN);
        println!(
            "health was right {} times with the database there, {} with it away",
            judged.serving, judged.not_serving
        );
        assert_eq!(judged.wrong, None, "after the first poll it was wrong for longer than it may");
        assert!(judged.serving > 0 && judged.not_serving > 0, "health was never asked when it mattered");
        let is_right = |lag: &Duration| Judged::with_lag(&health, &database, *lag).wrong.is_none();
        let lag = (0..).map(|nth| POLL_INTERVAL * nth).find(is_right).unwrap();
        println!("it was never behind for more than {lag:?}");
    }
}

/// What health said against what was so.
#[derive(Default)]
struct Judged {
    serving: usize,
    not_serving: usize,
    /// When it said first what had not been so for longer than it may lag behind, after the first poll.
    wrong: Option<Duration>,
}

impl Judged {
    fn with_lag(health: &[Seen<Option<bool>>], database: &[Seen<bool>], lag: Duration) -> Self {
        let mut judged = Self::default();
        for seen in health {
            let Some(told) = seen.what else { continue };
            let since = seen.from.checked_sub(lag).unwrap();
            let during = |from: Instant, to: Instant| to >= since && from <= seen.to;
            let silent = health.iter().any(|other| other.what.is_none() && during(other.from, other.to));
            let mut truths = database.iter().filter(|probe| during(probe.from, probe.to)).map(|probe| probe.what);
            let Some(truth) = truths.next().filter(|truth| truths.all(|other| other == *truth)) else { continue };
            // Who cannot even ask in time has a machine on which nothing is done in time.
            let stood_still = database.windows(2).any(|pair| {
                during(pair[0].from, pair[1].from) && pair[1].from - pair[0].from > PROBE_TIMEOUT + TRUTH_MARGIN
            });
            if silent || stood_still || health[0].from > since {
                continue;
            }
            match truth {
                _ if told != truth => {
                    judged.wrong.get_or_insert(seen.from - health[0].from);
                }
                true => judged.serving += 1,
                false => judged.not_serving += 1,
            }
        }
        judged
    }
}

/// None: the service is not there.
async fn watch_health(address: watch::Receiver<String>, stop: Arc<AtomicBool>) -> Vec<Seen<Option<bool>>> {
    let mut seen = Vec::new();
    let mut connected = (String::new(), None);
    while !stop.load(Ordering::SeqCst) {
        let newest = address.borrow().clone();
        if connected.0 != newest {
            connected = (newest.clone(), Some(HealthClient::new(channel(&newest))));
        }
        let from = Instant::now();
        let client = connected.1.as_mut().unwrap();
        let checked = tokio::time::timeout(HANG, client.check(HealthCheckRequest::default())).await.unwrap();
        let what = checked.ok().map(|checked| checked.into_inner().status() == ServingStatus::Serving);
        seen.push(Seen { from, to: Instant::now(), what });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    seen
}

async fn watch_database(config: Config, stop: Arc<AtomicBool>) -> Vec<Seen<bool>> {
    let mut seen = Vec::new();
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
        let what = matches!(tokio::time::timeout(PROBE_TIMEOUT, probe).await, Ok(Some(_)));
        if !what {
            client = None;
        }
        seen.push(Seen { from, to: Instant::now(), what });
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    seen
}
