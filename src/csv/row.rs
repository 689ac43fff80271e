//! A record to a typed row, or to everything that is wrong with it.

use std::collections::HashSet;

use chrono::{DateTime, Datelike, Utc};

use super::error::{RowError, RowErrorCode, shorten};
use super::format::Format;
use super::header::{Column, Columns};
use super::record_reader::{IMPORT_RECORD_BYTES_MAX, Record, RecordFault};
use crate::pb::{Priority, Status};
use crate::request::{
    DESCRIPTION_CHARS_MAX, EXTERNAL_ID_CHARS_MAX, LABEL_NAME_CHARS_MAX, LABELS_PER_ISSUE_MAX, TITLE_CHARS_MAX,
    USERNAME_CHARS_MAX,
};

#[cfg(test)]
mod tests;

/// The years that a time may lie in, in UTC: what `google.protobuf.Timestamp` and RFC 3339 can say, from Unix time on.
pub const TIME_YEAR_MIN: i32 = 1970;
pub const TIME_YEAR_MAX: i32 = 9999;

/// An issue as the file has it. Whether the assignee and the labels exist is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportRow {
    /// The first row after the header is 1.
    pub row_number: u64,
    /// The line of the file, from 1, on which the row begins.
    pub line_number: u64,
    /// Where in the file the row begins.
    pub byte_offset: u64,
    /// Empty only if the file has no such column.
    pub title: String,
    pub description: String,
    /// `Unspecified` = none.
    pub priority: Priority,
    /// None: the field is empty, or the file has no such column.
    pub status: Option<Status>,
    /// A username as written.
    pub assignee: Option<String>,
    /// Names as written, none twice whatever the case of their ASCII letters.
    pub labels: Vec<String>,
    pub external_id: Option<String>,
    /// At microseconds.
    pub create_time: Option<DateTime<Utc>>,
    /// At microseconds. Given only where the issue, if it is a new one, is `Closed`, and never before `create_time`.
    pub close_time: Option<DateTime<Utc>>,
}

/// Makes a record a row, or returns all of its errors, in the order of [`Column::ALL`]. A record that isn't cut into the
/// header's fields has that one error, since its values would be taken for those of other columns.
pub fn parse_row(format: &Format, columns: &Columns, record: &Record<'_>) -> Result<ImportRow, Vec<RowError>> {
    let mut fields = Fields { format, columns, record, errors: Vec::new() };
    if !fields.match_header() {
        return Err(fields.errors);
    }
    let title = fields.title();
    let description = fields.bounded(Column::Description, DESCRIPTION_CHARS_MAX).unwrap_or_default().to_owned();
    let priority = fields.priority();
    let status = fields.status();
    let assignee = fields.assignee();
    let labels = fields.labels();
    let external_id = fields.external_id();
    let create_time = fields.time(Column::CreateTime);
    let close_time = fields.time(Column::CloseTime);
    if let Some(close_time) = close_time {
        let status = status.map(|status| status.unwrap_or(format.default_status));
        fields.check_close_time(close_time, status, create_time);
    }
    match (status, fields.errors) {
        (Some(status), errors) if errors.is_empty() => Ok(ImportRow {
            row_number: record.row_number,
            line_number: record.line_number,
            byte_offset: record.byte_offset,
            title,
            description,
            priority,
            status,
            assignee,
            labels,
            external_id,
            create_time,
            close_time,
        }),
        (_, errors) => Err(errors),
    }
}

/// One record on its way to a row. Each method takes a column's value and notes what is wrong with it.
struct Fields<'a> {
    format: &'a Format,
    columns: &'a Columns,
    record: &'a Record<'a>,
    errors: Vec<RowError>,
}

impl<'a> Fields<'a> {
    /// Whether the record as a whole can be trusted to have the header's fields.
    fn match_header(&mut self) -> bool {
        let (found, wanted) = (self.record.field_count, self.columns.field_count());
        let (value, code, message) = match self.record.fault {
            Some(RecordFault::UnclosedQuote) => {
                let message = "a quote that opens in this row never closes before the end of the file".to_owned();
                // The quote opened in the last field.
                let value = self.record.fields().last().unwrap_or_default();
                (value, RowErrorCode::UnclosedQuote, message)
            }
            Some(RecordFault::TooLong) => {
                let message = format!(
                    "the row has more than {IMPORT_RECORD_BYTES_MAX} bytes: a quote that opens in it may not be closed"
                );
                (b"".as_slice(), RowErrorCode::RecordTooLong, message)
            }
            None if found != wanted => {
                let separator = if self.format.separator == b',' { "comma" } else { "separator" };
                let message = format!(
                    "the row has {found} fields where the header has {wanted}: a value with a {separator}, a quote or a \
                     line end in it needs quotes around it"
                );
                (b"".as_slice(), RowErrorCode::WrongFieldCount, message)
            }
            None => return true,
        };
        self.push("", value, code, message);
        false
    }

