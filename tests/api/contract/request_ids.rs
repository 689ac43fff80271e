//! `request_id` and `validate_only`: idempotent retries and dry runs of every mutation.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures_util::future::join_all;
use issue_tracker::{
    db::idempotency::prune_requests,
    pb::{
        AddIssueLabelsRequest, BatchCreateIssuesRequest, BulkUpdateStatusRequest, Comment, CreateCommentRequest,
        CreateIssueRequest, CreateLabelRequest, CreateUserRequest, DeleteCommentRequest, DeleteIssueRequest,
        DeleteLabelRequest, ImportChunk, ImportIssuesRequest, ImportOptions, Issue, Label, LoginRequest, LogoutRequest,
        RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest, ResetPasswordRequest, RevertImportRequest,
        RevokeApiTokenRequest, Role, Status as IssueStatus, UndeleteIssueRequest, UpdateCommentRequest,
        UpdateIssueRequest, UpdateLabelRequest, UpdateUserRequest, User,
        import_issues_request::Message as ImportMessage,
    },
};
use prost::Message;
use tonic::{Code, Status};
use uuid::Uuid;

use super::{Method, call, our_methods};
use crate::harness::{Client, PASSWORD, Tracker, assert_error, bad_fields, eventually};

/// The default of `--stored-response-hours`.
const RESPONSE_HOURS: i32 = 24;

