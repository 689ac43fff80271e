//! The authorization matrix: a row for every RPC, checked against the service for every role, with valid and invalid
//! credentials, on the caller's own object and on another user's.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::{TryStreamExt, future::BoxFuture, stream};
use issue_tracker::pb::{
    AddIssueLabelsRequest, ApiToken, BatchCreateIssuesRequest, BatchGetIssuesRequest, BulkUpdateStatusRequest,
    ChangePasswordRequest, Comment, CreateApiTokenRequest, CreateCommentRequest, CreateIssueRequest,
    CreateLabelRequest, CreateUserRequest, DeleteCommentRequest, DeleteIssueRequest, DeleteLabelRequest,
    ExportIssuesRequest, GetImportRequest, GetIssueRequest, GetResolutionLatencyRequest, GetTopAssigneesRequest,
    GetUserRequest, ImportChunk, ImportIssuesRequest, ImportOptions, Issue, Label, ListApiTokensRequest,
    ListAuditEventsRequest, ListCommentsRequest, ListImportErrorsRequest, ListIssuesRequest, ListLabelsRequest,
    ListUsersRequest, LoginRequest, LogoutRequest, RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest,
    ResetPasswordRequest, RevertImportRequest, RevokeApiTokenRequest, Role, Status as IssueStatus,
    UndeleteIssueRequest, UpdateCommentRequest, UpdateIssueRequest, UpdateLabelRequest, UpdateUserRequest, User,
    WhoAmIRequest, import_issues_request::Message as ImportMessage,
};
use uuid::Uuid;

use super::*;
use crate::harness::PASSWORD;

/// The outcome of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// PERMISSION_DENIED.
    Denied,
    /// NOT_FOUND, as if the object did not exist.
    Missing,
    /// FAILED_PRECONDITION: the import belongs to another user.
    Mismatch,
    Unauthenticated,
}
use Outcome::{Denied, Done, Mismatch, Missing};

/// The outcomes for viewers, members and administrators.
type ByRole = [Outcome; 3];

const ALL: ByRole = [Done, Done, Done];
const MEMBERS: ByRole = [Denied, Done, Done];
const ADMINS: ByRole = [Denied, Denied, Done];
const MISSING_BUT_FOR_ADMINS: ByRole = [Missing, Missing, Done];
const MISMATCH: ByRole = [Denied, Mismatch, Mismatch];

struct Row {
    /// `Service/Method`.
    method: &'static str,
    own: ByRole,
    others: ByRole,
    /// Creates the object of a call, and returns the messages of a valid request.
    request: fn(Object) -> BoxFuture<'static, Vec<Vec<u8>>>,
}

/// Creates objects that belong to the owner.
#[derive(Clone)]
struct Object {
    fixture: &'static Fixture,
    owner: User,
}

struct Fixture {
    tracker: Tracker,
    /// The owner of objects that are not the caller's.
    other_user: User,
}

/// A row of the matrix. Without `others`, ownership makes no difference.
macro_rules! row {
    ($method:literal $roles:ident: |$object:ident| $request:expr) => {
        row!($method $roles, others $roles: |$object| $request)
    };
    ($method:literal $own:ident, others $others:ident: |$object:ident| $request:expr) => {
        Row {
            method: $method,
            own: $own,
            others: $others,
            request: |$object| {
                Box::pin(async move {
                    #[allow(unused_variables, reason = "some requests have no object")]
                    let $object = $object;
                    $request.messages()
                })
            },
        }
    };
}

/// Encodes one or more messages.
trait Messages {
    fn messages(self) -> Vec<Vec<u8>>;
}

impl<T: Message> Messages for T {
    fn messages(self) -> Vec<Vec<u8>> {
        vec![self.encode_to_vec()]
    }
}

struct Stream(Vec<ImportIssuesRequest>);

impl Messages for Stream {
    fn messages(self) -> Vec<Vec<u8>> {
        self.0.iter().map(Message::encode_to_vec).collect()
    }
}

fn new_name() -> String {
    format!("n{}", Uuid::now_v7().simple())
}

/// The messages of an import, which a client that has lost the responses sends again.
fn import_of(import_id: &str) -> Stream {
    let options = ImportOptions { import_id: import_id.to_owned(), ..Default::default() };
    let file = ImportChunk { offset: 0, data: "title\nimported\n".into() };
    let messages = [ImportMessage::Options(options), ImportMessage::Chunk(file)];
    Stream(messages.map(|message| ImportIssuesRequest { message: Some(message) }).into())
}

impl Object {
    fn admin(&self) -> &Client {
        &self.fixture.tracker.admin
    }

