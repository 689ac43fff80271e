//! Kills the service and its embedded database repeatedly while many clients write.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_postgres::Config;

use crate::{
    harness::Settings,
    health::{HealthMonitor, LAG_MAX, SCHEDULING_MARGIN},
    load::Load,
    support::{
        bounds::TICK,
        database::session,
        eventually::eventually,
        process::{Dir, signal},
        service::{Service, program},
    },
    verify::verify,
};

const CLIENTS: usize = 16;
/// The length of an outage that the health check must report.
const OUTAGE: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Service,
    Database,
    /// The database is killed whenever it restarts, for [`OUTAGE`].
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
    let monitor = HealthMonitor::of_database(dir.database(), address.clone());
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
    tokio::time::sleep(LAG_MAX + SCHEDULING_MARGIN * 2).await;
    let mutations = load.finish().await;
    print_report(&recoveries, &mutations);
    let comparison = monitor.finish().await;
    assert!(
        comparison.serving > 0 && comparison.not_serving > 0,
        "no health check was comparable in one of the two states"
    );
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
