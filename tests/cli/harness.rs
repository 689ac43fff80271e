//! The program, and the real server, as processes.

use super::*;

/// A test that waits longer than this hangs.
pub const HANG: Duration = Duration::from_secs(120);

pub struct Dir(tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.text(name)
    }

    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
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
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The output of a program that ends by itself, killed if it does not.
pub fn finished(child: Child) -> Output {
    let pid = child.id();
    let (done, is_done) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    is_done
        .recv_timeout(HANG)
        .unwrap_or_else(|_| {
            signal(pid, libc::SIGKILL);
            panic!("the program does not end");
        })
        .unwrap()
}

pub fn signal(pid: u32, signal: i32) {
    assert!(pid > 1);
    // SAFETY: kill takes two numbers; the pid is that of a process that the test started.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// What a program did.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn of(child: Child) -> Self {
        let output = finished(child);
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn assert_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    #[track_caller]
    pub fn assert_says(&self, text: &str) {
        assert!(self.stdout.contains(text) || self.stderr.contains(text), "{text:?} is not in {self:#?}");
    }

    pub fn json(&self, kind: &str) -> Vec<Value> {
        let objects = self.stdout.lines().map(|line| serde_json::from_str::<Value>(line).expect(line));
        objects.filter_map(|mut object| object.get_mut(kind).map(Value::take)).collect()
    }
}

pub fn lines(from: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines() {
            let _ = sender.send(line.unwrap());
        }
    });
    lines
}

/// A service with a database of its own, killed when the test ends in whatever way.
pub struct Service {
    pub child: Child,
    pub address: String,
    token_file: String,
}

impl Service {
    pub fn start(dir: &Dir, listen: &str) -> Self {
        let log = File::options().create(true).append(true).open(dir.path("service.log")).unwrap();
        let mut command = program(&["--listen", listen, "--data-dir", &dir.text("data")]);
        let mut child = command.stderr(log).spawn().unwrap();
        let lines = lines(child.stdout.take().unwrap());
        let mut service = Self { child, address: String::new(), token_file: dir.text("data/admin.token") };
        while service.address.is_empty() {
            let line = lines.recv_timeout(HANG).unwrap_or_else(|_| {
                panic!("no more output; the log says: {}", fs::read_to_string(dir.path("service.log")).unwrap())
            });
            service.address = line.strip_prefix("listening on ").unwrap_or_default().to_owned();
        }
        // The file is there when the three lines behind the address are.
        lines.recv_timeout(HANG).unwrap();
        service
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let (subcommand, args) = args.split_first().unwrap();
        program(&[&[subcommand, "--server", &self.address, "--token-file", &self.token_file], args].concat())
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).spawn().unwrap())
    }

    /// Of all issues.
    pub async fn titles(&self) -> Vec<String> {
        let channel = Endpoint::try_from(format!("http://{}", self.address)).unwrap().connect_lazy();
        let mut issues = IssueServiceClient::new(channel);
        let token = fs::read_to_string(&self.token_file).unwrap();
        let bearer = MetadataValue::try_from(format!("Bearer {}", token.trim())).unwrap();
        let (mut titles, mut page_token) = (Vec::new(), String::new());
        loop {
            let mut request =
                Request::new(pb::ListIssuesRequest { page_size: 1_000, page_token, ..Default::default() });
            request.metadata_mut().insert("authorization", bearer.clone());
            let page = issues.list_issues(request).await.unwrap().into_inner();
            titles.extend(page.issues.into_iter().map(|issue| issue.title));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                titles.sort();
                return titles;
            }
        }
    }

    /// Ends it as a crash does.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn stop(mut self) {
        signal(self.child.id(), libc::SIGTERM);
        self.child.wait().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