    fn owner_id(&self) -> Uuid {
        self.owner.id.parse().unwrap()
    }

    /// Creates an issue whose reporter and assignee is the owner.
    async fn issue(&self) -> Issue {
        let issue = self.admin().file("an issue").await;
        let reported = "UPDATE issues SET reporter_id = $2, assignee_id = $2, change_actor_id = $2 WHERE id = $1";
        self.fixture.tracker.sql(reported, &[&issue.id.parse::<Uuid>().unwrap(), &self.owner_id()]).await;
        issue
    }

    async fn deleted_issue(&self) -> Issue {
        let issue = self.issue().await;
        let request = DeleteIssueRequest { id: issue.id.clone(), ..Default::default() };
        self.admin().issues().delete_issue(request).await.unwrap();
        issue
    }

    async fn comment(&self) -> Comment {
        let comment = self.admin().comment(&self.issue().await.id, "a comment").await;
        let written = "UPDATE comments SET author_id = $2 WHERE id = $1";
        self.fixture.tracker.sql(written, &[&comment.id.parse::<Uuid>().unwrap(), &self.owner_id()]).await;
        comment
    }

    async fn label(&self) -> Label {
        self.admin().label(&new_name()).await
    }

    /// Completes an import. Returns its id.
    async fn import(&self) -> String {
        let import_id = Uuid::now_v7();
        let messages = import_of(&import_id.to_string());
        let responses = self.admin().imports().import_issues(stream::iter(messages.0)).await.unwrap().into_inner();
        responses.try_collect::<Vec<_>>().await.unwrap();
        let sql = "UPDATE imports SET caller_id = $2 WHERE id = $1";
        self.fixture.tracker.sql(sql, &[&import_id, &self.owner_id()]).await;
        import_id.to_string()
    }

    /// Inserts an API token of the owner, who may be disabled. Returns its id.
    async fn api_token(&self) -> String {
        let sql = "INSERT INTO tokens (id, user_id, sha256, name) VALUES ($1, $2, sha256(uuid_send($1)), 'a token')";
        let id = Uuid::now_v7();
        self.fixture.tracker.sql(sql, &[&id, &self.owner_id()]).await;
        id.to_string()
    }

    /// Creates an issue. Returns its id and two labels: one that it has, and one that it does not have.
    async fn labelled_issue(&self) -> (String, [String; 2]) {
        let (issue, on, off) = (self.issue().await, self.label().await, self.label().await);
        let request =
            AddIssueLabelsRequest { issue_id: issue.id.clone(), label_ids: vec![on.id.clone()], ..Default::default() };
        self.admin().labels().add_issue_labels(request).await.unwrap();
        (issue.id, [on.id, off.id])
    }
}

fn rows_of_accounts() -> Vec<Row> {
    vec![
        row!("AuthService/Login" ALL: |object| LoginRequest {
            username: object.owner.username,
            password: PASSWORD.into(),
            validate_only: false,
        }),
        row!("AuthService/Logout" ALL: |object| LogoutRequest::default()),
        row!("AuthService/WhoAmI" ALL: |object| WhoAmIRequest {}),
        row!("AuthService/ChangePassword" ALL: |object| ChangePasswordRequest {
            current_password: PASSWORD.into(),
            new_password: PASSWORD.into(),
            ..Default::default()
        }),
        row!("AuthService/CreateApiToken" ALL, others ADMINS: |object| CreateApiTokenRequest {
            api_token: Some(ApiToken { user_id: object.owner.id, name: "new".into(), ..ApiToken::default() }),
            validate_only: false,
        }),
        row!("AuthService/ListApiTokens" ALL, others ADMINS: |object| ListApiTokensRequest {
            user_id: object.owner.id,
            ..Default::default()
        }),
        row!("AuthService/RevokeApiToken" ALL, others MISSING_BUT_FOR_ADMINS: |object| RevokeApiTokenRequest {
            id: object.api_token().await,
            ..Default::default()
        }),
        row!("UserService/CreateUser" ADMINS: |object| CreateUserRequest {
            user: Some(User { username: new_name(), ..User::default() }),
            password: PASSWORD.into(),
            ..Default::default()
        }),
        row!("UserService/GetUser" ALL: |object| GetUserRequest { id: object.owner.id, username: String::new() }),
        row!("UserService/ListUsers" ALL: |object| ListUsersRequest::default()),
        row!("UserService/UpdateUser" ADMINS: |object| UpdateUserRequest {
            user: Some(User { id: object.owner.id, role: object.owner.role, ..User::default() }),
            ..Default::default()
        }),
        row!("UserService/ResetPassword" ADMINS: |object| ResetPasswordRequest {
            user_id: object.owner.id,
            new_password: PASSWORD.into(),
            ..Default::default()
        }),
        row!("UserService/ListAuditEvents" ADMINS: |object| ListAuditEventsRequest {
            user_id: object.owner.id,
            ..Default::default()
        }),
    ]
}

