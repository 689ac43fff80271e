//! Tests that an import resumes after the service or the database is killed.

use issue_tracker::pb::{
    ImportChunk, ImportIssuesRequest, ImportIssuesResponse, ImportMode, ImportOptions, ImportState, ImportSummary,
    OnExisting, import_issues_request, import_issues_response::Message, import_service_client::ImportServiceClient,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::*;

const SERVICE_KILLS: usize = 20;
const DATABASE_KILLS: usize = 5;
const ROWS_PER_KILL: usize = 1_500;
const CHUNK_BYTES: usize = 256 * 1024;

/// An import stream whose first progress response has been received.
struct ImportStream {
    committed_offset: usize,
    requests: tokio::sync::mpsc::Sender<ImportIssuesRequest>,
    responses: Streaming<ImportIssuesResponse>,
}

fn request(message: import_issues_request::Message) -> ImportIssuesRequest {
    ImportIssuesRequest { message: Some(message) }
}

async fn try_open_import(
    service: &Service,
    token: &str,
    options: &ImportOptions,
) -> Result<ImportStream, tonic::Status> {
    let (requests, stream) = tokio::sync::mpsc::channel(1_000);
    requests.send(request(import_issues_request::Message::Options(options.clone()))).await.unwrap();
    let mut client = ImportServiceClient::new(service.channel());
    let mut responses = client.import_issues(with_token(token, ReceiverStream::new(stream))).await?.into_inner();
    match responses.message().await?.unwrap().message {
        Some(Message::Progress(first)) => {
            Ok(ImportStream { committed_offset: first.committed_offset as usize, requests, responses })
        }
        other => panic!("the first response is not a progress: {other:?}"),
    }
}

/// Retries until the import is accepted: a killed process takes a moment to exit and to restart.
async fn open_import(service: &Service, token: &str, options: &ImportOptions) -> ImportStream {
    let began = Instant::now();
    loop {
        match try_open_import(service, token, options).await {
            Ok(stream) => return stream,
            Err(status) => {
                assert!([Code::Aborted, Code::Unavailable].contains(&status.code()), "{status:?}");
                assert!(began.elapsed() < HANG, "{status:?}");
                tokio::time::sleep(TICK).await;
            }
        }
    }
}

impl ImportStream {
    /// Sends the file from the committed offset to `end`.
    async fn send(&self, file: &[u8], end: usize) {
        let mut offset = self.committed_offset;
        while offset < end {
            let piece = &file[offset..end.min(offset + CHUNK_BYTES)];
            let chunk = ImportChunk { offset: offset as i64, data: piece.to_vec().into() };
            // Sending fails once the stream has failed; `finish` reports why.
            let _ = self.requests.send(request(import_issues_request::Message::Chunk(chunk))).await;
            offset += piece.len();
        }
    }

    async fn finish(mut self) -> ImportSummary {
        drop(self.requests);
        loop {
            if let Some(Message::Summary(summary)) = self.responses.message().await.unwrap().unwrap().message {
                return summary;
            }
        }
    }
}

fn file_with_bad_rows(rows: usize) -> Vec<u8> {
    let row = |n: usize| match n % 50 {
        0 => format!("issue {n},{n},opne,\r\n"),
        7 => format!("twice,{},,bug\r\n", n - 3),
        _ => format!("issue {n},{n},closed,\"bug;\r\nui {}\"\r\n", n % 9),
    };
    (1..=rows).fold("title,external_id,status,labels\r\n".to_owned(), |file, n| file + &row(n)).into_bytes()
}

/// Returns the issues, row errors and events that an import wrote, without ids and times.
async fn import_result(external: &External, import_id: &str) -> Vec<String> {
    const SQL: &str = "SELECT jsonb_build_array(title, external_id, status, version, close_time IS NOT NULL,
            (SELECT array_agg(l.name ORDER BY l.name) FROM issue_labels il JOIN labels l ON l.id = il.label_id
                WHERE il.issue_id = i.id))::text FROM issues i
        UNION ALL SELECT to_jsonb(e)::text FROM (SELECT position, row_number, line_number, byte_offset, value, code
            FROM import_errors WHERE import_id = $1::text::uuid) e
        UNION ALL SELECT field || version FROM issue_events
        ORDER BY 1";
    session(&external.config()).await.query(SQL, &[&import_id]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

async fn committed_offset(external: &External, import_id: &str) -> usize {
    const SQL: &str = "SELECT committed_offset FROM imports WHERE id = $1::text::uuid";
    let row = session(&external.config()).await.query_one(SQL, &[&import_id]).await.unwrap();
    row.get::<_, i64>(0) as usize
}

#[tokio::test(flavor = "multi_thread")]
async fn import_interrupted_by_20_service_and_5_database_kills_has_the_result_of_an_uninterrupted_import() {
    let external = External::start(Durability::Durable);
    create_user(&external.url(), &["--role", "admin", "ada"], SECRET);
    let start = || Service::on(&external, &["--bcrypt-cost", "4"]);
    let mut service = start();
    let token = login(&service, "ada", SECRET).await.unwrap();
    let kills = SERVICE_KILLS + DATABASE_KILLS;
    let file = file_with_bad_rows(kills * ROWS_PER_KILL);
    let options = || ImportOptions {
        import_id: Uuid::now_v7().to_string(),
        mode: ImportMode::SkipInvalid.into(),
        on_existing: OnExisting::Update.into(),
        total_bytes: file.len() as i64,
        create_labels: true,
        ..Default::default()
    };
    let uninterrupted = options();
    let stream = open_import(&service, &token, &uninterrupted).await;
    stream.send(&file, file.len()).await;
    let expected_summary = stream.finish().await;
    let expected_rows = import_result(&external, &uninterrupted.import_id).await;
    assert!(expected_rows.len() > kills * ROWS_PER_KILL - 1_000, "{expected_summary:?}");
    let truncate = "TRUNCATE issues, issue_labels, comments, import_issues, issue_events";
    session(&external.config()).await.batch_execute(truncate).await.unwrap();

    let interrupted = options();
    let mut resumed = 0;
    for kill in 0..kills {
        let stream = open_import(&service, &token, &interrupted).await;
        resumed += usize::from(stream.committed_offset > 0);
        let end = file.len() * (kill + 1) / (kills + 1);
        stream.send(&file, end).await;
        // The kill comes at different moments: soon after the send, or once a batch is committed.
        if end - stream.committed_offset > file.len() / (kills * ROWS_PER_KILL) * 6_000 {
            eventually("a batch is committed", async || {
                committed_offset(&external, &interrupted.import_id).await != stream.committed_offset
            })
            .await;
        } else {
            tokio::time::sleep(Duration::from_millis((kill as u64 * 37) % 150)).await;
        }
        if kill % 5 == 4 {
            let server = external.cluster.server_pid();
            assert!(signal(server, libc::SIGKILL));
            wait_until("postgres is restarted", || external.cluster.server_pid() != server);
        } else {
            service.kill();
            service = start();
        }
    }
    let stream = open_import(&service, &token, &interrupted).await;
    assert!(
        stream.committed_offset > file.len() / 2 && resumed > kills / 2,
        "only {resumed} imports resumed from a committed offset"
    );
    stream.send(&file, file.len()).await;
    let summary = stream.finish().await;

    assert_eq!(summary.state(), ImportState::Committed);
    assert_eq!(summary, ImportSummary { import_id: interrupted.import_id.clone(), ..expected_summary });
    let rows = import_result(&external, &interrupted.import_id).await;
    assert_eq!(rows.len(), expected_rows.len());
    assert!(rows == expected_rows, "the rows differ from those of the uninterrupted import");
    assert_eq!(service.stop().code(), Some(0));
}
