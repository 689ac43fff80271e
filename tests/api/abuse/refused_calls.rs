//! Calls that are refused at once, and take no resource of others.

use bytes::Bytes;
use futures_util::future::join_all;
use tonic::Code;

use super::{
    Flood, Scene,
    held_calls::{CALLS, HeldCalls, WINDOW_BYTES, assert_held_calls_do_not_hurt},
    list,
};
use crate::harness::Client;

/// Asserts that calls are refused although their messages never come, and that others succeed.
async fn assert_refused_at_once(scene: &Scene, client: &Client, method: &str) {
    let path = format!("/issuetracker.v1.{method}");
    let mut held = HeldCalls::begin(scene, client, &path, CALLS, (Bytes::new(), false), WINDOW_BYTES).await;
    assert_eq!(held.admitted().await, 0, "a call is admitted");
    assert_held_calls_do_not_hurt(scene, held).await;
}

#[tokio::test]
async fn calls_without_a_token_that_never_end_are_refused_at_once() {
    Scene::run(async |scene| {
        let anyone = scene.tracker.client_with_token(None);
        assert_refused_at_once(scene, &anyone, "AuthService/WhoAmI").await;
    })
    .await;
}

#[tokio::test]
async fn calls_without_the_role_that_never_end_are_refused_at_once() {
    Scene::run(async |scene| {
        let viewer = scene.tracker.viewer.clone();
        assert_refused_at_once(scene, &viewer, "IssueService/UpdateIssue").await;
    })
    .await;
}

#[tokio::test]
async fn calls_with_metadata_above_the_limit_that_never_end_are_refused_at_once() {
    Scene::run(async |scene| {
        let large = scene.tracker.client_with_token(Some(&"x".repeat(20 * 1024)));
        assert_refused_at_once(scene, &large, "AuthService/WhoAmI").await;
    })
    .await;
}

#[tokio::test]
async fn invalid_filters_take_no_database_connection() {
    Scene::run(async |scene| {
        let viewer = scene.viewer();
        let blocker = scene.tracker.session().await;
        blocker.batch_execute("BEGIN; LOCK TABLE issues IN ACCESS EXCLUSIVE MODE").await.unwrap();
        // Fewer than there are slots for one user.
        let lists = (0..40).map(|nth| {
            let (viewer, filter) = (viewer.clone(), format!("{nth} {}", "(\"\\".repeat(660)));
            async move { list(&viewer, &filter, nth).await.unwrap_err().code() }
        });
        assert_eq!(join_all(lists).await, [Code::InvalidArgument; 40]);
        blocker.batch_execute("COMMIT").await.unwrap();
        scene.assert_others_succeed().await;
        scene.assert_unharmed().await;
    })
    .await;
}

/// The lists take all slots of the viewer.
#[tokio::test]
async fn slow_lists_on_connections_of_their_own_do_not_hurt_others() {
    Scene::run(async |scene| {
        scene.make_lists_slow().await;
        let viewers: Vec<_> = (0..80).map(|_| scene.viewer()).collect();
        let flood = Flood::start(80, move |nth| {
            let viewer = viewers[nth % viewers.len()].clone();
            async move { list(&viewer, "slow", nth).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop_limited(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}
