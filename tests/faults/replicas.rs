//! Kills replicas that share a database, and single backends of the database, while clients write.

use std::time::{Duration, Instant};

use issue_tracker::postgres::Durability;
use tokio::sync::watch;

use crate::{
    harness::Settings,
    load::Load,
    support::{
        database::session,
        external::External,
        process::signal,
        service::{Service, program},
    },
    verify::verify,
};

const CLIENTS: usize = 12;

/// A replica, and its address for the clients.
struct Replica {
    service: Service,
    address: watch::Sender<String>,
}

impl Replica {
    fn start(external: &External) -> Self {
        let service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
        let address = watch::Sender::new(service.address.clone());
        Self { service, address }
    }

    /// Kills the replica, and starts it again on another port.
    fn restart(&mut self, external: &External, down: Duration) {
        self.service.kill();
        std::thread::sleep(down);
        self.service = Service::start(&external.dir, program(&["--database-url", &external.url()]));
        self.address.send_replace(self.service.address.clone());
    }
}

/// Returns the process ids of the sessions of the service.
async fn backends(external: &External) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE application_name = 'issue-tracker'";
    session(&external.config()).await.query(sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Ends a session as an administrator does. Its backend rolls back.
async fn terminate(external: &External, pid: i32) {
    session(&external.config()).await.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_are_stored_once_while_replicas_and_single_backends_are_killed() {
    let settings = Settings::from_environment();
    let mut rng = settings.rng();
    // A killed backend makes PostgreSQL restart all others and recover from its log.
    let external = External::start(Durability::Durable);
    let mut replicas: Vec<Replica> = (0..settings.pick(2, 3)).map(|_| Replica::start(&external)).collect();
    let addresses = replicas.iter().map(|replica| replica.address.subscribe()).collect();
    let load = Load::start_on_replicas(&external.config(), addresses, CLIENTS, &mut rng).await;
    let (mut killed, mut terminated, mut crashed) = (0, 0, 0);
    for nth in 0..settings.pick(8, 150) {
        load.wait_for_acknowledged(rng.u64(5..40)).await;
        let pids = backends(&external).await;
        match nth % 4 {
            0 => {
                let nth = rng.usize(..replicas.len());
                let down = Duration::from_millis(rng.u64(..200));
                tokio::task::block_in_place(|| replicas[nth].restart(&external, down));
                killed += 1;
            }
            1 if nth % 8 == 1 => {
                crashed += usize::from(rng.choice(&pids).is_some_and(|pid| signal(*pid as u32, libc::SIGKILL)));
            }
            _ => {
                for pid in rng.choose_multiple(pids, 1 + nth % 3) {
                    terminate(&external, pid).await;
                    terminated += 1;
                }
            }
        }
    }
    load.wait_for_acknowledged_since(Instant::now()).await;
    let mutations = load.finish().await;
    println!(
        "{} mutations, {killed} replicas killed, {terminated} backends terminated, {crashed} crashed",
        mutations.len()
    );
    assert!(killed > 0 && terminated > 0 && crashed > 0);
    verify(&external.config(), &replicas[0].service.channel(), mutations).await;
    for replica in &mut replicas {
        assert_eq!(replica.service.stop().code(), Some(0));
    }
    replicas[0].service.assert_no_internal_errors();
}
