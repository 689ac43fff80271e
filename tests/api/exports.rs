//! `ExportIssues`: the contents of the CSV file, and the limits on exports.

mod round_trip;
mod stream;

use issue_tracker::pb::{
    DeleteIssueRequest, ExportIssuesRequest, ExportIssuesResponse, ImportChunk, ImportIssuesRequest, ImportOptions,
    ImportState, Issue, ListIssuesRequest, Priority, Status as IssueStatus, import_issues_request,
    import_issues_response,
};
use tonic::{Code, Status, Streaming};

use crate::harness::{Client, Tracker, assert_error, assert_invalid};

const HEADER: &str = "external_id,title,description,priority,status,assignee,labels,create_time,close_time\n";

async fn open(client: &Client, request: ExportIssuesRequest) -> Result<Streaming<ExportIssuesResponse>, Status> {
    Ok(client.issues().export_issues(request).await?.into_inner())
}

/// Returns the whole file.
async fn export_as(client: &Client, request: ExportIssuesRequest) -> Result<String, Status> {
    let mut chunks = open(client, request).await?;
    let mut file = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        file.extend(chunk.data);
    }
    Ok(String::from_utf8(file).unwrap())
}

async fn export(client: &Client) -> String {
    export_as(client, ExportIssuesRequest::default()).await.unwrap()
}

/// Parses the file and returns the unquoted fields of each row, without the header.
fn rows(file: &str) -> Vec<Vec<String>> {
    let mut reader = csv::Reader::from_reader(file.as_bytes());
    reader.records().map(|record| record.unwrap().iter().map(str::to_owned).collect()).collect()
}

fn titles(file: &str) -> Vec<String> {
    rows(file).into_iter().map(|mut row| row.remove(1)).collect()
}

/// Imports a file in which every row is valid.
async fn import(client: &Client, file: &str) {
    let message = |message| ImportIssuesRequest { message: Some(message) };
    let mut messages = vec![message(import_issues_request::Message::Options(ImportOptions::default()))];
    let mut offset = 0;
    for data in file.as_bytes().chunks(100_000) {
        let chunk = ImportChunk { offset, data: data.to_vec().into() };
        offset += data.len() as i64;
        messages.push(message(import_issues_request::Message::Chunk(chunk)));
    }
    let responses = client.imports().import_issues(tokio_stream::iter(messages)).await.unwrap();
    let mut responses = responses.into_inner();
    let mut last = None;
    while let Some(response) = responses.message().await.unwrap() {
        if let Some(import_issues_response::Message::RowError(error)) = &response.message {
            panic!("{error:?}");
        }
        last = response.message;
    }
    let Some(import_issues_response::Message::Summary(summary)) = last else { panic!("no summary") };
    assert_eq!(summary.state(), ImportState::Committed);
}

async fn delete(client: &Client, id: &str) {
    let request = DeleteIssueRequest { id: id.to_owned(), ..Default::default() };
    client.issues().delete_issue(request).await.unwrap();
}

#[tokio::test]
async fn export_without_matching_issues_returns_only_the_header() {
    let tracker = Tracker::start().await;
    let mut chunks = open(&tracker.viewer, ExportIssuesRequest::default()).await.unwrap();
    let only = chunks.message().await.unwrap().unwrap();
    assert_eq!((only.data, only.row_count), (HEADER.into(), 0));
    assert_eq!(chunks.message().await.unwrap(), None);

    tracker.member.file("existing").await;
    let none = ExportIssuesRequest { filter: "absent".to_owned(), ..Default::default() };
    assert_eq!(export_as(&tracker.viewer, none).await.unwrap(), HEADER);
}

