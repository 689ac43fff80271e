//! Goodput and latency at ten times the load that the service can sustain.

use std::time::{Duration, Instant};

use anyhow::Context;
use issue_tracker::pb::{LoginRequest, LoginResponse};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::{
    client::{Connection, Rejected},
    comparisons::{Bench, single},
    load::{self, Call, Caller, Load, Operation},
    results::{Outcome, Single, Table},
    service::{PASSWORD, USERNAME},
};

const OVERLOAD: f64 = 10.0;
const TICK: Duration = Duration::from_millis(1);
const PROBE_INTERVAL: Duration = Duration::from_millis(200);

/// An operation, and how its load is increased.
pub struct Overload {
    pub operation: Operation,
    /// Whether to send ten times the rate of calls, regardless of earlier calls. Otherwise ten times the clients call,
    /// each of which waits for the retry delay after a rejection.
    pub by_rate: bool,
}

const MANY: Operation = Operation {
    name: "",
    target: ">= 0.9",
    call: Call::GetIssue,
    request_ids: false,
    script: "",
    triggers_off: false,
    pgbench_clients: 0,
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
            // The number of concurrent searches that the pool of the benchmark allows.
            in_flight: 2,
            ..MANY
        },
        by_rate: true,
    },
];

/// Adds goodput and p99 under overload, with the sustainable load as the baseline.
pub fn run(bench: &Bench<'_>, table: &mut Table) -> anyhow::Result<()> {
    for overload in OVERLOADS.iter().filter(|overload| bench.args.includes(overload.operation.name)) {
        let operation = &overload.operation;
        let rounds = bench.args.in_rounds(operation.name, || {
            let sustained = load::run(operation, bench.service, bench.args.duration())?;
            let load = match overload.by_rate {
                true => Load { rate: sustained.per_second * OVERLOAD, ..Load::of(operation) },
                false => Load { in_flight: (operation.in_flight as f64 * OVERLOAD) as usize, ..Load::of(operation) },
            };
            let overloaded = load::run_with(operation, load, bench.service, bench.args.duration())?;
            Ok((sustained, overloaded))
        })?;
        table.add_single(operation.name, operation.target, &rounds.iter().map(goodput).collect::<Vec<_>>());
        let name = format!("{}: p99", operation.name);
        table.add_single(&name, "", &rounds.iter().map(p99).collect::<Vec<_>>());
    }
    Ok(())
}

fn goodput((sustained, overloaded): &(Outcome, Outcome)) -> Single {
    let errors = sustained.errors + overloaded.errors;
    Single { errors, ..single("calls/s", sustained.per_second, overloaded.per_second) }
}

fn p99((sustained, overloaded): &(Outcome, Outcome)) -> Single {
    single("ms", f64::from(sustained.p99_us) / 1e3, f64::from(overloaded.p99_us) / 1e3)
}

/// The result of a call.
pub enum CallResult {
    /// A correct response, with the latency in microseconds.
    Succeeded(u32),
    /// A rejection, with the retry delay.
    Rejected(Duration),
    Wrong(anyhow::Error),
}

pub async fn timed_call(caller: &mut Caller) -> CallResult {
    let started = Instant::now();
    match caller.call().await {
        Ok(()) => CallResult::Succeeded(started.elapsed().as_micros() as u32),
        Err(error) => match error.downcast::<Rejected>() {
            Ok(rejected) => CallResult::Rejected(rejected.retry_after),
            Err(error) => CallResult::Wrong(error),
        },
    }
}

/// Makes calls at a fixed rate for `duration`. Returns the latencies of the successful calls in microseconds, and the
/// number of wrong responses.
pub async fn at_rate(
    operation: &'static Operation,
    connections: &[Connection],
    issues: u32,
    rate: f64,
    duration: Duration,
) -> anyhow::Result<(Vec<u32>, u64)> {
    let started = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    let mut started_calls = 0;
    while started.elapsed() < duration {
        while (started_calls as f64) < rate * started.elapsed().as_secs_f64() {
            let connection = connections[started_calls % connections.len()].clone();
            let mut caller = Caller::new(operation, connection, issues, 0);
            calls.spawn(async move { timed_call(&mut caller).await });
            started_calls += 1;
        }
        tokio::time::sleep(TICK).await;
    }
    let (mut latencies, mut rejected, mut wrong) = (Vec::new(), 0, 0);
    while let Some(result) = calls.join_next().await {
        match result? {
            CallResult::Succeeded(latency) => latencies.push(latency),
            CallResult::Rejected(_) => rejected += 1,
            CallResult::Wrong(error) => {
                if wrong == 0 {
                    eprintln!("{}: {error:#}", operation.name);
                }
                wrong += 1;
            }
        }
    }
    eprintln!("{started_calls} calls: {} succeeded, {rejected} rejected", latencies.len());
    Ok((latencies, wrong))
}

/// Makes health checks and logins until `end`. Returns the number of failures.
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
        let login_result: anyhow::Result<LoginResponse> =
            connection.call("/issuetracker.v1.AuthService/Login", &request).await;
        failures += u64::from(login_result.is_err());
        login.push(started.elapsed());
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
    let slowest = |times: Vec<Duration>| times.into_iter().max().context("no probe was made");
    eprintln!(
        "slowest health check: {:?}, slowest login: {:?}, failures: {failures}",
        slowest(health)?,
        slowest(login)?
    );
    Ok(failures)
}
