//! Streams of ImportIssues that import nothing.

use std::time::Duration;

use issue_tracker::pb::{
    ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportOptions, import_issues_request::Message,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use super::Scene;
use crate::{harness::Client, support::bounds::HANG};

/// More than `--imports`.
const IMPORTS: usize = 40;

/// An import whose client has not ended it.
struct OpenImport {
    sender: mpsc::Sender<ImportIssuesRequest>,
    _responses: Result<Streaming<ImportIssuesResponse>, Status>,
}

impl OpenImport {
    async fn begin(client: &Client) -> Self {
        let (sender, requests) = mpsc::channel(4);
        let responses = client.imports().import_issues(ReceiverStream::new(requests)).await;
        Self { sender, _responses: responses.map(tonic::Response::into_inner) }
    }

    /// Sends a message. Returns whether the import is still open.
    async fn send(&self, message: Message) -> bool {
        self.sender.send(ImportIssuesRequest { message: Some(message) }).await.is_ok()
    }
}

fn options() -> Message {
    Message::Options(ImportOptions { import_id: Uuid::now_v7().into(), ..Default::default() })
}

fn chunk(offset: usize, data: &str) -> Message {
    Message::Chunk(ImportChunk { offset: offset as i64, data: data.as_bytes().to_vec().into() })
}

/// Asserts that another user can import meanwhile.
async fn assert_another_imports(scene: &Scene) {
    let file = [options(), chunk(0, "title\none\ntwo\n")].map(|message| ImportIssuesRequest { message: Some(message) });
    let mut imports = scene.others[0].client.imports();
    let import = async {
        let mut responses = imports.import_issues(tokio_stream::iter(file)).await?.into_inner();
        while responses.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    timeout(HANG, import).await.expect("another user's import hangs").expect("another user's import is admitted");
}

async fn assert_imports_do_not_hurt(scene: Scene, imports: Vec<OpenImport>) {
    sleep(Duration::from_millis(100)).await;
    assert_another_imports(&scene).await;
    scene.assert_others_succeed().await;
    drop(imports);
    scene.assert_unharmed().await;
}

#[tokio::test]
async fn imports_that_send_nothing_do_not_hurt_others() {
    let scene = Scene::start().await;
    let (member, mut imports) = (scene.member(), Vec::new());
    for _ in 0..IMPORTS {
        imports.push(OpenImport::begin(&member).await);
    }
    assert_imports_do_not_hurt(scene, imports).await;
}

#[tokio::test]
async fn imports_that_send_only_options_leave_a_place_for_others() {
    let scene = Scene::start().await;
    let (member, mut imports) = (scene.member(), Vec::new());
    for _ in 0..IMPORTS {
        let import = OpenImport::begin(&member).await;
        import.send(options()).await;
        imports.push(import);
    }
    assert_imports_do_not_hurt(scene, imports).await;
}

#[tokio::test]
async fn imports_of_blank_lines_leave_a_place_for_others() {
    const LINES: &str = "\n\n\n\n\n\n\n\n";
    let scene = Scene::start().await;
    let (member, mut trickles) = (scene.member(), JoinSet::new());
    for _ in 0..IMPORTS {
        let import = OpenImport::begin(&member).await;
        trickles.spawn(async move {
            import.send(options()).await;
            import.send(chunk(0, "title\n")).await;
            let mut offset = "title\n".len();
            while import.send(chunk(offset, LINES)).await {
                offset += LINES.len();
                sleep(Duration::from_millis(20)).await;
            }
        });
    }
    sleep(Duration::from_millis(100)).await;
    assert_another_imports(&scene).await;
    scene.assert_others_succeed().await;
    trickles.shutdown().await;
    scene.assert_unharmed().await;
}
