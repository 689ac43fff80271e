//! Who is calling: passwords and tokens.

mod passwords;
pub mod throttle;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use moka::future::Cache;
use secrecy::{ExposeSecret, SecretString};
use tonic::Request;
use uuid::Uuid;

pub use self::passwords::Line;
use self::passwords::Passwords;
use crate::{
    batching::coalescer::{BatchAffinity, Bounds, Coalescer, Outcome},
    db::{
        Db,
        tokens::{self, TokenOwner},
    },
    error::{Error, Result},
    hash::sha256,
    limits::{PASSWORD_BYTES_MAX, PASSWORD_BYTES_MIN},
    pb::Role,
};

/// How long a token is believed without asking the database: what was revoked on one replica ends on the others within
/// this time.
const TOKEN_BELIEVED: Duration = Duration::from_secs(5);
/// How many tokens are remembered at once.
const TOKENS_REMEMBERED_MAX: u64 = 10_000;
/// Tokens are looked up by one statement at a time, so that of the connections for this the others stay for logins: whoever
/// sends tokens that nobody has keeps nobody from signing in. Nor from calling: who waits for this has no slot of the gate
/// yet, and so has a bound of its own. Nor do they cost connections when they are taken back at once: anybody can.
const LOOKUPS: Bounds = Bounds { items_max: 256, batches_max: 1, waiting_max: 4_096, runs_inline: false };
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
    /// The caller of a request that came through [`crate::middleware`].
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

type Lookups = Coalescer<[u8; TOKEN_BYTES], Option<TokenOwner>, ()>;

/// What is known of a token.
#[derive(Clone, Copy)]
struct Known {
    caller: Caller,
    /// The generation in which it was read.
    generation: u64,
    /// When it expires. None: not before it is revoked.
    valid_until: Option<Instant>,
}

/// Checks passwords and tokens. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    db: Db,
    lookups: Arc<Lookups>,
    callers: Cache<[u8; TOKEN_BYTES], Known>,
    /// What was read in an earlier one is not believed any more.
    generation: Arc<AtomicU64>,
    passwords: Arc<Passwords>,
    bcrypt_cost: u32,
    /// What is checked when there is no such user, so that it takes as long.
    decoy_hash: Arc<SecretString>,
}

impl Auth {
    /// `bcrypt_cost`: 4 to 31; 12 takes a quarter of a second.
    pub fn new(db: Db, bcrypt_cost: u32) -> anyhow::Result<Self> {
        // Half of the cores, so that whoever sends passwords does not take the others' time.
        let threads_max = (std::thread::available_parallelism()?.get() / 2).max(1);
        let db = db.for_auth();
        Ok(Self {
            lookups: Arc::new(lookups(&db)),
            db,
            callers: Cache::builder().max_capacity(TOKENS_REMEMBERED_MAX).time_to_live(TOKEN_BELIEVED).build(),
            generation: Arc::default(),
            passwords: Arc::new(Passwords::new(threads_max)),
            bcrypt_cost,
            decoy_hash: Arc::new(hash_password(&new_token()?.0.into(), bcrypt_cost)?),
        })
    }

    /// Where users and tokens are looked up, beside what else is asked of the database.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Whether the password is the one that was hashed; without a hash it is not, after the same time.
    pub async fn verify_password(
        &self,
        line: Line,
        password: &SecretString,
        hash: Option<&SecretString>,
    ) -> Result<bool> {
        // bcrypt takes more than these for a password's first bytes, or for its repetition.
        let exact = password.expose_secret().len() <= PASSWORD_BYTES_MAX && !password.expose_secret().contains('\0');
        let known = hash.is_some();
        let (password, hash) = (password.clone(), hash.unwrap_or(&self.decoy_hash).clone());
        let verify = move || bcrypt::verify(password.expose_secret(), hash.expose_secret());
        let equal = self.passwords.on_thread(line, verify).await?;
        Ok(equal && exact && known)
    }

    /// For somebody who has signed in.
    pub async fn hash_password(&self, password: &SecretString) -> Result<SecretString> {
        let (password, cost) = (password.clone(), self.bcrypt_cost);
        self.passwords.on_thread(Line::Known, move || hash_password(&password, cost)).await
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
        let sha256 = bearer_sha256(token)
            .ok_or(Error::Unauthenticated("the authorization metadata is not \"Bearer <token>\""))?;
        let generation = self.generation.load(Ordering::SeqCst);
        let now = Instant::now();
        if let Some(known) = self.callers.get(&sha256).await
            && known.generation == generation
            && known.valid_until.is_none_or(|end| now < end)
        {
            return Ok(known.caller);
        }
        // Boxed, as it happens seldom and would make the future of every request large: they are moved about.
        let found = Box::pin(self.lookups.call(sha256)).await?;
        let TokenOwner { token_id, user_id, role, valid_for } = found.ok_or(Error::Unauthenticated(
            "the token is unknown, expired or revoked, or its user is disabled; sign in again",
        ))?;
        let caller = Caller { user_id, role, token_id };
        // From before the database was asked, and so rather too early. Too long to reckon with is for ever.
        let valid_until = valid_for.and_then(|valid_for| now.checked_add(valid_for));
        self.callers.insert(sha256, Known { caller, generation, valid_until }).await;
        Ok(caller)
    }
}

/// Looks tokens up, all that come at the same time together.
fn lookups(db: &Db) -> Lookups {
    let (of_round, of_one) = (db.clone(), db.clone());
    Coalescer::new(
        LOOKUPS,
        |_| BatchAffinity::Any,
        Box::new(move |wanted| {
            let db = of_round.clone();
            Box::pin(async move {
                let found = async { tokens::find_owners(&db.conn().await?, &wanted).await };
                // What fails is told to all of them: each alone would take the connections that are not for this.
                let found = found.await.unwrap_or_else(|error| vec![Err(error); wanted.len()]);
                Ok(found.into_iter().map(Outcome::Done).collect())
            })
        }),
        Box::new(move |sha256| {
            let db = of_one.clone();
            Box::pin(async move {
                let found = tokens::find_owners(&db.conn().await?, &[sha256]).await?.pop();
                found.ok_or(Error::Internal("a token was not looked up"))?
            })
        }),
    )
}

/// `cost` is bcrypt's, as of [`Auth::new`].
pub fn hash_password(password: &SecretString, cost: u32) -> Result<SecretString, bcrypt::BcryptError> {
    bcrypt::hash(password.expose_secret(), cost).map(SecretString::from)
}

/// A new token, and its SHA-256 for the database.
pub fn new_token() -> anyhow::Result<(String, [u8; 32])> {
    let mut bytes = [0; TOKEN_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok((format!("{TOKEN_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)), sha256(&[&bytes])))
}

/// Of the token in "Bearer <token>". None: that is not what it says, or it cannot be a token of this service.
pub fn bearer_sha256(authorization: &HeaderValue) -> Option<[u8; 32]> {
    let (scheme, token) = authorization.to_str().ok()?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") { token_sha256(token.trim()) } else { None }
}

/// None: it cannot be a token of this service.
pub fn token_sha256(token: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; TOKEN_BYTES];
    let encoded = token.strip_prefix(TOKEN_PREFIX)?;
    match BASE64_URL_SAFE_NO_PAD.decode_slice(encoded, &mut bytes) {
        Ok(TOKEN_BYTES) => Some(sha256(&[&bytes])),
        _ => None,
    }
}

/// What a password must be.
pub fn check_password(password: &SecretString) -> Result<(), String> {
    let password = password.expose_secret();
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
