//! The PostgreSQL binaries: `PG_BINDIR`, Debian's packages, or PATH.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, ensure};

/// Directory with one subdirectory for each version that Debian's packages install.
const VERSIONS_DIR: &str = "/usr/lib/postgresql";

/// Returns the directory of the binaries: `PG_BINDIR`; else those of the cluster's `version`, or the newest for a new
/// cluster (`None`). A cluster is never opened by another major version. Fails with the name of the missing package.
pub(super) fn find(version: Option<&str>) -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("PG_BINDIR").filter(|dir| !dir.is_empty()) {
        return explicit(&PathBuf::from(dir), version);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = || std::env::split_paths(&path).find(|dir| dir.is_absolute() && fits(dir, version));
    installed(Path::new(VERSIONS_DIR), version).or_else(in_path).with_context(|| match version {
        Some(version) => format!(
            "no PostgreSQL {version} server in PG_BINDIR, {VERSIONS_DIR} or PATH, and the cluster was created by version \
             {version}: install the package postgresql-{version} (apt-get install postgresql-{version})"
        ),
        None => format!(
            "no PostgreSQL server in PG_BINDIR, {VERSIONS_DIR} or PATH: install the package postgresql (apt-get install \
             postgresql)"
        ),
    })
}

fn explicit(dir: &Path, version: Option<&str>) -> anyhow::Result<PathBuf> {
    ensure!(
        has_server(dir),
        "PG_BINDIR {} contains no postgres and initdb: set it to the directory of a server's binaries or unset it; the \
         package postgresql provides them (apt-get install postgresql)",
        dir.display()
    );
    if let (Some(found), Some(version)) = (server_version(dir), version) {
        ensure!(
            found == version,
            "PG_BINDIR {} is PostgreSQL {found}, and the cluster was created by version {version}: unset it or set it to \
             the matching binaries",
            dir.display()
        );
    }
    dir.canonicalize().with_context(|| format!("cannot resolve PG_BINDIR={}", dir.display()))
}

/// Returns the newest of the installed servers, or the one of `version`.
fn installed(versions: &Path, version: Option<&str>) -> Option<PathBuf> {
    fs::read_dir(versions)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let numbers: Vec<u32> = name.split('.').map(str::parse).collect::<Result<_, _>>().ok()?;
            let is_wanted = version.is_none_or(|version| version == name);
            is_wanted.then(|| (numbers, entry.path().join("bin")))
        })
        .filter(|(_, bin)| has_server(bin))
        .max()
        .map(|(_, bin)| bin)
}

fn fits(dir: &Path, version: Option<&str>) -> bool {
    has_server(dir) && version.is_none_or(|version| server_version(dir).as_deref() == Some(version))
}

/// Packages of the client programs alone create such a directory, too.
fn has_server(dir: &Path) -> bool {
    ["postgres", "initdb"].iter().all(|name| dir.join(name).is_file())
}

/// Returns the major version, as PG_VERSION has it: the first number, or two of them before PostgreSQL 10.
fn server_version(bin_dir: &Path) -> Option<String> {
    // Such as "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
    let output = Command::new(bin_dir.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let version = text.split(' ').nth(2)?.trim();
    let digits = version.split(|char: char| !char.is_ascii_digit()).next()?;
    let is_two_part = digits.parse::<u32>().ok()? < 10;
    Some(if is_two_part { version.split('.').take(2).collect::<Vec<_>>().join(".") } else { digits.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn install(versions: &Path, version: &str, programs: &[&str]) -> PathBuf {
        let bin = versions.join(version).join("bin");
        fs::create_dir_all(&bin).unwrap();
        for program in programs {
            let path = bin.join(program);
            fs::write(&path, format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version}.7 (Debian)'\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        bin
    }

    #[test]
    fn new_cluster_takes_the_newest_server_and_existing_cluster_takes_its_own_version() {
        let versions = tempfile::tempdir().unwrap();
        let versions = versions.path();
        assert_eq!(installed(versions, None), None);

        install(versions, "9.6", &["postgres", "initdb"]);
        let bin = install(versions, "15", &["postgres", "initdb"]);
        let newest = install(versions, "17", &["postgres", "initdb"]);
        install(versions, "18", &["psql"]);
        install(versions, "common", &["postgres", "initdb"]);

        assert_eq!(installed(versions, None), Some(newest.clone()));
        assert_eq!(installed(versions, Some("15")), Some(bin.clone()));
        assert_eq!(installed(versions, Some("18")), None);
        assert!(fits(&bin, Some("15")) && fits(&bin, None) && !fits(&newest, Some("15")));
    }

    #[test]
    fn explicit_binaries_of_another_version_are_refused() {
        let versions = tempfile::tempdir().unwrap();
        let bin = install(versions.path(), "18", &["postgres", "initdb"]);
        assert!(explicit(&bin, Some("18")).is_ok() && explicit(&bin, None).is_ok());
        let error = explicit(&bin, Some("15")).unwrap_err().to_string();
        assert!(error.contains("is PostgreSQL 18, and the cluster was created by version 15"), "{error}");
    }
}
