//! Tests the service under a low limit of open files.

use std::{io, net::TcpStream, os::unix::process::CommandExt};

use super::*;

const FILES_MAX: u64 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn low_file_limit_is_logged_and_idle_connections_are_evicted_for_new_ones() {
    let external = External::start(Durability::Throwaway);
    let mut command = program(&["--database-url", &external.url()]);
    let set_limit = || {
        let limit = libc::rlimit { rlim_cur: FILES_MAX, rlim_max: FILES_MAX };
        // SAFETY: the pointer is valid for the duration of the call.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes only this system call, which takes no lock.
    unsafe { command.pre_exec(set_limit) };
    let mut service = Service::start(&external.dir, command);
    assert!(service.log().contains("open file limit found too low"), "{}", service.log());

    let idle: Vec<_> = (0..FILES_MAX + 20).map(|_| TcpStream::connect(&service.address).unwrap()).collect();
    wait_until("accepting connections fails", || service.log().contains("accept failed"));
    let health = run(&["health", "--listen", &service.address]);

    assert_eq!((health.status.code(), text(&health.stdout)), (Some(0), "SERVING\n"), "{}", text(&health.stderr));
    drop(idle);
    assert_eq!(service.stop().code(), Some(0));
}
