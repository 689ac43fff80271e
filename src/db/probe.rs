//! Probes whether the database answers and whether it accepts writes.
//!
//! The probe has a connection of its own, so that a busy pool does not look like an unavailable database.

use std::time::{Duration, Instant};

use tokio::{sync::watch, time::timeout};
use tokio_postgres::{Client, Error};

use super::{
    availability::{Availability, Health},
    manager::{Manager, repeat_if_closed},
};

/// The interval of probes and the time allowed for one. Together less than two seconds: health is not outdated for longer.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
const PROBE_TIMEOUT: Duration = Duration::from_millis(1_200);
/// How long a database must respond after an outage before it counts as healthy.
const PROBE_STEADY: Duration = Duration::from_millis(200);
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

/// Probes the database until all receivers of `health` are dropped.
pub(super) async fn run(manager: Manager, health: watch::Sender<Health>) {
    let mut probe = Probe { manager, health, client: None, write_probed: None, report_handled: None };
    while !probe.health.is_closed() {
        let reads = probe.probe_reads().await;
        let writes = reads && probe.probe_writes().await;
        let found = Health { reads, writes };
        probe.health.send_if_modified(|was| std::mem::replace(was, found) != found);
        let _ = timeout(PROBE_INTERVAL, probe.availability().probe_requested()).await;
    }
}

struct Probe {
    manager: Manager,
    health: watch::Sender<Health>,
    client: Option<Client>,
    /// When the latest write probe ran.
    write_probed: Option<Instant>,
    /// When a write probe last ran because sessions had failed as read-only.
    report_handled: Option<Instant>,
}

impl Probe {
    fn availability(&self) -> &Availability {
        self.manager.availability()
    }

    /// Returns whether the database answers.
    async fn probe_reads(&mut self) -> bool {
        let was_healthy = self.health.borrow().reads;
        let outcome = timeout(PROBE_TIMEOUT, async {
            if let Some(client) = &self.client
                && client.batch_execute("").await.is_ok()
            {
                return Ok(None);
            }
            // A lost connection does not mean that the database is unavailable.
            let connected = repeat_if_closed(|| async {
                let connected = self.manager.connect_client().await?;
                connected.batch_execute("").await?;
                if !was_healthy {
                    // A server that restarts again at once is not healthy.
                    tokio::time::sleep(PROBE_STEADY).await;
                    connected.batch_execute("").await?;
                }
                Ok(connected)
            });
            Ok::<_, Error>(Some(connected.await?))
        });
        match outcome.await {
            Ok(Ok(connected)) => {
                self.client = connected.or_else(|| self.client.take());
                self.availability().set_up(true);
                return true;
            }
            Ok(Err(error)) => {
                error.as_db_error().inspect(|error| self.manager.log_refusal(error));
                self.availability().set_up(false);
            }
            // The server hangs or is overloaded. Calls that wait for it may still succeed.
            Err(_) if was_healthy => tracing::warn!("database probe timed out"),
            Err(_) => {}
        }
        self.client = None;
        false
    }

    /// Returns whether the database accepts writes. Inserts a row and rolls it back every 5 s, every second while that
    /// fails, and at once if a session has failed as read-only.
    async fn probe_writes(&mut self) -> bool {
        let was_writable = self.availability().is_writable();
        let is_past = |since: Option<Instant>, interval| since.is_none_or(|since| since.elapsed() >= interval);
        let is_reported =
            self.availability().has_read_only_report() && is_past(self.report_handled, WRITE_PROBE_RETRY_INTERVAL);
        let interval = if was_writable { WRITE_PROBE_INTERVAL } else { WRITE_PROBE_RETRY_INTERVAL };
        if !is_reported && !is_past(self.write_probed, interval) {
            return was_writable;
        }
        // Sessions that fail from here on report it again.
        self.availability().clear_read_only_report();
        let now = Some(Instant::now());
        self.write_probed = now;
        if is_reported {
            self.report_handled = now;
        }
        // Settings of a session and the server behind a name are those of the time when it connected: only a new connection
        // shows whether new ones can write.
        let needs_new = is_reported || !was_writable;
        let error = match timeout(PROBE_TIMEOUT, self.insert(needs_new)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.code().map_or("none", |code| code.code()).to_owned()),
            Err(_) => Some("timeout".to_owned()),
        };
        self.availability().set_writable(error.is_none());
        match (was_writable, &error) {
            (true, Some(cause)) => tracing::warn!(cause, "writes became unavailable"),
            (false, None) => tracing::info!("writes became available"),
            _ => {}
        }
        if needs_new && error.is_none() {
            self.availability().retire_sessions();
        }
        error.is_none()
    }

    /// Inserts a row and rolls it back, on a new connection if `needs_new` or if that fails on the connection of the probe.
    async fn insert(&mut self, needs_new: bool) -> Result<(), Error> {
        if !needs_new
            && let Some(client) = &self.client
            && client.batch_execute(WRITE_PROBE).await.is_ok()
        {
            return Ok(());
        }
        let connected = repeat_if_closed(|| self.manager.connect_client()).await?;
        connected.batch_execute(WRITE_PROBE).await?;
        self.client = Some(connected);
        Ok(())
    }
}
