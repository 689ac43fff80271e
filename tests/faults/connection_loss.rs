//! Breaks connections to the database at chosen messages. Asserts that callers learn the outcome of their calls, and
//! that no write is applied twice.

use std::time::Duration;

use issue_tracker::{
    pb::{
        BulkUpdateStatusRequest, Comment, CreateCommentRequest, CreateIssueRequest, GetIssueRequest, Issue,
        ListIssuesRequest, Status as IssueStatus, UpdateIssueRequest,
    },
    postgres::Durability,
};
use prost::Message;
use tokio::{sync::watch, task::JoinSet};
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::{
    harness::{Caller, Settings, assert_retriable, call, call_within, create_callers},
    load::Load,
    postgres_proxy::{
        Fault::{self, CloseAfterSend, DelayResponse, DropRequest, DropResponse},
        FaultPoint, Proxy,
    },
    support::{
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, program},
    },
    verify::verify,
};

/// The statement of CreateIssue, which autocommits without a request id.
const INSERT: FaultPoint = FaultPoint::Execute("create_issues");
/// The statements of UpdateIssue and BulkUpdateStatus.
const UPDATE: FaultPoint = FaultPoint::Execute("update_issues");
const BULK: FaultPoint = FaultPoint::Execute("bulk_update_issues");
const CONCURRENT_CREATES: usize = 16;
/// Long enough to reach the commit on a busy machine.
const DELAYED_DEADLINE: Duration = Duration::from_secs(4);
const CLIENTS: usize = 8;

/// A service that connects to its database through a proxy that injects faults.
pub struct ProxiedService {
    // Declared before `external`, so that the service stops before its database.
    pub service: Service,
    pub proxy: Proxy,
    pub external: External,
    pub caller: Caller,
}

impl ProxiedService {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Starts a service with these arguments.
    pub async fn start_with(args: &[&str]) -> Self {
        Self::start_on(External::start(Durability::Throwaway), None, args).await
    }

    /// Starts a service with these arguments on a database. It connects to the other one when the proxy refuses to.
    pub async fn start_on(external: External, other: Option<&External>, args: &[&str]) -> Self {
        let proxy = Proxy::start(external.cluster.socket_dir().join(".s.PGSQL.5432")).await;
        let url = match other {
            Some(other) => proxy.url_with(other.cluster.socket_dir()),
            None => proxy.url(),
        };
        let args = [&["--database-url", &url], args].concat();
        let service = Service::start(&external.dir, program(&args));
        let caller = create_callers(&external.config(), 1).await.remove(0);
        Self { service, proxy, external, caller }
    }

    pub async fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>, Status> {
        call(&self.service.channel(), &self.caller.token, method, &message.encode_to_vec()).await
    }

    pub async fn create_issue(&self, title: &str) -> Issue {
        let created = self.call("IssueService/CreateIssue", &create(title, false)).await.unwrap();
        Issue::decode(&*created).unwrap()
    }

    pub async fn count(&self, sql: &str, value: &str) -> i64 {
        session(&self.external.config()).await.query_one(sql, &[&value]).await.unwrap().get(0)
    }

    pub async fn count_issues_titled(&self, title: &str) -> i64 {
        self.count("SELECT count(*) FROM issues WHERE title = $1", title).await
    }

    async fn count_comments(&self, content: &str) -> i64 {
        self.count("SELECT count(*) FROM comments WHERE content = $1", content).await
    }

    /// Returns how often a new issue was updated together with this comment. Fails if one was applied without the other.
    ///
    /// Both are read by one statement: an update whose connection was closed may commit meanwhile.
    async fn count_whole_updates(&self, issue: &Issue, comment: &str) -> i64 {
        let sql = format!(
            "SELECT CASE WHEN version = 1 + comment_count THEN comment_count ELSE -1 END
            FROM issues, (SELECT count(*) AS comment_count FROM comments WHERE content = $1) AS found
            WHERE id = '{}'",
            issue.id
        );
        let count = self.count(&sql, comment).await;
        assert!(count >= 0, "the update was applied in part");
        count
    }

    async fn version(&self, issue: &Issue) -> i64 {
        self.count("SELECT version FROM issues WHERE id = $1::text::uuid", &issue.id).await
    }

