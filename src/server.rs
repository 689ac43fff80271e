//! The running service: all RPCs behind one gate, reflection, health, and a way to stop.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    FILE_DESCRIPTOR_SET,
    auth::Auth,
    auth::throttle::LoginLimits,
    config::Limits,
    db::{
        Conn, Db, PRUNE_BATCH_ROWS, audit::prune_audit_events, batchers::Batchers, idempotency::prune_requests,
        tokens::prune_tokens,
    },
    error::Result,
    middleware::{Gate, OPEN_REQUEST_BYTES_MAX},
    pb::{
        auth_service_server::AuthServiceServer, comment_service_server::CommentServiceServer,
        import_service_server::ImportServiceServer, issue_service_server::IssueServiceServer,
        label_service_server::LabelServiceServer, report_service_server::ReportServiceServer,
        user_service_server::UserServiceServer,
    },
    rpc::Api,
    transport::connection::{self, Listener},
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

const PRUNE_INTERVAL: Duration = Duration::from_secs(3_600);

/// Serves until `shutdown` is ready. Then health says NOT_SERVING, our own RPCs are refused, streams are told to go on
/// elsewhere, and calls under way have `limits.drain()` to finish.
pub async fn run(
    listener: impl Into<Listener>,
    db: Db,
    limits: &Limits,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let auth = Auth::new(db.clone(), limits.bcrypt.cost)?;
    let api = Api {
        db: db.clone(),
        auth: auth.clone(),
        login_limits: LoginLimits::new(limits.free_login_failures()),
        batchers: Batchers::new(db.clone()),
        session_hours: limits.session_hours,
        imports: Arc::new(Semaphore::new(limits.imports as usize)),
        exports: Arc::new(Semaphore::new(limits.exports as usize)),
        stopping: stop.clone(),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    let routes = routes(api, limits)?.add_service(health_service.max_decoding_message_size(OPEN_REQUEST_BYTES_MAX));
    let gate = Arc::new(Gate::new(auth, routes, limits.requests(), stop.clone()));
    let open = connection::Open::default();
    let serve = connection::serve(listener.into(), gate, limits.connections(), stop.clone(), open.clone());
    let until_stop = async {
        tokio::select! {
            () = shutdown => {}
            () = follow_database(db.clone(), health.clone()) => {}
            () = prune(db) => {}
        }
    };
    let stopped = async {
        until_stop.await;
        set_health(&health, ServingStatus::NotServing).await;
        tracing::info!("stopping; requests under way may finish");
        stop.cancel();
        open.before.close();
        if tokio::time::timeout(limits.drain(), open.before.wait()).await.is_err() {
            tracing::warn!("some requests were still under way");
        }
    };
    // Meanwhile who connects is told that it ends.
    tokio::select! {
        never = serve => match never {},
        () = stopped => {}
    }
    open.say_goodbye().await;
    Ok(())
}

/// All services, but for health.
fn routes(api: Api, limits: &Limits) -> anyhow::Result<Routes> {
    let api = Arc::new(api);
    // Each service decodes with the same bound.
    macro_rules! service {
        ($server:ident) => {
            $server::from_arc(Arc::clone(&api)).max_decoding_message_size(limits.requests().message_bytes_max)
        };
    }
    Ok(Routes::new(reflection()?.build_v1()?.max_decoding_message_size(OPEN_REQUEST_BYTES_MAX))
        .add_service(reflection()?.build_v1alpha()?.max_decoding_message_size(OPEN_REQUEST_BYTES_MAX))
        .add_service(service!(AuthServiceServer))
        .add_service(service!(UserServiceServer))
        .add_service(service!(IssueServiceServer))
        .add_service(service!(CommentServiceServer))
        .add_service(service!(LabelServiceServer))
        .add_service(service!(ImportServiceServer))
        .add_service(service!(ReportServiceServer)))
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
    let mut healthy = db.watch_health();
    loop {
        let status = if *healthy.borrow_and_update() { ServingStatus::Serving } else { ServingStatus::NotServing };
        set_health(&health, status).await;
        if healthy.changed().await.is_err() {
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
        for (what, pruned) in [
            ("request ids", pruned(&db, async |conn| prune_requests(conn).await).await),
            ("tokens", pruned(&db, async |conn| prune_tokens(conn).await).await),
            ("audit events", pruned(&db, async |conn| prune_audit_events(conn).await).await),
        ] {
            if let Err(error) = pruned {
                tracing::warn!(code = ?error.code(), what, "cannot prune what is old; trying again later");
            }
        }
    }
}

/// Prunes until there is less than one statement takes.
async fn pruned(db: &Db, prune: impl AsyncFn(&Conn) -> Result<u64>) -> Result<()> {
    while prune(&db.conn().await?).await? == PRUNE_BATCH_ROWS as u64 {}
    Ok(())
}
