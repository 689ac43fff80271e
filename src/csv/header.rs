//! The file's first record: which field is which.

use std::collections::HashSet;

use super::error::{HeaderFault, HeaderFaultCode, shorten};
use super::format::{Format, column_key};
use super::record_reader::{IMPORT_COLUMNS_MAX, IMPORT_RECORD_BYTES_MAX, Record, RecordFault};

/// What a file may say about an issue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Column {
    Title,
    Description,
    Priority,
    Status,
    Assignee,
    Labels,
    ExternalId,
    CreateTime,
    CloseTime,
}

impl Column {
    pub const ALL: [Self; 9] = [
        Self::Title,
        Self::Description,
        Self::Priority,
        Self::Status,
        Self::Assignee,
        Self::Labels,
        Self::ExternalId,
        Self::CreateTime,
        Self::CloseTime,
    ];

    /// The name in the header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Title => "title",
            Self::Description => "description",
            Self::Priority => "priority",
            Self::Status => "status",
            Self::Assignee => "assignee",
            Self::Labels => "labels",
            Self::ExternalId => "external_id",
            Self::CreateTime => "create_time",
            Self::CloseTime => "close_time",
        }
    }

    /// In any case.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|column| column.name().eq_ignore_ascii_case(name))
    }
}

/// Which field of a row is which column: what the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// By `Column as usize`.
    indexes: [Option<usize>; Column::ALL.len()],
    field_count: usize,
}

impl Columns {
    /// Reads the header, or returns everything that is wrong with it.
    pub fn parse(header: &Record<'_>, format: &Format) -> Result<Self, Vec<HeaderFault>> {
        if let Some(fault) = whole_header_fault(header) {
            return Err(vec![fault]);
        }
        let mut columns = Self { indexes: [None; Column::ALL.len()], field_count: header.field_count };
        let mut missing: HashSet<&str> = format.column_names.keys().map(String::as_str).collect();
        let mut faults: Vec<HeaderFault> = header
            .fields()
            .enumerate()
            .filter_map(|(index, name)| columns.place(index, name, format, &mut missing).err())
            .collect();
        // In the order of the names, whatever that of the set is.
        for name in format.column_names.keys().filter(|name| missing.contains(&***name)) {
            let message =
                format!("the header has no column \"{}\", which column_names names", shorten(name.as_bytes()));
            faults.push(fault(name.as_bytes(), HeaderFaultCode::MissingColumn, message));
        }
        if columns.index(Column::Title).is_none() && !format.title_optional {
            let message = "the header has no column \"title\", which is required";
            faults.push(fault(Column::Title.name().as_bytes(), HeaderFaultCode::MissingColumn, message.to_owned()));
        }
        if header.field_count > IMPORT_COLUMNS_MAX {
            let message =
                format!("the header has {} columns, at most {IMPORT_COLUMNS_MAX} are read", header.field_count);
            faults.push(fault(b"", HeaderFaultCode::TooManyColumns, message));
        }
        if faults.is_empty() { Ok(columns) } else { Err(faults) }
    }

    /// Our name of each of the file's columns, empty for those that are left out.
    pub fn names(&self) -> Vec<&'static str> {
        let mut names = vec![""; self.field_count];
        for column in Column::ALL {
            if let Some(name) = self.index(column).and_then(|index| names.get_mut(index)) {
                *name = column.name();
            }
        }
        names
    }

    /// What [`names`](Self::names) was made of.
    pub fn from_names(names: &[String]) -> Self {
        let index = |column: Column| names.iter().position(|name| name == column.name());
        Self { indexes: Column::ALL.map(index), field_count: names.len() }
    }

    /// The column's place among a row's fields; `None` if the file doesn't have it.
    pub fn index(&self, column: Column) -> Option<usize> {
        self.indexes[column as usize]
    }

    /// How many fields each row has to have.
    pub fn field_count(&self) -> usize {
        self.field_count
    }

    /// Takes the name of a field, off those that are still missing too.
    fn place(
        &mut self,
        index: usize,
        raw: &[u8],
        format: &Format,
        missing: &mut HashSet<&str>,
    ) -> Result<(), HeaderFault> {
        let shown = shorten(raw);
        let name = std::str::from_utf8(raw).map_err(|_| {
            let message = format!("the file is not UTF-8 (column \"{shown}\"): save it as UTF-8");
            fault(raw, HeaderFaultCode::InvalidUtf8, message)
        })?;
        let name = name.trim();
        let key = column_key(name);
        missing.remove(&*key);
        let column = match format.column_names.get(&key) {
            Some(Some(column)) => *column,
            Some(None) => return Ok(()),
            None => match Column::from_name(name) {
                Some(column) => column,
                None if format.ignore_unknown_columns => return Ok(()),
                None if name.is_empty() => {
                    let message = format!(
                        "column {} has no name: name it or remove it, in every row (a trailing comma?)",
                        index + 1
                    );
                    return Err(fault(raw, HeaderFaultCode::EmptyColumnName, message));
                }
                None => {
                    let message = unknown_column_message(name, format.separator);
                    return Err(fault(name.as_bytes(), HeaderFaultCode::UnknownColumn, message));
                }
            },
        };
        match self.indexes[column as usize].replace(index) {
            None => Ok(()),
            Some(_) => {
                let message = format!("the header has the column \"{}\" more than once", column.name());
                Err(fault(name.as_bytes(), HeaderFaultCode::DuplicateColumn, message))
            }
        }
    }
}

