//! Deletes a backlog of expired responses while clients write.
//!
//! The long run measures how fast: the responses of five minutes at 5,000 mutations/s must be deleted in less than five minutes,
//! after which the service looks for more.
//!
//! ```sh
//! ISSUE_TRACKER_FAULTS=long cargo test --release --test faults pruning -- --nocapture
//! ```

use std::time::Instant;

use issue_tracker::postgres::Durability;
use tokio::{sync::watch, task::block_in_place};

use crate::{
    harness::Settings,
    load::Load,
    support::{
        database::session,
        eventually::eventually,
        external::External,
        service::{Service, finished, program},
    },
    verify::verify,
};

/// A mutation rate that the service must be able to sustain for days.
const MUTATIONS_PER_S: i64 = 5_000;
const PRUNE_INTERVAL_S: i64 = 300;
const RECENT: i64 = 1_000;

/// Stored responses whose age is from `hours` to an hour more.
const STORE: &str = "INSERT INTO requests (caller_id, request_id, fingerprint, reply, create_time)
    SELECT gen_random_uuid(), gen_random_uuid(), sha256('x'), convert_to(repeat('x', 200), 'UTF8'),
        now() - make_interval(hours => $1, secs => 3600.0 * nth / $2::int8)
    FROM generate_series(1, $2::int8) AS nth";
const EXPIRED: &str = "SELECT count(*) FROM requests WHERE create_time < now() - interval '24 hours'";
const OLD: &str = "SELECT count(*) FROM requests WHERE create_time < now() - interval '20 hours'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_responses_are_deleted_while_clients_write() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    let (expired, clients) = settings.pick((50_000, 12), (MUTATIONS_PER_S * PRUNE_INTERVAL_S, 64));
    let external = External::start(Durability::Durable);
    let migrate = program(&["migrate", "--database-url", &external.url()]).spawn().unwrap();
    assert!(block_in_place(|| finished(migrate)).status.success());
    let admin = session(&external.config()).await;
    for (hours, count) in [(22, RECENT), (25, expired)] {
        admin.execute(STORE, &[&hours, &count]).await.unwrap();
    }
    admin.batch_execute("VACUUM ANALYZE requests").await.unwrap();

    let began = Instant::now();
    // The service deletes old data when it starts.
    let mut service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
    let addresses = watch::Sender::new(service.address.clone());
    let load = Load::start(&external.config(), addresses.subscribe(), clients, &mut rng).await;
    for tenths in (0..10).rev() {
        let deleted = async || {
            let remaining: i64 = admin.query_one(EXPIRED, &[]).await.unwrap().get(0);
            remaining <= expired * tenths / 10
        };
        eventually("expired responses are deleted", deleted).await;
    }
    let (elapsed_s, mutations) = (began.elapsed().as_secs_f64(), load.acknowledged());
    println!(
        "{expired} expired responses deleted in {elapsed_s:.1} s: {:.0}/s, beside {:.0} mutations/s",
        expired as f64 / elapsed_s,
        mutations as f64 / elapsed_s
    );
    load.wait_for_acknowledged(10).await;
    let mutations = load.finish().await;

    assert_eq!(admin.query_one(OLD, &[]).await.unwrap().get::<_, i64>(0), RECENT);
    // The clients know nothing of these.
    admin.execute("DELETE FROM requests WHERE create_time < now() - interval '20 hours'", &[]).await.unwrap();
    verify(&external.config(), &service.channel(), mutations).await;
    assert_eq!(service.stop().code(), Some(0));
    service.assert_no_internal_errors();
}
