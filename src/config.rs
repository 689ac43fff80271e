//! The command line and environment.

mod tls;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand, ValueEnum, builder::BoolishValueParser, value_parser};
use http::Uri;
use secrecy::SecretString;
use tracing::level_filters::LevelFilter;
use uuid::Uuid;

pub use self::tls::{ClientTls, ServerTls};
use crate::{
    auth::throttle::FreeFailures, db::PoolOptions, middleware::RequestLimits, pb,
    transport::client_address::TrustedProxies, transport::connections::ConnectionLimits,
};

/// An issue tracker over gRPC, on PostgreSQL.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
    /// What is logged to standard error: error, warn, info, debug or off.
    #[arg(long, env = "ISSUE_TRACKER_LOG", default_value = "info", value_name = "LEVEL", global = true)]
    pub log_level: LevelFilter,
}

impl Cli {
    /// Serving is what happens when nothing else is asked for.
    pub fn command(self) -> Command {
        self.command.unwrap_or(Command::Serve(self.serve))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve until SIGINT or SIGTERM (the default).
    Serve(ServeArgs),
    /// Bring the schema of an external database up to date, and end.
    Migrate(MigrateArgs),
    /// Manage the users of an external database.
    #[command(subcommand)]
    User(UserCommand),
    /// Ask a running service whether it serves: exit code 0 if it does.
    Health(HealthArgs),
    /// Import issues from a CSV file into a running service.
    ///
    /// Exit code 0: every row went in (with --validate-only: would). 1: rows were rejected. 2: it failed. 130: it was
    /// interrupted, and standard error says how to go on.
    Import(Box<ImportArgs>),
    /// Export issues from a running service as CSV that import reads.
    ///
    /// Exit code 0: the file is whole. 2: it failed. 130: it was interrupted.
    Export(ExportArgs),
}

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Make a user, for example the first administrator; reads the password from standard input.
    Create(UserCreateArgs),
}

#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub database: Database,
    #[command(flatten)]
    pub limits: Limits,
    /// Where to listen; port 0 takes a free one, which is printed.
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub tls: ServerTls,
}

impl ServeArgs {
    /// What only makes sense together.
    pub fn check(&self) -> anyhow::Result<()> {
        let is_reached_from_here_only = self.listen.ip().to_canonical().is_loopback();
        if !is_reached_from_here_only && self.tls.tls_cert.is_none() && !self.tls.insecure_plaintext {
            bail!(
                "--listen {} can be reached from other machines, which would send passwords and tokens unencrypted; give \
                 --tls-cert and --tls-key, or --insecure-plaintext if what is in front of the service encrypts",
                self.listen
            );
        }
        self.limits.check()
    }
}

/// Which database: an external one, or the one that the service runs by itself.
#[derive(Debug, Args)]
pub struct Database {
    /// PostgreSQL 15 or newer to work on, as a URL or `key=value` pairs. Default: a private one in the data directory.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: Option<SecretString>,
    #[command(flatten)]
    data_dir: DataDir,
}

