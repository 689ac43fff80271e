//! Connections of clients: taken, served, and let go when they are silent, stuck, old or too many.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    net::IpAddr,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::throttle::subscriber,
    middleware::Gate,
    transport::client_address::{ClientAddress, TrustedProxies},
    transport::tls,
};

/// How long it waits to accept again when it could not, for example because the process has no file left to open.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What a client has for the handshake of TLS.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How long a new connection waits for one that is let go to make room for it.
const ROOM_WAIT: Duration = Duration::from_secs(1);
/// Of the connections that may be let go when there is no room, how many are: one in so many. Those may that have been idle
/// for so long, and those that have had no calls for so long but such as nobody has signed in for, however often these
/// begin and end; that is longer than a login takes.
const EVICTED_ONE_IN: usize = 10;
const EVICTED_IDLE_MIN: Duration = Duration::from_secs(1);
const EVICTED_STRANGE_MIN: Duration = Duration::from_secs(10);
/// What a client has to end its connection after it was told to.
const GOODBYE_MAX: Duration = Duration::from_millis(500);
/// What calls have that nobody has signed in for, on a connection that is told to go while there is room: longer than a
/// login takes. Health is watched without end, so a client does that anew.
const STRANGE_GRACE: Duration = Duration::from_secs(30);
/// What the other calls of a connection have to end when one is stuck: behind a proxy they may be somebody else's.
const STUCK_GRACE: Duration = Duration::from_secs(30);
/// Calls of one client on one connection at once that nobody has signed in for: logins, health, reflection. Who has the
/// connection for himself has as many on it; where a proxy brings many clients on it, none takes the others' places.
const OPEN_CALLS_PER_CLIENT_MAX: usize = 16;
/// Of a connection's calls at once, those of all its clients are no more than one in so many: the rest is for those who
/// have signed in.
const OPEN_CALLS_ONE_IN: usize = 2;
/// Connections made at the same time do not grow old at the same time: some go a tenth of the time sooner.
const AGE_SPREAD: f64 = 10.0;
/// How often it is looked at what a connection does.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Longer than a process runs, and not too long for a clock.
const FOREVER: Duration = Duration::from_secs(30 * 365 * 24 * 3_600);
/// What a client may send of a stream before it is read: with imports, most of what they keep in memory.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = 4 * 1024 * 1024;

/// The bounds of connections.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Connections at once. A new one makes those go that have been idle for longest, or without a call that somebody has
    /// signed in for; if there is none, it is closed.
    pub connections_max: usize,
    /// How long a connection may be without a call.
    pub idle_max: Duration,
    /// After this a client is asked to connect anew, so that a balancer can spread connections.
    pub age_max: Duration,
    /// What its calls have from then on; those that nobody has signed in for have less.
    pub age_grace: Duration,
    /// How often a silent client is asked whether it is there, and how long it may take to answer.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
    /// Calls of one connection at once; more wait in the client.
    pub streams_max: u32,
    /// Metadata of a call.
    pub header_bytes_max: u32,
    /// Who is believed where a call comes from.
    pub trusted_proxies: TrustedProxies,
}

/// Where clients connect, and whether they do so with TLS.
#[derive(Debug)]
pub struct Listener {
    pub tcp: TcpListener,
    pub tls: Option<tls::Acceptor>,
}

/// Without TLS.
impl From<TcpListener> for Listener {
    fn from(tcp: TcpListener) -> Self {
        Self { tcp, tls: None }
    }
}

/// The connections there are.
#[derive(Clone, Debug, Default)]
pub struct Open {
    /// Those made before the stop, which have calls to finish.
    pub before: TaskTracker,
    /// Those made since, which are only told of it.
    pub since: TaskTracker,
}

impl Open {
    /// Waits for those made since the stop, when no more are taken.
    pub async fn say_goodbye(&self) {
        self.since.close();
        let _ = timeout(GOODBYE_MAX, self.since.wait()).await;
    }
}