    /// Empty unless valid; a row without a title has an error, unless the whole file is without.
    fn title(&mut self) -> String {
        if self.columns.index(Column::Title).is_none() {
            return String::new();
        }
        let title = self.bounded(Column::Title, TITLE_CHARS_MAX);
        if title.is_some_and(|title| title.trim().is_empty()) {
            self.refuse(Column::Title, title.unwrap_or_default(), RowErrorCode::Required, "is required");
        }
        title.unwrap_or_default().to_owned()
    }

    fn priority(&mut self) -> Priority {
        let text = self.text(Column::Priority).unwrap_or_default().trim();
        priority_from_name(text).unwrap_or_else(|| {
            let expected = "is not one of low, medium, high, critical (or empty for none)";
            self.refuse(Column::Priority, text, RowErrorCode::InvalidPriority, expected);
            Priority::Unspecified
        })
    }

    /// `None` if there is an error, so that the close time isn't held against a status that is not known.
    fn status(&mut self) -> Option<Option<Status>> {
        let text = self.text(Column::Status)?.trim();
        if text.is_empty() {
            return Some(None);
        }
        let status = status_from_name(text);
        if status.is_none() {
            let default = match self.format.default_status {
                Status::InProgress => "in_progress",
                Status::Closed => "closed",
                Status::Open | Status::Unspecified => "open",
            };
            let expected = format!("is not one of open, in_progress, closed (or empty for {default})");
            self.refuse(Column::Status, text, RowErrorCode::InvalidStatus, &expected);
        }
        status.map(Some)
    }

    fn assignee(&mut self) -> Option<String> {
        let name = self.text(Column::Assignee)?.trim();
        self.check_length(Column::Assignee, name, USERNAME_CHARS_MAX);
        (!name.is_empty()).then(|| name.to_owned())
    }

    fn labels(&mut self) -> Vec<String> {
        let text = self.text(Column::Labels).unwrap_or_default();
        let mut seen = HashSet::new();
        let mut labels = Vec::new();
        for name in text.split(char::from(self.format.label_separator)).map(str::trim).filter(|name| !name.is_empty()) {
            // Whether others are the same is for the database to say, whose lower case is not quite Rust's.
            if !seen.insert(name.to_ascii_lowercase()) {
                continue;
            }
            // Also bounds the errors that one row can have.
            if labels.len() == LABELS_PER_ISSUE_MAX {
                let expected = format!("has more than the {LABELS_PER_ISSUE_MAX} labels that are accepted");
                self.refuse(Column::Labels, text, RowErrorCode::TooManyLabels, &expected);
                break;
            }
            self.check_length(Column::Labels, name, LABEL_NAME_CHARS_MAX);
            labels.push(name.to_owned());
        }
        labels
    }

    fn external_id(&mut self) -> Option<String> {
        let id = self.text(Column::ExternalId)?;
        if id.trim().is_empty() {
            return None;
        }
        self.check_length(Column::ExternalId, id, EXTERNAL_ID_CHARS_MAX);
        Some(id.to_owned())
    }

    fn time(&mut self, column: Column) -> Option<DateTime<Utc>> {
        let text = self.text(column)?.trim();
        if text.is_empty() {
            return None;
        }
        let Some(time) = parse_time(text) else {
            let expected = "is not a time like 2024-05-17T08:30:00Z (RFC 3339, with an offset from UTC)";
            self.refuse(column, text, RowErrorCode::InvalidTime, expected);
            return None;
        };
        if !(TIME_YEAR_MIN..=TIME_YEAR_MAX).contains(&time.year()) {
            let expected = format!("is not between the years {TIME_YEAR_MIN} and {TIME_YEAR_MAX} in UTC");
            self.refuse(column, text, RowErrorCode::InvalidTime, &expected);
            return None;
        }
        Some(time)
    }

