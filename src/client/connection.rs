//! Connections to a server, and its errors: whether a retry can succeed, and what the user reads.

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

use super::{
    plaintext::{self, ConnectError},
    printable,
};
use crate::{
    config::{ClientTls, Connection, TOKEN_VARIABLE},
    error::ERROR_DOMAIN,
    tls::{
        pem,
        verify::{Roots, Verifier},
    },
};

/// Time allowed for TCP and TLS handshakes, and without TLS for the server's first HTTP/2 frame.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// HTTP/2 keep-alive: a silent server is considered lost after the sum of the two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// A server and the caller's token.
pub struct Server {
    endpoint: ServerEndpoint,
    authorization: MetadataValue<Ascii>,
}

/// A server's address and how to connect to it.
pub struct ServerEndpoint {
    endpoint: Endpoint,
}

impl Server {
    /// Fails if the token is missing, or would be sent unencrypted to another machine without --insecure-plaintext.
    pub fn new(args: &Connection) -> anyhow::Result<Self> {
        if !is_encrypted(&args.server) && !is_this_machine(&args.server) && !args.insecure_plaintext {
            bail!(
                "--server: {} would be sent the token unencrypted; use https://, or --insecure-plaintext on a network that \
                 no one else can read",
                args.server
            );
        }
        let endpoint = ServerEndpoint::new(&args.server, &args.tls)?;
        let token = find_token(args)?;
        let mut authorization = MetadataValue::try_from(format!("Bearer {}", token.trim()))
            .map_err(|_| anyhow!("token: contains invalid characters; expected itk_ and letters, digits, - or _"))?;
        authorization.set_sensitive(true);
        Ok(Self { endpoint, authorization })
    }

    /// Opens a new connection. An attempt does not reuse the connection of a failed one.
    pub async fn connect(&self) -> Result<Channel, Failure> {
        self.endpoint.connect().await
    }

    /// Returns a request with the caller's token.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }
}

impl ServerEndpoint {
    /// Fails if the certificates cannot be used, or are given for an `http://` address.
    pub fn new(server: &Uri, tls: &ClientTls) -> anyhow::Result<Self> {
        let endpoint = encrypted_if_https(server, tls)?
            .connect_timeout(CONNECT_MAX)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        Ok(Self { endpoint })
    }

    /// Opens a new connection. Fails unless a server responds with TLS for `https://`, or with HTTP/2 for `http://`.
    pub async fn connect(&self) -> Result<Channel, Failure> {
        if is_encrypted(self.endpoint.uri()) {
            return self.endpoint.connect().await.map_err(|error| self.connect_failure(&error));
        }
        let address = self.address();
        plaintext::connect(&self.endpoint, CONNECT_MAX).await.map_err(|error| match error {
            ConnectError::Unreachable(error) => self.connect_failure(&*error),
            ConnectError::RequiresTls => {
                Failure::Final(anyhow!("--server: {address} requires TLS; use https://{address}"))
            }
            ConnectError::OtherProtocol(protocol) => Failure::Final(anyhow!(
                "--server: {address} speaks {}, not gRPC; expected the address of the service",
                printable(&protocol)
            )),
        })
    }

    pub fn address(&self) -> &str {
        self.endpoint.uri().authority().map_or("the server", |authority| authority.as_str())
    }

    fn connect_failure(&self, error: &(dyn Error + 'static)) -> Failure {
        let address = self.address();
        match rustls_error(error) {
            Some(rustls::Error::InvalidMessage(_)) => {
                Failure::Final(anyhow!("--server: {address} does not speak TLS; use http://{address}"))
            }
            cause => {
                let why = format!("cannot connect to {address} ({})", printable(&root_cause(error)));
                if cause.is_some() || is_tls_alert(error) {
                    Failure::Final(anyhow!(why))
                } else {
                    Failure::retryable(why)
                }
            }
        }
    }
}

fn encrypted_if_https(server: &Uri, tls: &ClientTls) -> anyhow::Result<Endpoint> {
    let endpoint = Endpoint::from(server.clone());
    if !is_encrypted(server) {
        if tls.ca_cert.is_some() || tls.client_cert.is_some() {
            bail!("--server: {server} is not encrypted; certificates are for https:// only");
        }
        return Ok(endpoint);
    }
    let roots = match &tls.ca_cert {
        Some(path) => Roots::file("--ca-cert", path)?,
        None => Roots::system().context("--ca-cert is not set")?,
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
        .context("--client-cert, --client-key or --server-name is invalid")
}

fn is_encrypted(server: &Uri) -> bool {
    server.scheme_str() == Some("https")
}

fn find_token(args: &Connection) -> anyhow::Result<String> {
    if let Some(path) = &args.token_file {
        return fs::read_to_string(path).with_context(|| format!("cannot read --token-file {}", path.display()));
    }
    if let Ok(token) = env::var(TOKEN_VARIABLE)
        && !token.is_empty()
    {
        return Ok(token);
    }
    let missing = || format!("token: missing; expected --token-file or {TOKEN_VARIABLE}");
    // The token of this machine's administrator must not be sent to another machine.
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

/// Why an attempt failed.
#[derive(Debug)]
pub enum Failure {
    /// A retry can succeed. `wait` is the delay that the server has asked for.
    Retryable { why: String, wait: Option<Duration> },
    /// A retry would fail too.
    Final(anyhow::Error),
}

impl Failure {
    pub fn retryable(why: impl Into<String>) -> Self {
        Self::Retryable { why: why.into(), wait: None }
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Retryable { why, .. } => anyhow!(why),
            Failure::Final(error) => error,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Final(error)
    }
}

/// The reasons of RESOURCE_EXHAUSTED for limits that another attempt reaches too.
const LASTING_LIMITS: [&str; 3] = ["LABELS_EXCEEDED", "STORED_RESPONSES_EXCEEDED", "METADATA_TOO_LARGE"];

/// Classifies the error of a call: an error of the server, or of the connection to it.
pub fn failure(status: &Status) -> Failure {
    let info = status.get_details_error_info();
    let is_from_service = info.as_ref().is_some_and(|info| info.domain == ERROR_DOMAIN);
    let is_retryable = match status.code() {
        Code::Unavailable | Code::Aborted | Code::Cancelled => true,
        Code::ResourceExhausted => !info.as_ref().is_some_and(|info| LASTING_LIMITS.contains(&&*info.reason)),
        // The next attempt would begin at the start, and take as long.
        Code::DeadlineExceeded => info.is_none_or(|info| info.reason != "EXPORT_TIMEOUT"),
        // An error without our details is not the service's but the connection's.
        Code::Unknown | Code::Internal => !is_from_service,
        Code::OutOfRange => info.is_some_and(|info| info.reason == "IMPORT_OFFSET_GAP"),
        _ => false,
    };
    if !is_retryable {
        return Failure::Final(anyhow!(describe(status)));
    }
    let wait = status.get_details_retry_info().and_then(|info| info.retry_delay);
    if let Some(source) = status.source()
        && (rustls_error(source).is_some() || is_tls_alert(source))
    {
        return Failure::Final(anyhow!("TLS failed ({})", printable(&root_cause(source))));
    }
    let why = match status.source() {
        Some(source) if !is_from_service => format!("the connection was lost ({})", printable(&root_cause(source))),
        _ if status.message().is_empty() => format!("the server failed with {}", code_name(status.code())),
        _ => printable(status.message()),
    };
    Failure::Retryable { why, wait }
}

/// Formats an error for the user. Several violations are on lines of their own.
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
            // The message ends with the number of violations that the details leave out.
            if let Some((_, rest)) = message.rsplit_once("; and ")
                && rest.ends_with(" more")
            {
                text += &format!("\n  and {rest}");
            }
            text
        }
        ("", _) => format!("the server failed with {code}"),
        (message, _) => format!("{message} ({code})"),
    };
    if status.code() == Code::Unauthenticated {
        text +=
            &format!("\nthe token was read from --token-file, {TOKEN_VARIABLE} or admin.token in the data directory");
    }
    text
}

