//! What is wrong with a header or a row, in a form that a person can act on.

use std::fmt::Write;

use crate::error::is_invisible;

/// A value in an error has at most this many characters, the "…" of a cut included.
pub const IMPORT_ERROR_VALUE_CHARS_MAX: usize = 80;

/// One thing wrong with the file's header; the file is then not imported at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderFault {
    /// The column's name as in the file, shortened; empty when the header as a whole is meant.
    pub column: String,
    pub code: HeaderFaultCode,
    pub message: String,
}

/// Why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderFaultCode {
    InvalidUtf8,
    Utf16,
    MissingColumn,
    UnknownColumn,
    DuplicateColumn,
    EmptyColumnName,
    TooManyColumns,
    RecordTooLong,
    UnclosedQuote,
}

/// One thing wrong with one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    /// The first row after the header is 1.
    pub row_number: u64,
    /// The line of the file, from 1, on which the row begins.
    pub line_number: u64,
    /// Where in the file the row begins.
    pub byte_offset: u64,
    /// The column's name; empty when the row as a whole is meant.
    pub column: String,
    /// What the file has there, [shortened](shorten).
    pub value: String,
    pub code: RowErrorCode,
    pub message: String,
}

/// Why a row is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowErrorCode {
    WrongFieldCount,
    RecordTooLong,
    UnclosedQuote,
    InvalidUtf8,
    NulCharacter,
    Required,
    TooLong,
    InvalidStatus,
    InvalidPriority,
    InvalidTime,
    CloseTimeWithoutClosed,
    CloseTimeBeforeCreateTime,
    TooManyLabels,
    UnknownAssignee,
    UnknownLabel,
    DuplicateExternalId,
    ExternalIdTaken,
    IssueDeleted,
}

impl HeaderFaultCode {
    /// The name that clients see; it doesn't change.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidUtf8 => "INVALID_UTF8",
            Self::Utf16 => "UTF16",
            Self::MissingColumn => "MISSING_COLUMN",
            Self::UnknownColumn => "UNKNOWN_COLUMN",
            Self::DuplicateColumn => "DUPLICATE_COLUMN",
            Self::EmptyColumnName => "EMPTY_COLUMN_NAME",
            Self::TooManyColumns => "TOO_MANY_COLUMNS",
            Self::RecordTooLong => "RECORD_TOO_LONG",
            Self::UnclosedQuote => "UNCLOSED_QUOTE",
        }
    }
}

impl RowErrorCode {
    /// The name that clients see and the database keeps; it doesn't change.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WrongFieldCount => "WRONG_FIELD_COUNT",
            Self::RecordTooLong => "RECORD_TOO_LONG",
            Self::UnclosedQuote => "UNCLOSED_QUOTE",
            Self::InvalidUtf8 => "INVALID_UTF8",
            Self::NulCharacter => "NUL_CHARACTER",
            Self::Required => "REQUIRED",
            Self::TooLong => "TOO_LONG",
            Self::InvalidStatus => "INVALID_STATUS",
            Self::InvalidPriority => "INVALID_PRIORITY",
            Self::InvalidTime => "INVALID_TIME",
            Self::CloseTimeWithoutClosed => "CLOSE_TIME_WITHOUT_CLOSED",
            Self::CloseTimeBeforeCreateTime => "CLOSE_TIME_BEFORE_CREATE_TIME",
            Self::TooManyLabels => "TOO_MANY_LABELS",
            Self::UnknownAssignee => "UNKNOWN_ASSIGNEE",
            Self::UnknownLabel => "UNKNOWN_LABEL",
            Self::DuplicateExternalId => "DUPLICATE_EXTERNAL_ID",
            Self::ExternalIdTaken => "EXTERNAL_ID_TAKEN",
            Self::IssueDeleted => "ISSUE_DELETED",
        }
    }
}

/// A value as an error shows it: at most [`IMPORT_ERROR_VALUE_CHARS_MAX`] characters, the last of them "…" if there were
/// more, and nothing in it that a terminal or a log would act on or hide.
pub fn shorten(value: &[u8]) -> String {
    let mut shown = String::new();
    let mut shown_chars = 0;
    // Where to cut so that the "…" still has room and no escape is torn.
    let mut cut_at = 0;
    for part in visible_parts(value) {
        let chars = part.chars().count();
        if shown_chars + chars > IMPORT_ERROR_VALUE_CHARS_MAX {
            shown.truncate(cut_at);
            shown.push('…');
            break;
        }
        shown.push_str(&part);
        shown_chars += chars;
        if shown_chars < IMPORT_ERROR_VALUE_CHARS_MAX {
            cut_at = shown.len();
        }
    }
    shown
}

/// Each character by itself, or the escape that stands for it, or for bytes that are no character.
fn visible_parts(value: &[u8]) -> impl Iterator<Item = String> {
    value.utf8_chunks().flat_map(|chunk| {
        let characters = chunk.valid().chars().map(|c| match c {
            '\n' | '\r' | '\t' => c.escape_default().to_string(),
            _ if is_invisible(c) => c.escape_unicode().to_string(),
            _ => c.to_string(),
        });
        let mut bad_bytes = String::new();
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            let _ = write!(bad_bytes, "\\x{byte:02X}");
        }
        characters.chain((!bad_bytes.is_empty()).then_some(bad_bytes))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_value_is_shown_as_it_is() {
        assert_eq!(shorten("Grüße, \"Welt\"".as_bytes()), "Grüße, \"Welt\"");
        assert_eq!(shorten(b""), "");
    }

    #[test]
    fn a_long_value_is_cut_to_the_bound_with_an_ellipsis() {
        assert_eq!(shorten("é".repeat(80).as_bytes()), "é".repeat(80));
        assert_eq!(shorten("é".repeat(81).as_bytes()), "é".repeat(79) + "…");
    }

    #[test]
    fn control_characters_invisible_ones_and_bad_bytes_are_made_visible() {
        assert_eq!(shorten(b"a\r\n\tb\0\x1B["), "a\\r\\n\\tb\\u{0}\\u{1b}[");
        assert_eq!(shorten("\u{FEFF}a\u{202E}b".as_bytes()), "\\u{feff}a\\u{202e}b");
        assert_eq!(shorten("\u{61C}a\u{AD}b\u{E0041}".as_bytes()), "\\u{61c}a\\u{ad}b\\u{e0041}");
        assert_eq!(shorten(b"caf\xE9 \xFF\xFE"), "caf\\xE9 \\xFF\\xFE");
    }

    #[test]
    fn a_cut_never_tears_an_escape() {
        let value = [b"a".repeat(78), b"\0".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(78) + "…");
        let value = [b"a".repeat(76), b"\xFF".to_vec(), b"b".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(76) + "…");
        let value = [b"a".repeat(76), b"\xFF".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(76) + "\\xFF");
    }
}
