//! Calls that a client begins and never finishes, or whose responses it does not read.

use std::{io::Write, time::Duration};

use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use futures_util::future::join_all;
use h2::{Reason, SendStream, client::ResponseFuture};
use issue_tracker::pb::{
    BatchCreateIssuesRequest, Comment, CreateCommentRequest, ExportIssuesRequest, GetIssueRequest, Issue, IssueView,
    ListIssuesRequest,
};
use prost::Message;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{REQUESTS_OF_ONE, Scene, ordinary};
use crate::{
    h2_client::{H2Client, framed, framed_bytes, request},
    harness::Client,
    support::bounds::HANG,
};

/// How many calls are left open on a connection. The service accepts 256.
const CALLS_PER_CONNECTION: usize = 50;
/// More than `--requests` and than the permits of any other resource.
pub const CALLS: usize = 200;
/// HTTP/2's default window, in bytes.
pub const WINDOW_BYTES: u32 = 65_535;

/// Calls that stay open until this is dropped.
#[derive(Default)]
pub struct HeldCalls {
    connections: Vec<H2Client>,
    calls: Vec<(ResponseFuture, SendStream<Bytes>)>,
}

impl HeldCalls {
    /// Begins calls, sends `message` and then, if `ends`, the end of the stream. The window of each response is `window_bytes`.
    pub async fn begin(
        scene: &Scene,
        client: &Client,
        path: &str,
        count: usize,
        (message, ends): (Bytes, bool),
        window_bytes: u32,
    ) -> Self {
        let mut held = Self::default();
        for nth in 0..count {
            if nth % CALLS_PER_CONNECTION == 0 {
                held.connections.push(scene.abuser.open_h2(window_bytes).await);
            }
            let mut request = request_as(scene, client, path);
            request.headers_mut().insert("grpc-timeout", "10M".parse().unwrap());
            let ready = held.connections.last().unwrap().requests.clone().ready();
            let mut requests = timeout(HANG, ready).await.expect("the connection accepts no more calls").unwrap();
            let (response, mut stream) = requests.send_request(request, message.is_empty() && ends).unwrap();
            if !message.is_empty() {
                stream.send_data(message.clone(), ends).unwrap();
            }
            held.calls.push((response, stream));
        }
        held
    }

    /// Sends compressed messages, each of which ends its call.
    pub async fn begin_gzip(scene: &Scene, client: &Client, path: &str, count: usize, message: Bytes) -> Self {
        let mut held = Self::default();
        let mut requests = scene.abuser.open_h2(WINDOW_BYTES).await;
        for _ in 0..count {
            let mut request = request_as(scene, client, path);
            request.headers_mut().insert("grpc-encoding", "gzip".parse().unwrap());
            requests.requests = requests.requests.ready().await.unwrap();
            let (response, mut stream) = requests.requests.send_request(request, false).unwrap();
            stream.send_data(message.clone(), true).unwrap();
            held.calls.push((response, stream));
        }
        held.connections.push(requests);
        held
    }

    /// Waits until all responses have begun, and returns how many calls were admitted.
    pub async fn admitted(&mut self) -> usize {
        let heads = join_all(self.calls.iter_mut().map(|(response, _)| response));
        let heads = timeout(HANG, heads).await.expect("a call hangs");
        heads.into_iter().filter(|head| !head.as_ref().unwrap().headers().contains_key("grpc-status")).count()
    }
}

/// Builds the headers of a call by this client.
fn request_as(scene: &Scene, client: &Client, path: &str) -> http::Request<()> {
    let mut request = request(&scene.tracker, path);
    request.headers_mut().remove("authorization");
    if !client.token.is_empty() {
        request.headers_mut().insert("authorization", format!("Bearer {}", client.token).parse().unwrap());
    }
    request
}

/// Encodes a message and compresses it.
pub fn gzip_framed(message: &impl Message) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&message.encode_to_vec()).unwrap();
    let mut framed = framed_bytes(&encoder.finish().unwrap()).to_vec();
    framed[0] = 1;
    framed.into()
}

fn get_issue(id: &str) -> GetIssueRequest {
    GetIssueRequest { id: id.to_owned(), view: IssueView::Full.into() }
}

/// Waits until calls have reached the service.
async fn settle() {
    sleep(Duration::from_millis(200)).await;
}

pub async fn assert_held_calls_do_not_hurt(scene: &Scene, held: HeldCalls) {
    settle().await;
    scene.assert_others_succeed().await;
    drop(held);
    scene.assert_unharmed().await;
}

