//! `LabelService`.

use tonic::Request;

use super::{Api, Reply, finish, fresh};
use crate::{
    auth::Caller,
    db::{
        idempotency::RequestKey,
        issues,
        labels::{self, LabelChange},
    },
    pb::{
        AddIssueLabelsRequest, CreateLabelRequest, DeleteLabelRequest, DeleteLabelResponse, Issue, Label,
        ListLabelsRequest, ListLabelsResponse, RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest, Role,
        UpdateLabelRequest, label_service_server::LabelService,
    },
    request::{Check, LABEL_DESCRIPTION_CHARS_MAX, LABEL_NAME_CHARS_MAX, LABELS_PER_ISSUE_MAX, mutation},
};

mutation! {
    CreateLabelRequest;
    UpdateLabelRequest;
    DeleteLabelRequest;
    AddIssueLabelsRequest;
    RemoveIssueLabelsRequest;
    ReplaceIssueLabelsRequest;
}

#[tonic::async_trait]
impl LabelService for Api {
    async fn create_label(&self, request: Request<CreateLabelRequest>) -> Reply<Label> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let label = check.required("label", request.label);
        let name = label_name(&mut check, label.name);
        let description = check.text("label.description", label.description, LABEL_DESCRIPTION_CHARS_MAX);
        check.done()?;

        let tx = fresh!(self.db.begin_single(caller.user_id, key).await?);
        let label = labels::create(&tx, &name, &description).await?;
        finish(tx, label).await
    }

    async fn list_labels(&self, request: Request<ListLabelsRequest>) -> Reply<ListLabelsResponse> {
        Caller::with_role(&request, Role::Viewer)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let page = check.page(request.page_size, &request.page_token, &[b"labels"]);
        check.done()?;
        let after = page.after_name()?;

        let db = self.db.conn().await?;
        let found = labels::list(&db, after, page.limit(), page.bounds()).await?;
        let next_page_token = page.next_token(found.more, found.items.last().map(|label| label.name.as_bytes()));
        Ok(ListLabelsResponse { labels: found.items, next_page_token }.into())
    }

    async fn update_label(&self, request: Request<UpdateLabelRequest>) -> Reply<Label> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let label = check.required("label", request.label);
        let id = check.uuid("label.id", &label.id);
        let populated = |path: &str| match path {
            "name" => !label.name.is_empty(),
            _ => !label.description.is_empty(),
        };
        let paths = check.mask(request.update_mask, &["name", "description"], populated);
        if paths.is_empty() {
            check.fail("update_mask", "nothing to change: set any of name, description");
        }
        let name = paths.contains(&"name").then(|| label_name(&mut check, label.name.clone()));
        let description = paths
            .contains(&"description")
            .then(|| check.text("label.description", label.description.clone(), LABEL_DESCRIPTION_CHARS_MAX));
        check.done()?;

        let tx = fresh!(self.db.begin_single(caller.user_id, key).await?);
        let label = labels::update(&tx, id, name.as_deref(), description.as_deref()).await?;
        finish(tx, label).await
    }

    async fn delete_label(&self, request: Request<DeleteLabelRequest>) -> Reply<DeleteLabelResponse> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let id = check.uuid("id", &request.id);
        check.done()?;

        let tx = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        let issue_count = labels::delete(&tx, id, caller.user_id, request.force).await? as i32;
        finish(tx, DeleteLabelResponse { issue_count }).await
    }

    async fn add_issue_labels(&self, request: Request<AddIssueLabelsRequest>) -> Reply<Issue> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let AddIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, key, LabelChange::Add, ids).await
    }

    async fn remove_issue_labels(&self, request: Request<RemoveIssueLabelsRequest>) -> Reply<Issue> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let RemoveIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, key, LabelChange::Remove, ids).await
    }

    async fn replace_issue_labels(&self, request: Request<ReplaceIssueLabelsRequest>) -> Reply<Issue> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let ReplaceIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, key, LabelChange::Replace, ids).await
    }
}

/// What the three requests that change an issue's labels have in common.
struct IssueLabels {
    issue_id: String,
    label_ids: Vec<String>,
    expected_version: i64,
}

impl Api {
    async fn change_issue_labels(
        &self,
        caller: Caller,
        mut check: Check,
        key: RequestKey,
        change: LabelChange,
        ids: IssueLabels,
    ) -> Reply<Issue> {
        let issue_id = check.uuid("issue_id", &ids.issue_id);
        let label_ids_min = if change == LabelChange::Replace { 0 } else { 1 };
        let label_ids = check.uuids("label_ids", &ids.label_ids, label_ids_min, LABELS_PER_ISSUE_MAX);
        let expected_version = check.expected_version("expected_version", ids.expected_version);
        check.done()?;

        let tx = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        labels::change_issue_labels(&tx, caller.user_id, issue_id, expected_version, change, &label_ids).await?;
        let issue = issues::get(&tx, issue_id).await?;
        finish(tx, issue).await
    }
}

fn label_name(check: &mut Check, name: String) -> String {
    let name = check.required_text("label.name", name, LABEL_NAME_CHARS_MAX);
    if name.contains(';') || name.trim() != name {
        // In a CSV's `labels` column they are separated by it, and the spaces around them do not count.
        check.fail("label.name", "must not contain \";\", nor begin or end with a space");
    }
    name
}
