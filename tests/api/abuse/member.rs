//! Calls that a member repeats.

use issue_tracker::pb::{
    BatchCreateIssuesRequest, BatchGetIssuesRequest, BulkUpdateStatusRequest, Comment, CreateCommentRequest,
    CreateIssueRequest, CreateLabelRequest, DeleteIssueRequest, Issue, IssueView, Label, Status as IssueStatus,
    UndeleteIssueRequest, UpdateIssueRequest,
};
use uuid::Uuid;

use super::{
    Flood, Scene,
    held_calls::{HeldCalls, gzip_framed},
    ordinary,
};
use crate::{harness::Client, lock_waiters};

const BATCH: usize = 1_000;
/// What calls that wait for a row lock fail with.
const ROW_LOCK_CODES: [&str; 3] = ["Ok", "Aborted", "ResourceExhausted"];

/// Creates issues for batches.
async fn file_batch(client: &Client, count: usize) -> Vec<String> {
    let issues = (0..count).map(|nth| Issue { title: format!("batch {nth}"), ..Issue::default() }).collect();
    let request = BatchCreateIssuesRequest { issues, ..Default::default() };
    let created = client.issues().batch_create_issues(request).await.unwrap().into_inner();
    created.issues.into_iter().map(|issue| issue.id).collect()
}

async fn assert_flood_does_not_hurt(scene: &Scene, flood: Flood, expected: &[&str]) {
    scene.assert_others_succeed().await;
    flood.stop(expected).await;
    scene.assert_unharmed().await;
}

#[tokio::test]
async fn updates_of_one_issue_by_100_calls_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, id) = (scene.member(), scene.tracker.member.file("popular").await.id);
        let flood = Flood::start(100, move |nth| {
            let (mut issues, id) = (member.issues(), id.clone());
            let issue = Issue { id, title: format!("popular {nth}"), ..Issue::default() };
            let update = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
            async move { issues.update_issue(ordinary(update)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &ROW_LOCK_CODES).await;
    })
    .await;
}

#[tokio::test]
async fn updates_that_wait_for_a_locked_row_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, id) = (scene.member(), scene.tracker.member.file("locked").await.id);
        let blocker = scene.tracker.session().await;
        blocker.batch_execute("BEGIN; SELECT FROM issues WHERE title = 'locked' FOR UPDATE").await.unwrap();
        let flood = Flood::start(100, move |nth| {
            let (mut issues, id) = (member.issues(), id.clone());
            let issue = Issue { id, title: format!("locked {nth}"), ..Issue::default() };
            let update = UpdateIssueRequest { issue: Some(issue), ..Default::default() };
            async move { issues.update_issue(ordinary(update)).await.map(drop) }
        });
        let flood = flood.await;
        scene.tracker.wait_until(lock_waiters!("> 0")).await;
        scene.assert_others_succeed().await;
        // An update that the service does not batch takes a place among those that wait for rows.
        let issue = Issue { id: scene.others[0].issue_id.clone(), title: "not locked".into(), ..Issue::default() };
        let update = UpdateIssueRequest { issue: Some(issue), comment: "changed".into(), ..Default::default() };
        scene.others[0].client.issues().update_issue(ordinary(update)).await.expect("another user's update succeeds");
        blocker.batch_execute("COMMIT").await.unwrap();
        flood.stop(&ROW_LOCK_CODES).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn one_request_id_in_100_calls_does_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, request_id) = (scene.member(), Uuid::now_v7().to_string());
        let flood = Flood::start(100, move |_| {
            let (mut issues, request_id) = (member.issues(), request_id.clone());
            let issue = Issue { title: "repeated".into(), ..Issue::default() };
            let create = CreateIssueRequest { issue: Some(issue), request_id, ..Default::default() };
            async move { issues.create_issue(ordinary(create)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &ROW_LOCK_CODES).await;
        assert_eq!(scene.tracker.count("SELECT count(*) FROM issues WHERE title = 'repeated'").await, 1);
    })
    .await;
}