/// A method, a request that changes something, and a request with another payload. In the order of the cases, the first
/// requests all succeed.
type Case = (&'static str, Vec<u8>, Vec<u8>);

fn case<T: Message>(name: &'static str, requests: [T; 2]) -> Case {
    let [request, other] = requests.map(|request| request.encode_to_vec());
    (name, request, other)
}

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

fn create_issue(title: &str) -> Vec<u8> {
    let issue = Some(Issue { title: title.to_owned(), ..Issue::default() });
    CreateIssueRequest { issue, ..Default::default() }.encode_to_vec()
}

async fn issue_cases(tracker: &Tracker) -> Vec<Case> {
    let id = tracker.admin.file("to be changed").await.id;
    let other_id = tracker.admin.file("to be closed").await.id;
    let issue = |title: &str| Issue { title: title.into(), ..Issue::default() };
    vec![
        ("IssueService/CreateIssue", create_issue("one"), create_issue("another")),
        case(
            "IssueService/BatchCreateIssues",
            ["one", "another"].map(|title| BatchCreateIssuesRequest {
                issues: vec![issue("first"), issue(title)],
                ..Default::default()
            }),
        ),
        case(
            "IssueService/UpdateIssue",
            ["changed", "changed otherwise"].map(|title| UpdateIssueRequest {
                issue: Some(Issue { id: id.clone(), ..issue(title) }),
                comment: "because".into(),
                ..Default::default()
            }),
        ),
        case(
            "IssueService/BulkUpdateStatus",
            [IssueStatus::Closed, IssueStatus::InProgress].map(|status| BulkUpdateStatusRequest {
                ids: vec![id.clone(), other_id.clone()],
                status: status.into(),
                comment: "all done".into(),
                ..Default::default()
            }),
        ),
        case(
            "IssueService/DeleteIssue",
            [0, 1].map(|expected_version| DeleteIssueRequest {
                id: id.clone(),
                expected_version,
                ..Default::default()
            }),
        ),
        case(
            "IssueService/UndeleteIssue",
            [0, 1].map(|expected_version| UndeleteIssueRequest {
                id: id.clone(),
                expected_version,
                ..Default::default()
            }),
        ),
    ]
}

async fn comment_cases(tracker: &Tracker) -> Vec<Case> {
    let issue_id = tracker.admin.file("with comments").await.id;
    let id = tracker.admin.comment(&issue_id, "first").await.id;
    let comment = |content: &str| Comment { content: content.to_owned(), ..Comment::default() };
    vec![
        case(
            "CommentService/CreateComment",
            ["one", "another"].map(|content| CreateCommentRequest {
                comment: Some(Comment { issue_id: issue_id.clone(), ..comment(content) }),
                ..Default::default()
            }),
        ),
        case(
            "CommentService/UpdateComment",
            ["changed", "changed otherwise"].map(|content| UpdateCommentRequest {
                comment: Some(Comment { id: id.clone(), ..comment(content) }),
                ..Default::default()
            }),
        ),
        case(
            "CommentService/DeleteComment",
            [id.clone(), new_id()].map(|id| DeleteCommentRequest { id, ..Default::default() }),
        ),
    ]
}

async fn label_cases(tracker: &Tracker) -> Vec<Case> {
    let issue_id = tracker.admin.file("with labels").await.id;
    let [bug, ui] = [tracker.admin.label("bug").await.id, tracker.admin.label("ui").await.id];
    let label = |name: &str| Label { name: name.to_owned(), ..Label::default() };
    let both = || [bug.clone(), ui.clone()];
    vec![
        case(
            "LabelService/CreateLabel",
            ["one", "another"]
                .map(|name| CreateLabelRequest { label: Some(label(name)), ..CreateLabelRequest::default() }),
        ),
        case(
            "LabelService/UpdateLabel",
            ["defect", "fault"].map(|name| UpdateLabelRequest {
                label: Some(Label { id: bug.clone(), ..label(name) }),
                ..Default::default()
            }),
        ),
        case(
            "LabelService/AddIssueLabels",
            both().map(|id| AddIssueLabelsRequest {
                issue_id: issue_id.clone(),
                label_ids: vec![id],
                ..Default::default()
            }),
        ),
        case(
            "LabelService/RemoveIssueLabels",
            both().map(|id| RemoveIssueLabelsRequest {
                issue_id: issue_id.clone(),
                label_ids: vec![id],
                ..Default::default()
            }),
        ),
        case(
            "LabelService/ReplaceIssueLabels",
            both().map(|id| ReplaceIssueLabelsRequest {
                issue_id: issue_id.clone(),
                label_ids: vec![id],
                ..Default::default()
            }),
        ),
        case(
            "LabelService/DeleteLabel",
            [true, false].map(|force| DeleteLabelRequest { id: bug.clone(), force, ..Default::default() }),
        ),
    ]
}

async fn user_cases(tracker: &Tracker) -> Vec<Case> {
    let user = tracker.user("grace", Role::Viewer).await.user;
    let token_id: Uuid = tracker.sql("SELECT id FROM tokens ORDER BY id DESC LIMIT 1", &[]).await[0].get(0);
    vec![
        case(
            "UserService/CreateUser",
            ["ada", "alan"].map(|name| CreateUserRequest {
                user: Some(User { username: name.into(), ..User::default() }),
                password: PASSWORD.into(),
                ..Default::default()
            }),
        ),
        case(
            "UserService/UpdateUser",
            [Role::Member, Role::Admin].map(|role| UpdateUserRequest {
                user: Some(User { id: user.id.clone(), role: role.into(), ..User::default() }),
                ..Default::default()
            }),
        ),
        case(
            "UserService/ResetPassword",
            [user.id.clone(), new_id()].map(|user_id| ResetPasswordRequest {
                user_id,
                new_password: PASSWORD.into(),
                ..Default::default()
            }),
        ),
        case(
            "AuthService/RevokeApiToken",
            [token_id.to_string(), new_id()].map(|id| RevokeApiTokenRequest { id, ..Default::default() }),
        ),
    ]
}

async fn import_cases(tracker: &Tracker) -> Vec<Case> {
    let import_id = new_id();
    let options = ImportOptions { import_id: import_id.clone(), ..Default::default() };
    let file = ImportChunk { offset: 0, data: "title\nimported\n".into() };
    let messages = [ImportMessage::Options(options), ImportMessage::Chunk(file)];
    let messages = messages.map(|message| ImportIssuesRequest { message: Some(message) });
    let mut responses = tracker.admin.imports().import_issues(tokio_stream::iter(messages)).await.unwrap().into_inner();
    while responses.message().await.unwrap().is_some() {}
    let revert = |force| RevertImportRequest { import_id: import_id.clone(), force, ..Default::default() };
    vec![case("ImportService/RevertImport", [revert(false), revert(true)])]
}

/// Returns a case for every mutation with a request id, except Logout and ChangePassword: these change the caller's own
/// credentials, and the tests of `AuthService` cover them.
async fn all_cases(tracker: &Tracker) -> Vec<(Method, Vec<u8>, Vec<u8>)> {
    let mut cases = issue_cases(tracker).await;
    cases.extend(comment_cases(tracker).await);
    cases.extend(label_cases(tracker).await);
    cases.extend(user_cases(tracker).await);
    cases.extend(import_cases(tracker).await);

    let mut methods = our_methods();
    methods.retain(|method| method.field("request_id").is_some());
    methods.retain(|method| !["AuthService/Logout", "AuthService/ChangePassword"].contains(&&*method.name));
    let expected: BTreeSet<_> = methods.iter().map(|method| &*method.name).collect();
    assert_eq!(cases.iter().map(|case| case.0).collect::<BTreeSet<_>>(), expected, "a mutation has no case");
    let mut method = |name: &str| methods.swap_remove(methods.iter().position(|method| method.name == name).unwrap());
    cases.into_iter().map(|(name, request, other)| (method(name), request, other)).collect()
}

#[tokio::test]
async fn repeated_request_returns_the_stored_response_byte_for_byte_and_writes_nothing() {
    let tracker = Tracker::start().await;
    for (method, request, other) in all_cases(&tracker).await {
        let (name, id) = (&*method.name, new_id());
        let request = method.with_request_id(&request, &id);
        let before = tracker.contents().await;
        let first = call(&tracker, &tracker.admin, name, &request).await.unwrap();
        let after = tracker.contents().await;
        assert_ne!(after, before, "{name} changes nothing");

        assert_eq!(call(&tracker, &tracker.admin, name, &request).await.unwrap(), first, "{name}");
        // Request ids are case-insensitive, as UUIDs are.
        let upper_case = method.with_request_id(&request, &id.to_uppercase());
        assert_eq!(call(&tracker, &tracker.admin, name, &upper_case).await.unwrap(), first, "{name}");
        let other = call(&tracker, &tracker.admin, name, &method.with_request_id(&other, &id)).await;
        let status = assert_error(other, Code::InvalidArgument, "REQUEST_ID_REUSED");
        assert_eq!(bad_fields(&status), ["request_id"], "{name}");
        assert_eq!(tracker.contents().await, after, "{name}");
    }
}

#[tokio::test]
async fn dry_run_writes_nothing_and_does_not_use_the_request_id() {
    let tracker = Tracker::start().await;
    for (method, request, _) in all_cases(&tracker).await {
        let (name, id) = (&*method.name, new_id());
        let before = tracker.contents().await;
        let dry_run = method.with_request_id(&method.validate_only(&request), &id);
        call(&tracker, &tracker.admin, name, &dry_run).await.unwrap();
        assert_eq!(tracker.contents().await, before, "{name}");

        call(&tracker, &tracker.admin, name, &method.with_request_id(&request, &id)).await.unwrap();
        assert_ne!(tracker.contents().await, before, "{name}");
    }
}

#[tokio::test]
async fn request_id_that_is_not_a_uuid_is_invalid() {
    let tracker = Tracker::start().await;
    let cases = all_cases(&tracker).await;
    let before = tracker.contents().await;
    let uuid = Uuid::now_v7();
    let other_notations = [uuid.simple().to_string(), uuid.braced().to_string(), uuid.urn().to_string()];
    for (method, request, _) in cases {
        for id in other_notations.iter().map(|id| &**id).chain(["1", " ", &format!("{uuid} ")]) {
            let refused = call(&tracker, &tracker.admin, &method.name, &method.with_request_id(&request, id)).await;
            let status = assert_error(refused, Code::InvalidArgument, "INVALID");
            assert_eq!(bad_fields(&status), ["request_id"], "{}", method.name);
        }
    }
    let request = LogoutRequest { request_id: "1".into(), validate_only: false };
    let status = tracker.admin.auth().logout(request).await;
    assert_eq!(bad_fields(&assert_error(status, Code::InvalidArgument, "INVALID")), ["request_id"]);
    assert_eq!(tracker.contents().await, before);
}

fn method(name: &str) -> Method {
    our_methods().into_iter().find(|method| method.name == name).unwrap()
}

/// Files an issue with a request id.
async fn file(tracker: &Tracker, client: &Client, title: &str, id: &str) -> Result<Bytes, Status> {
    let method = method("IssueService/CreateIssue");
    call(tracker, client, &method.name, &method.with_request_id(&create_issue(title), id)).await
}

#[tokio::test]
async fn request_ids_of_different_callers_are_independent() {
    let tracker = Tracker::start().await;
    let id = new_id();
    let mine = file(&tracker, &tracker.member, "mine", &id).await.unwrap();
    let other = file(&tracker, &tracker.admin, "other", &id).await.unwrap();
    assert_ne!(mine, other);
    assert_eq!(file(&tracker, &tracker.member, "mine", &id).await.unwrap(), mine);
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
}

#[tokio::test]
async fn request_id_belongs_to_the_user_across_tokens() {
    let tracker = Tracker::start().await;
    let id = new_id();
    let first = file(&tracker, &tracker.member, "mine", &id).await.unwrap();
    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };
    let session = tracker.member.auth().login(login).await.unwrap().into_inner().access_token;
    let session = tracker.client_with_token(Some(&session));
    assert_eq!(file(&tracker, &session, "mine", &id).await.unwrap(), first);
}

