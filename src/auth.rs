//! Authentication: callers, their tokens and their passwords.

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

pub use self::passwords::Lane;
use self::passwords::Passwords;
use crate::{
    batching::coalescer::{BatchAffinity, Bounds, Coalescer, Outcome},
    db::{
        Db,
        tokens::{self, TokenOwner},
    },
    error::{Error, Result},
    fairness::Flow,
    hash::sha256,
    limits::{PASSWORD_BYTES_MAX, PASSWORD_BYTES_MIN},
    pb::Role,
};

/// How long a token is valid for new calls without a look-up in the database. A token that is revoked on one replica stays
/// valid on the others for up to this time.
const TOKEN_CACHED: Duration = Duration::from_secs(5);
/// Maximum number of cached tokens.
const TOKENS_CACHED_MAX: u64 = 10_000;
/// Tokens are looked up by one statement at a time, which leaves the other connections of this pool to logins: users can
/// sign in during a flood of invalid tokens. Requests that wait for a look-up have no request slot yet, so they have a
/// limit of their own. Abandoned look-ups cost no connection either: any client can abandon requests.
const LOOKUPS: Bounds =
    Bounds { name: "token_lookup", items_max: 256, batches_max: 1, waiting_max: 4_096, runs_inline: false };
/// 256 random bits.
const TOKEN_BYTES: usize = 32;
/// The prefix of all tokens, by which leaked ones are recognized.
const TOKEN_PREFIX: &str = "itk_";

/// The user that makes a request, as its token shows.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    pub user_id: Uuid,
    pub role: Role,
    pub token_id: Uuid,
}

impl Caller {
    /// Returns the caller that the authentication layer of [`crate::middleware`] has attached to the request.
    pub fn of<T>(request: &Request<T>) -> Result<Self> {
        request.extensions().get::<Self>().copied().ok_or(Error::Internal("a request without a caller"))
    }

    pub fn flow(&self) -> Flow {
        Flow::User(self.user_id)
    }

    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }
}

type Lookups = Coalescer<[u8; TOKEN_BYTES], Option<TokenOwner>, ()>;

/// The result of a token look-up.
#[derive(Clone, Copy)]
struct CachedCaller {
    caller: Caller,
    /// When the look-up began.
    looked_up: Instant,
    /// The generation in which the look-up began.
    generation: u64,
    /// When the token expires. `None`: it does not.
    valid_until: Option<Instant>,
}

/// Checks passwords and tokens. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    db: Db,
    lookups: Arc<Lookups>,
    callers: Cache<[u8; TOKEN_BYTES], CachedCaller>,
    /// Cached callers of earlier generations are invalid.
    generation: Arc<AtomicU64>,
    passwords: Arc<Passwords>,
    bcrypt_cost: u32,
    /// The hash that is checked if the user does not exist, so that the check takes as long.
    decoy_hash: Arc<SecretString>,
}

impl Auth {
    /// `bcrypt_cost`: 4 to 18; 12 takes about 250 ms per password.
    pub fn new(db: Db, bcrypt_cost: u32) -> anyhow::Result<Self> {
        // Half of the cores: the other half is left to other requests.
        let threads_max = (std::thread::available_parallelism()?.get() / 2).max(1);
        let db = db.for_auth();
        Ok(Self {
            lookups: Arc::new(lookups(&db)),
            db,
            callers: Cache::builder().max_capacity(TOKENS_CACHED_MAX).time_to_live(TOKEN_CACHED).build(),
            generation: Arc::default(),
            passwords: Arc::new(Passwords::new(threads_max)),
            bcrypt_cost,
            decoy_hash: Arc::new(hash_password(&new_token()?.0.into(), bcrypt_cost)?),
        })
    }

    /// Returns the connections that are reserved for authentication.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Returns whether `hash` is that of the password. Without a hash it returns `false` after the same time.
    pub async fn verify_password(
        &self,
        lane: Lane,
        password: &SecretString,
        hash: Option<&SecretString>,
    ) -> Result<bool> {
        // bcrypt ignores further bytes, and takes a NUL for the start of a repetition.
        let exact = password.expose_secret().len() <= PASSWORD_BYTES_MAX && !password.expose_secret().contains('\0');
        let exists = hash.is_some();
        let (password, hash) = (password.clone(), hash.unwrap_or(&self.decoy_hash).clone());
        let verify = move || bcrypt::verify(password.expose_secret(), hash.expose_secret());
        let equal = self.passwords.on_thread(lane, verify).await?;
        Ok(equal && exact && exists)
    }

    /// Hashes the password of an authenticated caller.
    pub async fn hash_password(&self, password: &SecretString) -> Result<SecretString> {
        let (password, cost) = (password.clone(), self.bcrypt_cost);
        self.passwords.on_thread(Lane::Recognized, move || hash_password(&password, cost)).await
    }

