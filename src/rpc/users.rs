//! `UserService`.

use std::mem;

use secrecy::SecretString;
use tonic::Request;

use super::{Api, RpcResult, client_address};
use crate::{
    auth::{Caller, check_password},
    db::{
        audit::{self, By},
        tokens,
        users::{self, NewUser},
    },
    error::quote,
    pb::{
        CreateUserRequest, GetUserRequest, ListAuditEventsRequest, ListAuditEventsResponse, ListUsersRequest,
        ListUsersResponse, ResetPasswordRequest, ResetPasswordResponse, Role, UpdateUserRequest, User,
        user_service_server::UserService,
    },
    request::{Check, USERNAME_CHARS_MAX, mutation},
};

mutation! {
    CreateUserRequest without password;
    ResetPasswordRequest without new_password;
    UpdateUserRequest;
}

#[tonic::async_trait]
impl UserService for Api {
    async fn create_user(&self, request: Request<CreateUserRequest>) -> RpcResult<User> {
        let caller = Caller::of(&request)?;
        let by = By::user(caller.user_id, client_address(&request));
        let mut request = request.into_inner();
        let password = SecretString::from(mem::take(&mut request.password));
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let user = check.required("user", request.user);
        let disabled = user.disabled;
        let username = check.take("user.username", check_username(user.username));
        let role: Role = check.enumeration("user.role", user.role);
        check.take("password", check_password(&password));
        check.done()?;
        let role = if role == Role::Unspecified { Role::Member } else { role };

        let password_hash = self.auth.hash_password(&password).await?;
        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            let new = NewUser { username: &username, role, disabled, password_hash: &password_hash };
            users::create(conn, new, by).await
        });
        Ok(response.await?.into())
    }

    async fn get_user(&self, request: Request<GetUserRequest>) -> RpcResult<User> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let (by_id, by_name) = (!request.id.is_empty(), !request.username.is_empty());
        let id = check.optional_uuid("id", &request.id);
        let username = check.text("username", request.username, USERNAME_CHARS_MAX);
        if by_id == by_name {
            check.fail("id", "set exactly one of id and username");
        }
        check.done()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let user = match id {
            Some(id) => users::get(&db, id).await?,
            None => users::get_by_username(&db, &username).await?,
        };
        Ok(user.into())
    }

    async fn list_users(&self, request: Request<ListUsersRequest>) -> RpcResult<ListUsersResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let page = check.page(request.page_size, &request.page_token, &[b"users"]);
        check.done()?;
        let after = page.after_name()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = users::list(&db, after, page.limit(), page.bounds()).await?;
        let next_page_token = page.next_token(found.more, found.items.last().map(|user| user.username.as_bytes()));
        Ok(ListUsersResponse { users: found.items, next_page_token }.into())
    }

    async fn update_user(&self, request: Request<UpdateUserRequest>) -> RpcResult<User> {
        let caller = Caller::of(&request)?;
        let by = By::user(caller.user_id, client_address(&request));
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let user = check.required("user", request.user);
        let id = check.uuid("user.id", &user.id);
        let populated = |path: &str| match path {
            "role" => user.role != 0,
            _ => user.disabled,
        };
        let masked = request.update_mask.as_ref().is_some_and(|mask| !mask.paths.is_empty());
        let paths = check.mask(request.update_mask, &["role", "disabled"], populated);
        if paths.is_empty() && !masked {
            check.fail("update_mask", "nothing to change; set any of role, disabled");
        }
        let role = paths.contains(&"role").then(|| {
            let role = Role::try_from(user.role).ok().filter(|role| *role != Role::Unspecified);
            check.take(
                "user.role",
                role.ok_or_else(|| "required; expected ROLE_VIEWER, ROLE_MEMBER or ROLE_ADMIN".to_owned()),
            )
        });
        let disabled = paths.contains(&"disabled").then_some(user.disabled);
        check.done()?;

        let response = self.db.mutate(caller.user_id, options, async |tx| {
            let user = users::update(tx, id, role, disabled, by).await?;
            if user.disabled {
                tokens::end_sessions(tx, id, None, by).await?;
            }
            Ok(user)
        });
        let response = response.await;
        // Also after an error: the outcome of a commit can be unknown.
        if !options.validate_only {
            self.auth.forget_tokens();
        }
        Ok(response?.into())
    }

    async fn reset_password(&self, request: Request<ResetPasswordRequest>) -> RpcResult<ResetPasswordResponse> {
        let caller = Caller::of(&request)?;
        let address = client_address(&request);
        let mut request = request.into_inner();
        let new_password = SecretString::from(mem::take(&mut request.new_password));
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let user_id = check.uuid("user_id", &request.user_id);
        check.take("new_password", check_password(&new_password));
        check.done()?;

        let password_hash = self.auth.hash_password(&new_password).await?;
        let mutated = self.db.mutate_or_find(caller.user_id, options, async |tx| {
            users::reset_password(tx, user_id, &password_hash, By::user(caller.user_id, address)).await?;
            Ok(ResetPasswordResponse {})
        });
        let mutated = mutated.await;
        // Also after an error: the outcome of a commit can be unknown.
        if !options.validate_only {
            self.auth.forget_tokens();
        }
        let mutated = mutated?;
        if mutated.is_retry {
            self.check_retried_password(&caller, user_id, options, &new_password, address).await?;
        }
        Ok(mutated.response.into())
    }

    async fn list_audit_events(&self, request: Request<ListAuditEventsRequest>) -> RpcResult<ListAuditEventsResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let user_id = check.optional_uuid("user_id", &request.user_id);
        let of_user = user_id.as_ref().map_or(&[][..], |id| id.as_bytes());
        let page = check.page(request.page_size, &request.page_token, &[b"audit events", of_user]);
        check.done()?;
        let after = page.after_number()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = audit::list(&db, user_id, after.unwrap_or(i64::MAX), page.limit(), page.bounds()).await?;
        let last = found.items.last().map(|event| event.id.to_be_bytes());
        let next_page_token = page.next_token(found.more, last.as_ref().map(|id| &id[..]));
        Ok(ListAuditEventsResponse { audit_events: found.items, next_page_token }.into())
    }
}

/// Checks a username: 1 to 50 ASCII letters, digits and `._-@+`, of which the first is a letter or digit.
pub fn check_username(username: String) -> Result<String, String> {
    let is_allowed = |char: char| char.is_ascii_alphanumeric() || "._-@+".contains(char);
    let is_valid = username.starts_with(|char: char| char.is_ascii_alphanumeric()) && username.chars().all(is_allowed);
    if !is_valid || username.len() > USERNAME_CHARS_MAX {
        return Err(format!(
            "\"{}\" is not a username; expected 1 to {USERNAME_CHARS_MAX} ASCII letters, digits and any of ._-@+, the first \
             a letter or digit",
            quote(&username)
        ));
    }
    Ok(username)
}