#[tokio::test]
async fn calls_whose_message_never_comes_do_not_hurt_others() {
    Scene::run(async |scene| {
        let message = (Bytes::new(), false);
        let viewer = &scene.tracker.viewer;
        let held =
            HeldCalls::begin(scene, viewer, "/issuetracker.v1.IssueService/GetIssue", CALLS, message, WINDOW_BYTES)
                .await;
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

#[tokio::test]
async fn calls_whose_message_comes_half_do_not_hurt_others() {
    Scene::run(async |scene| {
        let half = framed(&get_issue(&scene.others[0].issue_id)).slice(..20);
        let viewer = &scene.tracker.viewer;
        let held = HeldCalls::begin(
            scene,
            viewer,
            "/issuetracker.v1.IssueService/GetIssue",
            CALLS,
            (half, false),
            WINDOW_BYTES,
        )
        .await;
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

#[tokio::test]
async fn large_messages_that_come_half_leave_memory_for_others() {
    /// More than the share of a user of 256 MiB.
    const MESSAGES: usize = 100;
    Scene::run(async |scene| {
        let mut prefix = vec![0];
        prefix.extend(4_000_000_u32.to_be_bytes());
        prefix.resize(2_500_000, b'x');
        let (member, half) = (&scene.tracker.member, (prefix.into(), false));
        let held = HeldCalls::begin(
            scene,
            member,
            "/issuetracker.v1.IssueService/BatchCreateIssues",
            MESSAGES,
            half,
            WINDOW_BYTES,
        )
        .await;
        settle().await;
        // A large message of another user is read.
        let issue = Issue { title: "large".into(), description: "x".repeat(65_536), ..Issue::default() };
        let batch = BatchCreateIssuesRequest { issues: vec![issue; 20], ..Default::default() };
        let created = scene.others[0].client.issues().batch_create_issues(ordinary(batch)).await;
        created.expect("the message of another user is admitted");
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

#[tokio::test]
async fn small_responses_that_are_never_read_do_not_hurt_others() {
    Scene::run(async |scene| {
        let message = (framed(&get_issue(&scene.others[0].issue_id)), true);
        let viewer = &scene.tracker.viewer;
        let mut held =
            HeldCalls::begin(scene, viewer, "/issuetracker.v1.IssueService/GetIssue", CALLS, message, 0).await;
        assert!(held.admitted().await > 0);
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

/// Each call takes memory beside its message.
#[tokio::test]
async fn many_small_responses_that_are_never_read_do_not_hurt_others_or_fill_the_memory() {
    Scene::run(async |scene| {
        let (viewer, message) = (&scene.tracker.viewer, framed(&get_issue(&scene.others[0].issue_id)));
        let mut held = Vec::new();
        for _ in 0..if scene.is_measured() { 1_000 } else { 10 } {
            // Fewer calls at a time than one user has slots.
            let message = (message.clone(), true);
            let path = "/issuetracker.v1.IssueService/GetIssue";
            let mut calls = HeldCalls::begin(scene, viewer, path, REQUESTS_OF_ONE / 2, message, 0).await;
            calls.admitted().await;
            held.push(calls);
        }
        scene.assert_others_succeed().await;
        drop(held);
        scene.assert_unharmed().await;
    })
    .await;
}

/// The memory of responses that wait for their client is 256 MiB, of which one user may have 192 MiB.
#[tokio::test]
async fn large_responses_that_are_never_read_leave_memory_for_others() {
    const RESPONSES: usize = 85;
    const COMMENTS: usize = 45;
    Scene::run(async |scene| {
        let issue = Issue { title: "large".into(), description: "😀".repeat(65_536), ..Issue::default() };
        let id = scene.tracker.member.file_as(issue).await.id;
        for _ in 0..COMMENTS {
            let comment = Comment { issue_id: id.clone(), content: "😀".repeat(16_384), ..Comment::default() };
            let request = CreateCommentRequest { comment: Some(comment), ..Default::default() };
            scene.tracker.member.comments().create_comment(request).await.unwrap();
        }
        let large = get_issue(&id);
        let bytes = scene.tracker.viewer.get(&id).await.encoded_len();
        assert!(bytes > 3_000_000, "{bytes}");

        // Fewer calls at a time than there are slots.
        let viewer = &scene.tracker.viewer;
        let (mut held, mut admitted) = (Vec::new(), 0);
        for _ in 0..RESPONSES / 17 {
            let message = (framed(&large), true);
            let mut calls =
                HeldCalls::begin(scene, viewer, "/issuetracker.v1.IssueService/GetIssue", 17, message, 0).await;
            admitted += calls.admitted().await;
            held.push(calls);
        }
        assert!(
            admitted > 0 && admitted * bytes <= 192 * 1024 * 1024,
            "{admitted} responses of {bytes} bytes are held"
        );
        let another = scene.others[0].client.issues().get_issue(ordinary(large)).await;
        assert_eq!(another.expect("another user's large response is admitted").into_inner().encoded_len(), bytes);
        scene.assert_others_succeed().await;
        drop(held);
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn exports_that_are_never_read_leave_a_place_for_others() {
    const EXPORTS: usize = 40;
    Scene::run_with(&["--exports", "4", "--imports", "1"], async |scene| {
        let issue = Issue { title: "large".into(), description: "x".repeat(65_536), ..Issue::default() };
        let batch = BatchCreateIssuesRequest { issues: vec![issue; 20], ..Default::default() };
        scene.tracker.member.issues().batch_create_issues(batch).await.unwrap();
        let (viewer, message) = (&scene.tracker.viewer, (framed(&ExportIssuesRequest::default()), true));
        let held =
            HeldCalls::begin(scene, viewer, "/issuetracker.v1.IssueService/ExportIssues", EXPORTS, message, 0).await;
        settle().await;
        let another = scene.others[0].client.issues().export_issues(ExportIssuesRequest::default()).await;
        let first = another.expect("another user's export begins").into_inner().message().await;
        assert!(first.expect("another user's export is admitted").is_some());
        assert_held_calls_do_not_hurt(scene, held).await;
    })
    .await;
}

/// Each response is read at a few bytes a second.
#[tokio::test]
async fn slow_readers_of_many_pages_do_not_hurt_others() {
    const READERS: usize = 64;
    Scene::run(async |scene| {
        let issue = Issue { title: "page".into(), description: "x".repeat(1_000), ..Issue::default() };
        let batch = BatchCreateIssuesRequest { issues: vec![issue; 200], ..Default::default() };
        scene.tracker.member.issues().batch_create_issues(batch).await.unwrap();
        let list = ListIssuesRequest { page_size: 100, ..Default::default() };
        let (viewer, message) = (&scene.tracker.viewer, (framed(&list), true));
        let mut held =
            HeldCalls::begin(scene, viewer, "/issuetracker.v1.IssueService/ListIssues", READERS, message, 16).await;
        let readers: Vec<_> = held.calls.drain(..).map(|(response, _)| read_slowly(response)).collect();
        scene.assert_others_succeed().await;
        readers.iter().for_each(JoinHandle::abort);
        drop(held);
        scene.assert_unharmed().await;
    })
    .await;
}

fn read_slowly(response: ResponseFuture) -> JoinHandle<()> {
    tokio::spawn(async move {
        let Ok(response) = response.await else { return };
        let mut body = response.into_body();
        while let Some(Ok(data)) = body.data().await {
            sleep(Duration::from_millis(100)).await;
            let _ = body.flow_control().release_capacity(data.len());
        }
    })
}

#[tokio::test]
async fn calls_that_are_reset_at_once_do_not_hurt_others_or_open_database_sessions() {
    /// The service closes a connection with more resets that it has not processed.
    const RESETS_PER_CONNECTION: usize = 10;
    const RESETS: usize = 300;
    const SESSIONS_MAX: i64 = 10;
    Scene::run(async |scene| {
        let before = scene.sessions_opened().await;
        let viewer = &scene.tracker.viewer;
        let message = framed(&ListIssuesRequest { filter: "status = open".into(), ..Default::default() });
        let resets = async || {
            for _ in 0..RESETS / RESETS_PER_CONNECTION {
                let mut connection = scene.abuser.open_h2(WINDOW_BYTES).await;
                for nth in 0..RESETS_PER_CONNECTION {
                    let request = request_as(scene, viewer, "/issuetracker.v1.IssueService/ListIssues");
                    connection.requests = connection.requests.ready().await.unwrap();
                    let (_, mut stream) = connection.requests.send_request(request, false).unwrap();
                    stream.send_data(message.clone(), true).unwrap();
                    // Before, during and after the statement.
                    sleep(Duration::from_micros(500 * nth as u64)).await;
                    stream.send_reset(Reason::CANCEL);
                }
            }
        };
        scene.assert_others_succeed_during(resets).await;
        scene.assert_unharmed().await;
        let opened = scene.sessions_opened().await - before;
        assert!(opened <= SESSIONS_MAX, "{opened} sessions were opened");
    })
    .await;
}
