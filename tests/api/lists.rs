//! `ListIssues`: pages, filters, and what is written while somebody walks.

mod filters;

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use issue_tracker::pb::{
    BatchCreateIssuesRequest, CreateIssueRequest, DeleteIssueRequest, Issue, ListCommentsRequest, ListIssuesRequest,
    ListIssuesResponse, ListLabelsRequest, ListUsersRequest, Status, UpdateIssueRequest,
};
use prost::Message;

use crate::harness::{Client, Tracker, assert_invalid};

fn titled(title: impl Into<String>) -> Issue {
    Issue { title: title.into(), ..Issue::default() }
}

/// Files issues in one batch; at most 1,000.
async fn file_all(client: &Client, issues: Vec<Issue>) -> Vec<Issue> {
    let request = BatchCreateIssuesRequest { issues, ..Default::default() };
    client.issues().batch_create_issues(request).await.unwrap().into_inner().issues
}

async fn list(client: &Client, request: ListIssuesRequest) -> Result<ListIssuesResponse, tonic::Status> {
    Ok(client.issues().list_issues(request).await?.into_inner())
}

/// All pages, one after another.
async fn walk(client: &Client, request: ListIssuesRequest) -> Vec<Vec<Issue>> {
    let mut pages = Vec::new();
    let mut page_token = String::new();
    loop {
        let page = list(client, ListIssuesRequest { page_token, ..request.clone() }).await.unwrap();
        pages.push(page.issues);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return pages;
        }
    }
}

fn ids<'a>(issues: impl IntoIterator<Item = &'a Issue>) -> Vec<&'a str> {
    issues.into_iter().map(|issue| &*issue.id).collect()
}

#[tokio::test]
async fn a_list_is_newest_first_fifty_a_page() {
    let tracker = Tracker::start().await;
    let mut filed = file_all(&tracker.member, (0..101).map(|n| titled(format!("issue {n}"))).collect()).await;
    filed.reverse();

    let pages = walk(&tracker.viewer, ListIssuesRequest::default()).await;

    let lengths: Vec<usize> = pages.iter().map(Vec::len).collect();
    assert_eq!(lengths, [50, 50, 1]);
    assert_eq!(pages.concat(), filed);
}

#[tokio::test]
async fn a_page_that_holds_the_last_issue_has_no_token() {
    let tracker = Tracker::start().await;
    assert_eq!(list(&tracker.viewer, ListIssuesRequest::default()).await.unwrap(), ListIssuesResponse::default());
    file_all(&tracker.member, (0..4).map(|n| titled(format!("issue {n}"))).collect()).await;
    for page_size in [4, 5] {
        let page = list(&tracker.viewer, ListIssuesRequest { page_size, ..Default::default() }).await.unwrap();
        assert_eq!((page.issues.len(), &*page.next_page_token), (4, ""));
    }
}

#[tokio::test]
async fn a_page_size_over_a_thousand_is_taken_as_a_thousand_and_a_negative_one_refused() {
    let tracker = Tracker::start().await;
    file_all(&tracker.member, (0..1_000).map(|_| titled("many")).collect()).await;
    let last = tracker.member.file("one more").await;
    for page_size in [1_000, 1_001, i32::MAX] {
        let page = list(&tracker.viewer, ListIssuesRequest { page_size, ..Default::default() }).await.unwrap();
        assert_eq!((page.issues.len(), &*page.issues[0].id), (1_000, &*last.id));
        assert!(!page.next_page_token.is_empty());
    }
    for page_size in [-1, i32::MIN] {
        assert_invalid(
            list(&tracker.viewer, ListIssuesRequest { page_size, ..Default::default() }).await,
            &["page_size"],
        );
    }
}

#[tokio::test]
async fn the_page_size_may_change_on_the_way() {
    let tracker = Tracker::start().await;
    let filed = file_all(&tracker.member, (0..9).map(|n| titled(format!("issue {n}"))).collect()).await;
    let first = list(&tracker.viewer, ListIssuesRequest { page_size: 2, ..Default::default() }).await.unwrap();
    let rest = ListIssuesRequest { page_size: 100, page_token: first.next_page_token, ..Default::default() };
    let rest = list(&tracker.viewer, rest).await.unwrap();
    assert_eq!(ids(first.issues.iter().chain(&rest.issues)), ids(filed.iter().rev()));
}

