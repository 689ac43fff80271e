use super::super::record_reader::RecordReader;
use super::*;

/// Parses `row` below `header`: row 1, on line 2, at the byte after the header's line break.
fn parse_bytes(header: &str, row: &[u8]) -> Result<ImportRow, Vec<RowError>> {
    let file = [header.as_bytes(), b"\n", row].concat();
    let mut input = file.as_slice();
    let mut reader = RecordReader::new();
    let format = Format::default();
    let header = Header::parse(&reader.read(&mut input).unwrap(), &format).unwrap();
    if let Some(record) = reader.read(&mut input) {
        return parse_row(&format, &header, &record);
    }
    parse_row(&format, &header, &reader.finish().unwrap())
}

fn parse(header: &str, row: &str) -> Result<ImportRow, Vec<RowError>> {
    parse_bytes(header, row.as_bytes())
}

/// Parses a row with a title and this value, quoted, in this column.
fn with(column: Column, value: &str) -> Result<ImportRow, Vec<RowError>> {
    parse(&format!("title,{}", column.name()), &format!("t,\"{}\"", value.replace('"', "\"\"")))
}

fn codes(result: Result<ImportRow, Vec<RowError>>) -> Vec<(String, &'static str)> {
    let errors = result.expect_err("the row has an error");
    errors.into_iter().map(|error| (error.column, error.code.as_str())).collect()
}

fn the_error(result: Result<ImportRow, Vec<RowError>>) -> RowError {
    let mut errors = result.expect_err("the row has an error");
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors.remove(0)
}

fn time(text: &str) -> Option<DateTime<Utc>> {
    Some(DateTime::parse_from_rfc3339(text).unwrap().to_utc())
}

const FULL_HEADER: &str = "title,description,priority,status,assignee,labels,external_id,create_time,close_time";

#[test]
fn a_row_with_every_column_is_parsed() {
    let row = "\"Fix it, \"\"now\"\"\",\"two\r\nlines\",high,closed, ada ,bug; UI,J-1,\
               2024-05-17T08:30:00Z,2024-05-18T10:30:00.1234567+02:00\r\n";
    assert_eq!(
        parse(FULL_HEADER, row),
        Ok(ImportRow {
            row_number: 1,
            line_number: 2,
            byte_offset: FULL_HEADER.len() as u64 + 1,
            title: "Fix it, \"now\"".into(),
            description: "two\r\nlines".into(),
            priority: Priority::High,
            status: Some(Status::Closed),
            assignee: Some("ada".into()),
            labels: vec!["bug".into(), "UI".into()],
            external_id: Some("J-1".into()),
            create_time: time("2024-05-17T08:30:00Z"),
            close_time: time("2024-05-18T08:30:00.123456Z"),
        })
    );
}

#[test]
fn missing_columns_and_empty_fields_have_their_defaults() {
    for (header, row) in [("title", "t"), (FULL_HEADER, "t,,,,,,,,"), (FULL_HEADER, "t,, , , , ; ;, , , ")] {
        let row = parse(header, row).unwrap();
        assert_eq!((row.description.as_str(), row.priority, row.status), ("", Priority::Unspecified, None));
        assert_eq!((row.assignee, row.labels, row.external_id), (None, vec![], None));
        assert_eq!((row.create_time, row.close_time), (None, None));
    }
}

#[test]
fn all_errors_of_a_row_are_reported_with_its_position() {
    let row = format!("  ,{},urgent,done,{},{},a\0,yesterday,2024", "d".repeat(65_537), "u".repeat(51), "l".repeat(51));
    let errors = parse(FULL_HEADER, &row).unwrap_err();
    assert!(errors.iter().all(|error| error.row_number == 1 && error.line_number == 2));
    assert!(errors.iter().all(|error| error.byte_offset == FULL_HEADER.len() as u64 + 1));
    assert_eq!(
        codes(Err(errors)),
        [
            ("title".into(), "REQUIRED"),
            ("description".into(), "TOO_LONG"),
            ("priority".into(), "INVALID_PRIORITY"),
            ("status".into(), "INVALID_STATUS"),
            ("assignee".into(), "TOO_LONG"),
            ("labels".into(), "TOO_LONG"),
            ("external_id".into(), "NUL_CHARACTER"),
            ("create_time".into(), "INVALID_TIME"),
            ("close_time".into(), "INVALID_TIME"),
        ]
    );
}

