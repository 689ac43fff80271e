//! The limits of the service.

use std::time::Duration;

use clap::{Args, value_parser};

use super::{effective::Derived, user::BcryptCost};
use crate::{
    auth::throttle::FreeFailures,
    db::{PoolOptions, StorageLimits},
    fairness::SharePercent,
    middleware::{RequestLimits, buffering::MESSAGE_MEMORY_KIB},
    rpc::StreamLimits,
    transport::{client_address::TrustedProxies, connection::ConnectionLimits},
};

/// The size of metadata that is decoded, as a multiple of the allowed size: up to it the service refuses the call with a
/// gRPC status. Beyond it, HTTP/2 responds with the HTTP status 431.
const DECODED_HEADERS_MULTIPLE: u32 = 8;

/// The memory of a call beside its request.
const LARGEST_RESPONSE_KIB: u32 = 4 * 1024;

// Defaults of flags that constrain each other. A default gives way to the values that are set.
const POOL_CONNECTIONS: u32 = 20;
const POOL_CONNECTIONS_MAX: u32 = 1_000;
const IMPORTS: u32 = 10;
const EXPORTS: u32 = 4;
/// Connections that the default of `--pool-connections` leaves to calls that are no imports and exports.
const OTHER_CONNECTIONS: u32 = POOL_CONNECTIONS - IMPORTS - EXPORTS;
const AGE_GRACE_SECONDS: u64 = 3_600;
const IMPORT_ERROR_DAYS: i32 = 30;

