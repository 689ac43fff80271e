//! The program as a process, its database past the service, and calls that keep their bytes.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes};
use issue_tracker::db::embedded::{Cluster, Durability};
use tokio_postgres::{Config, NoTls};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;
use uuid::Uuid;

/// A test that waits longer than this hangs.
pub const HANG: Duration = Duration::from_secs(120);
pub const TICK: Duration = Duration::from_millis(20);
/// The deadline of a call, and how long a client waits beyond it before it gives up on the connection.
const DEADLINE: Duration = Duration::from_secs(15);
const DEADLINE_GRACE: Duration = Duration::from_secs(5);

/// How much is tried, and with which numbers.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    pub long: bool,
    pub seed: u64,
}

impl Form {
    /// As `ISSUE_TRACKER_FAULTS` says it: `short` (the default) or `long`, with `:SEED` behind it to repeat a run.
    pub fn of_environment() -> Self {
        let text = std::env::var("ISSUE_TRACKER_FAULTS").unwrap_or_else(|_| "short".to_owned());
        let (form, seed) = text.split_once(':').map_or((&*text, None), |(form, seed)| (form, Some(seed)));
        assert!(["short", "long"].contains(&form), "ISSUE_TRACKER_FAULTS is {text:?}, not short or long");
        let seed = seed.map_or_else(|| fastrand::u64(..u64::from(u32::MAX)), |seed| seed.parse().unwrap());
        let form = Self { long: form == "long", seed };
        println!("{form:?}");
        form
    }

    pub fn pick<T>(self, short: T, long: T) -> T {
        if self.long { long } else { short }
    }

    pub fn rng(self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed)
    }
}

/// A directory that goes away with the test.
pub struct Dir(PathBuf);

impl Dir {
    pub fn new() -> Self {
        let dir = std::env::temp_dir().join(format!("faults-test-{}", Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The data directory of a service.
    pub fn data(&self) -> String {
        self.path("data").display().to_string()
    }

    /// How to reach the private database of a service with this data directory.
    pub fn database(&self) -> Config {
        let mut config = Config::new();
        config.host_path(self.path("data/cluster.socket")).port(5432).user("postgres").dbname("issue_tracker");
        config.connect_timeout(Duration::from_secs(2));
        config
    }

    /// The main process of that database, if one is at work.
    pub fn server_pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.path("data/cluster/postmaster.pid")).ok()?;
        let pid = text.lines().next()?.parse().ok()?;
        // A dead one leaves its file, and its number may be somebody else's by now.
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let cluster = self.path("data/cluster").canonicalize().ok()?;
        String::from_utf8_lossy(&command).contains(cluster.to_str()?).then_some(pid)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        // A server whose service was killed takes a moment to leave.
        for _ in 0..500 {
            if self.server_pid().is_none() {
                break;
            }
            std::thread::sleep(TICK);
        }
        let _ = fs::remove_dir_all(self.path("data/cluster").canonicalize().unwrap_or_default());
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The program, without whatever the environment says of it.
pub fn program(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_issue-tracker"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("ISSUE_TRACKER_") || name == "DATABASE_URL" || name == "RUST_LOG" {
            command.env_remove(&*name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// The output of a program that ends by itself, killed if it does not.
pub fn run(mut command: Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    let output = is_done.recv_timeout(HANG).unwrap_or_else(|_| {
        signal(pid, libc::SIGKILL);
        panic!("the program does not end");
    });
    output.unwrap()
}

pub fn signal(pid: u32, signal: i32) -> bool {
    assert!(pid > 1);
    // SAFETY: kill takes two numbers; the pid is that of a process that the test started, or of one that this started.
    unsafe { libc::kill(pid as i32, signal) == 0 }
}

pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < HANG, "waited in vain until {what}");
        std::thread::sleep(TICK);
    }
}

/// As [`wait_until`], where others are to go on meanwhile.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < HANG, "waited in vain until {what}");
        tokio::time::sleep(TICK).await;
    }
}

/// A service, killed when the test ends in whatever way.
pub struct Service {
    child: Child,
    lines: Receiver<String>,
    pub address: String,
    log: PathBuf,
}

impl Service {
    /// Returns when it serves.
    pub fn start(dir: &Dir, command: Command) -> Self {
        let mut service = Self::spawn(dir, command);
        while service.address.is_empty() {
            let line = service.lines.recv_timeout(HANG);
            let line = line.unwrap_or_else(|_| panic!("no more output; the log says: {}", service.log()));
            service.address = line.strip_prefix("listening on ").unwrap_or_default().to_owned();
        }
        service
    }

