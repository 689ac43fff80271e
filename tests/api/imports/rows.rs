//! Errors of the header and of single rows.

use super::*;
use crate::harness::{assert_invalid, bad_fields};

/// Row number, line number, byte offset, column, value and code of an error.
type ErrorFields<'a> = (i64, i64, i64, &'a str, &'a str, &'a str);

/// Runs a dry run of the file and returns its only error.
async fn only_error(tracker: &Tracker, file: impl Into<Vec<u8>>) -> ImportRowError {
    let mut responses = import(file).skip_invalid().validate_only().by(&tracker.member).await.unwrap();
    assert_eq!(responses.errors.len(), 1, "{responses:?}");
    assert_eq!((responses.summary.rejected_count, responses.summary.error_count), (1, 1));
    let error = responses.errors.remove(0);
    assert!(!error.message.is_empty());
    error
}

fn fields(error: &ImportRowError) -> ErrorFields<'_> {
    (error.row_number, error.line_number, error.byte_offset, &error.column, &error.value, &error.code)
}

#[tokio::test]
async fn wrong_field_count_is_reported_with_both_counts() {
    let tracker = Tracker::start().await;

    let short = only_error(&tracker, "title,status\na,open\n\n\"two\nlines\",open\nb\nc,open\n").await;
    let long = only_error(&tracker, "title,status\na,open,now\n").await;

    assert_eq!(fields(&short), (3, 6, 38, "", "", "WRONG_FIELD_COUNT"));
    assert!(short.message.contains("has 1 fields where the header has 2"), "{}", short.message);
    assert_eq!(fields(&long), (1, 2, 13, "", "", "WRONG_FIELD_COUNT"));
    assert!(long.message.contains("has 3 fields where the header has 2"), "{}", long.message);
}

#[tokio::test]
async fn unclosed_quote_is_reported_at_the_start_of_its_row() {
    let tracker = Tracker::start().await;

    let error = only_error(&tracker, "title,description\na,b\nc,\"d\ne,f\n").await;

    assert_eq!(fields(&error), (2, 3, 22, "", "d\\ne,f\\n", "UNCLOSED_QUOTE"));
}

#[tokio::test]
async fn field_of_50_mb_is_one_invalid_row_and_other_rows_are_imported() {
    let tracker = Tracker::start().await;
    let file = [b"title,description\nbefore,\nhuge,\"".to_vec(), vec![b'x'; 50_000_000], b"\"\nafter,\n".to_vec()];

    let responses = import(file.concat()).skip_invalid().by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(2, "RECORD_TOO_LONG")]);
    assert_eq!(responses.counts(), (ImportState::Committed, 3, 2, 1, 1));
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["after", "before"]);
}

#[tokio::test]
async fn invalid_utf_8_is_reported() {
    let tracker = Tracker::start().await;

    let error = only_error(&tracker, b"title,description\nok,\nGr\xFC\xDFe,x\n".as_slice()).await;

    assert_eq!(fields(&error), (2, 3, 22, "title", "Gr\\xFC\\xDFe", "INVALID_UTF8"));
}

#[tokio::test]
async fn nul_character_is_reported() {
    let tracker = Tracker::start().await;

    let error = only_error(&tracker, "title,description\na,b\0c\n").await;

    assert_eq!(fields(&error), (1, 2, 18, "description", "b\\u{0}c", "NUL_CHARACTER"));
}

#[tokio::test]
async fn title_is_required() {
    let tracker = Tracker::start().await;

    let error = only_error(&tracker, "title,description\n  ,b\n").await;

    assert_eq!(fields(&error), (1, 2, 18, "title", "  ", "REQUIRED"));
}

#[tokio::test]
async fn overlong_values_are_rejected_and_quoted_with_at_most_80_characters() {
    let tracker = Tracker::start().await;
    let header = "title,description,external_id\n";
    let row = |title: usize, description: usize, id: usize| {
        format!("{header}{},{},{}\n", "ü".repeat(title), "é".repeat(description), "ß".repeat(id))
    };

    let title = only_error(&tracker, row(256, 65_536, 255)).await;
    let description = only_error(&tracker, row(255, 65_537, 255)).await;
    let external_id = only_error(&tracker, row(255, 65_536, 256)).await;
    let fits = import(row(255, 65_536, 255)).by(&tracker.member).await.unwrap();

    assert_eq!(fields(&title), (1, 2, 30, "title", &*("ü".repeat(79) + "…"), "TOO_LONG"));
    assert_eq!((&*description.column, &*description.code), ("description", "TOO_LONG"));
    assert_eq!((&*external_id.column, &*external_id.code), ("external_id", "TOO_LONG"));
    assert_eq!(fits.counts(), (ImportState::Committed, 1, 1, 0, 0));
}