#[derive(Clone, Debug, Args)]
pub struct Limits {
    /// Maximum connections to the database [default: 20, more with many --imports or --exports]
    #[arg(long, env = "ISSUE_TRACKER_POOL_CONNECTIONS", value_name = "N",
        value_parser = value_parser!(u32).range(3..=i64::from(POOL_CONNECTIONS_MAX)), help_heading = "Database")]
    pool_connections: Option<u32>,
    /// Maximum time a call waits for a database connection, in milliseconds
    #[arg(long, env = "ISSUE_TRACKER_POOL_WAIT_MS", default_value_t = 2_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=60_000), help_heading = "Database")]
    pool_wait_ms: u64,
    /// Maximum time of one SQL statement, in milliseconds
    #[arg(long, env = "ISSUE_TRACKER_STATEMENT_MS", default_value_t = 30_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=600_000), help_heading = "Database")]
    statement_ms: u64,

    /// Maximum concurrent requests; excess requests fail with RESOURCE_EXHAUSTED
    #[arg(long, env = "ISSUE_TRACKER_REQUESTS", default_value_t = 1_024, value_name = "N",
        value_parser = value_parser!(u32).range(1..=100_000), help_heading = "Requests")]
    requests: u32,
    /// The part of each limited resource that one user may hold, in percent
    #[arg(long, env = "ISSUE_TRACKER_USER_SHARE_PERCENT", default_value_t = 75, value_name = "PERCENT",
        value_parser = value_parser!(u32).range(10..=100), help_heading = "Requests")]
    user_share_percent: u32,
    /// Deadline of unary calls whose client sets none, in milliseconds
    #[arg(long, env = "ISSUE_TRACKER_DEADLINE_MS", default_value_t = 30_000, value_name = "MS",
        value_parser = value_parser!(u64).range(1..=600_000), help_heading = "Requests")]
    deadline_ms: u64,
    /// Maximum size of a request message, after decompression
    #[arg(long, env = "ISSUE_TRACKER_MESSAGE_BYTES", default_value_t = 4_194_304, value_name = "BYTES",
        value_parser = value_parser!(u32).range(2_097_152..=67_108_864), help_heading = "Requests")]
    message_bytes: u32,
    /// Maximum size of a call's metadata
    #[arg(long, env = "ISSUE_TRACKER_HEADER_BYTES", default_value_t = 16_384, value_name = "BYTES",
        value_parser = value_parser!(u32).range(4_096..=1_048_576), help_heading = "Requests")]
    header_bytes: u32,
    /// Maximum concurrent ImportIssues and RevertImport calls; each holds a database connection [default: 10, fewer with
    /// few --pool-connections or --requests]
    #[arg(long, env = "ISSUE_TRACKER_IMPORTS", value_name = "N",
        value_parser = value_parser!(u32).range(1..=999), help_heading = "Requests")]
    imports: Option<u32>,
    /// Maximum concurrent ExportIssues calls; each holds a database connection [default: 4, fewer with few
    /// --pool-connections or --requests]
    #[arg(long, env = "ISSUE_TRACKER_EXPORTS", value_name = "N",
        value_parser = value_parser!(u32).range(1..=999), help_heading = "Requests")]
    exports: Option<u32>,
    /// Maximum duration of an import, in seconds; it can be resumed
    #[arg(long, env = "ISSUE_TRACKER_IMPORT_SECONDS", default_value_t = 86_400, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=604_800), help_heading = "Requests")]
    import_seconds: u64,
    /// Maximum duration of an export, in seconds; its database snapshot becomes as old
    #[arg(long, env = "ISSUE_TRACKER_EXPORT_SECONDS", default_value_t = 3_600, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=86_400), help_heading = "Requests")]
    export_seconds: u64,
    /// Time that in-flight requests have to finish at shutdown, in seconds
    #[arg(long, env = "ISSUE_TRACKER_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(0..=3_600), help_heading = "Requests")]
    drain_seconds: u64,

    /// Maximum client connections; at the limit, idle and unauthenticated ones are evicted
    #[arg(long, env = "ISSUE_TRACKER_CONNECTIONS", default_value_t = 4_096, value_name = "N",
        value_parser = value_parser!(u32).range(1..=100_000), help_heading = "Connections")]
    connections: u32,
    /// Maximum concurrent calls of one connection; excess calls wait in the client
    #[arg(long, env = "ISSUE_TRACKER_STREAMS", default_value_t = 256, value_name = "N",
        value_parser = value_parser!(u32).range(2..=10_000), help_heading = "Connections")]
    streams: u32,
    /// Time without a call after which a connection is closed, in seconds
    #[arg(long, env = "ISSUE_TRACKER_IDLE_SECONDS", default_value_t = 300, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=86_400), help_heading = "Connections")]
    idle_seconds: u64,
    /// Maximum age of a connection, in seconds; older ones receive GOAWAY
    #[arg(long, env = "ISSUE_TRACKER_AGE_SECONDS", default_value_t = 3_600, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=604_800), help_heading = "Connections")]
    age_seconds: u64,
    /// Time that a connection's calls have to finish after its maximum age, in seconds [default: 3,600, at least
    /// --export-seconds]
    #[arg(long, env = "ISSUE_TRACKER_AGE_GRACE_SECONDS", value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=604_800), help_heading = "Connections")]
    age_grace_seconds: Option<u64>,
    /// Interval of HTTP/2 pings, and time to acknowledge one, in seconds
    #[arg(long, env = "ISSUE_TRACKER_KEEPALIVE_SECONDS", default_value_t = 30, value_name = "SECONDS",
        value_parser = value_parser!(u64).range(1..=3_600), help_heading = "Connections")]
    keepalive_seconds: u64,
    /// Proxies whose x-forwarded-for is trusted, as addresses and CIDR networks separated by commas
    #[arg(long, env = "ISSUE_TRACKER_TRUSTED_PROXIES", value_name = "NETWORKS", help_heading = "Connections")]
    trusted_proxies: Option<TrustedProxies>,

    /// Hours for which the responses of calls with a request id are stored at least
    #[arg(long, env = "ISSUE_TRACKER_STORED_RESPONSE_HOURS", default_value_t = 24, value_name = "HOURS",
        value_parser = value_parser!(i32).range(24..=8_760), help_heading = "Storage")]
    stored_response_hours: i32,
    /// Maximum bytes of responses over 4 KiB that are stored for the request ids of a user in 24 hours
    #[arg(long, env = "ISSUE_TRACKER_STORED_RESPONSE_BYTES", default_value_t = 268_435_456, value_name = "BYTES",
        value_parser = value_parser!(i64).range(0..=1_099_511_627_776), help_heading = "Storage")]
    stored_response_bytes: i64,
    /// Maximum labels
    #[arg(long, env = "ISSUE_TRACKER_LABELS", default_value_t = 10_000, value_name = "N",
        value_parser = value_parser!(i64).range(1..=1_000_000), help_heading = "Storage")]
    labels: i64,
    /// Maximum row errors of imports that are stored for a user; those of older imports are removed first
    #[arg(long, env = "ISSUE_TRACKER_IMPORT_ERRORS", default_value_t = 50_000, value_name = "N",
        value_parser = value_parser!(i64).range(10_000..=100_000_000), help_heading = "Storage")]
    import_errors: i64,
    /// Days for which the row errors of an import are stored after it has ended [default: 30, at most --import-days]
    #[arg(long, env = "ISSUE_TRACKER_IMPORT_ERROR_DAYS", value_name = "DAYS",
        value_parser = value_parser!(i32).range(1..=3_650), help_heading = "Storage")]
    import_error_days: Option<i32>,
    /// Days for which an import can be read and reverted after it has ended
    #[arg(long, env = "ISSUE_TRACKER_IMPORT_DAYS", default_value_t = 90, value_name = "DAYS",
        value_parser = value_parser!(i32).range(1..=3_650), help_heading = "Storage")]
    import_days: i32,
    /// Days for which audit events are stored
    #[arg(long, env = "ISSUE_TRACKER_AUDIT_DAYS", default_value_t = 400, value_name = "DAYS",
        value_parser = value_parser!(i32).range(400..=36_500), help_heading = "Storage")]
    audit_days: i32,

    #[command(flatten, next_help_heading = "Authentication")]
    pub bcrypt: BcryptCost,
    /// Lifetime of a session, in hours
    #[arg(long, env = "ISSUE_TRACKER_SESSION_HOURS", default_value_t = 12, value_name = "HOURS",
        value_parser = value_parser!(i32).range(1..=8_760), help_heading = "Authentication")]
    pub session_hours: i32,
    /// Wrong passwords for one user from one address before logins are throttled
    #[arg(long, env = "ISSUE_TRACKER_LOGIN_FAILURES", default_value_t = 5, value_name = "N",
        value_parser = value_parser!(u32).range(1..=1_000_000), help_heading = "Authentication")]
    login_failures: u32,
    /// Wrong passwords from one address, for any user, before logins are throttled
    #[arg(long, env = "ISSUE_TRACKER_LOGIN_FAILURES_PER_ADDRESS", default_value_t = 50, value_name = "N",
        value_parser = value_parser!(u32).range(1..=1_000_000), help_heading = "Authentication")]
    login_failures_per_address: u32,
}

