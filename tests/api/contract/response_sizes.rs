//! The sizes of responses that `proto/` declares: the server reserves as much memory before it executes a mutation.

use futures_util::future::join_all;
use issue_tracker::{
    middleware::method_table::METHODS,
    pb::{
        BatchCreateIssuesRequest, BulkUpdateStatusRequest, Comment, CreateCommentRequest, CreateIssueRequest,
        CreateLabelRequest, DeleteIssueRequest, Issue, Label, Priority, RevertImportResponse, Status,
    },
};
use prost::Message;

use crate::harness::{Client, Tracker};

/// The prefix of a message.
const PREFIX_BYTES: usize = 5;

/// Returns a text of so many characters, of which all but a number have four bytes.
fn text(nth: usize, chars: usize) -> String {
    format!("{nth:03}{}", "😀".repeat(chars - 3))
}

/// Asserts that a response is not larger than declared.
#[track_caller]
fn assert_fits(method: &str, request: &impl Message, response: &impl Message) {
    let policy = METHODS.iter().find(|policy| policy.path.ends_with(&format!("/{method}"))).unwrap();
    let bytes = response.encoded_len() + PREFIX_BYTES;
    let max = policy.max_response_kib.unwrap_or(4) as usize * 1024;
    assert!(bytes <= max, "{method}: {bytes} of {max} bytes");
    if let Some(factor) = policy.max_response_per_request {
        let max = 4 * 1024 + factor as usize * (request.encoded_len() + PREFIX_BYTES);
        assert!(bytes <= max, "{method}: {bytes} of {max} bytes for this request");
    }
}

/// Creates as many labels as an issue can have, each of the largest size.
async fn largest_labels(client: &Client) -> Vec<String> {
    let create = async |nth| {
        let label = Label { name: text(nth, 50), description: text(nth, 255), ..Label::default() };
        let request = CreateLabelRequest { label: Some(label), ..Default::default() };
        let response = client.labels().create_label(request.clone()).await.unwrap().into_inner();
        assert_fits("CreateLabel", &request, &response);
        response.id
    };
    let mut ids = Vec::new();
    for nth in 0..100 {
        ids.push(create(nth).await);
    }
    ids
}

#[tokio::test]
async fn largest_issue_and_comment_fit() {
    let tracker = Tracker::start().await;
    let member = &tracker.member;
    let issue = Issue {
        title: text(0, 255),
        description: text(0, 65_536),
        external_id: text(0, 255),
        status: Status::Closed.into(),
        priority: Priority::Critical.into(),
        assignee_id: member.user.id.clone(),
        label_ids: largest_labels(member).await,
        ..Issue::default()
    };
    let request = CreateIssueRequest { issue: Some(issue), ..Default::default() };
    let created = member.issues().create_issue(request.clone()).await.unwrap().into_inner();
    assert_fits("CreateIssue", &request, &created);

    let comment = Comment { issue_id: created.id.clone(), content: text(0, 16_384), ..Comment::default() };
    let request = CreateCommentRequest { comment: Some(comment), ..Default::default() };
    let comment = member.comments().create_comment(request.clone()).await.unwrap().into_inner();
    assert_fits("CreateComment", &request, &comment);
    let deleted = Comment { delete_time: comment.create_time, ..comment };
    assert_fits("DeleteComment", &request, &deleted);

    let request = DeleteIssueRequest { id: created.id, ..Default::default() };
    let deleted = member.issues().delete_issue(request.clone()).await.unwrap().into_inner();
    assert!(deleted.encoded_len() > 370 * 1024 && deleted.delete_time.is_some());
    for method in ["UpdateIssue", "DeleteIssue", "UndeleteIssue", "AddIssueLabels"] {
        assert_fits(method, &request, &deleted);
    }
}

#[tokio::test]
async fn large_responses_to_small_requests_fit() {
    let tracker = Tracker::start().await;
    let member = &tracker.member;
    let labeled = Issue { title: "x".into(), label_ids: largest_labels(member).await, ..Issue::default() };
    let request = CreateIssueRequest { issue: Some(labeled.clone()), ..Default::default() };
    let created = member.issues().create_issue(request.clone()).await.unwrap().into_inner();
    assert_fits("CreateIssue", &request, &created);

    let small = Issue { title: "x".into(), ..Issue::default() };
    let batches = [vec![small; 1_000], vec![labeled; 20]].map(|issues| async move {
        let request = BatchCreateIssuesRequest { issues, ..Default::default() };
        let response = member.issues().batch_create_issues(request.clone()).await.unwrap().into_inner();
        assert_fits("BatchCreateIssues", &request, &response);
        response.issues
    });
    let created_in_batches = join_all(batches).await;
    let ids = created_in_batches[0].iter().map(|issue| issue.id.clone()).collect();
    let request = BulkUpdateStatusRequest { ids, status: Status::Closed.into(), ..Default::default() };
    let response = member.issues().bulk_update_status(request.clone()).await.unwrap().into_inner();
    assert_fits("BulkUpdateStatus", &request, &response);

    let kept_ids = vec![created.id; 100];
    let (removed_count, restored_count, kept_count) = (i64::MAX, i64::MAX, i64::MAX);
    let reverted = RevertImportResponse { removed_count, restored_count, kept_count, kept_ids };
    assert_fits("RevertImport", &reverted, &reverted);
}