#[tokio::test]
async fn batches_of_1000_new_issues_do_not_hurt_others() {
    Scene::run(async |scene| {
        let member = scene.member();
        let flood = Flood::start(12, move |_| {
            let mut issues = member.issues();
            let batch = vec![Issue { title: "batch".into(), ..Issue::default() }; BATCH];
            let request = BatchCreateIssuesRequest { issues: batch, validate_only: true, ..Default::default() };
            async move { issues.batch_create_issues(ordinary(request)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &["Ok", "ResourceExhausted"]).await;
    })
    .await;
}

#[tokio::test]
async fn status_changes_of_1000_issues_do_not_hurt_others() {
    Scene::run(async |scene| {
        let ids = file_batch(&scene.tracker.member, BATCH).await;
        let member = scene.member();
        let flood = Flood::start(12, move |nth| {
            let (mut issues, ids) = (member.issues(), ids.clone());
            let status = if nth.is_multiple_of(2) { IssueStatus::Closed } else { IssueStatus::Open };
            let request = BulkUpdateStatusRequest { ids, status: status.into(), ..Default::default() };
            async move { issues.bulk_update_status(ordinary(request)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &ROW_LOCK_CODES).await;
    })
    .await;
}

#[tokio::test]
async fn flood_of_new_labels_does_not_hurt_others() {
    Scene::run(async |scene| {
        let member = scene.member();
        let flood = Flood::start(200, move |nth| {
            let mut labels = member.labels();
            let label = Label { name: format!("label {nth}"), description: "x".repeat(255), ..Label::default() };
            let request = CreateLabelRequest { label: Some(label), ..Default::default() };
            async move { labels.create_label(ordinary(request)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &["Ok", "ResourceExhausted"]).await;
    })
    .await;
}

/// Each message has 64 MiB after decompression, of which 4 MiB are allowed.
#[tokio::test]
async fn gzip_bombs_do_not_hurt_others() {
    const BOMB_BYTES: usize = 64 * 1024 * 1024;
    Scene::run(async |scene| {
        let issue = Issue { title: "bomb".into(), description: "x".repeat(BOMB_BYTES), ..Issue::default() };
        let create = CreateIssueRequest { issue: Some(issue), ..Default::default() };
        let message = gzip_framed(&create);
        let (member, path) = (&scene.tracker.member, "/issuetracker.v1.IssueService/CreateIssue");
        scene
            .assert_others_succeed_during(async || {
                let mut held = HeldCalls::begin_gzip(scene, member, path, 32, message.clone()).await;
                assert_eq!(held.admitted().await, 0, "a bomb is admitted");
            })
            .await;
        scene.assert_unharmed().await;
    })
    .await;
}

/// Messages of the maximum size that are small on the wire and have many violations.
#[tokio::test]
async fn zipped_messages_of_the_maximum_size_do_not_hurt_others() {
    Scene::run(async |scene| {
        let issue = Issue { title: "large".into(), description: "x".repeat(65_537), ..Issue::default() };
        let message = gzip_framed(&BatchCreateIssuesRequest { issues: vec![issue; 60], ..Default::default() });
        let (member, path) = (&scene.tracker.member, "/issuetracker.v1.IssueService/BatchCreateIssues");
        scene
            .assert_others_succeed_during(async || {
                let mut held = HeldCalls::begin_gzip(scene, member, path, 20, message.clone()).await;
                assert_eq!(held.admitted().await, 0, "a batch with violations is created");
            })
            .await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn comments_on_one_issue_by_100_calls_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, id) = (scene.member(), scene.others[0].issue_id.clone());
        let flood = Flood::start(100, move |_| {
            let mut comments = member.comments();
            let comment = Comment { issue_id: id.clone(), content: "x".repeat(16_000), ..Comment::default() };
            let request = CreateCommentRequest { comment: Some(comment), ..Default::default() };
            async move { comments.create_comment(ordinary(request)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &ROW_LOCK_CODES).await;
    })
    .await;
}

#[tokio::test]
async fn deletions_and_undeletions_of_one_issue_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, id) = (scene.member(), scene.tracker.member.file("flickering").await.id);
        let flood = Flood::start(60, move |nth| {
            let (mut issues, id) = (member.issues(), id.clone());
            async move {
                if nth.is_multiple_of(2) {
                    issues.delete_issue(ordinary(DeleteIssueRequest { id, ..Default::default() })).await.map(drop)
                } else {
                    issues.undelete_issue(ordinary(UndeleteIssueRequest { id, ..Default::default() })).await.map(drop)
                }
            }
        });
        let expected = ["Ok", "Aborted", "FailedPrecondition", "NotFound", "ResourceExhausted"];
        assert_flood_does_not_hurt(scene, flood.await, &expected).await;
    })
    .await;
}

#[tokio::test]
async fn reads_of_1000_issues_in_the_full_view_do_not_hurt_others() {
    Scene::run(async |scene| {
        let ids = file_batch(&scene.tracker.member, BATCH).await;
        for id in &ids[..10] {
            scene.tracker.member.comment(id, &"x".repeat(10_000)).await;
        }
        let member = scene.member();
        let flood = Flood::start(40, move |_| {
            let (mut issues, ids) = (member.issues(), ids.clone());
            let request = BatchGetIssuesRequest { ids, view: IssueView::Full.into() };
            async move { issues.batch_get_issues(ordinary(request)).await.map(drop) }
        });
        assert_flood_does_not_hurt(scene, flood.await, &["Ok", "ResourceExhausted"]).await;
    })
    .await;
}
