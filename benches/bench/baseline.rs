//! The baseline: PostgreSQL's own clients, pgbench and psql, do the same work.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use crate::{
    comparisons::Bench,
    dataset::{ISSUE_ID_SQL, LABELS, USER_ID_SQL, label_id},
    load::Operation,
    results::Outcome,
};

/// The setting that the connections of the service have.
const PSQL_OPTIONS: &str = "-c jit=off";

/// Runs the script of an operation in pgbench with prepared statements.
pub fn pgbench(bench: &Bench<'_>, operation: &Operation) -> anyhow::Result<Outcome> {
    let (dir, duration) = (bench.dir, bench.args.duration());
    let (script, log) = (dir.join("script.sql"), dir.join("log"));
    fs::write(&script, script_text(operation.script, bench.service.issues))?;
    let clients = operation.pgbench_clients.to_string();
    let started = Instant::now();
    let output = Command::new(bench.cluster.bin_dir().join("pgbench"))
        .args(["--no-vacuum", "-M", "prepared", "-j", "1", "-c", &clients, "-U", "postgres", "-h"])
        .arg(bench.cluster.socket_dir())
        .args(["-T", &duration.as_secs().to_string(), "-l", "--log-prefix"])
        .arg(&log)
        .arg("-f")
        .arg(&script)
        .arg(bench.service.database)
        // Without triggers, the script itself writes the history.
        .env("PGOPTIONS", if operation.triggers_off { "-c session_replication_role=replica" } else { "" })
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "pgbench failed: {}", String::from_utf8_lossy(&output.stderr));
    ensure!(!text.contains("tps = 0.0"), "pgbench ran no transaction");
    let mut latencies = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("log.")) {
            for line in fs::read_to_string(&path)?.lines() {
                let micros = line.split(' ').nth(2).context("no latency in pgbench's log")?;
                latencies.push(micros.parse::<f64>()? as u32);
            }
            fs::remove_file(path)?;
        }
    }
    Ok(Outcome::new(latencies, started.elapsed().min(duration), 0))
}

/// Returns a script in which placeholders are replaced by SQL that computes ids from the random numbers of pgbench.
fn script_text(script: &str, issues: u32) -> String {
    // The status is a literal, as it is in the statements of the service.
    let of_status = |status: &str| script.replace(":STATUS", status);
    let script = match script.contains(":STATUS") {
        true => format!(
            "\\set s random(1, 3)\n\\if :s = 1\n{}\\elif :s = 2\n{}\\else\n{}\\endif\n",
            of_status("1"),
            of_status("2"),
            of_status("3")
        ),
        false => script.to_owned(),
    };
    script
        .replace("ISSUES", &issues.to_string())
        .replace("ISSUE_ID(:n)", &ISSUE_ID_SQL.replace('N', ":n::int"))
        .replace("ISSUE_ID(g)", &ISSUE_ID_SQL.replace('N', "g"))
        .replace("USER_ID(:u)", &USER_ID_SQL.replace('N', ":u::int"))
        .replace("LABEL_IDS", &label_ids_sql())
        .replace(
            "NEW_ID()",
            "(lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7000a' || substr(md5(random()::text), 1, 15))::uuid",
        )
}

/// Returns an array of all label ids, because a page of issues has every label.
fn label_ids_sql() -> String {
    let ids: Vec<String> = (1..=LABELS).map(|number| label_id(number).to_string()).collect();
    format!("'{{{}}}'::uuid[]", ids.join(","))
}

/// Runs a command in psql. Returns the elapsed time, including the start of psql.
pub fn psql(bench: &Bench<'_>, command: &str) -> anyhow::Result<Duration> {
    psql_session(bench, &[command])
}

/// Runs commands in one psql session. Returns the elapsed time, including the start of psql.
pub fn psql_session(bench: &Bench<'_>, commands: &[&str]) -> anyhow::Result<Duration> {
    let started = Instant::now();
    output_of(psql_command(bench).args(commands.iter().flat_map(|command| ["-c", command])))?;
    Ok(started.elapsed())
}

/// Runs a query repeatedly on one connection. Returns its rows, with columns separated by tabs, and the time of each
/// execution in milliseconds.
pub fn psql_timed(bench: &Bench<'_>, query: &str, executions: usize) -> anyhow::Result<(Vec<String>, Vec<f64>)> {
    let mut psql = psql_command(bench);
    psql.args(["-A", "-t", "-F", "\t", "-c", query, "-c", "\\o /dev/null", "-c", "\\timing on"]);
    for _ in 0..executions {
        psql.args(["-c", query]);
    }
    let (mut rows, mut times) = (Vec::new(), Vec::new());
    for line in output_of(&mut psql)?.lines() {
        match line.strip_prefix("Time: ") {
            Some(time) => times.push(time.split(' ').next().unwrap_or_default().parse()?),
            None => rows.push(line.to_owned()),
        }
    }
    ensure!(times.len() == executions, "psql printed {} times", times.len());
    Ok((rows, times))
}

fn psql_command(bench: &Bench<'_>) -> Command {
    let mut command = Command::new(bench.cluster.bin_dir().join("psql"));
    command.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", bench.service.database, "-h"]);
    command.arg(bench.cluster.socket_dir()).env("PGOPTIONS", PSQL_OPTIONS).stdin(Stdio::null());
    command
}

fn output_of(psql: &mut Command) -> anyhow::Result<String> {
    let output = psql.output()?;
    ensure!(output.status.success(), "psql failed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
