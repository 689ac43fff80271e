//! Who is calling: passwords and tokens.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, header::AUTHORIZATION};
use moka::future::Cache;
use tokio::sync::Semaphore;
use tonic::Request;
use uuid::Uuid;

use crate::{
    db::{Db, tokens},
    error::{Error, Result},
    pb::Role,
    request::{PASSWORD_BYTES_MAX, PASSWORD_BYTES_MIN},
};

/// How long a token is believed without asking the database: what was revoked on one replica ends on the others within
/// this time.
const TOKEN_BELIEVED: Duration = Duration::from_secs(5);
/// How many tokens are remembered at once.
const TOKENS_REMEMBERED_MAX: u64 = 10_000;
/// How many passwords are checked at once: each takes a core for a quarter of a second.
const PASSWORDS_AT_ONCE_MAX: usize = 2;
/// How long a password waits to be checked.
const PASSWORD_WAIT: Duration = Duration::from_secs(5);
/// How many may wait: what these can be done with in that time.
const PASSWORDS_WAITING_MAX: usize = 32;
/// 256 random bits.
const TOKEN_BYTES: usize = 32;
/// What a token begins with, so that a leaked one is recognised.
const TOKEN_PREFIX: &str = "itk_";

/// Who makes a request.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub user_id: Uuid,
    pub role: Role,
    pub token_id: Uuid,
}

impl Caller {
    /// The caller of a request that came through [`crate::gate`].
    pub fn of<T>(request: &Request<T>) -> Result<Self> {
        request.extensions().get::<Self>().copied().ok_or(Error::Internal("a request came past the gate"))
    }

    /// The caller, if he has this role or a higher one.
    pub fn with_role<T>(request: &Request<T>, role: Role) -> Result<Self> {
        let caller = Self::of(request)?;
        if caller.role < role {
            return Err(Error::PermissionDenied(format!(
                "this takes the role {}, the caller has {}",
                role.as_str_name(),
                caller.role.as_str_name()
            )));
        }
        Ok(caller)
    }

    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }
}

/// Checks passwords and tokens. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    db: Db,
    /// What is known of tokens, each with the generation in which it was read.
    callers: Cache<[u8; TOKEN_BYTES], (u64, Caller)>,
    /// What was read in an earlier one is not believed any more.
    generation: Arc<AtomicU64>,
    passwords: Arc<Semaphore>,
    passwords_waiting: Arc<Semaphore>,
    bcrypt_cost: u32,
    /// What is checked when there is no such user, so that it takes as long.
    decoy_hash: Arc<str>,
}

impl Auth {
    /// `bcrypt_cost`: 4 to 31; 12 takes a quarter of a second.
    pub fn new(db: Db, bcrypt_cost: u32) -> anyhow::Result<Self> {
        Ok(Self {
            db,
            callers: Cache::builder().max_capacity(TOKENS_REMEMBERED_MAX).time_to_live(TOKEN_BELIEVED).build(),
            generation: Arc::default(),
            passwords: Arc::new(Semaphore::new(PASSWORDS_AT_ONCE_MAX)),
            passwords_waiting: Arc::new(Semaphore::new(PASSWORDS_WAITING_MAX)),
            bcrypt_cost,
            decoy_hash: bcrypt::hash(new_token()?.0, bcrypt_cost)?.into(),
        })
    }

    /// Whether the password is the one that was hashed; without a hash it is not, after the same time.
    pub async fn verify_password(&self, password: &str, hash: Option<&str>) -> Result<bool> {
        // bcrypt takes more than these for a password's first bytes, or for its repetition.
        let exact = password.len() <= PASSWORD_BYTES_MAX && !password.contains('\0');
        let known = hash.is_some();
        let hash = hash.unwrap_or(&self.decoy_hash).to_owned();
        let password = password.to_owned();
        let equal = self.on_password_thread(move || bcrypt::verify(password, &hash)).await?;
        Ok(equal && exact && known)
    }

    pub async fn hash_password(&self, password: &str) -> Result<String> {
        let (password, cost) = (password.to_owned(), self.bcrypt_cost);
        self.on_password_thread(move || bcrypt::hash(password, cost)).await
    }

    async fn on_password_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, bcrypt::BcryptError> + Send + 'static,
    ) -> Result<T> {
        let busy = || Error::Exhausted("too many passwords are being checked; try again".to_owned());
        let _waiting = self.passwords_waiting.try_acquire().map_err(|_| busy())?;
        let acquire = Arc::clone(&self.passwords).acquire_owned();
        let permit = tokio::time::timeout(PASSWORD_WAIT, acquire).await.map_err(|_| busy())?;
        tokio::task::spawn_blocking(move || {
            // The work goes on when its caller has gone away, and so does its permit.
            let _permit = permit;
            work()
        })
        .await
        .map_err(|_| Error::Internal("the password thread panicked"))?
        .map_err(|_| Error::Internal("bcrypt"))
    }

    /// Forgets what is known of tokens, and what is being read of them, after some were revoked or a user was changed.
    pub fn forget_tokens(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Who has sent these headers.
    pub async fn authenticate(&self, headers: &HeaderMap) -> Result<Caller> {
        let token = headers.get(AUTHORIZATION).ok_or(Error::Unauthenticated(
            "no credentials; send metadata \"authorization: Bearer <token>\" with a token of AuthService.Login",
        ))?;
        let sha256 = token
            .to_str()
            .ok()
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .and_then(|(_, token)| token_sha256(token.trim()))
            .ok_or(Error::Unauthenticated("the authorization metadata is not \"Bearer <token>\""))?;
        let generation = self.generation.load(Ordering::SeqCst);
        if let Some((known_in, caller)) = self.callers.get(&sha256).await
            && known_in == generation
        {
            return Ok(caller);
        }
        // Boxed, as it happens seldom and would make the future of every request large: they are moved about.
        let found = Box::pin(async { tokens::find_caller(&*self.db.conn().await?, &sha256).await }).await?;
        let caller = found.ok_or(Error::Unauthenticated(
            "the token is unknown, expired or revoked, or its user is disabled; sign in again",
        ))?;
        self.callers.insert(sha256, (generation, caller)).await;
        Ok(caller)
    }
}

/// A new token, and its SHA-256 for the database.
pub fn new_token() -> anyhow::Result<(String, [u8; 32])> {
    let mut bytes = [0; TOKEN_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok((format!("{TOKEN_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)), crate::request::sha256(&[&bytes])))
}

/// None: it cannot be a token of this service.
pub fn token_sha256(token: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; TOKEN_BYTES];
    let encoded = token.strip_prefix(TOKEN_PREFIX)?;
    match BASE64_URL_SAFE_NO_PAD.decode_slice(encoded, &mut bytes) {
        Ok(TOKEN_BYTES) => Some(crate::request::sha256(&[&bytes])),
        _ => None,
    }
}

/// What a password must be.
pub fn check_password(password: &str) -> Result<(), String> {
    if !(PASSWORD_BYTES_MIN..=PASSWORD_BYTES_MAX).contains(&password.len()) {
        return Err(format!(
            "must have {PASSWORD_BYTES_MIN} to {PASSWORD_BYTES_MAX} bytes of UTF-8, has {}",
            password.len()
        ));
    }
    if password.contains('\0') {
        return Err("must not contain a NUL character".to_owned());
    }
    Ok(())
}
