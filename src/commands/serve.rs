//! What the subcommands do: from a configuration to a running service, a migrated schema, a first user.

use std::{
    fs,
    io::{Read, Write},
    net::SocketAddr,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    auth::{check_password, hash_password, new_token},
    client,
    config::{HealthArgs, Limits, MigrateArgs, ServeArgs, UserCreateArgs},
    db::{
        Db, PoolOptions, Target,
        audit::By,
        migrate::{grant_rights, migrate},
        tokens,
        users::{self, NewUser},
    },
    pb::Role,
    postgres::{Cluster, Durability},
    rpc::check_username,
    server,
    transport::connections::Listener,
    transport::tls::Acceptor,
};

/// The database of the embedded cluster, who works on it, and the administrator that it begins with.
const EMBEDDED_DATABASE: &str = "issue_tracker";
const EMBEDDED_ROLE: &str = "issue_tracker";
const FIRST_ADMINISTRATOR: &str = "admin";
/// Of a service that was told to end twice.
const EXIT_AT_ONCE: i32 = 1;
/// Besides connections: standard streams, certificates, logs, the runtime's.
const FILES_OF_ITS_OWN: usize = 64;
const FIRST_TOKEN_NAME: &str = "admin.token";
/// How long a service that is asked for its health may take to answer at all.
const HEALTH_CONNECT_MAX: Duration = Duration::from_secs(10);

pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    args.check()?;
    let tls = match args.tls.files() {
        Some(files) => Some(Acceptor::new(files).await?),
        None => None,
    };
    raise_open_files(&args.limits);
    // First, so that a taken port is told before anything is started.
    let tcp = TcpListener::bind(args.listen).await.with_context(|| format!("cannot listen on {}", args.listen))?;
    let listener = Listener { tcp, tls };
    let stop = stop_at_signals()?;
    match &args.database.database_url {
        Some(url) => serve_when(prepare_external(&args, url, listener.tcp.local_addr()?), listener, &args, stop).await,
        None => serve_with_cluster(&args, listener, stop).await,
    }
}

/// Serves with a private PostgreSQL, which ends with the service.
async fn serve_with_cluster(args: &ServeArgs, listener: Listener, stop: CancellationToken) -> anyhow::Result<()> {
    let data_dir = args.database.data_dir()?;
    let start = {
        let data_dir = data_dir.clone();
        let stop = stop.clone();
        move || Cluster::start_unless(&data_dir, Durability::Durable, &|| stop.is_cancelled())
    };
    let Some(cluster) = tokio::task::spawn_blocking(start).await?? else {
        return Ok(());
    };
    let (address, tls) = (listener.tcp.local_addr()?, listener.tls.clone());
    let prepare = prepare_embedded(args, &cluster, &data_dir, address, tls.as_ref());
    let served = serve_when(prepare, listener, args, stop).await;
    let stopped = tokio::task::spawn_blocking(move || cluster.stop()).await?;
    served.and(stopped)
}

/// Serves as soon as the database is prepared, until the stop.
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

async fn prepare_external(args: &ServeArgs, url: &SecretString, address: SocketAddr) -> anyhow::Result<Db> {
    let target: Target = url.expose_secret().parse()?;
    migrate(target.clone()).await?;
    let db = Db::new(target, args.limits.pool());
    warn_without_users(&db).await?;
    println!("listening on {address}");
    Ok(db)
}

/// Brings the schema up to date, makes who works on it and who begins with it, and says how to reach the service.
async fn prepare_embedded(
    args: &ServeArgs,
    cluster: &Cluster,
    data_dir: &Path,
    address: SocketAddr,
    tls: Option<&Acceptor>,
) -> anyhow::Result<Db> {
    let mut config = cluster.connect_config(EMBEDDED_DATABASE);
    create_database_and_role(&cluster.connect_config("postgres")).await?;
    migrate(&config).await?;
    grant_rights(&config, EMBEDDED_ROLE).await?;
    config.user(EMBEDDED_ROLE);
    let db = Db::new(config, args.limits.pool());
    let token_file = data_dir.join("admin.token");
    create_first_administrator(&db, &args.limits, &token_file).await?;
    let flags = grpcurl_flags(address, tls);
    println!(
        "listening on {address}\n\
         TOKEN=$(cat {})\n\
         grpcurl {flags} -H \"authorization: Bearer $TOKEN\" -d '{{\"issue\":{{\"title\":\"My first issue\"}}}}' {address} issuetracker.v1.IssueService/CreateIssue\n\
         grpcurl {flags} -H \"authorization: Bearer $TOKEN\" {address} issuetracker.v1.IssueService/ListIssues",
        token_file.display()
    );
    Ok(db)
}

/// What grpcurl has to be told of the connection.
fn grpcurl_flags(address: SocketAddr, tls: Option<&Acceptor>) -> String {
    let Some(tls) = tls else {
        return "-plaintext".to_owned();
    };
    let files = tls.files();
    // Whoever signed it, the certificate itself is known.
    let mut flags = format!("-cacert {}", files.certificate.display());
    if let Some(name) = tls.name_instead_of(address.ip()) {
        flags += &format!(" -authority {name}");
    }
    if files.client_authorities.is_some() {
        flags += " -cert client.crt -key client.key";
    }
    flags
}

pub async fn migrate_external(args: MigrateArgs) -> anyhow::Result<()> {
    let target: Target = args.database.database_url.expose_secret().parse()?;
    migrate(target.clone()).await?;
    match args.grant_to {
        Some(role) => grant_rights(target, &role).await,
        None => Ok(()),
    }
}

