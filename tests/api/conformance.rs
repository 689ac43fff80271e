//! HTTP/2 and gRPC protocol violations. Each ends in a gRPC status or a closed connection, does not affect other calls,
//! and leaves no connection, permit or panic behind.

mod connections;
mod evictions;
mod floods;
mod headers;
mod http2;
mod messages;
mod unauthenticated;

use std::{
    collections::HashSet,
    fs,
    ops::Deref,
    sync::{
        Once,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use issue_tracker::pb::WhoAmIRequest;
use tokio::time::timeout;
use tonic::Code;

use crate::{
    harness::{Tracker, limits},
    support::{bounds::HANG, eventually::eventually},
};

const WHO_AM_I: &str = "/issuetracker.v1.AuthService/WhoAmI";
/// Time allowed for what must happen without delay. Shorter than the keep-alive timeout, which would also close the
/// connection.
const SOON: Duration = Duration::from_secs(20);

/// The number of panics in the service's code. Failed assertions of tests do not count.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let default_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let of_test = info.location().is_some_and(|at| at.file().starts_with("tests/"));
            PANICS.fetch_add(usize::from(!of_test), Ordering::SeqCst);
            default_hook(info);
        }));
    });
}

/// A service that admits one request at a time, so that a leaked permit blocks the next call.
struct Target {
    tracker: Tracker,
}

impl Deref for Target {
    type Target = Tracker;

    fn deref(&self) -> &Tracker {
        &self.tracker
    }
}

impl Target {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(args: &[&str]) -> Self {
        count_panics();
        let target = Self { tracker: Tracker::start_with(limits(&[&["--requests", "1"], args].concat())).await };
        target.assert_serving().await;
        target
    }

    /// Asserts that a valid call on another connection succeeds as soon as the calls in flight have ended.
    async fn assert_serving(&self) {
        eventually("a valid call succeeds", async || {
            let response = timeout(HANG, self.member.auth().who_am_i(WhoAmIRequest {})).await;
            match response.expect("a valid call hangs") {
                Ok(_) => true,
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    false
                }
            }
        })
        .await;
    }

    /// Returns the open connections of the service.
    fn connections(&self) -> HashSet<String> {
        open_connections(self.address.rsplit_once(':').unwrap().1.parse().unwrap())
    }

    /// Asserts that the service serves calls, has not panicked, and has at most the test client's connection left.
    async fn assert_unharmed(&self) {
        self.assert_serving().await;
        // Consecutive calls are never refused: each returns its permit.
        for _ in 0..5 {
            self.member.auth().who_am_i(WhoAmIRequest {}).await.unwrap();
        }
        eventually("the connections are gone", async || self.connections().len() <= 1).await;
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "the service has panicked");
    }
}

/// Returns the open sockets that this process accepted on a port, by inode.
fn open_connections(port: u16) -> HashSet<String> {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let open: HashSet<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let sockets = fs::read_to_string("/proc/self/net/tcp").unwrap();
    let local = format!(":{port:04X}");
    let accepted = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // State 0A is the listener.
        let is_accepted = fields[1].ends_with(&local) && fields[3] != "0A" && open.contains(fields[9]);
        is_accepted.then(|| fields[9].to_owned())
    };
    sockets.lines().skip(1).filter_map(accepted).collect()
}
