//! Copies the header and the rejected rows of a file, unchanged, so that they can be corrected and imported again.

use std::io::{self, BufWriter, Write};

use super::file_source::FileSource;

const BUFFER_BYTES: usize = 64 * 1024;

/// Writes the header, and the rows that begin at `offsets`, which must be sorted.
pub fn write_rows(source: FileSource, separator: u8, offsets: &[u64], out: impl Write) -> io::Result<()> {
    let mut rows = Rows { source, separator, buffer: Vec::new(), begin: 0 };
    let mut out = BufWriter::new(out);
    rows.copy_header(&mut out)?;
    for offset in offsets {
        rows.copy_row(*offset, &mut out)?;
    }
    out.flush()
}

struct Rows {
    source: FileSource,
    separator: u8,
    /// Bytes read ahead. Rejected rows are often close together, and a compressed file can only be read forwards.
    buffer: Vec<u8>,
    /// The offset of the buffer.
    begin: u64,
}

impl Rows {
    /// Copies everything up to the end of the header, including a byte-order mark and blank lines.
    fn copy_header(&mut self, out: &mut impl Write) -> io::Result<()> {
        let mut offset = 0;
        loop {
            let ahead = self.at(offset)?;
            let blank = ahead.iter().take_while(|byte| b"\r\n\xEF\xBB\xBF".contains(byte)).count();
            if blank == 0 {
                break;
            }
            out.write_all(&ahead[..blank])?;
            offset += blank as u64;
        }
        self.copy_row(offset, out)
    }

    /// Copies the row that begins at this offset, with its line break. The service uses the same parser.
    fn copy_row(&mut self, mut offset: u64, out: &mut impl Write) -> io::Result<()> {
        let mut parser = csv_core::ReaderBuilder::new().delimiter(self.separator).build();
        // csv-core would strip a byte-order mark from its first input; in the middle of a file there is none.
        parser.read_record(b"-", &mut [], &mut []);
        let (mut fields, mut ends) = ([0; 4096], [0; 64]);
        loop {
            let ahead = self.at(offset)?;
            if ahead.is_empty() {
                return Ok(());
            }
            // The fields are not needed, and overwritten each time.
            let (result, count, ..) = parser.read_record(ahead, &mut fields, &mut ends);
            out.write_all(&ahead[..count])?;
            let last = ahead[..count].last().copied();
            offset += count as u64;
            if matches!(result, csv_core::ReadRecordResult::Record) {
                if last == Some(b'\r') && self.at(offset)?.first() == Some(&b'\n') {
                    out.write_all(b"\n")?;
                }
                return Ok(());
            }
        }
    }

    /// Returns some bytes from this offset; none at the end of the file.
    fn at(&mut self, offset: u64) -> io::Result<&[u8]> {
        let ahead = offset.checked_sub(self.begin).and_then(|skipped| usize::try_from(skipped).ok());
        let skipped = match ahead.filter(|skipped| *skipped < self.buffer.len()) {
            Some(skipped) => skipped,
            None => {
                self.source.seek(offset)?;
                self.buffer.resize(BUFFER_BYTES, 0);
                let count = self.source.fill(&mut self.buffer)?;
                self.buffer.truncate(count);
                self.begin = offset;
                0
            }
        };
        Ok(&self.buffer[skipped..])
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};
    use proptest::prelude::*;

    use super::*;
    use crate::csv::RecordReader;

    fn source(bytes: &[u8]) -> FileSource {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        FileSource::open(file.path()).unwrap()
    }

    fn zipped(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn rejected(bytes: &[u8], separator: u8, offsets: &[u64]) -> Vec<u8> {
        let mut out = Vec::new();
        write_rows(source(bytes), separator, offsets, &mut out).unwrap();
        out
    }

    fn offset(file: &[u8], row: &[u8]) -> u64 {
        file.windows(row.len()).position(|window| window == row).unwrap() as u64
    }

    #[test]
    fn rows_are_copied_unchanged() {
        let file = b"\xEF\xBB\xBF\r\ntitle,description\r\ngood,\r\n\"a\nb\",\"x,\"\"y\"\"\r\n\"\r\n\r\nlast,one";
        let (second, last) = (offset(file, b"\"a\nb"), offset(file, b"last"));
        assert_eq!(
            rejected(file, b',', &[second, last]),
            b"\xEF\xBB\xBF\r\ntitle,description\r\n\"a\nb\",\"x,\"\"y\"\"\r\n\"\r\nlast,one"
        );
        assert_eq!(rejected(file, b',', &[]), b"\xEF\xBB\xBF\r\ntitle,description\r\n");
        assert_eq!(rejected(b"", b',', &[]), b"");
    }

    #[test]
    fn a_quoted_row_ends_as_its_separator_determines() {
        let file = b"title;labels\nx;\"a\nb\"\ny;z\n";
        assert_eq!(rejected(file, b';', &[13]), b"title;labels\nx;\"a\nb\"\n");
    }

    #[test]
    fn rows_of_any_size_and_distance_are_copied_from_plain_and_compressed_files() {
        let long = format!("\"{}\n\"\n", "x".repeat(3 * BUFFER_BYTES));
        let rows: Vec<String> =
            (0..30_000).map(|n| if n % 10_000 == 5 { long.clone() } else { format!("row {n}\n") }).collect();
        let file = format!("title\n{}", rows.concat());
        let (mut offsets, mut expected, mut offset) = (Vec::new(), "title\n".to_owned(), 6);
        for (n, row) in rows.iter().enumerate() {
            if n % 2_500 == 5 || n > 29_990 {
                offsets.push(offset);
                expected += row;
            }
            offset += row.len() as u64;
        }
        for bytes in [file.as_bytes(), &zipped(file.as_bytes())] {
            assert!(rejected(bytes, b',', &offsets) == expected.as_bytes());
        }
    }

    proptest! {
        /// For any bytes, each copied row is the record that the service reads, with its line break.
        #[test]
        fn rows_end_where_the_service_ends_them(file in r#"[ax,"\r\n]{0,60}"#) {
            let mut reader = RecordReader::new();
            let mut input = file.as_bytes();
            let mut begins = Vec::new();
            let mut ends = Vec::new();
            while let Some(record) = reader.read(&mut input) {
                begins.push(record.byte_offset);
                ends.push(record.end_offset);
            }
            if let Some(record) = reader.finish() {
                begins.push(record.byte_offset);
                ends.push(record.end_offset);
            }
            let header = rejected(file.as_bytes(), b',', &[]);
            for (begin, end) in begins.iter().zip(&ends).skip(1) {
                let rows = rejected(file.as_bytes(), b',', &[*begin]);
                let row = std::str::from_utf8(&rows[header.len()..]).unwrap();
                let expected = &file[*begin as usize..*end as usize];
                prop_assert!(row.starts_with(expected), "{row:?} {expected:?}");
                prop_assert!(["", "\n", "\r", "\r\n"].contains(&&row[expected.len()..]), "{row:?} {expected:?}");
            }
        }
    }
}
