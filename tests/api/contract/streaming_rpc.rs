//! A server-streaming and a client-streaming RPC that the middleware has no code for, behind the real middleware and
//! transport.
//!
//! All that the middleware knows of them are their entries in the method table, which `build.rs` generates for declared
//! methods.

use std::{
    convert::Infallible,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, Ready, join_all, ready},
    stream::{self, BoxStream},
};
use issue_tracker::{
    auth::{Auth, Caller},
    middleware::{
        method_policy::{CallPolicy, ResponseSize},
        method_table::RequiredRole,
    },
    server::{methods, middleware_stack},
    transport::listener::{self, ConnectionTrackers},
};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    client::Grpc,
    server::{ClientStreamingService, NamedService, ServerStreamingService},
    service::Routes,
    transport::{Channel, Endpoint},
};
use tower::Service;

use crate::{
    credentials::{ENDS_WITHIN, End},
    harness::{Client, Tracker, advance_clock, assert_error, limits},
    support::{bounds::HANG, codec::BytesCodec, eventually::eventually},
};

const WATCH_PATH: &str = "/test.v1.StreamService/Watch";
const UPLOAD_PATH: &str = "/test.v1.StreamService/Upload";

#[derive(Clone)]
struct StreamService;

impl NamedService for StreamService {
    const NAME: &'static str = "test.v1.StreamService";
}

impl Service<http::Request<Body>> for StreamService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(BytesCodec);
            match request.uri().path() {
                UPLOAD_PATH => Ok(grpc.client_streaming(Upload, request).await),
                _ => Ok(grpc.server_streaming(Watch, request).await),
            }
        })
    }
}

/// Streams the caller's id, and then nothing more.
struct Watch;

impl ServerStreamingService<Bytes> for Watch {
    type Response = Vec<u8>;
    type ResponseStream = BoxStream<'static, Result<Vec<u8>, Status>>;
    type Future = Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let caller = Caller::of(&request).unwrap();
        let first = stream::iter([Ok(caller.user_id.to_string().into_bytes())]);
        ready(Ok(Response::new(first.chain(stream::pending()).boxed())))
    }
}

/// Receives messages, and responds when the client has sent all of them.
struct Upload;

impl ClientStreamingService<Bytes> for Upload {
    type Response = Vec<u8>;
    type Future = BoxFuture<'static, Result<Response<Vec<u8>>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        let mut messages = request.into_inner();
        Box::pin(async move {
            while messages.message().await?.is_some() {}
            Ok(Response::new(Vec::new()))
        })
    }
}

/// A server of `StreamService` only, which admits one call at a time, on the database of a tracker.
struct StreamServer {
    channel: Channel,
    stopping: CancellationToken,
    _stop: DropGuard,
}

impl StreamServer {
    async fn start(tracker: &Tracker) -> Self {
        let policy = CallPolicy {
            method: 0,
            is_own: true,
            client_streaming: false,
            server_streaming: true,
            only_reads: true,
            required_role: RequiredRole::Member,
            default_deadline: None,
            response_size: ResponseSize::SMALL,
        };
        let limits = limits(&["--requests", "1"]);
        let upload = CallPolicy { client_streaming: true, server_streaming: false, ..policy };
        let methods = methods().unwrap().with_method(WATCH_PATH, policy).with_method(UPLOAD_PATH, upload);
        let auth = Auth::new(tracker.db.clone(), 4).unwrap();
        let stopping = CancellationToken::new();
        let routes = Routes::new(StreamService);
        let service = middleware_stack(methods, auth, limits.requests(), stopping.clone(), routes);
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let trackers = ConnectionTrackers::default();
        tokio::spawn(listener::serve(tcp.into(), service, limits.connections(), stopping.clone(), trackers));
        let channel = Endpoint::try_from(format!("http://{address}")).unwrap().connect_lazy();
        Self { channel, _stop: stopping.clone().drop_guard(), stopping }
    }

    async fn watch(&self, client: &Client, deadline: Option<Duration>) -> Result<Streaming<Bytes>, Status> {
        let mut request = request(client, stream::iter([Vec::new()]));
        if let Some(deadline) = deadline {
            request.set_timeout(deadline);
        }
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let response = timeout(HANG, grpc.streaming(request, WATCH_PATH.parse().unwrap(), BytesCodec)).await;
        Ok(response.expect("the call gets no response")?.into_inner())
    }

    /// Sends a message, and no more. Fails if there is no response within [`ENDS_WITHIN`].
    async fn upload(&self, client: &Client) -> Result<Response<Bytes>, Status> {
        let messages = stream::iter([Vec::new()]).chain(stream::pending());
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.unwrap();
        let response = grpc.client_streaming(request(client, messages), UPLOAD_PATH.parse().unwrap(), BytesCodec);
        timeout(ENDS_WITHIN, response).await.expect("the call does not end")
    }
}

/// Returns a request with the token of a client.
fn request<T>(client: &Client, messages: T) -> Request<T> {
    let mut request = Request::new(messages);
    request.metadata_mut().insert("authorization", format!("Bearer {}", client.token).parse().unwrap());
    request
}

