//! The connection to the database breaks in the middle of things: what callers are told is what became of it, and nothing
//! is ever written twice.

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
    harness::{Caller, Form, call, call_within, callers},
    load::Load,
    postgres_proxy::{
        At,
        Fault::{self, CutAfter, CutAtOnce, CutBefore, Hold},
        Proxy,
    },
    support::{
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, program},
    },
    verify::verify,
};

/// The autocommitted statement of a CreateIssue without a request id.
const INSERT: At = At::Execute("create_issues");
/// The statements of an UpdateIssue and of a BulkUpdateStatus.
const UPDATE: At = At::Execute("update_issues");
const BULK: At = At::Execute("bulk_update_issues");
const CREATES_AT_ONCE: usize = 16;
/// Long enough to get as far as the commit on a busy machine.
const HELD_DEADLINE: Duration = Duration::from_secs(4);
const CLIENTS: usize = 8;

/// A service whose way to the database can be broken.
struct Broken {
    // Before the database that it uses.
    service: Service,
    proxy: Proxy,
    external: External,
    caller: Caller,
}

impl Broken {
    async fn start() -> Self {
        let external = External::start(Durability::Throwaway);
        let proxy = Proxy::start(external.cluster.socket_dir().join(".s.PGSQL.5432")).await;
        let service = Service::start(&external.dir, program(&["--database-url", &proxy.url()]));
        let caller = callers(&external.config(), 1).await.remove(0);
        Self { service, proxy, external, caller }
    }

    async fn call(&self, method: &str, message: &impl Message) -> Result<Vec<u8>, Status> {
        call(&self.service.channel(), &self.caller.token, method, &message.encode_to_vec()).await
    }

    async fn file(&self, title: &str) -> Issue {
        let filed = self.call("IssueService/CreateIssue", &create(title, false)).await.unwrap();
        Issue::decode(&*filed).unwrap()
    }

    async fn count(&self, sql: &str, value: &str) -> i64 {
        session(&self.external.config()).await.query_one(sql, &[&value]).await.unwrap().get(0)
    }

    async fn issues_titled(&self, title: &str) -> i64 {
        self.count("SELECT count(*) FROM issues WHERE title = $1", title).await
    }

    async fn comments(&self, content: &str) -> i64 {
        self.count("SELECT count(*) FROM comments WHERE content = $1", content).await
    }

    async fn version(&self, issue: &Issue) -> i64 {
        self.count("SELECT version FROM issues WHERE id = $1::text::uuid", &issue.id).await
    }

    /// A call with a request id that is struck: its caller does not notice, it is made once, and has one reply.
    async fn assert_made_once(
        &self,
        (at, fault): (At, Fault),
        method: &str,
        request: &impl Message,
        written: impl AsyncFn() -> i64,
    ) {
        let what = format!("{method} {at:?} {fault:?}");
        self.proxy.arm(at, fault);

        let reply = self.call(method, request).await;

        assert_eq!(self.proxy.disarm(), [], "{what}");
        let reply = reply.unwrap_or_else(|status| panic!("{what}: {status:?}"));
        assert_eq!(written().await, 1, "{what}");
        assert!(self.call(method, request).await.unwrap() == reply, "{what}: another reply");
    }

    /// A mutation of an issue that exists, with each fault at its commit: with a request id its caller never notices,
    /// without one he is told that nobody knows, and in either case `written` tells of one write at most.
    async fn assert_struck_at_commit<M: Message + Clone>(
        &self,
        method: &str,
        request: impl Fn(&Issue, &str, String) -> M,
        written: impl AsyncFn(&Issue, &str) -> i64,
    ) {
        for fault in [CutBefore, CutAfter, CutAtOnce] {
            let mark = Uuid::new_v4().to_string();
            let issue = self.file("to be changed").await;
            let with_id = request(&issue, &mark, Uuid::new_v4().to_string());
            let is_written = async || written(&issue, &mark).await;
            self.assert_made_once((At::Commit, fault), method, &with_id, is_written).await;

            let mark = Uuid::new_v4().to_string();
            let issue = self.file("to be changed").await;
            self.proxy.arm(At::Commit, fault);
            let told = self.call(method, &request(&issue, &mark, String::new())).await;
            assert_eq!(self.proxy.disarm(), [], "{method} {fault:?}");
            assert_outcome_unknown(told, method, fault);
            let written = written(&issue, &mark).await;
            match fault {
                CutBefore => assert_eq!(written, 0, "{method}"),
                CutAfter => assert_eq!(written, 1, "{method}"),
                CutAtOnce | Hold => assert!(written <= 1, "{method}: {written}"),
            }
        }
    }
}