    fn check_close_time(
        &mut self,
        close_time: DateTime<Utc>,
        status: Option<Status>,
        create_time: Option<DateTime<Utc>>,
    ) {
        let text = self.text(Column::CloseTime).unwrap_or_default().trim();
        if status.is_some_and(|status| status != Status::Closed) {
            let expected = "is given, but status is not closed: only a closed issue has one";
            self.refuse(Column::CloseTime, text, RowErrorCode::CloseTimeWithoutClosed, expected);
        }
        if create_time.is_some_and(|create_time| close_time < create_time) {
            let expected = "is before create_time: it has to be the same or later";
            self.refuse(Column::CloseTime, text, RowErrorCode::CloseTimeBeforeCreateTime, expected);
        }
    }

    /// As [`text`](Self::text), with at most `chars_max` characters.
    fn bounded(&mut self, column: Column, chars_max: usize) -> Option<&'a str> {
        let text = self.text(column)?;
        self.check_length(column, text, chars_max);
        Some(text)
    }

    /// A column's value as written: empty if the file doesn't have the column, `None` if it isn't text.
    fn text(&mut self, column: Column) -> Option<&'a str> {
        let Some(index) = self.columns.index(column) else {
            return Some("");
        };
        // The record has the header's number of fields, of which none are beyond those kept.
        let bytes = self.record.field(index).unwrap_or_default();
        let Ok(text) = std::str::from_utf8(bytes) else {
            self.refuse(column, bytes, RowErrorCode::InvalidUtf8, "is not UTF-8: save the file as UTF-8");
            return None;
        };
        if text.contains('\0') {
            self.refuse(column, text, RowErrorCode::NulCharacter, "has a NUL character, which is not text");
            return None;
        }
        Some(text)
    }

    fn check_length(&mut self, column: Column, text: &str, chars_max: usize) {
        // No text has more characters than bytes, so most need no counting.
        if text.len() <= chars_max {
            return;
        }
        let chars = text.chars().count();
        if chars > chars_max {
            let expected = format!("has {chars} characters, at most {chars_max} are accepted");
            self.refuse(column, text, RowErrorCode::TooLong, &expected);
        }
    }

    fn refuse(&mut self, column: Column, value: impl AsRef<[u8]>, code: RowErrorCode, expected: &str) {
        let message = format!("{} \"{}\" {expected}", column.name(), shorten(value.as_ref()));
        self.push(column.name(), value.as_ref(), code, message);
    }

    fn push(&mut self, column: &str, value: &[u8], code: RowErrorCode, message: String) {
        self.errors.push(RowError {
            row_number: self.record.row_number,
            line_number: self.record.line_number,
            byte_offset: self.record.byte_offset,
            column: column.to_owned(),
            value: shorten(value),
            code,
            message,
        });
    }
}

/// Empty is `Unspecified`, which is how an issue without a priority has it.
fn priority_from_name(text: &str) -> Option<Priority> {
    let name = without_prefix(text, "PRIORITY_");
    [
        ("", Priority::Unspecified),
        ("UNSPECIFIED", Priority::Unspecified),
        ("LOW", Priority::Low),
        ("MEDIUM", Priority::Medium),
        ("HIGH", Priority::High),
        ("CRITICAL", Priority::Critical),
    ]
    .into_iter()
    .find_map(|(known, priority)| known.eq_ignore_ascii_case(name).then_some(priority))
    .filter(|_| text.is_empty() == name.is_empty())
}

/// No issue has the status `Unspecified`, so that is no name here.
fn status_from_name(text: &str) -> Option<Status> {
    let name = without_prefix(text, "STATUS_");
    [
        ("OPEN", Status::Open),
        ("IN_PROGRESS", Status::InProgress),
        ("IN PROGRESS", Status::InProgress),
        ("IN-PROGRESS", Status::InProgress),
        ("CLOSED", Status::Closed),
    ]
    .into_iter()
    .find_map(|(known, status)| known.eq_ignore_ascii_case(name).then_some(status))
}

/// `prefix` is ASCII, in any case.
fn without_prefix<'a>(text: &'a str, prefix: &str) -> &'a str {
    match text.split_at_checked(prefix.len()) {
        Some((head, rest)) if head.eq_ignore_ascii_case(prefix) => rest,
        _ => text,
    }
}

/// Cut to microseconds, which is what PostgreSQL keeps; a leap second becomes the next minute's first, as there.
fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let time = DateTime::parse_from_rfc3339(text).ok()?;
    DateTime::from_timestamp_micros(time.timestamp_micros())
}
