//! The long form of the patterns: measures what other users see during an abuse and in a control run, and the memory of the
//! service.
//!
//! In a control run a client that is as busy as the abusive one loads a sink instead. Both kinds of runs have a new service
//! process in each round, and take turns.

use std::{
    collections::BTreeMap,
    sync::{Mutex, Once, OnceLock},
    thread,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    sync::oneshot,
    time::{sleep, sleep_until},
};
use tonic::Status;

use super::{
    OTHERS, Other, Scene,
    control::{BusyClient, Busyness, Sink, runtime},
    process::ServiceProcess,
};
use crate::harness::Tracker;

/// How long another user waits between two calls.
const PAUSE: Duration = Duration::from_millis(20);
/// The least part of the ordinary calls that must succeed.
const SUCCESS_MIN: f64 = 0.995;
/// How many times the 99th percentile of a control run it may be during an abuse.
const P99_RATIO_MAX: f64 = 3.0;
/// The memory of the service that `docs/operations.md` documents.
const MEMORY_MAX_KIB: u64 = 400 * 1024;

/// The length of the long form.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    rounds: usize,
    duration: Duration,
}

impl Settings {
    /// Reads `ISSUE_TRACKER_ABUSE`: `long`, optionally followed by `:ROUNDS:SECONDS`. `None`: the short form.
    pub fn from_environment() -> Option<Self> {
        static SETTINGS: OnceLock<Option<Settings>> = OnceLock::new();
        *SETTINGS.get_or_init(|| {
            let text = std::env::var("ISSUE_TRACKER_ABUSE").ok()?;
            let numbers = text.strip_prefix("long").expect("ISSUE_TRACKER_ABUSE is not long");
            let mut numbers = numbers.split(':').skip(1).map(|number| number.parse().unwrap());
            let (rounds, seconds) = (numbers.next().unwrap_or(3), numbers.next().unwrap_or(5));
            Some(Self { rounds: rounds as usize, duration: Duration::from_secs(seconds) })
        })
    }
}

/// Runs a pattern in several rounds, prints its figures and asserts the limits.
pub async fn run(settings: Settings, args: &[&str], pattern: impl AsyncFn(&Scene)) {
    // Patterns share the processors, so that only one is measured at a time.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _turn = TURN.lock().await;
    let mut rounds = Vec::new();
    for nth in 0..settings.rounds {
        let (tracker, process) = ServiceProcess::start(args).await;
        let measuring = Measuring { duration: settings.duration, abuse: Mutex::default() };
        let scene = Scene::on(tracker, Some(measuring)).await;
        let mut control = None;
        if nth % 2 == 1 {
            control = Some(run_control(&scene, settings, mean_busyness(&rounds)).await);
        }
        process.reset_peak();
        pattern(&scene).await;
        let peak_kib = process.peak_kib();
        let abuse = scene.measuring.as_ref().unwrap().take();
        let control = match control {
            Some(control) => control,
            None => run_control(&scene, settings, abuse.busyness).await,
        };
        rounds.push(Round { abuse, control, peak_kib });
    }
    report(&rounds);
}

/// What a scene has measured.
pub struct Measuring {
    duration: Duration,
    abuse: Mutex<Option<Measured>>,
}

impl Measuring {
    /// Measures the calls of the other users while the abuse continues.
    pub async fn measure(&self, scene: &Scene) {
        let traffic = scene.abuser.traffic();
        let (began, cpu, before) = (Instant::now(), thread_cpu(), traffic.counts());
        let calls = call_as_others(scene, self.duration).await;
        let (elapsed, cpu) = (began.elapsed(), thread_cpu() - cpu);
        let busyness = Busyness::between(&before, &traffic.counts(), elapsed, cpu);
        let mut abuse = self.abuse.lock().unwrap();
        assert!(abuse.is_none(), "a pattern is measured twice");
        *abuse = Some(Measured { calls, busyness });
    }

    fn take(&self) -> Measured {
        self.abuse.lock().unwrap().take().expect("the pattern has not been measured")
    }
}

async fn run_control(scene: &Scene, settings: Settings, busyness: Busyness) -> Measured {
    let sink = Sink::start();
    let client = BusyClient::start(busyness, &sink);
    sleep(Duration::from_millis(500)).await;
    let calls = call_as_others(scene, settings.duration).await;
    Measured { calls, busyness: client.stop() }
}

/// The figures of one run.
struct Measured {
    calls: Calls,
    /// That of the client that abused the service or loaded the sink.
    busyness: Busyness,
}

struct Round {
    abuse: Measured,
    control: Measured,
    peak_kib: u64,
}

/// The outcomes of ordinary calls.
#[derive(Default)]
struct Calls {
    /// Those of successful calls, in ascending order.
    latencies: Vec<Duration>,
    failures: BTreeMap<String, usize>,
}

