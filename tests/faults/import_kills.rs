//! Kills the service, the backends and the database during ATOMIC imports and during RevertImport.

use std::time::{Duration, Instant};

use issue_tracker::{
    pb::{
        ImportChunk, ImportIssuesRequest, ImportMode, ImportOptions, ImportState, ImportSummary, OnExisting,
        RevertImportRequest, RevertImportResponse, import_issues_request, import_issues_response,
        import_service_client::ImportServiceClient,
    },
    postgres::Durability,
};
use prost::Message;
use tokio_postgres::Client;
use tonic::{Request, Status, transport::Channel};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Caller, Settings, call_within, create_callers},
    load::classify,
    replay::assert_rows_follow_from_history,
    support::{
        bounds::{HANG, TICK},
        database::session,
        eventually::eventually,
        external::External,
        process::{signal, wait_until},
        service::{Service, program},
    },
    verify::assert_invariants,
};

/// The issues that exist before the imports, and those after them.
const EXISTING: usize = 1_500;
const ROWS: usize = 6_000;
const CHUNK_BYTES: usize = 256 * 1024;
const REVERT_DEADLINE: Duration = Duration::from_secs(60);

/// Returns a file of `rows` issues, which differ from those of another kind in all columns but `external_id`.
fn file(kind: &str, rows: usize) -> Vec<u8> {
    let (priority, label) = if kind == "old" { ("low", "bug") } else { ("high", "ui;docs") };
    let row = |n| format!("{kind} {n},{kind} text of {n},{priority},{label},key-{n}\n");
    let header = "title,description,priority,labels,external_id\n".to_owned();
    (0..rows).fold(header, |file, n| file + &row(n)).into_bytes()
}

struct Fixture {
    external: External,
    service: Service,
    rows: Client,
    caller: Caller,
    rng: fastrand::Rng,
    /// How long an import takes that is not interrupted.
    import_duration: Duration,
    interrupted_count: usize,
}

impl Fixture {
    async fn start(rng: fastrand::Rng) -> Self {
        let external = External::start(Durability::Durable);
        let service = start_service(&external);
        let caller = create_callers(&external.config(), 1).await.remove(0);
        let rows = session(&external.config()).await;
        let import_duration = Duration::ZERO;
        let mut fixture = Self { external, service, rows, caller, rng, import_duration, interrupted_count: 0 };
        let began = Instant::now();
        import(fixture.service.channel(), &fixture.caller, &options(), &file("old", EXISTING)).await.unwrap();
        fixture.import_duration = began.elapsed() * (ROWS / EXISTING) as u32;
        fixture
    }

    /// Kills a process after a random part of `time`.
    async fn inject_fault(&mut self, nth: usize, time: Duration) {
        tokio::time::sleep(time.mul_f64(self.rng.f64())).await;
        match nth % 4 {
            1 => {
                let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                    WHERE application_name = 'issue-tracker' AND state <> 'idle'";
                self.rows.query(sql, &[]).await.unwrap();
            }
            3 => {
                let server = self.external.cluster.server_pid();
                assert!(signal(server, libc::SIGKILL));
                wait_until("PostgreSQL is restarted", || self.external.cluster.server_pid() != server);
                self.reconnect().await;
            }
            _ => {
                self.service.kill();
                self.service = start_service(&self.external);
            }
        }
    }

    async fn reconnect(&mut self) {
        eventually("PostgreSQL accepts connections", async || {
            match self.external.config().connect(tokio_postgres::NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection);
                    self.rows = client;
                    true
                }
                Err(_) => false,
            }
        })
        .await;
    }

    /// Waits until no transaction is in progress that an interrupted call has begun.
    async fn wait_until_idle(&self) {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'issue-tracker'
            AND (backend_xid IS NOT NULL OR state <> 'idle')";
        let is_idle = async || self.rows.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0;
        eventually("all transactions have ended", is_idle).await;
    }

    /// Returns the values of all issues, without ids, versions and times.
    async fn values(&self) -> Vec<String> {
        const SQL: &str = "SELECT jsonb_build_array(external_id, title, description, status, priority, delete_time,
                (SELECT array_agg(name ORDER BY name) FROM issue_labels JOIN labels ON id = label_id
                    WHERE issue_id = issues.id))::text
            FROM issues";
        self.wait_until_idle().await;
        let rows = self.rows.query(SQL, &[]).await.unwrap();
        let mut values: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
        values.sort();
        values
    }

    /// Asserts the values of all issues, and that their versions and histories agree with them.
    async fn assert_state(&self, expected: &[String]) {
        assert!(self.values().await == expected, "the issues differ from the expected ones");
        assert_invariants(&self.rows).await;
        assert_rows_follow_from_history(&self.rows, &[]).await;
    }

    /// Returns a session whose locks prevent changes of issues until it is dropped.
    async fn lock_issues(&self) -> Client {
        let locks = session(&self.external.config()).await;
        locks.batch_execute("BEGIN; LOCK TABLE issues IN SHARE ROW EXCLUSIVE MODE").await.unwrap();
        locks
    }

    /// Makes a call repeatedly, the first times while a fault is injected, until it succeeds. Asserts that all issues are as
    /// before or all as after the call, whenever it fails. Returns the response.
    async fn call_with_faults<T>(
        &mut self,
        faults: usize,
        (before, after): (&[String], &[String]),
        call: impl AsyncFn(Channel, Caller) -> Result<T, Status>,
    ) -> T {
        let began = Instant::now();
        for nth in 0.. {
            let (channel, caller, time) = (self.service.channel(), self.caller.clone(), self.import_duration);
            let result = if nth < faults {
                // The first fault always hits the call, which cannot be complete before.
                let locks = if nth == 0 { Some(self.lock_issues().await) } else { None };
                let fault = async {
                    self.inject_fault(nth, time).await;
                    drop(locks);
                };
                tokio::join!(call(channel, caller), fault).0
            } else {
                call(channel, caller).await
            };
            match result {
                Ok(response) if nth >= faults => return response,
                // It was complete before the fault: a retry returns the same.
                Ok(_) => {}
                Err(status) => {
                    assert_is_retriable(status);
                    self.interrupted_count += usize::from(nth < faults);
                    assert!(began.elapsed() < HANG, "the call does not succeed");
                    tokio::time::sleep(TICK).await;
                }
            }
            let values = self.values().await;
            assert!(values == before || values == after, "the call was applied in part: {} issues", values.len());
        }
        unreachable!()
    }
}