#[tokio::test]
async fn a_page_token_that_was_not_given_is_invalid() {
    let tracker = Tracker::start().await;
    file_all(&tracker.member, vec![titled("a"), titled("b")]).await;
    let first = list(&tracker.viewer, ListIssuesRequest { page_size: 1, ..Default::default() }).await.unwrap();
    let token = first.next_page_token;
    let mut tokens: Vec<String> = (1..token.len()).map(|length| token[..length].to_owned()).collect();
    tokens.extend([
        format!("{token}A"),
        format!("{token}="),
        format!(" {token}"),
        token.to_lowercase(),
        "2".to_owned(),
        "' OR 1=1 --".to_owned(),
        "é\0".to_owned(),
        "A".repeat(1_000_000),
    ]);
    for page_token in tokens {
        let answer = list(&tracker.viewer, ListIssuesRequest { page_token, ..Default::default() }).await;
        assert_invalid(answer, &["page_token"]);
    }
}

#[tokio::test]
async fn a_page_token_of_another_list_is_invalid() {
    let tracker = Tracker::start().await;
    let filed = file_all(&tracker.member, vec![titled("crash"), titled("crash")]).await;
    for name in ["bug", "ui"] {
        tracker.member.label(name).await;
        tracker.member.comment(&filed[0].id, "seen").await;
    }
    let request = ListIssuesRequest { page_size: 1, filter: "crash".to_owned(), ..Default::default() };
    let token = list(&tracker.viewer, request.clone()).await.unwrap().next_page_token;
    for (filter, show_deleted) in [("", false), ("crash ", false), ("status = OPEN", false), ("crash", true)] {
        let request = ListIssuesRequest {
            filter: filter.to_owned(),
            show_deleted,
            page_token: token.clone(),
            ..Default::default()
        };
        assert_invalid(list(&tracker.viewer, request).await, &["page_token"]);
    }

    let labels = ListLabelsRequest { page_size: 1, ..Default::default() };
    let labels = tracker.viewer.labels().list_labels(labels).await.unwrap().into_inner();
    let users = ListUsersRequest { page_size: 1, ..Default::default() };
    let users = tracker.viewer.users().list_users(users).await.unwrap().into_inner();
    let comments = ListCommentsRequest { issue_id: filed[0].id.clone(), page_size: 1, ..Default::default() };
    let comments = tracker.viewer.comments().list_comments(comments).await.unwrap().into_inner();
    for page_token in [labels.next_page_token, users.next_page_token, comments.next_page_token] {
        assert!(!page_token.is_empty());
        let request = ListIssuesRequest { page_token, ..Default::default() };
        assert_invalid(list(&tracker.viewer, request).await, &["page_token"]);
    }
    let all_wrong = ListIssuesRequest { page_size: -1, page_token: token, filter: "(".to_owned(), show_deleted: true };
    assert_invalid(list(&tracker.viewer, all_wrong).await, &["page_size", "page_token", "filter"]);
}

