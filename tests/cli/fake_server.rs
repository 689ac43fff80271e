//! A fake server that implements imports and exports, interrupts their streams as configured, and records the requests.

use std::sync::MutexGuard;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc::Sender,
};
use tonic::transport::Server;

use super::*;

/// Bytes per commit. More than a chunk, so that an interruption loses uncommitted bytes.
const COMMIT_BYTES: usize = 300_000;
/// Bytes that a stream receives before it is interrupted.
const INTERRUPT_AFTER_BYTES: usize = 700_000;

#[derive(Clone)]
pub enum Interruption {
    Status(Status),
    /// The server ends the stream with OK, but without a summary.
    End,
}

#[derive(Clone)]
pub struct FakeServer(Arc<Mutex<State>>);

#[derive(Default)]
pub struct State {
    /// Each stream consumes one; once there are none, streams complete.
    pub interruptions: VecDeque<Interruption>,
    /// The options of every stream, in order.
    pub options: Vec<pb::ImportOptions>,
    pub committed: Vec<u8>,
    errors: Vec<pb::ImportRowError>,
    errors_sent: usize,
    /// The number of errors that ListImportErrors returns. With 0 it fails with NOT_FOUND.
    errors_listed: usize,
    export: Vec<String>,
    export_interruptions: VecDeque<Interruption>,
    pub export_requests: Vec<pb::ExportIssuesRequest>,
}

pub fn row_error(byte_offset: i64, line_number: i64) -> pb::ImportRowError {
    pb::ImportRowError { byte_offset, line_number, message: "is bad".to_owned(), ..Default::default() }
}

impl FakeServer {
    pub fn new() -> Self {
        Self(Arc::default())
    }

    pub fn with_interruptions(self, interruptions: Vec<Interruption>) -> Self {
        self.state().interruptions = interruptions.into();
        self
    }

    pub fn with_errors(self, errors: Vec<pb::ImportRowError>, sent: usize, listed: usize) -> Self {
        let mut state = self.state();
        (state.errors, state.errors_sent, state.errors_listed) = (errors, sent, listed);
        drop(state);
        self
    }

