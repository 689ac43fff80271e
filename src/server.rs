//! The running service: all RPCs behind one gate, reflection, health, and a way to stop.

use std::{future::Future, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::transport::{Server, server::TcpIncoming};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    FILE_DESCRIPTOR_SET,
    auth::Auth,
    config::Limits,
    db::{Db, audit::prune_audit_events, requests::prune_requests, rounds::Rounds, tokens::prune_tokens},
    gate::Gate,
    login::LoginLimits,
    pb::{
        auth_service_server::AuthServiceServer, comment_service_server::CommentServiceServer,
        import_service_server::ImportServiceServer, issue_service_server::IssueServiceServer,
        label_service_server::LabelServiceServer, report_service_server::ReportServiceServer,
        user_service_server::UserServiceServer,
    },
    request::REQUEST_BYTES_MAX,
    rpc::Api,
};

/// What health tells of besides the service as a whole.
const SERVICES: [&str; 8] = [
    "",
    "issuetracker.v1.AuthService",
    "issuetracker.v1.UserService",
    "issuetracker.v1.IssueService",
    "issuetracker.v1.CommentService",
    "issuetracker.v1.LabelService",
    "issuetracker.v1.ImportService",
    "issuetracker.v1.ReportService",
];

/// Requests of one connection at once; more wait in the client.
const STREAMS_PER_CONNECTION_MAX: u32 = 1_000;
/// Metadata of a request.
const HEADER_BYTES_MAX: u32 = 16 * 1024;
/// What a client may send of a stream before it is read: with imports, most of what they keep in memory.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;
/// A client that does not answer a ping is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
const PRUNE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Serves until `shutdown` is ready; then health says NOT_SERVING, no new connection is taken, and requests under way have
/// `limits.drain()` to finish.
pub async fn run(
    listener: TcpListener,
    db: Db,
    limits: &Limits,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let auth = Auth::new(db.clone(), limits.bcrypt_cost)?;
    let gate = Gate::new(auth.clone(), limits.requests as usize);
    let api = Arc::new(Api {
        db: db.clone(),
        auth,
        login_limits: LoginLimits::new(limits.free_login_failures()),
        rounds: Rounds::new(db.clone()),
        session_hours: limits.session_hours,
        imports: Arc::new(Semaphore::new(limits.imports as usize)),
        exports: Arc::new(Semaphore::new(limits.exports as usize)),
    });
    let (health, health_service) = tonic_health::server::health_reporter();
    let stop = tokio_util::sync::CancellationToken::new();

    // Each service decodes with the same bound.
    macro_rules! service {
        ($server:ident) => {
            $server::from_arc(Arc::clone(&api)).max_decoding_message_size(REQUEST_BYTES_MAX)
        };
    }
    let server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .layer(gate)
        .add_service(health_service)
        .add_service(reflection()?.build_v1()?)
        .add_service(reflection()?.build_v1alpha()?)
        .add_service(service!(AuthServiceServer))
        .add_service(service!(UserServiceServer))
        .add_service(service!(IssueServiceServer))
        .add_service(service!(CommentServiceServer))
        .add_service(service!(LabelServiceServer))
        .add_service(service!(ImportServiceServer))
        .add_service(service!(ReportServiceServer))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            stop.clone().cancelled_owned(),
        );
    let follow_database = follow_database(db.clone(), health.clone());
    let stopped = async {
        tokio::select! {
            () = shutdown => {}
            () = follow_database => {}
            () = prune(db) => {}
        }
        set_health(&health, ServingStatus::NotServing).await;
        tracing::info!("stopping; requests under way may finish");
        stop.cancel();
        tokio::time::sleep(limits.drain()).await;
    };
    tokio::select! {
        served = server => served.context("the server failed"),
        () = stopped => {
            tracing::warn!("some requests were still under way");
            Ok(())
        }
    }
}

fn reflection() -> anyhow::Result<tonic_reflection::server::Builder<'static>> {
    Ok(tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // So that clients can print the details of errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET))
}

/// Health says of every service what the database is.
async fn follow_database(db: Db, health: HealthReporter) {
    let mut up = db.watch_up();
    loop {
        let status = if *up.borrow_and_update() { ServingStatus::Serving } else { ServingStatus::NotServing };
        set_health(&health, status).await;
        if up.changed().await.is_err() {
            return;
        }
    }
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        health.set_service_status(service, status).await;
    }
}

/// Forgets old request ids, tokens and audit events now and then. Replicas that do it at once do not get in each other's way.
async fn prune(db: Db) {
    let mut interval = tokio::time::interval(PRUNE_INTERVAL);
    loop {
        interval.tick().await;
        let pruned = async {
            let conn = db.conn().await?;
            prune_requests(&conn).await?;
            prune_tokens(&conn).await?;
            prune_audit_events(&conn).await
        };
        if let Err(error) = pruned.await {
            tracing::warn!(code = ?error.code(), "cannot prune old request ids, tokens and audit events; trying again later");
        }
    }
}