impl Calls {
    fn add(&mut self, latency: Duration, outcome: Result<(), Status>) {
        match outcome {
            Ok(()) => self.latencies.push(latency),
            Err(status) => {
                *self.failures.entry(format!("{:?}: {}", status.code(), status.message())).or_default() += 1;
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        for (failure, count) in other.failures {
            *self.failures.entry(failure).or_default() += count;
        }
    }

    fn failed(&self) -> usize {
        self.failures.values().sum()
    }

    /// Returns a quantile of the latencies in milliseconds.
    fn quantile_ms(&self, quantile: f64) -> f64 {
        let last = self.latencies.len().saturating_sub(1);
        let latency = self.latencies.get((last as f64 * quantile) as usize);
        latency.copied().unwrap_or_default().as_secs_f64() * 1e3
    }
}

/// Calls as the other users do, on a thread of its own: the time of a call has no part in which the abusive client computes.
async fn call_as_others(scene: &Scene, duration: Duration) -> Calls {
    let address = scene.tracker.address.clone();
    let others: Vec<_> =
        scene.others.iter().map(|other| (other.client.token.clone(), other.issue_id.clone())).collect();
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        let calls = runtime().block_on(async {
            let others = others.into_iter().map(|(token, issue_id)| {
                let channel = tonic::transport::Endpoint::try_from(format!("http://{address}")).unwrap();
                Other { client: Tracker::client_on(channel.connect_lazy(), &token), issue_id }
            });
            let each = join_all(others.enumerate().map(|(nth, other)| call_repeatedly(nth, other, duration))).await;
            each.into_iter().fold(Calls::default(), |mut all, calls| {
                all.merge(calls);
                all
            })
        });
        let _ = sender.send(calls);
    });
    let mut calls: Calls = receiver.await.unwrap();
    calls.latencies.sort_unstable();
    calls
}

async fn call_repeatedly(nth: usize, other: Other, duration: Duration) -> Calls {
    // Opens the connection.
    let _ = other.call(1).await;
    let mut calls = Calls::default();
    let began = Instant::now();
    sleep_until((began + PAUSE * nth as u32 / OTHERS as u32).into()).await;
    for call in nth.. {
        let call_began = Instant::now();
        let outcome = other.call(call).await;
        calls.add(call_began.elapsed(), outcome);
        if began.elapsed() > duration {
            break;
        }
        sleep(PAUSE).await;
    }
    calls
}

/// Returns the processor time of this thread.
pub fn thread_cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure outlives the call.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn mean_busyness(rounds: &[Round]) -> Busyness {
    let mean = |value: fn(&Busyness) -> f64| {
        rounds.iter().map(|round| value(&round.abuse.busyness)).sum::<f64>() / rounds.len() as f64
    };
    Busyness {
        connections: mean(|busyness| busyness.connections as f64) as usize,
        connections_per_second: mean(|busyness| busyness.connections_per_second),
        calls_per_second: mean(|busyness| busyness.calls_per_second),
        sent_per_second: mean(|busyness| busyness.sent_per_second),
        received_per_second: mean(|busyness| busyness.received_per_second),
        cpu: mean(|busyness| busyness.cpu),
    }
}

/// Prints a row of the table, and asserts the limits.
fn report(rounds: &[Round]) {
    static HEADER: Once = Once::new();
    HEADER.call_once(|| {
        println!("| pattern | success | control p50, p99 ms | abuse p50, p99 ms | p99 ratio | peak MiB | abusive client | control client |");
        println!("|---|---|---|---|---|---|---|---|");
    });
    let median_of = |value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let quantile_of = |quantile: f64| {
        let of = |side: fn(&Round) -> &Measured| median_of(&|round| side(round).calls.quantile_ms(quantile));
        (of(|round| &round.control), of(|round| &round.abuse))
    };
    let ((control_p50, abuse_p50), (control_p99, abuse_p99)) = (quantile_of(0.5), quantile_of(0.99));
    let ratio = abuse_p99 / control_p99;
    let failed: usize = rounds.iter().map(|round| round.abuse.calls.failed()).sum();
    let succeeded: usize = rounds.iter().map(|round| round.abuse.calls.latencies.len()).sum();
    let success = succeeded as f64 / (succeeded + failed) as f64;
    let peak_kib = rounds.iter().map(|round| round.peak_kib).max().unwrap_or_default();
    let client = |busyness: &Busyness| {
        format!(
            "{} connections, {:.0} calls/s, {:.0} + {:.0} KiB/s, {:.0} % CPU",
            busyness.connections,
            busyness.calls_per_second,
            busyness.sent_per_second / 1024.0,
            busyness.received_per_second / 1024.0,
            busyness.cpu * 100.0
        )
    };
    let name = thread::current().name().unwrap_or_default().trim_start_matches("abuse::").to_owned();
    let row = format!(
        "| {name} | {:.2} % of {} | {control_p50:.1}, {control_p99:.1} | {abuse_p50:.1}, {abuse_p99:.1} | {ratio:.2} | {} | {} | {} |",
        success * 100.0,
        succeeded + failed,
        peak_kib / 1024,
        client(&mean_busyness(rounds)),
        client(&rounds[rounds.len() - 1].control.busyness),
    );
    println!("{row}");
    let failures: Vec<_> = rounds.iter().map(|round| &round.abuse.calls.failures).collect();
    assert!(success >= SUCCESS_MIN, "{row}\n{failures:?}");
    assert!(ratio <= P99_RATIO_MAX, "{row}");
    assert!(peak_kib <= MEMORY_MAX_KIB, "{row}");
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}
