//! Options for files in other formats: column names, separators, defaults, unknown columns and new labels.

use std::collections::HashMap;

use super::*;
use crate::harness::{assert_invalid, limits};

/// Returns `column_names` from pairs of a name in the file and a column.
fn names(names: &[(&str, &str)]) -> HashMap<String, String> {
    names.iter().map(|(name, column)| (name.to_string(), column.to_string())).collect()
}

/// Sends invalid options alone and returns the error, which must come before any chunk is read.
async fn options_error(tracker: &Tracker, change: impl FnOnce(&mut ImportOptions)) -> Status {
    let opts = import("title\na\n").with(change).options;
    let status = send(&tracker.member, vec![options(opts)]).await.unwrap_err();
    assert_eq!(issue_count(tracker).await, 0);
    assert_eq!(tracker.count("SELECT count(*) FROM imports").await, 0);
    status
}

#[tokio::test]
async fn column_names_match_case_insensitively_and_trimmed() {
    let tracker = Tracker::start().await;
    let file = "SUMMARY , Priority,Status,Ignored\ncrash,closed,high,x\n";
    let mapped = names(&[(" summary", "title"), ("PRIORITY", "status"), ("status", "Priority"), ("ignored", "")]);

    let responses = import(file).with(|options| options.column_names = mapped).by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 1, 1, 0, 0));
    let issue = issues(&tracker).await.remove("crash").unwrap();
    assert_eq!((issue.status(), issue.priority()), (IssueStatus::Closed, Priority::High));
}

#[tokio::test]
async fn column_mapped_to_an_empty_name_is_ignored() {
    let tracker = Tracker::start().await;
    let mapped = names(&[("labels", "")]);

    let import = import("title,labels\na,no such label\n").with(|options| options.column_names = mapped);

    assert_eq!(import.by(&tracker.member).await.unwrap().counts(), (ImportState::Committed, 1, 1, 0, 0));
}

#[tokio::test]
async fn row_errors_name_the_mapped_column() {
    let tracker = Tracker::start().await;
    let mapped = names(&[("state", "status")]);

    let import = import("title,state\na,opne\n").with(|options| options.column_names = mapped);

    assert_eq!(import.by(&tracker.member).await.unwrap().errors[0].column, "status");
}

#[tokio::test]
async fn mapped_name_missing_from_the_header_is_invalid() {
    let tracker = Tracker::start().await;
    let mapped = names(&[("Summary", "title"), ("Estimate", "")]);

    let refused = import("title\na\n").with(|options| options.column_names = mapped).by(&tracker.member).await;

    let status = assert_invalid(refused, &["header.estimate", "header.summary"]);
    assert!(status.message().contains("header.summary: missing"), "{status:?}");
    assert_eq!(issue_count(&tracker).await, 0);
}

#[tokio::test]
async fn two_header_names_for_one_column_are_invalid() {
    let tracker = Tracker::start().await;
    let mapped = names(&[("Summary", "title")]);

    let refused =
        import("title,Summary\na,b\n").with(|options| options.column_names = mapped).by(&tracker.member).await;

    let status = assert_invalid(refused, &["header.Summary"]);
    assert!(status.message().contains("more than once"), "{status:?}");
}

#[tokio::test]
async fn invalid_column_names_are_rejected() {
    let tracker = Tracker::start().await;
    let hundred_and_one: Vec<String> = (0..101).map(|n| format!("c{n}")).collect();
    let too_many = hundred_and_one.iter().map(|name| (&**name, "")).collect::<Vec<_>>();
    let long = "ü".repeat(256);
    for mapped in [
        names(&[("Summary", "heading")]),
        names(&[("Summary", "id")]),
        names(&[("", "title")]),
        names(&[("Summary", "title"), (" summary", "status")]),
        names(&[("Summary", "title"), ("Heading", "title")]),
        names(&[(&*long, "title")]),
        names(&too_many),
    ] {
        let status = options_error(&tracker, |options| options.column_names = mapped.clone()).await;
        assert_invalid(Err::<(), _>(status), &["options.column_names"]);
    }
    let longest = "ü".repeat(255);
    let mapped = names(&[(&*longest, "title")]);
    let fits = import(format!("{longest}\na\n")).with(|options| options.column_names = mapped);
    assert_eq!(fits.by(&tracker.member).await.unwrap().counts().2, 1);
}

