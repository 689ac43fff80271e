//! `LabelService`.

use tonic::Request;

use super::{Api, RpcResult};
use crate::{
    auth::Caller,
    db::{
        idempotency::MutationOptions,
        issues,
        labels::{self, LabelChange},
    },
    pb::{
        AddIssueLabelsRequest, CreateLabelRequest, DeleteLabelRequest, DeleteLabelResponse, Issue, Label,
        ListLabelsRequest, ListLabelsResponse, RemoveIssueLabelsRequest, ReplaceIssueLabelsRequest, UpdateLabelRequest,
        label_service_server::LabelService,
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
    async fn create_label(&self, request: Request<CreateLabelRequest>) -> RpcResult<Label> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let label = check.required("label", request.label);
        let name = label_name(&mut check, label.name);
        let description = check.text("label.description", label.description, LABEL_DESCRIPTION_CHARS_MAX);
        check.done()?;

        let response = self.db.mutate(caller.user_id, options, async |tx| {
            let label = labels::create(tx, &name, &description).await?;
            labels::check_count(tx, self.db.storage_limits().labels_max).await?;
            Ok(label)
        });
        Ok(response.await?.into())
    }

    async fn list_labels(&self, request: Request<ListLabelsRequest>) -> RpcResult<ListLabelsResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let page = check.page(request.page_size, &request.page_token, &[b"labels"]);
        check.done()?;
        let after = page.after_name()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = labels::list(&db, after, page.limit(), page.bounds()).await?;
        let next_page_token = page.next_token(found.more, found.items.last().map(|label| label.name.as_bytes()));
        Ok(ListLabelsResponse { labels: found.items, next_page_token }.into())
    }

    async fn update_label(&self, request: Request<UpdateLabelRequest>) -> RpcResult<Label> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let label = check.required("label", request.label);
        let id = check.uuid("label.id", &label.id);
        let populated = |path: &str| match path {
            "name" => !label.name.is_empty(),
            _ => !label.description.is_empty(),
        };
        let paths = check.mask(request.update_mask, &["name", "description"], populated);
        if paths.is_empty() {
            check.fail("update_mask", "nothing to change; set any of name, description");
        }
        let name = paths.contains(&"name").then(|| label_name(&mut check, label.name.clone()));
        let description = paths
            .contains(&"description")
            .then(|| check.text("label.description", label.description.clone(), LABEL_DESCRIPTION_CHARS_MAX));
        check.done()?;

        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            labels::update(conn, id, name.as_deref(), description.as_deref()).await
        });
        Ok(response.await?.into())
    }

    async fn delete_label(&self, request: Request<DeleteLabelRequest>) -> RpcResult<DeleteLabelResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let id = check.uuid("id", &request.id);
        check.done()?;

        Ok(labels::delete(&self.db, caller.user_id, options, id, request.force).await?.into())
    }

    async fn add_issue_labels(&self, request: Request<AddIssueLabelsRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let AddIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, options, LabelChange::Add, ids).await
    }

    async fn remove_issue_labels(&self, request: Request<RemoveIssueLabelsRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let RemoveIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, options, LabelChange::Remove, ids).await
    }

    async fn replace_issue_labels(&self, request: Request<ReplaceIssueLabelsRequest>) -> RpcResult<Issue> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let ReplaceIssueLabelsRequest { issue_id, label_ids, expected_version, .. } = request;
        let ids = IssueLabels { issue_id, label_ids, expected_version };
        self.change_issue_labels(caller, check, options, LabelChange::Replace, ids).await
    }
}

/// The fields that the three requests for the labels of an issue have in common.
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
        options: MutationOptions,
        change: LabelChange,
        ids: IssueLabels,
    ) -> RpcResult<Issue> {
        let issue_id = check.uuid("issue_id", &ids.issue_id);
        let label_ids_min = if change == LabelChange::Replace { 0 } else { 1 };
        let label_ids = check.uuids("label_ids", &ids.label_ids, label_ids_min, LABELS_PER_ISSUE_MAX);
        let expected_version = check.expected_version("expected_version", ids.expected_version);
        check.done()?;

        let response = self.db.mutate(caller.user_id, options, async |tx| {
            labels::change_issue_labels(tx, caller.user_id, issue_id, expected_version, change, &label_ids).await?;
            issues::get(tx, issue_id).await
        });
        Ok(response.await?.into())
    }
}

fn label_name(check: &mut Check, name: String) -> String {
    let name = check.required_text("label.name", name, LABEL_NAME_CHARS_MAX);
    if name.contains(';') || name.trim() != name {
        // The `labels` column of a CSV file separates names by semicolons and ignores the spaces around them.
        check.fail("label.name", "contains \";\", or starts or ends with a space; expected a name without");
    }
    name
}
