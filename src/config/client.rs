//! The flags of the commands that call a running service: `health`, `import` and `export`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{ArgAction, Args, ValueEnum, builder::BoolishValueParser, value_parser};
use http::Uri;
use uuid::Uuid;

use super::{ClientTls, database::DataDir, serve::parse_listen};
use crate::pb;

/// The environment variable with the token itself. A flag would show it in the list of processes.
pub const TOKEN_VARIABLE: &str = "ISSUE_TRACKER_TOKEN";

#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Address of the service: HOST:PORT, http://HOST:PORT or https://HOST:PORT [default: http:// and --listen]
    #[arg(long, env = "ISSUE_TRACKER_SERVER", value_name = "ADDRESS", value_parser = parse_server)]
    pub server: Option<Uri>,
    /// Address that a service on this machine listens on
    #[arg(long, env = "ISSUE_TRACKER_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS",
        value_parser = parse_listen)]
    pub listen: SocketAddr,
    /// Name to check, such as issuetracker.writes [default: the service as a whole]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME")]
    pub service: String,
    #[command(flatten)]
    pub tls: ClientTls,
}

/// How a client connects to the service and retries.
#[derive(Debug, Args)]
pub struct Connection {
    /// Address of the service: HOST:PORT, http://HOST:PORT or https://HOST:PORT
    #[arg(long, env = "ISSUE_TRACKER_SERVER", default_value = "http://127.0.0.1:50051", value_name = "ADDRESS",
        value_parser = parse_server, help_heading = "Connection")]
    pub server: Uri,
    /// File with the token [default: $ISSUE_TRACKER_TOKEN, else admin.token of a service on this machine]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    pub token_file: Option<PathBuf>,
    #[command(flatten, next_help_heading = "Connection")]
    pub data_dir: DataDir,
    /// Time without progress after which retries end, in seconds; at most 5 until the service responds
    #[arg(long, env = "ISSUE_TRACKER_RETRY_SECONDS", default_value_t = 300, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(0..=604_800), help_heading = "Connection")]
    retry_seconds: u64,
    /// Send the token unencrypted to another machine
    #[arg(long, env = "ISSUE_TRACKER_INSECURE_PLAINTEXT", value_name = "BOOL", default_value = "false",
        default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set,
        value_parser = BoolishValueParser::new(), help_heading = "TLS")]
    pub insecure_plaintext: bool,
    #[command(flatten)]
    pub tls: ClientTls,
}

impl Connection {
    pub fn retry_max(&self) -> Duration {
        Duration::from_secs(self.retry_seconds)
    }
}

#[derive(Debug, Args)]
pub struct ImportArgs {
    /// CSV file, plain or gzip-compressed; - reads standard input and buffers it in $TMPDIR
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Import all rows or none (atomic), or the valid rows (skip-invalid)
    #[arg(long, value_enum, default_value_t = ImportModeName::Atomic, value_name = "MODE", help_heading = "Import")]
    pub mode: ImportModeName,
    /// What to do with a row whose external_id exists: reject the row, skip it, or update the issue
    #[arg(long, value_enum, default_value_t = OnExistingName::Fail, value_name = "ACTION", help_heading = "Import")]
    pub on_existing: OnExistingName,
    /// Create labels that do not exist instead of rejecting their rows
    #[arg(long, help_heading = "Import")]
    pub create_labels: bool,
    /// Validate every row and write nothing (dry run)
    #[arg(long, help_heading = "Import")]
    pub validate_only: bool,
    /// Import to resume after an interruption [default: a new import]
    #[arg(long, value_name = "UUID", help_heading = "Import")]
    pub import_id: Option<Uuid>,
    /// Status of new issues whose row has none [default: open]
    #[arg(long, value_enum, value_name = "STATUS", help_heading = "Import")]
    pub default_status: Option<StatusName>,
    /// Priority of new issues whose row has none [default: none]
    #[arg(long, value_enum, value_name = "PRIORITY", help_heading = "Import")]
    pub default_priority: Option<PriorityName>,
    /// Username of the assignee of new issues whose row has none [default: unassigned]
    #[arg(long, value_name = "USERNAME", help_heading = "Import")]
    pub default_assignee: Option<String>,

    /// Map a column of the file to a field, as Summary=title; Notes= ignores the column; repeatable
    #[arg(long, value_name = "COLUMN=FIELD", value_parser = parse_column_name, help_heading = "File format")]
    pub map: Vec<(String, String)>,
    /// Ignore columns that match no field instead of refusing the file
    #[arg(long, help_heading = "File format")]
    pub ignore_unknown_columns: bool,
    /// Field separator: one character, or tab [default: a comma]
    #[arg(long, value_name = "CHARACTER", value_parser = parse_separator, help_heading = "File format")]
    pub separator: Option<String>,
    /// Separator of the labels in a field: one character, or tab [default: a semicolon]
    #[arg(long, value_name = "CHARACTER", value_parser = parse_separator, help_heading = "File format")]
    pub label_separator: Option<String>,

