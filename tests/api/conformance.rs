//! What comes over the wire that no gRPC library would send: it ends in a clean status or a closed connection, others do
//! not notice, and nothing is left of it.

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
/// Far more than what is to happen at once takes, and less than a connection lives whose client answers no pings.
const SOON: Duration = Duration::from_secs(20);

/// Panics of the service, not of tests.
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let of_test = info.location().is_some_and(|at| at.file().starts_with("tests/"));
            PANICS.fetch_add(usize::from(!of_test), Ordering::SeqCst);
            usual(info);
        }));
    });
}

/// A service that is to survive what a test does to it. It takes one request at once, so that one that is never done
/// with is noticed.
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
        target.assert_answers().await;
        target
    }

    /// A normal call on another connection is answered, as soon as what was under way has ended.
    async fn assert_answers(&self) {
        eventually("a normal call is answered", async || {
            let answer = timeout(HANG, self.member.auth().who_am_i(WhoAmIRequest {})).await;
            match answer.expect("a normal call hangs") {
                Ok(_) => true,
                Err(status) => {
                    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                    false
                }
            }
        })
        .await;
    }

    /// It answers, nothing of it has panicked, and of all connections only that of the normal client is left.
    async fn assert_unharmed(&self) {
        self.assert_answers().await;
        // One after the other, without being refused: the slot is given back each time.
        for _ in 0..5 {
            self.member.auth().who_am_i(WhoAmIRequest {}).await.unwrap();
        }
        let port = self.address.rsplit_once(':').unwrap().1.parse().unwrap();
        eventually("the connections are gone", async || open_connections(port) <= 1).await;
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "the service has panicked");
    }
}

/// The sockets of this process that were accepted on a port.
fn open_connections(port: u16) -> usize {
    let links = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let open: HashSet<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let sockets = fs::read_to_string("/proc/self/net/tcp").unwrap();
    let local = format!(":{port:04X}");
    let is_accepted = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Not the listener itself, whose state is 0A.
        fields[1].ends_with(&local) && fields[3] != "0A" && open.contains(fields[9])
    };
    sockets.lines().skip(1).filter(is_accepted).count()
}
