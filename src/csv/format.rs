//! How a file is to be read: what of it the importer may choose.

use std::collections::BTreeMap;

use super::header::Column;
use crate::pb::Status;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Format {
    /// Between fields: an ASCII character that is not a quote or a line end.
    pub separator: u8,
    /// Between the labels of a field.
    pub label_separator: u8,
    /// Names of the file's columns, as [`column_key`] makes them, to ours; none: the column is left out.
    pub column_names: BTreeMap<String, Option<Column>>,
    /// Whether columns without a name of ours are left out.
    pub ignore_unknown_columns: bool,
    /// Whether a file without titles says enough about its issues.
    pub title_optional: bool,
    /// The status of new issues whose row has none.
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

/// A column's name as names are compared.
pub fn column_key(name: &str) -> String {
    name.trim().to_lowercase()
}
