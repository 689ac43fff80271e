//! `AuthService`.

use std::{
    mem,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
};

use secrecy::SecretString;
use tonic::Request;
use uuid::Uuid;

use super::{Api, RpcResult, client_address, id_key};
use crate::{
    auth::throttle::{Account, Attempt},
    auth::{Caller, Lane, check_password, new_token},
    db::{
        Conn, Db,
        audit::{self, By},
        idempotency::{MutationOptions, request_id_reused},
        tokens::{self, NewSession},
        users::{self, Credentials},
    },
    error::{Error, Result},
    fairness::Flow,
    middleware::admission::flow,
    pb::{
        ApiToken, ChangePasswordRequest, ChangePasswordResponse, CreateApiTokenRequest, CreateApiTokenResponse,
        ListApiTokensRequest, ListApiTokensResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse,
        RevokeApiTokenRequest, Role, User, WhoAmIRequest, auth_service_server::AuthService,
    },
    request::{Check, TOKEN_NAME_CHARS_MAX, mutation},
};

mutation! {
    LogoutRequest;
    ChangePasswordRequest without current_password, new_password;
    RevokeApiTokenRequest;
}

#[tonic::async_trait]
impl AuthService for Api {
    async fn login(&self, request: Request<LoginRequest>) -> RpcResult<LoginResponse> {
        let address = client_address(&request);
        // Look-ups of tokens go first: a client that signs in again and again must not delay calls of others.
        let db = self.auth.db().for_flow(flow(request.extensions()));
        let LoginRequest { username, password, validate_only } = request.into_inner();
        let password = password.into();
        let mut attempt = self.login_limits.begin(Account::Username(&username), address)?;
        let by = By::unauthenticated(address);
        let lane = if attempt.is_recognized() { Lane::Recognized } else { Lane::Unrecognized };
        match self.check_credentials(&db, lane, &username, &password).await {
            Ok(CredentialCheck::Valid(credentials)) => {
                attempt.succeeded();
                if validate_only {
                    let user = Some(credentials.user);
                    return Ok(LoginResponse { user, ..LoginResponse::default() }.into());
                }
                self.open_session(&db, credentials, by).await
            }
            Ok(CredentialCheck::Invalid(user_id)) => {
                audit::login_failed(&db.autocommit_conn().await?, user_id, by).await?;
                Err(wrong_credentials().into())
            }
            Err(error) => {
                attempt.unchecked();
                Err(error.into())
            }
        }
    }

