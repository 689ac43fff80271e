//! `ImportService`: a file that comes as a stream, and what can be asked of it and done with it later.

mod options;
mod stall_timeout;
mod stream;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{Api, Reply, finish, fresh};
use crate::{
    auth::Caller,
    db::imports,
    error::{Error, Result},
    pb::{
        GetImportRequest, Import, ImportIssuesRequest, ImportIssuesResponse, ListImportErrorsRequest,
        ListImportErrorsResponse, RevertImportRequest, RevertImportResponse, Role,
        import_service_server::ImportService,
    },
    request::{Check, mutation},
};
use stream::{Client, IMPORT_ANSWERS_WAITING_MAX};

mutation! {
    RevertImportRequest;
}

#[tonic::async_trait]
impl ImportService for Api {
    type ImportIssuesStream = ReceiverStream<Result<ImportIssuesResponse, Status>>;

    async fn import_issues(&self, request: Request<Streaming<ImportIssuesRequest>>) -> Reply<Self::ImportIssuesStream> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let permit = self.import_permit()?;
        let (answers, stream) = mpsc::channel(IMPORT_ANSWERS_WAITING_MAX);
        let (db, requests, stopping) = (self.db.clone(), request.into_inner(), self.stopping.clone());
        tokio::spawn(async move {
            let client = Client { answers };
            let imported = tokio::select! {
                imported = stream::import(&db, caller.user_id, requests, &client) => imported,
                // The caller has gone, or its deadline has passed; one that has sent all still listens.
                () = client.answers.closed() => Err(Error::Cancelled),
                () = stopping.cancelled() => Err(Error::Stopping),
            };
            drop(permit);
            if let Err(error) = imported {
                client.fail(error).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn get_import(&self, request: Request<GetImportRequest>) -> Reply<Import> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let id = check.uuid("id", &request.id);
        check.done()?;

        let db = self.db.conn().await?;
        Ok(imports::get(&db, id, owner(&caller), "id").await?.into())
    }

    async fn list_import_errors(&self, request: Request<ListImportErrorsRequest>) -> Reply<ListImportErrorsResponse> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let id = check.uuid("import_id", &request.import_id);
        let page = check.page(request.page_size, &request.page_token, &[b"import errors", id.as_bytes()]);
        check.done()?;
        let after = page.after_position()?;

        let db = self.db.conn().await?;
        let found = imports::list_errors(&db, id, owner(&caller), after, page.limit(), page.bounds()).await?;
        let last = found.items.last().map(|(position, _)| position.to_be_bytes());
        let next_page_token = page.next_token(found.more, last.as_ref().map(|key| &key[..]));
        let errors = found.items.into_iter().map(|(_, error)| error).collect();
        Ok(ListImportErrorsResponse { errors, next_page_token }.into())
    }

    async fn revert_import(&self, request: Request<RevertImportRequest>) -> Reply<RevertImportResponse> {
        let caller = Caller::with_role(&request, Role::Member)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let id = check.uuid("import_id", &request.import_id);
        check.done()?;

        // It can take as long as an import.
        let _permit = self.import_permit()?;
        let tx = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        match imports::revert(&tx, id, owner(&caller), caller.user_id, request.force).await {
            Ok(response) => finish(tx, response).await,
            Err(error) => {
                // Who calls again with `force` does so at once, and finds the import free. The error is what counts.
                let _ = tx.rollback().await;
                Err(error.into())
            }
        }
    }
}

impl Api {
    /// Of what holds a connection for long.
    fn import_permit(&self) -> Result<OwnedSemaphorePermit> {
        Arc::clone(&self.imports)
            .try_acquire_owned()
            .map_err(|_| Error::Exhausted("as many imports as are taken at once are under way; try again".to_owned()))
    }
}

/// Whose imports the caller may see and undo; none: anybody's.
fn owner(caller: &Caller) -> Option<Uuid> {
    if caller.is_admin() { None } else { Some(caller.user_id) }
}
