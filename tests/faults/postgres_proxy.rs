//! A way to the database that breaks where the test wants it to: between TCP and the database's Unix socket, it reads
//! PostgreSQL's messages and cuts the connection around the one that it was told of.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::{mpsc, watch},
};

use crate::support::bounds::HANG;

/// Of the message with which a connection begins, and of every other.
const STARTUP_HEADER_BYTES: usize = 4;
const HEADER_BYTES: usize = 5;

/// Which message of the service a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// The end of a transaction.
    Commit,
    /// The execution of a statement whose name begins like this.
    Execute(&'static str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The database never gets the message.
    CutBefore,
    /// The database gets it and has done it, the service gets no answer.
    CutAfter,
    /// The database gets it, and nobody waits for what it does.
    CutAtOnce,
    /// The service gets no answer until [`Proxy::release`].
    Hold,
}

const FAULTS_BY_CHANCE: [Fault; 3] = [Fault::CutBefore, Fault::CutAfter, Fault::CutAtOnce];

#[derive(Default)]
struct Plan {
    armed: Vec<(At, Fault)>,
    /// Each commit is struck once in so many times.
    by_chance: Option<(fastrand::Rng, u32)>,
}

struct Shared {
    socket: PathBuf,
    plan: Mutex<Plan>,
    struck: AtomicUsize,
    /// Counts up; at each step every connection that is made is cut.
    cuts: watch::Sender<u32>,
    /// Counts up; at each step what is held goes on.
    releases: watch::Sender<u32>,
    /// Ends when those who have its sender, the connections that were made since the last cut, have ended.
    alive: Mutex<(mpsc::Sender<()>, mpsc::Receiver<()>)>,
}

pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// In front of the server with this socket.
    pub async fn start(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            socket,
            plan: Mutex::default(),
            struck: AtomicUsize::new(0),
            cuts: watch::channel(0).0,
            releases: watch::channel(0).0,
            alive: Mutex::new(mpsc::channel(1)),
        });
        let of_connections = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((service, _)) = listener.accept().await {
                let shared = Arc::clone(&of_connections);
                // One that ends early is what this is for.
                tokio::spawn(async move { Connection::run(service, shared).await.unwrap_or_default() });
            }
        });
        Self { port, shared }
    }

    /// How the service reaches the database through it.
    pub fn url(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres sslmode=disable", self.port)
    }

    /// The next message of this kind is struck; armed several times, the next several.
    pub fn arm(&self, at: At, fault: Fault) {
        self.shared.plan.lock().unwrap().armed.push((at, fault));
    }

    pub fn arm_by_chance(&self, rng: fastrand::Rng, once_in: u32) {
        self.shared.plan.lock().unwrap().by_chance = Some((rng, once_in));
    }

    /// Nothing is struck any more; tells what was armed in vain.
    pub fn disarm(&self) -> Vec<(At, Fault)> {
        std::mem::take(&mut *self.shared.plan.lock().unwrap()).armed
    }

    /// How many messages were struck so far.
    pub fn struck(&self) -> usize {
        self.shared.struck.load(Ordering::SeqCst)
    }

    /// All connections that are made end now.
    pub fn cut_all(&self) {
        self.shared.cuts.send_modify(|count| *count += 1);
    }

    /// As [`Proxy::cut_all`]; returns when the service has closed its ends of them, and so knows.
    pub async fn cut_all_noticed(&self) {
        let (alive, mut gone) = std::mem::replace(&mut *self.shared.alive.lock().unwrap(), mpsc::channel(1));
        drop(alive);
        self.cut_all();
        let noticed = tokio::time::timeout(HANG, gone.recv()).await;
        assert!(noticed.expect("the service does not notice").is_none());
    }

    pub fn release(&self) {
        self.shared.releases.send_modify(|count| *count += 1);
    }
}

/// What becomes of the database's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answers {
    Forwarded,
    /// Until so many of the database's "ready" have come, which is when the connection is cut.
    LostUntil(usize),
    Held,
}

struct Connection {
    shared: Arc<Shared>,
    database: UnixStream,
    service: TcpStream,
    from_service: BytesMut,
    from_database: BytesMut,
    held: BytesMut,
    answers: Answers,
    /// Its first message has another form.
    is_begun: bool,
    /// The names of statements by how the service calls them, and which one is bound.
    statements: HashMap<Vec<u8>, String>,
    bound: String,
    /// How often the database was and will be asked to say that it is ready, its greeting included, and how often it has.
    ready_asked: usize,
    ready_said: usize,
    /// Once it is made.
    alive: Option<mpsc::Sender<()>>,
}

/// The connection is to be cut.
struct Cut;

