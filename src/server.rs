//! Composes the server: transport, middleware, services, reflection and health; and stops it.

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use anyhow::anyhow;
use bytes::Bytes;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::{ServingStatus, server::HealthReporter};
use tower::{BoxError, Service, ServiceBuilder};

use crate::{
    FILE_DESCRIPTOR_SET,
    auth::Auth,
    auth::throttle::LoginLimits,
    backoff::{Backoff, random},
    config::Limits,
    db::{
        Conn, Db, Health, StorageLimits,
        audit::prune_audit_events,
        batchers::Batchers,
        idempotency::{PrunedRequests, prune_requests},
        imports::{prune_import_errors, prune_import_staging, prune_imports},
        labels::resume_deletion,
        response_budget::prune_response_budgets,
        tokens::prune_tokens,
    },
    error::{Error, Result},
    fairness::FairSemaphore,
    metrics,
    middleware::{
        RequestLimits,
        admission::{AdmissionLayer, LoadSheddingLayer, RequestSlots},
        authentication::AuthenticationLayer,
        authorization::AuthorizationLayer,
        buffering::{BufferingLayer, UNAUTHENTICATED_MESSAGE_BYTES_MAX},
        call_log::CallLogLayer,
        call_metrics::CallMetricsLayer,
        deadline::DeadlineLayer,
        draining::DrainingLayer,
        early_response::EarlyResponseLayer,
        error_mapping::ErrorMappingLayer,
        metadata_limit::MetadataLimitLayer,
        method_policy::{MethodPolicyLayer, MethodTable},
        method_table::METHODS,
        protocol::ProtocolLayer,
        reauthentication::ReauthenticationLayer,
        retry::RetryLayer,
        unauthenticated_limits::UnauthenticatedLimitsLayer,
    },
    pb::{
        auth_service_server::AuthServiceServer, comment_service_server::CommentServiceServer,
        import_service_server::ImportServiceServer, issue_service_server::IssueServiceServer,
        label_service_server::LabelServiceServer, report_service_server::ReportServiceServer,
        user_service_server::UserServiceServer,
    },
    rpc::Api,
    transport::listener::{self, ConnectionTrackers, Listener},
};

/// The name that is SERVING as long as the process responds, also without a database and during the shutdown.
const LIVENESS_SERVICE: &str = "issuetracker.liveness";
/// The name whose health is that of reads.
const READS_SERVICE: &str = "issuetracker.reads";
/// The name whose health is that of writes.
const WRITES_SERVICE: &str = "issuetracker.writes";
/// How often expired rows are deleted.
const PRUNE_INTERVAL: Duration = Duration::from_secs(300);
/// How often interrupted deletions of labels are looked for.
const RESUME_INTERVAL: Duration = Duration::from_secs(30);
/// The name of stored responses in log lines about pruning, and in metrics.
const REQUEST_IDS: &str = "request ids";
/// The pause between two statements that delete expired rows: leaves the database to the calls.
const PRUNE_PAUSE: Duration = Duration::from_millis(200);
/// How often such a statement is retried, with these delays, before the rows wait for the next time.
const PRUNE_RETRIES_MAX: u32 = 10;
const PRUNE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(5) };

const PROBE_ENDED: &str = "the probe of the database has ended";

/// Concurrent ImportIssues calls whose first message has not arrived. Each may take the memory of the largest message.
const IMPORT_STARTS_MAX: u32 = 16;

