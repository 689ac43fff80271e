//! Errors of a header or a row, as a person can act on them.

use std::fmt::Write;

use crate::error::is_invisible;

/// The maximum length of a value in an error, in characters, including the "…" of a shortened value.
pub const IMPORT_ERROR_VALUE_CHARS_MAX: usize = 80;

/// An error of the header; the file is not imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderError {
    /// The column's name in the file, shortened; empty if the error concerns the whole header.
    pub column: String,
    pub code: HeaderErrorCode,
    pub message: String,
}

/// The reason of a [`HeaderError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderErrorCode {
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

/// An error of a row; the row is rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    /// Counted from 1, the first row after the header.
    pub row_number: u64,
    /// The line of the file on which the row begins, counted from 1.
    pub line_number: u64,
    /// The byte of the file at which the row begins.
    pub byte_offset: u64,
    /// The column's name; empty if the error concerns the whole row.
    pub column: String,
    /// The value in the file, [shortened](shorten).
    pub value: String,
    pub code: RowErrorCode,
    pub message: String,
}

/// The reason of a [`RowError`].
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

impl HeaderErrorCode {
    /// Returns the code's stable name.
    #[cfg(feature = "internals")]
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
    /// Returns the code's stable name, as on the wire and in `import_errors.code`.
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

/// Returns a value as errors show it: at most [`IMPORT_ERROR_VALUE_CHARS_MAX`] characters, the last one "…" if it was
/// shortened. Control and invisible characters and invalid UTF-8 are escaped.
pub fn shorten(value: &[u8]) -> String {
    let mut shown = String::new();
    let mut shown_chars = 0;
    // The longest prefix that leaves room for "…" and ends with a whole character or escape.
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

/// Returns each character or its escape, and the escapes of bytes that are not UTF-8.
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
    fn a_short_value_is_shown_unchanged() {
        assert_eq!(shorten("Grüße, \"Welt\"".as_bytes()), "Grüße, \"Welt\"");
        assert_eq!(shorten(b""), "");
    }

    #[test]
    fn a_long_value_is_shortened_to_the_bound_with_an_ellipsis() {
        assert_eq!(shorten("é".repeat(80).as_bytes()), "é".repeat(80));
        assert_eq!(shorten("é".repeat(81).as_bytes()), "é".repeat(79) + "…");
    }

    #[test]
    fn control_and_invisible_characters_and_invalid_bytes_are_escaped() {
        assert_eq!(shorten(b"a\r\n\tb\0\x1B["), "a\\r\\n\\tb\\u{0}\\u{1b}[");
        assert_eq!(shorten("\u{FEFF}a\u{202E}b".as_bytes()), "\\u{feff}a\\u{202e}b");
        assert_eq!(shorten("\u{61C}a\u{AD}b\u{E0041}".as_bytes()), "\\u{61c}a\\u{ad}b\\u{e0041}");
        assert_eq!(shorten(b"caf\xE9 \xFF\xFE"), "caf\\xE9 \\xFF\\xFE");
    }

    #[test]
    fn shortening_never_splits_an_escape() {
        let value = [b"a".repeat(78), b"\0".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(78) + "…");
        let value = [b"a".repeat(76), b"\xFF".to_vec(), b"b".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(76) + "…");
        let value = [b"a".repeat(76), b"\xFF".to_vec()].concat();
        assert_eq!(shorten(&value), "a".repeat(76) + "\\xFF");
    }
}