    /// Does not wait for it.
    pub fn spawn(dir: &Dir, mut command: Command) -> Self {
        let log = dir.path("service.log");
        let stderr = File::options().create(true).append(true).open(&log).unwrap();
        command.args(["--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self { child, lines, address: String::new(), log }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn stop(&mut self) -> ExitStatus {
        signal(self.child.id(), libc::SIGTERM);
        let mut status = None;
        wait_until("the service ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn channel(&self) -> Channel {
        channel(&self.address)
    }

    /// Nothing has gone wrong in it that it did not foresee.
    pub fn assert_sound(&self) {
        let log = self.log();
        for word in ["panicked", "internal error", "database error"] {
            let lines: Vec<&str> = log.lines().filter(|line| line.contains(word)).collect();
            assert!(lines.is_empty(), "{lines:#?}");
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn channel(address: &str) -> Channel {
    Endpoint::try_from(format!("http://{address}")).unwrap().connect_lazy()
}

/// A database server that is not the service's own.
pub struct External {
    pub cluster: Option<Cluster>,
    pub dir: Dir,
}

impl External {
    pub fn start(durability: Durability) -> Self {
        let dir = Dir::new();
        let cluster = Cluster::start(&dir.path("external"), durability).unwrap();
        Self { cluster: Some(cluster), dir }
    }

    pub fn socket_dir(&self) -> &Path {
        self.cluster.as_ref().unwrap().socket_dir()
    }

    pub fn config(&self) -> Config {
        self.cluster.as_ref().unwrap().connect_config("postgres")
    }

    /// As the command line takes it.
    pub fn url(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.socket_dir().display())
    }
}

impl Drop for External {
    fn drop(&mut self) {
        // Before its directory.
        drop(self.cluster.take());
    }
}

/// Whether the service says that it serves. It always says something.
pub async fn serves(channel: &Channel) -> bool {
    let mut health = HealthClient::new(channel.clone());
    let checked = tokio::time::timeout(HANG, health.check(HealthCheckRequest::default()))
        .await
        .expect("health does not answer")
        .unwrap();
    checked.into_inner().status() == ServingStatus::Serving
}

/// Refused with this, and told when to try again.
#[track_caller]
pub fn assert_retriable(status: &Status, code: Code, reason: &str) {
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(status.get_details_error_info().map(|info| info.reason).as_deref(), Some(reason), "{status:?}");
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}

/// A session past the service.
pub async fn session(config: &Config) -> tokio_postgres::Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Who calls.
#[derive(Clone, Debug)]
pub struct Caller {
    pub id: Uuid,
    pub token: String,
}

/// Members with a token each, made past the service.
pub async fn callers(config: &Config, count: usize) -> Vec<Caller> {
    const SQL: &str = "WITH made AS (
            INSERT INTO users (id, username, password_hash, role) VALUES ($1, $2, '', 2) RETURNING id
        )
        INSERT INTO tokens (id, user_id, sha256, name) SELECT gen_random_uuid(), id, $3, 'faults' FROM made";
    let database = session(config).await;
    let mut callers = Vec::new();
    for nth in 0..count {
        let (token, sha256) = issue_tracker::auth::new_token().unwrap();
        let id = Uuid::now_v7();
        let username = format!("caller-{nth}-{}", &id.simple().to_string()[24..]);
        database.execute(SQL, &[&id, &username, &&sha256[..]]).await.unwrap();
        callers.push(Caller { id, token });
    }
    callers
}

/// Calls `Service/Method` with a message, and answers its bytes.
pub async fn call(channel: &Channel, token: &str, method: &str, message: &[u8]) -> Result<Vec<u8>, Status> {
    call_within(channel, token, method, message, DEADLINE).await
}

pub async fn call_within(
    channel: &Channel,
    token: &str,
    method: &str,
    message: &[u8],
    deadline: Duration,
) -> Result<Vec<u8>, Status> {
    let mut request = Request::new(message.to_vec());
    request.set_timeout(deadline);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    let path = format!("/issuetracker.v1.{method}").parse().unwrap();
    let mut grpc = Grpc::new(channel.clone());
    let answer = async {
        grpc.ready().await.map_err(|_| Status::unavailable("not connected"))?;
        grpc.unary(request, path, Raw).await
    };
    let answer = tokio::time::timeout(deadline + DEADLINE_GRACE, answer).await;
    let answer = answer.unwrap_or_else(|_| panic!("{method} is not answered long after its deadline"));
    Ok(answer?.into_inner().to_vec())
}

/// Messages as the bytes that they are.
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&message);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
