//! Probes whether the database responds and whether it accepts writes.
//!
//! The probes have connections of their own, so that a busy pool does not look like an unavailable database.

use std::{
    mem,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, time::timeout};
use tokio_postgres::{Error, error::SqlState};

use super::{
    availability::{Availability, Health},
    dedicated_client::DedicatedClient,
    manager::{Manager, repeat_if_closed},
};
use crate::error::refusals::{cause, count_refused_connection};

/// The interval of probes and the time allowed for one. Together less than two seconds: health is not outdated for longer.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_200);
/// How long a database must respond after an outage before it counts as healthy.
const PROBE_STEADY: Duration = Duration::from_millis(200);
/// How long neither probes nor calls receive a response before the calls are ended.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// The interval of write probes while they succeed.
const WRITE_PROBE_INTERVAL: Duration = Duration::from_secs(5);
/// The interval of write probes while they fail, or while sessions fail as read-only.
const WRITE_PROBE_RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// A row that is rolled back. The table has no foreign key, and the role that serves may insert into it.
const WRITE_PROBE: &str = "-- write_probe
    BEGIN;
    SET LOCAL lock_timeout = '1s';
    INSERT INTO requests (caller_id, request_id, fingerprint)
        VALUES (gen_random_uuid(), gen_random_uuid(), decode(repeat('00', 32), 'hex'));
    ROLLBACK";

/// The backends of suspect sessions that wait for a response and are not working on one: they are idle, or wait for data of
/// COPY. Without `track_activities`, only the latter shows. Of the backends of another server, nothing is known.
const IDLE_BACKENDS: &str = "-- idle_backends
    SELECT pid FROM unnest($1::int4[], $2::timestamptz[]) AS suspect (pid, server_start_time)
    WHERE server_start_time = pg_postmaster_start_time() AND NOT EXISTS (
        SELECT FROM pg_stat_activity activity
        WHERE activity.pid = suspect.pid AND state NOT LIKE 'idle%' AND wait_event IS DISTINCT FROM 'ClientRead')";

/// Probes the database until all receivers of `health` are dropped.
pub(super) async fn run(manager: Manager, health: watch::Sender<Health>) {
    let responds = AtomicBool::new(health.borrow().reads);
    let publish = || {
        let availability = manager.availability();
        let reads = responds.load(Ordering::Relaxed) && availability.is_prepared();
        let found = Health { reads, writes: reads && availability.is_writable() };
        health.send_if_modified(|was| std::mem::replace(was, found) != found);
    };
    let reads = async {
        let mut probe = ReadProbe { manager: &manager, responds: true, client: None, silence: None };
        while !health.is_closed() {
            responds.store(probe.probe().await, Ordering::Relaxed);
            publish();
            let _ = timeout(PROBE_INTERVAL, manager.availability().probe_requested()).await;
        }
    };
    let writes = async {
        let mut probe =
            WriteProbe { manager: &manager, client: None, probed: None, report_handled: None, must_retire: false };
        while !health.is_closed() {
            if responds.load(Ordering::Relaxed) && manager.availability().is_prepared() {
                probe.probe().await;
                publish();
            }
            let _ = timeout(PROBE_INTERVAL, manager.availability().write_probe_requested()).await;
        }
    };
    tokio::join!(reads, writes);
}

/// Probes whether the database responds.
struct ReadProbe<'a> {
    manager: &'a Manager,
    /// Whether the latest probe succeeded.
    responds: bool,
    client: Option<DedicatedClient>,
    silence: Option<Silence>,
}

/// Since when probes have received no response.
struct Silence {
    since: Instant,
    /// The responses that sessions have received, as counted when it was last seen to change.
    responses: u64,
}

