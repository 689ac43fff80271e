//! Comparisons other than call rates: deep pages, bulk updates, imports, exports, memory and fairness.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::ensure;
use issue_tracker::{
    pb::{
        BulkUpdateStatusRequest, ExportIssuesRequest, ImportChunk, ImportIssuesRequest, ImportMode, ImportOptions,
        ImportState, ImportSummary, ListIssuesRequest, OnExisting, Status, import_issues_request,
        import_issues_response, import_service_client::ImportServiceClient, issue_service_client::IssueServiceClient,
    },
    postgres::Cluster,
};
use tonic::{Request, transport::Channel};

use crate::{
    Args, baseline,
    dataset::{ISSUE_ID_SQL, issue_id},
    load,
    results::{Single, median},
    service::Service,
};

pub struct Comparison {
    pub name: &'static str,
    pub target: &'static str,
    pub compare: fn(&Bench<'_>) -> anyhow::Result<Single>,
}

/// The service under test and the settings of the run.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    pub cluster: &'a Cluster,
    pub service: &'a Service,
    pub dir: &'a Path,
    pub args: &'a Args,
}

pub const COMPARISONS: &[Comparison] = &[
    Comparison { name: "Memory, idle", target: "< 32 MiB", compare: idle_memory },
    Comparison { name: "ListIssues page 2,000 / page 1", target: "<= 1.2, aim 1.0", compare: deep_page },
    Comparison { name: "BulkUpdateStatus 1,000 ids", target: "<= 1.5, aim 1.1", compare: bulk },
    Comparison { name: "ImportIssues", target: ">= 0.7, aim 0.95", compare: |bench| import(bench, ImportMode::Atomic) },
    Comparison {
        name: "ImportIssues SKIP_INVALID",
        target: "",
        compare: |bench| import(bench, ImportMode::SkipInvalid),
    },
    Comparison { name: "ImportIssues ON_EXISTING_UPDATE", target: "", compare: import_updates },
    Comparison { name: "ExportIssues", target: ">= 0.6", compare: export },
    Comparison { name: "GetIssue p99 during an import / without", target: "<= 5", compare: fairness },
];

/// Memory comparisons. They run first, before any other call. A million rows take a minute.
pub const MEMORY: &[Comparison] = &[
    Comparison {
        name: "Memory above idle, import of 200,000 rows",
        target: "<= 64 MiB",
        compare: |bench| import_memory(bench, 200_000),
    },
    Comparison {
        name: "Memory above idle, import of 1,000,000 rows",
        target: "<= 64 MiB",
        compare: |bench| import_memory(bench, 1_000_000),
    },
];

impl Bench<'_> {
    pub fn block_on<T>(&self, work: impl AsyncFnOnce(Channel) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let channel = Channel::from_shared(format!("http://{}", self.service.address))?.connect().await?;
            work(channel).await
        })
    }

    pub fn request<T>(&self, message: T) -> anyhow::Result<Request<T>> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.service.token).parse()?);
        Ok(request)
    }
}

/// Compares page 2,000 with page 1. Medians in milliseconds, one call at a time.
fn deep_page(bench: &Bench<'_>) -> anyhow::Result<Single> {
    const CALLS: usize = 300;
    bench.block_on(async |channel| {
        let mut issues = IssueServiceClient::new(channel);
        // Page 2,000 of 50 issues starts after 100,000 issues. A token is independent of the size of earlier pages.
        let mut token = String::new();
        for _ in 0..100 {
            let request = ListIssuesRequest { page_size: 1_000, page_token: token, ..Default::default() };
            token = issues.list_issues(bench.request(request)?).await?.into_inner().next_page_token;
            ensure!(!token.is_empty(), "there are fewer than 100,000 issues");
        }
        let (mut first, mut deep) = (Vec::new(), Vec::new());
        for _ in 0..CALLS {
            for (page_token, latencies) in [(String::new(), &mut first), (token.clone(), &mut deep)] {
                let started = Instant::now();
                let request = ListIssuesRequest { page_token, ..Default::default() };
                let listed = issues.list_issues(bench.request(request)?).await?.into_inner();
                ensure!(listed.issues.len() == 50, "a page does not have 50 issues");
                latencies.push(started.elapsed());
            }
        }
        Ok(single("ms", median_ms(first), median_ms(deep)))
    })
}