#[derive(Debug, Args)]
pub struct DataDir {
    /// Where the private PostgreSQL and the administrator's token are kept. Default: /var/lib/issue-tracker for root,
    /// else $XDG_DATA_HOME/issue-tracker or ~/.local/share/issue-tracker.
    #[arg(long, env = "ISSUE_TRACKER_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// A database that somebody else runs.
#[derive(Debug, Args)]
pub struct ExternalDatabase {
    /// PostgreSQL 15 or newer, as a URL or `key=value` pairs.
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    pub database_url: SecretString,
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub database: ExternalDatabase,
    /// Give this role what it needs to serve, and nothing else.
    #[arg(long, value_name = "ROLE")]
    pub grant_to: Option<String>,
}

/// The bounds that can be set.
#[derive(Clone, Debug, Args)]
pub struct Limits {
    /// Connections to the database.
    #[arg(long, env = "ISSUE_TRACKER_POOL_CONNECTIONS", default_value_t = 20, value_name = "N",
        value_parser = value_parser!(u32).range(2..=1000))]
    pool_connections: u32,
    /// How long a call waits for a connection, in milliseconds.
    #[arg(long, env = "ISSUE_TRACKER_POOL_WAIT_MS", default_value_t = 2_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=60_000))]
    pool_wait_ms: u64,
    /// How long one statement may take, in milliseconds.
    #[arg(long, env = "ISSUE_TRACKER_STATEMENT_MS", default_value_t = 30_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=600_000))]
    statement_ms: u64,
    /// How long a call may take whose client sets no deadline, a login or a health check in any case, and a message to
    /// come, in milliseconds. RevertImport has 10 minutes; imports, exports and other streams have no deadline.
    #[arg(long, env = "ISSUE_TRACKER_DEADLINE_MS", default_value_t = 30_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=600_000))]
    deadline_ms: u64,
    /// Bytes of one message of a client.
    #[arg(long, env = "ISSUE_TRACKER_MESSAGE_BYTES", default_value_t = 4_194_304, value_name = "BYTES",
        value_parser = value_parser!(u32).range(2_097_152..=67_108_864))]
    message_bytes: u32,
    /// Bytes of a call's metadata.
    #[arg(long, env = "ISSUE_TRACKER_HEADER_BYTES", default_value_t = 16_384, value_name = "BYTES",
        value_parser = value_parser!(u32).range(4_096..=1_048_576))]
    header_bytes: u32,
    /// Connections at once; a new one makes some go that are idle, or that nobody has signed in on for ten seconds.
    #[arg(long, env = "ISSUE_TRACKER_CONNECTIONS", default_value_t = 4_096, value_name = "N",
        value_parser = value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Calls of one connection at once; more wait in the client.
    #[arg(long, env = "ISSUE_TRACKER_STREAMS", default_value_t = 256, value_name = "N",
        value_parser = value_parser!(u32).range(1..=10_000))]
    streams: u32,
    /// How long a connection may be without a call, in seconds.
    #[arg(long, env = "ISSUE_TRACKER_IDLE_SECONDS", default_value_t = 300, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=86_400))]
    idle_seconds: u64,
    /// How long a connection is used, in seconds; then its client is asked to connect anew.
    #[arg(long, env = "ISSUE_TRACKER_AGE_SECONDS", default_value_t = 3_600, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=604_800))]
    age_seconds: u64,
    /// What the calls of a connection have when it is too old, in seconds; those without credentials have up to 30.
    #[arg(long, env = "ISSUE_TRACKER_AGE_GRACE_SECONDS", default_value_t = 3_600, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=604_800))]
    age_grace_seconds: u64,
    /// How often a client is asked whether it is there, in seconds; without an answer for as long it is taken for gone.
    #[arg(long, env = "ISSUE_TRACKER_KEEPALIVE_SECONDS", default_value_t = 30, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=3_600))]
    keepalive_seconds: u64,
    /// Requests at once; more are told RESOURCE_EXHAUSTED.
    #[arg(long, env = "ISSUE_TRACKER_REQUESTS", default_value_t = 1_024, value_name = "N",
        value_parser = value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Imports and RevertImports at once, each of which holds a connection; more are told RESOURCE_EXHAUSTED.
    #[arg(long, env = "ISSUE_TRACKER_IMPORTS", default_value_t = 10, value_name = "N",
        value_parser = value_parser!(u32).range(1..=999))]
    pub imports: u32,
    /// Exports at once, each of which holds a connection; more are told RESOURCE_EXHAUSTED.
    #[arg(long, env = "ISSUE_TRACKER_EXPORTS", default_value_t = 4, value_name = "N",
        value_parser = value_parser!(u32).range(1..=999))]
    pub exports: u32,
    /// bcrypt's cost for new passwords: each step doubles the time, 12 takes a quarter of a second.
    #[arg(long, env = "ISSUE_TRACKER_BCRYPT_COST", default_value_t = 12, value_name = "COST",
        value_parser = value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,
    /// How long a session lasts, in hours.
    #[arg(long, env = "ISSUE_TRACKER_SESSION_HOURS", default_value_t = 12, value_name = "HOURS",
        value_parser = value_parser!(i32).range(1..=8_760))]
    pub session_hours: i32,
    /// Wrong passwords for one user from one address until further tries have to wait, longer and longer.
    #[arg(long, env = "ISSUE_TRACKER_LOGIN_FAILURES", default_value_t = 5, value_name = "N",
        value_parser = value_parser!(u32).range(1..=1_000_000))]
    login_failures: u32,
    /// Wrong passwords from one address, for whatever users, until further tries from there have to wait. Behind a proxy
    /// that --trusted-proxies does not name, all clients have one address.
    #[arg(long, env = "ISSUE_TRACKER_LOGIN_FAILURES_PER_ADDRESS", default_value_t = 50, value_name = "N",
        value_parser = value_parser!(u32).range(1..=1_000_000))]
    login_failures_per_address: u32,
    /// Proxies, as addresses and networks with commas between them, that append to x-forwarded-for which address they are
    /// called from: their clients are known by it. Default: none, and the header is ignored.
    #[arg(long, env = "ISSUE_TRACKER_TRUSTED_PROXIES", value_name = "NETWORKS")]
    trusted_proxies: Option<TrustedProxies>,
    /// How long requests under way may take to finish when the service stops, in seconds.
    #[arg(long, env = "ISSUE_TRACKER_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(0..=3_600))]
    drain_seconds: u64,
}