/// Returns the canonical name of a code, such as `INVALID_ARGUMENT`.
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

/// Returns the TLS error in the chain of causes.
fn rustls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let found = error.downcast_ref().or_else(|| wrapped.and_then(|error| error.downcast_ref()));
        if found.is_some() {
            return found;
        }
        next = error.source();
    }
    None
}

/// Returns whether the server has ended the connection with a TLS alert after its handshake. h2 keeps only the text of
/// that error.
fn is_tls_alert(error: &(dyn Error + 'static)) -> bool {
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

    fn service_error(code: Code, reason: &str, message: &str, violations: &[(&str, &str)]) -> Status {
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

    fn is_retryable(status: &Status) -> bool {
        matches!(failure(status), Failure::Retryable { .. })
    }

    #[test]
    fn errors_are_retryable_or_final_by_code_and_reason() {
        for (code, retryable) in [
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
            assert_eq!(is_retryable(&service_error(code, "WHATEVER", "why", &[])), retryable, "{code:?}");
        }
        let exceeded = ErrorDetails::with_error_info("LABELS_EXCEEDED", ERROR_DOMAIN, []);
        assert!(!is_retryable(&Status::with_error_details(Code::ResourceExhausted, "too many labels", exceeded)));
        assert!(is_retryable(&service_error(Code::OutOfRange, "IMPORT_OFFSET_GAP", "why", &[])));
        assert!(!is_retryable(&service_error(Code::DeadlineExceeded, "EXPORT_TIMEOUT", "why", &[])));
        assert!(is_retryable(&Status::new(Code::Unknown, "h2 protocol error")), "an error of the connection");
        assert!(is_retryable(&Status::new(Code::Internal, "h2 protocol error")), "an error of the connection");
    }

    #[test]
    fn a_retry_waits_as_long_as_the_server_asks() {
        let Failure::Retryable { why, wait } =
            failure(&service_error(Code::ResourceExhausted, "OVERLOADED", "too much", &[]))
        else {
            panic!("is retryable");
        };
        assert_eq!((&*why, wait), ("too much", Some(Duration::from_millis(500))));
    }

    #[test]
    fn several_violations_are_printed_on_lines_of_their_own() {
        let one =
            service_error(Code::InvalidArgument, "INVALID", "header: has no title", &[("header", "has no title")]);
        assert_eq!(describe(&one), "header: has no title (INVALID_ARGUMENT)");
        let two = [("header.\"a\"", "is unknown"), ("header.\"b\"", "is unknown\x1b[2J")];
        let message = "header.\"a\": is unknown; header.\"b\": is unknown; and 7 more";
        assert_eq!(
            describe(&service_error(Code::InvalidArgument, "INVALID", message, &two)),
            "refused (INVALID_ARGUMENT):\n  header.\"a\": is unknown\n  header.\"b\": is unknown\\u{1b}[2J\n  and 7 more"
        );
    }

    #[test]
    fn the_local_administrator_token_is_for_this_machine_only() {
        for (server, is_local) in [
            ("http://127.0.0.1:1", true),
            ("http://localhost:1", true),
            ("http://[::1]:1", true),
            ("https://localhost:1", true),
            ("http://10.0.0.1:1", false),
            ("http://localhost.example:1", false),
        ] {
            assert_eq!(is_this_machine(&server.parse().unwrap()), is_local, "{server}");
        }
    }
}
