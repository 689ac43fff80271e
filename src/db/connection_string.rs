//! Connection strings (`--database-url`), interpreted as libpq does.
//!
//! The parser of tokio-postgres does not know the parameters that name certificates. They are removed from its text first.

use std::{fmt, path::PathBuf, str::FromStr};

use anyhow::{anyhow, bail};
use percent_encoding::percent_decode_str;
use tokio_postgres::{
    Config,
    config::{Host, SslMode},
};

use super::tls::{self, Connector, Files, RootsFrom, Verify};

const UNREADABLE: &str = "the database URL is malformed; expected postgresql://user:password@host/database";

/// Parameters of libpq that are refused by name, because ignoring them could weaken security.
const UNSUPPORTED: [&str; 9] = [
    "requiressl",
    "sslcertmode",
    "sslcompression",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "sslsni",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
];

/// The parameter with the password.
const PASSWORD: &str = "password";
/// What is shown instead of a password.
const HIDDEN: &str = "***";

/// A database and how to connect to it.
#[derive(Clone)]
pub struct ConnectionString {
    pub config: Config,
    pub connector: Connector,
}

/// Uses TLS if the server offers it, without verifying the server.
impl From<Config> for ConnectionString {
    fn from(mut config: Config) -> Self {
        if is_on_sockets(&config) {
            config.ssl_mode(SslMode::Disable);
        }
        Self { config, connector: tls::unverified() }
    }
}

impl From<&Config> for ConnectionString {
    fn from(config: &Config) -> Self {
        config.clone().into()
    }
}

impl FromStr for ConnectionString {
    type Err = anyhow::Error;

    /// Parses a connection string, and reads the files that it names. Errors quote neither the text nor the files.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (config, tls) = parse(text)?;
        let Some((verify, files)) = tls else { return Ok(config.into()) };
        Ok(Self { config, connector: tls::connector(&verify, files)? })
    }
}

impl ConnectionString {
    /// Fails as parsing does, but does not read the files that the text names.
    pub fn check(text: &str) -> anyhow::Result<()> {
        parse(text).map(drop)
    }
}

/// Returns the configuration, and what TLS needs if it is possible.
fn parse(text: &str) -> anyhow::Result<(Config, Option<(Verify, Files)>)> {
    let (rest, parameters) = Parameters::take_from(text)?;
    // The message of the parser can quote the password.
    let mut config: Config = rest.parse().map_err(|_| anyhow!(UNREADABLE))?;
    if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
        bail!("the database URL names no host; expected postgresql://user:password@host/database");
    }
    let mode = parameters.mode()?;
    config.ssl_mode(match mode {
        Mode::Disable => SslMode::Disable,
        Mode::Prefer => SslMode::Prefer,
        Mode::Require | Mode::VerifyCa | Mode::VerifyFull => SslMode::Require,
    });
    if mode == Mode::Disable || is_on_sockets(&config) {
        return Ok((config, None));
    }
    if mode != Mode::Prefer && config.get_hosts().iter().any(is_socket) {
        bail!("sslmode={mode} is not possible on a Unix socket, and the database URL names one beside other hosts");
    }
    if config.get_hosts().is_empty() {
        // Certificates are verified against the host name.
        for address in config.get_hostaddrs().to_vec() {
            config.host(address.to_string());
        }
    }
    Ok((config, Some((parameters.verify(mode)?, parameters.files))))
}

/// Returns a connection string without its password, or `***` if it cannot be parsed.
pub fn without_password(text: &str) -> String {
    let shown = match ConnectionString::check(text) {
        Err(_) => None,
        Ok(()) if is_url(text) => Some(url_without_password(text)),
        Ok(()) => pairs_without_password(text),
    };
    shown.unwrap_or_else(|| HIDDEN.to_owned())
}

fn is_url(text: &str) -> bool {
    ["postgres://", "postgresql://"].iter().any(|scheme| text.starts_with(scheme))
}