fn rows_of_issues() -> Vec<Row> {
    vec![
        row!("IssueService/CreateIssue" MEMBERS: |object| CreateIssueRequest {
            issue: Some(Issue { title: "new".into(), assignee_id: object.owner.id, ..Issue::default() }),
            ..Default::default()
        }),
        row!("IssueService/BatchCreateIssues" MEMBERS: |object| BatchCreateIssuesRequest {
            issues: vec![Issue { title: "new".into(), assignee_id: object.owner.id, ..Issue::default() }],
            ..Default::default()
        }),
        row!("IssueService/GetIssue" ALL: |object| GetIssueRequest { id: object.issue().await.id, view: 0 }),
        row!("IssueService/BatchGetIssues" ALL: |object| BatchGetIssuesRequest {
            ids: vec![object.issue().await.id],
            ..Default::default()
        }),
        row!("IssueService/ListIssues" ALL: |object| ListIssuesRequest {
            filter: format!("reporter = {}", object.owner.username),
            ..Default::default()
        }),
        row!("IssueService/UpdateIssue" MEMBERS: |object| UpdateIssueRequest {
            issue: Some(Issue { id: object.issue().await.id, title: "changed".into(), ..Issue::default() }),
            comment: "because".into(),
            ..Default::default()
        }),
        row!("IssueService/BulkUpdateStatus" MEMBERS: |object| BulkUpdateStatusRequest {
            ids: vec![object.issue().await.id],
            status: IssueStatus::Closed.into(),
            ..Default::default()
        }),
        row!("IssueService/DeleteIssue" MEMBERS: |object| DeleteIssueRequest {
            id: object.issue().await.id,
            ..Default::default()
        }),
        row!("IssueService/UndeleteIssue" MEMBERS: |object| UndeleteIssueRequest {
            id: object.deleted_issue().await.id,
            ..Default::default()
        }),
        row!("IssueService/ExportIssues" ALL: |object| ExportIssuesRequest::default()),
        row!("CommentService/CreateComment" MEMBERS: |object| CreateCommentRequest {
            comment: Some(Comment { issue_id: object.issue().await.id, content: "new".into(), ..Comment::default() }),
            ..Default::default()
        }),
        row!("CommentService/ListComments" ALL: |object| ListCommentsRequest {
            issue_id: object.issue().await.id,
            ..Default::default()
        }),
        row!("CommentService/UpdateComment" MEMBERS, others ADMINS: |object| UpdateCommentRequest {
            comment: Some(Comment { id: object.comment().await.id, content: "changed".into(), ..Comment::default() }),
            ..Default::default()
        }),
        row!("CommentService/DeleteComment" MEMBERS, others ADMINS: |object| DeleteCommentRequest {
            id: object.comment().await.id,
            ..Default::default()
        }),
    ]
}

fn rows_of_labels_imports_and_reports() -> Vec<Row> {
    vec![
        row!("LabelService/CreateLabel" MEMBERS: |object| CreateLabelRequest {
            label: Some(Label { name: new_name(), ..Label::default() }),
            ..Default::default()
        }),
        row!("LabelService/ListLabels" ALL: |object| ListLabelsRequest::default()),
        row!("LabelService/UpdateLabel" MEMBERS: |object| UpdateLabelRequest {
            label: Some(Label { id: object.label().await.id, name: new_name(), ..Label::default() }),
            ..Default::default()
        }),
        row!("LabelService/DeleteLabel" MEMBERS: |object| DeleteLabelRequest {
            id: object.label().await.id,
            ..Default::default()
        }),
        row!("LabelService/AddIssueLabels" MEMBERS: |object| {
            let (issue_id, [_, off]) = object.labelled_issue().await;
            AddIssueLabelsRequest { issue_id, label_ids: vec![off], ..Default::default() }
        }),
        row!("LabelService/RemoveIssueLabels" MEMBERS: |object| {
            let (issue_id, [on, _]) = object.labelled_issue().await;
            RemoveIssueLabelsRequest { issue_id, label_ids: vec![on], ..Default::default() }
        }),
        row!("LabelService/ReplaceIssueLabels" MEMBERS: |object| {
            let (issue_id, [_, off]) = object.labelled_issue().await;
            ReplaceIssueLabelsRequest { issue_id, label_ids: vec![off], ..Default::default() }
        }),
        row!("ImportService/ImportIssues" MEMBERS, others MISMATCH: |object| {
            import_of(&object.import().await)
        }),
        row!("ImportService/GetImport" MEMBERS, others ADMINS: |object| GetImportRequest {
            id: object.import().await,
        }),
        row!("ImportService/ListImportErrors" MEMBERS, others ADMINS: |object| ListImportErrorsRequest {
            import_id: object.import().await,
            ..Default::default()
        }),
        row!("ImportService/RevertImport" MEMBERS, others ADMINS: |object| RevertImportRequest {
            import_id: object.import().await,
            ..Default::default()
        }),
        row!("ReportService/GetTopAssignees" ALL: |object| GetTopAssigneesRequest::default()),
        row!("ReportService/GetResolutionLatency" ALL: |object| GetResolutionLatencyRequest::default()),
    ]
}

