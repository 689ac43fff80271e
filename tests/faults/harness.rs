//! Settings of a run, and calls with deadlines.

use std::time::Duration;

use tokio_postgres::Config;
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::{bounds::HANG, codec::unary, database::session, service::Service};

/// The deadline of a call.
const DEADLINE: Duration = Duration::from_secs(15);
/// Time after the deadline in which the call must fail.
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// The length of a run, and the seed of its random choices.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub long: bool,
    pub seed: u64,
}

impl Settings {
    /// Reads `ISSUE_TRACKER_FAULTS`: `short` (the default) or `long`, optionally followed by `:SEED`.
    pub fn from_environment() -> Self {
        let text = std::env::var("ISSUE_TRACKER_FAULTS").unwrap_or_else(|_| "short".to_owned());
        let (settings, seed) = text.split_once(':').map_or((&*text, None), |(settings, seed)| (settings, Some(seed)));
        assert!(["short", "long"].contains(&settings), "ISSUE_TRACKER_FAULTS is {text:?}, not short or long");
        let seed = seed.map_or_else(|| fastrand::u64(..u64::from(u32::MAX)), |seed| seed.parse().unwrap());
        let settings = Self { long: settings == "long", seed };
        println!("{settings:?}");
        settings
    }

    pub fn pick<T>(self, short: T, long: T) -> T {
        if self.long { long } else { short }
    }

    pub fn rng(self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed)
    }
}

impl Service {
    /// Asserts that the log has no panic, no internal error and no unexpected database error.
    pub fn assert_no_internal_errors(&self) {
        let log = self.log();
        for word in ["panicked", "internal error", "database error"] {
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(word)).collect();
            assert!(lines.is_empty(), "{lines:#?}");
        }
    }
}

/// Returns whether the health check reports SERVING. Panics if it does not respond.
pub async fn serves(channel: &Channel) -> bool {
    let mut health = HealthClient::new(channel.clone());
    let checked = tokio::time::timeout(HANG, health.check(HealthCheckRequest::default()))
        .await
        .expect("the health check does not respond")
        .unwrap();
    checked.into_inner().status() == ServingStatus::Serving
}

/// Asserts the code and reason of an error, and that it has a retry delay.
#[track_caller]
pub fn assert_retriable(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(status.get_details_error_info().map(|info| info.reason).as_deref(), Some(reason), "{status:?}");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}

/// A user and a token.
#[derive(Clone, Debug)]
pub struct Caller {
    pub id: Uuid,
    pub token: String,
}

/// Inserts members, each with a token, directly into the database.
pub async fn create_callers(config: &Config, count: usize) -> Vec<Caller> {
    const SQL: &str = "WITH created AS (
            INSERT INTO users (id, username, password_hash, role) VALUES ($1, $2, '', 2) RETURNING id
        )
        INSERT INTO tokens (id, user_id, sha256, name) SELECT gen_random_uuid(), id, $3, 'faults' FROM created";
    let database = session(config).await;
    let mut create_callers = Vec::new();
    for nth in 0..count {
        let (token, sha256) = issue_tracker::auth::new_token().unwrap();
        let id = Uuid::now_v7();
        let username = format!("caller-{nth}-{}", &id.simple().to_string()[24..]);
        database.execute(SQL, &[&id, &username, &&sha256[..]]).await.unwrap();
        create_callers.push(Caller { id, token });
    }
    create_callers
}

/// Calls `Service/Method` with an encoded message, and returns the encoded response.
pub async fn call(channel: &Channel, token: &str, method: &str, message: &[u8]) -> Result<Vec<u8>, Status> {
    call_within(channel, token, method, message, DEADLINE).await
}

/// Calls as [`call`] does, with another deadline.
pub async fn call_within(
    channel: &Channel,
    token: &str,
    method: &str,
    message: &[u8],
    deadline: Duration,
) -> Result<Vec<u8>, Status> {
    let mut request = Request::new(message.to_vec());
    request.set_timeout(deadline);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    let path = format!("/issuetracker.v1.{method}");
    let response = tokio::time::timeout(deadline + DEADLINE_GRACE, unary(channel, &path, request)).await;
    let response =
        response.unwrap_or_else(|_| panic!("{method} has not returned {DEADLINE_GRACE:?} after its deadline"));
    Ok(response?.to_vec())
}