#[tokio::test]
async fn request_id_used_for_another_method_is_rejected() {
    let tracker = Tracker::start().await;
    let id = new_id();
    let issue_id = Issue::decode(file(&tracker, &tracker.member, "one", &id).await.unwrap()).unwrap().id;
    // Both requests have the same fields with the same numbers.
    let delete = DeleteIssueRequest { id: issue_id.clone(), request_id: new_id(), ..Default::default() };
    let undelete = UndeleteIssueRequest { id: issue_id, request_id: delete.request_id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(delete).await.unwrap();
    let reused = tracker.member.issues().undelete_issue(undelete).await;
    assert_error(reused, Code::InvalidArgument, "REQUEST_ID_REUSED");
    let label = Some(Label { name: "bug".into(), ..Label::default() });
    let reused = CreateLabelRequest { label, request_id: id, validate_only: false };
    let reused = tracker.member.labels().create_label(reused).await;
    assert_error(reused, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
}

#[tokio::test]
async fn failed_call_stores_no_response() {
    let tracker = Tracker::start().await;
    let taken = tracker.member.label("bug").await;
    let label = Some(Label { name: "Bug".into(), ..Label::default() });
    let request = CreateLabelRequest { label, request_id: new_id(), validate_only: false };
    let mut labels = tracker.member.labels();
    assert_error(labels.create_label(request.clone()).await, Code::AlreadyExists, "ALREADY_EXISTS");
    assert_eq!(tracker.count("SELECT count(*) FROM requests").await, 0);

    labels.delete_label(DeleteLabelRequest { id: taken.id, ..Default::default() }).await.unwrap();

    let created = labels.create_label(request.clone()).await.unwrap().into_inner();
    assert_eq!(created.name, "Bug");
    // The stored response is returned although the label has been deleted.
    labels.delete_label(DeleteLabelRequest { id: created.id.clone(), ..Default::default() }).await.unwrap();
    assert_eq!(labels.create_label(request).await.unwrap().into_inner(), created);
    assert_eq!(tracker.count("SELECT count(*) FROM labels").await, 0);
}

#[tokio::test]
async fn concurrent_calls_with_one_request_id_write_once_and_return_the_same() {
    let tracker = Tracker::start().await;
    for round in 0..30 {
        let (id, title) = (new_id(), format!("issue {round}"));
        let responses = join_all((0..4).map(|_| file(&tracker, &tracker.member, &title, &id))).await;
        let responses: Vec<Bytes> = responses.into_iter().map(Result::unwrap).collect();
        assert!(responses.iter().all(|response| *response == responses[0]));
        let issue = Issue::decode(responses[0].clone()).unwrap();
        assert_eq!(tracker.count("SELECT count(*) FROM issues").await, round + 1);

        // A second application of the update would fail, because its expected version is stale.
        let update = UpdateIssueRequest {
            issue: Some(Issue { id: issue.id.clone(), priority: 3, ..Issue::default() }),
            expected_version: 1,
            comment: "urgent".into(),
            request_id: new_id(),
            ..Default::default()
        };
        let updates = (0..4).map(|_| {
            let (mut issues, update) = (tracker.member.issues(), update.clone());
            async move { issues.update_issue(update).await.unwrap().into_inner() }
        });
        let updated = join_all(updates).await;
        assert!(updated.iter().all(|issue| *issue == updated[0]));
        assert_eq!((updated[0].version, updated[0].comment_count), (2, 1));
        assert_eq!(tracker.count("SELECT count(*) FROM comments").await, round + 1);
    }
}

#[tokio::test]
async fn one_of_two_concurrent_requests_with_the_same_id_succeeds() {
    let tracker = Tracker::start().await;
    for round in 0..20 {
        let id = new_id();
        let (left, right) =
            tokio::join!(file(&tracker, &tracker.member, "left", &id), file(&tracker, &tracker.member, "right", &id));
        let refused = if left.is_ok() { right } else { left };
        assert_error(refused, Code::InvalidArgument, "REQUEST_ID_REUSED");
        assert_eq!(tracker.count("SELECT count(*) FROM issues").await, round + 1);
    }
}

#[tokio::test]
async fn stored_responses_are_pruned_after_24_hours() {
    let tracker = Tracker::start().await;
    let [young, old] = [new_id(), new_id()];
    file(&tracker, &tracker.member, "young", &young).await.unwrap();
    file(&tracker, &tracker.member, "old", &old).await.unwrap();
    let age = "UPDATE requests SET create_time = now() - CASE WHEN request_id = $1 THEN interval '25 hours'
        ELSE interval '23 hours 59 minutes' END";
    tracker.sql(age, &[&old.parse::<Uuid>().unwrap()]).await;

    prune_requests(&tracker.db.conn().await.unwrap(), RESPONSE_HOURS, None).await.unwrap();

    assert_eq!(tracker.count("SELECT count(*) FROM requests").await, 1);
    file(&tracker, &tracker.member, "young", &young).await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 2);
    file(&tracker, &tracker.member, "old", &old).await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 3);
}

