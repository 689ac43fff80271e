//! `CommentService`.

use tonic::Request;

use super::{Api, RpcResult, id_key};
use crate::{
    auth::Caller,
    db::{
        batchers::MutationCall,
        comments::{self, CommentChange, NewComment},
    },
    error::Error,
    pb::{
        Comment, CreateCommentRequest, DeleteCommentRequest, ListCommentsRequest, ListCommentsResponse,
        UpdateCommentRequest, comment_service_server::CommentService,
    },
    request::{COMMENT_CHARS_MAX, Check, mutation},
};

mutation! {
    CreateCommentRequest;
    UpdateCommentRequest;
    DeleteCommentRequest;
}

#[tonic::async_trait]
impl CommentService for Api {
    async fn create_comment(&self, request: Request<CreateCommentRequest>) -> RpcResult<Comment> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let comment = check.required("comment", request.comment);
        let issue_id = check.uuid("comment.issue_id", &comment.issue_id);
        let parent_id = check.optional_uuid("comment.parent_id", &comment.parent_id);
        let content = check.required_text("comment.content", comment.content, COMMENT_CHARS_MAX);
        check.done()?;

        let mutation = NewComment { author_id: caller.user_id, issue_id, parent_id, content };
        let call = MutationCall { caller_id: caller.user_id, options, mutation };
        Ok(self.batchers.mutate(&self.batchers.comments, call).await?.into())
    }

    async fn list_comments(&self, request: Request<ListCommentsRequest>) -> RpcResult<ListCommentsResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let issue_id = check.uuid("issue_id", &request.issue_id);
        let page = check.page(request.page_size, &request.page_token, &[b"comments", issue_id.as_bytes()]);
        check.done()?;
        let after = page.after_id()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = comments::list(&db, issue_id, after, page.limit(), page.bounds()).await?;
        if found.items.is_empty() && !comments::issue_exists(&db, issue_id).await? {
            return Err(Error::not_found("issue", "issue_id", issue_id).into());
        }
        let next_page_token = page.next_token(found.more, id_key(found.items.last().map(|item| &*item.id)).as_deref());
        Ok(ListCommentsResponse { comments: found.items, next_page_token }.into())
    }

    async fn update_comment(&self, request: Request<UpdateCommentRequest>) -> RpcResult<Comment> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let comment = check.required("comment", request.comment);
        let id = check.uuid("comment.id", &comment.id);
        check.mask(request.update_mask, &["content"], |_| true);
        let content = check.required_text("comment.content", comment.content, COMMENT_CHARS_MAX);
        check.done()?;

        let author = required_author(&caller);
        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            comments::change(conn, id, author, CommentChange::SetContent(&content), "comment.id").await
        });
        Ok(response.await?.into())
    }

    async fn delete_comment(&self, request: Request<DeleteCommentRequest>) -> RpcResult<Comment> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let id = check.uuid("id", &request.id);
        check.done()?;

        let author = required_author(&caller);
        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            comments::change(conn, id, author, CommentChange::Delete, "id").await
        });
        Ok(response.await?.into())
    }
}

/// Returns whose comments the caller may change. `None`: those of any user.
fn required_author(caller: &Caller) -> Option<uuid::Uuid> {
    if caller.is_admin() { None } else { Some(caller.user_id) }
}
