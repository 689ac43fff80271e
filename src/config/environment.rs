//! Environment variables: which are read, and what is said about those that are wrong. Values never reach a message.

use std::{
    env,
    ffi::{OsStr, OsString},
};

use clap::{
    Arg, Command,
    builder::StyledStr,
    error::{ContextKind, ContextValue, Error, ErrorKind},
};

use super::TOKEN_VARIABLE;

/// What the names of the program's variables begin with, all but `DATABASE_URL`.
const PREFIX: &str = "ISSUE_TRACKER_";
/// How similar two names must be, from 0 to 1, for one to be suggested instead of the other.
const SIMILARITY_MIN: f64 = 0.8;
/// The names of values that are whole numbers, and what they count.
const NUMBERS: [(&str, &str); 7] = [
    ("N", ""),
    ("MS", " of milliseconds"),
    ("SECONDS", " of seconds"),
    ("HOURS", " of hours"),
    ("DAYS", " of days"),
    ("BYTES", " of bytes"),
    ("PERCENT", ", in percent"),
];

/// Makes the command ignore variables that are empty, as if they were not set, and take `-5` for a number instead of a flag. A
/// subcommand, which is the first argument if there is one, also ignores the variables of the flags of `serve`.
pub fn prepared(command: Command, mut arguments: impl Iterator<Item = OsString>) -> Command {
    let has_subcommand = arguments.nth(1).is_some_and(|first| command.find_subcommand(first).is_some());
    let command = with_numbers_and_without_empty_variables(command);
    if !has_subcommand {
        return command;
    }
    command.mut_args(|arg| if arg.is_global_set() { arg } else { arg.env(None::<&str>) })
}

fn with_numbers_and_without_empty_variables(command: Command) -> Command {
    command
        .mut_args(|arg| {
            let is_number = counted(&arg).is_some();
            let is_empty = arg.get_env().and_then(env::var_os).is_some_and(|value| value.is_empty());
            let arg = if is_number { arg.allow_negative_numbers(true) } else { arg };
            if is_empty { arg.env(None::<&str>) } else { arg }
        })
        .mut_subcommands(with_numbers_and_without_empty_variables)
}

/// Returns what the number counts that is the value of an argument. `None` if the value is no number.
fn counted(arg: &Arg) -> Option<&'static str> {
    let names = arg.get_value_names()?;
    NUMBERS.iter().find(|(name, _)| *names == [*name]).map(|(_, counted)| *counted)
}

/// Adds to an error about a value what is expected, and that the value is from an environment variable.
pub fn with_tips(mut error: Error, command: &mut Command) -> Error {
    // Arguments have no names before.
    command.build();
    let Some(ContextValue::String(shown)) = error.get(ContextKind::InvalidArg) else { return error };
    // The flags of `serve` are also those of the program, there without variables if there is a subcommand.
    let same = arguments(command).into_iter().filter(|arg| arg.to_string() == *shown);
    let Some(arg) = same.max_by_key(|arg| arg.get_env().is_some()) else { return error };
    let value = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => value.as_str(),
        _ => "",
    };
    let mut tips = Vec::new();
    if let Some(counted) = counted(arg)
        && error.kind() == ErrorKind::ValueValidation
        && value.parse::<u64>().is_err()
    {
        tips.push(format!("expected a whole number{counted}, without a unit or separators"));
    }
    if let Some(variable) = source_variable(arg) {
        tips.push(format!("the value is that of the environment variable {variable}"));
    }
    if !tips.is_empty() {
        let tips = tips.into_iter().map(StyledStr::from).collect();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
    }
    error
}

/// Returns the variable that an argument's value is from. `None` if it is from the command line.
fn source_variable(arg: &Arg) -> Option<String> {
    let flag = format!("--{}", arg.get_long()?);
    let is_flag = |given: &OsStr| given.to_string_lossy().split('=').next() == Some(flag.as_str());
    let variable = arg.get_env()?;
    (env::var_os(variable).is_some() && !env::args_os().any(|given| is_flag(&given)))
        .then(|| variable.to_string_lossy().into_owned())
}

/// Returns the arguments of a command and of its subcommands.
fn arguments(command: &Command) -> Vec<&Arg> {
    command.get_arguments().chain(command.get_subcommands().flat_map(arguments)).collect()
}

/// A variable that looks like one of the program, but is none.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownVariable {
    pub name: String,
    /// The most similar variable that the program reads.
    pub nearest: Option<String>,
}

