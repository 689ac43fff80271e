//! `AuthService`.

use tonic::Request;

use super::{Api, Reply, finish, fresh};
use crate::{
    auth::{Caller, check_password, new_token},
    db::{Conn, requests::RequestKey, tokens, users},
    error::{Error, Result},
    pb::{
        ApiToken, ChangePasswordRequest, ChangePasswordResponse, CreateApiTokenRequest, CreateApiTokenResponse,
        ListApiTokensRequest, ListApiTokensResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse,
        RevokeApiTokenRequest, Role, User, WhoAmIRequest, auth_service_server::AuthService,
    },
    request::{Check, TOKEN_NAME_CHARS_MAX, mutation, timestamp},
    rpc::issues::last_id,
};

mutation! {
    LogoutRequest;
    ChangePasswordRequest without current_password, new_password;
    RevokeApiTokenRequest;
}

#[tonic::async_trait]
impl AuthService for Api {
    async fn login(&self, request: Request<LoginRequest>) -> Reply<LoginResponse> {
        let request = request.into_inner();
        // Whatever the two are, they are only wrong: nothing is told about what a user or a password looks like. The
        // connection is not held while the password is checked.
        let credentials = match request.username.contains('\0') {
            true => None,
            false => users::find_credentials(&*self.db.conn().await?, &request.username).await?,
        };
        let hash = credentials.as_ref().map(|credentials| &*credentials.password_hash);
        let wrong = || Error::Unauthenticated("the username or the password is wrong");
        let verified = self.auth.verify_password(&request.password, hash).await?;
        let credentials = credentials.filter(|_| verified).ok_or_else(wrong)?;
        let mut reply = LoginResponse { user: Some(credentials.user), ..LoginResponse::default() };
        if !request.validate_only {
            let (token, sha256) = new_token().map_err(|_| Error::Internal("no random bytes"))?;
            let db = self.db.autocommit_conn().await?;
            let (user_id, hash) = (credentials.user_id, &credentials.password_hash);
            let expire_time = tokens::create_session(&db, user_id, hash, &sha256, self.session_hours).await?;
            reply.access_token = token;
            reply.expire_time = Some(timestamp(expire_time.ok_or_else(wrong)?));
        }
        Ok(reply.into())
    }

    async fn logout(&self, request: Request<LogoutRequest>) -> Reply<LogoutResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        check.done()?;

        let tx = fresh!(self.db.begin_single(caller.user_id, key).await?);
        tokens::revoke(&tx, caller.token_id).await?;
        let reply = finish(tx, LogoutResponse {}).await;
        self.auth.forget_tokens();
        reply
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> Reply<User> {
        let caller = Caller::of(&request)?;
        let db = self.db.conn().await?;
        Ok(users::get(&db, caller.user_id).await?.into())
    }

    async fn change_password(&self, request: Request<ChangePasswordRequest>) -> Reply<ChangePasswordResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        check.take("new_password", check_password(&request.new_password));
        check.done()?;

        let wrong = || Error::invalid("current_password", "is not the current password");
        let old_hash = users::password_hash(&*self.db.conn().await?, caller.user_id).await?;
        // A repeated request is answered before the current password is checked: it is another one by now. The hash was
        // read before, so that it is the old one still if the first request is not done by now.
        if key.request_id.is_some() {
            let _tried = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        }
        if !self.auth.verify_password(&request.current_password, Some(&old_hash)).await? {
            return Err(wrong().into());
        }
        let password_hash = self.auth.hash_password(&request.new_password).await?;
        let tx = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        // Another change may have been made since the password was checked.
        if !users::change_password_hash(&tx, caller.user_id, &old_hash, &password_hash).await? {
            return Err(wrong().into());
        }
        tokens::end_sessions(&tx, caller.user_id, Some(caller.token_id)).await?;
        let reply = finish(tx, ChangePasswordResponse {}).await;
        self.auth.forget_tokens();
        reply
    }

    async fn create_api_token(&self, request: Request<CreateApiTokenRequest>) -> Reply<CreateApiTokenResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let api_token = check.required("api_token", request.api_token);
        let user_id = check.optional_uuid("api_token.user_id", &api_token.user_id).unwrap_or(caller.user_id);
        may_manage_tokens(&caller, user_id)?;
        let name = check.required_text("api_token.name", api_token.name, TOKEN_NAME_CHARS_MAX);
        check.done()?;

        let key = RequestKey { request_id: None, validate_only: request.validate_only };
        let (token, sha256) = new_token().map_err(|_| Error::Internal("no random bytes"))?;
        let tx = fresh!(self.db.begin_mutation(caller.user_id, key).await?);
        check_enabled(&tx, user_id).await?;
        let api_token = tokens::create_api_token(&tx, user_id, &sha256, &name).await?;
        let access_token = if request.validate_only { String::new() } else { token };
        finish(tx, CreateApiTokenResponse { api_token: Some(api_token), access_token }).await
    }

    async fn list_api_tokens(&self, request: Request<ListApiTokensRequest>) -> Reply<ListApiTokensResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let user_id = check.optional_uuid("user_id", &request.user_id).unwrap_or(caller.user_id);
        may_manage_tokens(&caller, user_id)?;
        let page = check.page(request.page_size, &request.page_token, &[b"api tokens", user_id.as_bytes()]);
        check.done()?;
        let after = page.after_id()?;

        let db = self.db.conn().await?;
        let found = tokens::list_api_tokens(&db, user_id, after, page.limit(), page.bounds()).await?;
        let next_page_token = page.next_token(found.more, last_id(found.items.last().map(|item| &*item.id)).as_deref());
        Ok(ListApiTokensResponse { api_tokens: found.items, next_page_token }.into())
    }

    async fn revoke_api_token(&self, request: Request<RevokeApiTokenRequest>) -> Reply<ApiToken> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let key = check.mutation(&request);
        let id = check.uuid("id", &request.id);
        check.done()?;

        let owner = if caller.is_admin() { None } else { Some(caller.user_id) };
        let tx = fresh!(self.db.begin_single(caller.user_id, key).await?);
        let api_token = tokens::revoke_api_token(&tx, id, owner).await?;
        let reply = finish(tx, api_token).await;
        self.auth.forget_tokens();
        reply
    }
}

fn may_manage_tokens(caller: &Caller, user_id: uuid::Uuid) -> Result<()> {
    if user_id != caller.user_id && !caller.is_admin() {
        let role = Role::Admin.as_str_name();
        return Err(Error::PermissionDenied(format!("somebody else's API tokens take the role {role}")));
    }
    Ok(())
}

async fn check_enabled(db: &Conn, user_id: uuid::Uuid) -> Result<()> {
    let user = users::get(db, user_id).await.map_err(|error| match error {
        Error::NotFound(_) => Error::not_found("user", "api_token.user_id", user_id),
        error => error,
    })?;
    if user.disabled {
        let message = format!("user \"{}\" is disabled", user.username);
        return Err(Error::precondition("USER_DISABLED", "api_token.user_id", message));
    }
    Ok(())
}