fn rows() -> Vec<Row> {
    [rows_of_accounts(), rows_of_issues(), rows_of_labels_imports_and_reports()].into_iter().flatten().collect()
}

/// Calls a method with any number of messages, and reads all responses.
async fn call_with(tracker: &Tracker, client: &Client, method: &str, messages: Vec<Vec<u8>>) -> Result<(), Status> {
    let mut request = Request::new(stream::iter(messages));
    if !client.token.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer {}", client.token).parse().unwrap());
    }
    let mut grpc = Grpc::new(tracker.channel.clone());
    grpc.ready().await.unwrap();
    let path = format!("/issuetracker.v1.{method}").parse().unwrap();
    let responses = grpc.streaming(request, path, BytesCodec).await?.into_inner();
    responses.try_collect::<Vec<Bytes>>().await.map(drop)
}

fn outcome(result: Result<(), Status>) -> Outcome {
    let Err(status) = result else { return Done };
    match status.code() {
        Code::PermissionDenied => Denied,
        Code::NotFound => Missing,
        Code::FailedPrecondition => Mismatch,
        Code::Unauthenticated => Outcome::Unauthenticated,
        _ => panic!("{status:?}"),
    }
}

impl Fixture {
    async fn start() -> &'static Self {
        let tracker = Tracker::start().await;
        let other_user = tracker.user("other", Role::Admin).await.user;
        Box::leak(Box::new(Self { tracker, other_user }))
    }

    /// Creates a user for one call, because some calls revoke the caller's token or change the password.
    async fn caller(&self, role: Role) -> Client {
        self.tracker.user(&new_name(), role).await
    }

    /// Calls the row's method on an object of the owner.
    async fn call(&'static self, row: &Row, client: &Client, owner: &User) -> Outcome {
        let messages = (row.request)(Object { fixture: self, owner: owner.clone() }).await;
        outcome(call_with(&self.tracker, client, row.method, messages).await)
    }

    async fn check_roles(&'static self, row: &Row) {
        for (index, role) in [Role::Viewer, Role::Member, Role::Admin].into_iter().enumerate() {
            let client = self.caller(role).await;
            let others = self.call(row, &client, &self.other_user).await;
            // The first call may have revoked the token, as Logout does.
            let client = self.caller(role).await;
            let own = self.call(row, &client, &client.user).await;
            let name = role.as_str_name();
            assert_eq!((own, others), (row.own[index], row.others[index]), "{} by {name}: own, others", row.method);
        }
    }

    /// Asserts that calls without valid credentials fail with UNAUTHENTICATED and write nothing.
    async fn check_credentials(&'static self, row: &Row) {
        // With valid credentials, these administrators could make the call.
        let disabled = self.caller(Role::Admin).await;
        let user = Some(User { id: disabled.user.id.clone(), disabled: true, ..User::default() });
        self.tracker.admin.users().update_user(UpdateUserRequest { user, ..Default::default() }).await.unwrap();
        let expired = self.caller(Role::Admin).await;
        let expire = "UPDATE tokens SET expire_time = now() WHERE user_id = $1";
        self.tracker.sql(expire, &[&expired.user.id.parse::<Uuid>().unwrap()]).await;
        let revoked = self.caller(Role::Admin).await;
        revoked.auth().logout(LogoutRequest::default()).await.unwrap();
        let mut callers = vec![("disabled", disabled), ("expired", expired), ("revoked", revoked)];
        let valid = self.caller(Role::Admin).await;
        for (what, token) in invalid_tokens(&valid.token) {
            let mut client = valid.clone();
            client.token = token;
            callers.push((what, client));
        }

        // One set of messages per owner: a refused call changes nothing, so the next caller can repeat it.
        let mut messages: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
        for owner in callers.iter().map(|(_, client)| &client.user).chain([&self.other_user]) {
            if !messages.contains_key(&*owner.id) {
                let of_owner = (row.request)(Object { fixture: self, owner: owner.clone() }).await;
                messages.insert(&owner.id, of_owner);
            }
        }
        let before = self.tracker.contents().await;
        for (what, client) in &callers {
            for owner in [&client.user, &self.other_user] {
                let messages = messages[&*owner.id].clone();
                let outcome = outcome(call_with(&self.tracker, client, row.method, messages).await);
                assert_eq!(outcome, Outcome::Unauthenticated, "{}: {what}", row.method);
            }
        }
        assert_eq!(self.tracker.contents().await, before, "{}", row.method);
    }
}

