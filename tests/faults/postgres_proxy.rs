//! A proxy between the service and the Unix socket of PostgreSQL that injects faults: it parses the messages of the
//! protocol and closes the connection, or delays responses, at a chosen message.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, watch},
};

use crate::support::bounds::HANG;

/// The startup message has a length but no type byte.
const STARTUP_HEADER_BYTES: usize = 4;
/// The type byte and the length of every other message.
const HEADER_BYTES: usize = 5;

/// The message at which a fault is injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultPoint {
    /// The first message of a connection. Only [`Fault::DropRequest`] and [`Fault::DelayResponse`].
    Startup,
    /// The COMMIT of a transaction.
    Commit,
    /// The execution of a prepared statement whose name starts with this prefix.
    Execute(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The database does not receive the message, and the connection closes.
    DropRequest,
    /// The database completes the request, but the connection closes before the service receives the response.
    DropResponse,
    /// The connection closes as soon as the message is sent, while the database may still execute it.
    CloseAfterSend,
    /// The service receives no response until [`Proxy::release`].
    DelayResponse,
}

const RANDOM_FAULTS: [Fault; 3] = [Fault::DropRequest, Fault::DropResponse, Fault::CloseAfterSend];

#[derive(Default)]
struct FaultPlan {
    planned: Vec<(FaultPoint, Fault)>,
    /// Injects a random fault into one of this many commits on average.
    random: Option<(fastrand::Rng, u32)>,
}

struct ProxyState {
    socket: PathBuf,
    plan: Mutex<FaultPlan>,
    injected_count: AtomicUsize,
    /// Incremented to close every established connection.
    close_signal: watch::Sender<u32>,
    /// Incremented to make every established connection silent.
    silence_signal: watch::Sender<u32>,
    /// Whether new connections are silent, too.
    is_silent: AtomicBool,
    /// Incremented to send the delayed responses.
    release_signal: watch::Sender<u32>,
    /// Every connection established since the last close holds a clone of the sender, so the receiver ends with the
    /// last of them.
    open_connection: Mutex<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

pub struct Proxy {
    pub port: u16,
    state: Arc<ProxyState>,
}

impl Proxy {
    /// Starts a proxy in front of the server with this socket.
    pub async fn start(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(ProxyState {
            socket,
            plan: Mutex::default(),
            injected_count: AtomicUsize::new(0),
            close_signal: watch::channel(0).0,
            silence_signal: watch::channel(0).0,
            is_silent: AtomicBool::new(false),
            release_signal: watch::channel(0).0,
            open_connection: Mutex::new(mpsc::channel(1)),
        });
        let accept_state = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((service, _)) = listener.accept().await {
                let state = Arc::clone(&accept_state);
                tokio::spawn(async move { Connection::run(service, state).await.unwrap_or_default() });
            }
        });
        Self { port, state }
    }

    /// Returns a database URL that goes through the proxy.
    pub fn url(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable", self.port)
    }

    /// Returns a database URL with a second host, the server with a socket in this directory.
    pub fn url_with(&self, socket_dir: &Path) -> String {
        let (port, dir) = (self.port, socket_dir.display());
        format!("host=127.0.0.1,{dir} port={port},5432 user=postgres dbname=postgres sslmode=disable")
    }

    /// Injects a fault at the next message of this kind. Repeated calls add faults for the messages after it.
    pub fn inject(&self, at: FaultPoint, fault: Fault) {
        self.state.plan.lock().unwrap().planned.push((at, fault));
    }

    pub fn inject_randomly(&self, rng: fastrand::Rng, once_in: u32) {
        self.state.plan.lock().unwrap().random = Some((rng, once_in));
    }

    /// Stops injecting faults. Returns those that were not injected.
    pub fn clear_faults(&self) -> Vec<(FaultPoint, Fault)> {
        std::mem::take(&mut *self.state.plan.lock().unwrap()).planned
    }

    /// Returns the number of faults injected so far.
    pub fn injected_count(&self) -> usize {
        self.state.injected_count.load(Ordering::SeqCst)
    }

    /// Closes all established connections.
    pub fn close_all(&self) {
        self.state.close_signal.send_modify(|count| *count += 1);
    }

    /// Closes all established connections. Returns once the service has closed its ends too.
    pub async fn close_all_and_wait(&self) {
        let (open_connection, mut all_closed) =
            std::mem::replace(&mut *self.state.open_connection.lock().unwrap(), mpsc::channel(1));
        drop(open_connection);
        self.close_all();
        let result = tokio::time::timeout(HANG, all_closed.recv()).await;
        assert!(result.expect("the service does not close its connections").is_none());
    }

    /// Discards from now on what either side sends on an established connection, and keeps the connection open: as a
    /// middlebox does that has forgotten it.
    pub fn silence_established(&self) {
        self.state.silence_signal.send_modify(|count| *count += 1);
    }

    /// Discards everything that is sent, on new connections too, until [`Proxy::end_silence`].
    pub fn silence_all(&self) {
        self.state.is_silent.store(true, Ordering::SeqCst);
        self.silence_established();
    }

    /// Forwards what is sent on new connections.
    pub fn end_silence(&self) {
        self.state.is_silent.store(false, Ordering::SeqCst);
    }

    pub fn release(&self) {
        self.state.release_signal.send_modify(|count| *count += 1);
    }
}