/// Files, closes and deletes issues until it is stopped; leaves those of `steady` open.
async fn churn(client: Client, mut passing: Vec<Issue>, stop: Arc<AtomicBool>) -> usize {
    let mut writes = 0;
    while !stop.load(Ordering::Relaxed) {
        passing.push(client.file("passing").await);
        let id = passing.remove(writes % passing.len()).id;
        if writes % 2 == 0 {
            let request = DeleteIssueRequest { id, ..Default::default() };
            client.issues().delete_issue(request).await.unwrap();
        } else {
            let issue = Some(Issue { id, status: Status::Closed.into(), ..Issue::default() });
            client.issues().update_issue(UpdateIssueRequest { issue, ..Default::default() }).await.unwrap();
        }
        writes += 1;
    }
    writes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_walk_repeats_nothing_and_leaves_nothing_out_whatever_is_written_meanwhile() {
    let tracker = Tracker::start().await;
    let filed = file_all(&tracker.member, (0..300).map(|n| titled(format!("issue {n}"))).collect()).await;
    // Every third passes away, the others are there throughout.
    let (passing, steady): (Vec<_>, Vec<_>) = filed.into_iter().enumerate().partition(|(n, _)| n % 3 == 0);
    let passing = passing.into_iter().map(|(_, issue)| issue).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let churn = tokio::spawn(churn(tracker.member.clone(), passing, Arc::clone(&stop)));

    for filter in ["", "status = OPEN"] {
        let request = ListIssuesRequest { page_size: 7, filter: filter.to_owned(), ..Default::default() };
        let walked = walk(&tracker.viewer, request).await.concat();

        let seen: HashSet<&str> = ids(&walked).into_iter().collect();
        assert_eq!(seen.len(), walked.len(), "an issue was repeated");
        let missed: Vec<_> = steady.iter().filter(|(_, issue)| !seen.contains(&*issue.id)).collect();
        assert!(missed.is_empty(), "{missed:?}");
        assert!(walked.is_sorted_by(|newer, older| newer.id > older.id));
    }
    stop.store(true, Ordering::Relaxed);
    assert!(churn.await.unwrap() > 0, "nothing was written meanwhile");
}

#[tokio::test]
async fn deleted_issues_are_listed_only_when_asked_for() {
    let tracker = Tracker::start().await;
    let filed = file_all(&tracker.member, vec![titled("a"), titled("b"), titled("c")]).await;
    let delete = DeleteIssueRequest { id: filed[1].id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();
    for filter in ["", "status = OPEN", "reporter = member"] {
        let request = ListIssuesRequest { page_size: 1, filter: filter.to_owned(), ..Default::default() };
        let shown = walk(&tracker.viewer, request.clone()).await.concat();
        assert_eq!(ids(&shown), [&*filed[2].id, &*filed[0].id], "{filter}");
        let all = walk(&tracker.viewer, ListIssuesRequest { show_deleted: true, ..request }).await.concat();
        assert_eq!(ids(&all), [&*filed[2].id, &*filed[1].id, &*filed[0].id], "{filter}");
    }
}

#[tokio::test]
async fn a_page_of_large_issues_is_shorter_than_asked_for_and_the_walk_is_complete() {
    let tracker = Tracker::start().await;
    let mut filed = Vec::new();
    for _ in 0..4 {
        // The longest description there is: 256 KiB.
        let large = || Issue { description: "😀".repeat(65_536), ..titled("large") };
        filed.extend(file_all(&tracker.member, (0..8).map(|_| large()).collect()).await);
        filed.push(tracker.member.file("small").await);
    }

    let request = ListIssuesRequest { page_size: 1_000, ..Default::default() };
    let mut page_token = String::new();
    let mut walked = Vec::new();
    loop {
        let page = list(&tracker.viewer, ListIssuesRequest { page_token, ..request.clone() }).await.unwrap();
        assert!(page.encoded_len() < 3 * 1024 * 1024 + 4096, "{} bytes", page.encoded_len());
        assert!(!page.issues.is_empty());
        walked.extend(page.issues);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(ids(&walked), ids(filed.iter().rev()));
}

#[tokio::test]
async fn who_lists_sees_what_he_has_written_however_many_list_the_same_at_once() {
    let tracker = Tracker::start().await;
    let workers = (0..24).map(|worker| {
        let client = tracker.member.clone();
        tokio::spawn(async move {
            for round in 0..10 {
                let issue = Some(titled(format!("issue {round} of {worker}")));
                let request = CreateIssueRequest { issue, ..Default::default() };
                let filed = client.issues().create_issue(request).await.unwrap().into_inner();
                let request = ListIssuesRequest { page_size: 1_000, ..Default::default() };
                let listed = list(&client, request).await.unwrap().issues;
                assert!(listed.iter().any(|issue| issue.id == filed.id), "issue {round} of {worker} is not listed");
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
}
