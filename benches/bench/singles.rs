//! Comparisons that are not a rate of calls: deep pages, bulk changes, imports, fairness.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;
use issue_tracker::{
    db::embedded::Cluster,
    pb::{
        BulkUpdateStatusRequest, ImportChunk, ImportIssuesRequest, ImportOptions, ImportState, ListIssuesRequest,
        Status, import_issues_request, import_issues_response, import_service_client::ImportServiceClient,
        issue_service_client::IssueServiceClient,
    },
};
use tonic::{Request, transport::Channel};

use crate::{
    Args,
    dataset::{ISSUE_ID_SQL, issue_id},
    load,
    report::Single,
    service::Service,
    yardstick,
};

pub struct Comparison {
    pub name: &'static str,
    pub target: &'static str,
    pub compare: fn(&Bench<'_>) -> anyhow::Result<Single>,
}

pub struct Bench<'a> {
    pub cluster: &'a Cluster,
    pub service: &'a Service,
    pub dir: &'a Path,
    pub args: &'a Args,
}

pub const COMPARISONS: &[Comparison] = &[
    Comparison { name: "ListIssues page 2,000 / page 1", target: "<= 1.2, aim 1.0", compare: deep_page },
    Comparison { name: "BulkUpdateStatus 1,000 ids", target: "<= 1.5, aim 1.1", compare: bulk },
    Comparison { name: "ImportIssues", target: ">= 0.7, aim 0.95", compare: import },
    Comparison { name: "GetIssue p99 during an import / without", target: "<= 5", compare: fairness },
];

impl Bench<'_> {
    fn block_on<T>(&self, work: impl AsyncFnOnce(Channel) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let channel = Channel::from_shared(format!("http://{}", self.service.address))?.connect().await?;
            work(channel).await
        })
    }

    fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.service.token).parse()?);
        Ok(request)
    }
}

/// Medians in milliseconds, one call at a time.
fn deep_page(bench: &Bench<'_>) -> anyhow::Result<Single> {
    const CALLS: usize = 300;
    bench.block_on(async |channel| {
        let mut issues = IssueServiceClient::new(channel);
        // Page 2,000 of 50 begins behind 100,000 issues; a token does not depend on the size of the pages before it.
        let mut token = String::new();
        for _ in 0..100 {
            let request = ListIssuesRequest { page_size: 1_000, page_token: token, ..Default::default() };
            token = issues.list_issues(bench.request(request)?).await?.into_inner().next_page_token;
            ensure!(!token.is_empty(), "there are less than 100,000 issues");
        }
        let (mut first, mut deep) = (Vec::new(), Vec::new());
        for _ in 0..CALLS {
            for (page_token, latencies) in [(String::new(), &mut first), (token.clone(), &mut deep)] {
                let started = Instant::now();
                let request = ListIssuesRequest { page_token, ..Default::default() };
                let listed = issues.list_issues(bench.request(request)?).await?.into_inner();
                ensure!(listed.issues.len() == 50, "a page has 50 issues");
                latencies.push(started.elapsed());
            }
        }
        Ok(single("ms", median_ms(first), median_ms(deep)))
    })
}

/// Medians in milliseconds: the same issues, to and fro, so that each call changes all of them.
fn bulk(bench: &Bench<'_>) -> anyhow::Result<Single> {
    const CALLS: u32 = 20;
    let id = ISSUE_ID_SQL.replace('N', "g");
    let mut by_psql = Vec::new();
    for call in 0..CALLS {
        let (first, status) = (1 + call % 10 * 1_000, if call < 10 { 1 } else { 2 });
        let ids = format!("SELECT {id} FROM generate_series({first}, {first} + 999) g");
        let other = 3 - status;
        by_psql.push(yardstick::psql(
            bench.cluster,
            &format!(
                "SET session_replication_role = replica;
                 BEGIN;
                 UPDATE issues SET status = {status}, version = version + 1, update_time = now(), close_time = NULL WHERE id IN ({ids});
                 INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
                 SELECT id, version, reporter_id, 'status', '{other}', '{status}' FROM issues WHERE id IN ({ids});
                 COMMIT"
            ),
        )?);
    }
    // What it takes psql to start is not the statement's.
    let mut empty = Vec::new();
    for _ in 0..CALLS {
        empty.push(yardstick::psql(bench.cluster, "SELECT 1")?);
    }
    let by_service = bench.block_on(async |channel| {
        let mut issues = IssueServiceClient::new(channel);
        let mut latencies = Vec::new();
        for call in 0..CALLS {
            let first = 20_001 + call % 10 * 1_000;
            // Two in three have another status at first, all of them in the second half.
            let status = if call < 10 { Status::Open } else { Status::InProgress };
            let ids = (first..first + 1_000).map(|number| issue_id(number).to_string()).collect();
            let request = BulkUpdateStatusRequest { ids, status: status.into(), ..Default::default() };
            let started = Instant::now();
            let reply = issues.bulk_update_status(bench.request(request)?).await?.into_inner();
            if call >= 10 {
                ensure!(reply.changed_count == 1_000, "all issues change");
                latencies.push(started.elapsed());
            }
        }
        Ok(latencies)
    })?;
    Ok(single("ms", median_ms(by_psql.split_off(10)) - median_ms(empty), median_ms(by_service)))
}