impl Limits {
    /// What only makes sense together.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.imports + self.exports >= self.pool_connections {
            bail!(
                "--imports {} and --exports {} together must be less than --pool-connections {}: each import and export \
                 holds a connection",
                self.imports,
                self.exports,
                self.pool_connections
            );
        }
        Ok(())
    }

    pub fn pool(&self) -> PoolOptions {
        PoolOptions {
            connections_max: self.pool_connections,
            wait_max: Duration::from_millis(self.pool_wait_ms),
            statement_max: Duration::from_millis(self.statement_ms),
        }
    }

    pub fn requests(&self) -> RequestLimits {
        RequestLimits {
            requests_max: self.requests as usize,
            message_bytes_max: self.message_bytes as usize,
            deadline_default: Duration::from_millis(self.deadline_ms),
        }
    }

    pub fn connections(&self) -> ConnectionLimits {
        ConnectionLimits {
            connections_max: self.connections as usize,
            idle_max: Duration::from_secs(self.idle_seconds),
            age_max: Duration::from_secs(self.age_seconds),
            age_grace: Duration::from_secs(self.age_grace_seconds),
            keepalive_interval: Duration::from_secs(self.keepalive_seconds),
            keepalive_timeout: Duration::from_secs(self.keepalive_seconds),
            streams_max: self.streams,
            header_bytes_max: self.header_bytes,
            trusted_proxies: self.trusted_proxies.clone().unwrap_or_default(),
        }
    }

    pub fn free_login_failures(&self) -> FreeFailures {
        FreeFailures { of_pair: self.login_failures, of_address: self.login_failures_per_address }
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

#[derive(Debug, Args)]
pub struct UserCreateArgs {
    #[command(flatten)]
    pub database: ExternalDatabase,
    /// The new user's name.
    pub username: String,
    /// What the user may do.
    #[arg(long, value_enum, default_value_t = RoleName::Member)]
    pub role: RoleName,
    /// bcrypt's cost, as the service has it.
    #[arg(long, env = "ISSUE_TRACKER_BCRYPT_COST", default_value_t = 12, value_name = "COST",
        value_parser = value_parser!(u32).range(4..=31))]
    pub bcrypt_cost: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RoleName {
    Viewer,
    Member,
    Admin,
}

impl From<RoleName> for pb::Role {
    fn from(role: RoleName) -> Self {
        match role {
            RoleName::Viewer => Self::Viewer,
            RoleName::Member => Self::Member,
            RoleName::Admin => Self::Admin,
        }
    }
}

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Where the service listens.
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// How the service is reached instead, HOST:PORT, http://HOST:PORT or https://HOST:PORT. Default: --listen, with http.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_server)]
    pub server: Option<Uri>,
    #[command(flatten)]
    pub tls: ClientTls,
}

/// How a client reaches a service, and for how long it tries.
#[derive(Debug, Args)]
pub struct Connection {
    /// Where the service listens: HOST:PORT, http://HOST:PORT or https://HOST:PORT.
    #[arg(long, env = "ISSUE_TRACKER_SERVER", default_value = "http://127.0.0.1:50051", value_name = "ADDRESS",
        value_parser = parse_server)]
    pub server: Uri,
    #[command(flatten)]
    pub tls: ClientTls,
    /// Send the token unencrypted to another machine, over a network that nobody else can listen to.
    #[arg(long, env = "ISSUE_TRACKER_INSECURE_PLAINTEXT", value_parser = BoolishValueParser::new())]
    pub insecure_plaintext: bool,
    /// A file with the token. Default: the token in $ISSUE_TRACKER_TOKEN, else, for a service on this machine,
    /// admin.token in the data directory.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    #[command(flatten)]
    pub data_dir: DataDir,
    /// How long to try again, in seconds without any progress, when the service cannot be reached or the stream is cut.
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = value_parser!(u64).range(0..=604_800))]
    retry_seconds: u64,
}

impl Connection {
    pub fn retry_max(&self) -> Duration {
        Duration::from_secs(self.retry_seconds)
    }
}

