//! The private database: its binaries, its users, and paths that need quotes.

use std::{
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::Command,
};

use super::{
    support::{
        certificates::Authority,
        terminal::{open_terminal, read_terminal},
    },
    *,
};

/// Runs a `user` command on the data directory with a password on standard input.
fn user(dir: &Dir, command: &str, username: &str, password: &str) -> Output {
    let mut child =
        program(&["user", command, "--data-dir", &dir.data(), username]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    finished(child)
}

fn create_user(dir: &Dir, username: &str) -> Output {
    user(dir, "create", username, SECRET)
}

#[tokio::test(flavor = "multi_thread")]
async fn user_reset_password_sets_the_password_and_ends_the_sessions() {
    const NEW_PASSWORD: &str = "a-new-password-18";
    let dir = Dir::new();
    let mut service = Service::embedded(&dir);
    assert!(create_user(&dir, "ada").status.success());
    let session = login(&service, "ada", SECRET).await.unwrap();
    let list = async || service.issues().list_issues(with_token(&session, ListIssuesRequest::default())).await;
    list().await.unwrap();

    let reset = user(&dir, "reset-password", "ada", NEW_PASSWORD);

    assert!(reset.status.success(), "{reset:?}");
    assert_eq!(login(&service, "ada", SECRET).await.unwrap_err().code(), Code::Unauthenticated);
    login(&service, "ada", NEW_PASSWORD).await.unwrap();
    // The service caches valid tokens for a few seconds.
    eventually("the session has ended", async || list().await.is_err_and(|e| e.code() == Code::Unauthenticated)).await;
    assert_refused(&user(&dir, "reset-password", "absent", NEW_PASSWORD), "absent");
    assert_refused(&user(&dir, "reset-password", "ada", "short"), "password");
    service.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn user_create_works_on_the_private_database_with_and_without_a_running_service() {
    let dir = Dir::new();
    let before = create_user(&dir, "before");
    assert!(before.status.success(), "{before:?}");
    assert_eq!(dir.server_pid().filter(|pid| is_running(*pid)), None);

    let mut service = Service::embedded(&dir);
    let during = create_user(&dir, "during");
    assert!(during.status.success(), "{during:?}");

    for username in ["before", "during"] {
        login(&service, username, SECRET).await.unwrap();
    }
    service.stop();
}

fn echoes(terminal: &File) -> bool {
    // SAFETY: a termios is numbers, for which zero is valid; the descriptor is open.
    unsafe {
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings), 0);
        settings.c_lflag & libc::ECHO != 0
    }
}

/// Runs a command with a pseudo-terminal as its standard input and controlling terminal. Types `input` at each prompt, and
/// returns what the terminal shows.
fn in_terminal(mut command: Command, input: &str) -> (std::process::ExitStatus, String) {
    let (mut terminal, program_end) = open_terminal();
    command.stdin(program_end.try_clone().unwrap()).stdout(program_end.try_clone().unwrap()).stderr(program_end);
    // SAFETY: setsid and ioctl are async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    // Closes this process's copies of the program's end, so that reading ends with the child.
    drop(command);
    let mut typed = 0;
    let shown = read_terminal(&mut terminal, |terminal, shown| {
        if shown.matches("assword: ").count() > typed {
            typed += 1;
            // The program prints the prompt before it turns echo off.
            wait_until("echo is off", || !echoes(terminal));
            terminal.write_all(input.as_bytes()).unwrap();
        }
    });
    (child.wait().unwrap(), shown)
}

#[tokio::test(flavor = "multi_thread")]
async fn password_prompt_in_a_terminal_does_not_echo() {
    let dir = Dir::new();
    let command = program(&["user", "create", "--data-dir", &dir.data(), "ada"]);

    let (status, shown) = in_terminal(command, &format!("{SECRET}\n"));

    assert!(status.success(), "{shown}");
    assert!(shown.contains("New password: ") && shown.contains("Repeat the password: "), "{shown}");
    assert!(!shown.contains(SECRET), "{shown}");
    let mut service = Service::embedded(&dir);
    login(&service, "ada", SECRET).await.unwrap();
    service.stop();
}

#[test]
fn printed_commands_work_with_spaces_and_quotes_in_paths() {
    let dir = Dir::new();
    let (data, tls) = (dir.path("it's data"), dir.path("it's tls"));
    fs::create_dir(&tls).unwrap();
    let [certificate, key] = Authority::new("ours").server(&["tracker.example"]).write(&tls, "server");
    let args = ["--data-dir", data.to_str().unwrap(), "--tls-cert", &certificate, "--tls-key", &key];
    let mut service = Service::start(&dir, program(&args));
    let commands = service.stdout[service.stdout.len() - 3..].join("\n");

    // A function in place of grpcurl prints its arguments, one per line.
    let script = format!("grpcurl() {{ printf '%s\\n' \"$@\"; }}\n{commands}");
    let shell = Command::new("sh").args(["-euc", &script]).output().unwrap();

    let token = fs::read_to_string(data.join("admin.token")).unwrap();
    let header = format!("authorization: Bearer {}", token.trim_end());
    let flags = ["-cacert", &certificate, "-authority", "tracker.example", "-H", &header];
    let create = ["-d", "{\"issue\":{\"title\":\"My first issue\"}}", &service.address];
    let create = [&flags[..], &create, &["issuetracker.v1.IssueService/CreateIssue"]].concat();
    let list = [&flags[..], &[&service.address, "issuetracker.v1.IssueService/ListIssues"]].concat();
    assert_eq!(text(&shell.stdout).lines().collect::<Vec<_>>(), [create, list].concat(), "{shell:?}");
    service.stop();
}

#[test]
fn cluster_of_another_version_is_refused_and_left_unchanged() {
    let dir = Dir::new();
    let bin = dir.path("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["postgres", "initdb"] {
        fs::write(bin.join(name), "#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n").unwrap();
        fs::set_permissions(bin.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    Service::embedded(&dir).stop();
    let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);

    let output = finished(command.env("PG_BINDIR", &bin).spawn().unwrap());

    assert_refused(&output, "is PostgreSQL 99, and the cluster was created by version ");
    Service::embedded(&dir).stop();
}

#[test]
fn missing_binaries_of_a_clusters_version_are_named_with_their_package() {
    let dir = Dir::new();
    let cluster = dir.path("data/cluster");
    fs::create_dir_all(&cluster).unwrap();
    fs::write(cluster.join("PG_VERSION"), "98\n").unwrap();

    let mut command = program(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);
    let output = finished(command.env_remove("PG_BINDIR").spawn().unwrap());

    assert_refused(&output, "apt-get install postgresql-98");
}

/// The systemd unit in `deploy/` denies memory that is writable and executable.
#[tokio::test(flavor = "multi_thread")]
async fn private_database_compiles_no_statements() {
    let dir = Dir::new();
    let _service = Service::embedded(&dir);
    let jit = session(&dir.database()).await.query_one("SHOW jit", &[]).await.unwrap();
    assert_eq!(jit.get::<_, String>(0), "off");
}