/// Returns the next message, or `None` at the end of the stream. Panics after [`HANG`].
async fn next(watch: &mut Streaming<Bytes>) -> Result<Option<Bytes>, Status> {
    timeout(HANG, watch.message()).await.expect("the stream neither continues nor ends")
}

#[tokio::test]
async fn a_new_streaming_rpc_is_authenticated_authorized_and_streams() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let unauthenticated = tracker.client_with_token(Some("itk_none"));
    assert_error(server.watch(&unauthenticated, None).await, Code::Unauthenticated, "UNAUTHENTICATED");
    assert_error(server.watch(&tracker.viewer, None).await, Code::PermissionDenied, "PERMISSION_DENIED");
    let mut watch = server.watch(&tracker.member, None).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().unwrap(), tracker.member.user.id.as_bytes());
}

#[tokio::test]
async fn a_new_streaming_rpc_holds_a_request_slot_until_it_ends() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let mut watch = server.watch(&tracker.member, None).await.unwrap();
    next(&mut watch).await.unwrap().unwrap();
    assert_error(server.watch(&tracker.member, None).await, Code::ResourceExhausted, "OVERLOADED");
    drop(watch);
    eventually("the slot is free", async || server.watch(&tracker.member, None).await.is_ok()).await;
}

#[tokio::test]
async fn a_new_streaming_rpc_ends_at_its_deadline() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let mut watch = server.watch(&tracker.member, Some(Duration::from_millis(500))).await.unwrap();
    next(&mut watch).await.unwrap().unwrap();
    assert_error(next(&mut watch).await, Code::DeadlineExceeded, "DEADLINE");
}

#[tokio::test]
async fn a_new_streaming_rpc_ends_at_the_shutdown() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let mut watch = server.watch(&tracker.member, None).await.unwrap();
    next(&mut watch).await.unwrap().unwrap();
    server.stopping.cancel();
    assert_error(next(&mut watch).await, Code::Unavailable, "STOPPING");
}

#[tokio::test]
async fn a_new_streaming_rpc_ends_within_5_s_of_its_credentials() {
    let tracker = Tracker::start().await;
    let cases = End::ALL.map(async |end| {
        let server = StreamServer::start(&tracker).await;
        let member = end.member(&tracker, &format!("{end:?}")).await;
        let mut watch = server.watch(&member, None).await.unwrap();
        next(&mut watch).await.unwrap().unwrap();

        // The server has a cache of its own, as another replica has.
        end.apply(&tracker, &member).await;

        let ended = timeout(ENDS_WITHIN, watch.message()).await;
        let (code, reason) = end.error();
        assert_error(ended.unwrap_or_else(|_| panic!("{end:?} does not end the stream")), code, reason);
    });
    join_all(cases).await;
}

#[tokio::test]
async fn a_new_streaming_rpc_continues_while_its_credentials_are_valid() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let mut watch = server.watch(&tracker.member, None).await.unwrap();
    next(&mut watch).await.unwrap().unwrap();
    for _ in 0..60 {
        advance_clock(Duration::from_secs(1)).await;
    }
    let ended = timeout(Duration::from_secs(1), watch.message()).await;
    assert!(ended.is_err(), "{ended:?}");
}

/// Ends the sessions of the service, and lets it open no new ones.
async fn refuse_sessions(tracker: &Tracker) {
    let superuser = tracker.session().await;
    let database: String = superuser.query_one("SELECT current_database()", &[]).await.unwrap().get(0);
    superuser.batch_execute(&format!("ALTER DATABASE {database} CONNECTION LIMIT 0")).await.unwrap();
    let terminate = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
        WHERE pid <> pg_backend_pid() AND datname = current_database()";
    superuser.query(terminate, &[]).await.unwrap();
}

#[tokio::test]
async fn a_new_streaming_rpc_ends_when_its_credentials_could_not_be_checked_for_30_s() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let mut watch = server.watch(&tracker.member, None).await.unwrap();
    next(&mut watch).await.unwrap().unwrap();
    refuse_sessions(&tracker).await;
    // The cache of tokens does not use the clock of the test. A stream relies on a look-up of the last 2 s.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let pass_seconds = async |seconds| {
        for _ in 0..seconds {
            advance_clock(Duration::from_secs(1)).await;
            // A look-up fails meanwhile.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };

    pass_seconds(20).await;
    let ended = timeout(Duration::from_millis(100), watch.message()).await;
    assert!(ended.is_err(), "{ended:?}");

    pass_seconds(15).await;
    let ended = timeout(ENDS_WITHIN, watch.message()).await.expect("the stream does not end");
    assert_error(ended, Code::Unavailable, "DATABASE_UNAVAILABLE");
}

#[tokio::test]
async fn a_new_client_streaming_rpc_ends_within_5_s_of_its_credentials() {
    let tracker = Tracker::start().await;
    let server = StreamServer::start(&tracker).await;
    let end = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        End::Demoted.apply(&tracker, &tracker.member).await;
    };
    let (result, ()) = tokio::join!(server.upload(&tracker.member), end);
    assert_error(result, Code::PermissionDenied, "PERMISSION_DENIED");
    assert_error(server.upload(&tracker.viewer).await, Code::PermissionDenied, "PERMISSION_DENIED");
}