    pub fn with_export(self, chunks: Vec<String>, interruptions: Vec<Interruption>) -> Self {
        let mut state = self.state();
        (state.export, state.export_interruptions) = (chunks, interruptions.into());
        drop(state);
        self
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub async fn serve(self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server::builder()
            .add_service(pb::import_service_server::ImportServiceServer::new(self.clone()))
            .add_service(pb::issue_service_server::IssueServiceServer::new(self));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// Serves one import stream. Returns `None` when the stream is interrupted or the client has disconnected.
    async fn import(
        &self,
        mut requests: Streaming<pb::ImportIssuesRequest>,
        responses: &Sender<Result<pb::ImportIssuesResponse, Status>>,
    ) -> Option<()> {
        use pb::import_issues_request::Message as Sent;
        let Some(Sent::Options(options)) = requests.message().await.ok()??.message else {
            panic!("the first message must be the options")
        };
        let is_atomic = options.mode() == pb::ImportMode::Atomic;
        let (interruption, mut received) = {
            let mut state = self.state();
            state.options.push(options.clone());
            let committed = if is_atomic { Vec::new() } else { state.committed.clone() };
            (state.interruptions.pop_front(), committed)
        };
        let (start_offset, mut committed) = (received.len(), received.len());
        let response = |message| Ok(pb::ImportIssuesResponse { message: Some(message) });
        let progress = |received: usize, committed: usize| {
            response(Message::Progress(pb::ImportProgress {
                import_id: options.import_id.clone(),
                offset: received as i64,
                committed_offset: if is_atomic { 0 } else { committed as i64 },
                ..Default::default()
            }))
        };
        responses.send(progress(start_offset, committed)).await.ok()?;
        while let Some(request) = requests.message().await.ok()? {
            let Some(Sent::Chunk(chunk)) = request.message else { panic!("options are sent only once") };
            let duplicate_bytes = received.len().checked_sub(chunk.offset as usize).expect("no gap");
            received.extend_from_slice(&chunk.data[duplicate_bytes.min(chunk.data.len())..]);
            if received.len() - committed >= COMMIT_BYTES {
                committed = received.len();
                if !is_atomic {
                    self.state().committed = received.clone();
                }
                responses.send(progress(received.len(), committed)).await.ok()?;
            }
            match &interruption {
                Some(interruption) if received.len() - start_offset >= INTERRUPT_AFTER_BYTES => {
                    if let Interruption::Status(status) = interruption {
                        responses.send(Err(status.clone())).await.ok()?;
                    }
                    return None;
                }
                _ => {}
            }
        }
        let (errors, error_count) = {
            let mut state = self.state();
            let size = received.len() as i64;
            assert!(options.total_bytes == 0 || options.total_bytes == size);
            state.committed = received;
            (state.errors[..state.errors_sent].to_vec(), state.errors.len() as i64)
        };
        for error in errors {
            responses.send(response(Message::RowError(error))).await.ok()?;
        }
        let summary = pb::ImportSummary {
            import_id: options.import_id.clone(),
            state: pb::ImportState::Committed.into(),
            error_count,
            rejected_count: error_count,
            ..Default::default()
        };
        responses.send(response(Message::Summary(summary))).await.ok()
    }
}

#[tonic::async_trait]
impl pb::import_service_server::ImportService for FakeServer {
    type ImportIssuesStream = ReceiverStream<Result<pb::ImportIssuesResponse, Status>>;

    async fn import_issues(
        &self,
        request: Request<Streaming<pb::ImportIssuesRequest>>,
    ) -> Result<Response<Self::ImportIssuesStream>, Status> {
        assert_eq!(request.metadata().get("authorization").unwrap(), "Bearer itk_x");
        let (responses, stream) = tokio::sync::mpsc::channel(16);
        let fake = self.clone();
        tokio::spawn(async move { fake.import(request.into_inner(), &responses).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn list_import_errors(
        &self,
        request: Request<pb::ListImportErrorsRequest>,
    ) -> Result<Response<pb::ListImportErrorsResponse>, Status> {
        let request = request.into_inner();
        let state = self.state();
        if state.errors_listed == 0 {
            return Err(status_with_reason(Code::NotFound, "NOT_FOUND"));
        }
        let start_offset: usize = request.page_token.parse().unwrap_or(0);
        let end = (start_offset + request.page_size as usize).min(state.errors_listed);
        let next_page_token = if end < state.errors_listed { end.to_string() } else { String::new() };
        Ok(Response::new(pb::ListImportErrorsResponse {
            errors: state.errors[start_offset..end].to_vec(),
            next_page_token,
        }))
    }

    async fn get_import(&self, _: Request<pb::GetImportRequest>) -> Result<Response<pb::Import>, Status> {
        unimplemented!()
    }

    async fn revert_import(
        &self,
        _: Request<pb::RevertImportRequest>,
    ) -> Result<Response<pb::RevertImportResponse>, Status> {
        unimplemented!()
    }
}

#[tonic::async_trait]
impl pb::issue_service_server::IssueService for FakeServer {
    type ExportIssuesStream = ReceiverStream<Result<pb::ExportIssuesResponse, Status>>;

    async fn export_issues(
        &self,
        request: Request<pb::ExportIssuesRequest>,
    ) -> Result<Response<Self::ExportIssuesStream>, Status> {
        let (chunks, interruption) = {
            let mut state = self.state();
            state.export_requests.push(request.into_inner());
            (state.export.clone(), state.export_interruptions.pop_front())
        };
        let (responses, stream) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut row_count = 0;
            for (index, chunk) in chunks.into_iter().enumerate() {
                if let (1, Some(Interruption::Status(status))) = (index, &interruption) {
                    return responses.send(Err(status.clone())).await.ok();
                }
                row_count += chunk.lines().filter(|line| line.starts_with("row")).count() as i64;
                responses.send(Ok(pb::ExportIssuesResponse { data: chunk.into(), row_count })).await.ok()?;
            }
            Some(())
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn create_issue(&self, _: Request<pb::CreateIssueRequest>) -> Result<Response<pb::Issue>, Status> {
        unimplemented!()
    }

    async fn batch_create_issues(
        &self,
        _: Request<pb::BatchCreateIssuesRequest>,
    ) -> Result<Response<pb::BatchCreateIssuesResponse>, Status> {
        unimplemented!()
    }

    async fn get_issue(&self, _: Request<pb::GetIssueRequest>) -> Result<Response<pb::Issue>, Status> {
        unimplemented!()
    }

    async fn batch_get_issues(
        &self,
        _: Request<pb::BatchGetIssuesRequest>,
    ) -> Result<Response<pb::BatchGetIssuesResponse>, Status> {
        unimplemented!()
    }

    async fn list_issues(&self, _: Request<pb::ListIssuesRequest>) -> Result<Response<pb::ListIssuesResponse>, Status> {
        unimplemented!()
    }

    async fn update_issue(&self, _: Request<pb::UpdateIssueRequest>) -> Result<Response<pb::Issue>, Status> {
        unimplemented!()
    }

    async fn delete_issue(&self, _: Request<pb::DeleteIssueRequest>) -> Result<Response<pb::Issue>, Status> {
        unimplemented!()
    }

    async fn undelete_issue(&self, _: Request<pb::UndeleteIssueRequest>) -> Result<Response<pb::Issue>, Status> {
        unimplemented!()
    }

    async fn bulk_update_status(
        &self,
        _: Request<pb::BulkUpdateStatusRequest>,
    ) -> Result<Response<pb::BulkUpdateStatusResponse>, Status> {
        unimplemented!()
    }
}

/// A TCP proxy that closes each of the first connections after a given number of bytes from the client.
pub struct Proxy;

impl Proxy {
    pub async fn start(server: SocketAddr, close_after_bytes: impl Into<VecDeque<usize>>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut interruptions = close_after_bytes.into();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let remaining_bytes = interruptions.pop_front().unwrap_or(usize::MAX);
                tokio::spawn(Self::connect(client, server, remaining_bytes));
            }
        });
        address
    }

    async fn connect(client: TcpStream, server: SocketAddr, mut remaining_bytes: usize) -> Option<()> {
        let server = TcpStream::connect(server).await.ok()?;
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let responses = tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        let mut buffer = vec![0; 16 * 1024];
        while remaining_bytes > 0 {
            let count = from_client.read(&mut buffer).await.ok()?.min(remaining_bytes);
            if count == 0 {
                return None;
            }
            to_server.write_all(&buffer[..count]).await.ok()?;
            remaining_bytes -= count;
        }
        responses.abort();
        None
    }
}