#[test]
fn a_wrong_field_count_is_the_only_error_of_a_row() {
    for (row, count) in [("t", 1), ("t,nonsense,x", 3), (&",".repeat(99), 100)] {
        let error = the_error(parse("title,status", row));
        assert_eq!((error.code.as_str(), error.column.as_str()), ("WRONG_FIELD_COUNT", ""));
        assert!(
            error.message.starts_with(&format!("row: has {count} fields where the header has 2; ")),
            "{}",
            error.message
        );
    }
}

#[test]
fn a_trailing_comma_adds_a_field() {
    assert_eq!(codes(parse("title,status", "t,open,")), [("".into(), "WRONG_FIELD_COUNT")]);
}

#[test]
fn an_unclosed_quote_is_the_only_error_and_quotes_the_field() {
    let error = the_error(parse("title,status,labels", "t,\"nonsense\nnext,row"));
    assert_eq!(error.code.as_str(), "UNCLOSED_QUOTE");
    assert_eq!(error.value, "nonsense\\nnext,row");
}

#[test]
fn a_record_over_the_size_limit_is_the_only_error() {
    let row = format!("\"{}\",nonsense\n", "x".repeat(IMPORT_RECORD_BYTES_MAX));
    let error = the_error(parse("title,status", &row));
    assert_eq!((error.code.as_str(), error.column.as_str()), ("RECORD_TOO_LONG", ""));
    assert!(error.message.contains("1048576 bytes"), "{}", error.message);
}

#[test]
fn latin_1_is_reported_per_column_with_escaped_bytes() {
    let errors = parse_bytes("title,labels", b"caf\xE9,\xFC;b").unwrap_err();
    assert_eq!(errors[0].message, "title: \"caf\\xE9\" is not UTF-8; save the file as UTF-8");
    assert_eq!(errors[1].value, "\\xFC;b");
    assert_eq!(codes(Err(errors)), [("title".into(), "INVALID_UTF8"), ("labels".into(), "INVALID_UTF8")]);
}

#[test]
fn a_character_split_across_fields_is_rejected() {
    assert_eq!(
        codes(parse_bytes("title,description", b"\xC3,\xA9")),
        [("title".into(), "INVALID_UTF8"), ("description".into(), "INVALID_UTF8")]
    );
}

#[test]
fn nul_is_rejected_in_every_column() {
    let row = ["\0"; 9].join(",");
    let expected = Column::ALL.map(|column| (column.name().to_owned(), "NUL_CHARACTER"));
    assert_eq!(codes(parse(FULL_HEADER, &row)), expected);
}

#[test]
fn a_title_is_kept_unchanged_and_required() {
    assert_eq!(parse("title", "  two  words ").unwrap().title, "  two  words ");
    for row in ["\"\"", "  ", "\"\n\"", "\u{A0}"] {
        assert_eq!(codes(parse("title", row)), [("title".into(), "REQUIRED")]);
    }
}

#[test]
fn lengths_are_counted_in_characters() {
    let limits =
        [(Column::Description, 65_536), (Column::Assignee, 50), (Column::Labels, 50), (Column::ExternalId, 255)];
    for (column, chars) in limits {
        assert!(with(column, &"é".repeat(chars)).is_ok());
        let error = the_error(with(column, &"é".repeat(chars + 1)));
        assert_eq!((error.column.as_str(), error.code), (column.name(), RowErrorCode::TooLong));
        assert!(
            error.message.ends_with(&format!("has {} characters; at most {chars} are allowed", chars + 1)),
            "{}",
            error.message
        );
    }
    assert_eq!(parse("title", &"é".repeat(255)).unwrap().title.chars().count(), 255);
    assert_eq!(codes(parse("title", &"é".repeat(256))), [("title".into(), "TOO_LONG")]);
    assert_eq!(codes(parse("title", &" ".repeat(256))), [("title".into(), "TOO_LONG"), ("title".into(), "REQUIRED")]);
}