/// Serves what connects, until it is dropped. When `stop` is cancelled, clients are asked to go elsewhere; who connects
/// then is still answered by the gate, and health can be asked.
pub async fn serve(
    listener: Listener,
    gate: Arc<Gate>,
    limits: ConnectionLimits,
    stop: CancellationToken,
    open: Open,
) -> Infallible {
    let Listener { tcp, tls } = listener;
    let follow_files = async {
        match tls.clone() {
            Some(tls) => tls.follow_files().await,
            None => std::future::pending().await,
        }
    };
    let shared = Arc::new(Shared::new(gate, limits, tls.clone(), stop));
    tokio::select! {
        never = accept(tcp, shared, open) => never,
        never = follow_files => never,
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, open: Open) -> Infallible {
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(kind = ?error.kind(), "cannot accept a connection");
                // Where files are short, there is no room before the connections are as many as they may be.
                shared.evict();
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Without room nobody else is accepted: those who come wait in the kernel.
        let Some(room) = shared.room().await else { continue };
        let is_late = shared.stop.is_cancelled();
        let tracker = if is_late { &open.since } else { &open.before };
        tracker.spawn(Arc::clone(&shared).connection(stream, peer.ip(), room, is_late));
    }
}

struct Shared {
    gate: Arc<Gate>,
    limits: ConnectionLimits,
    http2: http2::Builder<TokioExecutor>,
    tls: Option<tls::Acceptor>,
    stop: CancellationToken,
    rooms: Arc<Semaphore>,
    connections: Mutex<HashMap<u64, Arc<Activity>>>,
    next_id: AtomicU64,
}

impl Shared {
    fn new(gate: Arc<Gate>, limits: ConnectionLimits, tls: Option<tls::Acceptor>, stop: CancellationToken) -> Self {
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams_max)
            .max_header_list_size(limits.header_bytes_max)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .keep_alive_interval(limits.keepalive_interval)
            .keep_alive_timeout(limits.keepalive_timeout);
        Self {
            rooms: Arc::new(Semaphore::new(limits.connections_max)),
            connections: Mutex::default(),
            next_id: AtomicU64::new(0),
            gate,
            limits,
            http2,
            tls,
            stop,
        }
    }

    /// Room for one more connection, made if need be. None: nobody could be let go.
    async fn room(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(room) = Arc::clone(&self.rooms).try_acquire_owned() {
            return Some(room);
        }
        self.evict();
        timeout(ROOM_WAIT, Arc::clone(&self.rooms).acquire_owned()).await.ok()?.ok()
    }

    /// Asks the connections to go that have been of no use for longest.
    fn evict(&self) {
        let now = Instant::now();
        let mut useless: Vec<(Instant, Arc<Activity>)> = lock(&self.connections)
            .values()
            .filter_map(|activity| Some((activity.useless_since(now)?, Arc::clone(activity))))
            .collect();
        useless.sort_unstable_by_key(|(since, _)| *since);
        let count = useless.len().div_ceil(EVICTED_ONE_IN);
        useless.into_iter().take(count).for_each(|(_, activity)| activity.evicted.notify_one());
    }

    /// `is_late`: made after the stop.
    async fn connection(self: Arc<Self>, stream: TcpStream, peer: IpAddr, _room: OwnedSemaphorePermit, is_late: bool) {
        // Small answers are not to wait for more of them.
        let _ = stream.set_nodelay(true);
        let entry = self.enter();
        let activity = Arc::clone(&entry.activity);
        let Some(tls) = &self.tls else {
            return self.serve_http2(stream, peer, activity, is_late).await;
        };
        // A client that does not want this certificate, or has none that is wanted, is told so by TLS itself.
        let accepted = tokio::select! {
            accepted = timeout(HANDSHAKE_MAX, tls.accept(stream)) => accepted,
            () = activity.evicted.notified() => return,
        };
        if let Ok(Ok(stream)) = accepted {
            self.serve_http2(stream, peer, activity, is_late).await;
        }
    }

    async fn serve_http2(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: IpAddr,
        activity: Arc<Activity>,
        is_late: bool,
    ) {
        let service = service_fn(|request: http::Request<Incoming>| {
            let client = self.limits.trusted_proxies.client(peer, request.headers());
            let (gate, call) = (Arc::clone(&self.gate), activity.begin(client));
            async move { Ok::<_, Infallible>(gate.answer(request, call).await) }
        });
        let mut connection = pin!(self.http2.serve_connection(TokioIo::new(stream), service));
        // What clients do to their connections is their matter.
        let is_evicted = tokio::select! {
            _ = &mut connection => return,
            () = self.until_old_or_stopped(&activity, is_late) => false,
            () = activity.evicted.notified() => true,
            _ = until_silent(&activity, self.limits.idle_max) => false,
        };
        connection.as_mut().graceful_shutdown();
        // What has begun meanwhile may finish. How long a stop may take is for the service to say.
        tokio::select! {
            _ = connection => {}
            () = until_finished(&activity) => {}
            () = until_strange(&activity, is_evicted) => {}
            () = sleep(self.limits.age_grace) => {}
        }
    }

    async fn until_old_or_stopped(&self, activity: &Activity, is_late: bool) {
        let age_max = sleep(self.limits.age_max.mul_f64(1.0 - random() / AGE_SPREAD));
        tokio::select! {
            () = age_max => return,
            () = self.stop.cancelled() => {}
        }
        if is_late {
            // Asked to go before its first call is answered, a client would take the service for broken.
            activity.answered.notified().await;
        }
    }

    fn enter(&self) -> Entry<'_> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let open_max = self.limits.streams_max as usize / OPEN_CALLS_ONE_IN;
        let activity = Arc::new(Activity::new(open_max.max(OPEN_CALLS_PER_CLIENT_MAX)));
        lock(&self.connections).insert(id, Arc::clone(&activity));
        Entry { shared: self, id, activity }
    }
}

