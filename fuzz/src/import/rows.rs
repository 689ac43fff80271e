//! Properties of parsed headers and rows.

use std::collections::HashSet;

use chrono::{DateTime, Datelike, Utc};
use issue_tracker::{
    csv::{
        Column, ExportRow, ExportWriter, Format, Header, HeaderError, IMPORT_COLUMNS_MAX, IMPORT_ERROR_VALUE_CHARS_MAX,
        ImportRow, RowError,
        row::{TIME_YEAR_MAX, TIME_YEAR_MIN},
    },
    pb::Status,
    request::{
        DESCRIPTION_CHARS_MAX, EXTERNAL_ID_CHARS_MAX, LABEL_NAME_CHARS_MAX, LABELS_PER_ISSUE_MAX, TITLE_CHARS_MAX,
        USERNAME_CHARS_MAX,
    },
};

use super::{super::errors::assert_readable, OwnedRecord, Parsed, Start, read};

/// The longest message contains a value and the list of all columns.
const MESSAGE_CHARS_MAX: usize = 300;

pub fn assert_header(format: &Format, header: &Result<Header, Vec<HeaderError>>) {
    match header {
        Ok(header) => {
            assert!((1..=IMPORT_COLUMNS_MAX).contains(&header.field_count()));
            assert!(format.title_optional || header.field_index(Column::Title).is_some());
            let places: Vec<usize> = Column::ALL.into_iter().filter_map(|column| header.field_index(column)).collect();
            assert!(places.iter().all(|place| *place < header.field_count()));
            assert_eq!(places.iter().collect::<HashSet<_>>().len(), places.len(), "a field is one column");
        }
        Err(errors) => {
            let most = IMPORT_COLUMNS_MAX + format.column_names.len() + 2;
            assert!((1..=most).contains(&errors.len()), "{} errors", errors.len());
            for error in errors {
                assert_readable(&error.column, IMPORT_ERROR_VALUE_CHARS_MAX);
                assert_readable(&error.message, MESSAGE_CHARS_MAX);
            }
        }
    }
}

pub fn assert_row(format: &Format, record: &OwnedRecord, row: &Result<ImportRow, Vec<RowError>>) {
    match row {
        Ok(row) => {
            assert_eq!(
                (row.row_number, row.line_number, row.byte_offset),
                (record.row_number, record.line_number, record.byte_offset)
            );
            assert_eq!(record.defect, None);
            assert_bounds(format, row);
            assert_written_row_is_the_same(format, row);
        }
        Err(errors) => {
            let most = Column::ALL.len() * 2 + LABELS_PER_ISSUE_MAX;
            assert!((1..=most).contains(&errors.len()), "{} errors", errors.len());
            for error in errors {
                assert_eq!(
                    (error.row_number, error.line_number, error.byte_offset),
                    (record.row_number, record.line_number, record.byte_offset)
                );
                assert!(error.column.is_empty() || Column::from_name(&error.column).is_some());
                assert_readable(&error.value, IMPORT_ERROR_VALUE_CHARS_MAX);
                assert_readable(&error.message, MESSAGE_CHARS_MAX);
            }
        }
    }
}

/// Asserts the constraints of the database.
fn assert_bounds(format: &Format, row: &ImportRow) {
    let assert_text = |text: &str, chars_max: usize| {
        assert!(text.chars().count() <= chars_max && !text.contains('\0'), "{text:?}");
    };
    let assert_name = |text: &str, chars_max: usize| {
        assert_text(text, chars_max);
        assert!(!text.is_empty() && text.trim() == text, "{text:?}");
    };
    assert_text(&row.title, TITLE_CHARS_MAX);
    assert!(format.title_optional && row.title.is_empty() || !row.title.trim().is_empty());
    assert_text(&row.description, DESCRIPTION_CHARS_MAX);
    row.assignee.iter().for_each(|name| assert_name(name, USERNAME_CHARS_MAX));
    row.labels.iter().for_each(|name| assert_name(name, LABEL_NAME_CHARS_MAX));
    row.external_id.iter().for_each(|id| assert_text(id, EXTERNAL_ID_CHARS_MAX));
    assert!(row.external_id.iter().all(|id| !id.trim().is_empty()));
    assert_ne!(row.status, Some(Status::Unspecified));

    let labels: HashSet<String> = row.labels.iter().map(|name| name.to_ascii_lowercase()).collect();
    assert_eq!(labels.len(), row.labels.len(), "{:?}", row.labels);
    assert!(labels.len() <= LABELS_PER_ISSUE_MAX);

    for time in row.create_time.iter().chain(&row.close_time) {
        assert!((TIME_YEAR_MIN..=TIME_YEAR_MAX).contains(&time.year()), "{time}");
        assert_eq!(time.timestamp_subsec_nanos() % 1_000, 0, "{time}");
        assert!(time.timestamp_subsec_nanos() < 1_000_000_000, "{time}");
    }
    if let Some(close_time) = row.close_time {
        assert_eq!(row.status.unwrap_or(format.default_status), Status::Closed);
        assert!(row.create_time.is_none_or(|create_time| create_time <= close_time));
    }
}

/// An export of the issue parses back to the same row. Skips rows that a file cannot represent.
fn assert_written_row_is_the_same(format: &Format, row: &ImportRow) {
    if row.title.is_empty() || row.labels.iter().any(|name| name.contains(';')) {
        return;
    }
    let create_time = row.create_time.or(row.close_time).unwrap_or(DateTime::<Utc>::UNIX_EPOCH);
    let status = row.status.unwrap_or(format.default_status);
    let mut writer = ExportWriter::new(false).expect("there is a header");
    let chunk = writer.write(&ExportRow {
        external_id: row.external_id.as_deref().unwrap_or_default(),
        title: &row.title,
        description: &row.description,
        priority: row.priority,
        status,
        assignee: row.assignee.as_deref().unwrap_or_default(),
        labels: &row.labels.join(";"),
        create_time,
        close_time: row.close_time,
    });
    let first = chunk.expect("a row can be written").map(|chunk| chunk.data).unwrap_or_default();
    let file = [first, writer.finish().expect("a file has an end").data].concat();

    let seen = read(&Format::default(), Start::file(), [file.as_slice()]);
    let [_, OwnedRecord { parsed: Parsed::Row(Ok(again)), .. }] = &*seen else {
        panic!("{row:?} was read back as {seen:?}");
    };
    let expected = ImportRow {
        row_number: 1,
        line_number: 2,
        byte_offset: again.byte_offset,
        status: Some(status),
        create_time: Some(create_time),
        ..row.clone()
    };
    assert_eq!(again, &expected);
}
