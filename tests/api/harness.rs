//! The test harness: one PostgreSQL cluster for the whole run, and a [`Tracker`] with a database of its own per test.

use std::{
    cell::RefCell,
    path::PathBuf,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use issue_tracker::{
    auth::{hash_password, new_token},
    config::Limits,
    db::{
        Conn, Db,
        audit::By,
        migrate::{grant_rights, migrate},
        tokens,
        users::{self, NewUser},
    },
    fairness::Flow,
    pb::{
        self, Issue, Role, User, auth_service_client::AuthServiceClient, comment_service_client::CommentServiceClient,
        import_service_client::ImportServiceClient, issue_service_client::IssueServiceClient,
        label_service_client::LabelServiceClient, report_service_client::ReportServiceClient,
        user_service_client::UserServiceClient,
    },
    postgres::{Cluster, Durability},
    server,
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_postgres::{Config, NoTls, Row, types::ToSql};
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use uuid::Uuid;

pub use crate::support::eventually::eventually;
use crate::support::{database::session, scratch::scratch_dir};

/// The password of every user that the harness creates.
pub const PASSWORD: &str = "correct horse battery";
const TEMPLATE: &str = "template_of_tests";
/// The least-privileged role that the service runs as; `docs/operations.md` shows how to create it.
const SERVICE_ROLE: &str = "tracker";
const OWNER_ROLE: &str = "tracker_owner";

/// Time allowed for the cancellation of a statement. Shorter than the service's `lock_timeout`, so a statement that ends
/// within it was cancelled.
pub const CANCELLED_WITHIN: Duration = Duration::from_secs(3);

/// The cluster, which is stopped at exit, and what the tests share of it.
struct SharedCluster {
    cluster: Mutex<Option<Cluster>>,
    dir: PathBuf,
    /// Creates and drops databases.
    maintenance: tokio_postgres::Client,
    /// Runs the connection of `maintenance`: the runtime of a test ends with the test.
    _runtime: tokio::runtime::Runtime,
}

static CLUSTER: OnceLock<SharedCluster> = OnceLock::new();
static DATABASES: AtomicU32 = AtomicU32::new(0);
/// The names of databases whose tests have ended.
static UNUSED_DATABASES: Mutex<Vec<String>> = Mutex::new(Vec::new());

thread_local! {
    /// The databases of the test that runs on this thread.
    static OWN_DATABASES: OwnDatabases = const { OwnDatabases(RefCell::new(Vec::new())) };
}

/// Names of databases. Each test has a thread, which ends after its runtime.
struct OwnDatabases(RefCell<Vec<String>>);

impl Drop for OwnDatabases {
    fn drop(&mut self) {
        UNUSED_DATABASES.lock().unwrap().append(self.0.get_mut());
    }
}

/// A service with a database of its own, an administrator, and a client for each role.
pub struct Tracker {
    pub admin: Client,
    pub member: Client,
    pub viewer: Client,
    instance: Instance,
}

/// A running service.
pub struct Instance {
    pub address: String,
    pub channel: Channel,
    /// Connects to the service's database as superuser.
    pub config: Config,
    pub db: Db,
    /// The session of [`Tracker::sql`], once it is used.
    superuser: tokio::sync::Mutex<Option<tokio_postgres::Client>>,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
}

impl Instance {
    async fn start(config: Config, service_config: Config, limits: Limits) -> Self {
        let db = Db::new(service_config, limits.pool());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let channel = Endpoint::try_from(format!("http://{address}")).unwrap().connect_lazy();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn({
            let db = db.clone();
            async move {
                let shutdown = async { drop(stopped.await) };
                server::run(listener, db, &limits, shutdown).await.unwrap();
            }
        });
        Self { address, channel, config, db, superuser: tokio::sync::Mutex::default(), stop: Some(stop), server }
    }
}

impl std::ops::Deref for Tracker {
    type Target = Instance;

    fn deref(&self) -> &Instance {
        &self.instance
    }
}

impl Tracker {
    pub async fn start() -> Self {
        Self::start_with(limits(&[])).await
    }

    /// Starts a service with these [`limits`].
    pub async fn start_with(limits: Limits) -> Self {
        let config = new_database().await;
        let service_config = as_role(&config, SERVICE_ROLE);
        Self::with_users(Instance::start(config, service_config, limits).await).await
    }

    /// Starts a service on a database that has the schema.
    pub async fn start_on(config: Config, limits: Limits) -> Self {
        let service_config = service_config(&config).await;
        Self::with_users(Instance::start(config, service_config, limits).await).await
    }

    /// Returns a service that runs in a process of its own. `service_config`: the database as the service's role.
    pub async fn connect(config: Config, service_config: Config, limits: Limits, address: &str) -> Self {
        let instance = Instance {
            address: address.to_owned(),
            channel: Endpoint::try_from(format!("http://{address}")).unwrap().connect_lazy(),
            config,
            db: Db::new(service_config, limits.pool()),
            superuser: tokio::sync::Mutex::default(),
            stop: None,
            server: tokio::spawn(async {}),
        };
        Self::with_users(instance).await
    }

    async fn with_users(instance: Instance) -> Self {
        let [admin, member, viewer] = [("admin", Role::Admin), ("member", Role::Member), ("viewer", Role::Viewer)]
            .map(|(name, role)| new_client(&instance.db, &instance.channel, name, role));
        let (admin, member, viewer) = (admin.await, member.await, viewer.await);
        Self { admin, member, viewer, instance }
    }

    /// Starts another service on the same database, with clients for the same users.
    pub async fn start_replica(&self) -> Self {
        self.start_replica_with(limits(&[])).await
    }

    /// As [`Self::start_replica`], with these [`limits`].
    pub async fn start_replica_with(&self, limits: Limits) -> Self {
        let service_config = as_role(&self.config, SERVICE_ROLE);
        let instance = Instance::start(self.config.clone(), service_config, limits).await;
        let client = |client: &Client| Client { channel: instance.channel.clone(), ..client.clone() };
        let (admin, member, viewer) = (client(&self.admin), client(&self.member), client(&self.viewer));
        Self { admin, member, viewer, instance }
    }

    /// Starts a graceful shutdown, as SIGTERM does.
    pub fn stop(&mut self) {
        drop(self.instance.stop.take());
    }

    /// Waits until the service has stopped.
    pub async fn wait_until_stopped(&mut self) {
        (&mut self.instance.server).await.unwrap();
    }

    /// Creates a user with an API token.
    pub async fn user(&self, name: &str, role: Role) -> Client {
        new_client(&self.db, &self.channel, name, role).await
    }

    /// Returns a client that sends this token, or no credentials.
    pub fn client_with_token(&self, token: Option<&str>) -> Client {
        Self::client_on(self.channel.clone(), token.unwrap_or_default())
    }

    /// Returns a client on another channel. An empty token means no credentials.
    pub fn client_on(channel: Channel, token: &str) -> Client {
        Client { user: User::default(), token: token.to_owned(), channel }
    }

    /// Takes connections of the pool, each for a user of its own, so that no share ends it.
    pub async fn hold_connections(&self, count: u128) -> Vec<Conn> {
        let mut held = Vec::new();
        for user in 0..count {
            held.push(self.db.for_flow(Flow::User(Uuid::from_u128(user))).conn().await.unwrap());
        }
        held
    }

    /// Runs a query as superuser, not through the service.
    pub async fn sql(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Vec<Row> {
        let mut superuser = self.superuser.lock().await;
        if superuser.as_ref().is_none_or(tokio_postgres::Client::is_closed) {
            *superuser = Some(self.session().await);
        }
        superuser.as_ref().unwrap().query(sql, params).await.unwrap()
    }

    /// Returns every row of every table as text, sorted. Tests compare two of these to show that a call writes nothing.
    pub async fn contents(&self) -> Vec<String> {
        let tables =
            "SELECT string_agg(format('SELECT %L || t::text FROM %I t', tablename || ' ', tablename), ' UNION ALL ')
            FROM pg_tables WHERE schemaname = 'public'";
        let all: String = self.sql(tables, &[]).await[0].get(0);
        self.sql(&format!("{all} ORDER BY 1"), &[]).await.iter().map(|row| row.get(0)).collect()
    }

    /// Waits until a query returns true.
    pub async fn wait_until(&self, sql: &str) {
        let session = self.session().await;
        eventually(sql, async || session.query_one(sql, &[]).await.unwrap().get(0)).await;
    }

    /// Waits until the service holds no lock and waits for none. Fails after [`CANCELLED_WITHIN`].
    pub async fn wait_until_no_locks(&self) {
        const SQL: &str = "SELECT count(*) = 0 FROM pg_locks JOIN pg_stat_activity USING (pid)
            WHERE usename <> current_user AND datname = current_database()";
        let no_locks = tokio::time::timeout(CANCELLED_WITHIN, self.wait_until(SQL));
        no_locks.await.expect("an abandoned statement is not cancelled");
    }

    /// Returns the number that a query selects.
    pub async fn count(&self, sql: &str) -> i64 {
        self.sql(sql, &[]).await[0].get(0)
    }

    /// Opens a superuser session, for transactions that stay open.
    pub async fn session(&self) -> tokio_postgres::Client {
        session(&self.config).await
    }

    /// Waits until a statement on this database waits for a lock.
    pub async fn wait_until_blocked(&self) {
        self.wait_until(crate::lock_waiters!("> 0")).await;
    }
}

/// Advances the clock of a test and its service, which share one runtime. Time passes as usual before and after it.
pub async fn advance_clock(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// Parses limits from command-line arguments, such as `["--requests", "2"]`, over defaults that suit tests.
pub fn limits(args: &[&str]) -> Limits {
    #[derive(clap::Parser)]
    struct Args {
        #[command(flatten)]
        limits: Limits,
    }
    let args = [vec!["test"], arguments(args)].concat();
    <Args as clap::Parser>::parse_from(args).limits
}

/// Adds defaults that suit tests to command-line arguments.
pub fn arguments<'a>(args: &[&'a str]) -> Vec<&'a str> {
    // clap rejects a repeated flag, so a default is left out if `args` have its flag.
    let defaults = [
        ["--bcrypt-cost", "4"],
        ["--pool-connections", "6"],
        ["--imports", "4"],
        ["--exports", "1"],
        ["--drain-seconds", "1"],
        // On a busy machine a call may wait longer for a connection than the default allows.
        ["--pool-wait-ms", "10000"],
        // All clients of a test have the same address.
        ["--login-failures", "1000"],
        ["--login-failures-per-address", "1000"],
    ];
    let missing = defaults.into_iter().filter(|[name, _]| !args.contains(name)).flatten();
    args.iter().copied().chain(missing).collect()
}

/// Creates an empty database with the schema.
pub async fn new_database() -> Config {
    let shared = tokio::task::spawn_blocking(|| CLUSTER.get_or_init(start_cluster)).await.unwrap();
    let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    let config = shared.cluster.lock().unwrap().as_ref().unwrap().connect_config(&name);
    // Here rather than at the end of their tests, which have no runtime any more.
    let unused = std::mem::take(&mut *UNUSED_DATABASES.lock().unwrap());
    let mut statements: Vec<_> =
        unused.iter().map(|name| format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).collect();
    // Without fsync, copying the files takes half the processor time of logging their pages.
    statements.push(format!("CREATE DATABASE {name} TEMPLATE {TEMPLATE} OWNER {OWNER_ROLE} STRATEGY file_copy"));
    // CREATE DATABASE does not copy privileges on the database itself from the template.
    let [.., revoke, grant] = &documented_sql()[..] else { panic!("the SQL ends with grants") };
    statements.extend([revoke, grant].map(|statement| on_database(statement, &name)));
    for statement in statements {
        shared.maintenance.batch_execute(&statement).await.unwrap();
    }
    OWN_DATABASES.with(|own| own.0.borrow_mut().push(name));
    config
}

/// Returns a configuration for the service's role. Creates the role and grants its privileges if they are missing.
pub async fn service_config(config: &Config) -> Config {
    let client = session(config).await;
    let role = client.query_opt("SELECT FROM pg_roles WHERE rolname = $1", &[&SERVICE_ROLE]).await.unwrap();
    if role.is_none() {
        for statement in documented_sql().iter().filter(|statement| statement.starts_with("CREATE ROLE")) {
            client.batch_execute(statement).await.unwrap();
        }
    }
    // The database was not created from the template, which has the privileges.
    let sql = format!("SELECT has_table_privilege('{SERVICE_ROLE}', to_regclass('users'), 'SELECT')");
    if client.query_one(&sql, &[]).await.unwrap().get::<_, Option<bool>>(0) == Some(false) {
        grant_rights(config, SERVICE_ROLE).await.unwrap();
    }
    as_role(config, SERVICE_ROLE)
}

/// Returns a configuration for the role that owns the schema.
pub fn owner_config(config: &Config) -> Config {
    as_role(config, OWNER_ROLE)
}

fn as_role(config: &Config, role: &str) -> Config {
    let mut config = config.clone();
    config.user(role);
    config
}

/// Returns the statements of `docs/operations.md` that create the database and its roles, one per line.
pub fn documented_sql() -> Vec<&'static str> {
    let (_, rest) = include_str!("../../docs/operations.md").split_once("```sql\n").expect("the document has SQL");
    let statements: Vec<_> = rest.split("```").next().unwrap().lines().collect();
    assert!(statements.iter().all(|statement| statement.ends_with(';')), "{statements:?}");
    statements
}