/// Inserts stored responses that are as old as this.
async fn store_responses(tracker: &Tracker, hours: i32, count: i32) {
    const SQL: &str = "INSERT INTO requests (caller_id, request_id, fingerprint, reply, create_time)
        SELECT gen_random_uuid(), gen_random_uuid(), sha256('x'), convert_to(repeat('x', 500), 'UTF8'),
            now() - make_interval(hours => $1, secs => nth / 100.0)
        FROM generate_series(1, $2::int4) AS nth";
    tracker.sql(SQL, &[&hours, &count]).await;
}

/// Deletes expired responses. Returns how many, and how many blocks of the table that has read.
async fn prune_and_count_blocks(tracker: &Tracker) -> (u64, i64) {
    const BLOCKS: &str = "SELECT heap_blks_read + heap_blks_hit FROM pg_statio_user_tables WHERE relname = 'requests'";
    let before = tracker.count(BLOCKS).await;
    let db = tracker.db.conn().await.unwrap();
    let (mut pruned, mut begin) = (0, None);
    loop {
        let more = prune_requests(&db, RESPONSE_HOURS, begin).await.unwrap();
        if more.count == 0 {
            break;
        }
        (pruned, begin) = (pruned + more.count, more.last_time);
    }
    db.execute("SELECT pg_stat_force_next_flush()", &[]).await.unwrap();
    drop(db);
    // The session reports its statistics when it is idle.
    let mut read = 0;
    eventually("the statistics are reported", async || {
        read = tracker.count(BLOCKS).await - before;
        read > 0
    })
    .await;
    (pruned, read)
}