fn parse_server(text: &str) -> Result<Uri, String> {
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let uri: Uri = with_scheme.parse().map_err(|error| format!("{error}; it is like 127.0.0.1:50051"))?;
    match (uri.scheme_str(), uri.port_u16(), uri.path()) {
        (Some("http" | "https"), Some(_), "/") => Ok(uri),
        (Some("http" | "https"), None, _) => Err("has no port; it is like 127.0.0.1:50051".to_owned()),
        (Some("http" | "https"), Some(_), path) => {
            Err(format!("has a path, {path}; it is like http://127.0.0.1:50051"))
        }
        _ => Err("only http:// and https:// are spoken; it is like http://127.0.0.1:50051".to_owned()),
    }
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The CSV file, as it is or compressed with gzip; - reads standard input (and keeps a copy of it in $TMPDIR while
    /// the import runs, for when the stream is cut).
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    #[command(flatten)]
    pub connection: Connection,
    /// All rows or none (atomic), or the good ones (skip-invalid).
    #[arg(long, value_enum, default_value_t = ImportModeName::Atomic, value_name = "MODE")]
    pub mode: ImportModeName,
    /// What becomes of a row whose external_id an issue has already: the row is bad, the issue is left as it is, or gets
    /// the row's values.
    #[arg(long, value_enum, default_value_t = OnExistingName::Fail, value_name = "WHAT")]
    pub on_existing: OnExistingName,
    /// The file's name of a column, and ours: Summary=title. Without ours the column is ignored: Notes=. Repeatable.
    #[arg(long, value_name = "FILE_NAME=OUR_NAME", value_parser = parse_column_name)]
    pub map: Vec<(String, String)>,
    /// What stands between fields: one character, or tab. Default: a comma.
    #[arg(long, value_name = "CHARACTER", value_parser = parse_separator)]
    pub separator: Option<String>,
    /// What stands between the labels of a row: one character, or tab. Default: a semicolon.
    #[arg(long, value_name = "CHARACTER", value_parser = parse_separator)]
    pub label_separator: Option<String>,
    /// The status of new issues whose row has none. Default: open.
    #[arg(long, value_enum, value_name = "STATUS")]
    pub default_status: Option<StatusName>,
    /// The priority of new issues whose row has none. Default: none.
    #[arg(long, value_enum, value_name = "PRIORITY")]
    pub default_priority: Option<PriorityName>,
    /// The username of the assignee of new issues whose row has none. Default: nobody.
    #[arg(long, value_name = "USERNAME")]
    pub default_assignee: Option<String>,
    /// Leave out columns that have no name of ours, instead of refusing the file.
    #[arg(long)]
    pub ignore_unknown_columns: bool,
    /// Create labels that there are not, instead of rejecting their rows.
    #[arg(long)]
    pub create_labels: bool,
    /// The import to go on with, after it was interrupted. Default: a new one.
    #[arg(long, value_name = "UUID")]
    pub import_id: Option<Uuid>,
    /// Check every row, and write nothing.
    #[arg(long)]
    pub validate_only: bool,
    /// Write progress, row errors and the summary to standard output as JSON, one object a line.
    #[arg(long)]
    pub json: bool,
    /// Write the rejected rows to this file, as they are and with the header, to be repaired and imported again.
    #[arg(long, value_name = "FILE")]
    pub rejected: Option<PathBuf>,
    /// How many row errors to show. Default: 20 on a terminal, else 1,000.
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=10_000))]
    pub errors: Option<u32>,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Where to write, when everything has come; standard output without it or with -.
    #[arg(value_name = "FILE|-")]
    pub file: Option<PathBuf>,
    #[command(flatten)]
    pub connection: Connection,
    /// Which issues, as ListIssues takes it: 'status = open AND label = bug'. Default: all.
    #[arg(long, default_value = "", hide_default_value = true, value_name = "FILTER")]
    pub filter: String,
    /// Deleted issues too.
    #[arg(long)]
    pub show_deleted: bool,
    /// Put ' in front of values that a spreadsheet would run as formulas. Such a file is for looking at, not for importing.
    #[arg(long)]
    pub escape_formulas: bool,
}

fn parse_column_name(text: &str) -> Result<(String, String), String> {
    // Ours have no =, theirs may.
    let (theirs, ours) = text.rsplit_once('=').ok_or("has no =; it is like Summary=title")?;
    if theirs.is_empty() {
        return Err("names no column of the file; it is like Summary=title".to_owned());
    }
    Ok((theirs.to_owned(), ours.to_owned()))
}