fn on_database(statement: &str, name: &str) -> String {
    statement.replace("DATABASE tracker", &format!("DATABASE {name}"))
}

/// Executes statements and closes the session, because a database with a session cannot be copied as a template.
pub async fn execute(config: &Config, sql: &str) {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    client.batch_execute(sql).await.unwrap();
    drop(client);
    connection.await.unwrap().unwrap();
}

fn start_cluster() -> SharedCluster {
    remove_stale_clusters();
    raise_open_files();
    let dir = scratch_dir().join(format!("{DIR_PREFIX}{}", std::process::id()));
    let cluster = Cluster::start(&dir, Durability::Throwaway).unwrap();
    let (maintenance, template) = (cluster.connect_config("postgres"), cluster.connect_config(TEMPLATE));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let maintenance = runtime.block_on(async {
        for statement in documented_sql() {
            execute(&maintenance, &on_database(statement, TEMPLATE)).await;
        }
        let owner = owner_config(&template);
        migrate(&owner).await.unwrap();
        grant_rights(&owner, SERVICE_ROLE).await.unwrap();
        session(&maintenance).await
    });
    // SAFETY: the handler only uses statics.
    assert_eq!(unsafe { libc::atexit(stop_cluster) }, 0);
    SharedCluster { cluster: Mutex::new(Some(cluster)), dir, maintenance, _runtime: runtime }
}