/// How responses of the database are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ResponseMode {
    Forward,
    /// Discards responses until this many ReadyForQuery messages have arrived, then closes the connection.
    DiscardUntilReady(usize),
    Hold,
}

struct Connection {
    state: Arc<ProxyState>,
    database: UnixStream,
    service: TcpStream,
    from_service: BytesMut,
    from_database: BytesMut,
    held: BytesMut,
    response_mode: ResponseMode,
    /// Whether the startup message, which has another format, has been forwarded.
    startup_forwarded: bool,
    /// The names of the prepared statements, from the first line of their SQL, by their protocol-level names.
    statements: HashMap<Vec<u8>, String>,
    /// The name of the statement that was bound last.
    bound_statement: String,
    /// ReadyForQuery messages that the requests so far lead to, including the one after startup.
    ready_expected: usize,
    /// ReadyForQuery messages received.
    ready_received: usize,
    /// Set once the connection is established.
    open_connection: Option<mpsc::Sender<()>>,
}

/// Requests that the connection be closed.
struct CloseConnection;

impl Connection {
    /// Serves one connection. Returns `None` when it closes or breaks.
    async fn run(service: TcpStream, state: Arc<ProxyState>) -> Option<()> {
        let (mut close_signal, mut release_signal) = (state.close_signal.subscribe(), state.release_signal.subscribe());
        let mut silence_signal = state.silence_signal.subscribe();
        let is_silent = state.is_silent.load(Ordering::SeqCst);
        service.set_nodelay(true).ok()?;
        let database = UnixStream::connect(&state.socket).await.ok()?;
        let mut connection = Self {
            state,
            database,
            service,
            from_service: BytesMut::new(),
            from_database: BytesMut::new(),
            held: BytesMut::new(),
            response_mode: ResponseMode::Forward,
            startup_forwarded: false,
            statements: HashMap::new(),
            bound_statement: String::new(),
            ready_expected: 1,
            ready_received: 0,
            open_connection: None,
        };
        if is_silent {
            return connection.discard_all().await;
        }
        loop {
            tokio::select! {
                read = connection.service.read_buf(&mut connection.from_service) => {
                    if read.ok()? == 0 {
                        return None;
                    }
                    connection.forward_requests().await?.ok()?;
                }
                read = connection.database.read_buf(&mut connection.from_database) => {
                    if read.ok()? == 0 {
                        return None;
                    }
                    connection.forward_responses().await?.ok()?;
                }
                // A connection that is still being established is not idle: closing it would look like a failed
                // database.
                _ = close_signal.changed() => if connection.open_connection.is_some() {
                    return connection.close().await;
                },
                _ = silence_signal.changed() => return connection.discard_all().await,
                _ = release_signal.changed() => {
                    connection.response_mode = ResponseMode::Forward;
                    let held = std::mem::take(&mut connection.held);
                    connection.service.write_all(&held).await.ok()?;
                }
            }
        }
    }

    /// Closes both sides and waits for the service to close its end.
    async fn close(self) -> Option<()> {
        let Self { database, mut service, mut from_service, open_connection: _alive, .. } = self;
        drop(database);
        service.shutdown().await.ok()?;
        while service.read_buf(&mut from_service).await.ok()? > 0 {}
        Some(())
    }

    /// Discards what either side sends until one of them closes.
    async fn discard_all(mut self) -> Option<()> {
        loop {
            let read = tokio::select! {
                read = self.service.read_buf(&mut self.from_service) => read,
                read = self.database.read_buf(&mut self.from_database) => read,
            };
            if read.ok()? == 0 {
                return None;
            }
            self.from_service.clear();
            self.from_database.clear();
        }
    }

