//! The way to a server, and what its errors mean: whether another try may help, and how they read.

use std::{
    env,
    error::Error,
    fs,
    io::{self, ErrorKind},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use http::Uri;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_types::StatusExt;

use super::printable;
use crate::{
    config::{ClientTls, Connection},
    error::ERROR_DOMAIN,
    tls::{
        pem,
        verify::{Roots, Verifier},
    },
};

const TOKEN_VARIABLE: &str = "ISSUE_TRACKER_TOKEN";
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// A server that has gone without a word is noticed after these two.
const PING_EVERY: Duration = Duration::from_secs(20);
const PING_ANSWER_MAX: Duration = Duration::from_secs(20);

/// A server, and who we are to it.
pub struct Server {
    endpoint: Endpoint,
    authorization: MetadataValue<Ascii>,
}

impl Server {
    pub fn new(args: &Connection) -> anyhow::Result<Self> {
        if !is_encrypted(&args.server) && !is_this_machine(&args.server) && !args.insecure_plaintext {
            bail!(
                "{} would be sent the token unencrypted; reach it by https://, or give --insecure-plaintext if nobody \
                 else can listen to the network in between",
                args.server
            );
        }
        let endpoint = endpoint(&args.server, &args.tls)?;
        let token = find_token(args)?;
        let mut authorization = MetadataValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| anyhow!("the token has characters that no token has"))?;
        authorization.set_sensitive(true);
        let endpoint = endpoint
            .connect_timeout(CONNECT_MAX)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_ANSWER_MAX);
        Ok(Self { endpoint, authorization })
    }

    /// A connection of its own: whatever was wrong with the last one is gone.
    pub async fn connect(&self) -> Result<Channel, Failure> {
        self.endpoint.connect().await.map_err(|error| {
            let why = format!("{} cannot be reached ({})", self.address(), printable(&root_cause(&error)));
            if is_tls_refusal(&error) { Failure::Final(anyhow!(why)) } else { Failure::passing(why) }
        })
    }

    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    fn address(&self) -> &str {
        self.endpoint.uri().authority().map_or("the server", |authority| authority.as_str())
    }
}

/// How a service is reached, encrypted if its address says so.
pub fn endpoint(server: &Uri, tls: &ClientTls) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::from(server.clone());
    if !is_encrypted(server) {
        if tls.ca_cert.is_some() || tls.client_cert.is_some() {
            bail!("{server} is not encrypted, and certificates are for https:// only");
        }
        return Ok(endpoint);
    }
    let roots = match &tls.ca_cert {
        Some(path) => Roots::file("--ca-cert", path)?,
        None => Roots::system().context("no --ca-cert is given")?,
    };
    let mut config = ClientTlsConfig::new();
    if let Some(name) = &tls.server_name {
        config = config.domain_name(name);
    }
    if let (Some(certificate), Some(key)) = (&tls.client_cert, &tls.client_key) {
        let chain = pem::read("--client-cert", certificate)?;
        let private_key = pem::read("--client-key", key)?;
        pem::certificates("--client-cert", certificate, &chain)?;
        pem::private_key("--client-key", key, &private_key)?;
        config = config.identity(Identity::from_pem(chain, private_key));
    }
    endpoint
        .tls_config_with_verifier(config, Verifier::full(roots))
        .context("--client-cert, --client-key or the server's name cannot be used")
}

fn is_encrypted(server: &Uri) -> bool {
    server.scheme_str() == Some("https")
}

fn find_token(args: &Connection) -> anyhow::Result<String> {
    if let Some(path) = &args.token_file {
        return fs::read_to_string(path).with_context(|| format!("cannot read the token in {}", path.display()));
    }
    if let Ok(token) = env::var(TOKEN_VARIABLE)
        && !token.is_empty()
    {
        return Ok(token);
    }
    let missing = || format!("no token; give --token-file FILE, or set {TOKEN_VARIABLE}");
    // This machine's administrator is nobody elsewhere, and his token is not to be told there.
    if !is_this_machine(&args.server) {
        return Err(anyhow!(missing()));
    }
    let path: PathBuf = args.data_dir.path()?.join("admin.token");
    read_own_token(&path)?.with_context(missing)
}

