//! Parses a record into a typed row, or into all of its errors.

use std::collections::HashSet;

use chrono::{DateTime, Datelike, Utc};

use super::column::Column;
use super::error::{RowError, RowErrorCode, shorten};
use super::format::Format;
use super::header::Header;
use super::record_reader::{IMPORT_RECORD_BYTES_MAX, Record, RecordDefect};
use crate::limits::{
    DESCRIPTION_CHARS_MAX, EXTERNAL_ID_CHARS_MAX, LABEL_NAME_CHARS_MAX, LABELS_PER_ISSUE_MAX, TITLE_CHARS_MAX,
    USERNAME_CHARS_MAX,
};
use crate::pb::{Priority, Status};

#[cfg(test)]
mod tests;

/// Bounds of the year of a time, in UTC: from the Unix epoch to the end of `google.protobuf.Timestamp`.
pub const TIME_YEAR_MIN: i32 = 1970;
pub const TIME_YEAR_MAX: i32 = 9999;

/// A row of the file. The assignee and the labels are not looked up yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportRow {
    /// Counted from 1, the first row after the header.
    pub row_number: u64,
    /// The line of the file on which the row begins, counted from 1.
    pub line_number: u64,
    /// The byte of the file at which the row begins.
    pub byte_offset: u64,
    /// Empty only if the file does not have the column.
    pub title: String,
    pub description: String,
    /// `Unspecified` means none.
    pub priority: Priority,
    /// `None` if the field is empty or the file does not have the column.
    pub status: Option<Status>,
    /// A username, in the file's case.
    pub assignee: Option<String>,
    /// Names in the file's case, without duplicates in ASCII case folding.
    pub labels: Vec<String>,
    pub external_id: Option<String>,
    /// Truncated to microseconds.
    pub create_time: Option<DateTime<Utc>>,
    /// Truncated to microseconds. Set only if a new issue would be `Closed`; never before `create_time`.
    pub close_time: Option<DateTime<Utc>>,
}