    async fn logout(&self, request: Request<LogoutRequest>) -> RpcResult<LogoutResponse> {
        let caller = Caller::of(&request)?;
        let by = By::user(caller.user_id, client_address(&request));
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        check.done()?;

        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            tokens::revoke(conn, caller.token_id, by).await?;
            Ok(LogoutResponse {})
        });
        let response = response.await;
        // Also after an error: the outcome of the statement can be unknown.
        if !options.validate_only {
            self.auth.forget_tokens();
        }
        Ok(response?.into())
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> RpcResult<User> {
        let caller = Caller::of(&request)?;
        let db = self.db.for_flow(caller.flow()).conn().await?;
        Ok(users::get(&db, caller.user_id).await?.into())
    }

    async fn change_password(&self, request: Request<ChangePasswordRequest>) -> RpcResult<ChangePasswordResponse> {
        let caller = Caller::of(&request)?;
        let address = client_address(&request);
        let mut request = request.into_inner();
        let current_password = SecretString::from(mem::take(&mut request.current_password));
        let new_password = SecretString::from(mem::take(&mut request.new_password));
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        check.take("new_password", check_password(&new_password));
        check.done()?;

        let wrong_password = || Error::invalid("current_password", "wrong password; expected the current one");
        let old_hash = users::password_hash(&self.db.for_flow(caller.flow()).conn().await?, caller.user_id).await?;
        // The first call has changed the current password, which a retry is therefore not checked against. The hash is
        // read before the look-up: it is still the old one if the first call commits in between.
        if self.db.is_retry(caller.user_id, options).await? {
            self.check_retried_password(&caller, caller.user_id, options, &new_password, address).await?;
            return Ok(ChangePasswordResponse {}.into());
        }
        // In progress until the new password is hashed: bounds the concurrent password work of a user.
        let attempt = self.try_password(&caller, caller.user_id, &current_password, &old_hash, address).await?;
        let Some(attempt) = attempt else { return Err(wrong_password().into()) };
        let new_hash = self.auth.hash_password(&new_password).await?;
        drop(attempt);
        let by = By::user(caller.user_id, address);
        let mutated = self.db.mutate_or_find(caller.user_id, options, async |tx| {
            // Another change may have been committed since the password was checked.
            if !users::change_password_hash(tx, caller.user_id, &old_hash, &new_hash, by).await? {
                return Err(wrong_password());
            }
            tokens::end_sessions(tx, caller.user_id, Some(caller.token_id), by).await?;
            Ok(ChangePasswordResponse {})
        });
        let mutated = mutated.await;
        // Also after an error: the outcome of a commit can be unknown.
        if !options.validate_only {
            self.auth.forget_tokens();
        }
        let mutated = mutated?;
        if mutated.is_retry {
            self.check_retried_password(&caller, caller.user_id, options, &new_password, address).await?;
        }
        Ok(mutated.response.into())
    }

    async fn create_api_token(&self, request: Request<CreateApiTokenRequest>) -> RpcResult<CreateApiTokenResponse> {
        let caller = Caller::of(&request)?;
        let by = By::user(caller.user_id, client_address(&request));
        let request = request.into_inner();
        let mut check = Check::default();
        let api_token = check.required("api_token", request.api_token);
        let user_id = check.optional_uuid("api_token.user_id", &api_token.user_id).unwrap_or(caller.user_id);
        may_manage_tokens(&caller, user_id)?;
        let name = check.required_text("api_token.name", api_token.name, TOKEN_NAME_CHARS_MAX);
        let expire_time = check.time("api_token.expire_time", api_token.expire_time);
        check.done()?;

        let options = MutationOptions { key: None, validate_only: request.validate_only };
        let (token, sha256) = new_token().map_err(|_| Error::Internal("no random bytes"))?;
        let response = self.db.mutate(caller.user_id, options, async |tx| {
            // Locks the user: of two concurrent calls, the second counts the token of the first.
            lock_enabled(tx, user_id).await?;
            if tokens::count_api_tokens(tx, user_id).await? >= API_TOKENS_PER_USER_MAX {
                let message = format!("the user has {API_TOKENS_PER_USER_MAX} valid API tokens; revoke one first");
                return Err(Error::precondition("TOO_MANY_API_TOKENS", "api_token.user_id", message));
            }
            let api_token =
                tokens::create_api_token(tx, user_id, &sha256, &name, expire_time, by).await?.ok_or_else(|| {
                    Error::invalid("api_token.expire_time", "is in the past; expected a time in the future")
                })?;
            let access_token = if request.validate_only { String::new() } else { token.clone() };
            Ok(CreateApiTokenResponse { api_token: Some(api_token), access_token })
        });
        Ok(response.await?.into())
    }

    async fn list_api_tokens(&self, request: Request<ListApiTokensRequest>) -> RpcResult<ListApiTokensResponse> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let mut check = Check::default();
        let user_id = check.optional_uuid("user_id", &request.user_id).unwrap_or(caller.user_id);
        may_manage_tokens(&caller, user_id)?;
        let page = check.page(request.page_size, &request.page_token, &[b"api tokens", user_id.as_bytes()]);
        check.done()?;
        let after = page.after_id()?;

        let db = self.db.for_flow(caller.flow()).conn().await?;
        let found = tokens::list_api_tokens(&db, user_id, after, page.limit(), page.bounds()).await?;
        let next_page_token = page.next_token(found.more, id_key(found.items.last().map(|item| &*item.id)).as_deref());
        Ok(ListApiTokensResponse { api_tokens: found.items, next_page_token }.into())
    }

    async fn revoke_api_token(&self, request: Request<RevokeApiTokenRequest>) -> RpcResult<ApiToken> {
        let caller = Caller::of(&request)?;
        let by = By::user(caller.user_id, client_address(&request));
        let request = request.into_inner();
        let mut check = Check::default();
        let options = check.mutation_options(&request);
        let id = check.uuid("id", &request.id);
        check.done()?;

        let owner = if caller.is_admin() { None } else { Some(caller.user_id) };
        let was_valid = AtomicBool::new(false);
        let response = self.db.mutate_by_statement(caller.user_id, options, async |conn| {
            let (api_token, was_revoked_now) = tokens::revoke_api_token(conn, id, owner, by).await?;
            was_valid.store(was_revoked_now, Ordering::Relaxed);
            Ok(api_token)
        });
        let response = response.await;
        // Also after an error: the commit may have taken place.
        if (was_valid.into_inner() || response.is_err()) && !options.validate_only {
            self.auth.forget_tokens();
        }
        Ok(response?.into())
    }
}

/// Maximum valid API tokens of a user: bounds what one user can add to the table.
const API_TOKENS_PER_USER_MAX: i64 = 100;

