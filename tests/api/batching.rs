//! Calls that are made together: each gets what it would have got alone.

use futures_util::future::join_all;
use issue_tracker::pb::{
    Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue, IssueView, UpdateIssueRequest,
};
use proptest::prelude::*;
use tonic::Code;
use uuid::Uuid;

use crate::harness::{Client, Tracker};

/// A call, good or bad, and what it must get.
#[derive(Clone, Copy, Debug)]
enum Call {
    Get,
    GetMissing,
    Create,
    CreateForNobodyThere,
    CreateWithTakenKey,
    Update,
    UpdateStale,
    UpdateMissing,
    UpdateForNobodyThere,
    Comment,
    CommentOnMissing,
    CommentOnDeleted,
}

const CALLS: [Call; 12] = [
    Call::Get,
    Call::GetMissing,
    Call::Create,
    Call::CreateForNobodyThere,
    Call::CreateWithTakenKey,
    Call::Update,
    Call::UpdateStale,
    Call::UpdateMissing,
    Call::UpdateForNobodyThere,
    Call::Comment,
    Call::CommentOnMissing,
    Call::CommentOnDeleted,
];

/// What the calls are about.
struct World {
    /// Only read.
    still: Issue,
    deleted: Issue,
}

impl Call {
    fn wanted(self) -> Result<(), Code> {
        match self {
            Self::Get | Self::Create | Self::Update | Self::Comment => Ok(()),
            Self::GetMissing
            | Self::CreateForNobodyThere
            | Self::UpdateMissing
            | Self::UpdateForNobodyThere
            | Self::CommentOnMissing => Err(Code::NotFound),
            Self::CreateWithTakenKey => Err(Code::AlreadyExists),
            Self::UpdateStale => Err(Code::Aborted),
            Self::CommentOnDeleted => Err(Code::FailedPrecondition),
        }
    }

    /// `own` is an issue that no other call changes.
    async fn make(self, client: &Client, world: &World, own: &Issue, request_id: String) -> Result<(), Code> {
        let nobody = || Uuid::now_v7().to_string();
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
        let answered = match self {
            Self::Get => issues.get_issue(GetIssueRequest { id: world.still.id.clone(), view: 0 }).await.map(drop),
            Self::GetMissing => issues.get_issue(GetIssueRequest { id: nobody(), view: 2 }).await.map(drop),
            Self::Create => issues.create_issue(create(titled(""))).await.map(drop),
            Self::CreateForNobodyThere => {
                issues.create_issue(create(Issue { assignee_id: nobody(), ..titled("") })).await.map(drop)
            }
            Self::CreateWithTakenKey => {
                let external_id = world.still.external_id.clone();
                issues.create_issue(create(Issue { external_id, ..titled("") })).await.map(drop)
            }
            Self::Update => issues.update_issue(update(titled(&own.id), 1)).await.map(drop),
            Self::UpdateStale => issues.update_issue(update(titled(&own.id), 7)).await.map(drop),
            Self::UpdateMissing => issues.update_issue(update(titled(&nobody()), 0)).await.map(drop),
            Self::UpdateForNobodyThere => {
                issues.update_issue(update(Issue { assignee_id: nobody(), ..titled(&own.id) }, 0)).await.map(drop)
            }
            Self::Comment => comments.create_comment(comment(world.still.id.clone())).await.map(drop),
            Self::CommentOnMissing => comments.create_comment(comment(nobody())).await.map(drop),
            Self::CommentOnDeleted => comments.create_comment(comment(world.deleted.id.clone())).await.map(drop),
        };
        answered.map_err(|status| status.code())
    }
}

#[test]
fn any_mix_of_calls_at_once_gets_what_each_would_get_alone() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let tracker = runtime.block_on(Tracker::start());
    let (still, deleted) = runtime.block_on(async {
        let keyed = Issue { title: "still".to_owned(), external_id: "taken".to_owned(), ..Issue::default() };
        let (still, gone) = (tracker.member.file_as(keyed).await, tracker.member.file("gone").await);
        let request = issue_tracker::pb::DeleteIssueRequest { id: gone.id.clone(), ..Default::default() };
        (still, tracker.member.issues().delete_issue(request).await.unwrap().into_inner())
    });
    let world = std::sync::Arc::new(World { still, deleted });
    let calls = prop::collection::vec((prop::sample::select(&CALLS[..]), any::<bool>()), 1..60);
    let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(calls in calls)| {
        runtime.block_on(async {
            let counts = || async {
                let sql = "SELECT count(*) FROM issues";
                let comments = tracker.count("SELECT count(*) FROM comments").await;
                (tracker.count(sql).await, comments, tracker.count("SELECT count(*) FROM issue_events").await)
            };
            let mut own = Vec::new();
            for _ in &calls {
                own.push(tracker.member.file("own").await);
            }
            let before = counts().await;
            let made: Vec<_> = calls.iter().zip(&own).map(|((call, with_id), own)| {
                let (call, client, world, own) = (*call, tracker.member.clone(), world.clone(), own.clone());
                let request_id = if *with_id { Uuid::now_v7().to_string() } else { String::new() };
                tokio::spawn(async move { call.make(&client, &world, &own, request_id).await })
            }).collect();
            for (made, (call, _)) in made.into_iter().zip(&calls) {
                assert_eq!(made.await.unwrap(), call.wanted(), "{call:?}");
            }
            let after = counts().await;
            let of = |wanted: fn(&Call) -> bool| calls.iter().filter(|(call, _)| wanted(call)).count() as i64;
            assert_eq!(after.0 - before.0, of(|call| matches!(call, Call::Create)));
            assert_eq!(after.1 - before.1, of(|call| matches!(call, Call::Comment)));
            assert_eq!(after.2 - before.2, of(|call| matches!(call, Call::Update)));
        });
    });
    // Of those with request ids, only what was made is remembered, and with its reply.
    assert_eq!(runtime.block_on(tracker.count("SELECT count(*) FROM requests WHERE reply IS NULL")), 0);
}

#[tokio::test]
async fn threads_that_are_too_large_to_be_read_together_are_each_read_whole() {
    const THREADS: usize = 12;
    const COMMENTS: usize = 30;
    let tracker = Tracker::start().await;
    let issues = join_all((0..THREADS).map(|_| tracker.member.file("long thread"))).await;
    // 1.9 MiB a thread.
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