/// What makes it pointless to look at the names.
fn whole_header_fault(header: &Record<'_>) -> Option<HeaderFault> {
    match header.fault {
        Some(RecordFault::UnclosedQuote) => {
            let message = "a quote in the header never closes before the end of the file".to_owned();
            return Some(fault(b"", HeaderFaultCode::UnclosedQuote, message));
        }
        Some(RecordFault::TooLong) => {
            let message = format!(
                "the header has more than {IMPORT_RECORD_BYTES_MAX} bytes: the file is not CSV, or a quote doesn't close"
            );
            return Some(fault(b"", HeaderFaultCode::RecordTooLong, message));
        }
        None => {}
    }
    let first = header.field(0).unwrap_or_default();
    if first.starts_with(b"\xFF\xFE") || first.starts_with(b"\xFE\xFF") {
        let message =
            "the file is UTF-16 (it begins with that encoding's byte-order mark): save it as UTF-8".to_owned();
        return Some(fault(b"", HeaderFaultCode::Utf16, message));
    }
    None
}

fn unknown_column_message(name: &str, separator: u8) -> String {
    let known = Column::ALL.map(Column::name).join(", ");
    // Spreadsheets write semicolons where the comma is the decimal separator, and tabs when asked for "text".
    let hint = match separator {
        b',' if name.contains([';', '\t']) => "; fields are separated by commas",
        _ => "",
    };
    format!("unknown column \"{}\": the columns are {known}{hint}", shorten(name.as_bytes()))
}

fn fault(column: &[u8], code: HeaderFaultCode, message: String) -> HeaderFault {
    HeaderFault { column: shorten(column), code, message }
}

#[cfg(test)]
mod tests {
    use super::super::record_reader::RecordReader;
    use super::*;

    fn parse(header: &[u8]) -> Result<Columns, Vec<HeaderFault>> {
        parse_as(header, &Format::default())
    }

    fn parse_as(header: &[u8], format: &Format) -> Result<Columns, Vec<HeaderFault>> {
        let mut reader = RecordReader::new();
        let mut input = header;
        assert!(reader.read(&mut input).is_none(), "the header of a test has no line end");
        Columns::parse(&reader.finish().expect("the header of a test is not empty"), format)
    }

    fn faults(header: &[u8]) -> Vec<(String, &'static str)> {
        faults_as(header, &Format::default())
    }

    fn faults_as(header: &[u8], format: &Format) -> Vec<(String, &'static str)> {
        let faults = parse_as(header, format).expect_err("the header has a fault");
        faults.into_iter().map(|fault| (fault.column, fault.code.as_str())).collect()
    }

    #[test]
    fn names_are_found_whatever_their_case_order_and_spaces() {
        let columns = parse(b"Status, TITLE ,\"external_id\"").unwrap();
        assert_eq!(columns.index(Column::Status), Some(0));
        assert_eq!(columns.index(Column::Title), Some(1));
        assert_eq!(columns.index(Column::ExternalId), Some(2));
        assert_eq!(columns.index(Column::Labels), None);
        assert_eq!(columns.field_count(), 3);
    }

    #[test]
    fn every_column_is_found_under_its_name() {
        let header = Column::ALL.map(Column::name).join(",");
        let columns = parse(header.as_bytes()).unwrap();
        for (index, column) in Column::ALL.into_iter().enumerate() {
            assert_eq!(columns.index(column), Some(index));
        }
    }

    #[test]
    fn a_byte_order_mark_is_not_part_of_the_first_name() {
        assert!(parse(b"\xEF\xBB\xBFtitle,status").is_ok());
        assert_eq!(
            faults(b"\xEF\xBB\xBF\xEF\xBB\xBFtitle"),
            [("\\u{feff}title".into(), "UNKNOWN_COLUMN"), ("title".into(), "MISSING_COLUMN")]
        );
    }