fn read_own_token(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(token) => Ok(Some(token)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn is_this_machine(server: &Uri) -> bool {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Why a call did not work.
#[derive(Debug)]
pub enum Failure {
    /// Another try may fare better, after `wait` if the server has asked for it.
    Passing { why: String, wait: Option<Duration> },
    /// Another try would end the same.
    Final(anyhow::Error),
}

impl Failure {
    pub fn passing(why: impl Into<String>) -> Self {
        Self::Passing { why: why.into(), wait: None }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// What the server has said, or what has become of the connection to it.
pub fn failure(status: &Status) -> Failure {
    let info = status.get_details_error_info();
    let is_ours = info.as_ref().is_some_and(|info| info.domain == ERROR_DOMAIN);
    let is_passing = match status.code() {
        Code::Unavailable | Code::Aborted | Code::ResourceExhausted | Code::DeadlineExceeded | Code::Cancelled => true,
        // Without details it is not the server that speaks, but what has become of the connection.
        Code::Unknown | Code::Internal => !is_ours,
        Code::OutOfRange => info.is_some_and(|info| info.reason == "IMPORT_OFFSET_GAP"),
        _ => false,
    };
    if !is_passing {
        return Failure::Final(anyhow!(describe(status)));
    }
    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay);
    if let Some(source) = status.source()
        && is_tls_refusal(source)
    {
        return Failure::Final(anyhow!("the connection is refused ({})", printable(&root_cause(source))));
    }
    let why = match status.source() {
        Some(source) if !is_ours => format!("the connection is lost ({})", printable(&root_cause(source))),
        _ if status.message().is_empty() => format!("the server says {}", code_name(status.code())),
        _ => printable(status.message()),
    };
    Failure::Passing { why, wait }
}

/// What [`failure`] tells, as a person reads it.
pub fn why(status: &Status) -> String {
    match failure(status) {
        Failure::Passing { why, .. } => why,
        Failure::Final(error) => error.to_string(),
    }
}

/// An error as a person reads it: several violations are lines of their own.
fn describe(status: &Status) -> String {
    let code = code_name(status.code());
    let message = printable(status.message());
    let violations = status.get_details_bad_request().map(|request| request.field_violations).unwrap_or_default();
    let mut text = match (&*message, &violations[..]) {
        (message, [_, _, ..]) => {
            let mut text = format!("refused ({code}):");
            for violation in &violations {
                let line = format!("{}: {}", violation.field, violation.description);
                text += &format!("\n  {}", printable(&line));
            }
            // The message says how many there are that are not described.
            if let Some((_, rest)) = message.rsplit_once("; and ")
                && rest.ends_with(" more")
            {
                text += &format!("\n  and {rest}");
            }
            text
        }
        ("", _) => format!("the server says {code}"),
        (message, _) => format!("{message} ({code})"),
    };
    if status.code() == Code::Unauthenticated {
        text += &format!("\nthe token is that of --token-file, {TOKEN_VARIABLE} or admin.token in the data directory");
    }
    text
}

/// `INVALID_ARGUMENT`, as the service's documentation has it.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for char in format!("{code:?}").chars() {
        if char.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(char.to_ascii_uppercase());
    }
    name
}

/// Whether one side does not want the other's certificates, or does not speak TLS.
fn is_tls_refusal(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<rustls::Error>() || wrapped.is_some_and(|error| error.is::<rustls::Error>()) {
            return true;
        }
        next = error.source();
    }
    // What a server says behind its handshake comes as text only.
    root_cause(error).contains("received fatal alert")
}

fn root_cause(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    fn ours(code: Code, reason: &str, message: &str, violations: &[(&str, &str)]) -> Status {
        let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, []);
        if !violations.is_empty() {
            let violations = violations.iter().map(|(field, text)| FieldViolation::new(*field, *text));
            details.set_bad_request(violations.collect::<Vec<_>>());
        }
        if code == Code::ResourceExhausted {
            details.set_retry_info(Some(Duration::from_millis(500)));
        }
        Status::with_error_details(code, message, details)
    }

    fn is_passing(status: &Status) -> bool {
        matches!(failure(status), Failure::Passing { .. })
    }

    #[test]
    fn what_another_try_may_mend_is_told_from_what_it_does_not() {
        for (code, passing) in [
            (Code::Unavailable, true),
            (Code::Aborted, true),
            (Code::ResourceExhausted, true),
            (Code::DeadlineExceeded, true),
            (Code::Cancelled, true),
            (Code::Internal, false),
            (Code::InvalidArgument, false),
            (Code::PermissionDenied, false),
            (Code::FailedPrecondition, false),
            (Code::Unauthenticated, false),
            (Code::NotFound, false),
            (Code::OutOfRange, false),
            (Code::Unimplemented, false),
        ] {
            assert_eq!(is_passing(&ours(code, "WHATEVER", "why", &[])), passing, "{code:?}");
        }
        assert!(is_passing(&ours(Code::OutOfRange, "IMPORT_OFFSET_GAP", "why", &[])));
        assert!(is_passing(&Status::new(Code::Unknown, "h2 protocol error")), "not the server's word");
        assert!(is_passing(&Status::new(Code::Internal, "h2 protocol error")), "not the server's word");
    }

    #[test]
    fn the_server_says_how_long_to_wait() {
        let Failure::Passing { why, wait } = failure(&ours(Code::ResourceExhausted, "OVERLOADED", "too much", &[]))
        else {
            panic!("is passing");
        };
        assert_eq!((&*why, wait), ("too much", Some(Duration::from_millis(500))));
    }

    #[test]
    fn one_violation_is_its_message_and_several_are_lines() {
        let one = ours(Code::InvalidArgument, "INVALID", "header: has no title", &[("header", "has no title")]);
        assert_eq!(describe(&one), "header: has no title (INVALID_ARGUMENT)");
        let two = [("header.\"a\"", "is unknown"), ("header.\"b\"", "is unknown\x1b[2J")];
        let message = "header.\"a\": is unknown; header.\"b\": is unknown; and 7 more";
        assert_eq!(
            describe(&ours(Code::InvalidArgument, "INVALID", message, &two)),
            "refused (INVALID_ARGUMENT):\n  header.\"a\": is unknown\n  header.\"b\": is unknown\\u{1b}[2J\n  and 7 more"
        );
    }

    #[test]
    fn the_own_token_is_for_this_machine_only() {
        for (server, own) in [
            ("http://127.0.0.1:1", true),
            ("http://localhost:1", true),
            ("http://[::1]:1", true),
            ("https://localhost:1", true),
            ("http://10.0.0.1:1", false),
            ("http://localhost.example:1", false),
        ] {
            assert_eq!(is_this_machine(&server.parse().unwrap()), own, "{server}");
        }
    }
}