fn create(title: &str, with_id: bool) -> CreateIssueRequest {
    let issue = Some(Issue { title: title.to_owned(), ..Issue::default() });
    let request_id = if with_id { Uuid::new_v4().to_string() } else { String::new() };
    CreateIssueRequest { issue, request_id, ..Default::default() }
}

/// With a comment, which makes it a transaction without a request id too.
fn update(issue: &Issue, mark: &str, request_id: String) -> UpdateIssueRequest {
    let issue = Some(Issue { id: issue.id.clone(), title: mark.to_owned(), ..Issue::default() });
    UpdateIssueRequest { issue, comment: mark.to_owned(), request_id, ..Default::default() }
}

fn bulk(issue: &Issue, mark: &str, request_id: String) -> BulkUpdateStatusRequest {
    let (ids, comment) = (vec![issue.id.clone()], mark.to_owned());
    BulkUpdateStatusRequest { ids, status: IssueStatus::Closed.into(), comment, request_id, ..Default::default() }
}

fn comment(issue: &Issue, mark: &str, request_id: String) -> CreateCommentRequest {
    let comment = Comment { issue_id: issue.id.clone(), content: mark.to_owned(), ..Comment::default() };
    CreateCommentRequest { comment: Some(comment), request_id, ..Default::default() }
}

