//! `IssueService`.

use tonic::Request;
use uuid::Uuid;

use super::{
    Api, RpcResult,
    exports::{self, ExportOptions, ExportStream},
    id_key,
};
use crate::{
    auth::Caller,
    batching::coalescer::Outcome,
    db::{
        Conn, PageBounds,
        batchers::MutationCall,
        comments,
        idempotency::MutationOptions,
        issues::{self, IssueChange, IssueList, NewIssue},
        row_locks::RowLocks,
    },
    error::{Error, Resource, Result},
    filter,
    pb::{
        BatchCreateIssuesRequest, BatchCreateIssuesResponse, BatchGetIssuesRequest, BatchGetIssuesResponse,
        BulkUpdateStatusRequest, BulkUpdateStatusResponse, CreateIssueRequest, DeleteIssueRequest, ExportIssuesRequest,
        GetIssueRequest, Issue, IssueView, ListIssuesRequest, ListIssuesResponse, Priority, Status,
        UndeleteIssueRequest, UpdateIssueRequest, bulk_update_status_response, issue_service_server::IssueService,
    },
    request::{
        BATCH_ITEMS_MAX, COMMENT_CHARS_MAX, Check, DESCRIPTION_CHARS_MAX, EXTERNAL_ID_CHARS_MAX, LABELS_PER_ISSUE_MAX,
        RESPONSE_BYTES_MAX, TITLE_CHARS_MAX, mutation,
    },
};

/// A batch of more issues is read as reports and searches are: a user who reads many large batches leaves processor time to
/// the calls of others.
const LIGHT_BATCH_ITEMS_MAX: usize = 100;
/// The paths of `UpdateIssueRequest.update_mask`.
const UPDATABLE: &[&str] = &["title", "description", "status", "priority", "assignee_id", "external_id"];

mutation! {
    CreateIssueRequest;
    BatchCreateIssuesRequest;
    UpdateIssueRequest;
    DeleteIssueRequest;
    UndeleteIssueRequest;
    BulkUpdateStatusRequest;
}

#[tonic::async_trait]
impl IssueService for Api {
    async fn create_issue(&self, request: Request<CreateIssueRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let issue = check.required("issue", request.issue);
        let issue = new_issue(&mut check, &caller, "issue", issue);
        check.done()?;

        let call = MutationCall { caller_id: caller.user_id, options, mutation: issue.clone() };
        match self.batchers.mutate(&self.batchers.creates, call).await {
            Ok(issue) => Ok(issue.into()),
            Err(error) => {
                let db = self.db.for_flow(caller.flow());
                let explained =
                    issues::explain_create(&db, error, std::slice::from_ref(&issue), |_| "issue".to_owned());
                Err(Box::pin(explained).await.into())
            }
        }
    }

    async fn batch_create_issues(
        &self,
        request: Request<BatchCreateIssuesRequest>,
    ) -> RpcResult<BatchCreateIssuesResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let count = request.issues.len();
        if !(1..=BATCH_ITEMS_MAX).contains(&count) {
            check.fail("issues", format!("has {count} issues; expected 1 to {BATCH_ITEMS_MAX}"));
        }
        let field = |index: usize| format!("issues[{index}]");
        let new: Vec<NewIssue> = (request.issues.into_iter().enumerate().take(BATCH_ITEMS_MAX))
            .map(|(index, issue)| new_issue(&mut check, &caller, &field(index), issue))
            .collect();
        check.done()?;