/// Returns tokens that differ a little from a valid one.
fn invalid_tokens(token: &str) -> [(&'static str, String); 6] {
    let unknown = issue_tracker::auth::new_token().unwrap().0;
    [
        ("none", String::new()),
        ("unknown", unknown),
        ("cut short", token[..token.len() - 1].to_owned()),
        ("too long", format!("{token}A")),
        ("without its prefix", token.replacen("itk_", "", 1)),
        ("in another case", token.to_ascii_uppercase()),
    ]
}

#[test]
fn every_rpc_has_a_row_and_every_row_an_rpc() {
    let rows = rows();
    let methods = our_methods();
    let named: BTreeSet<&str> = rows.iter().map(|row| row.method).collect();
    assert_eq!(named, methods.iter().map(|method| &*method.name).collect());
    assert_eq!(rows.len(), named.len(), "a method has two rows");
}

#[test]
fn every_row_agrees_with_the_required_role_that_the_method_declares() {
    let rows = rows();
    for method in our_methods() {
        let row = rows.iter().find(|row| row.method == method.name).unwrap();
        for (index, role) in [Role::Viewer, Role::Member, Role::Admin].into_iter().enumerate() {
            let (name, role_name) = (&method.name, role.as_str_name());
            let suffices = method.required_role.is_none_or(|required| role >= required);
            assert_eq!(row.own[index] != Denied, suffices, "{name} by {role_name}");
            // A method may deny other users' objects to a sufficient role, but allows none to a lower one.
            assert!(suffices || row.others[index] == Denied, "{name} by {role_name}");
        }
    }
}

#[tokio::test]
async fn insufficient_role_is_denied_before_the_request_is_validated() {
    let fixture = Fixture::start().await;
    let clients = [&fixture.tracker.viewer, &fixture.tracker.member, &fixture.tracker.admin];
    let before = fixture.tracker.contents().await;
    for row in rows() {
        for (client, _) in clients.iter().zip(row.own).filter(|(_, outcome)| *outcome == Denied) {
            // An empty request, which lacks all required fields.
            let refused = call(&fixture.tracker, client, row.method, b"").await;
            assert_error(refused, Code::PermissionDenied, "PERMISSION_DENIED");
        }
    }
    assert_eq!(fixture.tracker.contents().await, before);
}

#[tokio::test]
async fn each_role_has_the_permissions_of_its_row() {
    let fixture = Fixture::start().await;
    for row in rows() {
        fixture.check_roles(&row).await;
    }
}

#[tokio::test]
async fn invalid_credentials_permit_only_login() {
    let fixture = Fixture::start().await;
    let unauthenticated: BTreeSet<String> =
        our_methods().into_iter().filter(|method| method.required_role.is_none()).map(|method| method.name).collect();
    for row in rows().iter().filter(|row| !unauthenticated.contains(row.method)) {
        fixture.check_credentials(row).await;
    }
    // Login ignores the caller's credentials, and fails for a disabled user.
    let disabled = fixture.caller(Role::Viewer).await;
    let user = Some(User { id: disabled.user.id.clone(), disabled: true, ..User::default() });
    fixture.tracker.admin.users().update_user(UpdateUserRequest { user, ..Default::default() }).await.unwrap();
    let login = rows().into_iter().find(|row| row.method == LOGIN).unwrap();
    let unauthenticated = fixture.tracker.client_with_token(None);
    for client in [&unauthenticated, &disabled] {
        assert_eq!(fixture.call(&login, client, &fixture.other_user).await, Done);
        assert_eq!(fixture.call(&login, client, &disabled.user).await, Outcome::Unauthenticated);
    }
}