#[tokio::test]
async fn unknown_status_and_priority_are_reported_with_the_allowed_values() {
    let tracker = Tracker::start().await;

    let status = only_error(&tracker, "title,status\na,done\n").await;
    let priority = only_error(&tracker, "title,priority\na,urgent\n").await;

    assert_eq!(fields(&status), (1, 2, 13, "status", "done", "INVALID_STATUS"));
    assert!(status.message.contains("open, in_progress, closed"), "{}", status.message);
    assert_eq!(fields(&priority), (1, 2, 15, "priority", "urgent", "INVALID_PRIORITY"));
    assert!(priority.message.contains("low, medium, high, critical"), "{}", priority.message);
}

#[tokio::test]
async fn times_without_offset_and_out_of_range_are_invalid() {
    let tracker = Tracker::start().await;
    for (time, column) in [
        ("2024-05-17 08:30", "create_time"),
        ("2024-02-30T00:00:00Z", "create_time"),
        ("0001-01-01T00:00:00Z", "close_time"),
    ] {
        let error = only_error(&tracker, format!("title,status,{column}\na,closed,{time}\n")).await;
        assert_eq!((&*error.column, &*error.value, &*error.code), (column, time, "INVALID_TIME"));
    }
}

#[tokio::test]
async fn close_time_requires_the_status_closed() {
    let tracker = Tracker::start().await;

    let error = only_error(&tracker, "title,close_time\na,2024-05-17T08:30:00Z\n").await;

    assert_eq!(fields(&error), (1, 2, 17, "close_time", "2024-05-17T08:30:00Z", "CLOSE_TIME_WITHOUT_CLOSED"));
}

#[tokio::test]
async fn close_time_must_not_precede_create_time_or_its_default() {
    let tracker = Tracker::start().await;
    let given = "title,status,create_time,close_time\na,closed,2024-05-17T08:30:00Z,2024-05-17T08:29:59Z\n";
    let absent = "title,status,close_time\na,closed,2024-05-17T08:30:00Z\n";

    let given = only_error(&tracker, given).await;
    let absent = only_error(&tracker, absent).await;

    assert_eq!(fields(&given), (1, 2, 36, "close_time", "2024-05-17T08:29:59Z", "CLOSE_TIME_BEFORE_CREATE_TIME"));
    assert_eq!(fields(&absent), (1, 2, 24, "close_time", "2024-05-17T08:30:00Z", "CLOSE_TIME_BEFORE_CREATE_TIME"));
}

#[tokio::test]
async fn row_has_at_most_100_labels() {
    let tracker = Tracker::start().await;
    let insert = "INSERT INTO labels (id, name) SELECT gen_random_uuid(), 'l' || n FROM generate_series(1, 101) n";
    tracker.sql(insert, &[]).await;
    let labels = |count: usize| (1..=count).map(|n| format!("l{n}")).collect::<Vec<_>>().join(";");

    let error = only_error(&tracker, format!("title,labels\na,{}\n", labels(101))).await;
    let fits = import(format!("title,labels\na,{}\n", labels(100))).by(&tracker.member).await.unwrap();

    assert_eq!((&*error.column, &*error.code), ("labels", "TOO_MANY_LABELS"));
    assert_eq!(fits.counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 100);
}

#[tokio::test]
async fn unknown_assignee_and_every_unknown_label_are_reported() {
    let tracker = Tracker::start().await;
    tracker.member.label("bug").await;

    let assignee = only_error(&tracker, "title,assignee\na,member\nb,mallory\n").await;
    let file = "title,labels\na,bug;nope;never\n";
    let labels = import(file).by(&tracker.member).await.unwrap();

    assert_eq!(fields(&assignee), (2, 3, 24, "assignee", "mallory", "UNKNOWN_ASSIGNEE"));
    let values: Vec<_> = labels.errors.iter().map(|error| (&*error.column, &*error.value, &*error.code)).collect();
    assert_eq!(values, [("labels", "nope", "UNKNOWN_LABEL"), ("labels", "never", "UNKNOWN_LABEL")]);
    assert_eq!(labels.counts(), (ImportState::Rejected, 1, 0, 1, 2));
}

