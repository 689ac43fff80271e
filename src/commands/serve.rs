//! `issue-tracker serve`.

use std::{
    borrow::Cow,
    net::SocketAddr,
    path::Path,
    pin::pin,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::{ArgMatches, CommandFactory};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use super::{
    bootstrap::{create_first_administrator, prepare_private_database},
    stdout::print,
};
use crate::{
    backoff::{Backoff, random},
    config::{Cli, Limits, ServeArgs, exit_code},
    db::{
        ConnectionString, Db,
        migrate::{migrate, unavailability},
        users,
    },
    error::Result,
    metrics::{self, listener::MetricsListener},
    postgres::{Cluster, Durability},
    server,
    transport::{listener::Listener, tls::Acceptor},
};

/// Open files besides connections: standard streams, certificates, logs, the runtime's.
const OTHER_FILES: usize = 64;
/// The delay between attempts to prepare a database that is not available at the start.
const PREPARE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(5) };
/// The interval of log lines while the database is not available at the start.
const WAIT_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// How long the address is not printed because the first probe of a prepared database has not succeeded.
const FIRST_PROBE_MAX: Duration = Duration::from_secs(2);

/// Prints the effective configuration. Fails if values exclude each other. `matches`: those of the program's arguments.
pub fn print_config(args: &ServeArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    print(args.effective(&Cli::command(), matches).as_bytes())?;
    args.check()
}

/// Serves until SIGINT or SIGTERM. Prints the address, and on a private database the first calls to try.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    args.check()?;
    let tls = match args.tls.files() {
        Some(files) => Some(Acceptor::new(files).await?),
        None => None,
    };
    raise_open_files(&args.limits);
    // First: an address in use fails before anything else starts.
    let tcp = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let listener = Listener { tcp, tls };
    // Until the service has stopped.
    let _metrics = start_metrics(args.metrics_listen).await?;
    let stop = stop_at_signals()?;
    match &args.database.database_url {
        Some(url) => serve_external(&args, url, listener, stop).await,
        None => serve_with_cluster(&args, listener, stop).await,
    }
}

/// Enables metrics and listens for Prometheus, if there is an address for it, which is printed.
async fn start_metrics(address: Option<SocketAddr>) -> anyhow::Result<Option<MetricsListener>> {
    let Some(address) = address else { return Ok(None) };
    metrics::enable(server::methods()?.names())?;
    let (listener, address) = MetricsListener::start(address).await?;
    println!("metrics on http://{address}/metrics");
    Ok(Some(listener))
}

/// Serves with the private PostgreSQL, which stops with the service.
async fn serve_with_cluster(args: &ServeArgs, listener: Listener, stop: CancellationToken) -> anyhow::Result<()> {
    let data_dir = args.database.data_dir.path()?;
    let start = {
        let data_dir = data_dir.clone();
        let stop = stop.clone();
        move || Cluster::start_unless(&data_dir, Durability::Durable, &|| stop.is_cancelled())
    };
    let Some(cluster) = tokio::task::spawn_blocking(start).await?? else {
        return Ok(());
    };
    let (address, tls) = (listener.tcp.local_addr()?, listener.tls.clone());
    let prepare = prepare_private(args, &cluster, &data_dir, address, tls.as_ref());
    let served = serve_when(prepare, listener, args, stop).await;
    let stopped = tokio::task::spawn_blocking(move || cluster.stop()).await?;
    served.and(stopped)
}

/// Serves once the database is prepared, until `stop`.
async fn serve_when(
    prepare: impl Future<Output = anyhow::Result<Db>>,
    listener: Listener,
    args: &ServeArgs,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let db = tokio::select! {
        db = prepare => db?,
        () = stop.cancelled() => return Ok(()),
    };
    server::run(listener, db, &args.limits, stop.cancelled()).await
}

/// Serves immediately, although calls fail with UNAVAILABLE and health reports NOT_SERVING until the database is prepared.
async fn serve_external(
    args: &ServeArgs,
    url: &SecretString,
    listener: Listener,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let database: ConnectionString = url.expose_secret().parse()?;
    let address = listener.tcp.local_addr()?;
    let db = Db::unprepared(database.clone(), args.limits.pool());
    let mut served = pin!(server::run(listener, db.clone(), &args.limits, stop.cancelled()));
    tokio::select! {
        served = &mut served => return served,
        prepared = prepare_external(database, &db, address, args.database_wait()) => prepared?,
    }
    served.await
}