    /// Invalidates all cached callers and the look-ups in flight, after tokens were revoked or a user was changed.
    pub fn forget_tokens(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Returns the caller whose token is in the header `authorization`. Fails with `Unauthenticated` without a valid token.
    ///
    /// `client`: the address of the client. If the token is not cached, clients take turns to look theirs up.
    pub async fn authenticate(&self, headers: &HeaderMap, client: Flow) -> Result<Caller> {
        let token = headers.get(AUTHORIZATION).ok_or(Error::Unauthenticated(
            "credentials: missing; expected metadata \"authorization: Bearer <token>\" with a token of AuthService.Login",
        ))?;
        let sha256 = bearer_sha256(token)
            .ok_or(Error::Unauthenticated("authorization: malformed; expected \"Bearer <token>\""))?;
        self.find_caller(sha256, TOKEN_CACHED, client).await
    }

    /// Returns the caller whose token has this SHA-256. Fails with `Unauthenticated` if the token is not valid.
    ///
    /// `age_max`: how long ago the token may have been looked up in the database, up to 5 s. `flow`: whose turn it is, if the
    /// token must be looked up.
    pub async fn find_caller(&self, sha256: [u8; TOKEN_BYTES], age_max: Duration, flow: Flow) -> Result<Caller> {
        let generation = self.generation.load(Ordering::SeqCst);
        let now = Instant::now();
        if let Some(cached) = self.callers.get(&sha256).await
            && cached.generation == generation
            && now.duration_since(cached.looked_up) < age_max
            && cached.valid_until.is_none_or(|end| now < end)
        {
            return Ok(cached.caller);
        }
        // Boxed: it is rare, and would make the future of every request larger, which is moved several times.
        let found = Box::pin(self.lookups.call(flow, sha256)).await?;
        let TokenOwner { token_id, user_id, role, valid_for } = found.ok_or(Error::Unauthenticated(
            "authorization: the token is unknown, expired or revoked, or its user is disabled; sign in again",
        ))?;
        let caller = Caller { user_id, role, token_id };
        // Counted from before the look-up, so that it ends early rather than late. A time beyond the clock has no end.
        let valid_until = valid_for.and_then(|valid_for| now.checked_add(valid_for));
        self.callers.insert(sha256, CachedCaller { caller, looked_up: now, generation, valid_until }).await;
        Ok(caller)
    }
}

/// Returns what looks up tokens, in batches.
fn lookups(db: &Db) -> Lookups {
    let (of_batch, of_one) = (db.clone(), db.clone());
    Coalescer::new(
        LOOKUPS,
        |_| BatchAffinity::Any,
        Box::new(move |wanted| {
            let db = of_batch.clone();
            Box::pin(async move {
                let found = async { tokens::find_owners(&db.conn().await?, &wanted).await };
                // An error fails the whole batch: individual look-ups would take the connections that are left to logins.
                let found = found.await.unwrap_or_else(|error| vec![Err(error); wanted.len()]);
                Ok(found.into_iter().map(Outcome::Done).collect())
            })
        }),
        Box::new(move |_, sha256| {
            let db = of_one.clone();
            Box::pin(async move {
                let found = tokens::find_owners(&db.conn().await?, &[sha256]).await?.pop();
                found.ok_or(Error::Internal("a token was not looked up"))?
            })
        }),
    )
}

/// Hashes a password with bcrypt. `cost`: as for [`Auth::new`].
pub fn hash_password(password: &SecretString, cost: u32) -> Result<SecretString, bcrypt::BcryptError> {
    bcrypt::hash(password.expose_secret(), cost).map(SecretString::from)
}

/// Returns a new random token and its SHA-256, which is stored instead of the token.
pub fn new_token() -> anyhow::Result<(String, [u8; 32])> {
    let mut bytes = [0; TOKEN_BYTES];
    getrandom::fill(&mut bytes)?;
    Ok((format!("{TOKEN_PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes)), sha256(&[&bytes])))
}

/// Returns the SHA-256 of the token in `Bearer <token>`, or `None` if the value is malformed.
pub fn bearer_sha256(authorization: &HeaderValue) -> Option<[u8; 32]> {
    let (scheme, token) = authorization.to_str().ok()?.split_once(' ')?;
    if scheme.eq_ignore_ascii_case("bearer") { token_sha256(token.trim()) } else { None }
}

/// Returns the SHA-256 of a token, or `None` if the text is not a token of this service.
pub fn token_sha256(token: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; TOKEN_BYTES];
    let encoded = token.strip_prefix(TOKEN_PREFIX)?;
    match BASE64_URL_SAFE_NO_PAD.decode_slice(encoded, &mut bytes) {
        Ok(TOKEN_BYTES) => Some(sha256(&[&bytes])),
        _ => None,
    }
}

/// Checks the length and the characters of a new password. The error says what is wrong and what is expected.
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