    /// Makes a call with a request id while a fault is injected. Asserts that it succeeds, is applied once, and that a
    /// retry returns the same response.
    async fn assert_applied_once(
        &self,
        (at, fault): (FaultPoint, Fault),
        method: &str,
        request: &impl Message,
        writes: impl AsyncFn() -> i64,
    ) {
        let what = format!("{method} {at:?} {fault:?}");
        self.proxy.inject(at, fault);

        let response = self.call(method, request).await;

        assert_eq!(self.proxy.clear_faults(), [], "{what}");
        let response = response.unwrap_or_else(|status| panic!("{what}: {status:?}"));
        assert_eq!(writes().await, 1, "{what}");
        assert!(self.call(method, request).await.unwrap() == response, "{what}: the retry returned another response");
    }

    /// Injects each fault at the commit of a mutation of an existing issue. Asserts that the call succeeds with a
    /// request id, fails with OUTCOME_UNKNOWN without one, and is applied at most once in both cases. `writes` counts
    /// the writes.
    async fn assert_applied_at_most_once<M: Message + Clone>(
        &self,
        method: &str,
        request: impl Fn(&Issue, &str, String) -> M,
        writes: impl AsyncFn(&Issue, &str) -> i64,
    ) {
        for fault in [DropRequest, DropResponse, CloseAfterSend] {
            let marker = Uuid::new_v4().to_string();
            let issue = self.create_issue("to be changed").await;
            let with_id = request(&issue, &marker, Uuid::new_v4().to_string());
            let count_writes = async || writes(&issue, &marker).await;
            self.assert_applied_once((FaultPoint::Commit, fault), method, &with_id, count_writes).await;

            let marker = Uuid::new_v4().to_string();
            let issue = self.create_issue("to be changed").await;
            self.proxy.inject(FaultPoint::Commit, fault);
            let result = self.call(method, &request(&issue, &marker, String::new())).await;
            assert_eq!(self.proxy.clear_faults(), [], "{method} {fault:?}");
            assert_outcome_unknown(result, method, fault);
            let writes = writes(&issue, &marker).await;
            match fault {
                DropRequest => assert_eq!(writes, 0, "{method}"),
                DropResponse => assert_eq!(writes, 1, "{method}"),
                CloseAfterSend | DelayResponse => assert!(writes <= 1, "{method}: {writes}"),
            }
        }
    }
}

pub fn create(title: &str, with_id: bool) -> CreateIssueRequest {
    let issue = Some(Issue { title: title.to_owned(), ..Issue::default() });
    let request_id = if with_id { Uuid::new_v4().to_string() } else { String::new() };
    CreateIssueRequest { issue, request_id, ..Default::default() }
}

/// Returns an update with a comment. It runs in a transaction with or without a request id.
fn update(issue: &Issue, marker: &str, request_id: String) -> UpdateIssueRequest {
    let issue = Some(Issue { id: issue.id.clone(), title: marker.to_owned(), ..Issue::default() });
    UpdateIssueRequest { issue, comment: marker.to_owned(), request_id, ..Default::default() }
}

fn bulk(issue: &Issue, marker: &str, request_id: String) -> BulkUpdateStatusRequest {
    let (ids, comment) = (vec![issue.id.clone()], marker.to_owned());
    BulkUpdateStatusRequest { ids, status: IssueStatus::Closed.into(), comment, request_id, ..Default::default() }
}

fn comment(issue: &Issue, marker: &str, request_id: String) -> CreateCommentRequest {
    let comment = Comment { issue_id: issue.id.clone(), content: marker.to_owned(), ..Comment::default() };
    CreateCommentRequest { comment: Some(comment), request_id, ..Default::default() }
}