    /// Forwards each complete message of the service, or injects a fault at it.
    async fn forward_requests(&mut self) -> Option<Result<(), CloseConnection>> {
        loop {
            let is_startup = !self.startup_forwarded;
            let Some(message) = self.next_request() else { return Some(Ok(())) };
            let point = if is_startup { Some(FaultPoint::Startup) } else { self.parse_request(&message) };
            let fault = point.and_then(|at| self.state.take_fault(at));
            if fault == Some(Fault::DropRequest) {
                return Some(Err(CloseConnection));
            }
            self.database.write_all(&message).await.ok()?;
            match fault {
                Some(Fault::CloseAfterSend) => {
                    // Includes the Sync after an Execute, without which the database would roll back.
                    let rest = std::mem::take(&mut self.from_service);
                    self.database.write_all(&rest).await.ok()?;
                    return Some(Err(CloseConnection));
                }
                // The Sync that leads to ReadyForQuery follows an Execute; a Query is counted already.
                Some(Fault::DropResponse) => {
                    self.response_mode =
                        ResponseMode::DiscardUntilReady(self.ready_expected + usize::from(message[0] == b'E'));
                }
                Some(Fault::DelayResponse) => self.response_mode = ResponseMode::Hold,
                Some(Fault::DropRequest) | None => {}
            }
        }
    }

    fn next_request(&mut self) -> Option<BytesMut> {
        let header = if self.startup_forwarded { HEADER_BYTES } else { STARTUP_HEADER_BYTES };
        let message = split_message(&mut self.from_service, header)?;
        self.startup_forwarded = true;
        Some(message)
    }

    /// Updates the protocol state with a message. Returns the fault point that it is, if any.
    fn parse_request(&mut self, message: &[u8]) -> Option<FaultPoint> {
        let (kind, body) = (message[0], &message[HEADER_BYTES.min(message.len())..]);
        match kind {
            b'Q' => {
                self.ready_expected += 1;
                (text(body) == "COMMIT").then_some(FaultPoint::Commit)
            }
            b'S' => {
                self.ready_expected += 1;
                None
            }
            b'P' => {
                let name = body.split(|byte| *byte == 0).next()?;
                let sql = text(&body[name.len() + 1..]);
                let first_line = sql.lines().next().unwrap_or_default();
                self.statements.insert(name.to_vec(), first_line.trim_start_matches("-- ").to_owned());
                None
            }
            b'B' => {
                let name = body.split(|byte| *byte == 0).nth(1)?;
                self.bound_statement = self.statements.get(name).cloned().unwrap_or_default();
                None
            }
            b'E' => self.state.planned_point(&self.bound_statement),
            _ => None,
        }
    }

    /// Forwards, discards or holds each complete message of the database.
    async fn forward_responses(&mut self) -> Option<Result<(), CloseConnection>> {
        while let Some(message) = split_message(&mut self.from_database, HEADER_BYTES) {
            if message[0] == b'Z' {
                self.ready_received += 1;
                self.open_connection.get_or_insert_with(|| self.state.open_connection.lock().unwrap().0.clone());
            }
            match self.response_mode {
                ResponseMode::Forward => self.service.write_all(&message).await.ok()?,
                ResponseMode::DiscardUntilReady(ready) if self.ready_received >= ready => {
                    return Some(Err(CloseConnection));
                }
                ResponseMode::DiscardUntilReady(_) => {}
                ResponseMode::Hold => self.held.extend_from_slice(&message),
            }
        }
        Some(Ok(()))
    }
}

impl ProxyState {
    /// Returns the planned fault point that matches the execution of this statement.
    fn planned_point(&self, statement: &str) -> Option<FaultPoint> {
        let plan = self.plan.lock().unwrap();
        let matches_statement = |at: FaultPoint| matches!(at, FaultPoint::Execute(name) if statement.starts_with(name));
        plan.planned.iter().map(|(at, _)| *at).find(|at| matches_statement(*at))
    }

    /// Removes and returns the fault for this point, or picks a random one.
    fn take_fault(&self, at: FaultPoint) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap();
        let fault = match (plan.planned.iter().position(|(planned, _)| *planned == at), &mut plan.random) {
            (Some(nth), _) => Some(plan.planned.remove(nth).1),
            (None, Some((rng, once_in))) if at == FaultPoint::Commit => {
                (rng.u32(..*once_in) == 0).then(|| RANDOM_FAULTS[rng.usize(..RANDOM_FAULTS.len())])
            }
            (None, _) => None,
        };
        self.injected_count.fetch_add(usize::from(fault.is_some()), Ordering::SeqCst);
        fault
    }
}

/// Splits off the first complete message. Its length is in the last four bytes of the header and includes them.
fn split_message(buffer: &mut BytesMut, header: usize) -> Option<BytesMut> {
    let length = buffer.get(header - 4..header)?.get_u32() as usize + header - 4;
    (buffer.len() >= length).then(|| buffer.split_to(length))
}

fn text(body: &[u8]) -> &str {
    let close = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    std::str::from_utf8(&body[..close]).unwrap_or_default()
}