/// Takes a URL that was parsed: the first `@` ends the credentials.
fn url_without_password(url: &str) -> String {
    let authority = url.find("://").map_or(0, |at| at + 3);
    let (credentials, rest) = url.split_at(url.find('@').unwrap_or(authority));
    let (base, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut shown = match credentials[authority..].split_once(':') {
        Some((user, _)) => format!("{}{user}:{HIDDEN}{base}", &credentials[..authority]),
        None => format!("{credentials}{base}"),
    };
    for (n, pair) in query.split('&').filter(|pair| !pair.is_empty()).enumerate() {
        shown.push(if n == 0 { '?' } else { '&' });
        let key = pair.split('=').next().unwrap_or(pair);
        let is_password = percent_decode_str(key).decode_utf8_lossy() == PASSWORD;
        shown += &if is_password { format!("{key}={HIDDEN}") } else { pair.to_owned() };
    }
    shown
}

/// Returns `None` for text that is not completely pairs.
fn pairs_without_password(pairs: &str) -> Option<String> {
    let mut shown = String::new();
    let mut rest = pairs;
    while let Some((key, _, after)) = first_pair(rest) {
        let pair = rest[..rest.len() - after.len()].trim();
        let separator = if shown.is_empty() { "" } else { " " };
        shown += &if key == PASSWORD { format!("{separator}{key}={HIDDEN}") } else { format!("{separator}{pair}") };
        rest = after;
    }
    rest.trim().is_empty().then_some(shown)
}

/// Returns whether all hosts are Unix sockets. PostgreSQL does not offer TLS on these.
fn is_on_sockets(config: &Config) -> bool {
    // An address takes precedence over the host.
    let hosts = config.get_hosts();
    config.get_hostaddrs().is_empty() && !hosts.is_empty() && hosts.iter().all(is_socket)
}

fn is_socket(host: &Host) -> bool {
    matches!(host, Host::Unix(_))
}

/// The values of `sslmode` without `allow`, which prefers connections without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

const MODES: [(Mode, &str); 5] = [
    (Mode::Disable, "disable"),
    (Mode::Prefer, "prefer"),
    (Mode::Require, "require"),
    (Mode::VerifyCa, "verify-ca"),
    (Mode::VerifyFull, "verify-full"),
];

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MODES.iter().find(|(mode, _)| mode == self).map_or("", |(_, name)| name))
    }
}

/// The parameters that are parsed here instead of by tokio-postgres.
#[derive(Debug, Default, PartialEq, Eq)]
struct Parameters {
    mode: Option<String>,
    roots: Option<String>,
    files: Files,
}

impl Parameters {
    /// Returns the text without the parameters, and the parameters. The last of equal ones wins.
    fn take_from(text: &str) -> anyhow::Result<(String, Self)> {
        let mut parameters = Self::default();
        let rest = if is_url(text) { parameters.take_from_url(text)? } else { parameters.take_from_pairs(text)? };
        Ok((rest, parameters))
    }