#[track_caller]
fn assert_outcome_unknown(result: Result<Vec<u8>, Status>, method: &str, fault: Fault) {
    let status = result.expect_err("the outcome is unknown to the service");
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    assert_eq!((status.code(), &*reason), (Code::Unavailable, "OUTCOME_UNKNOWN"), "{method} {fault:?}: {status:?}");
    assert!(
        !status.message().to_lowercase().contains("connection closed"),
        "the message exposes the text of the driver: {status:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_with_request_id_is_applied_once_wherever_the_connection_breaks() {
    let proxied = ProxiedService::start().await;
    for fault_point in [
        (FaultPoint::Commit, DropRequest),
        (FaultPoint::Commit, DropResponse),
        (FaultPoint::Commit, CloseAfterSend),
        (INSERT, DropRequest),
        (INSERT, DropResponse),
        (INSERT, CloseAfterSend),
    ] {
        let title = Uuid::new_v4().to_string();
        let (request, created) = (create(&title, true), async || proxied.count_issues_titled(&title).await);
        proxied.assert_applied_once(fault_point, "IssueService/CreateIssue", &request, created).await;
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_without_request_id_fails_with_outcome_unknown_once_sent_and_is_applied_at_most_once() {
    let proxied = ProxiedService::start().await;
    for fault in [DropRequest, DropResponse, CloseAfterSend] {
        let title = Uuid::new_v4().to_string();
        proxied.proxy.inject(INSERT, fault);

        let result = proxied.call("IssueService/CreateIssue", &create(&title, false)).await;

        assert_eq!(proxied.proxy.clear_faults(), []);
        assert_outcome_unknown(result, "CreateIssue", fault);
        let applied = proxied.count_issues_titled(&title).await;
        assert!(if fault == DropResponse { applied == 1 } else { applied <= 1 }, "{fault:?}: {applied}");
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn update_bulk_update_and_comment_are_applied_at_most_once_when_the_commit_breaks() {
    let proxied = ProxiedService::start().await;
    proxied
        .assert_applied_at_most_once("IssueService/UpdateIssue", update, async |issue: &Issue, marker: &str| {
            proxied.count_whole_updates(issue, marker).await
        })
        .await;
    proxied
        .assert_applied_at_most_once("IssueService/BulkUpdateStatus", bulk, async |issue: &Issue, marker: &str| {
            proxied.count_whole_updates(issue, marker).await
        })
        .await;
    let issue = proxied.create_issue("to be commented").await;
    for fault in [DropRequest, DropResponse, CloseAfterSend] {
        let marker = Uuid::new_v4().to_string();
        let request = comment(&issue, &marker, Uuid::new_v4().to_string());
        let applied = async || proxied.count_comments(&marker).await;
        proxied
            .assert_applied_once((FaultPoint::Commit, fault), "CommentService/CreateComment", &request, applied)
            .await;
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transaction_that_breaks_before_its_commit_is_retried_transparently() {
    let proxied = ProxiedService::start().await;
    for request_id in [String::new(), Uuid::new_v4().to_string()] {
        for (at, fault) in [(UPDATE, DropRequest), (UPDATE, DropResponse)] {
            let issue = proxied.create_issue("to be changed").await;
            let marker = Uuid::new_v4().to_string();
            let request_id = if request_id.is_empty() { String::new() } else { Uuid::new_v4().to_string() };
            proxied.proxy.inject(at, fault);
            let updated = proxied.call("IssueService/UpdateIssue", &update(&issue, &marker, request_id)).await;
            assert_eq!(proxied.proxy.clear_faults(), []);
            assert_eq!(Issue::decode(&*updated.unwrap()).unwrap().version, 2, "{fault:?}");
            assert_eq!((proxied.version(&issue).await, proxied.count_comments(&marker).await), (2, 1), "{fault:?}");
        }
        for fault in [DropRequest, DropResponse] {
            let issue = proxied.create_issue("to be closed").await;
            let marker = Uuid::new_v4().to_string();
            let request_id = if request_id.is_empty() { String::new() } else { Uuid::new_v4().to_string() };
            proxied.proxy.inject(BULK, fault);
            proxied.call("IssueService/BulkUpdateStatus", &bulk(&issue, &marker, request_id)).await.unwrap();
            assert_eq!(proxied.proxy.clear_faults(), []);
            assert_eq!((proxied.version(&issue).await, proxied.count_comments(&marker).await), (2, 1), "{fault:?}");
        }
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_are_retried_when_their_connection_breaks() {
    let proxied = ProxiedService::start().await;
    let issue = proxied.create_issue("to be read").await;
    let get = GetIssueRequest { id: issue.id.clone(), ..Default::default() };
    for fault in [DropRequest, DropResponse, CloseAfterSend] {
        proxied.proxy.inject(FaultPoint::Execute("get_issue"), fault);
        let read = proxied.call("IssueService/GetIssue", &get).await;
        assert_eq!(proxied.proxy.clear_faults(), []);
        let read = read.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
        assert_eq!(Issue::decode(&*read).unwrap(), issue);

        proxied.proxy.inject(FaultPoint::Execute("list_issues"), fault);
        let listed = proxied.call("IssueService/ListIssues", &ListIssuesRequest::default()).await;
        assert_eq!(proxied.proxy.clear_faults(), []);
        listed.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn authentication_is_retried_when_its_connection_breaks() {
    let proxied = ProxiedService::start().await;
    let issue = proxied.create_issue("to be read").await;
    let get = GetIssueRequest { id: issue.id, ..Default::default() }.encode_to_vec();
    let others = create_callers(&proxied.external.config(), 3).await;
    for (other, fault) in others.iter().zip([DropRequest, DropResponse, CloseAfterSend]) {
        proxied.proxy.inject(FaultPoint::Execute("find_callers"), fault);
        let read = call(&proxied.service.channel(), &other.token, "IssueService/GetIssue", &get).await;
        assert_eq!(proxied.proxy.clear_faults(), []);
        read.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_closed_while_idle_fail_no_call() {
    let proxied = ProxiedService::start().await;
    for iteration in 0..Settings::from_environment().pick(5, 50) {
        // Concurrent calls open several pooled connections.
        let calls = (0..4).map(|nth| ListIssuesRequest { filter: format!("x{nth}"), ..Default::default() });
        let calls: Vec<_> = calls.collect();
        let list = |call| proxied.call("IssueService/ListIssues", call);
        for listed in futures_util::future::join_all(calls.iter().map(list)).await {
            listed.unwrap();
        }
        // Every other time the service has no time to notice.
        match iteration % 2 {
            0 => proxied.proxy.close_all_and_wait().await,
            _ => proxied.proxy.close_all(),
        }
        let title = format!("after cut {iteration}");
        let lists = futures_util::future::join_all(calls.iter().map(list)).await;
        let created = proxied.call("IssueService/CreateIssue", &create(&title, true)).await;

        for listed in lists {
            listed.unwrap_or_else(|status| panic!("{status:?}"));
        }
        created.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(proxied.count_issues_titled(&title).await, 1);
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_are_replaced_and_fail_no_call() {
    let proxied = ProxiedService::start().await;
    for iteration in 0..2 {
        let calls = (1..=4).map(|page_size| ListIssuesRequest { page_size, ..Default::default() });
        let calls: Vec<_> = calls.collect();
        let list = |call| proxied.call("IssueService/ListIssues", call);
        for listed in futures_util::future::join_all(calls.iter().map(list)).await {
            listed.unwrap();
        }
        proxied.proxy.silence_established();
        if iteration == 1 {
            // The probe notices before a call does.
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        let title = format!("after silence {iteration}");
        let lists = futures_util::future::join_all(calls.iter().map(list)).await;
        let created = proxied.call("IssueService/CreateIssue", &create(&title, true)).await;

        for listed in lists {
            listed.unwrap_or_else(|status| panic!("{status:?}"));
        }
        created.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(proxied.count_issues_titled(&title).await, 1);
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_a_silent_network_fail_before_the_default_deadline_and_succeed_after_it() {
    let proxied = ProxiedService::start().await;
    let channel = proxied.service.channel();
    let message = ListIssuesRequest::default().encode_to_vec();
    // The default. A call that exceeds it fails with DEADLINE_EXCEEDED.
    let deadline = Duration::from_secs(30);
    let list =
        async || call_within(&channel, &proxied.caller.token, "IssueService/ListIssues", &message, deadline).await;
    list().await.unwrap();
    proxied.proxy.silence_all();

    assert_retriable(&list().await.unwrap_err(), Code::Unavailable, "DATABASE_UNAVAILABLE");
    // Now that the silence is known, calls do not wait for it.
    assert_retriable(&list().await.unwrap_err(), Code::Unavailable, "DATABASE_UNAVAILABLE");

    proxied.proxy.end_silence();
    eventually("calls succeed", async || list().await.is_ok()).await;
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_closed_while_established_fail_no_call() {
    let proxied = ProxiedService::start().await;
    for iteration in 0..10 {
        proxied.create_issue("uses a connection").await;
        // The probe of the database or the pool meets both of them, or one each.
        proxied.proxy.inject(FaultPoint::Startup, DropRequest);
        proxied.proxy.inject(FaultPoint::Startup, DropRequest);
        proxied.proxy.close_all_and_wait().await;
        let title = format!("after cut {iteration}");
        let created = proxied.call("IssueService/CreateIssue", &create(&title, false)).await;
        created.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(proxied.count_issues_titled(&title).await, 1);
        proxied.proxy.clear_faults();
    }
    assert!(proxied.proxy.injected_count() > 0, "no fault was injected");
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connection_known_to_be_closed_fails_no_write_without_request_id() {
    let proxied = ProxiedService::start().await;
    for iteration in 0..10 {
        proxied.create_issue("uses a connection").await;
        proxied.proxy.close_all_and_wait().await;
        let title = format!("after cut {iteration}");
        let created = proxied.call("IssueService/CreateIssue", &create(&title, false)).await;
        created.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(proxied.count_issues_titled(&title).await, 1);
    }
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_creates_are_each_applied_once_when_their_batch_breaks() {
    let proxied = ProxiedService::start().await;
    for with_request_ids in [true, false] {
        for (at, fault) in [
            (FaultPoint::Commit, DropRequest),
            (FaultPoint::Commit, DropResponse),
            (INSERT, DropResponse),
            (INSERT, DropRequest),
        ] {
            let requests: Vec<_> =
                (0..CONCURRENT_CREATES).map(|_| create(&Uuid::new_v4().to_string(), with_request_ids)).collect();
            if with_request_ids || at != FaultPoint::Commit {
                (0..3).for_each(|_| proxied.proxy.inject(at, fault));
            }
            let mut calls = JoinSet::new();
            let channel = proxied.service.channel();
            for request in requests {
                let (channel, token) = (channel.clone(), proxied.caller.token.clone());
                calls.spawn(async move {
                    let message = request.encode_to_vec();
                    let result = call(&channel, &token, "IssueService/CreateIssue", &message).await;
                    (request.issue.unwrap().title, result)
                });
            }
            while let Some(called) = calls.join_next().await {
                let (title, result) = called.unwrap();
                let applied = proxied.count_issues_titled(&title).await;
                if with_request_ids || result.is_ok() {
                    assert_eq!(applied, 1, "{at:?} {fault:?}: {result:?}");
                    result.unwrap();
                } else {
                    assert!(applied <= 1, "{at:?} {fault:?}");
                    assert_outcome_unknown(result, "CreateIssue", fault);
                }
            }
            proxied.proxy.clear_faults();
        }
    }
    assert!(proxied.proxy.injected_count() >= 6);
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_commit_ends_at_the_deadline_and_a_retry_returns_the_stored_response() {
    let proxied = ProxiedService::start().await;
    let channel = proxied.service.channel();
    let title = "held".to_owned();
    let message = create(&title, true).encode_to_vec();
    let method = "IssueService/CreateIssue";
    proxied.create_issue("warm up").await;
    proxied.proxy.inject(FaultPoint::Commit, DelayResponse);

    let delayed = tokio::spawn({
        let (channel, token, message) = (channel.clone(), proxied.caller.token.clone(), message.clone());
        async move { call_within(&channel, &token, method, &message, DELAYED_DEADLINE).await }
    });
    eventually("the database has committed", async || proxied.count_issues_titled(&title).await == 1).await;

    // Either the service or the client ends the call first.
    let code = delayed.await.unwrap().unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    let retried = call(&channel, &proxied.caller.token, method, &message).await.unwrap();
    assert_eq!(Issue::decode(&*retried).unwrap().title, title);
    assert_eq!(proxied.count_issues_titled(&title).await, 1);
    proxied.proxy.release();
    assert!(call(&channel, &proxied.caller.token, method, &message).await.unwrap() == retried);
    proxied.service.assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_are_stored_once_while_connections_break_under_load() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let proxied = ProxiedService::start().await;
    let (_addresses, address) = watch::channel(proxied.service.address.clone());
    proxied.proxy.inject_randomly(rng.fork(), 10);
    let load = Load::start(&proxied.external.config(), address, CLIENTS, &mut rng).await;
    for _ in 0..settings.pick(5, 100) {
        load.wait_for_acknowledged(rng.u64(20..100)).await;
        if rng.u32(..3) == 0 {
            proxied.proxy.close_all();
        }
    }
    let applied = load.finish().await;
    proxied.proxy.clear_faults();
    println!("{} mutations, {} faults injected", applied.len(), proxied.proxy.injected_count());
    assert!(proxied.proxy.injected_count() > 5);
    verify(&proxied.external.config(), &proxied.service.channel(), applied).await;
    proxied.service.assert_no_internal_errors();
}