#[track_caller]
fn assert_outcome_unknown(told: Result<Vec<u8>, Status>, method: &str, fault: Fault) {
    let status = told.expect_err("nobody can know what became of it");
    let reason = status.get_details_error_info().map(|info| info.reason).unwrap_or_default();
    assert_eq!((status.code(), &*reason), (Code::Unavailable, "OUTCOME_UNKNOWN"), "{method} {fault:?}: {status:?}");
    assert!(!status.message().to_lowercase().contains("connection closed"), "the driver's words: {status:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_with_a_request_id_is_made_once_wherever_its_connection_breaks() {
    let broken = Broken::start().await;
    for struck in [
        (At::Commit, CutBefore),
        (At::Commit, CutAfter),
        (At::Commit, CutAtOnce),
        (INSERT, CutBefore),
        (INSERT, CutAfter),
        (INSERT, CutAtOnce),
    ] {
        let title = Uuid::new_v4().to_string();
        let (request, filed) = (create(&title, true), async || broken.issues_titled(&title).await);
        broken.assert_made_once(struck, "IssueService/CreateIssue", &request, filed).await;
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_without_a_request_id_whose_statement_was_sent_is_told_to_be_unknown_and_made_once_at_most() {
    let broken = Broken::start().await;
    for fault in [CutBefore, CutAfter, CutAtOnce] {
        let title = Uuid::new_v4().to_string();
        broken.proxy.arm(INSERT, fault);

        let told = broken.call("IssueService/CreateIssue", &create(&title, false)).await;

        assert_eq!(broken.proxy.disarm(), []);
        assert_outcome_unknown(told, "CreateIssue", fault);
        let made = broken.issues_titled(&title).await;
        assert!(if fault == CutAfter { made == 1 } else { made <= 1 }, "{fault:?}: {made}");
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_a_bulk_change_and_a_comment_are_made_once_at_most_wherever_their_commit_breaks() {
    let broken = Broken::start().await;
    broken
        .assert_struck_at_commit("IssueService/UpdateIssue", update, async |issue: &Issue, mark: &str| {
            let commented = broken.comments(mark).await;
            assert_eq!(broken.version(issue).await, 1 + commented, "in part");
            commented
        })
        .await;
    broken
        .assert_struck_at_commit("IssueService/BulkUpdateStatus", bulk, async |issue: &Issue, mark: &str| {
            let commented = broken.comments(mark).await;
            assert_eq!(broken.version(issue).await, 1 + commented, "in part");
            commented
        })
        .await;
    let issue = broken.file("to be commented").await;
    for fault in [CutBefore, CutAfter, CutAtOnce] {
        let mark = Uuid::new_v4().to_string();
        let request = comment(&issue, &mark, Uuid::new_v4().to_string());
        let made = async || broken.comments(&mark).await;
        broken.assert_made_once((At::Commit, fault), "CommentService/CreateComment", &request, made).await;
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_breaks_before_its_commit_is_made_again_without_the_caller_noticing() {
    let broken = Broken::start().await;
    for request_id in [String::new(), Uuid::new_v4().to_string()] {
        for (at, fault) in [(UPDATE, CutBefore), (UPDATE, CutAfter)] {
            let issue = broken.file("to be changed").await;
            let mark = Uuid::new_v4().to_string();
            let request_id = if request_id.is_empty() { String::new() } else { Uuid::new_v4().to_string() };
            broken.proxy.arm(at, fault);
            let updated = broken.call("IssueService/UpdateIssue", &update(&issue, &mark, request_id)).await;
            assert_eq!(broken.proxy.disarm(), []);
            assert_eq!(Issue::decode(&*updated.unwrap()).unwrap().version, 2, "{fault:?}");
            assert_eq!((broken.version(&issue).await, broken.comments(&mark).await), (2, 1), "{fault:?}");
        }
        for fault in [CutBefore, CutAfter] {
            let issue = broken.file("to be closed").await;
            let mark = Uuid::new_v4().to_string();
            let request_id = if request_id.is_empty() { String::new() } else { Uuid::new_v4().to_string() };
            broken.proxy.arm(BULK, fault);
            broken.call("IssueService/BulkUpdateStatus", &bulk(&issue, &mark, request_id)).await.unwrap();
            assert_eq!(broken.proxy.disarm(), []);
            assert_eq!((broken.version(&issue).await, broken.comments(&mark).await), (2, 1), "{fault:?}");
        }
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_do_not_notice_a_connection_that_breaks_under_them() {
    let broken = Broken::start().await;
    let issue = broken.file("to be read").await;
    let get = GetIssueRequest { id: issue.id.clone(), ..Default::default() };
    for fault in [CutBefore, CutAfter, CutAtOnce] {
        broken.proxy.arm(At::Execute("get_issue"), fault);
        let read = broken.call("IssueService/GetIssue", &get).await;
        assert_eq!(broken.proxy.disarm(), []);
        let read = read.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
        assert_eq!(Issue::decode(&*read).unwrap(), issue);

        broken.proxy.arm(At::Execute("list_issues"), fault);
        let listed = broken.call("IssueService/ListIssues", &ListIssuesRequest::default()).await;
        assert_eq!(broken.proxy.disarm(), []);
        listed.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_calls_is_found_out_although_the_connection_for_that_breaks() {
    let broken = Broken::start().await;
    let issue = broken.file("to be read").await;
    let get = GetIssueRequest { id: issue.id, ..Default::default() }.encode_to_vec();
    let others = callers(&broken.external.config(), 3).await;
    for (other, fault) in others.iter().zip([CutBefore, CutAfter, CutAtOnce]) {
        broken.proxy.arm(At::Execute("find_callers"), fault);
        let read = call(&broken.service.channel(), &other.token, "IssueService/GetIssue", &get).await;
        assert_eq!(broken.proxy.disarm(), []);
        read.unwrap_or_else(|status| panic!("{fault:?}: {status:?}"));
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_were_cut_while_idle_cost_no_call() {
    let broken = Broken::start().await;
    for round in 0..Form::of_environment().pick(5, 50) {
        // Several connections are there to be cut.
        let calls = (0..4).map(|nth| ListIssuesRequest { filter: format!("x{nth}"), ..Default::default() });
        let calls: Vec<_> = calls.collect();
        let list = |call| broken.call("IssueService/ListIssues", call);
        for listed in futures_util::future::join_all(calls.iter().map(list)).await {
            listed.unwrap();
        }
        // Half of the times the service has no time to notice.
        match round % 2 {
            0 => broken.proxy.cut_all_noticed().await,
            _ => broken.proxy.cut_all(),
        }
        let title = format!("after cut {round}");
        let lists = futures_util::future::join_all(calls.iter().map(list)).await;
        let filed = broken.call("IssueService/CreateIssue", &create(&title, true)).await;

        for listed in lists {
            listed.unwrap_or_else(|status| panic!("{status:?}"));
        }
        filed.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(broken.issues_titled(&title).await, 1);
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_connection_known_to_be_dead_costs_no_write_without_a_request_id() {
    let broken = Broken::start().await;
    for round in 0..10 {
        broken.file("one that uses a connection").await;
        broken.proxy.cut_all_noticed().await;
        let title = format!("after cut {round}");
        let filed = broken.call("IssueService/CreateIssue", &create(&title, false)).await;
        filed.unwrap_or_else(|status| panic!("{status:?}"));
        assert_eq!(broken.issues_titled(&title).await, 1);
    }
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_creations_at_once_each_is_made_once_whatever_breaks_under_their_round() {
    let broken = Broken::start().await;
    for with_ids in [true, false] {
        for (at, fault) in [(At::Commit, CutBefore), (At::Commit, CutAfter), (INSERT, CutAfter), (INSERT, CutBefore)] {
            let requests: Vec<_> =
                (0..CREATES_AT_ONCE).map(|_| create(&Uuid::new_v4().to_string(), with_ids)).collect();
            if with_ids || at != At::Commit {
                (0..3).for_each(|_| broken.proxy.arm(at, fault));
            }
            let mut calls = JoinSet::new();
            let channel = broken.service.channel();
            for request in requests {
                let (channel, token) = (channel.clone(), broken.caller.token.clone());
                calls.spawn(async move {
                    let message = request.encode_to_vec();
                    let answer = call(&channel, &token, "IssueService/CreateIssue", &message).await;
                    (request.issue.unwrap().title, answer)
                });
            }
            while let Some(called) = calls.join_next().await {
                let (title, answer) = called.unwrap();
                let made = broken.issues_titled(&title).await;
                if with_ids || answer.is_ok() {
                    assert_eq!(made, 1, "{at:?} {fault:?}: {answer:?}");
                    answer.unwrap();
                } else {
                    assert!(made <= 1, "{at:?} {fault:?}");
                    assert_outcome_unknown(answer, "CreateIssue", fault);
                }
            }
            broken.proxy.disarm();
        }
    }
    assert!(broken.proxy.struck() >= 6);
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_is_late_ends_at_the_callers_deadline_and_its_retry_gets_the_reply() {
    let broken = Broken::start().await;
    let channel = broken.service.channel();
    let title = "held".to_owned();
    let message = create(&title, true).encode_to_vec();
    let method = "IssueService/CreateIssue";
    broken.file("so that all is warm").await;
    broken.proxy.arm(At::Commit, Hold);

    let late = tokio::spawn({
        let (channel, token, message) = (channel.clone(), broken.caller.token.clone(), message.clone());
        async move { call_within(&channel, &token, method, &message, HELD_DEADLINE).await }
    });
    eventually("the database has done it", async || broken.issues_titled(&title).await == 1).await;

    // Whose clock is quicker, the service's or the client's own.
    let code = late.await.unwrap().unwrap_err().code();
    assert!(matches!(code, Code::DeadlineExceeded | Code::Cancelled), "{code:?}");
    let retried = call(&channel, &broken.caller.token, method, &message).await.unwrap();
    assert_eq!(Issue::decode(&*retried).unwrap().title, title);
    assert_eq!(broken.issues_titled(&title).await, 1);
    broken.proxy.release();
    assert!(call(&channel, &broken.caller.token, method, &message).await.unwrap() == retried);
    broken.service.assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_on_a_breaking_line_every_acknowledged_write_is_there_once() {
    let form = Form::of_environment();
    let mut rng = form.rng();
    let broken = Broken::start().await;
    let (_addresses, address) = watch::channel(broken.service.address.clone());
    broken.proxy.arm_by_chance(rng.fork(), 10);
    let load = Load::start(&broken.external.config(), address, CLIENTS, &mut rng).await;
    for _ in 0..form.pick(5, 100) {
        load.acknowledges(rng.u64(20..100)).await;
        if rng.u32(..3) == 0 {
            broken.proxy.cut_all();
        }
    }
    let made = load.finish().await;
    broken.proxy.disarm();
    println!("{} mutations, {} messages struck", made.len(), broken.proxy.struck());
    assert!(broken.proxy.struck() > 5);
    verify(&broken.external.config(), &broken.service.channel(), made).await;
    broken.service.assert_sound();
}