#[tokio::test]
async fn pruning_reads_expired_responses_and_no_others() {
    const EXPIRED: u64 = 100;
    const BLOCK_BYTES: i64 = 8_192;
    let mut tracker = Tracker::start().await;
    // A running service prunes soon after its start.
    tracker.stop();
    tracker.wait_until_stopped().await;
    let session = tracker.session().await;
    let vacuum = async || session.batch_execute("VACUUM (ANALYZE, TRUNCATE false) requests").await.unwrap();
    // As after days of operation: recent responses are where expired ones were, in a table that was vacuumed before and after
    // they were deleted.
    store_responses(&tracker, RESPONSE_HOURS + 1, 12_000).await;
    vacuum().await;
    assert_eq!(prune_and_count_blocks(&tracker).await.0, 12_000);
    vacuum().await;
    store_responses(&tracker, RESPONSE_HOURS - 2, 12_000).await;
    store_responses(&tracker, RESPONSE_HOURS + 1, EXPIRED as i32).await;
    vacuum().await;

    let (pruned, blocks_read) = prune_and_count_blocks(&tracker).await;

    let blocks = tracker.count("SELECT pg_relation_size('requests')").await / BLOCK_BYTES;
    assert_eq!(pruned, EXPIRED);
    assert!(blocks_read < blocks / 2, "{blocks_read} of {blocks} blocks read for {EXPIRED} rows");
}
