//! A file that appears under its name only when it is complete.

use std::{
    fs::{self, File, Permissions},
    io::{self, ErrorKind, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use tempfile::NamedTempFile;

/// The mode of a new file, before the umask.
const NEW_FILE_MODE: u32 = 0o666;

/// Writes a temporary file in the same directory; [`finish`](Self::finish) renames it. If it is dropped before, the
/// temporary file is deleted.
pub struct OutputFile {
    path: PathBuf,
    destination: Destination,
}

enum Destination {
    Temporary(NamedTempFile),
    /// A device or pipe, which cannot be replaced.
    Direct(File),
}

impl OutputFile {
    /// Opens the file for writing; an existing file keeps its contents until [`finish`](Self::finish).
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        Self::open(path).with_context(|| format!("cannot write {}", path.display()))
    }

    fn open(path: &Path) -> io::Result<Self> {
        let (path, permissions) = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => (path.canonicalize()?, Some(metadata.permissions())),
            Ok(_) => {
                let file = File::options().write(true).open(path)?;
                return Ok(Self { path: path.to_owned(), destination: Destination::Direct(file) });
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
        Ok(Self { path, destination: Destination::Temporary(file) })
    }

    /// Discards what was written. Returns false if that is impossible, as for a pipe.
    pub fn restart(&mut self) -> io::Result<bool> {
        match &mut self.destination {
            Destination::Temporary(file) => {
                file.as_file().set_len(0)?;
                io::Seek::rewind(file)?;
                Ok(true)
            }
            Destination::Direct(_) => Ok(false),
        }
    }

    /// Gives the file its name.
    pub fn finish(self) -> anyhow::Result<()> {
        let rename = || match self.destination {
            Destination::Temporary(file) => {
                file.as_file().sync_all()?;
                file.persist(&self.path).map(drop).map_err(|error| error.error)
            }
            Destination::Direct(mut file) => file.flush(),
        };
        rename().with_context(|| format!("cannot write {}", self.path.display()))
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.destination {
            Destination::Temporary(file) => file.write(bytes),
            Destination::Direct(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.destination {
            Destination::Temporary(file) => file.flush(),
            Destination::Direct(file) => file.flush(),
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
    fn a_file_has_its_name_once_finished_and_leaves_nothing_otherwise() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("issues.csv");
        let mut output = OutputFile::create(&path).unwrap();
        output.write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(output);
        assert_eq!(names(dir.path()), [""; 0]);

        let mut output = OutputFile::create(&path).unwrap();
        output.write_all(b"first, and longer").unwrap();
        assert!(output.restart().unwrap());
        output.write_all(b"second").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(names(dir.path()), ["issues.csv"]);
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_the_link_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("issues.csv"), dir.path().join("latest.csv"));
        fs::write(&path, "before").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink("issues.csv", &link).unwrap();
        let mut output = OutputFile::create(&link).unwrap();
        output.write_all(b"after").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"after");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(link.is_symlink());
    }

    #[test]
    fn a_device_is_written_and_not_replaced() {
        let mut output = OutputFile::create(Path::new("/dev/null")).unwrap();
        output.write_all(b"gone").unwrap();
        assert!(!output.restart().unwrap());
        output.finish().unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn an_error_names_the_file() {
        let error = OutputFile::create(Path::new("/nonexistent/issues.csv")).err().unwrap();
        assert!(format!("{error:#}").starts_with("cannot write /nonexistent/issues.csv: "), "{error:#}");
    }
}