impl Limits {
    /// Returns what is impossible about the combination of limits, each with a remedy.
    pub fn problems(&self) -> Vec<String> {
        [self.connections_problem(), self.request_slots_problem(), self.memory_problem(), self.import_errors_problem()]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Imports and exports could hold all database connections.
    fn connections_problem(&self) -> Option<String> {
        let (imports, exports, connections) = (self.imports(), self.exports(), self.pool_connections());
        (imports + exports >= connections).then(|| {
            format!(
                "--imports {imports} and --exports {exports}: together they must be less than --pool-connections \
                 {connections}, as each import and export holds a connection; lower them, or raise --pool-connections"
            )
        })
    }

    /// Imports and exports could hold all request slots.
    fn request_slots_problem(&self) -> Option<String> {
        let (imports, exports) = (self.imports(), self.exports());
        // Without either, the least that is possible is one of each, however few requests there are.
        let is_set = self.imports.is_some() || self.exports.is_some();
        (is_set && imports + exports >= self.requests).then(|| {
            format!(
                "--imports {imports} and --exports {exports}: together they must be less than --requests {}, as each \
                 import and export is a request; lower them, or raise --requests",
                self.requests
            )
        })
    }

    /// One user could not send the largest request and receive its response.
    fn memory_problem(&self) -> Option<String> {
        let memory_kib = self.share().of(MESSAGE_MEMORY_KIB);
        // Compressed and decompressed, and the response that memory is reserved for.
        (memory_kib < 2 * self.message_bytes.div_ceil(1024) + LARGEST_RESPONSE_KIB).then(|| {
            format!(
                "--user-share-percent {}: one user could have {memory_kib} KiB for messages, which must be twice \
                 --message-bytes {} and {LARGEST_RESPONSE_KIB} KiB; raise --user-share-percent, or lower --message-bytes",
                self.user_share_percent, self.message_bytes
            )
        })
    }

    fn import_errors_problem(&self) -> Option<String> {
        let days = self.import_error_days();
        (days > self.import_days).then(|| {
            format!(
                "--import-error-days {days}: must be at most --import-days {}, as an import is removed with its row \
                 errors; lower --import-error-days, or raise --import-days",
                self.import_days
            )
        })
    }

    /// Returns the values of the flags whose defaults follow from other flags.
    pub(super) fn derived(&self) -> Vec<Derived> {
        let derived = |flag, value: u64, default: u64, from| Derived {
            flag,
            value: value.to_string(),
            from: (value != default).then_some(from),
        };
        vec![
            derived(
                "pool-connections",
                self.pool_connections().into(),
                POOL_CONNECTIONS.into(),
                "--imports and --exports",
            ),
            derived("imports", self.imports().into(), IMPORTS.into(), "--pool-connections, --requests and --exports"),
            derived("exports", self.exports().into(), EXPORTS.into(), "--pool-connections, --requests and --imports"),
            derived("age-grace-seconds", self.age_grace_seconds(), AGE_GRACE_SECONDS, "--export-seconds"),
            derived(
                "import-error-days",
                self.import_error_days().unsigned_abs().into(),
                IMPORT_ERROR_DAYS.unsigned_abs().into(),
                "--import-days",
            ),
        ]
    }

    fn pool_connections(&self) -> u32 {
        let streams = self.imports.unwrap_or(IMPORTS) + self.exports.unwrap_or(EXPORTS);
        self.pool_connections.unwrap_or((streams + OTHER_CONNECTIONS).clamp(POOL_CONNECTIONS, POOL_CONNECTIONS_MAX))
    }

    /// Returns how many imports and RevertImports may run concurrently. The default leaves a connection and a request slot to
    /// other calls, if there are three or more of both.
    pub fn imports(&self) -> u32 {
        let total = self.pool_connections().min(self.requests);
        let exports = self.exports.unwrap_or(1);
        let default = IMPORTS.min(total / 2).min(total.saturating_sub(1 + exports)).max(1);
        self.imports.unwrap_or(default)
    }

    /// Returns how many exports may run concurrently. The default is as that of [`Self::imports`].
    pub fn exports(&self) -> u32 {
        let total = self.pool_connections().min(self.requests);
        let default = EXPORTS.min(total / 5).min(total.saturating_sub(1 + self.imports())).max(1);
        self.exports.unwrap_or(default)
    }

    /// Returns how long the calls of a connection may continue after its maximum age. By default as long as any export.
    fn age_grace_seconds(&self) -> u64 {
        self.age_grace_seconds.unwrap_or(AGE_GRACE_SECONDS.max(self.export_seconds))
    }

    fn import_error_days(&self) -> i32 {
        self.import_error_days.unwrap_or(IMPORT_ERROR_DAYS.min(self.import_days))
    }

    pub fn pool(&self) -> PoolOptions {
        PoolOptions {
            connections_max: self.pool_connections(),
            wait_max: Duration::from_millis(self.pool_wait_ms),
            statement_max: Duration::from_millis(self.statement_ms),
            share: self.share(),
        }
    }

    pub fn storage(&self) -> StorageLimits {
        StorageLimits {
            response_hours: self.stored_response_hours,
            response_bytes_per_user_max: self.stored_response_bytes,
            labels_max: self.labels,
            import_errors_per_user_max: self.import_errors,
            import_error_days: self.import_error_days(),
            import_days: self.import_days,
            audit_days: self.audit_days,
        }
    }

    pub fn requests(&self) -> RequestLimits {
        RequestLimits {
            requests_max: self.requests,
            metadata_bytes_max: self.header_bytes as usize,
            message_bytes_max: self.message_bytes as usize,
            share: self.share(),
            deadline_default: Duration::from_millis(self.deadline_ms),
        }
    }

    pub fn connections(&self) -> ConnectionLimits {
        ConnectionLimits {
            connections_max: self.connections as usize,
            idle_max: Duration::from_secs(self.idle_seconds),
            age_max: Duration::from_secs(self.age_seconds),
            age_grace: Duration::from_secs(self.age_grace_seconds()),
            keepalive_interval: Duration::from_secs(self.keepalive_seconds),
            keepalive_timeout: Duration::from_secs(self.keepalive_seconds),
            streams_max: self.streams,
            header_bytes_max: self.header_bytes * DECODED_HEADERS_MULTIPLE,
            trusted_proxies: self.trusted_proxies.clone().unwrap_or_default(),
        }
    }

    /// Returns the part of each limited resource that one user may hold.
    pub fn share(&self) -> SharePercent {
        SharePercent(self.user_share_percent)
    }

    pub fn streams(&self) -> StreamLimits {
        StreamLimits {
            import_duration_max: Duration::from_secs(self.import_seconds),
            export_duration_max: Duration::from_secs(self.export_seconds),
        }
    }

    pub fn free_login_failures(&self) -> FreeFailures {
        FreeFailures { of_pair: self.login_failures, of_address: self.login_failures_per_address }
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}
