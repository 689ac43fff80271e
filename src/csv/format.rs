//! The options that decide how a file is read.

use std::collections::BTreeMap;

use super::column::Column;
use crate::pb::Status;

/// How to read a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// The field separator: an ASCII character other than a quote or a line break. Default: a comma.
    pub separator: u8,
    /// The separator of the labels in one field. Default: a semicolon.
    pub label_separator: u8,
    /// Maps the file's column names, normalised by [`column_key`], to columns; `None` ignores the column.
    pub column_names: BTreeMap<String, Option<Column>>,
    /// Whether to ignore unknown columns. Default: they are an error of the header.
    pub ignore_unknown_columns: bool,
    /// Whether a file may lack the title column. Default: no.
    pub title_optional: bool,
    /// The status of new issues whose row has none. Default: open.
    pub default_status: Status,
}

impl Default for Format {
    fn default() -> Self {
        Self {
            separator: b',',
            label_separator: b';',
            column_names: BTreeMap::new(),
            ignore_unknown_columns: false,
            title_optional: false,
            default_status: Status::Open,
        }
    }
}

/// Normalises a column name for comparison: trimmed and in lower case.
pub fn column_key(name: &str) -> String {
    name.trim().to_lowercase()
}