    /// Write progress, row errors and the summary to standard output as JSON lines
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// File for the rejected rows, unchanged and with the header, to be corrected and imported again
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub rejected: Option<PathBuf>,
    /// Maximum row errors to print [default: 20 on a terminal, else 1,000]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=10_000), help_heading = "Output")]
    pub errors: Option<u32>,

    #[command(flatten)]
    pub connection: Connection,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// File to write once the export is complete; - or none writes to standard output
    #[arg(value_name = "FILE|-")]
    pub file: Option<PathBuf>,
    /// Filter of ListIssues, such as 'status = open AND label = bug' [default: all issues]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "FILTER", help_heading = "Export")]
    pub filter: String,
    /// Include deleted issues
    #[arg(long, help_heading = "Export")]
    pub show_deleted: bool,
    /// Prefix values that a spreadsheet would run as formulas with '; such a file does not import back unchanged
    #[arg(long, help_heading = "Export")]
    pub escape_formulas: bool,
    #[command(flatten)]
    pub connection: Connection,
}

fn parse_server(text: &str) -> Result<Uri, String> {
    const EXAMPLE: &str = "expected an address such as http://127.0.0.1:50051";
    let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    let uri: Uri = with_scheme.parse().map_err(|error| format!("{error}; {EXAMPLE}"))?;
    match (uri.scheme_str(), uri.port_u16(), uri.path()) {
        (Some("http" | "https"), Some(_), "/") => Ok(uri),
        (Some("http" | "https"), None, _) => Err(format!("no port; {EXAMPLE}")),
        (Some("http" | "https"), Some(_), path) => Err(format!("unexpected path {path}; {EXAMPLE}")),
        _ => Err(format!("unsupported scheme; {EXAMPLE}")),
    }
}

fn parse_column_name(text: &str) -> Result<(String, String), String> {
    // Field names contain no "=", column names may.
    let (column, field) = text.rsplit_once('=').ok_or("no \"=\"; expected a mapping such as Summary=title")?;
    if column.is_empty() {
        return Err("no column name; expected a mapping such as Summary=title".to_owned());
    }
    Ok((column.to_owned(), field.to_owned()))
}

fn parse_separator(text: &str) -> Result<String, String> {
    match text {
        "tab" | "\\t" => Ok("\t".to_owned()),
        _ if text.chars().count() == 1 => Ok(text.to_owned()),
        _ => Err("expected one character, or tab".to_owned()),
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
    fn from(action: OnExistingName) -> Self {
        match action {
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::{Cli, Command},
        *,
    };

    fn import(args: &[&str]) -> Result<Box<ImportArgs>, String> {
        let all = ["issue-tracker", "import", "issues.csv"].iter().chain(args);
        match Cli::try_parse_from(all).map_err(|error| error.to_string())?.into_command() {
            Command::Import(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn server_address_needs_a_port_and_takes_an_optional_scheme() {
        for address in ["127.0.0.1:50051", "http://127.0.0.1:50051", "http://127.0.0.1:50051/"] {
            let server = import(&["--server", address]).unwrap().connection.server;
            assert_eq!(server.to_string(), "http://127.0.0.1:50051/");
        }
        assert_eq!(import(&["--server", "[::1]:7"]).unwrap().connection.server.host(), Some("[::1]"));
        let encrypted = import(&["--server", "https://tracker.example:443"]).unwrap().connection.server;
        assert_eq!((encrypted.scheme_str(), encrypted.port_u16()), (Some("https"), Some(443)));
        for (address, why) in [
            ("ftp://tracker.example:443", "unsupported scheme"),
            ("https://tracker.example", "no port"),
            ("tracker.example", "no port"),
            ("http://tracker.example:80/api", "unexpected path /api"),
            ("", "such as http://127.0.0.1:50051"),
        ] {
            let error = import(&["--server", address]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn client_certificate_and_key_require_each_other() {
        import(&["--client-cert", "a.crt", "--client-key", "a.key"]).unwrap();
        assert!(import(&["--client-cert", "a.crt"]).unwrap_err().contains("--client-key"));
        assert!(import(&["--client-key", "a.key"]).unwrap_err().contains("--client-cert"));
    }

    #[test]
    fn column_mapping_splits_at_the_last_equals_sign() {
        let args = import(&["--map", "Summary=title", "--map", "a=b=labels", "--map", "Notes="]).unwrap();
        let pairs: Vec<_> = args.map.iter().map(|(column, field)| (&**column, &**field)).collect();
        assert_eq!(pairs, [("Summary", "title"), ("a=b", "labels"), ("Notes", "")]);
        for bad in ["Summary", "=title"] {
            assert!(import(&["--map", bad]).unwrap_err().contains("such as Summary=title"));
        }
    }

    #[test]
    fn separator_is_one_character_or_tab() {
        for (given, taken) in [(";", ";"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t")] {
            assert_eq!(import(&["--separator", given]).unwrap().separator.unwrap(), taken);
        }
        assert!(import(&["--label-separator", ", "]).unwrap_err().contains("one character"));
    }
}
