//! A file that is there whole or not at all.

use std::{
    fs::{self, File, Permissions},
    io::{self, ErrorKind, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

/// What a new file may be, less what the umask takes away.
const NEW_FILE_MODE: u32 = 0o666;

/// Written beside its place, and put there by [`finish`](Self::finish). If that never comes, nothing is left.
pub struct Output {
    path: PathBuf,
    file: Target,
}

enum Target {
    Beside(NamedTempFile),
    /// A device or pipe, which cannot be replaced.
    Itself(File),
}

impl Output {
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        Self::open(path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn open(path: &Path) -> io::Result<Self> {
        let (path, permissions) = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => (path.canonicalize()?, Some(metadata.permissions())),
            Ok(_) => {
                let file = File::options().write(true).open(path)?;
                return Ok(Self { path: path.to_owned(), file: Target::Itself(file) });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => (path.to_owned(), None),
            Err(error) => return Err(error),
        };
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .prefix(".issue-tracker-")
            .permissions(Permissions::from_mode(NEW_FILE_MODE))
            .tempfile_in(dir)?;
        if let Some(permissions) = permissions {
            file.as_file().set_permissions(permissions)?;
        }
        Ok(Self { path, file: Target::Beside(file) })
    }

    /// Forgets what was written, if that is possible.
    pub fn restart(&mut self) -> io::Result<bool> {
        match &mut self.file {
            Target::Beside(file) => {
                file.as_file().set_len(0)?;
                io::Seek::rewind(file)?;
                Ok(true)
            }
            Target::Itself(_) => Ok(false),
        }
    }

    pub fn finish(self) -> anyhow::Result<()> {
        let put = || match self.file {
            Target::Beside(file) => {
                file.as_file().sync_all()?;
                file.persist(&self.path).map(drop).map_err(|error| error.error)
            }
            Target::Itself(mut file) => file.flush(),
        };
        put().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Target::Beside(file) => file.write(bytes),
            Target::Itself(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.file {
            Target::Beside(file) => file.flush(),
            Target::Itself(file) => file.flush(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_has_its_name_when_it_is_finished_and_leaves_nothing_when_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("issues.csv");
        let mut output = Output::create(&path).unwrap();
        output.write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(output);
        assert_eq!(names(dir.path()), [""; 0]);

        let mut output = Output::create(&path).unwrap();
        output.write_all(b"first, and longer").unwrap();
        assert!(output.restart().unwrap());
        output.write_all(b"second").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(dir.path()), ["issues.csv"]);
    }

    #[test]
    fn a_file_that_is_replaced_keeps_its_mode_and_the_link_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("issues.csv"), dir.path().join("latest.csv"));
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("issues.csv", &link).unwrap();
        let mut output = Output::create(&link).unwrap();
        output.write_all(b"after").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(link.is_symlink());
    }

    #[test]
    fn a_device_is_written_and_not_replaced() {
        let mut output = Output::create(Path::new("/dev/null")).unwrap();
        output.write_all(b"gone").unwrap();
        assert!(!output.restart().unwrap());
        output.finish().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let error = Output::create(Path::new("/nonexistent/issues.csv")).err().unwrap();
        assert!(format!("{error:#}").starts_with("cannot write /nonexistent/issues.csv: "), "{error:#}");
    }
}