#[tokio::test]
async fn values_are_normalized_and_quoted_only_where_needed() {
    let tracker = Tracker::start().await;
    for name in ["ui", "Bug", "a, b", "crash"] {
        tracker.member.label(name).await;
    }
    let file = HEADER.to_owned()
        + "X-1,\"say \"\"no\"\", please\",\"two\nlines\r\n\",high,closed,viewer,ui;Bug,2024-05-17T08:30:00Z,2024-05-18T09:00:00.12+02:00\n\
           ,  plain  ,,,in_progress,,\"crash;a, b\",2024-05-17T08:30:00.000001Z,\n\
           007,'quoted',=1+1,low,open,member,,2024-05-17T08:31:00.1234567Z,\n\
           \"8;\",é,x,medium,open,,,2025-01-01T00:00:00Z,\n\
           9,a\tb,#,critical,open,,,2025-01-01T00:00:01Z,\n";
    import(&tracker.member, &file).await;

    let exported = export(&tracker.viewer).await;

    let expected = HEADER.to_owned()
        + "X-1,\"say \"\"no\"\", please\",\"two\nlines\r\n\",high,closed,viewer,Bug;ui,2024-05-17T08:30:00Z,2024-05-18T07:00:00.120000Z\n\
           ,  plain  ,,,in_progress,,\"a, b;crash\",2024-05-17T08:30:00.000001Z,\n\
           007,'quoted',=1+1,low,open,member,,2024-05-17T08:31:00.123456Z,\n\
           8;,é,x,medium,open,,,2025-01-01T00:00:00Z,\n\
           9,a\tb,#,critical,open,,,2025-01-01T00:00:01Z,\n";
    assert_eq!(exported, expected);
}

#[tokio::test]
async fn every_field_of_a_created_issue_is_exported() {
    let tracker = Tracker::start().await;
    let label = tracker.member.label("bug").await;
    let issue = Issue {
        title: "crash".to_owned(),
        description: "why".to_owned(),
        priority: Priority::High.into(),
        status: IssueStatus::Closed.into(),
        assignee_id: tracker.viewer.user.id.clone(),
        external_id: "X-1".to_owned(),
        label_ids: vec![label.id],
        ..Default::default()
    };
    let issue = tracker.member.file_as(issue).await;

    let exported = export(&tracker.viewer).await;

    let [create_time, close_time] = [issue.create_time, issue.close_time].map(|time| time.unwrap().to_string());
    let [row] = rows(&exported).try_into().unwrap();
    assert_eq!(row[..7], ["X-1", "crash", "why", "high", "closed", "viewer", "bug"]);
    // The JSON form of a timestamp has 0, 3, 6 or 9 fractional digits; the export has 0 or 6.
    for (exported, time) in [(&row[7], create_time), (&row[8], close_time)] {
        let instant = |text: &str| chrono::DateTime::parse_from_rfc3339(text).unwrap();
        assert_eq!(instant(exported), instant(&time));
    }
}

#[tokio::test]
async fn issues_are_ordered_by_create_time_then_id() {
    let tracker = Tracker::start().await;
    let batch = issue_tracker::pb::BatchCreateIssuesRequest {
        issues: (0..100).map(|n| Issue { title: format!("same time {n}"), ..Default::default() }).collect(),
        ..Default::default()
    };
    tracker.member.issues().batch_create_issues(batch).await.unwrap();
    import(&tracker.member, "title,create_time\nold,2020-01-01T00:00:00Z\nolder,2019-01-01T00:00:00.5Z\n").await;
    // Inserted with the highest ids, the earliest time, and not in id order.
    let sql = "INSERT INTO issues (id, reporter_id, status, priority, title, description, create_time)
        SELECT ('ffffffff-0000-7000-8000-00000000000' || n)::uuid, id, 1, 0, 'oldest ' || n, '', '2000-01-01'
        FROM users, unnest(ARRAY[2, 1, 3]) n WHERE username = 'member'";
    tracker.sql(sql, &[]).await;

    let exported = titles(&export(&tracker.viewer).await);

    let mut expected: Vec<String> = ["oldest 1", "oldest 2", "oldest 3", "older", "old"].map(str::to_owned).into();
    expected.extend((0..100).map(|n| format!("same time {n}")));
    assert_eq!(exported, expected);
}

#[tokio::test]
async fn filter_selects_the_same_issues_as_list_issues() {
    let tracker = Tracker::start().await;
    let (bug, ui) = (tracker.member.label("bug").await, tracker.member.label("ui").await);
    let statuses = [IssueStatus::Open, IssueStatus::InProgress, IssueStatus::Closed];
    for n in 0..30 {
        let labels = [(n % 2, &bug.id), (n % 3, &ui.id)];
        let issue = Issue {
            title: format!("issue {n}"),
            status: statuses[n % 3].into(),
            priority: (n % 5) as i32,
            assignee_id: if n % 4 == 0 { tracker.viewer.user.id.clone() } else { String::new() },
            label_ids: labels.into_iter().filter(|(rest, _)| *rest == 0).map(|(_, id)| id.clone()).collect(),
            ..Default::default()
        };
        tracker.member.file_as(issue).await;
    }
    for filter in [
        "status = OPEN",
        "priority = NONE status = CLOSED",
        "assignee = viewer",
        "assignee = \"\" AND label = bug",
        "label = bug label = ui",
        "reporter = member issue 7",
        "reporter = viewer",
    ] {
        let request = ListIssuesRequest { filter: filter.to_owned(), page_size: 1_000, ..Default::default() };
        let listed = tracker.viewer.issues().list_issues(request).await.unwrap().into_inner().issues;
        let request = ExportIssuesRequest { filter: filter.to_owned(), ..Default::default() };
        let exported = export_as(&tracker.viewer, request).await.unwrap();

        let expected: Vec<_> = listed.iter().rev().map(|issue| (&*issue.title, label_names(issue))).collect();
        let exported = rows(&exported);
        let exported: Vec<_> = exported.iter().map(|row| (&*row[1], row[6].clone())).collect();
        assert_eq!(exported, expected, "{filter}");
    }
}