#[tokio::test]
async fn external_id_of_an_existing_or_deleted_issue_is_taken() {
    let tracker = Tracker::start().await;
    let issue = Issue { title: "first".to_owned(), external_id: "X-1".to_owned(), ..Default::default() };
    let issue = tracker.member.file_as(issue).await;
    let request = issue_tracker::pb::DeleteIssueRequest { id: issue.id, ..Default::default() };
    tracker.member.issues().delete_issue(request).await.unwrap();

    let error = only_error(&tracker, "title,external_id\na,X-1\n").await;

    assert_eq!(fields(&error), (1, 2, 18, "external_id", "X-1", "EXTERNAL_ID_TAKEN"));
}

#[tokio::test]
async fn duplicate_external_id_is_reported_within_and_across_batches() {
    let tracker = Tracker::start().await;
    let file = |rows: usize| {
        let row = |n: usize| format!("issue {n},{}\n", if n == rows { 1 } else { n });
        (1..=rows).fold("title,external_id\n".to_owned(), |file, n| file + &row(n))
    };
    for import in [import(file(2)), import(file(6_000)), import(file(6_000)).skip_invalid()] {
        let dry_run = import.clone().validate_only().by(&tracker.member).await.unwrap();
        let real = import.by(&tracker.member).await.unwrap();
        let rows = real.summary.row_count;
        assert_eq!(dry_run.codes(), [(rows, "DUPLICATE_EXTERNAL_ID")]);
        assert_eq!(dry_run.errors, real.errors);
        let created = if real.summary.state() == ImportState::Committed { rows - 1 } else { 0 };
        assert_eq!(issue_count(&tracker).await, created);
    }
}

#[tokio::test]
async fn same_file_under_another_import_id_has_taken_external_ids() {
    let tracker = Tracker::start().await;
    let import = import("title,external_id\na,1\nb,2\n").skip_invalid();
    import.clone().by(&tracker.member).await.unwrap();

    let again = import.by(&tracker.member).await.unwrap();

    assert_eq!(again.codes(), [(1, "EXTERNAL_ID_TAKEN"), (2, "EXTERNAL_ID_TAKEN")]);
    assert_eq!(issue_count(&tracker).await, 2);
}

#[tokio::test]
async fn file_without_a_header_is_invalid() {
    let tracker = Tracker::start().await;
    for file in ["", "\r\n\n", "\u{feff}"] {
        assert_invalid(import(file).by(&tracker.member).await, &["file"]);
    }
    // Without a header, the first row is parsed as one.
    let status = assert_invalid(import("crash\ntypo\n").by(&tracker.member).await, &["header.crash", "header.title"]);
    assert!(status.message().contains("header.crash: unknown column; expected one of title, "), "{status:?}");
    assert_eq!(issue_count(&tracker).await, 0);
}

#[tokio::test]
async fn header_without_rows_commits_an_empty_import() {
    let tracker = Tracker::start().await;
    for file in ["title", "title\n", "title,status\r\n\r\n"] {
        let responses = import(file).by(&tracker.member).await.unwrap();
        assert_eq!(responses.counts(), (ImportState::Committed, 0, 0, 0, 0));
        assert_eq!(responses.summary.byte_count, file.len() as i64);
    }
}

#[tokio::test]
async fn all_violations_of_the_header_are_reported() {
    let tracker = Tracker::start().await;

    let refused = import("status,colour,STATUS\nopen,red,open\n").skip_invalid().by(&tracker.member).await;

    let status = assert_invalid(refused, &["header.colour", "header.STATUS", "header.title"]);
    for part in ["header.colour: unknown column", "\"status\" more than once", "header.title: missing"] {
        assert!(status.message().contains(part), "{status:?}");
    }
    assert_eq!(issue_count(&tracker).await, 0);
}

#[tokio::test]
async fn utf_16_and_semicolon_files_are_recognized_in_the_error() {
    let tracker = Tracker::start().await;
    let utf_16: Vec<u8> = "\u{feff}title\na\n".encode_utf16().flat_map(u16::to_le_bytes).collect();

    let utf_16 = assert_error(import(utf_16).by(&tracker.member).await, Code::InvalidArgument, "INVALID");
    let semicolons =
        assert_error(import("title;status\na;open\n").by(&tracker.member).await, Code::InvalidArgument, "INVALID");

    assert!(utf_16.message().contains("UTF-16") && utf_16.message().contains("save it as UTF-8"), "{utf_16:?}");
    assert_eq!(bad_fields(&utf_16), ["header"]);
    assert!(semicolons.message().contains("separated by commas"), "{semicolons:?}");
}