impl ReadProbe<'_> {
    fn availability(&self) -> &Availability {
        self.manager.availability()
    }

    /// Returns whether the database responds.
    async fn probe(&mut self) -> bool {
        let outcome = timeout(PROBE_TIMEOUT, self.execute()).await;
        self.responds = matches!(outcome, Ok(Ok(())));
        match outcome {
            Ok(Ok(())) => self.availability().set_up(true),
            Ok(Err(error)) => {
                count_refused_connection(&error);
                self.availability().set_up(false);
            }
            // The server hangs or is overloaded. Calls that wait for it may still succeed.
            Err(_) => self.check_silence(),
        }
        if self.responds {
            self.silence = None;
        } else {
            self.client = None;
        }
        self.responds
    }

    /// Executes an empty statement, on a new connection if that of the probe is lost.
    async fn execute(&mut self) -> Result<(), Error> {
        if let Some(client) = &mut self.client
            && client.execute("").await.is_ok()
        {
            return self.end_idle_suspects().await;
        }
        // A lost connection does not mean that the database is unavailable. It may mean that other connections are lost.
        self.availability().suspect_sessions();
        let (manager, was_healthy) = (self.manager, self.responds);
        let connected = repeat_if_closed(|| async {
            let mut connected = manager.connect_dedicated().await?;
            connected.execute("").await?;
            if !was_healthy {
                // A server that soon restarts again is not healthy.
                tokio::time::sleep(PROBE_STEADY).await;
                connected.execute("").await?;
            }
            Ok(connected)
        });
        self.client = Some(connected.await?);
        Ok(())
    }

    /// Closes suspect sessions that wait for a response which their backends are not working on: the request or the
    /// response is lost, although the connection is open.
    async fn end_idle_suspects(&mut self) -> Result<(), Error> {
        let suspects = self.availability().waiting_suspects();
        if let Some(client) = &mut self.client
            && !suspects.is_empty()
        {
            let pids: Vec<i32> = suspects.iter().map(|suspect| suspect.pid).collect();
            let servers: Vec<SystemTime> = suspects.iter().map(|suspect| suspect.server_start_time).collect();
            let rows = client.query(IDLE_BACKENDS, &[&pids, &servers]).await?;
            let idle: Vec<i32> = rows.iter().map(|row| row.get("pid")).collect();
            for suspect in suspects.iter().filter(|suspect| idle.contains(&suspect.pid)) {
                suspect.close();
                tracing::warn!(backend.pid = suspect.pid, "silent database connection was closed");
            }
        }
        Ok(())
    }

    /// Ends the calls that wait for the database if it has been silent for too long.
    fn check_silence(&mut self) {
        let responses = self.availability().response_count();
        match &mut self.silence {
            Some(silence) if silence.responses == responses => {
                if silence.since.elapsed() >= SILENCE_MAX {
                    self.availability().set_up(false);
                    self.availability().close_waiting_sessions();
                }
            }
            silence => {
                if silence.is_none() {
                    tracing::warn!("database probe timed out");
                }
                // The probe has waited already.
                *silence = Some(Silence { since: Instant::now() - PROBE_TIMEOUT, responses });
            }
        }
    }
}

/// Probes whether the database accepts writes.
struct WriteProbe<'a> {
    manager: &'a Manager,
    client: Option<DedicatedClient>,
    /// When the latest probe ran.
    probed: Option<Instant>,
    /// When a probe last ran because sessions had failed as read-only.
    report_handled: Option<Instant>,
    /// Whether sessions that exist may be unable to write after new ones can: they are retired then.
    must_retire: bool,
}

impl WriteProbe<'_> {
    /// Inserts a row and rolls it back if the latest probe was 5 s ago, or 1 s if it failed, or if a session has failed as
    /// read-only since.
    async fn probe(&mut self) {
        let availability = self.manager.availability();
        let was_writable = availability.is_writable();
        let is_past = |since: Option<Instant>, interval| since.is_none_or(|since| since.elapsed() >= interval);
        let is_reported =
            availability.has_read_only_report() && is_past(self.report_handled, WRITE_PROBE_RETRY_INTERVAL);
        let interval = if was_writable { WRITE_PROBE_INTERVAL } else { WRITE_PROBE_RETRY_INTERVAL };
        if !is_reported && !is_past(self.probed, interval) {
            return;
        }
        // Sessions that fail from here on report it again.
        availability.clear_read_only_report();
        self.probed = Some(Instant::now());
        if is_reported {
            self.report_handled = self.probed;
        }
        // Settings of a session and the server behind a name are those of the time when it connected: only a new connection
        // shows whether new ones can write.
        let needs_new = is_reported || !was_writable;
        self.must_retire |= is_reported;
        let failure = match timeout(PROBE_TIMEOUT, self.insert(needs_new)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => {
                self.must_retire |= may_outlast(&error);
                Some(cause(&error))
            }
            Err(_) => Some("timeout".to_owned()),
        };
        availability.set_writable(failure.is_none());
        match &failure {
            Some(cause) if was_writable => tracing::warn!(cause, "writes became unavailable"),
            None if !was_writable => tracing::info!("writes became available"),
            _ => {}
        }
        if failure.is_some() {
            self.client = None;
        } else if mem::take(&mut self.must_retire) {
            availability.retire_sessions();
        }
    }

    /// Inserts a row and rolls it back, on a new connection if `needs_new` or if that fails on the connection of the probe.
    async fn insert(&mut self, needs_new: bool) -> Result<(), Error> {
        if !needs_new
            && let Some(client) = &mut self.client
            && client.execute(WRITE_PROBE).await.is_ok()
        {
            return Ok(());
        }
        let mut connected = repeat_if_closed(|| self.manager.connect_dedicated()).await?;
        connected.execute(WRITE_PROBE).await?;
        self.client = Some(connected);
        Ok(())
    }
}

/// Returns whether sessions may still fail in this way after new ones can write: they are read-only, or connected to a server
/// that has been replaced. A server that is slow, or a table that is locked, is so for all sessions.
fn may_outlast(failure: &Error) -> bool {
    failure.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION) || failure.as_db_error().is_none()
}