/// Rows a second.
fn import(bench: &Bench<'_>) -> anyhow::Result<Single> {
    let rows = bench.args.import_rows();
    let (plain, copied) = (bench.dir.join("import.csv"), bench.dir.join("copy.csv"));
    write_files(&plain, &copied, rows)?;
    let took = yardstick::psql(
        bench.cluster,
        &format!(
            "\\copy issues (id, create_time, update_time, close_time, reporter_id, status, priority, title, description) FROM '{}' WITH (FORMAT csv)",
            copied.display()
        ),
    )?;
    let yardstick = rows as f64 / took.as_secs_f64();
    remove_imported(bench)?;
    bench.service.reset_peak_memory()?;
    let idle_kib = bench.service.memory_kib("VmRSS")?;
    let started = Instant::now();
    send_file(bench, &plain, rows)?;
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    let peak_kib = bench.service.memory_kib("VmHWM")?;
    remove_imported(bench)?;
    let mut single = single("rows/s", yardstick, rate);
    single.notes.push((
        format!("memory of the service during an import of {rows} rows"),
        format!("{} KiB above what it had before ({idle_kib} KiB)", peak_kib.saturating_sub(idle_kib)),
    ));
    Ok(single)
}

/// p99 in milliseconds.
fn fairness(bench: &Bench<'_>) -> anyhow::Result<Single> {
    let (plain, copied) = (bench.dir.join("import.csv"), bench.dir.join("copy.csv"));
    let rows = bench.args.import_rows();
    write_files(&plain, &copied, rows)?;
    let operation = &load::OPERATIONS[0];
    let duration = Duration::from_secs(3);
    let alone = load::spawn(operation, bench.service, bench.args.issues, duration)?;
    let import = std::thread::scope(|scope| {
        let import = scope.spawn(|| send_file(bench, &plain, rows));
        // It is under way when the load begins, and the load is over before it ends or soon after.
        std::thread::sleep(Duration::from_millis(300));
        let during = load::spawn(operation, bench.service, bench.args.issues, duration);
        let imported = import.join().map_err(|_| anyhow::anyhow!("the import panicked"))?;
        imported.and(during)
    })?;
    remove_imported(bench)?;
    let mut single = single("ms p99", f64::from(alone.p99_us) / 1e3, f64::from(import.p99_us) / 1e3);
    single.errors = alone.errors + import.errors;
    Ok(single)
}

/// The same rows for the service and, with all that the service adds, for psql.
fn write_files(plain: &Path, copied: &Path, rows: u64) -> anyhow::Result<()> {
    let (mut plain, mut copied) = (BufWriter::new(File::create(plain)?), BufWriter::new(File::create(copied)?));
    writeln!(plain, "title,description,priority,status")?;
    let reporter = crate::dataset::user_id(1);
    for row in 0..rows {
        let description =
            &"how to see it, and what should be seen instead, as far as anybody can tell "[..20 + (row % 50) as usize];
        let (priority, name) = [(1, "low"), (2, "medium"), (3, "high"), (4, "critical")][row as usize % 4];
        writeln!(plain, "Imported issue {row},\"{description}\",{name},open")?;
        let id = uuid::Uuid::now_v7();
        writeln!(
            copied,
            "{id},2026-01-01T00:00:00Z,2026-01-01T00:00:00Z,,{reporter},1,{priority},Imported issue {row},\"{description}\""
        )?;
    }
    plain.flush()?;
    Ok(copied.flush()?)
}

fn send_file(bench: &Bench<'_>, path: &Path, rows: u64) -> anyhow::Result<()> {
    const CHUNK_BYTES: usize = 256 * 1024;
    let file = std::fs::read(path)?;
    bench.block_on(async |channel| {
        let message = |message| ImportIssuesRequest { message: Some(message) };
        let options = message(import_issues_request::Message::Options(ImportOptions::default()));
        let chunks = (0..file.len().div_ceil(CHUNK_BYTES)).map(move |nth| {
            let start = nth * CHUNK_BYTES;
            let data = file[start..file.len().min(start + CHUNK_BYTES)].to_vec().into();
            message(import_issues_request::Message::Chunk(ImportChunk { offset: start as i64, data }))
        });
        let messages = tokio_stream::iter(std::iter::once(options).chain(chunks));
        let mut answers = ImportServiceClient::new(channel).import_issues(bench.request(messages)?).await?.into_inner();
        while let Some(answer) = answers.message().await? {
            if let Some(import_issues_response::Message::Summary(summary)) = answer.message {
                ensure!(summary.state() == ImportState::Committed, "the import is committed");
                ensure!(summary.created_count as u64 == rows, "all rows are in");
                return Ok(());
            }
        }
        anyhow::bail!("the import ended without a summary")
    })
}

/// What an import or psql has added, with the space it took.
fn remove_imported(bench: &Bench<'_>) -> anyhow::Result<()> {
    yardstick::psql(bench.cluster, "DELETE FROM issues WHERE title LIKE 'Imported issue %'")?;
    yardstick::psql(bench.cluster, "VACUUM issues")?;
    yardstick::psql(bench.cluster, "CHECKPOINT").map(drop)
}

fn single(unit: &'static str, yardstick: f64, service: f64) -> Single {
    Single { unit, yardstick, service, errors: 0, notes: Vec::new() }
}

fn median_ms(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default().as_secs_f64() * 1e3
}
