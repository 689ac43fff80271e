//! The outcome of an import: as text for people, as JSON for programs.

use indicatif::HumanCount;
use serde_json::{Value, json};
use unicode_width::UnicodeWidthStr;

use super::printable;
use crate::pb::{ImportProgress, ImportRowError, ImportState, ImportSummary};

/// Formats row errors as an aligned table of line, column, value and message.
pub fn table(errors: &[ImportRowError]) -> String {
    let head = ["LINE", "COLUMN", "VALUE", "MESSAGE"].map(str::to_owned);
    let row = |error: &ImportRowError| {
        [error.line_number.to_string(), printable(&error.column), printable(&error.value), printable(&error.message)]
    };
    let rows: Vec<_> = std::iter::once(head).chain(errors.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].width()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for [line, column, value, message] in &rows {
        let pad = |text: &str, width: usize| " ".repeat(width - text.width());
        text += &format!(
            "{}{line}  {column}{}  {value}{}  {message}\n",
            pad(line, widths[0]),
            pad(column, widths[1]),
            pad(value, widths[2]),
        );
    }
    text
}

/// Returns how many errors the table of the first `shown` leaves out; empty if none.
pub fn rest(shown: usize, known: usize, all: u64) -> String {
    let count = HumanCount(all.saturating_sub(shown as u64));
    if known as u64 >= all {
        return if shown == known { String::new() } else { format!("and {count} more") };
    }
    let known = HumanCount(known as u64);
    format!("and {count} more; the server returns the first {known} of {} errors", HumanCount(all))
}

/// Formats the result of an import as one line.
pub fn outcome(summary: &ImportSummary) -> String {
    let rows = |count: i64| match count {
        1 => "1 row".to_owned(),
        count => format!("{} rows", number(count)),
    };
    let counts = |would: &str| {
        let mut parts = vec![format!("{} {would}created", number(summary.created_count))];
        for (count, what) in [
            (summary.updated_count, format!("{would}updated")),
            (summary.skipped_count, "unchanged".to_owned()),
            (summary.rejected_count, "rejected".to_owned()),
        ] {
            if count > 0 {
                parts.push(format!("{} {what}", number(count)));
            }
        }
        parts.join(", ")
    };
    let (all, bad) = (rows(summary.row_count), number(summary.rejected_count));
    match summary.state() {
        ImportState::Committed => format!("import {}: {all}: {}", printable(&summary.import_id), counts("")),
        ImportState::Validated => format!("dry run, nothing was written: {all}: {}", counts("would be ")),
        ImportState::Rejected => format!("nothing was written: {bad} of {all} rejected"),
        state => format!("import {} is {}", printable(&summary.import_id), state.as_str_name()),
    }
}

fn number(count: i64) -> HumanCount {
    HumanCount(count.max(0).cast_unsigned())
}

pub fn progress_json(progress: &ImportProgress) -> Value {
    json!({"progress": {
        "import_id": progress.import_id,
        "offset": progress.offset,
        "row_count": progress.row_count,
        "rejected_count": progress.rejected_count,
        "committed_offset": progress.committed_offset,
        "written_row_count": progress.written_row_count,
    }})
}

pub fn row_error_json(error: &ImportRowError) -> Value {
    json!({"row_error": {
        "row_number": error.row_number,
        "line_number": error.line_number,
        "byte_offset": error.byte_offset,
        "column": error.column,
        "value": error.value,
        "code": error.code,
        "message": error.message,
    }})
}

pub fn summary_json(summary: &ImportSummary) -> Value {
    json!({"summary": {
        "import_id": summary.import_id,
        "state": summary.state().as_str_name(),
        "row_count": summary.row_count,
        "created_count": summary.created_count,
        "updated_count": summary.updated_count,
        "skipped_count": summary.skipped_count,
        "rejected_count": summary.rejected_count,
        "error_count": summary.error_count,
        "byte_count": summary.byte_count,
    }})
}

/// Formats a command for a shell, with quotes where necessary.
pub fn command_line(args: impl IntoIterator<Item = String>) -> String {
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "-_./:=,@%+".contains(char);
    let quoted = args.into_iter().map(|arg| match arg.chars().all(is_plain) && !arg.is_empty() {
        true => arg,
        false => format!("'{}'", arg.replace('\'', r"'\''")),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(line: i64, column: &str, value: &str, message: &str) -> ImportRowError {
        ImportRowError {
            line_number: line,
            column: column.to_owned(),
            value: value.to_owned(),
            message: message.to_owned(),
            ..ImportRowError::default()
        }
    }

    #[test]
    fn the_table_is_aligned_for_any_values() {
        let errors = [
            error(3, "title", "", "title: required"),
            error(12_345, "priority", "緊急", "not a priority"),
            error(12_346, "status", "a\n\x1b[31m", "not a status"),
        ];
        let expected = r"
 LINE  COLUMN    VALUE          MESSAGE
    3  title                    title: required
12345  priority  緊急           not a priority
12346  status    a\n\u{1b}[31m  not a status
";
        assert_eq!(table(&errors), expected[1..]);
    }

    #[test]
    fn errors_that_are_not_shown_are_counted() {
        assert_eq!(rest(3, 3, 3), "");
        assert_eq!(rest(20, 33, 33), "and 13 more");
        assert_eq!(rest(20, 1_000, 54_321), "and 54,301 more; the server returns the first 1,000 of 54,321 errors");
        assert_eq!(rest(0, 0, 2), "and 2 more; the server returns the first 0 of 2 errors");
    }

    #[test]
    fn the_outcome_states_what_was_written() {
        let summary = |state: ImportState| ImportSummary {
            import_id: "x".to_owned(),
            state: state.into(),
            row_count: 1_234,
            created_count: 1_000,
            updated_count: 200,
            skipped_count: 30,
            rejected_count: 4,
            ..ImportSummary::default()
        };
        for (state, expected) in [
            (ImportState::Committed, "import x: 1,234 rows: 1,000 created, 200 updated, 30 unchanged, 4 rejected"),
            (
                ImportState::Validated,
                "dry run, nothing was written: 1,234 rows: 1,000 would be created, 200 would be updated, \
                 30 unchanged, 4 rejected",
            ),
            (ImportState::Rejected, "nothing was written: 4 of 1,234 rows rejected"),
            (ImportState::Reverted, "import x is IMPORT_STATE_REVERTED"),
        ] {
            assert_eq!(outcome(&summary(state)), expected);
        }
        let one = ImportSummary { row_count: 1, created_count: 1, ..summary(ImportState::Committed) };
        let one = ImportSummary { updated_count: 0, skipped_count: 0, rejected_count: 0, ..one };
        assert_eq!(outcome(&one), "import x: 1 row: 1 created");
    }

    #[test]
    fn a_command_is_quoted_for_a_shell() {
        let args = ["issue-tracker", "import", "my file's.csv", "--map", "Summary=title", "--separator", ";", ""];
        assert_eq!(
            command_line(args.map(str::to_owned)),
            r"issue-tracker import 'my file'\''s.csv' --map Summary=title --separator ';' ''"
        );
    }
}
