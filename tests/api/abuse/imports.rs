//! Streams of ImportIssues that import nothing, or slowly, and imports in a loop.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use issue_tracker::pb::{
    AddIssueLabelsRequest, CreateIssueRequest, DeleteIssueRequest, DeleteLabelRequest, ImportChunk,
    ImportIssuesRequest, ImportIssuesResponse, ImportOptions, ImportState, ImportSummary, Issue, ListIssuesRequest,
    OnExisting, UpdateIssueRequest, import_issues_request::Message, import_issues_response,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use uuid::Uuid;

use super::{Flood, Scene, ordinary};
use crate::{harness::Client, support::bounds::HANG};

/// More than `--imports`.
const IMPORTS: usize = 40;

/// An import whose client has not ended it.
struct OpenImport {
    sender: mpsc::Sender<ImportIssuesRequest>,
    responses: Result<Streaming<ImportIssuesResponse>, Status>,
}

impl OpenImport {
    async fn begin(client: &Client) -> Self {
        let (sender, requests) = mpsc::channel(4);
        let responses = client.imports().import_issues(ReceiverStream::new(requests)).await;
        Self { sender, responses: responses.map(tonic::Response::into_inner) }
    }

    /// Sends a message. Returns whether the import is still open.
    async fn send(&self, message: Message) -> bool {
        self.sender.send(ImportIssuesRequest { message: Some(message) }).await.is_ok()
    }

    /// Waits until the server has received this many rows.
    async fn wait_until_received(&mut self, rows: i64) {
        let responses = self.responses.as_mut().expect("the import is admitted");
        loop {
            let response = responses.message().await.unwrap().unwrap();
            if let Some(import_issues_response::Message::Progress(progress)) = response.message
                && progress.row_count >= rows
            {
                return;
            }
        }
    }

    async fn finish(self) -> ImportSummary {
        drop(self.sender);
        let mut responses = self.responses.expect("the import is admitted");
        let mut summary = None;
        while let Some(response) = responses.message().await.unwrap() {
            if let Some(import_issues_response::Message::Summary(last)) = response.message {
                summary = Some(last);
            }
        }
        summary.expect("the import has a summary")
    }
}

fn options() -> Message {
    Message::Options(ImportOptions { import_id: Uuid::now_v7().into(), ..Default::default() })
}

fn chunk(offset: usize, data: &str) -> Message {
    Message::Chunk(ImportChunk { offset: offset as i64, data: data.as_bytes().to_vec().into() })
}

/// Imports a file of one chunk.
async fn import(client: &Client, file: &str) -> Result<(), Status> {
    let messages = [options(), chunk(0, file)].map(|message| ImportIssuesRequest { message: Some(message) });
    let mut responses = client.imports().import_issues(tokio_stream::iter(messages)).await?.into_inner();
    while responses.message().await?.is_some() {}
    Ok(())
}

/// Asserts that another user can import meanwhile.
async fn assert_another_imports(scene: &Scene) {
    let import = import(&scene.others[0].client, "title\none\ntwo\n");
    timeout(HANG, import).await.expect("another user's import hangs").expect("another user's import is admitted");
}

async fn assert_imports_do_not_hurt(scene: &Scene, imports: Vec<OpenImport>) {
    sleep(Duration::from_millis(100)).await;
    assert_another_imports(scene).await;
    scene.assert_others_succeed().await;
    drop(imports);
    scene.assert_unharmed().await;
}

#[tokio::test]
async fn imports_that_send_nothing_do_not_hurt_others() {
    Scene::run(async |scene| {
        let (member, mut imports) = (scene.member(), Vec::new());
        for _ in 0..IMPORTS {
            imports.push(OpenImport::begin(&member).await);
        }
        assert_imports_do_not_hurt(scene, imports).await;
    })
    .await;
}

#[tokio::test]
async fn imports_that_send_only_options_leave_a_place_for_others() {
    Scene::run(async |scene| {
        let (member, mut imports) = (scene.member(), Vec::new());
        for _ in 0..IMPORTS {
            let import = OpenImport::begin(&member).await;
            import.send(options()).await;
            imports.push(import);
        }
        assert_imports_do_not_hurt(scene, imports).await;
    })
    .await;
}

#[tokio::test]
async fn imports_of_blank_lines_leave_a_place_for_others() {
    const LINES: &str = "\n\n\n\n\n\n\n\n";
    Scene::run(async |scene| {
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
        assert_another_imports(scene).await;
        scene.assert_others_succeed().await;
        trickles.shutdown().await;
        scene.assert_unharmed().await;
    })
    .await;
}

