//! Replaces the replicas of the previous version with those of this one, under load and on one database.
//!
//! `ISSUE_TRACKER_PREVIOUS_BINARY` is the program of the previous version. Without it, this version replaces itself, which
//! tests the replacement but no difference between versions.

use std::{path::PathBuf, time::Instant};

use issue_tracker::postgres::Durability;
use tokio::{sync::watch, task::block_in_place};

use crate::{
    harness::Settings,
    load::Load,
    support::{
        external::External,
        service::{Service, finished, program, program_at},
    },
    verify::verify,
};

const CLIENTS: usize = 12;
const REPLICAS: usize = 2;
/// Mutations that are acknowledged in each phase.
const PHASE: u64 = 40;

/// Which process applies the migrations of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MigratedBy {
    /// `issue-tracker migrate`, while only the previous version serves.
    Command,
    /// The first replica of this version, when it starts.
    Replica,
}

fn previous_binary() -> PathBuf {
    std::env::var_os("ISSUE_TRACKER_PREVIOUS_BINARY")
        .map_or_else(|| env!("CARGO_BIN_EXE_issue-tracker").into(), PathBuf::from)
}

/// Replaces the replicas in this order: each new one serves before the old one is stopped. Clients must see no error that is
/// not retriable, and each acknowledged write must be stored once.
async fn assert_replaceable(order: [usize; REPLICAS], migrated_by: MigratedBy) {
    let mut rng = Settings::from_environment().rng();
    let external = External::start(Durability::Throwaway);
    let (previous, url) = (previous_binary(), external.url());
    let mut replicas: Vec<Service> = (0..REPLICAS)
        .map(|_| Service::start(&external.dir, program_at(&previous, &["--database-url", &url])))
        .collect();
    let addresses: Vec<_> = replicas.iter().map(|replica| watch::Sender::new(replica.address.clone())).collect();
    let receivers = addresses.iter().map(watch::Sender::subscribe).collect();
    let load = Load::start_on_replicas(&external.config(), receivers, CLIENTS, &mut rng).await;
    load.wait_for_acknowledged(PHASE).await;

    if migrated_by == MigratedBy::Command {
        let migrate = program(&["migrate", "--database-url", &url]).spawn().unwrap();
        let migrated = block_in_place(|| finished(migrate));
        assert!(migrated.status.success(), "{migrated:?}");
        load.wait_for_acknowledged(PHASE).await;
    }
    for nth in order {
        let new = block_in_place(|| Service::start(&external.dir, program(&["--database-url", &url])));
        addresses[nth].send_replace(new.address.clone());
        let mut old = std::mem::replace(&mut replicas[nth], new);
        assert_eq!(block_in_place(|| old.stop()).code(), Some(0));
        // After the first one, both versions serve.
        load.wait_for_acknowledged_since(Instant::now()).await;
        load.wait_for_acknowledged(PHASE).await;
    }

    let mutations = load.finish().await;
    println!("{order:?}, migrated by {migrated_by:?}: {} mutations", mutations.len());
    verify(&external.config(), &replicas[0].channel(), mutations).await;
    for replica in &mut replicas {
        assert_eq!(replica.stop().code(), Some(0));
    }
    replicas[0].assert_no_internal_errors();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn previous_version_is_replaced_under_load_after_the_migration() {
    assert_replaceable([0, 1], MigratedBy::Command).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn previous_version_is_replaced_under_load_by_replicas_that_migrate() {
    assert_replaceable([1, 0], MigratedBy::Replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn previous_version_accepts_the_schema_of_this_one_or_refuses_it_as_newer() {
    let external = External::start(Durability::Throwaway);
    let url = external.url();
    let migrated = finished(program(&["migrate", "--database-url", &url]).spawn().unwrap());
    assert!(migrated.status.success(), "{migrated:?}");

    let previous = finished(program_at(&previous_binary(), &["migrate", "--database-url", &url]).spawn().unwrap());

    let error = String::from_utf8_lossy(&previous.stderr);
    assert!(previous.status.success() || error.contains("newer than this program"), "{previous:?}");
}
