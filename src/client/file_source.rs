//! Reads the file to import from any offset: a file or a pipe, plain or compressed with gzip.

use std::{
    fs::File,
    io::{self, BufReader, ErrorKind, Read},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use anyhow::Context;
use flate2::read::MultiGzDecoder;

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
const SKIP_BUFFER_BYTES: usize = 64 * 1024;
const GZIP_BUFFER_BYTES: usize = 256 * 1024;

/// The decompressed bytes of a file. Offsets count decompressed bytes.
pub struct FileSource {
    bytes: Bytes,
    /// The offset of the next read.
    offset: u64,
}

enum Bytes {
    Plain(Raw),
    Gzip(Box<MultiGzDecoder<BufReader<Raw>>>),
}

impl FileSource {
    /// Opens a file or pipe; `-` is standard input. Waits for the first bytes of a pipe.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = if path == Path::new("-") {
            io::stdin().as_fd().try_clone_to_owned().map(File::from)
        } else {
            File::open(path)
        };
        file.and_then(Self::of).with_context(|| format!("cannot read {}", path.display()))
    }

    fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(ErrorKind::IsADirectory.into());
        }
        let mut raw = if metadata.is_file() && position(&file) == Some(0) {
            Raw::File { file, position: 0 }
        } else {
            Raw::Pipe { pipe: file, copy: tempfile::tempfile()?, copied: 0, position: 0 }
        };
        let mut magic = Vec::new();
        (&mut raw).take(2).read_to_end(&mut magic)?;
        raw.seek(0);
        let bytes = match magic == GZIP_MAGIC {
            true => Bytes::Gzip(Box::new(gzip(raw))),
            false => Bytes::Plain(raw),
        };
        Ok(Self { bytes, offset: 0 })
    }

    /// Returns the size of a plain file. Other sizes are known only at the end.
    pub fn size(&self) -> io::Result<Option<u64>> {
        match &self.bytes {
            Bytes::Plain(Raw::File { file, .. }) => Ok(Some(file.metadata()?.size())),
            _ => Ok(None),
        }
    }

    /// Returns whether the source is a pipe, whose reads wait for the writer.
    pub fn is_pipe(&self) -> bool {
        let raw = match &self.bytes {
            Bytes::Plain(raw) => raw,
            Bytes::Gzip(decoder) => decoder.get_ref().get_ref(),
        };
        matches!(raw, Raw::Pipe { .. })
    }

    /// Moves to an offset. Fails if the file ends before it.
    pub fn seek(&mut self, offset: u64) -> io::Result<()> {
        match &mut self.bytes {
            Bytes::Plain(raw) => self.offset = raw.seek(offset),
            Bytes::Gzip(_) if offset >= self.offset => {}
            Bytes::Gzip(decoder) => {
                let mut raw = decoder.get_ref().get_ref().try_clone()?;
                raw.seek(0);
                **decoder = gzip(raw);
                self.offset = 0;
            }
        }
        let mut buffer = vec![0; SKIP_BUFFER_BYTES];
        while self.offset < offset {
            let left = usize::try_from(offset - self.offset).unwrap_or(usize::MAX).min(buffer.len());
            if self.read(&mut buffer[..left])? == 0 {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    format!("the file ends at byte {}, but was imported up to byte {offset}", self.offset),
                ));
            }
        }
        Ok(())
    }

    /// Fills the buffer up to the end of the file. From a pipe, returns what one read returns.
    pub fn fill(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let count = self.read(&mut buffer[filled..])?;
            filled += count;
            if count == 0 || self.is_pipe() {
                break;
            }
        }
        Ok(filled)
    }

    pub fn offset(&self) -> u64 {
        self.offset
    }
}

impl Read for FileSource {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = loop {
            let result = match &mut self.bytes {
                Bytes::Plain(raw) => raw.read(buffer),
                Bytes::Gzip(decoder) => decoder.read(buffer),
            };
            match result {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        self.offset += count as u64;
        Ok(count)
    }
}

fn gzip(raw: Raw) -> MultiGzDecoder<BufReader<Raw>> {
    MultiGzDecoder::new(BufReader::with_capacity(GZIP_BUFFER_BYTES, raw))
}

/// Returns the position of a file; `None` if it is not seekable.
fn position(mut file: &File) -> Option<u64> {
    io::Seek::stream_position(&mut file).ok()
}

/// The bytes as stored, before decompression.
enum Raw {
    File {
        file: File,
        position: u64,
    },
    /// A pipe can be read only once. Its bytes are copied to an unnamed file, so that they can be sent again in bounded
    /// memory.
    Pipe {
        pipe: File,
        copy: File,
        copied: u64,
        position: u64,
    },
}

impl Raw {
    /// Moves to an offset, at most the end of the bytes available, and returns it.
    fn seek(&mut self, offset: u64) -> u64 {
        let (position, end) = match self {
            Self::File { file, position } => (position, file.metadata().map_or(u64::MAX, |metadata| metadata.size())),
            Self::Pipe { copied, position, .. } => (position, *copied),
        };
        *position = offset.min(end);
        *position
    }