#[tokio::test]
async fn allowed_separators_are_accepted() {
    let tracker = Tracker::start().await;
    tracker.member.label("bug").await;
    tracker.member.label("ui").await;
    for (separator, label_separator) in
        [(";", ""), ("\t", ""), ("|", "/"), (" ", ";"), ("-", "+"), ("\u{1f}", "\u{1e}"), (":", "'"), ("", " ")]
    {
        let [fields, labels] = [(separator, ","), (label_separator, if separator == ";" { "," } else { ";" })]
            .map(|(given, default)| if given.is_empty() { default } else { given });
        let file = format!("title{fields}labels{fields}priority\n\"a{fields}b\"{fields}bug{labels}ui{fields}high\n");
        let import = import(file).with(|options| {
            options.separator = separator.into();
            options.label_separator = label_separator.into();
        });

        let responses = import.by(&tracker.member).await.unwrap();

        assert_eq!(responses.counts(), (ImportState::Committed, 1, 1, 0, 0), "{separator:?}: {responses:?}");
        let (title, issue) = issues(&tracker).await.pop_first().unwrap();
        assert_eq!((title, issue.labels.len()), (format!("a{fields}b"), 2), "{separator:?}");
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn letters_quotes_line_ends_and_equal_separators_are_invalid() {
    let tracker = Tracker::start().await;
    for bad in ["\"", "a", "7", "\n", "\r", ",,", "é", "；", "\r\n"] {
        let status = options_error(&tracker, |options| options.separator = bad.into()).await;
        assert_invalid(Err::<(), _>(status), &["options.separator"]);
        let status = options_error(&tracker, |options| options.label_separator = bad.into()).await;
        assert_invalid(Err::<(), _>(status), &["options.label_separator"]);
    }
    for (separator, label_separator) in [("|", "|"), ("", ","), (";", ";")] {
        let status = options_error(&tracker, |options| {
            options.separator = separator.into();
            options.label_separator = label_separator.into();
        });
        assert_invalid(Err::<(), _>(status.await), &["options.label_separator"]);
    }
}

#[tokio::test]
async fn defaults_apply_to_empty_fields_of_new_issues() {
    let tracker = Tracker::start().await;
    let existing = Issue { title: "old".into(), external_id: "X-1".into(), ..Issue::default() };
    tracker.member.file_as(existing).await;
    let file = "title,external_id,status,priority,assignee\n\
        old,X-1,,,\n\
        given,X-2,open,low,MEMBER\n\
        none,X-3,,,\n";
    let import = import(file).update().with(|options| {
        options.default_status = IssueStatus::InProgress.into();
        options.default_priority = Priority::Critical.into();
        options.default_assignee = " Viewer ".into();
    });

    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.outcome(), (2, 0, 1, 0), "{responses:?}");
    let issues = issues(&tracker).await;
    let shown = |title: &str| (issues[title].status(), issues[title].priority(), &*issues[title].assignee_id);
    assert_eq!(shown("old"), (IssueStatus::Open, Priority::Unspecified, ""));
    assert_eq!(shown("given"), (IssueStatus::Open, Priority::Low, &*tracker.member.user.id));
    assert_eq!(shown("none"), (IssueStatus::InProgress, Priority::Critical, &*tracker.viewer.user.id));
}

#[tokio::test]
async fn defaults_apply_to_missing_columns() {
    let tracker = Tracker::start().await;
    let import = import("title,create_time,close_time\na,2020-01-01T00:00:00Z,2020-01-02T00:00:00Z\n");

    let import = import.with(|options| options.default_status = IssueStatus::Closed.into());
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 1, 1, 0, 0), "{responses:?}");
    let issue = issues(&tracker).await.remove("a").unwrap();
    assert_eq!(issue.close_time.unwrap().to_string(), "2020-01-02T00:00:00Z");
}