        let response = self.db.mutate(caller.user_id, options, async |tx| {
            let response = BatchCreateIssuesResponse { issues: issues::create(tx, &new).await? };
            // Checked before the commit: a client that cannot receive the response would not know what was created.
            if prost::Message::encoded_len(&response) > RESPONSE_BYTES_MAX {
                return Err(response_too_large("issues"));
            }
            Ok(response)
        });
        match response.await {
            Ok(response) => Ok(response.into()),
            Err(error) => {
                Err(issues::explain_create(&self.db.for_flow(caller.flow()), error, &new, field).await.into())
            }
        }
    }

    async fn get_issue(&self, request: Request<GetIssueRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let id = check.uuid("id", &request.id);
        let view = check.enumeration("view", request.view);
        check.done()?;

        Ok(self.batchers.get(caller.flow(), id, view).await?.into())
    }

    async fn batch_get_issues(&self, request: Request<BatchGetIssuesRequest>) -> RpcResult<BatchGetIssuesResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let ids = check.uuids("ids", &request.ids, 1, BATCH_ITEMS_MAX);
        let view: IssueView = check.enumeration("view", request.view);
        check.done()?;

        let db = self.db.for_flow(caller.flow());
        let db = if ids.len() > LIGHT_BATCH_ITEMS_MAX { db.heavy_conn().await? } else { db.conn().await? };
        let bounds = PageBounds { rows_max: BATCH_ITEMS_MAX, bytes_max: RESPONSE_BYTES_MAX };
        let page = issues::batch_get(&db, &ids, bounds).await?;
        if page.more {
            return Err(response_too_large("ids").into());
        }
        let mut issues = page.items;
        if issues.len() < ids.len() {
            let found: std::collections::HashSet<&str> = issues.iter().map(|issue| &*issue.id).collect();
            let missing = (ids.iter().enumerate()).filter(|(_, id)| !found.contains(&*id.to_string()));
            let missing = missing.map(|(index, id)| Resource::missing("issue", format!("ids[{index}]"), id));
            return Err(Error::NotFound(missing.collect()).into());
        }
        if view == IssueView::Full {
            let left = RESPONSE_BYTES_MAX - issues.iter().map(prost::Message::encoded_len).sum::<usize>();
            if !issues::add_comments(&db, &mut issues, &ids, left).await? {
                return Err(response_too_large("ids").into());
            }
        }
        Ok(BatchGetIssuesResponse { issues }.into())
    }

    async fn list_issues(&self, request: Request<ListIssuesRequest>) -> RpcResult<ListIssuesResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let page = check.page(
            request.page_size,
            &request.page_token,
            &[b"issues", request.filter.as_bytes(), &[u8::from(request.show_deleted)]],
        );
        let filter = check.take("filter", filter::parse(&request.filter).map_err(|error| error.message));
        check.done()?;
        let list =
            IssueList { filter, show_deleted: request.show_deleted, after: page.after_id()?, bounds: page.bounds() };
        let found = self.batchers.list(caller.flow(), list).await?;
        let next_page_token =
            page.next_token(found.more, id_key(found.items.last().map(|issue| &*issue.id)).as_deref());
        Ok(ListIssuesResponse { issues: found.items, next_page_token }.into())
    }

    async fn update_issue(&self, request: Request<UpdateIssueRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let change = issue_change(&mut check, &caller, &request);
        let comment = comment_text(&mut check, request.comment);
        check.done()?;

        let Some(content) = comment else {
            let call = MutationCall { caller_id: caller.user_id, options, mutation: change };
            return Ok(self.batchers.mutate(&self.batchers.updates, call).await?.into());
        };
        // Boxed: comments with an update are rare and must not enlarge the future of every update.
        Box::pin(self.update_with_comment(caller, options, change, content)).await
    }

    async fn delete_issue(&self, request: Request<DeleteIssueRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let change = deletion(&mut check, &caller, &request.id, request.expected_version, true);
        check.done()?;

        let response =
            self.db.mutate_by_statement(caller.user_id, options, async |conn| update_one(conn, &change, "id").await);
        Ok(response.await?.into())
    }

    async fn undelete_issue(&self, request: Request<UndeleteIssueRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let change = deletion(&mut check, &caller, &request.id, request.expected_version, false);
        check.done()?;

        let response =
            self.db.mutate_by_statement(caller.user_id, options, async |conn| update_one(conn, &change, "id").await);
        Ok(response.await?.into())
    }

    async fn bulk_update_status(
        &self,
        request: Request<BulkUpdateStatusRequest>,
    ) -> RpcResult<BulkUpdateStatusResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let changes = status_changes(&mut check, &caller, &request);
        let comment = comment_text(&mut check, request.comment);
        check.done()?;

        let field = |index| format!("ids[{index}]");
        let results = match comment {
            None => {
                let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
                    Ok(bulk_response(issues::bulk_update(conn, &changes, field).await?))
                });
                response.await?
            }
            Some(content) => {
                let response = self.db.mutate(caller.user_id, options, async |tx| {
                    let results = issues::bulk_update(tx, &changes, field).await?;
                    let changed: Vec<Uuid> = results.iter().filter(|r| r.changed).map(|result| result.id).collect();
                    comments::create_on_each(tx, caller.user_id, &changed, &content).await?;
                    Ok(bulk_response(results))
                });
                response.await?
            }
        };
        Ok(results.into())
    }

    type ExportIssuesStream = ExportStream;

    async fn export_issues(&self, request: Request<ExportIssuesRequest>) -> RpcResult<ExportStream> {
        let caller = Caller::of(&request)?;
        let ExportIssuesRequest { filter, show_deleted, escape_formulas } = request.into_inner();
        let mut check = Check::default();
        let filter = check.take("filter", filter::parse(&filter).map_err(|error| error.message));
        check.done()?;

        let permit = self
            .exports
            .try_acquire(caller.flow(), 1)
            .map_err(|_| Error::Exhausted("too many concurrent exports; retry later".to_owned()))?;
        let duration_max = self.stream_limits.export_duration_max;
        let options = ExportOptions { filter, show_deleted, escape_formulas, duration_max };
        Ok(exports::start(self.db.for_flow(caller.flow()), options, permit, self.stopping.clone()).into())
    }
}