/// Serves until `shutdown` is ready.
///
/// Then health reports NOT_SERVING, except for [`LIVENESS_SERVICE`], new calls are refused, streams end, and calls in flight
/// have `limits.drain()` to finish.
/// The same happens if the database is no longer probed, which is an error.
pub async fn run(
    listener: impl Into<Listener>,
    db: Db,
    limits: &Limits,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let db = db.with_storage_limits(limits.storage());
    let stopping = CancellationToken::new();
    let auth = Auth::new(db.clone(), limits.bcrypt.cost)?;
    let api = Api {
        db: db.clone(),
        auth: auth.clone(),
        login_limits: LoginLimits::new(limits.free_login_failures()),
        batchers: Batchers::new(db.clone()),
        session_hours: limits.session_hours,
        stream_limits: limits.streams(),
        imports: FairSemaphore::new("imports", limits.imports(), limits.share()),
        import_starts: FairSemaphore::new("imports that start", IMPORT_STARTS_MAX, limits.share()),
        exports: FairSemaphore::new("exports", limits.exports(), limits.share()),
        stopping: stopping.clone(),
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    // A new reporter says SERVING. Set before the first call is accepted.
    let Health { reads, writes } = *db.watch_health().borrow();
    set_health(&health, serving(reads), serving(writes)).await;
    health.set_service_status(LIVENESS_SERVICE, ServingStatus::Serving).await;
    let routes = routes(api, limits)?.add_service(
        health_service
            .max_decoding_message_size(UNAUTHENTICATED_MESSAGE_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip),
    );
    let service = middleware_stack(methods()?, auth, limits.requests(), stopping.clone(), routes);
    let trackers = ConnectionTrackers::default();
    let serve = listener::serve(listener.into(), service, limits.connections(), stopping.clone(), trackers.clone());
    let until_shutdown = async {
        // The receivers of health outlive this: the probe has panicked if it has ended. Its health would be outdated.
        tokio::select! {
            () = shutdown => Ok(()),
            () = report_database_health(db.clone(), health.clone()) => Err(anyhow!(PROBE_ENDED)),
            () = prune(db.clone()) => Err(anyhow!(PROBE_ENDED)),
            () = resume_label_deletions(db) => Err(anyhow!(PROBE_ENDED)),
        }
    };
    let stopped = async {
        let result = until_shutdown.await;
        set_health(&health, ServingStatus::NotServing, ServingStatus::NotServing).await;
        tracing::info!(drain_seconds = limits.drain().as_secs(), "shutdown began");
        stopping.cancel();
        if !trackers.drain(limits.drain()).await {
            tracing::warn!("shutdown interrupted calls in flight");
        }
        result
    };
    // Clients that connect during the drain receive STOPPING.
    let result = tokio::select! {
        never = serve => match never {},
        result = stopped => result,
    };
    trackers.close().await;
    result
}

/// Returns the services behind all layers, from the outside in. [`crate::middleware`] says why in this order.
pub fn middleware_stack(
    methods: MethodTable,
    auth: Auth,
    limits: RequestLimits,
    stopping: CancellationToken,
    routes: Routes,
) -> impl Service<
    http::Request<Incoming>,
    Response = http::Response<
        impl http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin + 'static + use<>,
    >,
    Error = Infallible,
    Future: Send,
>
+ Clone
+ Send
+ Sync
+ 'static
+ use<> {
    let slots = Arc::new(RequestSlots::new("request slots", limits.requests_max, limits.share));
    ServiceBuilder::new()
        .layer(EarlyResponseLayer)
        .layer(MethodPolicyLayer::new(methods))
        .layer(CallMetricsLayer)
        .layer(ProtocolLayer)
        .layer(ErrorMappingLayer)
        .layer(CallLogLayer)
        .layer(MetadataLimitLayer::new(limits.metadata_bytes_max))
        .layer(DeadlineLayer::new(limits.deadline_default))
        .layer(DrainingLayer::new(stopping))
        .layer(UnauthenticatedLimitsLayer::default())
        .layer(LoadSheddingLayer(Arc::clone(&slots)))
        .layer(AuthenticationLayer::new(auth.clone()))
        .layer(AuthorizationLayer)
        .layer(ReauthenticationLayer::new(auth))
        .layer(BufferingLayer::new(limits))
        .layer(AdmissionLayer(slots))
        .layer(RetryLayer)
        .service(routes.prepare())
}

/// Returns the methods of all services that [`run`] serves.
pub fn methods() -> anyhow::Result<MethodTable> {
    Ok(MethodTable::of_own_methods()
        .with_third_party(tonic_health::pb::FILE_DESCRIPTOR_SET)?
        .with_third_party(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)?
        .with_third_party(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)?)
}

/// Returns all services but health.
fn routes(api: Api, limits: &Limits) -> anyhow::Result<Routes> {
    let api = Arc::new(api);
    // All services accept and send gzip, and decode with the same limit, which holds after decompression too.
    macro_rules! service {
        ($server:ident) => {
            $server::from_arc(Arc::clone(&api))
                .max_decoding_message_size(limits.requests().message_bytes_max)
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Gzip)
        };
    }
    let reflection_bytes_max = UNAUTHENTICATED_MESSAGE_BYTES_MAX;
    Ok(Routes::new(
        reflection()
            .build_v1()?
            .max_decoding_message_size(reflection_bytes_max)
            .accept_compressed(CompressionEncoding::Gzip),
    )
    .add_service(
        reflection()
            .build_v1alpha()?
            .max_decoding_message_size(reflection_bytes_max)
            .accept_compressed(CompressionEncoding::Gzip),
    )
    .add_service(service!(AuthServiceServer))
    .add_service(service!(UserServiceServer))
    .add_service(service!(IssueServiceServer))
    .add_service(service!(CommentServiceServer))
    .add_service(service!(LabelServiceServer))
    .add_service(service!(ImportServiceServer))
    .add_service(service!(ReportServiceServer)))
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // With these, clients can print the details of errors.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}

/// Reports what works as the health of the services.
///
/// A replica that can only read stays SERVING: if the database is read-only, it is so for every replica, and a load
/// balancer that took all of them out would take the reads away too.
async fn report_database_health(db: Db, health: HealthReporter) {
    let mut found = db.watch_health();
    loop {
        let Health { reads, writes } = *found.borrow_and_update();
        set_health(&health, serving(reads), serving(writes)).await;
        if found.changed().await.is_err() {
            return;
        }
    }
}

fn serving(works: bool) -> ServingStatus {
    if works { ServingStatus::Serving } else { ServingStatus::NotServing }
}

async fn set_health(health: &HealthReporter, reads: ServingStatus, writes: ServingStatus) {
    // The empty name is the server as a whole. The methods are sorted by service.
    let mut services: Vec<&str> = METHODS.iter().map(|method| method.service).collect();
    services.dedup();
    for service in ["", READS_SERVICE].into_iter().chain(services) {
        health.set_service_status(service, reads).await;
    }
    health.set_service_status(WRITES_SERVICE, writes).await;
}

/// Deletes old data every five minutes. Replicas can prune concurrently: rows that another one deletes meanwhile are skipped.
async fn prune(db: Db) {
    let mut interval = tokio::time::interval(PRUNE_INTERVAL);
    loop {
        interval.tick().await;
        if db.watch_health().wait_for(|health| health.writes).await.is_err() {
            return;
        }
        report_pruning(REQUEST_IDS, pruned_requests(&db).await);
        prune_data(&db, "response budgets", async |conn, _| prune_response_budgets(conn).await).await;
        prune_data(&db, "import errors", async |conn, limits| {
            prune_import_errors(conn, limits.import_error_days).await
        })
        .await;
        prune_data(&db, "staged files of imports", async |conn, _| prune_import_staging(conn).await).await;
        prune_data(&db, "imports", async |conn, limits| prune_imports(conn, limits.import_days).await).await;
        prune_data(&db, "tokens", async |conn, _| prune_tokens(conn).await).await;
        prune_data(&db, "audit events", async |conn, limits| prune_audit_events(conn, limits.audit_days).await).await;
    }
}

/// Completes deletions of labels that were interrupted, by this replica or another one.
async fn resume_label_deletions(db: Db) {
    let mut interval = tokio::time::interval(RESUME_INTERVAL);
    loop {
        interval.tick().await;
        if db.watch_health().wait_for(|health| health.writes).await.is_err() {
            return;
        }
        let resumed = async {
            while let Some(label_id) = resume_deletion(&db).await? {
                tracing::info!(label.id = %label_id, "label deletion resumed");
            }
            Ok::<_, Error>(())
        };
        if let Err(error) = resumed.await {
            tracing::warn!(code = ?error.code(), "label deletion failed");
        }
    }
}

/// Deletes expired responses until there are none.
async fn pruned_requests(db: &Db) -> Result<()> {
    let (mut begin, mut failures) = (None, 0);
    loop {
        let hours = db.storage_limits().response_hours;
        let outcome = async { prune_requests(&db.conn().await?, hours, begin).await }.await;
        let Some(PrunedRequests { count, last_time }) = succeeded(outcome, &mut failures).await? else { continue };
        count_pruned(REQUEST_IDS, count);
        if count == 0 {
            return Ok(());
        }
        begin = last_time;
        tokio::time::sleep(PRUNE_PAUSE).await;
    }
}

/// Repeats `prune` until it deletes nothing. `what`: the name of the data in log lines and metrics.
async fn prune_data(db: &Db, what: &str, prune: impl AsyncFn(&Conn, StorageLimits) -> Result<u64>) {
    let pruned = async {
        let mut failures = 0;
        loop {
            let outcome = async { prune(&db.conn().await?, db.storage_limits()).await }.await;
            let Some(count) = succeeded(outcome, &mut failures).await? else { continue };
            count_pruned(what, count);
            if count == 0 {
                return Ok(());
            }
            tokio::time::sleep(PRUNE_PAUSE).await;
        }
    };
    report_pruning(what, pruned.await);
}

fn count_pruned(what: &str, count: u64) {
    if let Some(metrics) = metrics::get() {
        metrics.pruned_rows.with_label_values(&[what]).inc_by(count);
    }
}

fn report_pruning(what: &str, pruned: Result<()>) {
    if let Some(metrics) = metrics::get() {
        metrics.prune_failures.with_label_values(&[what]).inc_by(pruned.is_err().into());
    }
    if let Err(error) = pruned {
        tracing::warn!(code = ?error.code(), what, "pruning failed");
    }
}

/// Returns `None`, after a delay, for a failure after which a deletion of expired rows is to be retried, for example because the
/// pool is exhausted: rows expire as fast as they were written, also while the database is overloaded.
async fn succeeded<T>(outcome: Result<T>, failures: &mut u32) -> Result<Option<T>> {
    match outcome {
        Ok(pruned) => {
            *failures = 0;
            Ok(Some(pruned))
        }
        Err(_) if *failures < PRUNE_RETRIES_MAX => {
            tokio::time::sleep(PRUNE_BACKOFF.delay(*failures, random())).await;
            *failures += 1;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