/// Compares medians in milliseconds. The calls alternate the status of the same issues, so that each changes all of
/// them.
fn bulk(bench: &Bench<'_>) -> anyhow::Result<Single> {
    const CALLS: u32 = 20;
    let id = ISSUE_ID_SQL.replace('N', "g");
    let mut by_psql = Vec::new();
    for call in 0..CALLS {
        let (first, status) = (1 + call % 10 * 1_000, if call < 10 { 1 } else { 2 });
        let ids = format!("SELECT {id} FROM generate_series({first}, {first} + 999) g");
        let other = 3 - status;
        by_psql.push(baseline::psql(
            bench,
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
    // The start of psql is measured separately and subtracted.
    let mut empty = Vec::new();
    for _ in 0..CALLS {
        empty.push(baseline::psql(bench, "SELECT 1")?);
    }
    let by_service = bench.block_on(async |channel| {
        let mut issues = IssueServiceClient::new(channel);
        let mut latencies = Vec::new();
        for call in 0..CALLS {
            let first = 20_001 + call % 10 * 1_000;
            // In the first ten calls only two thirds of the issues change; only the later calls are measured.
            let status = if call < 10 { Status::Open } else { Status::InProgress };
            let ids = (first..first + 1_000).map(|number| issue_id(number).to_string()).collect();
            let request = BulkUpdateStatusRequest { ids, status: status.into(), ..Default::default() };
            let started = Instant::now();
            let reply = issues.bulk_update_status(bench.request(request)?).await?.into_inner();
            if call >= 10 {
                ensure!(reply.changed_count == 1_000, "not all issues changed");
                latencies.push(started.elapsed());
            }
        }
        Ok(latencies)
    })?;
    Ok(single("ms", median_ms(by_psql.split_off(10)) - median_ms(empty), median_ms(by_service)))
}

/// Compares rows per second with `\\copy`.
fn import(bench: &Bench<'_>, mode: ImportMode) -> anyhow::Result<Single> {
    let rows = bench.args.import_rows();
    let (service_file, psql_file) = (bench.dir.join("import.csv"), bench.dir.join("copy.csv"));
    write_files(&service_file, &psql_file, rows)?;
    let elapsed = baseline::psql(
        bench,
        &format!(
            "\\copy issues (id, create_time, update_time, close_time, reporter_id, status, priority, title, description, import_id) FROM '{}' WITH (FORMAT csv)",
            psql_file.display()
        ),
    )?;
    let baseline_rate = rows as f64 / elapsed.as_secs_f64();
    remove_imported(bench)?;
    let started = Instant::now();
    let summary = send_file(bench, &service_file, ImportOptions { mode: mode.into(), ..Default::default() })?;
    ensure!(summary.created_count as u64 == rows, "not all rows were created");
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    remove_imported(bench)?;
    Ok(single("rows/s", baseline_rate, rate))
}

/// Compares rows per second of a file that changes the title of each issue. psql copies the file into a temporary table
/// and writes the changes and their history from there.
fn import_updates(bench: &Bench<'_>) -> anyhow::Result<Single> {
    let rows = bench.args.import_rows() / 5;
    let path = bench.dir.join("update.csv");
    let write_file = |title: &str| {
        let mut file = BufWriter::new(File::create(&path)?);
        writeln!(file, "external_id,title")?;
        for row in 0..rows {
            writeln!(file, "benchmark {row},Imported issue {row} {title}")?;
        }
        file.flush()
    };
    write_file("as it was")?;
    send_file(bench, &path, ImportOptions::default())?;
    write_file("as psql has it")?;
    let copy = format!("\\copy wanted FROM '{}' WITH (FORMAT csv, HEADER)", path.display());
    let elapsed = baseline::psql_session(
        bench,
        &[
            "SET session_replication_role = replica",
            "CREATE TEMP TABLE wanted (external_id text, title text)",
            &copy,
            "ANALYZE wanted",
            "BEGIN",
            "INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
             SELECT i.id, i.version + 1, i.reporter_id, 'title', i.title, w.title
             FROM wanted w JOIN issues i ON i.external_id = w.external_id WHERE i.title <> w.title",
            "UPDATE issues i SET title = w.title, version = version + 1, update_time = now()
             FROM wanted w WHERE i.external_id = w.external_id AND i.title <> w.title",
            "COMMIT",
        ],
    )?;
    write_file("as the service has it")?;
    let options = ImportOptions { on_existing: OnExisting::Update.into(), ..Default::default() };
    let started = Instant::now();
    let summary = send_file(bench, &path, options)?;
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    ensure!(summary.updated_count as u64 == rows, "not all rows updated an issue");
    remove_imported(bench)?;
    Ok(single("rows/s", rows as f64 / elapsed.as_secs_f64(), rate))
}

fn idle_memory(bench: &Bench<'_>) -> anyhow::Result<Single> {
    Ok(memory(bench.service.idle_kib))
}

/// Measures the peak memory during an import, minus the idle memory.
fn import_memory(bench: &Bench<'_>, rows: u64) -> anyhow::Result<Single> {
    let (service_file, psql_file) = (bench.dir.join("import.csv"), bench.dir.join("copy.csv"));
    write_files(&service_file, &psql_file, rows)?;
    bench.service.reset_peak_memory()?;
    send_file(bench, &service_file, ImportOptions::default())?;
    let peak_kib = bench.service.memory_kib("VmHWM")?;
    remove_imported(bench)?;
    Ok(memory(peak_kib.saturating_sub(bench.service.idle_kib)))
}

/// Compares rows per second of exporting all issues into a file.
fn export(bench: &Bench<'_>) -> anyhow::Result<Single> {
    // The fastest known SQL for the same columns: it sorts the labels once, not per issue.
    const SELECT: &str = "SELECT i.external_id, i.title, i.description,
            (ARRAY['', 'low', 'medium', 'high', 'critical'])[i.priority + 1] AS priority,
            (ARRAY['open', 'in_progress', 'closed'])[i.status] AS status, u.username AS assignee, l.names AS labels,
            i.create_time, i.close_time
        FROM issues i LEFT JOIN users u ON u.id = i.assignee_id
        LEFT JOIN (
            SELECT issue_id, string_agg(name, ';') AS names
            FROM (
                SELECT il.issue_id, l.name FROM issue_labels il
                JOIN (SELECT id, name, row_number() OVER (ORDER BY lower(name)) AS nth FROM labels) l ON l.id = il.label_id
                ORDER BY il.issue_id, l.nth
            ) AS sorted
            GROUP BY issue_id
        ) l ON l.issue_id = i.id
        WHERE i.delete_time IS NULL ORDER BY i.create_time, i.id";
    let path = bench.dir.join("export.csv");
    // psql requires `\copy` on one line.
    let select = SELECT.split_whitespace().collect::<Vec<_>>().join(" ");
    let copy = format!("\\copy ({select}) TO '{}' WITH (FORMAT csv, HEADER)", path.display());
    let elapsed = baseline::psql(bench, &copy)?;
    let started = Instant::now();
    let rows = bench.block_on(async |channel| {
        let mut file = BufWriter::new(File::create(&path)?);
        let request = bench.request(ExportIssuesRequest::default())?;
        let mut chunks = IssueServiceClient::new(channel).export_issues(request).await?.into_inner();
        let mut rows = 0;
        while let Some(chunk) = chunks.message().await? {
            file.write_all(&chunk.data)?;
            rows = chunk.row_count;
        }
        file.flush()?;
        Ok(rows)
    })?;
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    ensure!(rows as u64 >= u64::from(bench.args.issues), "the export lacks issues");
    Ok(single("rows/s", rows as f64 / elapsed.as_secs_f64(), rate))
}

/// Compares the p99 latency of GetIssue during an import with that without one, in milliseconds.
fn fairness(bench: &Bench<'_>) -> anyhow::Result<Single> {
    let (service_file, psql_file) = (bench.dir.join("import.csv"), bench.dir.join("copy.csv"));
    let rows = bench.args.import_rows();
    write_files(&service_file, &psql_file, rows)?;
    let operation = &load::OPERATIONS[0];
    let duration = Duration::from_secs(3);
    let without_import = load::run(operation, bench.service, duration)?;
    let import = std::thread::scope(|scope| {
        let import = scope.spawn(|| send_file(bench, &service_file, ImportOptions::default()));
        // Starts the load once the import runs. The load ends before the import or soon after.
        std::thread::sleep(Duration::from_millis(300));
        let during = load::run(operation, bench.service, duration);
        let imported = import.join().map_err(|_| anyhow::anyhow!("the import panicked"))?;
        imported.and(during)
    })?;
    remove_imported(bench)?;
    let mut single = single("ms p99", f64::from(without_import.p99_us) / 1e3, f64::from(import.p99_us) / 1e3);
    single.errors = without_import.errors + import.errors;
    Ok(single)
}

/// Writes the same rows for the service and for psql. The file for psql includes the columns that the service would
/// add.
fn write_files(service_file: &Path, psql_file: &Path, rows: u64) -> anyhow::Result<()> {
    let (mut service_file, mut psql_file) =
        (BufWriter::new(File::create(service_file)?), BufWriter::new(File::create(psql_file)?));
    writeln!(service_file, "title,description,priority,status")?;
    let (reporter, import_id) = (crate::dataset::user_id(1), uuid::Uuid::now_v7());
    for row in 0..rows {
        let description =
            &"how to see it, and what should be seen instead, as far as anybody can tell "[..20 + (row % 50) as usize];
        let (priority, name) = [(1, "low"), (2, "medium"), (3, "high"), (4, "critical")][row as usize % 4];
        writeln!(service_file, "Imported issue {row},\"{description}\",{name},open")?;
        let id = uuid::Uuid::now_v7();
        writeln!(
            psql_file,
            "{id},2026-01-01T00:00:00Z,2026-01-01T00:00:00Z,,{reporter},1,{priority},Imported issue {row},\"{description}\",{import_id}"
        )?;
    }
    service_file.flush()?;
    Ok(psql_file.flush()?)
}

fn send_file(bench: &Bench<'_>, path: &Path, options: ImportOptions) -> anyhow::Result<ImportSummary> {
    const CHUNK_BYTES: usize = 256 * 1024;
    let file = std::fs::read(path)?;
    bench.block_on(async |channel| {
        let message = |message| ImportIssuesRequest { message: Some(message) };
        let options = message(import_issues_request::Message::Options(options));
        let chunks = (0..file.len().div_ceil(CHUNK_BYTES)).map(move |nth| {
            let start = nth * CHUNK_BYTES;
            let data = file[start..file.len().min(start + CHUNK_BYTES)].to_vec().into();
            message(import_issues_request::Message::Chunk(ImportChunk { offset: start as i64, data }))
        });
        let messages = tokio_stream::iter(std::iter::once(options).chain(chunks));
        let mut responses =
            ImportServiceClient::new(channel).import_issues(bench.request(messages)?).await?.into_inner();
        while let Some(response) = responses.message().await? {
            if let Some(import_issues_response::Message::Summary(summary)) = response.message {
                ensure!(summary.state() == ImportState::Committed, "the import is not committed");
                return Ok(summary);
            }
        }
        anyhow::bail!("the import ended without a summary")
    })
}

fn remove_imported(bench: &Bench<'_>) -> anyhow::Result<()> {
    remove_issues(bench, "Imported issue %")
}

/// Deletes issues by a pattern of their titles and vacuums the table.
pub fn remove_issues(bench: &Bench<'_>, titles: &str) -> anyhow::Result<()> {
    baseline::psql(bench, &format!("DELETE FROM issues WHERE title LIKE '{titles}'"))?;
    baseline::psql(bench, "VACUUM issues")?;
    baseline::psql(bench, "CHECKPOINT").map(drop)
}

pub fn single(unit: &'static str, baseline: f64, service: f64) -> Single {
    Single { unit, baseline: Some(baseline), service, errors: 0 }
}

fn memory(kib: u64) -> Single {
    Single { unit: "MiB", baseline: None, service: kib as f64 / 1024.0, errors: 0 }
}

pub fn median_ms(times: Vec<Duration>) -> f64 {
    median(times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect())
}
