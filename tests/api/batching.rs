//! Batched calls: each has the outcome that it would have individually.

use futures_util::future::join_all;
use issue_tracker::pb::{
    BatchCreateIssuesRequest, Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue, IssueView,
    UpdateIssueRequest,
};
use proptest::prelude::*;
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Client, Tracker};

/// A call that succeeds or fails in one known way.
#[derive(Clone, Copy, Debug)]
enum Call {
    Get,
    GetMissing,
    Create,
    CreateWithMissingAssignee,
    CreateWithTakenExternalId,
    Update,
    UpdateStale,
    UpdateMissing,
    UpdateToMissingAssignee,
    Comment,
    CommentOnMissing,
    CommentOnDeleted,
}

const CALLS: [Call; 12] = [
    Call::Get,
    Call::GetMissing,
    Call::Create,
    Call::CreateWithMissingAssignee,
    Call::CreateWithTakenExternalId,
    Call::Update,
    Call::UpdateStale,
    Call::UpdateMissing,
    Call::UpdateToMissingAssignee,
    Call::Comment,
    Call::CommentOnMissing,
    Call::CommentOnDeleted,
];

/// The issues that the calls of a case share.
struct SharedIssues {
    /// Has an external id and is never changed.
    unchanged: Issue,
    deleted: Issue,
}

impl Call {
    fn expected(self) -> Result<(), Code> {
        match self {
            Self::Get | Self::Create | Self::Update | Self::Comment => Ok(()),
            Self::GetMissing
            | Self::CreateWithMissingAssignee
            | Self::UpdateMissing
            | Self::UpdateToMissingAssignee
            | Self::CommentOnMissing => Err(Code::NotFound),
            Self::CreateWithTakenExternalId => Err(Code::AlreadyExists),
            Self::UpdateStale => Err(Code::Aborted),
            Self::CommentOnDeleted => Err(Code::FailedPrecondition),
        }
    }

    /// Sends the call; `own` is an issue that no other call changes.
    async fn send(self, client: &Client, shared: &SharedIssues, own: &Issue, request_id: String) -> Result<(), Code> {
        let missing_id = || Uuid::now_v7().to_string();
        let create = |issue: Issue| CreateIssueRequest {
            issue: Some(issue),
            request_id: request_id.clone(),
            ..Default::default()
        };
        let update = |issue: Issue, expected_version: i64| UpdateIssueRequest {
            issue: Some(issue),
            expected_version,
            request_id: request_id.clone(),
            ..Default::default()
        };
        let comment = |issue_id: String| CreateCommentRequest {
            comment: Some(Comment { issue_id, content: "seen".to_owned(), ..Comment::default() }),
            request_id: request_id.clone(),
            ..Default::default()
        };
        let titled = |id: &str| Issue { id: id.to_owned(), title: "changed".to_owned(), ..Issue::default() };
        let (mut issues, mut comments) = (client.issues(), client.comments());
        let result = match self {
            Self::Get => issues.get_issue(GetIssueRequest { id: shared.unchanged.id.clone(), view: 0 }).await.map(drop),
            Self::GetMissing => issues.get_issue(GetIssueRequest { id: missing_id(), view: 2 }).await.map(drop),
            Self::Create => issues.create_issue(create(titled(""))).await.map(drop),
            Self::CreateWithMissingAssignee => {
                issues.create_issue(create(Issue { assignee_id: missing_id(), ..titled("") })).await.map(drop)
            }
            Self::CreateWithTakenExternalId => {
                let external_id = shared.unchanged.external_id.clone();
                issues.create_issue(create(Issue { external_id, ..titled("") })).await.map(drop)
            }
            Self::Update => issues.update_issue(update(titled(&own.id), 1)).await.map(drop),
            Self::UpdateStale => issues.update_issue(update(titled(&own.id), 7)).await.map(drop),
            Self::UpdateMissing => issues.update_issue(update(titled(&missing_id()), 0)).await.map(drop),
            Self::UpdateToMissingAssignee => {
                issues.update_issue(update(Issue { assignee_id: missing_id(), ..titled(&own.id) }, 0)).await.map(drop)
            }
            Self::Comment => comments.create_comment(comment(shared.unchanged.id.clone())).await.map(drop),
            Self::CommentOnMissing => comments.create_comment(comment(missing_id())).await.map(drop),
            Self::CommentOnDeleted => comments.create_comment(comment(shared.deleted.id.clone())).await.map(drop),
        };
        result.map_err(|status| status.code())
    }
}