/// Applies pending migrations and allows calls. Waits up to `wait_max` for a database that is not available, and prints the
/// address once the database is prepared or known to be unavailable.
async fn prepare_external(
    database: ConnectionString,
    db: &Db,
    address: SocketAddr,
    wait_max: Duration,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut failures = 0;
    let mut logged: Option<Instant> = None;
    while let Err(error) = migrate(database.clone()).await {
        let Some(cause) = unavailability(&error).filter(|_| began.elapsed() < wait_max) else { return Err(error) };
        if failures == 0 {
            println!("listening on {address}");
        }
        if logged.is_none_or(|logged| logged.elapsed() >= WAIT_LOG_INTERVAL) {
            logged = Some(Instant::now());
            let (waited_s, wait_max_s) = (began.elapsed().as_secs(), wait_max.as_secs());
            tracing::warn!(cause, waited_s, wait_max_s, "database was unavailable at start");
        }
        tokio::time::sleep(PREPARE_BACKOFF.delay(failures, random())).await;
        failures += 1;
    }
    db.set_prepared();
    let _ = tokio::time::timeout(FIRST_PROBE_MAX, db.watch_health().wait_for(|health| health.reads)).await;
    if let Err(error) = warn_without_users(db).await {
        tracing::warn!(code = ?error.code(), "search for users failed");
    }
    if failures == 0 {
        println!("listening on {address}");
    }
    Ok(())
}

/// Prepares the private database, creates the first administrator, and prints how to call the service.
async fn prepare_private(
    args: &ServeArgs,
    cluster: &Cluster,
    data_dir: &Path,
    address: SocketAddr,
    tls: Option<&Acceptor>,
) -> anyhow::Result<Db> {
    let db = Db::new(prepare_private_database(cluster).await?, args.limits.pool());
    let token_file = data_dir.join("admin.token");
    create_first_administrator(&db, args.limits.bcrypt.cost, &token_file).await?;
    let flags = grpcurl_flags(address, tls);
    println!(
        "listening on {address}\n\
         TOKEN=$(cat {})\n\
         grpcurl {flags} -H \"authorization: Bearer $TOKEN\" -d '{{\"issue\":{{\"title\":\"My first issue\"}}}}' {address} issuetracker.v1.IssueService/CreateIssue\n\
         grpcurl {flags} -H \"authorization: Bearer $TOKEN\" {address} issuetracker.v1.IssueService/ListIssues",
        quoted(&token_file)
    );
    Ok(db)
}

/// Quotes a path for a POSIX shell, where it needs quotes.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    // Fails on a NUL byte only, which no path contains.
    shlex::try_quote(&text).map(Cow::into_owned).unwrap_or(text)
}

/// Returns the flags with which grpcurl connects.
fn grpcurl_flags(address: SocketAddr, tls: Option<&Acceptor>) -> String {
    let Some(tls) = tls else {
        return "-plaintext".to_owned();
    };
    let files = tls.files();
    // The certificate itself is trusted, whichever authority signed it.
    let mut flags = format!("-cacert {}", quoted(&files.certificate));
    if let Some(name) = tls.name_instead_of(address.ip()) {
        flags += &format!(" -authority {name}");
    }
    if files.client_authorities.is_some() {
        flags += " -cert client.crt -key client.key";
    }
    flags
}

/// Raises the soft limit of open files to the hard limit: each connection is a file, and the usual soft limit is 1,024.
fn raise_open_files(limits: &Limits) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives both calls; if they fail, the limit stays as it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        }
    }
    let wanted = limits.connections().connections_max + limits.pool().connections_max as usize + OTHER_FILES;
    if limit.rlim_cur < wanted as u64 {
        tracing::warn!(limit = limit.rlim_cur, required = wanted, "open file limit found too low");
    }
}

/// Returns a token that the first SIGINT or SIGTERM cancels; a second one ends the process immediately.
fn stop_at_signals() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut next = async move || {
        tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
        }
    };
    let stop = CancellationToken::new();
    let first = stop.clone();
    tokio::spawn(async move {
        next().await;
        first.cancel();
        let second = next().await;
        // The private PostgreSQL receives SIGINT from the kernel when its parent ends.
        std::process::exit(exit_code::interrupted(second.as_raw_value()).into());
    });
    Ok(stop)
}

async fn warn_without_users(db: &Db) -> Result<()> {
    if !users::exist(&db.conn().await?).await? {
        tracing::warn!(create_with = "issue-tracker user create --role admin NAME", "no users found");
    }
    Ok(())
}
