//! The effective configuration of `serve`, as `--print-config` prints it.

use clap::{Arg, ArgMatches, Command, parser::ValueSource};
use secrecy::{ExposeSecret, SecretString};

use crate::db::connection_string::without_password;

/// The value of a flag whose default is not constant.
pub struct Derived {
    /// Without the dashes.
    pub flag: &'static str,
    pub value: String,
    /// What the value follows from. `None` if it is the usual one.
    pub from: Option<&'static str>,
}

/// Returns the value of each flag and its source, one per line: `--flag=value  # source: default`. The value is quoted for a
/// POSIX shell. `#` precedes lines that cannot be used as arguments: the flag has no value, or part of it is secret.
///
/// `command`: the program, whose flags without a subcommand are those of `serve`. `matches`: those of its arguments.
pub fn effective(command: &Command, matches: &ArgMatches, derived: &[Derived]) -> String {
    let matches = matches.subcommand_matches("serve").unwrap_or(matches);
    let flags = command.get_arguments().filter(|arg| arg.get_id() != "print_config");
    flags.filter_map(|arg| line(arg, matches, derived)).collect()
}

fn line(arg: &Arg, matches: &ArgMatches, derived: &[Derived]) -> Option<String> {
    let (flag, id) = (arg.get_long()?, arg.get_id().as_str());
    let derived = derived.iter().find(|derived| derived.flag == flag);
    let (value, source) = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => (given(arg, matches), "flag".to_owned()),
        Some(ValueSource::EnvVariable) => {
            let variable = arg.get_env().unwrap_or_default().to_string_lossy();
            (given(arg, matches), format!("environment {variable}"))
        }
        _ => match derived.map(|derived| (derived.value.clone(), derived.from)) {
            Some((value, Some(from))) => (Some(value), format!("derived from {from}")),
            Some((value, None)) => (Some(value), "default".to_owned()),
            None => (given(arg, matches), "default".to_owned()),
        },
    };
    // Text of this type is the only secret one: of other types, errors quote the value.
    let secret = matches.try_get_one::<SecretString>(id).ok().flatten().map(ExposeSecret::expose_secret);
    let shown = secret.map(without_password).or(value).map(|text| text.replace(char::is_control, "?"));
    let is_usable = shown.is_some() && secret.is_none_or(|secret| shown.as_deref() == Some(secret));
    let quoted = shown.as_deref().map(|text| shlex::try_quote(text).unwrap_or_default()).unwrap_or_default();
    Some(format!("{}--{flag}={quoted}  # source: {source}\n", if is_usable { "" } else { "#" }))
}

/// Returns the text of the value of the command line, the environment or the constant default.
fn given(arg: &Arg, matches: &ArgMatches) -> Option<String> {
    let separator = arg.get_value_delimiter().unwrap_or(',').to_string();
    let values = matches.get_raw(arg.get_id().as_str())?;
    Some(values.map(|value| value.to_string_lossy()).collect::<Vec<_>>().join(&separator))
}