/// Returns the variables of the environment that begin as those of the program and that no command reads.
pub fn unknown_variables(
    command: &Command,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<UnknownVariable> {
    let known = known_variables(command);
    let unknown = environment.filter_map(|(name, value)| {
        let name = name.to_string_lossy().into_owned();
        let upper = name.to_uppercase();
        let is_unknown = upper.starts_with(PREFIX)
            && !known.iter().any(|(variable, _)| *variable == name)
            && !is_of_kubernetes(&name, &value.to_string_lossy());
        is_unknown.then(|| UnknownVariable { nearest: nearest(&upper, &known), name })
    });
    let mut unknown: Vec<_> = unknown.collect();
    unknown.sort_by(|one, other| one.name.cmp(&other.name));
    unknown
}

/// Returns the variables that a command reads, each with the name that it would have if it followed from its flag.
fn known_variables(command: &Command) -> Vec<(String, String)> {
    let of_flags = arguments(command).into_iter().filter_map(|arg| {
        let of_flag = format!("{PREFIX}{}", arg.get_long()?.to_uppercase().replace('-', "_"));
        Some((arg.get_env()?.to_string_lossy().into_owned(), of_flag))
    });
    of_flags.chain([(TOKEN_VARIABLE.to_owned(), TOKEN_VARIABLE.to_owned())]).collect()
}

fn nearest(name: &str, known: &[(String, String)]) -> Option<String> {
    let similarity = |candidate: &str| {
        let suffix = |name: &str| name.strip_prefix(PREFIX).unwrap_or(name).to_owned();
        strsim::jaro_winkler(&suffix(name), &suffix(candidate))
    };
    let rated = known.iter().map(|(variable, of_flag)| (similarity(variable).max(similarity(of_flag)), variable));
    let (rating, variable) = rated.max_by(|(one, _), (other, _)| one.total_cmp(other))?;
    (rating >= SIMILARITY_MIN).then(|| variable.clone())
}

/// Returns whether Kubernetes has set the variable, for a Service whose name begins with `issue-tracker`.
fn is_of_kubernetes(name: &str, value: &str) -> bool {
    let is_address = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let has_port_number =
        name.split("_PORT_").nth(1).is_some_and(|rest| rest.starts_with(|char: char| char.is_ascii_digit()));
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT") && is_address
        || has_port_number
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::{super::Cli, *};

    /// Returns the names of the unknown variables, each with the suggested one.
    fn unknown(variables: &[(&str, &str)]) -> Vec<(String, Option<String>)> {
        let environment = variables.iter().map(|(name, value)| (name.into(), value.into()));
        let unknown = unknown_variables(&Cli::command(), environment);
        unknown.into_iter().map(|variable| (variable.name, variable.nearest)).collect()
    }

    #[test]
    fn similar_variable_is_suggested() {
        for (name, nearest) in [
            ("ISSUE_TRACKER_IMPORT", Some("ISSUE_TRACKER_IMPORTS")),
            ("ISSUE_TRACKER_LOG_LEVEL", Some("ISSUE_TRACKER_LOG")),
            ("ISSUE_TRACKER_DATABASE_URL", Some("DATABASE_URL")),
            ("ISSUE_TRACKER_TLS_CERTIFICATE", Some("ISSUE_TRACKER_TLS_CERT")),
            ("issue_tracker_requests", Some("ISSUE_TRACKER_REQUESTS")),
            ("ISSUE_TRACKER_TOKN", Some("ISSUE_TRACKER_TOKEN")),
            ("ISSUE_TRACKER_FRUIT", None),
            ("ISSUE_TRACKER_PORT", Some("ISSUE_TRACKER_EXPORTS")),
        ] {
            assert_eq!(unknown(&[(name, "5")]), [(name.to_owned(), nearest.map(str::to_owned))]);
        }
    }

    #[test]
    fn known_foreign_and_kubernetes_variables_are_not_reported() {
        let known =
            ["ISSUE_TRACKER_REQUESTS", "ISSUE_TRACKER_TOKEN", "ISSUE_TRACKER_SERVER_NAME", "DATABASE_URL", "HOME"];
        assert_eq!(unknown(&known.map(|name| (name, "5"))), []);
        let of_service = [
            ("ISSUE_TRACKER_SERVICE_HOST", "10.0.0.1"),
            ("ISSUE_TRACKER_SERVICE_PORT", "50051"),
            ("ISSUE_TRACKER_SERVICE_PORT_GRPC", "50051"),
            ("ISSUE_TRACKER_PORT", "tcp://10.0.0.1:50051"),
            ("ISSUE_TRACKER_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
            ("ISSUE_TRACKER_PORT_50051_TCP_PROTO", "tcp"),
            ("ISSUE_TRACKER_METRICS_PORT_9090_TCP_ADDR", "10.0.0.1"),
        ];
        assert_eq!(unknown(&of_service), []);
    }

    #[test]
    fn no_flag_has_a_variable_that_kubernetes_could_set() {
        for (variable, _) in known_variables(&Cli::command()) {
            assert!(!is_of_kubernetes(&variable, "tcp://10.0.0.1:50051"), "{variable}");
        }
    }
}