pub async fn create_user(args: UserCreateArgs) -> anyhow::Result<()> {
    let username = check_username(args.username).map_err(|message| anyhow!("the username {message}"))?;
    let mut input = String::new();
    std::io::stdin().read_to_string(&mut input).context("cannot read the password from standard input")?;
    input.truncate(input.trim_end_matches(['\r', '\n']).len());
    let password = SecretString::from(input);
    check_password(&password).map_err(|message| anyhow!("the password {message}"))?;

    let target: Target = args.database.database_url.expose_secret().parse()?;
    migrate(target.clone()).await?;
    let db = Db::new(target, PoolOptions::SMALL);
    let password_hash = hash_password(&password, args.bcrypt_cost)?;
    let new = NewUser { username: &username, role: args.role.into(), disabled: false, password_hash: &password_hash };
    let user = users::create(&*db.conn().await?, new, By::COMMAND_LINE).await?;
    println!("{}", user.id);
    Ok(())
}

/// Fails unless the service serves.
pub async fn health(args: HealthArgs) -> anyhow::Result<()> {
    let server = match args.server {
        Some(server) => server,
        None => format!("http://{}", args.listen).parse()?,
    };
    let channel =
        client::endpoint(&server, &args.tls)?.connect_timeout(HEALTH_CONNECT_MAX).connect().await.with_context(
            || format!("nothing answers on {}", server.authority().map_or("", |authority| authority.as_str())),
        )?;
    let status = HealthClient::new(channel)
        .check(HealthCheckRequest::default())
        .await
        .map_err(|status| anyhow!(client::why(&status)))?;
    match status.into_inner().status() {
        ServingStatus::Serving => {
            println!("SERVING");
            Ok(())
        }
        status => bail!("{}", status.as_str_name()),
    }
}

/// Lets the process open as many files as it may: each connection is one, and the usual bound is 1,024.
fn raise_open_files(limits: &Limits) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls are given a structure that lives as long as they take; if they fail, the bound stays as it is.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
            libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        }
    }
    let wanted = limits.connections().connections_max + limits.pool().connections_max as usize + FILES_OF_ITS_OWN;
    if limit.rlim_cur < wanted as u64 {
        tracing::warn!(
            open_files = limit.rlim_cur,
            wanted,
            "the process may open fewer files than --connections need; raise the limit (ulimit -n) or set fewer"
        );
    }
}

/// Cancelled at the first SIGINT or SIGTERM; a second one ends the process at once. Listens from now on.
fn stop_at_signals() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut next = async move || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    let stop = CancellationToken::new();
    let first = stop.clone();
    tokio::spawn(async move {
        next().await;
        first.cancel();
        next().await;
        // The private PostgreSQL ends by itself when its parent does.
        std::process::exit(EXIT_AT_ONCE);
    });
    Ok(stop)
}

async fn warn_without_users(db: &Db) -> anyhow::Result<()> {
    if !users::exist(&*db.conn().await?).await? {
        tracing::warn!("there are no users yet; make one with: issue-tracker user create --role admin NAME");
    }
    Ok(())
}

/// Sees to it that there is the database, and a role to work on it.
async fn create_database_and_role(config: &Config) -> anyhow::Result<()> {
    let (client, connection) = config.connect(NoTls).await.context("cannot connect to the embedded PostgreSQL")?;
    let connection = tokio::spawn(connection);
    if client.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&EMBEDDED_DATABASE]).await?.is_none() {
        client.batch_execute(&format!("CREATE DATABASE {EMBEDDED_DATABASE}")).await?;
    }
    if client.query_opt("SELECT FROM pg_roles WHERE rolname = $1", &[&EMBEDDED_ROLE]).await?.is_none() {
        client.batch_execute(&format!("CREATE ROLE {EMBEDDED_ROLE} LOGIN")).await?;
    }
    drop(client);
    connection.await??;
    Ok(())
}

/// Sees to it that there is a user whose password was told, and that the token file has a token: a start that was killed
/// half-way is made good by the next one.
async fn create_first_administrator(db: &Db, limits: &Limits, token_file: &Path) -> anyhow::Result<()> {
    let tx = db.begin().await?;
    if !users::exist(&tx).await? {
        let (password, _) = new_token()?;
        let password = SecretString::from(password);
        let (to_hash, cost) = (password.clone(), limits.bcrypt_cost);
        let password_hash = &tokio::task::spawn_blocking(move || hash_password(&to_hash, cost)).await??;
        let new = NewUser { username: FIRST_ADMINISTRATOR, role: Role::Admin, disabled: false, password_hash };
        users::create(&tx, new, By::COMMAND_LINE).await?;
        // Before it holds: a start that ends in between would keep it to itself. One that fails tells of it in vain, and
        // the next one of another.
        println!(
            "made the user \"{FIRST_ADMINISTRATOR}\" with the password {} (it is not shown again)",
            password.expose_secret()
        );
    } else if token_file.exists() {
        return Ok(());
    }
    let user = users::get_by_username(&tx, FIRST_ADMINISTRATOR).await?;
    let (token, sha256) = new_token()?;
    tokens::create_api_token(&tx, user.id.parse()?, &sha256, FIRST_TOKEN_NAME, None, By::COMMAND_LINE).await?;
    tx.commit().await?;
    // Last, as a start that finds the file takes it that all is done.
    write_secret(token_file, &token).with_context(|| format!("cannot write {}", token_file.display()))?;
    Ok(())
}

/// Whole or not at all, and for nobody else to read.
fn write_secret(path: &Path, secret: &str) -> anyhow::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    writeln!(file, "{secret}")?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    Ok(())
}