    #[test]
    fn all_faults_come_at_once() {
        assert_eq!(
            faults(b"status,Colour,,STATUS,caf\xE9"),
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
    fn an_unknown_column_is_quoted_shortened_beside_the_known_names() {
        let found = parse(&[b"title,".to_vec(), b"x".repeat(500)].concat()).unwrap_err();
        assert_eq!(found[0].column, "x".repeat(79) + "…");
        assert!(found[0].message.contains(&found[0].column), "{}", found[0].message);
        assert!(found[0].message.contains("title, description, priority, status, assignee, labels, external_id"));
    }

    #[test]
    fn semicolons_between_names_are_explained() {
        let found = parse(b"title;status").unwrap_err();
        assert!(found[0].message.ends_with("; fields are separated by commas"), "{}", found[0].message);
    }

    #[test]
    fn a_trailing_comma_is_an_empty_name() {
        assert_eq!(faults(b"title,status,"), [("".into(), "EMPTY_COLUMN_NAME")]);
    }

    #[test]
    fn utf_16_is_named_and_nothing_else_is_said() {
        for header in [b"\xFF\xFEt\0i\0t\0l\0e\0".as_slice(), b"\xFE\xFF\0t\0i\0t\0l\0e"] {
            let found = parse(header).unwrap_err();
            assert_eq!(found.len(), 1);
            assert_eq!(found[0].code.as_str(), "UTF16");
            assert!(found[0].message.contains("save it as UTF-8"), "{}", found[0].message);
        }
    }

    #[test]
    fn latin_1_is_said_to_be_no_utf_8() {
        let found = parse(b"title,priorit\xE9").unwrap_err();
        assert_eq!(found.len(), 1);
        assert!(found[0].message.starts_with("the file is not UTF-8"), "{}", found[0].message);
    }

    #[test]
    fn a_header_that_is_no_record_says_why() {
        assert_eq!(faults(b"title,\"status"), [("".into(), "UNCLOSED_QUOTE")]);
        assert_eq!(faults(&b"x".repeat(IMPORT_RECORD_BYTES_MAX + 1)), [("".into(), "RECORD_TOO_LONG")]);
    }

    #[test]
    fn the_list_of_faults_is_bounded_however_many_columns_there_are() {
        let found = faults(&b"x,".repeat(100_000));
        assert_eq!(found.len(), IMPORT_COLUMNS_MAX + 2);
        assert_eq!(found.last(), Some(&("".into(), "TOO_MANY_COLUMNS")));
    }
    /// The file's names to ours; empty is none.
    fn naming(names: &[(&str, &str)]) -> Format {
        let names = names.iter().map(|(name, ours)| (column_key(name), Column::from_name(ours)));
        Format { column_names: names.collect(), ..Format::default() }
    }

    #[test]
    fn names_of_the_file_stand_for_ours_and_before_them() {
        let format = naming(&[(" SUMMARY", "title"), ("Status", "priority"), ("title", "")]);
        let columns = parse_as(b"summary , STATUS,title", &format).unwrap();
        assert_eq!(columns.names(), ["title", "priority", ""]);
    }

    #[test]
    fn a_name_that_the_file_does_not_have_is_missing() {
        let format = naming(&[("Summary", "title"), ("Estimate", "")]);
        assert_eq!(
            faults_as(b"status", &format),
            [
                ("estimate".into(), "MISSING_COLUMN"),
                ("summary".into(), "MISSING_COLUMN"),
                ("title".into(), "MISSING_COLUMN")
            ]
        );
    }

    #[test]
    fn a_column_under_its_own_and_another_name_is_there_twice() {
        let format = naming(&[("Summary", "title")]);
        assert_eq!(faults_as(b"title,Summary", &format), [("Summary".into(), "DUPLICATE_COLUMN")]);
    }

    #[test]
    fn columns_without_a_name_of_ours_are_left_out_if_that_is_wanted() {
        let format = Format { ignore_unknown_columns: true, ..Format::default() };
        assert_eq!(parse_as(b"colour,title,,colour,", &format).unwrap().names(), ["", "title", "", "", ""]);
        assert_eq!(faults_as(b"title,caf\xE9", &format), [("caf\\xE9".into(), "INVALID_UTF8")]);
        assert_eq!(faults_as(b"title,title", &format), [("title".into(), "DUPLICATE_COLUMN")]);
    }

    #[test]
    fn columns_are_what_their_names_say() {
        for header in [b"title,status,labels".as_slice(), b"description,x,close_time,title,"] {
            let format = Format { ignore_unknown_columns: true, ..Format::default() };
            let columns = parse_as(header, &format).unwrap();
            let names: Vec<String> = columns.names().into_iter().map(str::to_owned).collect();
            assert_eq!(Columns::from_names(&names), columns);
        }
    }
}
