//! `ImportService`: streamed CSV files, and the state, errors and reversal of an import. See `docs/imports.md`.

mod options;
mod stream;

use tonic::{Request, Response, Streaming};
use uuid::Uuid;

use super::{
    Api, RpcResult,
    stall_timeout::limit_duration,
    streaming::{ResponseStream, respond},
};
use crate::{
    auth::Caller,
    db::imports,
    pb::{
        GetImportRequest, Import, ImportIssuesRequest, ImportIssuesResponse, ListImportErrorsRequest,
        ListImportErrorsResponse, RevertImportRequest, RevertImportResponse, import_service_server::ImportService,
    },
    request::{Check, mutation},
};
/// The maximum number of responses of an import that wait for the client.
const IMPORT_RESPONSES_BUFFERED_MAX: usize = 16;

mutation! {
    RevertImportRequest;
}

#[tonic::async_trait]
impl ImportService for Api {
    type ImportIssuesStream = ResponseStream<ImportIssuesResponse>;

    async fn import_issues(
        &self,
        request: Request<Streaming<ImportIssuesRequest>>,
    ) -> RpcResult<Self::ImportIssuesStream> {
        let caller = Caller::of(&request)?;
        let start = stream::permit(&self.import_starts, caller.flow())?;
        let (db, imports, requests) = (self.db.for_flow(caller.flow()), self.imports.clone(), request.into_inner());
        let duration_max = self.stream_limits.import_duration_max;
        let responses = respond(IMPORT_RESPONSES_BUFFERED_MAX, self.stopping.clone(), |sender| async move {
            let import = stream::import(&db, start, &imports, caller.user_id, requests, sender);
            limit_duration(duration_max, "IMPORT_TIMEOUT", stream::RESUME, import).await
        });
        Ok(Response::new(responses))
    }

    async fn get_import(&self, request: Request<GetImportRequest>) -> RpcResult<Import> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let id = check.uuid("id", &request.id);
        check.done()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        Ok(imports::get(&db, id, owner(&caller), "id").await?.into())
    }

    async fn list_import_errors(
        &self,
        request: Request<ListImportErrorsRequest>,
    ) -> RpcResult<ListImportErrorsResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let id = check.uuid("import_id", &request.import_id);
        let page = check.page(request.page_size, &request.page_token, &[b"import errors", id.as_bytes()]);
        check.done()?;
        let after = page.after_position()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = imports::list_errors(&db, id, owner(&caller), after, page.limit(), page.bounds()).await?;
        let last = found.items.last().map(|(position, _)| position.to_be_bytes());
        let next_page_token = page.next_token(found.more, last.as_ref().map(|key| &key[..]));
        let errors = found.items.into_iter().map(|(_, error)| error).collect();
        Ok(ListImportErrorsResponse { errors, next_page_token }.into())
    }

    async fn revert_import(&self, request: Request<RevertImportRequest>) -> RpcResult<RevertImportResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let id = check.uuid("import_id", &request.import_id);
        check.done()?;

        // A revert holds a connection as long as an import.
        let _permit = stream::permit(&self.imports, caller.flow())?;
        let response = self.db.mutate(caller.user_id, options, async |tx| {
            imports::revert(tx, id, owner(&caller), caller.user_id, request.force).await
        });
        Ok(response.await?.into())
    }
}

/// Returns the user whose imports the caller may read and revert; `None` means any user.
fn owner(caller: &Caller) -> Option<Uuid> {
    if caller.is_admin() { None } else { Some(caller.user_id) }
}
