//! Calls without credentials.

use bytes::Bytes;
use issue_tracker::pb::{LoginRequest, WhoAmIRequest};
use tonic::{Request, Status, metadata::MetadataValue};

use super::{
    Flood, Scene, connect,
    held_calls::{CALLS, HeldCalls, WINDOW_BYTES, assert_held_calls_do_not_hurt},
    ordinary,
};
use crate::harness::{Client, PASSWORD};

const WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// Returns a client without credentials that has a connection of its own.
fn anonymous(scene: &Scene) -> Client {
    connect(&scene.tracker, &scene.tracker.client_with_token(None))
}

async fn log_in(client: &Client, username: &str, password: &str) -> Result<(), Status> {
    let (username, password) = (username.to_owned(), password.to_owned());
    let request = LoginRequest { username, password, validate_only: true };
    client.auth().login(ordinary(request)).await.map(drop)
}

#[tokio::test]
async fn wrong_passwords_do_not_hurt_others() {
    let scene = Scene::start().await;
    let client = anonymous(&scene);
    let flood = Flood::start(32, move |nth| {
        let client = client.clone();
        async move { log_in(&client, &format!("other-{}", nth % 16), "wrong password").await }
    });
    let flood = flood.await;
    scene.assert_others_succeed().await;
    flood.stop(&["Unauthenticated", "ResourceExhausted"]).await;
    scene.assert_unharmed().await;
    log_in(&anonymous(&scene), "viewer", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn calls_without_a_token_in_a_loop_do_not_hurt_others() {
    let scene = Scene::start().await;
    let client = anonymous(&scene);
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
}

#[tokio::test]
async fn metadata_above_the_limit_does_not_hurt_others() {
    const METADATA_BYTES: usize = 20 * 1024;
    let scene = Scene::start().await;
    let client = anonymous(&scene);
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
}

#[tokio::test]
async fn watches_of_health_do_not_hurt_others() {
    let scene = Scene::start().await;
    let message = (Bytes::from_static(&[0; 5]), true);
    let anyone = scene.tracker.client_with_token(None);
    let held = HeldCalls::begin(&scene, &anyone, WATCH, CALLS, message, WINDOW_BYTES).await;
    assert_held_calls_do_not_hurt(scene, held).await;
}

#[tokio::test]
async fn reflection_streams_that_send_nothing_do_not_hurt_others() {
    let scene = Scene::start().await;
    let anyone = scene.tracker.client_with_token(None);
    let held = HeldCalls::begin(&scene, &anyone, REFLECTION, CALLS, (Bytes::new(), false), WINDOW_BYTES).await;
    assert_held_calls_do_not_hurt(scene, held).await;
}

#[tokio::test]
async fn idle_connections_up_to_the_limit_do_not_hurt_others() {
    let scene = Scene::start_with(&["--connections", "64"]).await;
    let mut idle = Vec::new();
    let flood = async {
        for _ in 0..100 {
            idle.push(tokio::net::TcpStream::connect(&scene.tracker.address).await.unwrap());
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::join!(scene.assert_others_succeed(), flood);
    scene.assert_others_succeed().await;
    drop(idle);
    scene.assert_unharmed().await;
}