#[test]
fn values_in_errors_are_shortened() {
    let error = the_error(parse("title", &"x".repeat(256)));
    assert_eq!(error.value, "x".repeat(79) + "…");
    assert!(error.message.starts_with(&format!("title: \"{}\" has 256", error.value)), "{}", error.message);
}

#[test]
fn status_names_are_accepted_in_any_case_with_or_without_prefix() {
    for (names, status) in [
        (["", " ", "\t", "  ", "\n"], None),
        (["open", "OPEN", "Open", "STATUS_OPEN", " Status_Open "], Some(Status::Open)),
        (
            ["in_progress", "In Progress", "in-progress", "STATUS_IN_PROGRESS", "status_in progress"],
            Some(Status::InProgress),
        ),
        (["closed", "Closed", "CLOSED", "STATUS_CLOSED", "status_closed\t"], Some(Status::Closed)),
    ] {
        for name in names {
            assert_eq!(with(Column::Status, name).unwrap().status, status, "{name}");
        }
    }
}

#[test]
fn other_statuses_are_rejected() {
    for name in
        ["done", "STATUS_", "STATUS_UNSPECIFIED", "inprogress", "status_status_open", "PRIORITY_OPEN", "оpen", "1"]
    {
        let error = the_error(with(Column::Status, name));
        assert_eq!(error.code.as_str(), "INVALID_STATUS");
        let expected =
            format!("status: \"{name}\" is not a status; expected open, in_progress, closed or empty (open)");
        assert_eq!(error.message, expected);
    }
}

#[test]
fn priority_names_are_accepted_in_any_case_with_or_without_prefix() {
    for (names, priority) in [
        (["", " ", "unspecified", "PRIORITY_UNSPECIFIED"], Priority::Unspecified),
        (["low", "Low", "PRIORITY_LOW", " priority_low "], Priority::Low),
        (["medium", "Medium", "PRIORITY_MEDIUM", "MEDIUM"], Priority::Medium),
        (["high", "High", "PRIORITY_HIGH", "HIGH"], Priority::High),
        (["critical", "Critical", "PRIORITY_CRITICAL", "CRITICAL"], Priority::Critical),
    ] {
        for name in names {
            assert_eq!(with(Column::Priority, name).unwrap().priority, priority, "{name}");
        }
    }
    for name in ["urgent", "PRIORITY_", "STATUS_LOW", "3", "hi gh"] {
        assert_eq!(codes(with(Column::Priority, name)), [("priority".into(), "INVALID_PRIORITY")], "{name}");
    }
}

#[test]
fn labels_are_trimmed_and_empty_or_duplicate_labels_dropped() {
    let labels = with(Column::Labels, ";bug ; UI;;Bug;ui; Größe;GRÖSSE;größe;a,b;").unwrap().labels;
    assert_eq!(labels, ["bug", "UI", "Größe", "GRÖSSE", "a,b"]);
}

#[test]
fn at_most_100_different_labels_are_accepted() {
    let labels = |count: usize| (0..count).map(|n| format!("l{n}")).collect::<Vec<_>>().join(";");
    assert_eq!(with(Column::Labels, &labels(100)).unwrap().labels.len(), 100);
    assert_eq!(with(Column::Labels, &(labels(100) + ";L0;l99")).unwrap().labels.len(), 100);
    assert_eq!(codes(with(Column::Labels, &labels(101))), [("labels".into(), "TOO_MANY_LABELS")]);
}

#[test]
fn every_label_that_is_too_long_is_an_error_up_to_the_label_limit() {
    let label = |n: usize| format!("{n:051}");
    let errors = with(Column::Labels, &[label(1), "ok".into(), label(2)].join(";")).unwrap_err();
    assert_eq!(errors.iter().map(|error| error.value.clone()).collect::<Vec<_>>(), [label(1), label(2)]);
    let many = (0..10_000).map(label).collect::<Vec<_>>().join(";");
    assert_eq!(with(Column::Labels, &many).unwrap_err().len(), LABELS_PER_ISSUE_MAX + 1);
}