/// Waits until there was no call for so long from now on, or one is stuck.
async fn until_silent(activity: &Activity, idle_max: Duration) -> Silent {
    let began = Instant::now();
    loop {
        let now = Instant::now();
        let next = match activity.state() {
            State::Idle(since) => since.max(began) + idle_max,
            State::Busy(until) if until <= now => return Silent::Stuck,
            State::Busy(until) => until,
        };
        if next <= now {
            return Silent::Idle;
        }
        // A call may begin meanwhile.
        sleep_until(next.min(now + LOOK_INTERVAL)).await;
    }
}

/// Waits until there is no call any more, but for those that are stuck; where there are such, not for ever.
async fn until_finished(activity: &Activity) {
    if let Silent::Idle = until_silent(activity, GOODBYE_MAX).await {
        return;
    }
    let others = async {
        while let Some(until) = activity.last_until()
            && until > Instant::now()
        {
            sleep_until(until.min(Instant::now() + LOOK_INTERVAL)).await;
        }
    };
    let _ = timeout(STUCK_GRACE, others).await;
}

/// Waits until a connection that was told to go has had no calls for long but such as nobody has signed in for. A client
/// may begin calls until it says that it was told, which it may never do.
async fn until_strange(activity: &Activity, mut is_evicted: bool) {
    let began = Instant::now();
    loop {
        let now = Instant::now();
        let grace = if is_evicted { GOODBYE_MAX } else { STRANGE_GRACE };
        let end = activity.of_use_until(now).max(began) + grace;
        if end <= now {
            return;
        }
        tokio::select! {
            () = sleep_until(end) => {}
            () = activity.evicted.notified() => is_evicted = true,
        }
    }
}

/// From 0 to 1.
pub fn random() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}

/// A connection's place among all.
struct Entry<'a> {
    shared: &'a Shared,
    id: u64,
    activity: Arc<Activity>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        lock(&self.shared.connections).remove(&self.id);
    }
}

enum Silent {
    /// There was no call for long.
    Idle,
    /// There is a call whose client does not read its answer.
    Stuck,
}

enum State {
    /// Without a call since.
    Idle(Instant),
    /// With calls, all of which should have ended or gone on by then, but for one.
    Busy(Instant),
}

