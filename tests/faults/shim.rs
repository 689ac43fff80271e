//! Simulates a full disk and a wrong clock for the service and its embedded database, without privileges: `shim.c` is
//! preloaded into both.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

use crate::support::{process::Dir, service::program};

const CLOCK_AT: u64 = 0;
const DISK_AT: u64 = 8;
const CONTROL_BYTES: u64 = 16;

pub struct Shim {
    library: PathBuf,
    control_path: PathBuf,
    control: File,
    /// Holds wrapper scripts that start PostgreSQL's programs with the library.
    bin_dir: PathBuf,
}

impl Shim {
    /// Compiles the library for a service whose files are in `dir`.
    pub fn new(dir: &Dir) -> Self {
        let (library, control_path, bin_dir) = (dir.path("shim.so"), dir.path("control"), dir.path("bin"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/shim.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o"]).arg(&library).arg(source);
        let compiled = compiler.output().expect("cc is installed, because Rust links with it");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let control = File::create(&control_path).unwrap();
        control.set_len(CONTROL_BYTES).unwrap();
        fs::create_dir(&bin_dir).unwrap();
        let shim = Self { library, control_path, control, bin_dir };
        for name in ["postgres", "initdb"] {
            shim.wrap(name, dir);
        }
        shim
    }

    /// Writes a wrapper script: the service passes few environment variables on to PostgreSQL, so the script sets the
    /// rest.
    fn wrap(&self, name: &str, dir: &Dir) {
        let path = self.bin_dir.join(name);
        let script = format!(
            "#!/bin/sh\nLD_PRELOAD={} FAULTS_CONTROL={} FAULTS_DIRECTORY={} exec {} \"$@\"\n",
            self.library.display(),
            self.control_path.display(),
            dir.data(),
            real_bin_dir().join(name).display()
        );
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Returns a command for the binary with the library preloaded.
    pub fn program(&self, args: &[&str]) -> Command {
        let mut command = program(args);
        command.env("PG_BINDIR", &self.bin_dir);
        command.env("LD_PRELOAD", &self.library).env("FAULTS_CONTROL", &self.control_path);
        command
    }

    pub fn fill_disk(&self, is_full: bool) {
        self.control.write_all_at(&i64::from(is_full).to_ne_bytes(), DISK_AT).unwrap();
    }

    /// Sets how far the simulated clock is ahead of the real one, in seconds.
    pub fn set_clock(&self, seconds: i64) {
        self.control.write_all_at(&seconds.to_ne_bytes(), CLOCK_AT).unwrap();
    }
}

/// Returns the directory of PostgreSQL's programs that the service would choose.
fn real_bin_dir() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut versions: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    versions.sort();
    let chosen = std::env::var_os("PG_BINDIR").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs = chosen.into_iter().chain(versions.into_iter().rev()).chain(std::env::split_paths(&path));
    let found = dirs.find(|dir| dir.join("postgres").is_file() && dir.join("initdb").is_file());
    found.expect("PostgreSQL is installed")
}