fn parse_separator(text: &str) -> Result<String, String> {
    match text {
        "tab" | "\\t" => Ok("\t".to_owned()),
        _ if text.chars().count() == 1 => Ok(text.to_owned()),
        _ => Err("must be one character, or tab".to_owned()),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImportModeName {
    Atomic,
    SkipInvalid,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OnExistingName {
    Fail,
    Skip,
    Update,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum StatusName {
    Open,
    #[value(alias = "in_progress")]
    InProgress,
    Closed,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PriorityName {
    Low,
    Medium,
    High,
    Critical,
}

impl From<ImportModeName> for pb::ImportMode {
    fn from(mode: ImportModeName) -> Self {
        match mode {
            ImportModeName::Atomic => Self::Atomic,
            ImportModeName::SkipInvalid => Self::SkipInvalid,
        }
    }
}

impl From<OnExistingName> for pb::OnExisting {
    fn from(what: OnExistingName) -> Self {
        match what {
            OnExistingName::Fail => Self::Fail,
            OnExistingName::Skip => Self::Skip,
            OnExistingName::Update => Self::Update,
        }
    }
}

impl From<StatusName> for pb::Status {
    fn from(status: StatusName) -> Self {
        match status {
            StatusName::Open => Self::Open,
            StatusName::InProgress => Self::InProgress,
            StatusName::Closed => Self::Closed,
        }
    }
}

impl From<PriorityName> for pb::Priority {
    fn from(priority: PriorityName) -> Self {
        match priority {
            PriorityName::Low => Self::Low,
            PriorityName::Medium => Self::Medium,
            PriorityName::High => Self::High,
            PriorityName::Critical => Self::Critical,
        }
    }
}

impl Database {
    pub fn data_dir(&self) -> anyhow::Result<PathBuf> {
        self.data_dir.path()
    }
}

impl DataDir {
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        if let Some(dir) = &self.data_dir {
            return Ok(dir.clone());
        }
        // SAFETY: it only asks for a number, and cannot fail.
        if unsafe { libc::geteuid() } == 0 {
            return Ok("/var/lib/issue-tracker".into());
        }
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data_home = variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        Ok(data_home.context("no home directory to keep data in; give --data-dir")?.join("issue-tracker"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(args: &[&str]) -> Result<Box<ImportArgs>, String> {
        let all = ["issue-tracker", "import", "issues.csv"].iter().chain(args);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.command() {
            Command::Import(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_server_is_a_host_and_port_with_or_without_a_scheme() {
        for address in ["127.0.0.1:50051", "http://127.0.0.1:50051", "http://127.0.0.1:50051/"] {
            let server = import(&["--server", address]).unwrap().connection.server;
            assert_eq!(server.to_string(), "http://127.0.0.1:50051/");
        }
        assert_eq!(import(&["--server", "[::1]:7"]).unwrap().connection.server.host(), Some("[::1]"));
        let encrypted = import(&["--server", "https://tracker.example:443"]).unwrap().connection.server;
        assert_eq!((encrypted.scheme_str(), encrypted.port_u16()), (Some("https"), Some(443)));
        for (address, why) in [
            ("ftp://tracker.example:443", "only http:// and https:// are spoken"),
            ("https://tracker.example", "has no port"),
            ("tracker.example", "has no port"),
            ("http://tracker.example:80/api", "has a path"),
            ("", "it is like 127.0.0.1:50051"),
        ] {
            let error = import(&["--server", address]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_clients_certificate_and_key_come_together() {
        import(&["--client-cert", "a.crt", "--client-key", "a.key"]).unwrap();
        assert!(import(&["--client-cert", "a.crt"]).unwrap_err().contains("--client-key"));
        assert!(import(&["--client-key", "a.key"]).unwrap_err().contains("--client-cert"));
    }

    #[test]
    fn columns_are_mapped_at_the_last_equals_sign() {
        let args = import(&["--map", "Summary=title", "--map", "a=b=labels", "--map", "Notes="]).unwrap();
        let pairs: Vec<_> = args.map.iter().map(|(theirs, ours)| (&**theirs, &**ours)).collect();
        assert_eq!(pairs, [("Summary", "title"), ("a=b", "labels"), ("Notes", "")]);
        for bad in ["Summary", "=title"] {
            assert!(import(&["--map", bad]).unwrap_err().contains("it is like Summary=title"));
        }
    }

    #[test]
    fn a_separator_is_one_character_or_tab() {
        for (given, taken) in [(";", ";"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t")] {
            assert_eq!(import(&["--separator", given]).unwrap().separator.unwrap(), taken);
        }
        assert!(import(&["--label-separator", ", "]).unwrap_err().contains("one character"));
    }
}