    fn take_from_url(&mut self, url: &str) -> anyhow::Result<String> {
        // A password may contain a question mark.
        let behind_user = url.find('@').unwrap_or(0);
        let authority = url.find("://").map_or(0, |at| at + 3);
        if url[authority..].find('/').is_some_and(|slash| authority + slash < behind_user) {
            bail!("the database URL has an @ after a /; encode them as %40 and %2F in names and values");
        }
        let question_mark = url[behind_user..].find('?').map(|at| behind_user + at);
        let after_credentials = &url[behind_user..question_mark.unwrap_or(url.len())];
        if after_credentials.matches('@').count() > 1 {
            bail!("the database URL has more than one @ before its parameters; encode those of the password as %40");
        }
        let Some(question_mark) = question_mark else {
            return Ok(url.to_owned());
        };
        let mut kept = Vec::new();
        for pair in url[question_mark + 1..].split('&') {
            let decoded = |text| percent_decode_str(text).decode_utf8().map_err(|_| anyhow!(UNREADABLE));
            let taken = match pair.split_once('=') {
                Some((key, value)) => self.take(&decoded(key)?, &decoded(value)?)?,
                None => false,
            };
            if !taken {
                kept.push(pair);
            }
        }
        let base = &url[..question_mark];
        Ok(if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) })
    }

    fn take_from_pairs(&mut self, pairs: &str) -> anyhow::Result<String> {
        let mut kept = String::new();
        let mut rest = pairs;
        while let Some((key, value, after)) = first_pair(rest) {
            if !self.take(key, &value)? {
                kept += &rest[..rest.len() - after.len()];
            }
            rest = after;
        }
        // The parser reports what is not a pair.
        Ok(kept + rest)
    }

    fn take(&mut self, key: &str, value: &str) -> anyhow::Result<bool> {
        let value = Some(value).filter(|value| !value.is_empty());
        match key {
            "sslmode" => self.mode = value.map(str::to_owned),
            "sslrootcert" => self.roots = value.map(str::to_owned),
            "sslcert" => self.files.certificate = value.map(PathBuf::from),
            "sslkey" => self.files.key = value.map(PathBuf::from),
            _ if UNSUPPORTED.contains(&key) => bail!("the database URL has {key}, which is not supported"),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn mode(&self) -> anyhow::Result<Mode> {
        let is_system = self.roots.as_deref() == Some("system");
        let Some(name) = &self.mode else {
            return Ok(if is_system { Mode::VerifyFull } else { Mode::Prefer });
        };
        let Some((mode, name)) = MODES.iter().find(|(_, known)| known == name) else {
            bail!("the database URL's sslmode is unknown; expected disable, prefer, require, verify-ca or verify-full");
        };
        if is_system && *mode < Mode::VerifyFull {
            // Anyone can get a certificate for some name from one of these authorities.
            bail!("sslmode={name} is too weak for sslrootcert=system; use verify-full");
        }
        Ok(*mode)
    }

    /// Returns what to verify. As in libpq, a given authority is verified in every mode.
    fn verify(&self, mode: Mode) -> anyhow::Result<Verify> {
        let roots = match self.roots.as_deref() {
            Some("system") => RootsFrom::System,
            Some(file) => RootsFrom::File(file.into()),
            None if mode >= Mode::VerifyCa => {
                bail!("sslmode={mode} needs sslrootcert=FILE, or sslrootcert=system for the platform's authorities")
            }
            None => return Ok(Verify::Nothing),
        };
        Ok(if mode == Mode::VerifyFull { Verify::Full(roots) } else { Verify::Authority(roots) })
    }
}

/// Returns the first `key = 'va\'lue'`, and the rest of the text.
fn first_pair(text: &str) -> Option<(&str, String, &str)> {
    let text = text.trim_start();
    let (key, rest) = text.split_at(text.find(|char: char| char == '=' || char.is_whitespace())?);
    let rest = rest.trim_start().strip_prefix('=')?.trim_start();
    let is_quoted = rest.starts_with('\'');
    let rest = rest.strip_prefix('\'').unwrap_or(rest);
    let mut value = String::new();
    let mut chars = rest.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '\\' => value.push(chars.next()?.1),
            '\'' if is_quoted => return Some((key, value, &rest[at + 1..])),
            space if !is_quoted && space.is_whitespace() => return Some((key, value, &rest[at..])),
            other => value.push(other),
        }
    }
    (!is_quoted).then_some((key, value, ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> (String, [Option<String>; 4]) {
        let (rest, Parameters { mode, roots, files }) = Parameters::take_from(text).unwrap();
        let name = |path: Option<PathBuf>| path.map(|path| path.display().to_string());
        (rest, [mode, roots, name(files.certificate), name(files.key)])
    }

    fn error(text: &str) -> String {
        format!("{:#}", text.parse::<ConnectionString>().err().unwrap())
    }

    #[test]
    fn user_after_the_host_is_refused() {
        for url in ["postgresql://db:5432/app?sslmode=verify-full&user=me@srv", "postgres://u:a/b@h/d"] {
            assert!(error(url).contains("%40"), "{url}");
        }
    }

    #[test]
    fn host_is_required() {
        for text in ["", " ", "user=u dbname=d", "postgresql:///d", "postgresql://?user=u"] {
            assert!(error(text).contains("names no host"), "{text}");
        }
    }

    #[test]
    fn address_beside_a_socket_uses_the_mode() {
        let text = "host=/var/run/postgresql hostaddr=10.0.0.1 user=u sslmode=verify-full";
        assert!(error(text).contains("is not possible on a Unix socket"));
    }

    #[test]
    fn password_is_hidden_and_the_rest_is_shown() {
        for (text, shown) in [
            ("postgresql://u:sesame@h:1/d", "postgresql://u:***@h:1/d"),
            ("postgres://u:ses:ame%40@h,h2/d?sslmode=require", "postgres://u:***@h,h2/d?sslmode=require"),
            ("postgres://u:sesame?a=b@h/d", "postgres://u:***@h/d"),
            (
                "postgresql://u@h/d?connect_timeout=3&password=sesame",
                "postgresql://u@h/d?connect_timeout=3&password=***",
            ),
            ("postgresql://h/d?pass%77ord=sesame&user=u", "postgresql://h/d?pass%77ord=***&user=u"),
            ("postgresql://u@h/d", "postgresql://u@h/d"),
            ("host=h password=sesame user=u", "host=h password=*** user=u"),
            ("host=h password = 'ses\\'ame x=y' sslmode=disable", "host=h password=*** sslmode=disable"),
            ("password=ses\\ ame host='/a b'", "password=*** host='/a b'"),
            // These cannot be parsed.
            ("postgresql://u:p@sesame@h/d", "***"),
            ("postgresql://u:p@sesame/x@h/d", "***"),
            ("postgresql://u:sesame@h:port/d", "***"),
            ("host=h password='sesame", "***"),
            ("host=h password=x sesame", "***"),
            ("sesame", "***"),
            ("", "***"),
        ] {
            assert_eq!(without_password(text), shown, "{text}");
        }
    }

    #[test]
    fn tls_parameters_are_removed_from_a_url() {
        for (url, rest, [mode, roots, certificate, key]) in [
            ("postgresql://u:p@h/d", "postgresql://u:p@h/d", [""; 4]),
            ("postgresql://h/d?sslmode=verify-full", "postgresql://h/d", ["verify-full", "", "", ""]),
            (
                "postgres://u:p%3F@h:1/d?connect_timeout=3&sslrootcert=%2Fa%20b%26.pem&sslmode=verify%2Dca&options=-c%20x%3D1",
                "postgres://u:p%3F@h:1/d?connect_timeout=3&options=-c%20x%3D1",
                ["verify-ca", "/a b&.pem", "", ""],
            ),
            ("postgres://u:a?sslmode=b@h/d?ssl%6Dode=require", "postgres://u:a?sslmode=b@h/d", ["require", "", "", ""]),
            ("postgres://h?sslcert=c&sslkey=k&sslcert=c2", "postgres://h", ["", "", "c2", "k"]),
            ("postgres://h/d?sslmode=&user=x", "postgres://h/d?user=x", [""; 4]),
            ("postgres://h/d?sslmode", "postgres://h/d?sslmode", [""; 4]),
        ] {
            let wanted = [mode, roots, certificate, key].map(|text| Some(text.to_owned()).filter(|t| !t.is_empty()));
            assert_eq!(taken(url), (rest.to_owned(), wanted), "{url}");
        }
    }

    #[test]
    fn tls_parameters_are_removed_from_pairs() {
        for (pairs, rest, [mode, roots, certificate, key]) in [
            ("host=h user=u", "host=h user=u", [""; 4]),
            ("host=h sslmode=verify-full user=u", "host=h user=u", ["verify-full", "", "", ""]),
            (
                "  sslrootcert = '/a b\\'c\\\\.pem'  password='sslmode=x \\' ' sslmode = require",
                "  password='sslmode=x \\' '",
                ["require", "/a b'c\\.pem", "", ""],
            ),
            ("sslcert=/a\\ b sslkey=k\\\\ host=h", " host=h", ["", "", "/a b", "k\\"]),
            ("sslmode='' host=h", " host=h", [""; 4]),
            ("host=h sslmode='open", "host=h sslmode='open", [""; 4]),
            ("host=h nonsense", "host=h nonsense", [""; 4]),
        ] {
            let wanted = [mode, roots, certificate, key].map(|text| Some(text.to_owned()).filter(|t| !t.is_empty()));
            assert_eq!(taken(pairs), (rest.to_owned(), wanted), "{pairs}");
        }
    }

    #[test]
    fn errors_do_not_quote_the_password() {
        for (text, why) in [
            ("postgresql://u:sesame@h:port/d", UNREADABLE),
            ("host=h password='sesame", UNREADABLE),
            ("host=h password=sesame ses=ame", UNREADABLE),
            ("postgresql://u:sesame@h/d?sslmode=%ff", UNREADABLE),
            ("postgresql://u:sesame@h/d?sslmode=sesame", "expected disable, prefer, require"),
            ("postgresql://u:sesame@h/d?sslmode=allow", "expected disable, prefer, require"),
            ("postgresql://u:sesame@h/d?sslcrl=sesame", "has sslcrl, which is not supported"),
            ("postgresql://u:sesame@h/d?sslmode=verify-ca", "sslmode=verify-ca needs sslrootcert"),
            ("postgresql://u:sesame@h/d?sslmode=require&sslrootcert=system", "too weak for sslrootcert=system"),
            ("host=h,/tmp password=sesame sslmode=require", "is not possible on a Unix socket"),
            ("host=h password=sesame sslmode=verify-full sslrootcert=/nowhere.pem", "cannot read sslrootcert /nowhere"),
            ("host=h password=sesame sslrootcert=/dev/null", "sslrootcert /dev/null contains no PEM certificate"),
            ("host=h password=sesame sslcert=/dev/null", "sslcert needs sslkey"),
        ] {
            let error = error(text);
            assert!(error.contains(why) && !error.contains("sesame"), "{text}: {error}");
        }
    }

    #[test]
    fn tls_follows_the_mode_and_is_off_on_unix_sockets() {
        for (text, mode) in [
            ("host=h", SslMode::Prefer),
            ("host=h sslmode=disable", SslMode::Disable),
            ("host=h sslmode=disable sslrootcert=/nowhere.pem", SslMode::Disable),
            ("host=h sslmode=prefer", SslMode::Prefer),
            ("host=h,/tmp", SslMode::Prefer),
            ("postgresql://h/d?sslmode=require", SslMode::Require),
            ("host=/tmp sslmode=verify-full sslrootcert=/nowhere.pem", SslMode::Disable),
            ("postgresql:///d?host=/tmp&sslmode=require", SslMode::Disable),
        ] {
            assert_eq!(text.parse::<ConnectionString>().unwrap().config.get_ssl_mode(), mode, "{text}");
        }
    }

    #[test]
    fn address_without_host_is_the_name_in_the_certificate() {
        let parsed: ConnectionString = "hostaddr=127.0.0.1 sslmode=require".parse().unwrap();
        assert_eq!(parsed.config.get_hosts(), [Host::Tcp("127.0.0.1".to_owned())]);
    }
}