#[tokio::test]
async fn invalid_defaults_are_rejected_before_the_file_is_read() {
    let tracker = Tracker::start().await;

    let status = options_error(&tracker, |options| options.default_assignee = "mallory".into()).await;
    assert_invalid(Err::<(), _>(status.clone()), &["options.default_assignee"]);
    assert!(status.message().contains("\"mallory\" is not a user"), "{status:?}");

    let status = options_error(&tracker, |options| {
        options.on_existing = 9;
        options.default_status = 9;
        options.default_priority = 9;
        options.default_assignee = "x".repeat(51);
    });
    let fields =
        ["options.on_existing", "options.default_status", "options.default_priority", "options.default_assignee"];
    assert_invalid(Err::<(), _>(status.await), &fields);
}

#[tokio::test]
async fn unknown_columns_are_ignored_only_with_ignore_unknown_columns() {
    let tracker = Tracker::start().await;
    let file = "colour,title,,colour,\nred,a,b,c,d\n";

    assert_invalid(import(file).by(&tracker.member).await, &["header.colour", "header", "header.colour", "header"]);
    let import = import(file).with(|options| options.ignore_unknown_columns = true);

    assert_eq!(import.by(&tracker.member).await.unwrap().counts(), (ImportState::Committed, 1, 1, 0, 0));
    assert_eq!(issues(&tracker).await.into_keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test]
async fn create_labels_creates_each_missing_label_once() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("Bug").await;
    let file = "title,labels\na,bug;New\nb,NEW;other\nc,new\n";

    let import = import(file).with(|options| options.create_labels = true);
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 3, 3, 0, 0), "{responses:?}");
    let issues = issues(&tracker).await;
    let labels_of = |title: &str| issues[title].labels.iter().map(|label| &*label.name).collect::<Vec<_>>();
    assert_eq!(
        (labels_of("a"), labels_of("b"), labels_of("c")),
        (vec!["Bug", "New"], vec!["New", "other"], vec!["New"])
    );
    assert_eq!(issues["a"].labels[0], bug);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 3);
}

#[tokio::test]
async fn import_accepts_more_labels_than_its_cache_holds() {
    let tracker = Tracker::start_with(limits(&["--labels", "20000"])).await;
    tracker.member.label("0").await;
    let labels = |row: usize| (row * 100..row * 100 + 100).map(|n| n.to_string()).collect::<Vec<_>>().join(";");
    let rows: String = (0..101).map(|row| format!("{row},{}\n", labels(row))).collect();

    let import = import(format!("title,labels\n{rows}")).with(|options| options.create_labels = true);
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.counts(), (ImportState::Committed, 101, 101, 0, 0));
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 10_100);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 10_100);
}

#[tokio::test]
async fn only_imported_rows_create_labels() {
    let tracker = Tracker::start().await;
    let existing = Issue { title: "old".into(), external_id: "X-1".into(), ..Issue::default() };
    tracker.member.file_as(existing).await;
    let file = "title,external_id,assignee,labels\n\
        a,,absent,from a bad row\n\
        b,X-1,,from a skipped row\n\
        c,,,from a good row\n";

    let import = import(file).skip_invalid().skip_existing().with(|options| options.create_labels = true);
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.outcome(), (1, 0, 1, 1));
    let labels = tracker.sql("SELECT name FROM labels", &[]).await;
    assert_eq!(labels.iter().map(|row| row.get::<_, &str>(0)).collect::<Vec<_>>(), ["from a good row"]);
}

