//! The release build of the service, started as a separate process.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};
use issue_tracker::{
    auth::new_token,
    db::{
        audit::By,
        migrate::migrate,
        tokens,
        users::{self, NewUser},
    },
    pb::Role,
    postgres::Cluster,
};

use crate::dataset;

/// The pool size for which the target ratios are defined.
const POOL_CONNECTIONS: u32 = 8;
pub const USERNAME: &str = "bench";
pub const PASSWORD: &str = "of the benchmark";
/// The service's default.
const BCRYPT_COST: u32 = 12;

pub struct Service {
    child: Child,
    pub database: &'static str,
    /// The number of issues in the data set.
    pub issues: u32,
    pub address: String,
    /// The API token of a member.
    pub token: String,
    /// Resident memory before the first call, in KiB.
    pub idle_kib: u64,
}

impl Service {
    /// Creates a database, starts the service on it and inserts the data set.
    pub fn start(cluster: &Cluster, dir: &Path, database: &'static str, issues: u32) -> anyhow::Result<Self> {
        let token = prepare(cluster, database)?;
        let url = format!("host={} user=postgres dbname={database}", cluster.socket_dir().display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_issue-tracker"));
        // SAFETY: the closure makes one system call. It stops the service when the benchmark is killed.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let mut child = command
            .args(["--listen", "127.0.0.1:0", "--database-url", &url])
            .args(["--pool-connections", &POOL_CONNECTIONS.to_string(), "--imports", "2"])
            .stdout(Stdio::piped())
            .stderr(File::create(dir.join(format!("{database}.log")))?)
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        let Some(address) = line.trim().strip_prefix("listening on ") else { bail!("the service did not start") };
        let mut service = Self { child, database, issues, address: address.to_owned(), token, idle_kib: 0 };
        std::thread::sleep(std::time::Duration::from_secs(1));
        service.idle_kib = service.memory_kib("VmRSS")?;
        eprintln!("loading {issues} issues");
        dataset::load(cluster, database, issues)?;
        Ok(service)
    }

    /// Returns a field of `/proc/PID/status` in KiB: `VmRSS` is the current memory, `VmHWM` the peak since the last
    /// reset.
    pub fn memory_kib(&self, field: &str) -> anyhow::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with(field)).context("no such field")?;
        Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
    }

    pub fn reset_peak_memory(&self) -> anyhow::Result<()> {
        Ok(std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5")?)
    }

    pub fn stop(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Creates a database with its schema and one member. Returns the token of the member.
fn prepare(cluster: &Cluster, database: &str) -> anyhow::Result<String> {
    let (maintenance, config) = (cluster.connect_config("postgres"), cluster.connect_config(database));
    tokio::runtime::Runtime::new()?.block_on(async {
        let (client, connection) = maintenance.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        client.batch_execute(&format!("CREATE DATABASE {database}")).await?;
        migrate(&config).await?;
        let db = issue_tracker::db::Db::new(config, issue_tracker::db::PoolOptions::SMALL);
        let conn = db.conn().await?;
        let password_hash = bcrypt::hash(PASSWORD, BCRYPT_COST)?.into();
        let new = NewUser { username: USERNAME, role: Role::Member, disabled: false, password_hash: &password_hash };
        let user = users::create(&conn, new, By::COMMAND_LINE).await?;
        let (token, sha256) = new_token()?;
        tokens::create_api_token(&conn, user.id.parse()?, &sha256, "bench", None, By::COMMAND_LINE).await?;
        Ok(token)
    })
}