#[test]
fn concurrent_calls_have_the_outcome_that_each_has_individually() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let tracker = runtime.block_on(Tracker::start());
    let (unchanged, deleted) = runtime.block_on(async {
        let issue = Issue { title: "unchanged".to_owned(), external_id: "taken".to_owned(), ..Issue::default() };
        let (unchanged, deleted) = (tracker.member.file_as(issue).await, tracker.member.file("deleted").await);
        let request = issue_tracker::pb::DeleteIssueRequest { id: deleted.id.clone(), ..Default::default() };
        (unchanged, tracker.member.issues().delete_issue(request).await.unwrap().into_inner())
    });
    let shared = std::sync::Arc::new(SharedIssues { unchanged, deleted });
    let calls = prop::collection::vec((prop::sample::select(&CALLS[..]), any::<bool>()), 1..60);
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(calls in calls)| {
        runtime.block_on(async {
            let counts = async || {
                let sql = "SELECT (SELECT count(*) FROM issues), (SELECT count(*) FROM comments),
                    (SELECT count(*) FROM issue_events)";
                let row = tracker.sql(sql, &[]).await.remove(0);
                [0_usize, 1, 2].map(|column| row.get::<_, i64>(column))
            };
            let own = Issue { title: "own".to_owned(), ..Issue::default() };
            let request = BatchCreateIssuesRequest { issues: vec![own; calls.len()], ..Default::default() };
            let own = tracker.member.issues().batch_create_issues(request).await.unwrap().into_inner().issues;
            let before = counts().await;
            let sent: Vec<_> = calls.iter().zip(&own).map(|((call, with_id), own)| {
                let (call, client, shared, own) = (*call, tracker.member.clone(), shared.clone(), own.clone());
                let request_id = if *with_id { Uuid::now_v7().to_string() } else { String::new() };
                tokio::spawn(async move { call.send(&client, &shared, &own, request_id).await })
            }).collect();
            for (sent, (call, _)) in sent.into_iter().zip(&calls) {
                assert_eq!(sent.await.unwrap(), call.expected(), "{call:?}");
            }
            let after = counts().await;
            let count = |selects: fn(&Call) -> bool| calls.iter().filter(|(call, _)| selects(call)).count() as i64;
            assert_eq!(after[0] - before[0], count(|call| matches!(call, Call::Create)));
            assert_eq!(after[1] - before[1], count(|call| matches!(call, Call::Comment)));
            assert_eq!(after[2] - before[2], count(|call| matches!(call, Call::Update)));
        });
    });
    // Only calls that succeeded are stored for idempotency, each with its response.
    assert_eq!(runtime.block_on(tracker.count("SELECT count(*) FROM requests WHERE reply IS NULL")), 0);
}

#[tokio::test]
async fn comment_threads_too_large_for_one_batch_are_each_returned_whole() {
    const THREADS: usize = 12;
    const COMMENTS: usize = 30;
    let tracker = Tracker::start().await;
    let issues = join_all((0..THREADS).map(|_| tracker.member.file("long thread"))).await;
    // 1.9 MiB per thread.
    let sql = "INSERT INTO comments (id, issue_id, author_id, content)
        SELECT gen_random_uuid(), i.id, i.reporter_id, repeat('😀', 16384) FROM issues i, generate_series(1, $1)";
    tracker.sql(sql, &[&(COMMENTS as i32)]).await;

    let gets = join_all(issues.iter().map(|issue| async {
        let request = GetIssueRequest { id: issue.id.clone(), view: IssueView::Full.into() };
        tracker.viewer.issues().get_issue(request).await.unwrap().into_inner()
    }));

    for (got, issue) in gets.await.iter().zip(&issues) {
        assert_eq!((&got.id, got.comments.len(), got.comment_count), (&issue.id, COMMENTS, COMMENTS as i32));
        assert!(got.comments.iter().all(|comment| comment.issue_id == issue.id && comment.content.len() == 65_536));
    }
}