impl Connection {
    /// None: it broke.
    async fn run(service: TcpStream, shared: Arc<Shared>) -> Option<()> {
        let (mut cuts, mut releases) = (shared.cuts.subscribe(), shared.releases.subscribe());
        service.set_nodelay(true).ok()?;
        let database = UnixStream::connect(&shared.socket).await.ok()?;
        let mut connection = Self {
            shared,
            database,
            service,
            from_service: BytesMut::new(),
            from_database: BytesMut::new(),
            held: BytesMut::new(),
            answers: Answers::Forwarded,
            is_begun: false,
            statements: HashMap::new(),
            bound: String::new(),
            ready_asked: 1,
            ready_said: 0,
            alive: None,
        };
        loop {
            tokio::select! {
                read = connection.service.read_buf(&mut connection.from_service) => {
                    if read.ok()? == 0 {
                        return None;
                    }
                    connection.forward().await?.ok()?;
                }
                read = connection.database.read_buf(&mut connection.from_database) => {
                    if read.ok()? == 0 {
                        return None;
                    }
                    connection.answer().await?.ok()?;
                }
                // One that is only being made is not idle: its loss is that of the database.
                _ = cuts.changed() => if connection.alive.is_some() {
                    return connection.end().await;
                },
                _ = releases.changed() => {
                    connection.answers = Answers::Forwarded;
                    let held = std::mem::take(&mut connection.held);
                    connection.service.write_all(&held).await.ok()?;
                }
            }
        }
    }

    /// Ends both sides, and waits for the service to do so, too.
    async fn end(self) -> Option<()> {
        let Self { database, mut service, mut from_service, alive: _alive, .. } = self;
        drop(database);
        service.shutdown().await.ok()?;
        while service.read_buf(&mut from_service).await.ok()? > 0 {}
        Some(())
    }

    /// Passes on each whole message of the service, or strikes at it.
    async fn forward(&mut self) -> Option<Result<(), Cut>> {
        while let Some(message) = self.next_of_service() {
            let fault = self.understand(&message).and_then(|at| self.shared.strikes(at));
            if fault == Some(Fault::CutBefore) {
                return Some(Err(Cut));
            }
            self.database.write_all(&message).await.ok()?;
            match fault {
                Some(Fault::CutAtOnce) => {
                    // With the sync behind an execution, without which nothing of it would stand.
                    let rest = std::mem::take(&mut self.from_service);
                    self.database.write_all(&rest).await.ok()?;
                    return Some(Err(Cut));
                }
                // An execution is followed by a sync, which asks for it; a query has asked already.
                Some(Fault::CutAfter) => {
                    self.answers = Answers::LostUntil(self.ready_asked + usize::from(message[0] == b'E'));
                }
                Some(Fault::Hold) => self.answers = Answers::Held,
                Some(Fault::CutBefore) | None => {}
            }
        }
        Some(Ok(()))
    }

    fn next_of_service(&mut self) -> Option<BytesMut> {
        let header = if self.is_begun { HEADER_BYTES } else { STARTUP_HEADER_BYTES };
        let message = split_message(&mut self.from_service, header)?;
        self.is_begun = true;
        Some(message)
    }

    /// What of interest a message is.
    fn understand(&mut self, message: &[u8]) -> Option<At> {
        let (kind, body) = (message[0], &message[HEADER_BYTES.min(message.len())..]);
        match kind {
            b'Q' => {
                self.ready_asked += 1;
                (text(body) == "COMMIT").then_some(At::Commit)
            }
            b'S' => {
                self.ready_asked += 1;
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
                self.bound = self.statements.get(name).cloned().unwrap_or_default();
                None
            }
            b'E' => self.shared.armed_for(&self.bound),
            _ => None,
        }
    }

    /// Passes on what the database says, unless it is to be lost.
    async fn answer(&mut self) -> Option<Result<(), Cut>> {
        while let Some(message) = split_message(&mut self.from_database, HEADER_BYTES) {
            if message[0] == b'Z' {
                self.ready_said += 1;
                self.alive.get_or_insert_with(|| self.shared.alive.lock().unwrap().0.clone());
            }
            match self.answers {
                Answers::Forwarded => self.service.write_all(&message).await.ok()?,
                Answers::LostUntil(ready) if self.ready_said >= ready => return Some(Err(Cut)),
                Answers::LostUntil(_) => {}
                Answers::Held => self.held.extend_from_slice(&message),
            }
        }
        Some(Ok(()))
    }
}

impl Shared {
    /// Whether a fault waits for the execution of this statement.
    fn armed_for(&self, statement: &str) -> Option<At> {
        let plan = self.plan.lock().unwrap();
        let is_meant = |at: At| matches!(at, At::Execute(name) if statement.starts_with(name));
        plan.armed.iter().map(|(at, _)| *at).find(|at| is_meant(*at))
    }

    fn strikes(&self, at: At) -> Option<Fault> {
        let mut plan = self.plan.lock().unwrap();
        let fault = match (plan.armed.iter().position(|(armed, _)| *armed == at), &mut plan.by_chance) {
            (Some(nth), _) => Some(plan.armed.remove(nth).1),
            (None, Some((rng, once_in))) if at == At::Commit => {
                (rng.u32(..*once_in) == 0).then(|| FAULTS_BY_CHANCE[rng.usize(..FAULTS_BY_CHANCE.len())])
            }
            (None, _) => None,
        };
        self.struck.fetch_add(usize::from(fault.is_some()), Ordering::SeqCst);
        fault
    }
}

/// The first whole message, whose length stands in the last four bytes of its header and counts these.
fn split_message(buffer: &mut BytesMut, header: usize) -> Option<BytesMut> {
    let length = buffer.get(header - 4..header)?.get_u32() as usize + header - 4;
    (buffer.len() >= length).then(|| buffer.split_to(length))
}

fn text(body: &[u8]) -> &str {
    let end = body.iter().position(|byte| *byte == 0).unwrap_or(body.len());
    std::str::from_utf8(&body[..end]).unwrap_or_default()
}