impl Api {
    async fn update_with_comment(
        &self,
        caller: Caller,
        options: MutationOptions,
        change: IssueChange,
        content: String,
    ) -> RpcResult<Issue> {
        let response = self.db.mutate(caller.user_id, options, async |tx| {
            let mut issue = update_one(tx, &change, "issue.id").await?;
            comments::create_on_each(tx, caller.user_id, &[change.id], &content).await?;
            issue.comment_count += 1;
            Ok(issue)
        });
        Ok(response.await?.into())
    }
}

fn bulk_response(results: Vec<issues::Changed>) -> BulkUpdateStatusResponse {
    let changed_count = results.iter().filter(|result| result.changed).count() as i32;
    let result = |result: issues::Changed| bulk_update_status_response::Result {
        id: result.id.to_string(),
        version: result.version,
        changed: result.changed,
    };
    BulkUpdateStatusResponse { changed_count, results: results.into_iter().map(result).collect() }
}

async fn update_one(db: &Conn, change: &IssueChange, field: &str) -> Result<Issue> {
    match issues::update_many(db, std::slice::from_ref(change), field, RowLocks::Wait).await?.pop() {
        Some(Outcome::Done(outcome)) => outcome,
        Some(Outcome::Individual) | None => Err(Error::Internal("a change has no outcome")),
    }
}

fn response_too_large(field: &'static str) -> Error {
    Error::InvalidReason {
        reason: "RESPONSE_TOO_LARGE",
        field,
        message: format!("{field}: the response exceeds {RESPONSE_BYTES_MAX} bytes; send fewer items per request"),
    }
}

fn new_issue(check: &mut Check, caller: &Caller, field: &str, issue: Issue) -> NewIssue {
    let status: Status = check.enumeration(format!("{field}.status"), issue.status);
    NewIssue {
        reporter_id: caller.user_id,
        title: check.required_text(format!("{field}.title"), issue.title, TITLE_CHARS_MAX),
        description: check.text(format!("{field}.description"), issue.description, DESCRIPTION_CHARS_MAX),
        status: if status == Status::Unspecified { Status::Open } else { status },
        priority: check.enumeration(format!("{field}.priority"), issue.priority),
        assignee_id: check.optional_uuid(format!("{field}.assignee_id"), &issue.assignee_id),
        external_id: external_id(check, format!("{field}.external_id"), issue.external_id),
        label_ids: check.uuids(&format!("{field}.label_ids"), &issue.label_ids, 0, LABELS_PER_ISSUE_MAX),
    }
}

