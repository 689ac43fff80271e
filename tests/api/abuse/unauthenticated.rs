//! Calls without credentials.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use issue_tracker::{
    auth::hash_password,
    pb::{LoginRequest, WhoAmIRequest},
};
use secrecy::ExposeSecret;
use tokio::time::sleep;
use tonic::{Request, Status, metadata::MetadataValue};
use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request::MessageRequest};

use super::{
    Flood, Scene,
    held_calls::{CALLS, HeldCalls, WINDOW_BYTES, assert_held_calls_do_not_hurt},
    ordinary,
};
use crate::{
    h2_client::framed,
    harness::{Client, PASSWORD},
};

const WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// Returns a client without credentials that has a connection of its own.
fn anonymous(scene: &Scene) -> Client {
    scene.abuser.client("")
}

async fn log_in(client: &Client, username: &str, password: &str) -> Result<(), Status> {
    let (username, password) = (username.to_owned(), password.to_owned());
    let request = LoginRequest { username, password, validate_only: true };
    client.auth().login(ordinary(request)).await.map(drop)
}

#[tokio::test]
async fn wrong_passwords_do_not_hurt_others() {
    Scene::run(async |scene| {
        let client = anonymous(scene);
        let flood = Flood::start(32, move |nth| {
            let client = client.clone();
            async move { log_in(&client, &format!("other-{}", nth % 16), "wrong password").await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Unauthenticated", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
        log_in(&anonymous(scene), "viewer", PASSWORD).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn calls_without_a_token_in_a_loop_do_not_hurt_others() {
    Scene::run(async |scene| {
        let client = anonymous(scene);
        let flood = Flood::start(16, move |_| {
            let client = client.clone();
            async move {
                let mut last = Ok(());
                for _ in 0..20 {
                    last = client.auth().who_am_i(WhoAmIRequest {}).await.map(drop);
                }
                last
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Unauthenticated", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn metadata_above_the_limit_does_not_hurt_others() {
    const METADATA_BYTES: usize = 20 * 1024;
    Scene::run(async |scene| {
        let client = anonymous(scene);
        let flood = Flood::start(8, move |_| {
            let client = client.clone();
            async move {
                let mut request = Request::new(WhoAmIRequest {});
                let value = MetadataValue::try_from("x".repeat(METADATA_BYTES)).unwrap();
                request.metadata_mut().insert("x-large", value);
                let failed = client.auth().who_am_i(request).await;
                assert!(failed.is_err(), "metadata of {METADATA_BYTES} bytes is accepted");
                Ok(())
            }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn watches_of_health_do_not_hurt_others() {
    Scene::run(async |scene| {
        let message = (Bytes::from_static(&[0; 5]), true);
        let anyone = scene.tracker.client_with_token(None);
        let held = HeldCalls::begin(scene, &anyone, WATCH, CALLS, message, WINDOW_BYTES).await;
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

#[tokio::test]
async fn reflection_streams_that_send_nothing_do_not_hurt_others() {
    Scene::run(async |scene| {
        let anyone = scene.tracker.client_with_token(None);
        let held = HeldCalls::begin(scene, &anyone, REFLECTION, CALLS, (Bytes::new(), false), WINDOW_BYTES).await;
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

/// Each stream sends requests and reads no response.
#[tokio::test]
async fn reflection_streams_that_are_never_read_do_not_hurt_others() {
    const REQUESTS: usize = 20_000;
    Scene::run(async |scene| {
        let list = MessageRequest::ListServices(String::new());
        let request = framed(&ServerReflectionRequest { message_request: Some(list), ..Default::default() });
        let (anyone, messages) = (scene.tracker.client_with_token(None), (request.repeat(REQUESTS).into(), false));
        let held = HeldCalls::begin(scene, &anyone, REFLECTION, CALLS, messages, 0).await;
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

#[tokio::test]
async fn right_passwords_in_a_loop_do_not_hurt_others() {
    Scene::run(async |scene| {
        if scene.is_measured() {
            // The cost of the service. The tests have a lower one.
            let hash = hash_password(&PASSWORD.into(), 12).unwrap();
            let sql = "UPDATE users SET password_hash = $1 WHERE username = 'viewer'";
            scene.tracker.sql(sql, &[&hash.expose_secret()]).await;
        }
        let client = anonymous(scene);
        let flood = Flood::start(32, move |_| {
            let client = client.clone();
            async move { log_in(&client, "viewer", PASSWORD).await }
        });
        let flood = flood.await;
        scene.assert_others_succeed().await;
        flood.stop(&["Ok", "ResourceExhausted"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn idle_connections_up_to_the_limit_do_not_hurt_others() {
    Scene::run_with(&["--connections", "64"], async |scene| {
        let mut idle = VecDeque::new();
        for _ in 0..100 {
            idle.push_back(scene.abuser.open().await.unwrap());
        }
        scene
            .assert_others_succeed_during(async || {
                idle.push_back(scene.abuser.open().await.unwrap());
                idle.pop_front();
                sleep(Duration::from_millis(10)).await;
            })
            .await;
        drop(idle);
        scene.assert_unharmed().await;
    })
    .await;
}
