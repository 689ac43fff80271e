//! The file's first record: which field of a row holds which column.

use std::collections::HashSet;

use super::column::Column;
use super::error::{HeaderError, HeaderErrorCode, shorten};
use super::format::{Format, column_key};
use super::record_reader::{IMPORT_COLUMNS_MAX, IMPORT_RECORD_BYTES_MAX, Record, RecordDefect};

/// Which field of a row holds which column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Indexed by `Column as usize`.
    field_indexes: [Option<usize>; Column::ALL.len()],
    field_count: usize,
}

impl Header {
    /// Parses the header record, or returns all of its errors. Their number is bounded by [`IMPORT_COLUMNS_MAX`] and the
    /// number of mapped column names.
    pub fn parse(record: &Record<'_>, format: &Format) -> Result<Self, Vec<HeaderError>> {
        if let Some(error) = record_error(record) {
            return Err(vec![error]);
        }
        let mut header = Self { field_indexes: [None; Column::ALL.len()], field_count: record.field_count };
        let mut missing: HashSet<&str> = format.column_names.keys().map(String::as_str).collect();
        let mut errors: Vec<HeaderError> = record
            .fields()
            .enumerate()
            .filter_map(|(index, name)| {
                if let Ok(name) = std::str::from_utf8(name) {
                    missing.remove(&*column_key(name));
                }
                header.add_field(index, name, format).err()
            })
            .collect();
        // `column_names` is sorted; the set is not.
        for name in format.column_names.keys().filter(|name| missing.contains(&***name)) {
            let message = "missing; column_names maps this column".to_owned();
            errors.push(header_error(name.as_bytes(), HeaderErrorCode::MissingColumn, message));
        }
        if header.field_index(Column::Title).is_none() && !format.title_optional {
            let message = "missing; this column is required".to_owned();
            errors.push(header_error(Column::Title.name().as_bytes(), HeaderErrorCode::MissingColumn, message));
        }
        if record.field_count > IMPORT_COLUMNS_MAX {
            let message = format!("has {} columns; at most {IMPORT_COLUMNS_MAX} are allowed", record.field_count);
            errors.push(header_error(b"", HeaderErrorCode::TooManyColumns, message));
        }
        if errors.is_empty() { Ok(header) } else { Err(errors) }
    }

    /// Returns the column name of each field, empty for ignored fields. The imports table stores this for resumption.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = vec![""; self.field_count];
        for column in Column::ALL {
            if let Some(name) = self.field_index(column).and_then(|index| names.get_mut(index)) {
                *name = column.name();
            }
        }
        names
    }

    /// Restores a header from its [`names`](Self::names).
    pub fn from_names(names: &[String]) -> Self {
        let index = |column: Column| names.iter().position(|name| name == column.name());
        Self { field_indexes: Column::ALL.map(index), field_count: names.len() }
    }

    /// Returns the index of the column's field in a row; `None` if the file does not have the column.
    pub fn field_index(&self, column: Column) -> Option<usize> {
        self.field_indexes[column as usize]
    }

    /// Returns whether the file has the column.
    pub fn has(&self, column: Column) -> bool {
        self.field_index(column).is_some()
    }

    /// Returns the number of fields that each row must have.
    pub fn field_count(&self) -> usize {
        self.field_count
    }

    fn add_field(&mut self, index: usize, raw_name: &[u8], format: &Format) -> Result<(), HeaderError> {
        let name = std::str::from_utf8(raw_name).map_err(|_| {
            let message = "not UTF-8; save the file as UTF-8".to_owned();
            header_error(raw_name, HeaderErrorCode::InvalidUtf8, message)
        })?;
        let name = name.trim();
        let column = match format.column_names.get(&column_key(name)) {
            Some(Some(column)) => *column,
            Some(None) => return Ok(()),
            None => match Column::from_name(name) {
                Some(column) => column,
                None if format.ignore_unknown_columns => return Ok(()),
                None if name.is_empty() => {
                    let message = format!(
                        "column {} has no name; name it, or remove it from every row (check for a trailing separator)",
                        index + 1
                    );
                    return Err(header_error(raw_name, HeaderErrorCode::EmptyColumnName, message));
                }
                None => {
                    let message = unknown_column_message(name, format.separator);
                    return Err(header_error(name.as_bytes(), HeaderErrorCode::UnknownColumn, message));
                }
            },
        };
        match self.field_indexes[column as usize].replace(index) {
            None => Ok(()),
            Some(_) => {
                let message = format!("duplicate; the header has column \"{}\" more than once", column.name());
                Err(header_error(name.as_bytes(), HeaderErrorCode::DuplicateColumn, message))
            }
        }
    }
}

