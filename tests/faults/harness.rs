//! How much is tried, and calls that are answered in time or tried again.

use std::time::Duration;

use tokio_postgres::Config;
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::{bounds::HANG, codec::unary, database::session, service::Service};

/// The deadline of a call, and how long a client waits beyond it before it gives up on the connection.
const DEADLINE: Duration = Duration::from_secs(15);
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// How much is tried, and with which numbers.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub long: bool,
    pub seed: u64,
}

impl Form {
    /// As `ISSUE_TRACKER_FAULTS` says it: `short` (the default) or `long`, with `:SEED` behind it to repeat a run.
    pub fn of_environment() -> Self {
        let text = std::env::var("ISSUE_TRACKER_FAULTS").unwrap_or_else(|_| "short".to_owned());
        let (form, seed) = text.split_once(':').map_or((&*text, None), |(form, seed)| (form, Some(seed)));
        assert!(["short", "long"].contains(&form), "ISSUE_TRACKER_FAULTS is {text:?}, not short or long");
        let seed = seed.map_or_else(|| fastrand::u64(..u64::from(u32::MAX)), |seed| seed.parse().unwrap());
        let form = Self { long: form == "long", seed };
        println!("{form:?}");
        form
    }

    pub fn pick<T>(self, short: T, long: T) -> T {
        if self.long { long } else { short }
    }

    pub fn rng(self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed)
    }
}

impl Service {
    /// Nothing has gone wrong in it that it did not foresee.
    pub fn assert_sound(&self) {
        let log = self.log();
        for word in ["panicked", "internal error", "database error"] {
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(word)).collect();
            assert!(lines.is_empty(), "{lines:#?}");
        }
    }
}

/// Whether the service says that it serves. It always says something.
pub async fn serves(channel: &Channel) -> bool {
    let mut health = HealthClient::new(channel.clone());
    let checked = tokio::time::timeout(HANG, health.check(HealthCheckRequest::default()))
        .await
        .expect("health does not answer")
        .unwrap();
    checked.into_inner().status() == ServingStatus::Serving
}

/// Refused with this, and told when to try again.
#[track_caller]
pub fn assert_retriable(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(status.get_details_error_info().map(|info| info.reason).as_deref(), Some(reason), "{status:?}");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller {
    pub id: Uuid,
    pub token: String,
}

/// Members with a token each, made past the service.
pub async fn callers(config: &Config, count: usize) -> Vec<Caller> {
    const SQL: &str = "WITH made AS (
            INSERT INTO users (id, username, password_hash, role) VALUES ($1, $2, '', 2) RETURNING id
        )
        INSERT INTO tokens (id, user_id, sha256, name) SELECT gen_random_uuid(), id, $3, 'faults' FROM made";
    let database = session(config).await;
    let mut callers = Vec::new();
    for nth in 0..count {
        let (token, sha256) = issue_tracker::auth::new_token().unwrap();
        let id = Uuid::now_v7();
        let username = format!("caller-{nth}-{}", &id.simple().to_string()[24..]);
        database.execute(SQL, &[&id, &username, &&sha256[..]]).await.unwrap();
        callers.push(Caller { id, token });
    }
    callers
}

/// Calls `Service/Method` with a message, and answers its bytes.
pub async fn call(channel: &Channel, token: &str, method: &str, message: &[u8]) -> Result<Vec<u8>, Status> {
    call_within(channel, token, method, message, DEADLINE).await
}

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
    let answer = tokio::time::timeout(deadline + DEADLINE_GRACE, unary(channel, &path, request)).await;
    let answer = answer.unwrap_or_else(|_| panic!("{method} is not answered long after its deadline"));
    Ok(answer?.to_vec())
}