#[test]
fn an_external_id_is_kept_unchanged() {
    assert_eq!(with(Column::ExternalId, " 007 ").unwrap().external_id, Some(" 007 ".into()));
    assert_eq!(with(Column::ExternalId, "   ").unwrap().external_id, None);
}

#[test]
fn times_are_rfc_3339_in_utc_truncated_to_microseconds() {
    for (text, expected) in [
        ("2024-02-29T23:59:59Z", "2024-02-29T23:59:59Z"),
        (" 2024-05-17t08:30:00.5z ", "2024-05-17T08:30:00.5Z"),
        ("2024-05-17T08:30:00.123456999Z", "2024-05-17T08:30:00.123456Z"),
        ("2024-01-01T00:30:00+01:00", "2023-12-31T23:30:00Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ("1970-01-01T00:00:00Z", "1970-01-01T00:00:00Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
    ] {
        assert_eq!(with(Column::CreateTime, text).unwrap().create_time, time(expected), "{text}");
    }
}

#[test]
fn other_times_are_rejected() {
    for text in [
        "2024-05-17",
        "2024-05-17T08:30:00",
        "17.05.2024 08:30",
        "2023-02-29T00:00:00Z",
        "2024-05-17T24:00:00Z",
        "1715934600",
        "1969-12-31T23:59:59Z",
        "1970-01-01T00:00:00+00:01",
        "9999-12-31T23:59:59-00:01",
        "0000-01-01T00:00:00Z",
        "10000-01-01T00:00:00Z",
    ] {
        let error = the_error(with(Column::CreateTime, text));
        assert_eq!((error.code.as_str(), error.value.as_str()), ("INVALID_TIME", text));
        assert!(error.message.starts_with(&format!("create_time: \"{text}\" is ")), "{}", error.message);
    }
}

#[test]
fn a_close_time_requires_status_closed() {
    let header = "title,status,close_time";
    for (status, shown) in [("open", "open"), ("in progress", "in_progress"), ("", "open")] {
        let error = the_error(parse(header, &format!("t,{status},2024-05-17T08:30:00Z")));
        assert_eq!(error.code.as_str(), "CLOSE_TIME_WITHOUT_CLOSED", "{shown}");
        assert_eq!(error.column, "close_time");
    }
    assert!(parse(header, "t,closed,2024-05-17T08:30:00Z").is_ok());
    assert_eq!(parse(header, "t,closed,").unwrap().close_time, None);
}

#[test]
fn a_close_time_is_not_checked_against_an_invalid_status() {
    assert_eq!(
        codes(parse("title,status,close_time", "t,done,2024-05-17T08:30:00Z")),
        [("status".into(), "INVALID_STATUS")]
    );
}

#[test]
fn a_close_time_before_the_create_time_is_rejected() {
    let row = |close_time: &str| {
        parse("title,status,create_time,close_time", &format!("t,closed,2024-05-17T08:30:00Z,{close_time}"))
    };
    assert!(row("2024-05-17T10:30:00+02:00").is_ok());
    assert!(row("2024-05-17T08:30:00.0000009Z").is_ok());
    assert_eq!(codes(row("2024-05-17T08:29:59.999999Z")), [("close_time".into(), "CLOSE_TIME_BEFORE_CREATE_TIME")]);
    assert_eq!(codes(row("2024-05-17T10:29:59+02:00")), [("close_time".into(), "CLOSE_TIME_BEFORE_CREATE_TIME")]);
}

#[test]
fn both_rules_on_the_close_time_may_be_broken_at_once() {
    assert_eq!(
        codes(parse("title,create_time,close_time", "t,2024-05-17T08:30:00Z,2023-05-17T08:30:00Z")),
        [("close_time".into(), "CLOSE_TIME_WITHOUT_CLOSED"), ("close_time".into(), "CLOSE_TIME_BEFORE_CREATE_TIME")]
    );
}
