//! Calls whose responses take much memory.

use issue_tracker::pb::{GetIssueRequest, Issue, IssueView, UpdateIssueRequest};

use super::{
    REQUESTS_OF_ONE, Scene,
    held_calls::{HeldCalls, assert_held_calls_do_not_hurt},
};
use crate::h2_client::framed;

const COMMENT_CHARS: usize = 16_384;

fn large_issue() -> Issue {
    Issue { title: "large".into(), description: "😀".repeat(65_536), ..Issue::default() }
}

#[tokio::test]
async fn responses_of_updates_that_are_never_read_do_not_hurt_others() {
    const WAVES: usize = 5;
    Scene::run(async |scene| {
        let member = &scene.tracker.member;
        let id = member.file_as(large_issue()).await.id;
        let issue = Issue { id, title: "changed".into(), ..Issue::default() };
        let update = framed(&UpdateIssueRequest { issue: Some(issue), ..Default::default() });
        let path = "/issuetracker.v1.IssueService/UpdateIssue";
        let (mut held, mut admitted) = (Vec::new(), 0);
        for _ in 0..WAVES {
            let mut calls = HeldCalls::begin(scene, member, path, REQUESTS_OF_ONE, (update.clone(), true), 0).await;
            admitted += calls.admitted().await;
            held.push(calls);
        }
        assert!(admitted > 0);
        scene.assert_others_succeed().await;
        drop(held);
        scene.assert_unharmed().await;
    })
    .await;
}

/// As few comments as a batch of reads fetches.
#[tokio::test]
async fn reads_of_one_large_issue_by_many_calls_do_not_hurt_others() {
    const COMMENTS: usize = 30;
    Scene::run(async |scene| {
        let id = scene.tracker.member.file_as(large_issue()).await.id;
        for _ in 0..COMMENTS {
            scene.tracker.member.comment(&id, &"😀".repeat(COMMENT_CHARS)).await;
        }
        let get = framed(&GetIssueRequest { id, view: IssueView::Full.into() });
        let (viewer, path) = (&scene.tracker.viewer, "/issuetracker.v1.IssueService/GetIssue");
        let mut held = HeldCalls::begin(scene, viewer, path, REQUESTS_OF_ONE, (get, true), 0).await;
        assert!(held.admitted().await > 0);
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}
