//! The filter of `ListIssues` applied to stored issues. `src/filter/tests.rs` tests the grammar.

use issue_tracker::pb::{DeleteIssueRequest, Issue, Label, ListIssuesRequest, Priority, Status};
use proptest::{
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

use super::{all_pages, create_all, ids, list, titled};
use crate::harness::{Client, Tracker, assert_invalid};

fn filtered(filter: &str) -> ListIssuesRequest {
    ListIssuesRequest { filter: filter.to_owned(), ..Default::default() }
}

/// Asserts that the filter lists exactly the issues with these titles, newest first.
async fn assert_lists(client: &Client, filter: &str, titles: &[&str]) {
    let page = list(client, filtered(filter)).await.unwrap_or_else(|status| panic!("{filter}: {status:?}"));
    let found: Vec<&str> = page.issues.iter().map(|issue| &*issue.title).collect();
    assert_eq!(found, titles, "{filter}");
}

#[tokio::test]
async fn status_and_priority_filter_by_name() {
    let tracker = Tracker::start().await;
    let issue = |title: &str, status: Status, priority: Priority| Issue {
        status: status.into(),
        priority: priority.into(),
        ..titled(title)
    };
    create_all(
        &tracker.member,
        vec![
            issue("a", Status::Open, Priority::Unspecified),
            issue("b", Status::InProgress, Priority::Low),
            issue("c", Status::Closed, Priority::Medium),
            issue("d", Status::Open, Priority::High),
            issue("e", Status::Open, Priority::Critical),
        ],
    )
    .await;
    for (filter, titles) in [
        ("status = OPEN", &["e", "d", "a"][..]),
        ("status=in_progress", &["b"]),
        ("status = STATUS_CLOSED", &["c"]),
        ("priority = NONE", &["a"]),
        ("priority = low", &["b"]),
        ("priority = MEDIUM", &["c"]),
        ("priority = HIGH", &["d"]),
        ("priority = CRITICAL", &["e"]),
        ("status = OPEN priority = HIGH", &["d"]),
        ("status = OPEN AND status = CLOSED", &[]),
        ("status = CLOSED AND priority = HIGH", &[]),
    ] {
        assert_lists(&tracker.viewer, filter, titles).await;
    }
}

#[tokio::test]
async fn assignee_and_reporter_filter_by_case_insensitive_name_or_id() {
    let tracker = Tracker::start().await;
    let [admin, member] = [&tracker.admin, &tracker.member];
    let assigned = |title: &str, id: &str| Issue { assignee_id: id.to_owned(), ..titled(title) };
    member.file_as(assigned("a", &admin.user.id)).await;
    admin.file_as(assigned("b", &member.user.id)).await;
    admin.file_as(assigned("c", "")).await;
    let (admin_id, missing_id) = (&admin.user.id, uuid::Uuid::now_v7());
    for (filter, titles) in [
        ("assignee = admin", &["a"][..]),
        ("assignee = ADMIN", &["a"]),
        (&format!("assignee = {admin_id}"), &["a"]),
        (&format!("assignee_id = {admin_id}"), &["a"]),
        ("assignee = \"\"", &["c"]),
        ("reporter = admin", &["c", "b"]),
        (&format!("reporter = {admin_id}"), &["c", "b"]),
        ("reporter = Admin assignee = member", &["b"]),
        ("assignee = admin assignee = member", &[]),
        ("assignee = absent", &[]),
        ("reporter = \"no such name\"", &[]),
        ("assignee = adm%", &[]),
        (&format!("assignee = {missing_id}"), &[]),
        (&format!("reporter = {missing_id}"), &[]),
    ] {
        assert_lists(&tracker.viewer, filter, titles).await;
    }
}

#[tokio::test]
async fn several_label_terms_select_issues_with_all_of_them() {
    let tracker = Tracker::start().await;
    let bug = tracker.member.label("bug").await.id;
    let triage = tracker.member.label("Needs Triage").await.id;
    for (title, label_ids) in [("a", vec![]), ("b", vec![&bug]), ("c", vec![&triage]), ("d", vec![&bug, &triage])] {
        let label_ids = label_ids.into_iter().cloned().collect();
        tracker.member.file_as(Issue { label_ids, ..titled(title) }).await;
    }
    for (filter, titles) in [
        ("label = bug", &["d", "b"][..]),
        ("label = BUG", &["d", "b"]),
        ("label = \"needs triage\"", &["d", "c"]),
        (&format!("label = {bug}"), &["d", "b"]),
        ("label = bug AND label = \"needs triage\"", &["d"]),
        (&format!("label = bug label = {triage}"), &["d"]),
        ("label = bug label = bug", &["d", "b"]),
        ("label = bug label = ui", &[]),
        ("label = ui", &[]),
        ("label = bu_", &[]),
        (&format!("label = {}", uuid::Uuid::now_v7()), &[]),
        (&format!("label = bug b {}", "label = bug ".repeat(7)), &["b"]),
    ] {
        assert_lists(&tracker.viewer, filter, titles).await;
    }
}

#[tokio::test]
async fn words_match_substrings_of_title_and_description_case_insensitively() {
    let tracker = Tracker::start().await;
    for (title, description) in [
        ("Crash on START", "when the login page opens"),
        ("slow Login", "Page by page"),
        ("CAFÉ and ÄRGER", "Привет, ΜΆΘΗΜΑ"),
    ] {
        tracker.member.file_as(Issue { description: description.to_owned(), ..titled(title) }).await;
    }
    for (filter, titles) in [
        ("login", &["slow Login", "Crash on START"][..]),
        ("LOGIN page", &["slow Login", "Crash on START"]),
        ("crash login", &["Crash on START"]),
        ("crash slow", &[]),
        ("\"login page\"", &["Crash on START"]),
        ("'page login'", &[]),
        ("ogi", &["slow Login", "Crash on START"]),
        ("café", &["CAFÉ and ÄRGER"]),
        ("ärger привет μάθημα", &["CAFÉ and ÄRGER"]),
        ("cafe", &[]),
        ("and or", &[]),
        ("and", &["CAFÉ and ÄRGER"]),
        ("\"STARTwhen\"", &[]),
    ] {
        assert_lists(&tracker.viewer, filter, titles).await;
    }
}

#[tokio::test]
async fn wildcards_and_backslashes_in_words_match_literally() {
    let tracker = Tracker::start().await;
    for title in ["100% sure", "1000 sure", "snake_case", "snakeXcase", r"C:\dir", "C:dir", "2 * 3", r#"say "hi""#] {
        tracker.member.file(title).await;
    }
    for (filter, titles) in [
        ("100%", &["100% sure"][..]),
        ("%", &["100% sure"]),
        ("100%sure", &[]),
        ("_", &["snake_case"]),
        ("snake_case", &["snake_case"]),
        (r"\", &[r"C:\dir"]),
        (r"\dir", &[r"C:\dir"]),
        (r#""C:\\dir""#, &[r"C:\dir"]),
        (r"\%", &[]),
        (r"\\", &[]),
        ("\"2 * 3\"", &["2 * 3"]),
        (r#""\"hi\"""#, &[r#"say "hi""#]),
        ("s%e", &[]),
    ] {
        assert_lists(&tracker.viewer, filter, titles).await;
    }
}

#[tokio::test]
async fn invalid_filter_is_rejected_with_the_position() {
    let tracker = Tracker::start().await;
    for (filter, message) in [
        ("status = OPEN OR status = CLOSED", "at character 15: OR is not supported"),
        ("NOT crash", "at character 1: NOT is not supported"),
        ("colour = red", "at character 1: unknown field `colour`"),
        ("crash \"login", "at character 7: this \" is not closed"),
        ("status = DONE", "at character 10: unknown status `DONE`"),
        ("priority != LOW", "at character 10: `!=` is not supported"),
        ("(crash)", "at character 1: parentheses are not supported"),
        ("crash \0", "at character 7: "),
        (&"x".repeat(2_001), "at character 2001: "),
        (&"x ".repeat(33), "at character 65: the filter has more than 32 terms"),
        ("assignee_id = alice", "at character 15: assignee_id needs a UUID"),
        ("👍👍 😀 =", "at character 4: unknown field"),
        ("status =", "at character 9: expected a value"),
    ] {
        let status = assert_invalid(list(&tracker.viewer, filtered(filter)).await, &["filter"]);
        assert!(status.message().contains(message), "{message} in {}", status.message());
    }
}

/// A term of a filter.
#[derive(Clone, Debug)]
enum Term {
    Status(Status),
    Priority(Priority),
    /// An empty name selects unassigned issues.
    Assignee(&'static str),
    Reporter(&'static str),
    Label(&'static str),
    Word(&'static str),
}

const WORDS: [&str; 8] = ["Crash", "LOGIN", "100%", "a_b", r"c\d", "\"quoted\"", "über", "x"];

impl Term {
    fn text(&self) -> String {
        let quoted = |text: &str| format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""));
        match self {
            Self::Status(status) => format!("status = {}", status.as_str_name()),
            Self::Priority(priority) => format!("priority={}", priority.as_str_name()),
            Self::Assignee(name) => format!("assignee = {}", quoted(name)),
            Self::Reporter(name) => format!("reporter = {name}"),
            Self::Label(name) => format!("label = {name}"),
            Self::Word(text) => quoted(text),
        }
    }

    fn matches(&self, issue: &Issue, user_id: impl Fn(&str) -> Option<String>) -> bool {
        let contains = |text: &str, word: &str| text.to_lowercase().contains(&word.to_lowercase());
        match self {
            Self::Status(status) => issue.status() == *status,
            Self::Priority(priority) => issue.priority() == *priority,
            Self::Assignee("") => issue.assignee_id.is_empty(),
            Self::Assignee(name) => user_id(name).is_some_and(|id| id == issue.assignee_id),
            Self::Reporter(name) => user_id(name).is_some_and(|id| id == issue.reporter_id),
            Self::Label(name) => issue.labels.iter().any(|label| label.name.eq_ignore_ascii_case(name)),
            Self::Word(word) => contains(&issue.title, word) || contains(&issue.description, word),
        }
    }
}

fn term() -> impl Strategy<Value = Term> {
    prop_oneof![
        select(vec![Status::Open, Status::InProgress, Status::Closed]).prop_map(Term::Status),
        select(vec![Priority::Unspecified, Priority::Low, Priority::Critical]).prop_map(Term::Priority),
        select(vec!["", "admin", "Member", "absent"]).prop_map(Term::Assignee),
        select(vec!["ADMIN", "member", "absent"]).prop_map(Term::Reporter),
        select(vec!["bug", "UI", "none"]).prop_map(Term::Label),
        select(WORDS.to_vec()).prop_map(Term::Word),
    ]
}

/// Creates 60 issues with varied fields, deletes some, and returns them newest first.
async fn varied_issues(tracker: &Tracker) -> Vec<Issue> {
    let labels: Vec<Label> = vec![tracker.member.label("bug").await, tracker.member.label("ui").await];
    let users = [&tracker.admin, &tracker.member];
    let mut issues = Vec::new();
    for n in 0..60 {
        let issue = Issue {
            title: format!("{} {n}", WORDS[n % 8]),
            description: if n % 3 == 0 { WORDS[n / 8].to_uppercase() } else { String::new() },
            status: 1 + (n / 2 % 3) as i32,
            priority: (n / 3 % 5) as i32,
            assignee_id: users.get(n % 3).map(|client| client.user.id.clone()).unwrap_or_default(),
            label_ids: (0..2).filter(|bit| n >> bit & 1 == 1).map(|bit: usize| labels[bit].id.clone()).collect(),
            ..Issue::default()
        };
        let mut issue = users[n / 5 % 2].file_as(issue).await;
        if n % 7 == 0 {
            let delete = DeleteIssueRequest { id: issue.id, ..Default::default() };
            issue = tracker.member.issues().delete_issue(delete).await.unwrap().into_inner();
        }
        issues.push(issue);
    }
    issues.reverse();
    issues
}

#[test]
fn list_equals_a_naive_filter_over_all_issues() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let tracker = runtime.block_on(Tracker::start());
    let issues = runtime.block_on(varied_issues(&tracker));
    let user_id = |name: &str| {
        let clients = [&tracker.admin, &tracker.member, &tracker.viewer];
        let client = clients.into_iter().find(|client| client.user.username.eq_ignore_ascii_case(name))?;
        Some(client.user.id.clone())
    };
    let cases = (proptest::collection::vec(term(), 0..4), select(vec![" ", " AND "]), 1..20, any::<bool>());
    let config = Config { cases: 200, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&cases, |(terms, separator, page_size, show_deleted)| {
            let texts: Vec<String> = terms.iter().map(Term::text).collect();
            let request = ListIssuesRequest { page_size, show_deleted, ..filtered(&texts.join(separator)) };
            let listed = runtime.block_on(all_pages(&tracker.viewer, request)).concat();

            let shown = issues.iter().filter(|issue| show_deleted || issue.delete_time.is_none());
            let expected: Vec<&Issue> =
                shown.filter(|issue| terms.iter().all(|term| term.matches(issue, user_id))).collect();
            prop_assert_eq!(ids(&listed), ids(expected));
            Ok(())
        })
        .unwrap();
}