/// Parses a record, or returns all of its errors in the order of [`Column::ALL`]. A record whose fields do not match the
/// header has only that error, because its values would be attributed to the wrong columns.
pub fn parse_row(format: &Format, header: &Header, record: &Record<'_>) -> Result<ImportRow, Vec<RowError>> {
    let mut fields = FieldParser { format, header, record, errors: Vec::new() };
    if !fields.check_record() {
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

/// Parses the fields of one record. Each method parses one column and collects its errors.
struct FieldParser<'a> {
    format: &'a Format,
    header: &'a Header,
    record: &'a Record<'a>,
    errors: Vec<RowError>,
}

impl<'a> FieldParser<'a> {
    /// Returns whether the record is complete and has as many fields as the header.
    fn check_record(&mut self) -> bool {
        let (found, expected) = (self.record.field_count, self.header.field_count());
        let (value, code, message) = match self.record.defect {
            Some(RecordDefect::UnclosedQuote) => {
                let message =
                    "row: a quoted field is not closed before the end of the file; close the quote".to_owned();
                // The unclosed field is always the last one.
                let value = self.record.fields().last().unwrap_or_default();
                (value, RowErrorCode::UnclosedQuote, message)
            }
            Some(RecordDefect::TooLong) => {
                let message =
                    format!("row: longer than {IMPORT_RECORD_BYTES_MAX} bytes; a quoted field may not be closed");
                (b"".as_slice(), RowErrorCode::RecordTooLong, message)
            }
            None if found != expected => {
                let separator = if self.format.separator == b',' { "comma" } else { "separator" };
                let message = format!(
                    "row: has {found} fields where the header has {expected}; quote values that contain a {separator}, a \
                     quote or a line break"
                );
                (b"".as_slice(), RowErrorCode::WrongFieldCount, message)
            }
            None => return true,
        };
        self.push("", value, code, message);
        false
    }

    /// Returns the title. An empty one is an error if the file has the column.
    fn title(&mut self) -> String {
        if !self.header.has(Column::Title) {
            return String::new();
        }
        let title = self.bounded(Column::Title, TITLE_CHARS_MAX);
        if title.is_some_and(|title| title.trim().is_empty()) {
            let value = title.unwrap_or_default();
            self.push(Column::Title.name(), value.as_bytes(), RowErrorCode::Required, "title: required".to_owned());
        }
        title.unwrap_or_default().to_owned()
    }

    fn priority(&mut self) -> Priority {
        let text = self.text(Column::Priority).unwrap_or_default().trim();
        priority_from_name(text).unwrap_or_else(|| {
            let problem = "is not a priority; expected low, medium, high, critical or empty";
            self.reject(Column::Priority, text, RowErrorCode::InvalidPriority, problem);
            Priority::Unspecified
        })
    }

    /// Returns `None` if the status is invalid; the close time is then not checked against it.
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
            let problem = format!("is not a status; expected open, in_progress, closed or empty ({default})");
            self.reject(Column::Status, text, RowErrorCode::InvalidStatus, &problem);
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
            // Only ASCII: other letters are compared by the database, whose lower case differs from Rust's.
            if !seen.insert(name.to_ascii_lowercase()) {
                continue;
            }
            // This also bounds the number of errors per row.
            if labels.len() == LABELS_PER_ISSUE_MAX {
                let problem = format!("has too many labels; at most {LABELS_PER_ISSUE_MAX} are allowed");
                self.reject(Column::Labels, text, RowErrorCode::TooManyLabels, &problem);
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
            let problem = "is not a time; expected RFC 3339 with a UTC offset, such as 2024-05-17T08:30:00Z";
            self.reject(column, text, RowErrorCode::InvalidTime, problem);
            return None;
        };
        if !(TIME_YEAR_MIN..=TIME_YEAR_MAX).contains(&time.year()) {
            let problem = format!("is out of range; expected a year from {TIME_YEAR_MIN} to {TIME_YEAR_MAX} in UTC");
            self.reject(column, text, RowErrorCode::InvalidTime, &problem);
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
            let problem = "requires status closed; expected that status, or an empty close_time";
            self.reject(Column::CloseTime, text, RowErrorCode::CloseTimeWithoutClosed, problem);
        }
        if create_time.is_some_and(|create_time| close_time < create_time) {
            let problem = "is before create_time; expected the same time or later";
            self.reject(Column::CloseTime, text, RowErrorCode::CloseTimeBeforeCreateTime, problem);
        }
    }

    /// Returns the column's value, and checks that it has at most `chars_max` characters.
    fn bounded(&mut self, column: Column, chars_max: usize) -> Option<&'a str> {
        let text = self.text(column)?;
        self.check_length(column, text, chars_max);
        Some(text)
    }

    /// Returns the column's value unchanged: empty if the file does not have the column, `None` if it is not valid text.
    fn text(&mut self, column: Column) -> Option<&'a str> {
        let Some(index) = self.header.field_index(column) else {
            return Some("");
        };
        // `check_record` has compared the number of fields, and a valid header has no more fields than are kept.
        let bytes = self.record.field(index).unwrap_or_default();
        let Ok(text) = std::str::from_utf8(bytes) else {
            self.reject(column, bytes, RowErrorCode::InvalidUtf8, "is not UTF-8; save the file as UTF-8");
            return None;
        };
        if text.contains('\0') {
            self.reject(column, text, RowErrorCode::NulCharacter, "contains a NUL character; remove it");
            return None;
        }
        Some(text)
    }

    fn check_length(&mut self, column: Column, text: &str, chars_max: usize) {
        // A text has at most as many characters as bytes: most need no counting.
        if text.len() <= chars_max {
            return;
        }
        let chars = text.chars().count();
        if chars > chars_max {
            let problem = format!("has {chars} characters; at most {chars_max} are allowed");
            self.reject(column, text, RowErrorCode::TooLong, &problem);
        }
    }

    fn reject(&mut self, column: Column, value: impl AsRef<[u8]>, code: RowErrorCode, problem: &str) {
        let message = format!("{}: \"{}\" {problem}", column.name(), shorten(value.as_ref()));
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

/// Parses a priority. The empty text is `Unspecified`, which means none.
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

/// Parses a status. `UNSPECIFIED` is not accepted, because no issue has it.
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

/// Strips an ASCII prefix, in any case.
fn without_prefix<'a>(text: &'a str, prefix: &str) -> &'a str {
    match text.split_at_checked(prefix.len()) {
        Some((head, rest)) if head.eq_ignore_ascii_case(prefix) => rest,
        _ => text,
    }
}

/// Parses a time and truncates it to microseconds, as PostgreSQL stores it. A leap second becomes the first second of the
/// next minute, as in PostgreSQL.
fn parse_time(text: &str) -> Option<DateTime<Utc>> {
    let time = DateTime::parse_from_rfc3339(text).ok()?;
    DateTime::from_timestamp_micros(time.timestamp_micros())
}