fn issue_change(check: &mut Check, caller: &Caller, request: &UpdateIssueRequest) -> IssueChange {
    let issue = check.required("issue", request.issue.clone());
    let mut change = IssueChange {
        actor_id: caller.user_id,
        id: check.uuid("issue.id", &issue.id),
        expected_version: check.expected_version("expected_version", request.expected_version),
        ..IssueChange::default()
    };
    let populated = |path: &str| match path {
        "title" => !issue.title.is_empty(),
        "description" => !issue.description.is_empty(),
        "status" => issue.status != 0,
        "priority" => issue.priority != 0,
        "assignee_id" => !issue.assignee_id.is_empty(),
        "external_id" => !issue.external_id.is_empty(),
        _ => false,
    };
    let masked = request.update_mask.as_ref().is_some_and(|mask| !mask.paths.is_empty());
    let paths = check.mask(request.update_mask.clone(), UPDATABLE, populated);
    if paths.is_empty() && !masked && request.comment.is_empty() {
        check.fail("update_mask", format!("nothing to change; set any of {}, or a comment", UPDATABLE.join(", ")));
    }
    for path in paths {
        match path {
            "title" => change.title = Some(check.required_text("issue.title", issue.title.clone(), TITLE_CHARS_MAX)),
            "description" => {
                let description = issue.description.clone();
                change.description = Some(check.text("issue.description", description, DESCRIPTION_CHARS_MAX));
            }
            "status" => change.status = Some(required_status(check, "issue.status", issue.status)),
            "priority" => change.priority = Some(check.enumeration::<Priority>("issue.priority", issue.priority)),
            "assignee_id" => {
                change.assignee_id = Some(check.optional_uuid("issue.assignee_id", &issue.assignee_id));
            }
            "external_id" => {
                let id = external_id(check, "issue.external_id", issue.external_id.clone());
                change.external_id = Some(id.unwrap_or_default());
            }
            // `UPDATABLE` has no others.
            _ => {}
        }
    }
    change
}

fn deletion(check: &mut Check, caller: &Caller, id: &str, expected_version: i64, delete: bool) -> IssueChange {
    IssueChange {
        actor_id: caller.user_id,
        id: check.uuid("id", id),
        expected_version: check.expected_version("expected_version", expected_version),
        delete: Some(delete),
        ..IssueChange::default()
    }
}

fn status_changes(check: &mut Check, caller: &Caller, request: &BulkUpdateStatusRequest) -> Vec<IssueChange> {
    let ids = check.uuids("ids", &request.ids, 1, BATCH_ITEMS_MAX);
    let status = required_status(check, "status", request.status);
    let versions = &request.expected_versions;
    if !versions.is_empty() && versions.len() != request.ids.len() {
        let message =
            format!("has {} versions; expected none, or one for each of the {} ids", versions.len(), request.ids.len());
        check.fail("expected_versions", message);
    }
    let mut change = |(index, id): (usize, Uuid)| IssueChange {
        actor_id: caller.user_id,
        id,
        expected_version: versions
            .get(index)
            .map_or(0, |version| check.expected_version(format!("expected_versions[{index}]"), *version)),
        status: Some(status),
        ..IssueChange::default()
    };
    ids.into_iter().enumerate().map(&mut change).collect()
}

fn required_status(check: &mut Check, field: &str, status: i32) -> Status {
    if status == Status::Unspecified as i32 {
        check.fail(field, "required; expected STATUS_OPEN, STATUS_IN_PROGRESS or STATUS_CLOSED");
    }
    check.enumeration(field, status)
}

/// Parses an external id. An empty one is `None`.
fn external_id(check: &mut Check, field: impl Into<String>, id: String) -> Option<String> {
    // Only whitespace is refused: exported to CSV and imported again, it would be no external id.
    if id.is_empty() { None } else { Some(check.required_text(field, id, EXTERNAL_ID_CHARS_MAX)) }
}

/// Parses a comment. An empty one is `None`.
fn comment_text(check: &mut Check, comment: String) -> Option<String> {
    if comment.is_empty() { None } else { Some(check.required_text("comment", comment, COMMENT_CHARS_MAX)) }
}