/// The result of checking a username and a password.
enum CredentialCheck {
    Valid(Credentials),
    /// The id of the user with that name, if there is one.
    Invalid(Option<Uuid>),
}

impl Api {
    /// Checks a password that the caller gives for a user against this hash. Throttled as a login is; a wrong password is
    /// logged as one, and returns `None`. The attempt is in progress until it is dropped.
    async fn try_password(
        &self,
        caller: &Caller,
        user_id: Uuid,
        password: &SecretString,
        hash: &SecretString,
        address: Option<IpAddr>,
    ) -> Result<Option<Attempt>> {
        let mut attempt = self.login_limits.begin(Account::Caller(caller.user_id), address)?;
        match self.auth.verify_password(Lane::Recognized, password, Some(hash)).await {
            Ok(true) => {
                attempt.succeeded();
                Ok(Some(attempt))
            }
            Ok(false) => {
                let by = By::user(caller.user_id, address);
                let db = self.auth.db().for_flow(caller.flow());
                audit::login_failed(&db.autocommit_conn().await?, Some(user_id), by).await?;
                Ok(None)
            }
            Err(error) => {
                attempt.unchecked();
                Err(error)
            }
        }
    }

    /// Checks that a retry of a call that sets a password has the password that the user has now. Passwords are not in
    /// the stored fingerprint, so this check distinguishes a retry from another request with the same id.
    pub(super) async fn check_retried_password(
        &self,
        caller: &Caller,
        user_id: Uuid,
        options: MutationOptions,
        new_password: &SecretString,
        address: Option<IpAddr>,
    ) -> Result<()> {
        let hash = users::password_hash(&self.db.for_flow(Flow::User(user_id)).conn().await?, user_id).await?;
        let is_same = self.try_password(caller, user_id, new_password, &hash, address).await?.is_some();
        match options.key {
            Some(key) if !is_same => Err(request_id_reused(key.request_id)),
            Some(_) | None => Ok(()),
        }
    }

    async fn check_credentials(
        &self,
        db: &Db,
        lane: Lane,
        username: &str,
        password: &SecretString,
    ) -> Result<CredentialCheck> {
        // Malformed credentials fail as wrong ones do: the error must not reveal what valid ones look like. The connection is
        // returned to the pool before the password is checked.
        let credentials = match username.contains('\0') || !username.is_ascii() {
            // Usernames are ASCII. The database lower-cases some other letters to ASCII ones.
            true => None,
            false => users::find_credentials(&db.conn().await?, username).await?,
        };
        let hash = credentials.as_ref().map(|credentials| &credentials.password_hash);
        let verified = self.auth.verify_password(lane, password, hash).await?;
        Ok(match credentials {
            Some(credentials) if verified && !credentials.user.disabled => CredentialCheck::Valid(credentials),
            credentials => CredentialCheck::Invalid(credentials.map(|credentials| credentials.user_id)),
        })
    }

    async fn open_session(&self, db: &Db, credentials: Credentials, by: By) -> RpcResult<LoginResponse> {
        let Credentials { user, user_id, password_hash } = credentials;
        let (access_token, sha256) = new_token().map_err(|_| Error::Internal("no random bytes"))?;
        let db = db.autocommit_conn().await?;
        let session = NewSession { user_id, password_hash: &password_hash, sha256: &sha256, hours: self.session_hours };
        let Some(expire_time) = tokens::create_session(&db, session, by).await? else {
            audit::login_failed(&db, Some(user_id), by).await?;
            return Err(wrong_credentials().into());
        };
        Ok(LoginResponse { access_token, expire_time: Some(expire_time), user: Some(user) }.into())
    }
}

fn wrong_credentials() -> Error {
    Error::Unauthenticated("the username or the password is wrong")
}

fn may_manage_tokens(caller: &Caller, user_id: Uuid) -> Result<()> {
    if user_id != caller.user_id && !caller.is_admin() {
        let role = Role::Admin.as_str_name();
        return Err(Error::PermissionDenied(format!("API tokens of other users require {role}")));
    }
    Ok(())
}

async fn lock_enabled(db: &Conn, user_id: Uuid) -> Result<()> {
    let user = users::lock(db, user_id).await.map_err(|error| match error {
        Error::NotFound(_) => Error::not_found("user", "api_token.user_id", user_id),
        error => error,
    })?;
    if user.disabled {
        let message = format!("user \"{}\" is disabled", user.username);
        return Err(Error::precondition("USER_DISABLED", "api_token.user_id", message));
    }
    Ok(())
}