fn start_service(external: &External) -> Service {
    Service::start(&external.dir, program(&["--database-url", &external.url()]))
}

fn options() -> ImportOptions {
    ImportOptions {
        import_id: Uuid::now_v7().to_string(),
        mode: ImportMode::Atomic.into(),
        on_existing: OnExisting::Update.into(),
        create_labels: true,
        ..Default::default()
    }
}

fn assert_is_retriable(status: Status) {
    let reason = status.get_details_error_info().map(|info| info.reason);
    if reason.as_deref() != Some("IMPORT_RUNNING") {
        assert!(classify(Err(status)).is_none());
    }
}

/// Imports a file from its first byte.
async fn import(
    channel: Channel,
    caller: &Caller,
    options: &ImportOptions,
    file: &[u8],
) -> Result<ImportSummary, Status> {
    let message = |message| ImportIssuesRequest { message: Some(message) };
    let chunk = |(nth, data): (usize, &[u8])| {
        let chunk = ImportChunk { offset: (nth * CHUNK_BYTES) as i64, data: data.to_vec().into() };
        message(import_issues_request::Message::Chunk(chunk))
    };
    let mut messages = vec![message(import_issues_request::Message::Options(options.clone()))];
    messages.extend(file.chunks(CHUNK_BYTES).enumerate().map(chunk));
    let mut request = Request::new(tokio_stream::iter(messages));
    request.metadata_mut().insert("authorization", format!("Bearer {}", caller.token).parse().unwrap());
    let mut responses = ImportServiceClient::new(channel).import_issues(request).await?.into_inner();
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(import_issues_response::Message::Summary(summary)) => return Ok(summary),
            Some(import_issues_response::Message::RowError(error)) => panic!("{error:?}"),
            _ => {}
        }
    }
    Err(Status::unknown("the stream has ended without a summary"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn atomic_imports_and_reverts_are_applied_whole_or_not_at_all_over_kills() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let mut fixture = Fixture::start(rng.fork()).await;
    let (file, before) = (file("new", ROWS), fixture.values().await);
    let after = expected_after();
    let imports = settings.pick(1, 12);
    for _ in 0..imports {
        let options = options();
        let imported = async |channel: Channel, caller: Caller| import(channel, &caller, &options, &file).await;
        let summary = fixture.call_with_faults(4, (&*before, &*after), &imported).await;

        let counts = (summary.state(), summary.created_count, summary.updated_count, summary.rejected_count);
        let (created, updated) = ((ROWS - EXISTING) as i64, EXISTING as i64);
        assert_eq!(counts, (ImportState::Committed, created, updated, 0));
        fixture.assert_state(&after).await;

        let request_id = Uuid::new_v4().to_string();
        let revert = RevertImportRequest { import_id: options.import_id.clone(), request_id, ..Default::default() };
        let message = revert.encode_to_vec();
        let reverted = async |channel: Channel, caller: Caller| {
            call_within(&channel, &caller.token, "ImportService/RevertImport", &message, REVERT_DEADLINE).await
        };
        let response = fixture.call_with_faults(settings.pick(2, 4), (&*after, &*before), reverted).await;

        let response = RevertImportResponse::decode(&*response).unwrap();
        assert_eq!((response.removed_count, response.restored_count, response.kept_count), (created, updated, 0));
        fixture.assert_state(&before).await;
        // An import that was reverted is not made again.
        imported(fixture.service.channel(), fixture.caller.clone()).await.unwrap();
        assert!(fixture.values().await == before);
    }
    println!("{} calls were interrupted", fixture.interrupted_count);
    let imports_and_reverts = 2 * imports;
    assert!(fixture.interrupted_count >= imports_and_reverts, "a first fault hit no call");
    fixture.service.assert_no_internal_errors();
}

/// Returns the values of the issues after the import.
fn expected_after() -> Vec<String> {
    let mut values: Vec<String> = (0..ROWS)
        .map(|n| format!(r#"["key-{n}", "new {n}", "new text of {n}", 1, 3, null, ["docs", "ui"]]"#))
        .collect();
    values.sort();
    values
}
