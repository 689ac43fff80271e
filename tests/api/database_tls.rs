//! TLS to the database: what each `sslmode` verifies, and that no connection bypasses TLS.

use std::{
    fs::{self, File},
    net::SocketAddr,
    os::unix::{
        fs::{MetadataExt, chown},
        process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command},
    sync::{Arc, Mutex},
};

use issue_tracker::{
    db::{ConnectionString, Db, migrate::migrate},
    postgres::{Cluster, Durability},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_postgres::NoTls;
use uuid::Uuid;

use crate::{
    harness::limits,
    support::{
        certificates::{Authority, Pair},
        database::session,
        eventually::eventually,
        ports::unused_port,
        scratch::scratch_dir,
    },
};

const PASSWORD: &str = "sesame-open-17";

/// `pg_hba.conf`: how each role authenticates.
const HBA: &str = "local all postgres trust
    host all postgres 127.0.0.1/32 trust
    hostssl all certified 127.0.0.1/32 cert
    hostssl all protected 127.0.0.1/32 scram-sha-256
    ";

/// A PostgreSQL server on 127.0.0.1, with or without TLS.
struct Server {
    process: Child,
    dir: PathBuf,
    cluster: PathBuf,
    port: u16,
}

impl Server {
    /// Starts a server that presents `pair`. TLS is on unless `settings` turn it off.
    async fn start(pair: &Pair, authority: &Authority, settings: &[&str]) -> Self {
        let dir = scratch_dir().join(format!("database-tls-{}", Uuid::new_v4()));
        // The embedded cluster does not listen on TCP: create it here, then run its server with other settings.
        let (cluster, bin_dir) = {
            let dir = dir.clone();
            let create = tokio::task::spawn_blocking(move || {
                let cluster = Cluster::start(&dir, Durability::Throwaway).unwrap();
                let bin_dir = cluster.bin_dir().to_owned();
                cluster.stop().unwrap();
                (dir.join("cluster").canonicalize().unwrap(), bin_dir)
            });
            create.await.unwrap()
        };
        let port = unused_port();
        let mut server = Self { process: Command::new("true").spawn().unwrap(), dir, cluster, port };
        server.process.wait().unwrap();
        server.write("hba", HBA);
        server.write("authority.crt", &authority.certificate);
        server.present(pair);
        let owner = fs::metadata(&server.cluster).unwrap();
        let path = |name| server.path(name).display().to_string();
        let fixed = [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={port}"),
            "ssl=on".to_owned(),
            "fsync=off".to_owned(),
            format!("ssl_cert_file={}", path("server.crt")),
            format!("ssl_key_file={}", path("server.key")),
            format!("ssl_ca_file={}", path("authority.crt")),
            format!("hba_file={}", path("hba")),
        ];
        let mut command = Command::new(bin_dir.join("postgres"));
        command.arg("-D").arg(&server.cluster).arg("-k").arg(&server.cluster).current_dir(&server.cluster);
        for setting in fixed.iter().map(String::as_str).chain(settings.iter().copied()) {
            command.args(["-c", setting]);
        }
        if owner.uid() != fs::metadata("/proc/self").unwrap().uid() {
            command.uid(owner.uid()).gid(owner.gid());
        }
        let log = File::create(server.path("log")).unwrap();
        server.process = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let plain = server.url("sslmode=disable").parse::<ConnectionString>().unwrap().config;
        eventually("the server accepts connections", async || plain.connect(NoTls).await.is_ok()).await;
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.join(name)
    }

    /// Writes a file that the server's user owns and only that user can read, as PostgreSQL requires of keys.
    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        let owner = fs::metadata(&self.cluster).unwrap();
        chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(&path, mode).unwrap();
    }

    fn present(&self, pair: &Pair) {
        self.write("server.crt", &pair.certificate);
        self.write("server.key", &pair.key);
    }

    fn url(&self, parameters: &str) -> String {
        self.url_of("postgres", "127.0.0.1", parameters)
    }

    fn url_of(&self, user: &str, host: &str, parameters: &str) -> String {
        format!("postgresql://{user}:{PASSWORD}@{host}:{}/postgres?connect_timeout=5&{parameters}", self.port)
    }

    async fn execute(&self, sql: &str) {
        let plain = self.url("sslmode=disable").parse::<ConnectionString>().unwrap().config;
        session(&plain).await.batch_execute(sql).await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.cluster);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Connects, and returns whether the connection uses TLS, or the error.
async fn connect(url: &str) -> Result<bool, String> {
    let message = |error: anyhow::Error| {
        let message = format!("{error:#}");
        assert!(!message.contains(PASSWORD), "{message}");
        message
    };
    let ConnectionString { config, connector } = url.parse::<ConnectionString>().map_err(message)?;
    let (client, connection) = config.connect(connector).await.map_err(|error| message(error.into()))?;
    tokio::spawn(connection);
    let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
    Ok(client.query_one(sql, &[]).await.unwrap().get(0))
}

fn matches_expected(outcome: &Result<bool, String>, expected: &Result<bool, &str>) -> bool {
    match (outcome, expected) {
        (Ok(tls), Ok(expected)) => tls == expected,
        (Err(error), Err(why)) => error.contains(why),
        _ => false,
    }
}

#[track_caller]
fn assert_outcome(outcome: &Result<bool, String>, expected: &Result<bool, &str>, what: &str) {
    assert!(matches_expected(outcome, expected), "{what}: {outcome:?}, expected {expected:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sslmode_verifies_the_server_as_documented() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let server = Server::start(&ours.server(&["localhost"]), &ours, &[]).await;
    let dir = tempfile::tempdir().unwrap();
    let (our_ca, their_ca) = (ours.write(dir.path(), "ours.crt"), theirs.write(dir.path(), "theirs.crt"));
    let (unknown, name) = (Err("UnknownIssuer"), Err("not valid for name"));
    for (host, parameters, expected) in [
        ("127.0.0.1", "sslmode=disable".to_owned(), Ok(false)),
        ("127.0.0.1", String::new(), Ok(true)),
        ("127.0.0.1", "sslmode=prefer".to_owned(), Ok(true)),
        ("127.0.0.1", "sslmode=require".to_owned(), Ok(true)),
        ("127.0.0.1", format!("sslmode=require&sslrootcert={our_ca}"), Ok(true)),
        ("127.0.0.1", format!("sslmode=require&sslrootcert={their_ca}"), unknown),
        ("127.0.0.1", format!("sslrootcert={their_ca}"), unknown),
        ("127.0.0.1", format!("sslmode=verify-ca&sslrootcert={our_ca}"), Ok(true)),
        ("127.0.0.1", format!("sslmode=verify-ca&sslrootcert={their_ca}"), unknown),
        ("localhost", format!("sslmode=verify-full&sslrootcert={our_ca}"), Ok(true)),
        ("127.0.0.1", format!("sslmode=verify-full&sslrootcert={our_ca}"), name),
        ("localhost", format!("sslmode=verify-full&sslrootcert={their_ca}"), unknown),
        ("localhost", "sslmode=verify-full&sslrootcert=system".to_owned(), unknown),
        ("localhost", "sslrootcert=system".to_owned(), unknown),
    ] {
        let outcome = connect(&server.url_of("postgres", host, &parameters)).await;
        assert_outcome(&outcome, &expected, &format!("{host} {parameters}"));
    }
}

/// Returns a self-signed certificate that is its own authority, as `openssl req -x509` creates.
fn self_signed(name: &str, last_year: i32) -> Pair {
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = date_time_ymd(last_year, 12, 31);
    let key = KeyPair::generate().unwrap();
    Pair { certificate: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
}

#[tokio::test(flavor = "multi_thread")]
async fn self_signed_certificate_is_verified() {
    let ours = Authority::new("ours");
    let dir = tempfile::tempdir().unwrap();
    let (good, other) = (self_signed("localhost", 2100), self_signed("localhost", 2100));
    let expired = self_signed("localhost", 2020);
    let server = Server::start(&good, &ours, &[]).await;
    for (presented, trusted, host, expected) in [
        (&good, &good, "localhost", Ok(true)),
        (&good, &good, "127.0.0.1", Err("not valid for name")),
        // The same name, but another key.
        (&good, &other, "localhost", Err("invalid peer certificate")),
        (&expired, &expired, "localhost", Err("expired")),
    ] {
        server.present(presented);
        server.execute("SELECT pg_reload_conf()").await;
        let [file, _] = trusted.write(dir.path(), "trusted");
        let url = server.url_of("postgres", host, &format!("sslmode=verify-full&sslrootcert={file}"));
        // The server reloads asynchronously.
        eventually(&format!("{host}: {expected:?}"), async || matches_expected(&connect(&url).await, &expected)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_without_tls_is_rejected_if_tls_is_required() {
    let ours = Authority::new("ours");
    let server = Server::start(&ours.server(&["localhost"]), &ours, &["ssl=off"]).await;
    let dir = tempfile::tempdir().unwrap();
    let ca = ours.write(dir.path(), "ours.crt");
    for (parameters, expected) in [
        (String::new(), Ok(false)),
        ("sslmode=require".to_owned(), Err("server does not support TLS")),
        (format!("sslmode=verify-ca&sslrootcert={ca}"), Err("server does not support TLS")),
        (format!("sslmode=verify-full&sslrootcert={ca}"), Err("server does not support TLS")),
    ] {
        assert_outcome(&connect(&server.url(&parameters)).await, &expected, &parameters);
    }
    let error = migrate(server.url("sslmode=require").parse::<ConnectionString>().unwrap()).await.unwrap_err();
    let error = format!("{error:#}");
    assert!(error.contains("cannot connect to the database") && error.contains("does not support TLS"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_and_channel_binding_are_supported() {
    let ours = Authority::new("ours");
    let server = Server::start(&ours.server(&["localhost"]), &ours, &[]).await;
    server.execute(&format!("CREATE ROLE certified LOGIN; CREATE ROLE protected LOGIN PASSWORD '{PASSWORD}'")).await;
    let dir = tempfile::tempdir().unwrap();
    let [certificate, key] = ours.client("certified").write(dir.path(), "client");
    let [_, other_key] = ours.client("other").write(dir.path(), "other");

    let url = |parameters: &str| server.url_of("certified", "127.0.0.1", &format!("sslmode=require&{parameters}"));
    let with_certificate = connect(&url(&format!("sslcert={certificate}&sslkey={key}"))).await;
    assert_outcome(&with_certificate, &Ok(true), "with its certificate");
    assert!(connect(&url("")).await.is_err(), "without a certificate");
    let mixed = connect(&url(&format!("sslcert={certificate}&sslkey={other_key}"))).await;
    assert_outcome(&mixed, &Err("cannot be used together"), "with another's key");

    let bound = server.url_of("protected", "127.0.0.1", "sslmode=require&channel_binding=require");
    assert_outcome(&connect(&bound).await, &Ok(true), "channel binding");
}

/// A proxy in front of a server that records the first bytes of each connection.
struct RecordingProxy {
    address: SocketAddr,
    prefixes: Arc<Mutex<Vec<[u8; 9]>>>,
}

impl RecordingProxy {
    async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let prefixes = Arc::new(Mutex::new(Vec::new()));
        let recorded = prefixes.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, server, recorded.clone()));
            }
        });
        Self { address, prefixes }
    }
}

async fn forward(mut client: TcpStream, server: u16, recorded: Arc<Mutex<Vec<[u8; 9]>>>) {
    let mut server = TcpStream::connect(("127.0.0.1", server)).await.unwrap();
    let mut prefix = [0; 9];
    client.read_exact(&mut prefix[..8]).await.unwrap();
    server.write_all(&prefix[..8]).await.unwrap();
    client.write_all(&[server.read_u8().await.unwrap()]).await.unwrap();
    client.read_exact(&mut prefix[8..]).await.unwrap();
    recorded.lock().unwrap().push(prefix);
    server.write_all(&prefix[8..]).await.unwrap();
    let _ = copy_bidirectional(&mut client, &mut server).await;
}

/// PostgreSQL's SSLRequest message, and the first byte of a TLS handshake.
const SSL_REQUEST_AND_HANDSHAKE: [u8; 9] = [0, 0, 0, 8, 4, 210, 22, 47, 22];

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_statement_is_cancelled_over_tls() {
    let ours = Authority::new("ours");
    let server = Server::start(&ours.server(&["localhost"]), &ours, &[]).await;
    let proxy = RecordingProxy::start(server.port).await;
    let dir = tempfile::tempdir().unwrap();
    let ca = ours.write(dir.path(), "ours.crt");
    let url = format!(
        "postgresql://postgres@localhost:{}/postgres?sslmode=verify-full&sslrootcert={ca}",
        proxy.address.port()
    );
    let db = Db::new(url.parse::<ConnectionString>().unwrap(), limits(&[]).pool());
    let running = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(100)' AND state = 'active'";
    let watcher = db.conn().await.unwrap();
    let count = async || watcher.query_one(running, &[]).await.unwrap().get::<_, i64>(0);

    let conn = db.conn().await.unwrap();
    let sleep = async {
        let _ = conn.query("SELECT pg_sleep(100)", &[]).await;
    };
    let started = eventually("the statement runs", async || count().await > 0);
    tokio::select! {
        () = sleep => panic!("the statement ended by itself"),
        () = started => {}
    }
    let before = proxy.prefixes.lock().unwrap().len();
    drop(conn);

    eventually("the statement has ended", async || count().await == 0).await;
    let prefixes = proxy.prefixes.lock().unwrap().clone();
    assert!(prefixes.len() > before, "no cancel request was sent");
    assert!(prefixes.iter().all(|prefix| *prefix == SSL_REQUEST_AND_HANDSHAKE), "{prefixes:?}");
}