#[tokio::test]
async fn imports_in_a_loop_leave_a_place_for_others() {
    Scene::run(async |scene| {
        let (member, rows) = (scene.member(), if scene.is_measured() { 20_000 } else { 500 });
        let rows: Vec<_> = (0..rows).map(|nth| format!("row {nth},open,what happens and how to see it\n")).collect();
        let file: Arc<str> = format!("title,status,description\n{}", rows.concat()).into();
        let flood = Flood::start(IMPORTS as u32, move |_| {
            let (member, file) = (member.clone(), Arc::clone(&file));
            async move { import(&member, &file).await }
        });
        let flood = flood.await;
        assert_another_imports(scene).await;
        scene.assert_others_succeed().await;
        // A client that still sends its file when the import is refused may not receive the status.
        flood.stop(&["Ok", "ResourceExhausted", "Cancelled", "Unknown"]).await;
        scene.assert_unharmed().await;
    })
    .await;
}

/// The issues that a trickling import updates, and that other clients update meanwhile.
const UPDATED: usize = 20;

/// Returns a file of more than a batch that creates or updates issues, of which the first have a label.
fn update_file(title: &str) -> String {
    let row = |n: usize| format!("{title} {n},{n},{}\n", if n <= UPDATED { "imported" } else { "" });
    (1..=5_010).fold("title,external_id,labels\n".to_owned(), |file, n| file + &row(n))
}

/// Calls of other users that are unrelated to the import: label changes, deletes, and creates with external ids.
async fn change_unrelated_issues(scene: &Scene) -> Vec<Result<(), Status>> {
    let outcomes = scene.others.iter().enumerate().map(async |(nth, other)| {
        let mut issues = other.client.issues();
        let label_id = other.client.label(&format!("label {nth}")).await.id;
        let external_id = format!("unrelated {nth}");
        let issue = Issue { title: "unrelated".into(), external_id, ..Issue::default() };
        let created = issues.create_issue(ordinary(CreateIssueRequest { issue: Some(issue), ..Default::default() }));
        let issue_id = created.await?.into_inner().id;
        let label_ids = vec![label_id.clone()];
        let add = AddIssueLabelsRequest { issue_id: issue_id.clone(), label_ids, ..Default::default() };
        other.client.labels().add_issue_labels(ordinary(add)).await?;
        issues.delete_issue(ordinary(DeleteIssueRequest { id: issue_id, ..Default::default() })).await?;
        let delete = DeleteLabelRequest { id: label_id, force: true, ..Default::default() };
        other.client.labels().delete_label(ordinary(delete)).await.map(drop)
    });
    join_all(outcomes).await
}

#[tokio::test]
async fn updates_that_trickle_in_lock_none_of_their_issues() {
    for validate_only in [false, true] {
        Scene::run(async |scene| {
            let member = scene.member();
            let send = async |file: &str, options: ImportOptions| {
                let import = OpenImport::begin(&member).await;
                import.send(Message::Options(options)).await;
                import.send(chunk(0, file)).await;
                import
            };
            let creating = ImportOptions { create_labels: true, ..Default::default() };
            assert_eq!(send(&update_file("before"), creating).await.finish().await.state(), ImportState::Committed);
            let list = ListIssuesRequest { filter: "label = imported".into(), page_size: 100, ..Default::default() };
            let touched = member.issues().list_issues(list).await.unwrap().into_inner().issues;
            assert_eq!(touched.len(), UPDATED);

            let file = update_file("after");
            let options = ImportOptions { on_existing: OnExisting::Update.into(), validate_only, ..Default::default() };
            let mut import = send(&file[..file.len() - 1], options).await;
            import.wait_until_received(5_000).await;
            let updates = touched.into_iter().enumerate().map(|(nth, Issue { id, .. })| {
                let mut issues = scene.others[nth % scene.others.len()].client.issues();
                let issue = Some(Issue { id, title: "touched".into(), ..Issue::default() });
                let update = UpdateIssueRequest { issue, comment: "touched".into(), ..Default::default() };
                tokio::spawn(async move { issues.update_issue(ordinary(update)).await.map(drop) })
            });
            let updates: Vec<_> = updates.collect();
            for outcome in change_unrelated_issues(scene).await {
                outcome.expect("an unrelated change succeeds");
            }
            for update in join_all(updates).await {
                update.unwrap().expect("an issue of the import can be updated");
            }
            scene.assert_others_succeed().await;

            import.send(chunk(file.len() - 1, "\n")).await;
            assert_eq!(import.finish().await.updated_count, 5_010);
            scene.assert_unharmed().await;
        })
        .await;
    }
}
