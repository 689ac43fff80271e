//! `ListIssues`: pages, page tokens, and concurrent writes.

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

/// Creates up to 1,000 issues in one batch.
async fn create_all(client: &Client, issues: Vec<Issue>) -> Vec<Issue> {
    let request = BatchCreateIssuesRequest { issues, ..Default::default() };
    client.issues().batch_create_issues(request).await.unwrap().into_inner().issues
}

async fn list(client: &Client, request: ListIssuesRequest) -> Result<ListIssuesResponse, tonic::Status> {
    Ok(client.issues().list_issues(request).await?.into_inner())
}

/// Returns all pages in order.
async fn all_pages(client: &Client, request: ListIssuesRequest) -> Vec<Vec<Issue>> {
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
async fn list_is_newest_first_with_50_issues_per_page() {
    let tracker = Tracker::start().await;
    let mut created = create_all(&tracker.member, (0..101).map(|n| titled(format!("issue {n}"))).collect()).await;
    created.reverse();

    let pages = all_pages(&tracker.viewer, ListIssuesRequest::default()).await;

    let lengths: Vec<usize> = pages.iter().map(Vec::len).collect();
    assert_eq!(lengths, [50, 50, 1]);
    assert_eq!(pages.concat(), created);
}

#[tokio::test]
async fn last_page_has_no_token() {
    let tracker = Tracker::start().await;
    assert_eq!(list(&tracker.viewer, ListIssuesRequest::default()).await.unwrap(), ListIssuesResponse::default());
    create_all(&tracker.member, (0..4).map(|n| titled(format!("issue {n}"))).collect()).await;
    for page_size in [4, 5] {
        let page = list(&tracker.viewer, ListIssuesRequest { page_size, ..Default::default() }).await.unwrap();
        assert_eq!((page.issues.len(), &*page.next_page_token), (4, ""));
    }
}

#[tokio::test]
async fn page_size_is_capped_at_1000_and_invalid_when_negative() {
    let tracker = Tracker::start().await;
    create_all(&tracker.member, (0..1_000).map(|_| titled("many")).collect()).await;
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
async fn page_size_may_change_between_pages() {
    let tracker = Tracker::start().await;
    let created = create_all(&tracker.member, (0..9).map(|n| titled(format!("issue {n}"))).collect()).await;
    let first = list(&tracker.viewer, ListIssuesRequest { page_size: 2, ..Default::default() }).await.unwrap();
    let rest = ListIssuesRequest { page_size: 100, page_token: first.next_page_token, ..Default::default() };
    let rest = list(&tracker.viewer, rest).await.unwrap();
    assert_eq!(ids(first.issues.iter().chain(&rest.issues)), ids(created.iter().rev()));
}

#[tokio::test]
async fn altered_or_invented_page_token_is_invalid() {
    let tracker = Tracker::start().await;
    create_all(&tracker.member, vec![titled("a"), titled("b")]).await;
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
        let response = list(&tracker.viewer, ListIssuesRequest { page_token, ..Default::default() }).await;
        assert_invalid(response, &["page_token"]);
    }
}

#[tokio::test]
async fn page_token_of_another_list_or_filter_is_invalid() {
    let tracker = Tracker::start().await;
    let created = create_all(&tracker.member, vec![titled("crash"), titled("crash")]).await;
    for name in ["bug", "ui"] {
        tracker.member.label(name).await;
        tracker.member.comment(&created[0].id, "seen").await;
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
    let comments = ListCommentsRequest { issue_id: created[0].id.clone(), page_size: 1, ..Default::default() };
    let comments = tracker.viewer.comments().list_comments(comments).await.unwrap().into_inner();
    for page_token in [labels.next_page_token, users.next_page_token, comments.next_page_token] {
        assert!(!page_token.is_empty());
        let request = ListIssuesRequest { page_token, ..Default::default() };
        assert_invalid(list(&tracker.viewer, request).await, &["page_token"]);
    }
    let all_wrong = ListIssuesRequest { page_size: -1, page_token: token, filter: "(".to_owned(), show_deleted: true };
    assert_invalid(list(&tracker.viewer, all_wrong).await, &["page_size", "page_token", "filter"]);
}

/// Creates issues, and closes or deletes these and those of `removable`, until `stop` is set. Returns the number of
/// iterations.
async fn write_concurrently(client: Client, mut removable: Vec<Issue>, stop: Arc<AtomicBool>) -> usize {
    let mut writes = 0;
    while !stop.load(Ordering::Relaxed) {
        removable.push(client.file("removable").await);
        let id = removable.remove(writes % removable.len()).id;
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
async fn paging_during_concurrent_writes_repeats_and_skips_no_issue() {
    let tracker = Tracker::start().await;
    let created = create_all(&tracker.member, (0..300).map(|n| titled(format!("issue {n}"))).collect()).await;
    // Every third issue may be closed or deleted; the others exist throughout.
    let (removable, stable): (Vec<_>, Vec<_>) = created.into_iter().enumerate().partition(|(n, _)| n % 3 == 0);
    let removable = removable.into_iter().map(|(_, issue)| issue).collect();
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_concurrently(tracker.member.clone(), removable, Arc::clone(&stop)));

    for filter in ["", "status = OPEN"] {
        let request = ListIssuesRequest { page_size: 7, filter: filter.to_owned(), ..Default::default() };
        let listed = all_pages(&tracker.viewer, request).await.concat();

        let seen: HashSet<&str> = ids(&listed).into_iter().collect();
        assert_eq!(seen.len(), listed.len(), "an issue is repeated");
        let missed: Vec<_> = stable.iter().filter(|(_, issue)| !seen.contains(&*issue.id)).collect();
        assert!(missed.is_empty(), "{missed:?}");
        assert!(listed.is_sorted_by(|newer, older| newer.id > older.id));
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writer.await.unwrap() > 0, "no concurrent write happened");
}

#[tokio::test]
async fn deleted_issues_are_listed_only_with_show_deleted() {
    let tracker = Tracker::start().await;
    let created = create_all(&tracker.member, vec![titled("a"), titled("b"), titled("c")]).await;
    let delete = DeleteIssueRequest { id: created[1].id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();
    for filter in ["", "status = OPEN", "reporter = member"] {
        let request = ListIssuesRequest { page_size: 1, filter: filter.to_owned(), ..Default::default() };
        let shown = all_pages(&tracker.viewer, request.clone()).await.concat();
        assert_eq!(ids(&shown), [&*created[2].id, &*created[0].id], "{filter}");
        let all = all_pages(&tracker.viewer, ListIssuesRequest { show_deleted: true, ..request }).await.concat();
        assert_eq!(ids(&all), [&*created[2].id, &*created[1].id, &*created[0].id], "{filter}");
    }
}

#[tokio::test]
async fn pages_of_large_issues_are_cut_at_3_mib_and_complete() {
    let tracker = Tracker::start().await;
    let mut created = Vec::new();
    for _ in 0..4 {
        // The largest description: 65,536 characters of four bytes.
        let large = || Issue { description: "😀".repeat(65_536), ..titled("large") };
        created.extend(create_all(&tracker.member, (0..8).map(|_| large()).collect()).await);
        created.push(tracker.member.file("small").await);
    }

    let request = ListIssuesRequest { page_size: 1_000, ..Default::default() };
    let mut page_token = String::new();
    let mut listed = Vec::new();
    loop {
        let page = list(&tracker.viewer, ListIssuesRequest { page_token, ..request.clone() }).await.unwrap();
        assert!(page.encoded_len() < 3 * 1024 * 1024 + 4096, "{} bytes", page.encoded_len());
        assert!(!page.issues.is_empty());
        listed.extend(page.issues);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(ids(&listed), ids(created.iter().rev()));
}

#[tokio::test]
async fn caller_sees_its_own_writes_in_concurrent_identical_lists() {
    let tracker = Tracker::start().await;
    let workers = (0..24).map(|worker| {
        let client = tracker.member.clone();
        tokio::spawn(async move {
            for iteration in 0..10 {
                let issue = Some(titled(format!("issue {iteration} of {worker}")));
                let request = CreateIssueRequest { issue, ..Default::default() };
                let created = client.issues().create_issue(request).await.unwrap().into_inner();
                let request = ListIssuesRequest { page_size: 1_000, ..Default::default() };
                let listed = list(&client, request).await.unwrap().issues;
                assert!(
                    listed.iter().any(|issue| issue.id == created.id),
                    "issue {iteration} of {worker} is not listed"
                );
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.unwrap();
    }
}