fn label_names(issue: &Issue) -> String {
    issue.labels.iter().map(|label| &*label.name).collect::<Vec<_>>().join(";")
}

#[tokio::test]
async fn deleted_issues_are_exported_only_with_show_deleted() {
    let tracker = Tracker::start().await;
    let deleted = tracker.member.file("deleted").await;
    tracker.member.file("kept").await;
    delete(&tracker.member, &deleted.id).await;

    for (show_deleted, expected) in [(false, vec!["kept"]), (true, vec!["deleted", "kept"])] {
        let request = ExportIssuesRequest { show_deleted, ..Default::default() };
        assert_eq!(titles(&export_as(&tracker.viewer, request).await.unwrap()), expected);
    }
}

#[tokio::test]
async fn formulas_are_escaped_only_with_escape_formulas() {
    let tracker = Tracker::start().await;
    let label = tracker.member.label("=label").await;
    let formulas = ["=1", "+1", "-1", "@1", "\t1", "\r1", "=\"a\",b"];
    let texts = ["1=", " =1", "'=1", "\n=1", "1"];
    for title in formulas.iter().chain(&texts) {
        tracker.member.file(title).await;
    }
    let everywhere = Issue {
        title: "everywhere".to_owned(),
        external_id: "-7".to_owned(),
        description: "@x".to_owned(),
        label_ids: vec![label.id],
        ..Default::default()
    };
    tracker.member.file_as(everywhere).await;

    let plain = export(&tracker.viewer).await;
    let request = ExportIssuesRequest { escape_formulas: true, ..Default::default() };
    let escaped = export_as(&tracker.viewer, request).await.unwrap();

    let expected = |formula: fn(&str) -> String| -> Vec<String> {
        let formulas = formulas.iter().map(|title| formula(title));
        formulas.chain(texts.iter().map(|text| text.to_string())).chain(["everywhere".to_owned()]).collect()
    };
    assert_eq!(titles(&plain), expected(str::to_owned));
    assert_eq!(titles(&escaped), expected(|title| format!("'{title}")));
    let last = |file: &str| rows(file).pop().unwrap();
    assert_eq!([&last(&plain)[0], &last(&plain)[2], &last(&plain)[6]], ["-7", "@x", "=label"]);
    assert_eq!([&last(&escaped)[0], &last(&escaped)[2], &last(&escaped)[6]], ["'-7", "'@x", "'=label"]);
    assert!(escaped.contains(",\"'=\"\"a\"\",b\","), "{escaped}");
}

#[tokio::test]
async fn invalid_filter_fails_with_the_message_of_list_issues() {
    let tracker = Tracker::start().await;
    for filter in ["(", "status = OPNE", "priority > LOW", &"x".repeat(2_001)] {
        let request = ListIssuesRequest { filter: filter.to_owned(), ..Default::default() };
        let listed = assert_invalid(tracker.viewer.issues().list_issues(request).await, &["filter"]);
        let request = ExportIssuesRequest { filter: filter.to_owned(), ..Default::default() };
        let exported = assert_invalid(open(&tracker.viewer, request).await, &["filter"]);
        assert_eq!(exported.message(), listed.message());
    }
}

#[tokio::test]
async fn viewers_can_export_and_unauthenticated_callers_cannot() {
    let tracker = Tracker::start().await;
    tracker.member.file("existing").await;
    assert_eq!(titles(&export(&tracker.viewer).await), ["existing"]);

    let refused = open(&tracker.client_with_token(None), ExportIssuesRequest::default()).await;
    assert_error(refused, Code::Unauthenticated, "UNAUTHENTICATED");
}
