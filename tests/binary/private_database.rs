//! The private database: its binaries, its users, and paths that need quotes.

use std::{
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use super::*;

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
    assert_refused(&user(&dir, "reset-password", "nobody", NEW_PASSWORD), "nobody");
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

/// Runs a command with a pseudoterminal as its standard input and controlling terminal; types `input` and returns what
/// the terminal shows.
fn in_terminal(mut command: Command, input: &str) -> (std::process::ExitStatus, String) {
    let (mut master, mut slave) = (0, 0);
    let (no_name, no_termios, no_size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: openpty writes two descriptors, and the other pointers may be null.
    assert_eq!(unsafe { libc::openpty(&raw mut master, &raw mut slave, no_name, no_termios, no_size) }, 0);
    // SAFETY: both descriptors were just opened and have no other owner.
    let (master, slave) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
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
    // Closes this process's copies of the slave end, so that reading ends with the child.
    drop(command);
    let mut terminal = File::from(master);
    let mut shown = Vec::new();
    let mut buffer = [0; 1024];
    let mut typed = 0;
    while let Ok(count @ 1..) = terminal.read(&mut buffer) {
        shown.extend_from_slice(&buffer[..count]);
        // One line for each prompt, once echo is off.
        if String::from_utf8_lossy(&shown).matches("assword: ").count() > typed {
            typed += 1;
            // The program prints the prompt before it turns echo off.
            wait_until("echo is off", || !echoes(&terminal));
            terminal.write_all(input.as_bytes()).unwrap();
        }
    }
    (child.wait().unwrap(), String::from_utf8_lossy(&shown).into_owned())
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
fn printed_commands_work_for_a_data_directory_with_spaces_and_quotes() {
    let dir = Dir::new();
    let data = dir.path("it's data");
    let mut service = Service::start(&dir, program(&["--data-dir", data.to_str().unwrap()]));
    let assignment = service.stdout.iter().find(|line| line.starts_with("TOKEN=")).unwrap();

    let shell = Command::new("sh").args(["-c", &format!("{assignment} && printf %s \"$TOKEN\"")]).output().unwrap();

    let token = fs::read_to_string(data.join("admin.token")).unwrap();
    assert_eq!(text(&shell.stdout), token.trim_end(), "{shell:?}");
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

    let output = run(&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()]);

    assert_refused(&output, "apt-get install postgresql-98");
}
