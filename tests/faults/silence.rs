//! Loses what is sent on connections to the database that stay open, and connections while they are made.

use std::time::Duration;

use issue_tracker::{
    pb::{
        ExportIssuesRequest, ImportChunk, ImportIssuesRequest, ImportOptions, ListIssuesRequest, import_issues_request,
        import_service_client::ImportServiceClient, issue_service_client::IssueServiceClient,
    },
    postgres::Durability,
};
use tonic::{Code, Request, Status};

use crate::{
    connection_loss::{ProxiedService, create},
    harness::assert_retriable,
    postgres_proxy::{
        Fault::{DelayResponse, DropRequest},
        FaultPoint,
    },
    support::{database::session, eventually::eventually, external::External},
};

/// Each insertion into `issues` takes 5 s: longer than the service waits for a suspect session that does not work.
const SLOW_INSERTS: &str = "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(5); RETURN NEW; END $$;
    CREATE TRIGGER slow BEFORE INSERT ON issues FOR EACH ROW EXECUTE FUNCTION sleep()";
const INSERTING: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND $1 = ''";
/// Ends the sessions of the service that are not inserting, those of the probe included.
const END_OTHERS: &str = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
    WHERE application_name = 'issue-tracker' AND wait_event <> 'PgSleep' AND $1 = ''";

/// After 30 s, a stream ends in any case, because its credentials cannot be checked.
const ENDS_WITHIN: Duration = Duration::from_secs(25);

#[derive(Clone, Copy, Debug)]
enum Stream {
    Export,
    Import,
}

impl Stream {
    /// The statement whose response is lost.
    fn statement(self) -> FaultPoint {
        match self {
            Self::Export => FaultPoint::Execute("export_issues"),
            Self::Import => FaultPoint::Execute("copy_issues"),
        }
    }

    async fn run(self, proxied: &ProxiedService) -> Result<(), Status> {
        let channel = proxied.service.channel();
        match self {
            Self::Export => {
                let request = with_token(proxied, ExportIssuesRequest::default());
                let mut file = IssueServiceClient::new(channel).export_issues(request).await?.into_inner();
                while file.message().await?.is_some() {}
            }
            Self::Import => {
                let chunk = ImportChunk { offset: 0, data: "title\nimported\n".into() };
                let messages = [
                    import_issues_request::Message::Options(ImportOptions::default()),
                    import_issues_request::Message::Chunk(chunk),
                ];
                let messages = messages.map(|message| ImportIssuesRequest { message: Some(message) });
                let request = with_token(proxied, tokio_stream::iter(messages));
                let mut responses = ImportServiceClient::new(channel).import_issues(request).await?.into_inner();
                while responses.message().await?.is_some() {}
            }
        }
        Ok(())
    }

    /// Runs the stream, and makes the network silent once it waits for the response of its statement. Asserts that it fails.
    async fn assert_fails(self, proxied: &ProxiedService, silence: impl Fn(&ProxiedService)) {
        let injected = proxied.proxy.injected_count();
        proxied.proxy.inject(self.statement(), DelayResponse);
        let silenced = async {
            eventually("the response is delayed", async || proxied.proxy.injected_count() > injected).await;
            silence(proxied);
        };
        let ended = tokio::time::timeout(ENDS_WITHIN, async { tokio::join!(self.run(proxied), silenced).0 }).await;
        let ended = ended.unwrap_or_else(|_| panic!("the {self:?} waits for a lost response"));
        assert_retriable(&ended.unwrap_err(), Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
}

fn with_token<T>(proxied: &ProxiedService, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {}", proxied.caller.token).parse().unwrap());
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_and_imports_in_a_silent_network_fail() {
    let proxied = ProxiedService::start_with(&[]).await;
    proxied.create_issue("to be exported").await;
    for stream in [Stream::Export, Stream::Import] {
        stream.assert_fails(&proxied, |proxied| proxied.proxy.silence_all()).await;
        proxied.proxy.end_silence();
        eventually("the stream succeeds", async || stream.run(&proxied).await.is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_and_imports_on_a_silent_connection_fail() {
    let proxied = ProxiedService::start_with(&[]).await;
    proxied.create_issue("to be exported").await;
    for stream in [Stream::Export, Stream::Import] {
        stream.assert_fails(&proxied, |proxied| proxied.proxy.silence_established()).await;
        eventually("the stream succeeds", async || stream.run(&proxied).await.is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_that_fails_or_hangs_while_it_is_made_fails_no_call() {
    /// Ends the sessions of the pools. The probe keeps its own: the database counts as available.
    const END_POOLED: &str = "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
        WHERE application_name = 'issue-tracker' AND query LIKE '-- %' AND query NOT LIKE '-- write_probe%' AND $1 = ''";
    // Longer than the deadline of a call, or shorter than the time allowed for a connection.
    for (pool_wait_ms, faults) in [("30000", vec![DropRequest; 3]), ("4000", vec![DelayResponse])] {
        let proxied = ProxiedService::start_with(&["--pool-wait-ms", pool_wait_ms]).await;
        let list = async || proxied.call("IssueService/ListIssues", &ListIssuesRequest::default()).await;
        for fault in &faults {
            proxied.proxy.inject(FaultPoint::Startup, *fault);
        }

        // A session that is made at the moment, for background work, is not ended.
        eventually("a call needs new connections", async || {
            proxied.count(END_POOLED, "").await;
            list().await.unwrap_or_else(|status| panic!("{faults:?}: {status:?}"));
            proxied.proxy.injected_count() == faults.len()
        })
        .await;
        proxied.service.assert_no_internal_errors();
    }
}

/// Creates an issue slowly, and ends the other sessions meanwhile, so that the slow one becomes suspect. Asserts that it is
/// kept until the issue is created.
async fn assert_slow_insert_succeeds(proxied: &ProxiedService, before_end: impl Fn()) {
    session(&proxied.external.config()).await.batch_execute(SLOW_INSERTS).await.unwrap();
    // Without a request id, a lost connection would fail the call.
    let request = create("slow", false);
    let (created, ()) = tokio::join!(proxied.call("IssueService/CreateIssue", &request), async {
        eventually("the insert has begun", async || proxied.count(INSERTING, "").await == 1).await;
        before_end();
        assert!(proxied.count(END_OTHERS, "").await > 0);
    });
    created.unwrap_or_else(|status| panic!("{status:?}"));
    assert_eq!(proxied.count_issues_titled("slow").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suspect_session_that_works_is_kept_if_the_server_tracks_no_activities() {
    let external = External::start(Durability::Throwaway);
    let setting = "ALTER DATABASE postgres SET track_activities = off";
    session(&external.config()).await.batch_execute(setting).await.unwrap();
    let proxied = ProxiedService::start_on(external, None, &[]).await;
    assert_slow_insert_succeeds(&proxied, || {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn suspect_session_that_works_is_kept_if_the_probe_connects_to_another_server() {
    let other = External::start(Durability::Throwaway);
    let proxied = ProxiedService::start_on(External::start(Durability::Throwaway), Some(&other), &[]).await;
    assert_slow_insert_succeeds(&proxied, || {
        // The first server accepts no new connections.
        (0..100).for_each(|_| proxied.proxy.inject(FaultPoint::Startup, DropRequest));
    })
    .await;
}
