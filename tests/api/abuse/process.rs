//! The service as a process of its own, whose memory can be measured.

use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use tokio_postgres::config::Host;

use crate::harness::{Tracker, arguments, limits, new_database, service_config};

/// A running service, killed on drop.
pub struct ServiceProcess(Child);

impl ServiceProcess {
    /// Starts a service on a new database.
    pub async fn start(args: &[&str]) -> (Tracker, Self) {
        let config = new_database().await;
        let service_config = service_config(&config).await;
        let [Host::Unix(socket_dir), ..] = service_config.get_hosts() else { panic!("the database has a socket") };
        let (user, database) = (service_config.get_user().unwrap(), service_config.get_dbname().unwrap());
        let url = format!("host={} user={user} dbname={database}", socket_dir.display());
        let mut command = Command::new(env!("CARGO_BIN_EXE_issue-tracker"));
        command.args(["serve", "--listen", "127.0.0.1:0", "--log-level", "error", "--database-url", &url]);
        command.args(arguments(args)).stdin(Stdio::null()).stdout(Stdio::piped());
        // SAFETY: the closure makes one system call. It stops the service when the test is killed.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let mut process = Self(command.spawn().unwrap());
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").expect("the service has not started");
        (Tracker::connect(config, service_config, limits(args), address).await, process)
    }

    /// Returns the peak of the resident memory since the last reset, in KiB.
    pub fn peak_kib(&self) -> u64 {
        memory_kib(self.0.id(), "VmHWM:")
    }

    pub fn reset_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.0.id()), "5").unwrap();
    }
}

impl Drop for ServiceProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns a field of `/proc/PID/status` in KiB, or 0 if the process does not exist.
pub fn memory_kib(pid: u32, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    value.and_then(|kib| kib.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}