/// Returns the error of a header whose column names cannot be read at all.
fn record_error(header: &Record<'_>) -> Option<HeaderError> {
    match header.defect {
        Some(RecordDefect::UnclosedQuote) => {
            let message = "a quoted field is not closed before the end of the file; close the quote".to_owned();
            return Some(header_error(b"", HeaderErrorCode::UnclosedQuote, message));
        }
        Some(RecordDefect::TooLong) => {
            let message =
                format!("longer than {IMPORT_RECORD_BYTES_MAX} bytes; the file is not CSV, or a quote is not closed");
            return Some(header_error(b"", HeaderErrorCode::RecordTooLong, message));
        }
        None => {}
    }
    let first = header.field(0).unwrap_or_default();
    if first.starts_with(b"\xFF\xFE") || first.starts_with(b"\xFE\xFF") {
        let message = "the file is UTF-16; save it as UTF-8".to_owned();
        return Some(header_error(b"", HeaderErrorCode::Utf16, message));
    }
    None
}

fn unknown_column_message(name: &str, separator: u8) -> String {
    let known = Column::ALL.map(Column::name).join(", ");
    // Spreadsheets write semicolons where the comma is the decimal separator, and tabs when they export "text".
    let hint = match separator {
        b',' if name.contains([';', '\t']) => "; fields are separated by commas",
        _ => "",
    };
    format!("unknown column; expected one of {known}{hint}")
}

fn header_error(column: &[u8], code: HeaderErrorCode, message: String) -> HeaderError {
    HeaderError { column: shorten(column), code, message }
}

#[cfg(test)]
mod tests {
    use super::super::record_reader::RecordReader;
    use super::*;

    fn parse(header: &[u8]) -> Result<Header, Vec<HeaderError>> {
        parse_with(header, &Format::default())
    }

    fn parse_with(header: &[u8], format: &Format) -> Result<Header, Vec<HeaderError>> {
        let mut reader = RecordReader::new();
        let mut input = header;
        assert!(reader.read(&mut input).is_none(), "test headers have no line break");
        Header::parse(&reader.finish().expect("test headers are not empty"), format)
    }

    fn errors(header: &[u8]) -> Vec<(String, &'static str)> {
        errors_with(header, &Format::default())
    }

    fn errors_with(header: &[u8], format: &Format) -> Vec<(String, &'static str)> {
        let errors = parse_with(header, format).expect_err("the header is invalid");
        errors.into_iter().map(|error| (error.column, error.code.as_str())).collect()
    }

    #[test]
    fn names_match_in_any_case_and_order_and_around_spaces() {
        let header = parse(b"Status, TITLE ,\"external_id\"").unwrap();
        assert_eq!(header.field_index(Column::Status), Some(0));
        assert_eq!(header.field_index(Column::Title), Some(1));
        assert_eq!(header.field_index(Column::ExternalId), Some(2));
        assert_eq!(header.field_index(Column::Labels), None);
        assert_eq!(header.field_count(), 3);
    }

    #[test]
    fn every_column_matches_its_name() {
        let header = Column::ALL.map(Column::name).join(",");
        let header = parse(header.as_bytes()).unwrap();
        for (index, column) in Column::ALL.into_iter().enumerate() {
            assert_eq!(header.field_index(column), Some(index));
        }
    }

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_first_name() {
        assert!(parse(b"\xEF\xBB\xBFtitle,status").is_ok());
        assert_eq!(
            errors(b"\xEF\xBB\xBF\xEF\xBB\xBFtitle"),
            [("\\u{feff}title".into(), "UNKNOWN_COLUMN"), ("title".into(), "MISSING_COLUMN")]
        );
    }

    #[test]
    fn all_errors_are_reported_together() {
        assert_eq!(
            errors(b"status,Colour,,STATUS,caf\xE9"),
            [
                ("Colour".into(), "UNKNOWN_COLUMN"),
                ("".into(), "EMPTY_COLUMN_NAME"),
                ("STATUS".into(), "DUPLICATE_COLUMN"),
                ("caf\\xE9".into(), "INVALID_UTF8"),
                ("title".into(), "MISSING_COLUMN"),
            ]
        );
    }

