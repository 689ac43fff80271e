//! `docs/operations.md` lists the flags with their variables, defaults and bounds, and says how to choose each value.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Command, CommandFactory, Parser};
use issue_tracker::config::Cli;

use super::*;

const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// Returns the text between a heading and the next one of its level.
fn section(heading: &str) -> &'static str {
    let level = heading.split(' ').next().unwrap();
    let (_, after) = OPERATIONS.split_once(&format!("\n{heading}\n")).unwrap();
    after.split(&format!("\n{level} ")).next().unwrap()
}

/// Returns the cells of the rows of all tables whose first cell has flags, with each of these flags.
fn rows(text: &str) -> Vec<(String, Vec<&str>)> {
    let cells = text.lines().filter(|line| line.starts_with("| `--")).map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        cells
    });
    cells.flat_map(|cells| flags_in(cells[0]).into_iter().map(move |flag| (flag, cells.clone()))).collect()
}

fn flags_in(cell: &str) -> Vec<String> {
    cell.split('`').filter(|text| text.starts_with("--")).map(str::to_owned).collect()
}

/// Returns the rows of the tables of `serve` in "Configuration", which also has tables of other commands.
fn documented() -> BTreeMap<String, Vec<&'static str>> {
    let configuration = section("## Configuration");
    let (_, of_serve) = configuration.split_once("| flag of `serve` |").unwrap();
    rows(of_serve.split("**Clients**").next().unwrap()).into_iter().collect()
}

/// Returns the default of each flag of `serve`, as it is printed. Empty: none.
fn defaults() -> BTreeMap<String, String> {
    let output = run(&["serve", "--print-config"]);
    let lines = text(&output.stdout).lines().map(|line| {
        let (setting, _) = line.split_once("  # source: ").expect(line);
        let (flag, value) = setting.trim_start_matches('#').split_once('=').expect(line);
        (flag.to_owned(), value.to_owned())
    });
    lines.collect()
}

/// Asserts that a cell begins with the default. That of the data directory depends on the user.
#[track_caller]
fn assert_default(flag: &str, cell: &str, default: &str) {
    let written = cell.trim_start_matches('`').replace(',', "");
    let first = written.split([' ', '`']).next().unwrap();
    let has_none = first.parse::<u64>().is_err() && !cell.starts_with('`');
    assert!(
        flag == "--data-dir" || first == default || default.is_empty() && has_none,
        "{flag}: {cell} is not {default:?}"
    );
}

#[test]
fn configuration_lists_exactly_the_flags_of_serve_with_variables_and_defaults() {
    let (documented, defaults) = (documented(), defaults());
    assert_eq!(documented.keys().collect::<Vec<_>>(), defaults.keys().collect::<Vec<_>>());
    let command = Cli::command();
    for (flag, cells) in documented {
        let arg = command.get_arguments().find(|arg| arg.get_long() == flag.strip_prefix("--")).unwrap();
        assert_eq!(cells[1].trim_matches('`'), arg.get_env().unwrap().to_str().unwrap(), "{flag}");
        assert_default(&flag, cells[2], &defaults[&flag]);
    }
}

#[test]
fn bounds_in_the_configuration_are_enforced() {
    let mut numbers = 0;
    for (flag, cells) in documented() {
        // Text between the numbers of a range.
        let Some((low, high)) =
            cells[3].replace(',', "").split_once('–').map(|(low, high)| (low.to_owned(), high.to_owned()))
        else {
            continue;
        };
        let beyond = format!("{flag}={}", i64::MAX);
        let error = Cli::try_parse_from(["issue-tracker", &beyond]).unwrap_err().to_string();
        assert!(error.contains(&format!("is not in {low}..={high}")), "{flag}: {error}");
        numbers += 1;
    }
    assert!(numbers > 25, "{numbers}");
}

#[test]
fn choosing_values_covers_exactly_the_flags_of_serve() {
    let (rows, defaults) = (rows(section("### Choosing values")), defaults());
    let covered: BTreeSet<_> = rows.iter().map(|(flag, _)| flag).collect();
    assert_eq!(covered.len(), rows.len(), "a flag is in two rows");
    assert_eq!(covered.into_iter().collect::<Vec<_>>(), defaults.keys().collect::<Vec<_>>());
    for (flag, cells) in rows {
        assert_default(&flag, cells[1], &defaults[&flag]);
        assert!(cells.len() == 5 && cells.iter().all(|cell| !cell.is_empty()), "{cells:?}");
    }
}

/// Adds the flags of all commands that have no variable.
fn add_without_variable(command: &Command, flags: &mut BTreeSet<String>) {
    let own = command.get_arguments().filter(|arg| arg.get_env().is_none());
    flags.extend(own.filter_map(|arg| Some(format!("--{}", arg.get_long()?))));
    for subcommand in command.get_subcommands() {
        add_without_variable(subcommand, flags);
    }
}

#[test]
fn flags_without_a_variable_are_listed_with_the_reason() {
    let mut without_variable = BTreeSet::new();
    add_without_variable(&Cli::command(), &mut without_variable);
    let configuration = section("## Configuration");
    let (_, table) = configuration.split_once("These flags have no variable:").unwrap();
    let table = table.split("| flag of `serve` |").next().unwrap();
    let listed: BTreeSet<_> = rows(table).into_iter().map(|(flag, _)| flag).collect();
    assert_eq!(listed, without_variable);
}

#[test]
fn variables_have_the_names_of_their_flags() {
    fn check(command: &Command) {
        for arg in command.get_arguments() {
            let (Some(variable), Some(flag)) = (arg.get_env(), arg.get_long()) else { continue };
            let expected = match flag {
                "log-level" => "ISSUE_TRACKER_LOG".to_owned(),
                "database-url" => "DATABASE_URL".to_owned(),
                _ => format!("ISSUE_TRACKER_{}", flag.to_uppercase().replace('-', "_")),
            };
            assert_eq!(variable, &*expected);
        }
        command.get_subcommands().for_each(check);
    }
    check(&Cli::command());
}
