//! Injects faults into the running binary: crashes and suspensions of the service, its replicas and its database, lost
//! connections, no free connections, a read-only database, a full disk, clock jumps, upgrades, and a destroyed database that
//! is restored from a backup. Then compares the rows in the database with the responses that the callers received. Faults
//! that need root are in `tests/vanished_replica.sh` and `tests/lost_packets.sh`.
//!
//! `cargo test --test faults` is the short run. The long run prints every figure that it measures:
//!
//! ```sh
//! ISSUE_TRACKER_FAULTS=long cargo test --release --test faults -- --nocapture
//! ```
//!
//! Random choices come from a seed, which each test prints. `ISSUE_TRACKER_FAULTS=short:17` or `long:17` repeats a run.

#[path = "faults/backups.rs"]
mod backups;
#[path = "faults/client_kills.rs"]
mod client_kills;
#[path = "faults/clock_jumps.rs"]
mod clock_jumps;
#[path = "faults/connection_exhaustion.rs"]
mod connection_exhaustion;
#[path = "faults/connection_loss.rs"]
mod connection_loss;
#[path = "faults/crashes.rs"]
mod crashes;
#[path = "faults/disk_full.rs"]
mod disk_full;
#[path = "faults/first_start.rs"]
mod first_start;
#[path = "faults/harness.rs"]
mod harness;
#[path = "faults/health.rs"]
mod health;
#[path = "faults/import_kills.rs"]
mod import_kills;
#[path = "faults/load.rs"]
mod load;
#[path = "faults/postgres_proxy.rs"]
mod postgres_proxy;
#[path = "faults/pruning.rs"]
mod pruning;
#[path = "faults/replay.rs"]
mod replay;
#[path = "faults/replicas.rs"]
mod replicas;
#[path = "faults/shim.rs"]
mod shim;
#[path = "faults/silence.rs"]
mod silence;
#[path = "support"]
mod support {
    pub mod bounds;
    pub mod codec;
    pub mod database;
    pub mod eventually;
    pub mod external;
    pub mod ports;
    pub mod process;
    pub mod scratch;
    pub mod service;
}
#[path = "faults/suspension.rs"]
mod suspension;
#[path = "faults/upgrades.rs"]
mod upgrades;
#[path = "faults/verify.rs"]
mod verify;
#[path = "faults/without_request_ids.rs"]
mod without_request_ids;