/// What a connection is doing.
struct Activity {
    calls: Mutex<Calls>,
    evicted: Notify,
    answered: Notify,
}

struct Calls {
    /// Until when each call is to end, or to go on.
    until: HashMap<u64, Instant>,
    next_id: u64,
    idle_since: Instant,
    /// Those that somebody has signed in for.
    signed_in: HashSet<u64>,
    /// When the last of those ended, or the connection was made.
    strange_since: Instant,
    /// Whose those are that have no credentials.
    open: HashMap<u64, IpAddr>,
    open_max: usize,
}

impl Activity {
    fn new(open_max: usize) -> Self {
        let now = Instant::now();
        let calls = Calls {
            until: HashMap::new(),
            next_id: 0,
            idle_since: now,
            signed_in: HashSet::new(),
            strange_since: now,
            open: HashMap::new(),
            open_max,
        };
        Self { calls: Mutex::new(calls), evicted: Notify::new(), answered: Notify::new() }
    }

    fn state(&self) -> State {
        let calls = lock(&self.calls);
        calls.until.values().min().map_or(State::Idle(calls.idle_since), |until| State::Busy(*until))
    }

    fn last_until(&self) -> Option<Instant> {
        lock(&self.calls).until.values().max().copied()
    }

    /// None: it is of use.
    fn useless_since(&self, now: Instant) -> Option<Instant> {
        let strange_since = self.of_use_until(now);
        if now.duration_since(strange_since) >= EVICTED_STRANGE_MIN {
            return Some(strange_since);
        }
        match self.state() {
            State::Idle(since) => (now.duration_since(since) >= EVICTED_IDLE_MIN).then_some(since),
            State::Busy(_) => None,
        }
    }

    /// Since then it has had no calls but such as nobody has signed in for, or is about to.
    fn of_use_until(&self, now: Instant) -> Instant {
        let calls = lock(&self.calls);
        if calls.signed_in.is_empty() { calls.strange_since } else { now }
    }

    fn begin(self: &Arc<Self>, client: ClientAddress) -> Call {
        let mut calls = lock(&self.calls);
        let id = calls.next_id;
        calls.next_id += 1;
        // Until it says how long it takes.
        calls.until.insert(id, Instant::now() + LOOK_INTERVAL);
        Call { activity: Arc::clone(self), id, client }
    }
}

/// A call of a connection, from its first header to the last byte of its answer.
pub struct Call {
    activity: Arc<Activity>,
    id: u64,
    client: ClientAddress,
}

impl Call {
    pub fn client(&self) -> ClientAddress {
        self.client
    }

    /// Counts it as one without credentials; whether its client and the connection may have it.
    pub fn enter_open(&self) -> bool {
        let client = subscriber(self.client.0);
        let mut calls = lock(&self.activity.calls);
        let of_client = calls.open.values().filter(|other| **other == client).count();
        let has_room = of_client < OPEN_CALLS_PER_CLIENT_MAX && calls.open.len() < calls.open_max;
        if has_room {
            calls.open.insert(self.id, client);
        }
        has_room
    }

    /// Somebody has signed in for it.
    pub fn signed_in(&self) {
        lock(&self.activity.calls).signed_in.insert(self.id);
    }

    /// The call ends when it ends, or says more.
    pub fn lasts(&self) {
        self.lasts_until(Instant::now() + FOREVER);
    }

    /// The call ends or says so again until then, or its connection is closed: its client does not read.
    pub fn lasts_until(&self, until: Instant) {
        lock(&self.activity.calls).until.insert(self.id, until);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = lock(&self.activity.calls);
        calls.until.remove(&self.id);
        calls.open.remove(&self.id);
        if calls.signed_in.remove(&self.id) {
            calls.strange_since = Instant::now();
        }
        if calls.until.is_empty() {
            calls.idle_since = Instant::now();
        }
        drop(calls);
        self.activity.answered.notify_one();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is in it is whole whatever happened to a holder of the lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
