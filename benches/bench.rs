//! Compares the service with a baseline: pgbench and psql do the same work in turns with it, in one run.
//!
//! `cargo bench` prints one table of ratios; see `benches/README.md`.

#[path = "bench/baseline.rs"]
mod baseline;
#[path = "bench/client.rs"]
mod client;
#[path = "bench/comparisons.rs"]
mod comparisons;
#[path = "bench/dataset.rs"]
mod dataset;
#[path = "bench/large_dataset.rs"]
mod large_dataset;
#[path = "bench/load.rs"]
mod load;
#[path = "bench/overload.rs"]
mod overload;
#[path = "bench/results.rs"]
mod results;
#[path = "bench/service.rs"]
mod service;

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Parser;
use issue_tracker::postgres::{Cluster, Durability};

use comparisons::Bench;
use results::Table;
use service::Service;

/// Compares the service with pgbench and psql.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// Run fewer and shorter rounds and a smaller import, about two minutes in total.
    #[arg(long)]
    quick: bool,
    /// Number of issues in the data set, each with 3 comments and 2 labels.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(110_000..=5_000_000))]
    issues: u32,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Run only operations whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Rounds of each operation, of which the median is reported. Default: 3, with --quick 1.
    #[arg(long)]
    rounds: Option<usize>,
    /// Cargo passes this to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 1 } else { 3 })
    }

    /// Returns the duration of each side of a round.
    fn duration(&self) -> Duration {
        Duration::from_secs(if self.quick { 3 } else { 10 })
    }

    /// Returns whether to run an operation.
    fn includes(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// Returns whether to run an operation that takes minutes: `--quick` skips it, and `--only` must match the start of
    /// its name.
    fn includes_slow(&self, name: &str) -> bool {
        if self.only.is_empty() { !self.quick } else { name.starts_with(&self.only) }
    }

    fn in_rounds<T>(&self, name: &str, mut round: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
        let rounds = self.rounds();
        (1..=rounds)
            .map(|nth| {
                eprintln!("{name} {nth}/{rounds}");
                round()
            })
            .collect()
    }

    fn import_rows(&self) -> u64 {
        if self.quick { 100_000 } else { 1_000_000 }
    }
}

fn main() -> anyhow::Result<()> {
    // The load client is this program, started as a separate process.
    if let Some(task) = std::env::var_os(load::TASK_VARIABLE) {
        return load::main(&task.into_string().unwrap_or_default());
    }
    let args = Args::parse();
    let dir = Directory::new()?;
    let cluster = Cluster::start(&dir.0.join("data"), Durability::Durable)?;
    let service = Service::start(&cluster, &dir.0, "issue_tracker", args.issues)?;
    let bench = Bench { cluster: &cluster, service: &service, dir: &dir.0, args: &args };

    let mut table = Table::default();
    let memory = comparisons::MEMORY.iter().filter(|comparison| args.includes_slow(comparison.name));
    let others = comparisons::COMPARISONS.iter().filter(|comparison| args.includes(comparison.name));
    for comparison in memory.chain(others) {
        let rounds = args.in_rounds(comparison.name, || (comparison.compare)(&bench))?;
        table.add_single(comparison.name, comparison.target, &rounds);
    }
    for operation in load::OPERATIONS.iter().filter(|operation| args.includes(operation.name)) {
        let rounds = args.in_rounds(operation.name, || {
            Ok((baseline::pgbench(&bench, operation)?, load::run(operation, &service, args.duration())?))
        })?;
        table.add(operation, &rounds);
    }
    overload::run(&bench, &mut table)?;
    large_dataset::run(&bench, &mut table)?;
    service.stop()?;
    cluster.stop()?;
    if args.json {
        table.print_json()
    } else {
        table.print()
    }
    table.errors().map_or(Ok(()), |errors| Err(anyhow::anyhow!("{errors} calls failed, so the figures are invalid")))
}

/// A temporary directory, removed on drop.
struct Directory(PathBuf);

impl Directory {
    fn new() -> anyhow::Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let path = std::env::temp_dir().join(format!("issue-tracker-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).context("cannot create a temporary directory")?;
        // PostgreSQL's programs may run as another user.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
