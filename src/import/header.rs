//! The file's first record: which field is which.

use super::error::{HeaderFault, HeaderFaultCode, shorten};
use super::reader::{IMPORT_COLUMNS_MAX, IMPORT_RECORD_BYTES_MAX, Record, RecordFault};

/// What a file may say about an issue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    fn from_name(name: &str) -> Option<Self> {
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
    pub fn parse(header: &Record<'_>) -> Result<Self, Vec<HeaderFault>> {
        if let Some(fault) = whole_header_fault(header) {
            return Err(vec![fault]);
        }
        let mut columns = Self { indexes: [None; Column::ALL.len()], field_count: header.field_count };
        let mut faults: Vec<HeaderFault> =
            header.fields().enumerate().filter_map(|(index, name)| columns.place(index, name).err()).collect();
        if columns.index(Column::Title).is_none() {
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

    /// The column's place among a row's fields; `None` if the file doesn't have it.
    pub fn index(&self, column: Column) -> Option<usize> {
        self.indexes[column as usize]
    }

    /// How many fields each row has to have.
    pub fn field_count(&self) -> usize {
        self.field_count
    }

    fn place(&mut self, index: usize, raw: &[u8]) -> Result<(), HeaderFault> {
        let shown = shorten(raw);
        let name = std::str::from_utf8(raw).map_err(|_| {
            let message = format!("the file is not UTF-8 (column \"{shown}\"): save it as UTF-8");
            fault(raw, HeaderFaultCode::InvalidUtf8, message)
        })?;
        let name = name.trim();
        if name.is_empty() {
            let message =
                format!("column {} has no name: name it or remove it, in every row (a trailing comma?)", index + 1);
            return Err(fault(raw, HeaderFaultCode::EmptyColumnName, message));
        }
        let Some(column) = Column::from_name(name) else {
            return Err(fault(name.as_bytes(), HeaderFaultCode::UnknownColumn, unknown_column_message(name)));
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

fn unknown_column_message(name: &str) -> String {
    let known = Column::ALL.map(Column::name).join(", ");
    // Spreadsheets write semicolons where the comma is the decimal separator, and tabs when asked for "text".
    let hint = if name.contains([';', '\t']) { "; fields are separated by commas" } else { "" };
    format!("unknown column \"{}\": the columns are {known}{hint}", shorten(name.as_bytes()))
}

fn fault(column: &[u8], code: HeaderFaultCode, message: String) -> HeaderFault {
    HeaderFault { column: shorten(column), code, message }
}

#[cfg(test)]
mod tests {
    use super::super::reader::RecordReader;
    use super::*;

    fn parse(header: &[u8]) -> Result<Columns, Vec<HeaderFault>> {
        let mut reader = RecordReader::new();
        let mut input = header;
        assert!(reader.read(&mut input).is_none(), "the header of a test has no line end");
        Columns::parse(&reader.finish().expect("the header of a test is not empty"))
    }

    fn faults(header: &[u8]) -> Vec<(String, &'static str)> {
        let faults = parse(header).expect_err("the header has a fault");
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
}