    #[test]
    fn an_unknown_column_is_shortened_and_the_known_names_are_listed() {
        let found = parse(&[b"title,".to_vec(), b"x".repeat(500)].concat()).unwrap_err();
        assert_eq!(found[0].column, "x".repeat(79) + "…");
        assert!(found[0].message.contains("title, description, priority, status, assignee, labels, external_id"));
    }

    #[test]
    fn semicolons_between_names_are_explained() {
        let found = parse(b"title;status").unwrap_err();
        assert!(found[0].message.ends_with("; fields are separated by commas"), "{}", found[0].message);
    }

    #[test]
    fn a_trailing_comma_is_an_empty_name() {
        assert_eq!(errors(b"title,status,"), [("".into(), "EMPTY_COLUMN_NAME")]);
    }

    #[test]
    fn utf_16_is_reported_as_the_only_error() {
        for header in [b"\xFF\xFEt\0i\0t\0l\0e\0".as_slice(), b"\xFE\xFF\0t\0i\0t\0l\0e"] {
            let found = parse(header).unwrap_err();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].code.as_str(), "UTF16");
            assert!(found[0].message.contains("save it as UTF-8"), "{}", found[0].message);
        }
    }

    #[test]
    fn latin_1_is_reported_as_not_utf_8() {
        let found = parse(b"title,priorit\xE9").unwrap_err();
        assert_eq!(found.len(), 1);
        assert!(found[0].message.starts_with("not UTF-8"), "{}", found[0].message);
    }

    #[test]
    fn a_defective_record_is_reported() {
        assert_eq!(errors(b"title,\"status"), [("".into(), "UNCLOSED_QUOTE")]);
        assert_eq!(errors(&b"x".repeat(IMPORT_RECORD_BYTES_MAX + 1)), [("".into(), "RECORD_TOO_LONG")]);
    }

    #[test]
    fn the_number_of_errors_is_bounded_for_any_number_of_columns() {
        let found = errors(&b"x,".repeat(100_000));
        assert_eq!(found.len(), IMPORT_COLUMNS_MAX + 2);
        assert_eq!(found.last(), Some(&("".into(), "TOO_MANY_COLUMNS")));
    }

    /// Maps the file's names to columns; an empty column name ignores.
    fn mapping(names: &[(&str, &str)]) -> Format {
        let names = names.iter().map(|(name, column)| (column_key(name), Column::from_name(column)));
        Format { column_names: names.collect(), ..Format::default() }
    }

    #[test]
    fn mapped_names_take_precedence_over_column_names() {
        let format = mapping(&[(" SUMMARY", "title"), ("Status", "priority"), ("title", "")]);
        let header = parse_with(b"summary , STATUS,title", &format).unwrap();
        assert_eq!(header.names(), ["title", "priority", ""]);
    }

    #[test]
    fn a_mapped_name_that_the_file_lacks_is_missing() {
        let format = mapping(&[("Summary", "title"), ("Estimate", "")]);
        assert_eq!(
            errors_with(b"status", &format),
            [
                ("estimate".into(), "MISSING_COLUMN"),
                ("summary".into(), "MISSING_COLUMN"),
                ("title".into(), "MISSING_COLUMN")
            ]
        );
    }

    #[test]
    fn a_column_under_its_own_and_a_mapped_name_is_a_duplicate() {
        let format = mapping(&[("Summary", "title")]);
        assert_eq!(errors_with(b"title,Summary", &format), [("Summary".into(), "DUPLICATE_COLUMN")]);
    }

    #[test]
    fn unknown_columns_are_ignored_if_the_format_says_so() {
        let format = Format { ignore_unknown_columns: true, ..Format::default() };
        assert_eq!(parse_with(b"colour,title,,colour,", &format).unwrap().names(), ["", "title", "", "", ""]);
        assert_eq!(errors_with(b"title,caf\xE9", &format), [("caf\\xE9".into(), "INVALID_UTF8")]);
        assert_eq!(errors_with(b"title,title", &format), [("title".into(), "DUPLICATE_COLUMN")]);
    }

    #[test]
    fn a_header_is_restored_from_its_names() {
        for header in [b"title,status,labels".as_slice(), b"description,x,close_time,title,"] {
            let format = Format { ignore_unknown_columns: true, ..Format::default() };
            let header = parse_with(header, &format).unwrap();
            let names: Vec<String> = header.names().into_iter().map(str::to_owned).collect();
            assert_eq!(Header::from_names(&names), header);
        }
    }
}