    /// Returns a clone that replaces this source.
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::File { file, position } => Self::File { file: file.try_clone()?, position: *position },
            Self::Pipe { pipe, copy, copied, position } => {
                Self::Pipe { pipe: pipe.try_clone()?, copy: copy.try_clone()?, copied: *copied, position: *position }
            }
        })
    }
}

impl Read for Raw {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (count, position) = match self {
            Self::File { file, position } => (file.read_at(buffer, *position)?, position),
            Self::Pipe { copy, copied, position, .. } if *position < *copied => {
                (copy.read_at(buffer, *position)?, position)
            }
            Self::Pipe { pipe, copy, copied, position } => {
                let count = pipe.read(buffer)?;
                copy.write_all_at(&buffer[..count], *copied).map_err(|error| {
                    let dir = std::env::temp_dir();
                    let text = format!("cannot write a copy of the pipe to {} (TMPDIR): {error}", dir.display());
                    io::Error::new(error.kind(), text)
                })?;
                *copied += count as u64;
                (count, position)
            }
        };
        *position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    fn pipe(bytes: Vec<u8>) -> File {
        let (reader, mut writer) = io::pipe().unwrap();
        std::thread::spawn(move || writer.write_all(&bytes));
        File::from(std::os::fd::OwnedFd::from(reader))
    }

    fn zipped(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// 600,000 bytes, of which no two parts are equal.
    fn bytes() -> Vec<u8> {
        (0..100_000).flat_map(|n| format!("{n:05}\n").into_bytes()).collect()
    }

    fn rest(source: &mut FileSource) -> Vec<u8> {
        let mut rest = Vec::new();
        source.read_to_end(&mut rest).unwrap();
        rest
    }

    #[test]
    fn every_kind_of_source_returns_the_same_bytes_from_any_offset() {
        let bytes = bytes();
        let (first, second) = bytes.split_at(123_456);
        let members = [zipped(first), zipped(second)].concat();
        for (name, opened) in [
            ("file", file(&bytes)),
            ("gzip", file(&zipped(&bytes))),
            ("gzip of two members", file(&members)),
            ("pipe", pipe(bytes.clone())),
            ("gzip in a pipe", pipe(members.clone())),
        ] {
            let mut source = FileSource::of(opened).unwrap();
            for offset in [0, 100_000, 50_000, 123_455, 123_456, 599_999, 600_000, 1, 0] {
                source.seek(offset).unwrap();
                assert_eq!(source.offset(), offset);
                let mut piece = [0; 10];
                let count = source.fill(&mut piece).unwrap();
                let offset = offset as usize;
                assert!(count > 0 || offset == bytes.len(), "{name} at {offset}");
                assert_eq!(piece[..count], bytes[offset..offset + count], "{name} at {offset}");
            }
            source.seek(3).unwrap();
            assert!(rest(&mut source) == bytes[3..], "{name}");
        }
    }

    #[test]
    fn only_a_plain_file_has_a_known_size() {
        assert_eq!(FileSource::of(file(b"title\n")).unwrap().size().unwrap(), Some(6));
        assert_eq!(FileSource::of(file(&zipped(b"title\n"))).unwrap().size().unwrap(), None);
        assert_eq!(FileSource::of(pipe(b"title\n".to_vec())).unwrap().size().unwrap(), None);
    }

    #[test]
    fn a_file_is_read_from_the_position_of_its_descriptor() {
        let mut begun = file(b"xxxtitle\n");
        begun.seek(SeekFrom::Start(3)).unwrap();
        let mut source = FileSource::of(begun).unwrap();
        assert_eq!(rest(&mut source), b"title\n");
        source.seek(0).unwrap();
        assert_eq!(rest(&mut source), b"title\n");
    }

    #[test]
    fn short_files_are_plain_and_truncated_gzip_is_an_error() {
        for short in [&b""[..], b"\x1f", b"t"] {
            assert_eq!(rest(&mut FileSource::of(file(short)).unwrap()), short);
        }
        let whole = zipped(&bytes());
        let mut source = FileSource::of(file(&whole[..whole.len() - 9])).unwrap();
        let error = source.read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn seeking_beyond_the_end_is_an_error() {
        for mut source in [FileSource::of(file(b"title\n")).unwrap(), FileSource::of(pipe(zipped(b"title\n"))).unwrap()]
        {
            let error = source.seek(7).unwrap_err().to_string();
            assert!(error.contains("the file ends at byte 6, but was imported up to byte 7"), "{error}");
        }
    }
}
