//! `IssueService`.

use issue_tracker::pb::{Issue, UpdateIssueRequest};
use tonic::Code;

use crate::harness::{Tracker, assert_error, error_metadata};

#[tokio::test]
async fn stale_version_is_aborted_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash on start").await;
    let update = |title: &str| UpdateIssueRequest {
        issue: Some(Issue { id: issue.id.clone(), title: title.to_owned(), ..Issue::default() }),
        expected_version: 1,
        ..Default::default()
    };
    let updated = tracker.member.issues().update_issue(update("crash on stop")).await.unwrap().into_inner();
    assert_eq!((updated.version, updated.title.as_str()), (2, "crash on stop"));

    let stale = tracker.member.issues().update_issue(update("no crash")).await;

    let status = assert_error(stale, Code::Aborted, "VERSION_MISMATCH");
    assert_eq!(error_metadata(&status, "current_version").as_deref(), Some("2"));
    assert_eq!(tracker.member.get(&issue.id).await, updated);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 1);
}