#[tokio::test]
async fn invalid_label_name_is_a_row_error() {
    let tracker = Tracker::start().await;
    let long = "ü".repeat(51);
    let file = format!("title|labels\na|{long}\nb|x;y\nc|{}\n", "ü".repeat(50));

    let import = import(file).skip_invalid().with(|options| {
        options.separator = "|".into();
        options.label_separator = ",".into();
        options.create_labels = true;
    });
    let responses = import.by(&tracker.member).await.unwrap();

    assert_eq!(responses.codes(), [(1, "TOO_LONG"), (2, "UNKNOWN_LABEL")]);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 1);
}

#[tokio::test]
async fn dry_run_creates_no_label_and_accepts_missing_ones() {
    let tracker = Tracker::start().await;
    let import = import("title,labels\na,new\nb,new;other\n").with(|options| options.create_labels = true);
    for import in [import.clone(), import.skip_invalid()] {
        let dry_run = import.validate_only().by(&tracker.member).await.unwrap();
        assert_eq!(dry_run.counts(), (ImportState::Validated, 2, 2, 0, 0));
        assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
    }
}

#[tokio::test]
async fn rejected_import_creates_no_label() {
    let tracker = Tracker::start().await;

    let import = import("title,labels\na,new\n,new\n").with(|options| options.create_labels = true);

    assert_eq!(import.by(&tracker.member).await.unwrap().summary.state(), ImportState::Rejected);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
}

#[tokio::test]
async fn concurrent_imports_that_create_the_same_label_both_commit() {
    let tracker = Tracker::start_with(limits(&["--statement-ms", "600000"])).await;
    let with_labels = |import: Import| import.with(|options| options.create_labels = true);
    // The first batch creates the labels, the second one is blocked.
    let other = hold_external_id(&tracker).await;
    let rows = "x,,\n".repeat(4_999);
    let first = with_labels(import(format!("title,labels,external_id\na,new;b,\n{rows}z,,X-1\n")));
    let first = first.spawn_by(&tracker.member);
    tracker.wait_until(crate::lock_waiters!("= 1")).await;
    let second = with_labels(import("title,labels\nc,B;NEW;own\n")).spawn_by(&tracker.member);
    tracker.wait_until(crate::lock_waiters!("= 2")).await;

    other.batch_execute("ROLLBACK").await.unwrap();
    let first = first.await.unwrap().unwrap();
    let second = second.await.unwrap().unwrap();

    assert_eq!((first.outcome(), second.outcome()), ((5_001, 0, 0, 0), (1, 0, 0, 0)));
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 3);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_labels").await, 5);
}

#[tokio::test]
async fn issues_with_equal_create_time_keep_the_order_of_the_file() {
    let tracker = Tracker::start().await;
    let times = ["2020-01-01T00:00:00.000001Z", "2020-01-01T00:00:00.000002Z"];
    for create_times in [vec![times[0]; 300], times.iter().flat_map(|time| vec![*time; 150]).collect(), vec![""; 300]] {
        let rows = create_times.iter().enumerate().map(|(n, time)| format!("issue {n:04},{time}\n"));
        let file = rows.fold("title,create_time\n".to_owned(), |file, row| file + &row);
        import(file).by(&tracker.member).await.unwrap();

        let by_id = tracker.sql("SELECT title FROM issues ORDER BY create_time, id", &[]).await;
        assert!(by_id.iter().map(|row| row.get::<_, &str>(0)).is_sorted());
        delete_all_issues_and_imports(&tracker).await;
    }
}

#[tokio::test]
async fn issues_without_create_time_keep_the_order_of_the_file_across_batches() {
    let tracker = Tracker::start().await;
    for import in [import(titles(12_000)), import(titles(12_000)).skip_invalid()] {
        import.by(&tracker.member).await.unwrap();
        let sorted = "SELECT bool_and(title = 'issue ' || n)
            FROM (SELECT title, row_number() OVER (ORDER BY id) AS n FROM issues) i";
        assert!(tracker.sql(sorted, &[]).await[0].get::<_, bool>(0));
        delete_all_issues_and_imports(&tracker).await;
    }
}
