//! A service that may open few files.

use std::{io, net::TcpStream, os::unix::process::CommandExt};

use super::*;

const FILES_MAX: u64 = 64;

#[tokio::test(flavor = "multi_thread")]
async fn where_files_are_short_it_is_told_and_idle_connections_make_room() {
    let external = External::start(Durability::Throwaway);
    let mut command = program(&["--database-url", &external.url()]);
    let limit = || {
        let limit = libc::rlimit { rlim_cur: FILES_MAX, rlim_max: FILES_MAX };
        // SAFETY: the call is given a structure that lives as long as it takes.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec it makes but this one call, which takes no lock.
    unsafe { command.pre_exec(limit) };
    let mut service = Service::start(&external.dir, command);
    assert!(service.log().contains("the process may open fewer files than --connections need"), "{}", service.log());

    let idle: Vec<_> = (0..FILES_MAX + 20).map(|_| TcpStream::connect(&service.address).unwrap()).collect();
    wait_until("no more connections are taken", || service.log().contains("cannot accept a connection"));
    let health = run(&["health", "--listen", &service.address]);

    assert_eq!((health.status.code(), text(&health.stdout)), (Some(0), "SERVING\n"), "{}", text(&health.stderr));
    drop(idle);
    assert_eq!(service.stop().code(), Some(0));
}
