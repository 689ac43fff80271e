//! Ten times the load that the service can carry: how much of its work it still does, and how long that takes.

use std::time::{Duration, Instant};

use anyhow::Context;
use issue_tracker::pb::{LoginRequest, LoginResponse};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::{
    client::{Connection, Refused},
    comparisons::{Bench, single},
    load::{self, Call, Caller, Load, Operation},
    results::{Outcome, Single, Table},
    service::{PASSWORD, USERNAME},
};

const OVERLOAD: f64 = 10.0;
const TICK: Duration = Duration::from_millis(1);
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// What is offered beyond what can be carried.
pub struct Overload {
    pub operation: Operation,
    /// Ten times the rate of calls, whatever becomes of those before; or else ten times the clients, which wait as they
    /// are told.
    pub by_rate: bool,
}

const MANY: Operation = Operation {
    name: "",
    target: ">= 0.9",
    call: Call::GetIssue,
    request_ids: false,
    script: "",
    triggers_off: false,
    yardstick_clients: 0,
    in_flight: 512,
    connections: 32,
    by_latency: false,
};

pub const OVERLOADS: &[Overload] = &[
    Overload { operation: Operation { name: "Overload: GetIssue, ten times the clients", ..MANY }, by_rate: false },
    Overload {
        operation: Operation { name: "Overload: CreateIssue, ten times the clients", call: Call::CreateIssue, ..MANY },
        by_rate: false,
    },
    Overload {
        operation: Operation {
            name: "Overload: searches, ten times the rate",
            call: Call::Search,
            // As many as are made at once with the benchmark's pool.
            in_flight: 2,
            ..MANY
        },
        by_rate: true,
    },
];

/// Goodput and p99 under overload, beside those of the load that can be carried.
pub fn run(bench: &Bench<'_>, table: &mut Table) -> anyhow::Result<()> {
    for overload in OVERLOADS.iter().filter(|overload| bench.args.asks_for(overload.operation.name)) {
        let operation = &overload.operation;
        let rounds = bench.args.in_rounds(operation.name, || {
            let carried = load::run(operation, bench.service, bench.args.duration())?;
            let load = match overload.by_rate {
                true => Load { rate: carried.per_second * OVERLOAD, ..Load::of(operation) },
                false => Load { in_flight: (operation.in_flight as f64 * OVERLOAD) as usize, ..Load::of(operation) },
            };
            let overloaded = load::run_with(operation, load, bench.service, bench.args.duration())?;
            Ok((carried, overloaded))
        })?;
        table.add_single(operation.name, operation.target, &rounds.iter().map(goodput).collect::<Vec<_>>());
        let name = format!("{}: p99", operation.name);
        table.add_single(&name, "", &rounds.iter().map(p99).collect::<Vec<_>>());
    }
    Ok(())
}

fn goodput((carried, overloaded): &(Outcome, Outcome)) -> Single {
    let errors = carried.errors + overloaded.errors;
    Single { errors, ..single("calls/s", carried.per_second, overloaded.per_second) }
}

fn p99((carried, overloaded): &(Outcome, Outcome)) -> Single {
    single("ms", f64::from(carried.p99_us) / 1e3, f64::from(overloaded.p99_us) / 1e3)
}

/// What became of a call.
pub enum Fate {
    /// Right, after so many microseconds.
    Done(u32),
    /// And asked to stay away for so long.
    Refused(Duration),
    Wrong(anyhow::Error),
}

pub async fn fate_of(caller: &mut Caller) -> Fate {
    let started = Instant::now();
    match caller.call().await {
        Ok(()) => Fate::Done(started.elapsed().as_micros() as u32),
        Err(error) => match error.downcast::<Refused>() {
            Ok(refused) => Fate::Refused(refused.retry_after),
            Err(error) => Fate::Wrong(error),
        },
    }
}

/// Calls at a rate, each without regard to the others, until the time is over.
pub async fn at_rate(
    operation: &'static Operation,
    connections: &[Connection],
    issues: u32,
    rate: f64,
    duration: Duration,
) -> anyhow::Result<(Vec<u32>, u64)> {
    let started = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    let mut begun = 0;
    while started.elapsed() < duration {
        while (begun as f64) < rate * started.elapsed().as_secs_f64() {
            let connection = connections[begun % connections.len()].clone();
            let mut caller = Caller::new(operation, connection, issues, 0);
            calls.spawn(async move { fate_of(&mut caller).await });
            begun += 1;
        }
        tokio::time::sleep(TICK).await;
    }
    let (mut latencies, mut refused, mut wrong) = (Vec::new(), 0, 0);
    while let Some(fate) = calls.join_next().await {
        match fate? {
            Fate::Done(latency) => latencies.push(latency),
            Fate::Refused(_) => refused += 1,
            Fate::Wrong(error) => {
                if wrong == 0 {
                    eprintln!("{}: {error:#}", operation.name);
                }
                wrong += 1;
            }
        }
    }
    eprintln!("{begun} calls: {} done, {refused} refused", latencies.len());
    Ok((latencies, wrong))
}

/// Asks for health and signs in again and again; answers how often one of these failed.
pub async fn probe(mut connection: Connection, end: Instant) -> anyhow::Result<u64> {
    let (mut health, mut login) = (Vec::new(), Vec::new());
    let mut failures = 0;
    while Instant::now() < end {
        let started = Instant::now();
        let checked: anyhow::Result<HealthCheckResponse> =
            connection.call("/grpc.health.v1.Health/Check", &HealthCheckRequest::default()).await;
        failures += u64::from(!checked.is_ok_and(|checked| checked.status == 1));
        health.push(started.elapsed());
        let started = Instant::now();
        let request =
            LoginRequest { username: USERNAME.to_owned(), password: PASSWORD.to_owned(), ..Default::default() };
        let signed_in: anyhow::Result<LoginResponse> =
            connection.call("/issuetracker.v1.AuthService/Login", &request).await;
        failures += u64::from(signed_in.is_err());
        login.push(started.elapsed());
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
    let most = |times: Vec<Duration>| times.into_iter().max().context("nothing was asked");
    eprintln!("meanwhile health took {:?} at most, a login {:?}; {failures} failed", most(health)?, most(login)?);
    Ok(failures)
}