const DIR_PREFIX: &str = "issue-tracker-api-test-";

extern "C" fn stop_cluster() {
    if let Some(shared) = CLUSTER.get() {
        drop(shared.cluster.lock().ok().and_then(|mut cluster| cluster.take()));
        let _ = std::fs::remove_dir_all(&shared.dir);
    }
}

/// Raises the limit of open files, usually 1,024: this process has both ends of every connection.
fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure outlives both calls.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
}

/// Removes the directories of test runs that were killed.
fn remove_stale_clusters() {
    for entry in std::fs::read_dir(scratch_dir()).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        if let Some(pid) = name.strip_prefix(DIR_PREFIX)
            && !PathBuf::from(format!("/proc/{pid}")).exists()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// A user and a token, with generated clients that send it.
#[derive(Clone)]
pub struct Client {
    pub user: User,
    pub token: String,
    channel: Channel,
}

async fn new_client(db: &Db, channel: &Channel, name: &str, role: Role) -> Client {
    let conn = db.conn().await.unwrap();
    let password_hash = hash_password(&PASSWORD.into(), 4).unwrap();
    let new = NewUser { username: name, role, disabled: false, password_hash: &password_hash };
    let user = users::create(&conn, new, By::COMMAND_LINE).await.unwrap();
    let (token, sha256) = new_token().unwrap();
    let user_id = user.id.parse().unwrap();
    tokens::create_api_token(&conn, user_id, &sha256, "test", None, By::COMMAND_LINE).await.unwrap();
    Client { user, token, channel: channel.clone() }
}

type Service = InterceptedService<Channel, Bearer>;

#[derive(Clone)]
pub struct Bearer(String);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if !self.0.is_empty() {
            let value = MetadataValue::try_from(format!("Bearer {}", self.0)).unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

impl Client {
    fn bearer(&self) -> Bearer {
        Bearer(self.token.clone())
    }

    pub fn auth(&self) -> AuthServiceClient<Service> {
        AuthServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn users(&self) -> UserServiceClient<Service> {
        UserServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn issues(&self) -> IssueServiceClient<Service> {
        IssueServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn comments(&self) -> CommentServiceClient<Service> {
        CommentServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn labels(&self) -> LabelServiceClient<Service> {
        LabelServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn imports(&self) -> ImportServiceClient<Service> {
        ImportServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    pub fn reports(&self) -> ReportServiceClient<Service> {
        ReportServiceClient::with_interceptor(self.channel.clone(), self.bearer())
    }

    /// Files an issue with this title.
    pub async fn file(&self, title: &str) -> Issue {
        self.file_as(Issue { title: title.to_owned(), ..Issue::default() }).await
    }

    pub async fn file_as(&self, issue: Issue) -> Issue {
        let request = pb::CreateIssueRequest { issue: Some(issue), ..Default::default() };
        self.issues().create_issue(request).await.unwrap().into_inner()
    }

    pub async fn get(&self, id: &str) -> Issue {
        let request = pb::GetIssueRequest { id: id.to_owned(), view: pb::IssueView::Full.into() };
        self.issues().get_issue(request).await.unwrap().into_inner()
    }

    /// Creates a label with this name.
    pub async fn label(&self, name: &str) -> pb::Label {
        let label = pb::Label { name: name.to_owned(), ..Default::default() };
        let request = pb::CreateLabelRequest { label: Some(label), ..Default::default() };
        self.labels().create_label(request).await.unwrap().into_inner()
    }

    /// Adds a comment to an issue.
    pub async fn comment(&self, issue_id: &str, content: &str) -> pb::Comment {
        let comment = pb::Comment { issue_id: issue_id.to_owned(), content: content.to_owned(), ..Default::default() };
        let request = pb::CreateCommentRequest { comment: Some(comment), ..Default::default() };
        self.comments().create_comment(request).await.unwrap().into_inner()
    }
}

/// A query whether the number of sessions that wait for a lock is, for example, `"= 2"`, for [`Tracker::wait_until`].
#[macro_export]
macro_rules! lock_waiters {
    ($is:literal) => {
        concat!(
            "SELECT count(*) ",
            $is,
            " FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()",
            // Mutations first wait for a millisecond, without a permit for lock waits.
            " AND state_change < clock_timestamp() - interval '50 ms'"
        )
    };
}

/// Asserts that a call failed with this code and reason, in exactly one `ErrorInfo` of domain `issuetracker`. Returns the
/// status.
#[track_caller]
pub fn assert_error<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, reason: &str) -> Status {
    let status = result.expect_err("the call succeeded");
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.get_error_details_vec();
    let infos: Vec<_> = details
        .iter()
        .filter_map(|detail| match detail {
            tonic_types::ErrorDetail::ErrorInfo(info) => Some(info),
            _ => None,
        })
        .collect();
    assert_eq!(infos.len(), 1, "expected exactly one ErrorInfo: {status:?}");
    assert_eq!((infos[0].domain.as_str(), infos[0].reason.as_str()), ("issuetracker", reason), "{status:?}");
    status
}

/// Asserts the error as [`assert_error`] does, and that it has a `RetryInfo` with a delay.
#[track_caller]
pub fn assert_retriable<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, reason: &str) {
    let status = assert_error(result, code, reason);
    assert!(status.get_details_retry_info().is_some_and(|retry| retry.retry_delay.is_some()), "{status:?}");
}

/// Returns the fields of an error's `BadRequest`.
pub fn bad_fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|violation| violation.field).collect()
}

/// Returns the types and names in an error's `ResourceInfo`s.
pub fn resources(status: &Status) -> Vec<(String, String)> {
    let details = status.get_error_details_vec().into_iter();
    let resources = details.filter_map(|detail| match detail {
        tonic_types::ErrorDetail::ResourceInfo(info) => Some((info.resource_type, info.resource_name)),
        _ => None,
    });
    resources.collect()
}

/// Asserts that a call failed with INVALID_ARGUMENT and names exactly these fields. Returns the status.
#[track_caller]
pub fn assert_invalid<T: std::fmt::Debug>(result: Result<T, Status>, fields: &[&str]) -> Status {
    let status = assert_error(result, Code::InvalidArgument, "INVALID");
    assert_eq!(bad_fields(&status), fields, "{status:?}");
    status
}

/// Returns the value of a key in `ErrorInfo.metadata`.
pub fn error_metadata(status: &Status, key: &str) -> Option<String> {
    status.get_error_details().error_info().and_then(|info| info.metadata.get(key).cloned())
}
