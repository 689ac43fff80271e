//! Bytes to batches of parsed rows.

use std::sync::Arc;

use super::{
    error::{HeaderError, RowError},
    format::Format,
    header::Header,
    record_reader::{Record, RecordReader},
    row::{ImportRow, parse_row},
};

/// A batch ends at whichever of these two bounds is reached first. In IMPORT_MODE_SKIP_INVALID each batch is committed, so
/// where a batch ends must depend on the file alone, not on how the stream is cut into chunks.
pub const IMPORT_BATCH_ROWS_MAX: usize = 5_000;
pub const IMPORT_BATCH_BYTES_MAX: u64 = 2 * 1024 * 1024;

/// Rows that are written together, and the errors of those that could not be parsed.
#[derive(Debug, Default)]
pub struct Batch {
    /// The file's header. `BatchReader` returns no batch without it.
    pub header: Option<Arc<Header>>,
    pub rows: Vec<ImportRow>,
    /// Errors of the rejected rows, up to the reader's bound for the whole file.
    pub errors: Vec<RowError>,
    /// All errors of the rejected rows.
    pub error_count: u64,
    pub rejected_count: u64,
    /// The end of the batch in the file: the byte offset after its last row, and that row's last line.
    pub end_offset: u64,
    pub end_line_number: u64,
    /// Whether the batch ends the file. An import finishes with this batch only, however the stream ends.
    pub is_last: bool,
}

impl Batch {
    /// Returns the number of rows, those that could not be parsed included.
    pub fn row_count(&self) -> u64 {
        self.rows.len() as u64 + self.rejected_count
    }
}

/// A position between two rows, from which a file can be read on.
#[derive(Clone, Copy, Debug, Default)]
pub struct FilePosition {
    pub offset: u64,
    pub line_number: u64,
    /// Data rows before the position.
    pub row_count: u64,
}

/// Why a file cannot be read at all.
#[derive(Debug, PartialEq, Eq)]
pub enum FileError {
    Header(Vec<HeaderError>),
    /// The file has no header.
    Empty,
}

/// Parses chunks of a file into batches.
pub struct BatchReader {
    format: Format,
    records: RecordReader,
    header: Option<Arc<Header>>,
    batch: Batch,
    batch_offset: u64,
    /// How many more errors batches may hold; further errors are only counted.
    errors_left: usize,
}

impl BatchReader {
    /// Starts at the beginning of a file. All batches together hold at most `errors_max` errors.
    pub fn new(format: Format, errors_max: usize) -> Self {
        Self::with(RecordReader::new(), format, None, FilePosition::default(), errors_max)
    }

    /// Starts after the header, at a position where an earlier batch ended.
    pub fn resume(format: Format, header: Arc<Header>, position: FilePosition, errors_max: usize) -> Self {
        let FilePosition { offset, line_number, row_count } = position;
        let records = RecordReader::starting_at(offset, row_count + 1, line_number);
        Self::with(records, format, Some(header), position, errors_max)
    }

    fn with(
        records: RecordReader,
        format: Format,
        header: Option<Arc<Header>>,
        position: FilePosition,
        errors_max: usize,
    ) -> Self {
        let FilePosition { offset, line_number, .. } = position;
        Self {
            records: records.separated_by(format.separator),
            format,
            header,
            batch: Batch { end_offset: offset, end_line_number: line_number, ..Batch::default() },
            batch_offset: offset,
            errors_left: errors_max,
        }
    }

    /// Returns the number of bytes read, from the beginning of the file.
    pub fn offset(&self) -> u64 {
        self.records.offset()
    }

    /// Takes bytes from the front of `data` until a batch is full; returns `None` when `data` is used up.
    pub fn read(&mut self, data: &mut &[u8]) -> Result<Option<Batch>, FileError> {
        while let Some(record) = self.records.read(data) {
            add_record(&self.format, &mut self.header, &mut self.batch, &mut self.errors_left, &record)?;
            let bytes = self.batch.end_offset - self.batch_offset;
            if self.batch.row_count() >= IMPORT_BATCH_ROWS_MAX as u64 || bytes >= IMPORT_BATCH_BYTES_MAX {
                self.batch_offset = self.batch.end_offset;
                let Batch { end_offset, end_line_number, .. } = self.batch;
                let next = Batch { end_offset, end_line_number, ..Batch::default() };
                let full = std::mem::replace(&mut self.batch, next);
                return Ok(Some(Batch { header: self.header.clone(), ..full }));
            }
        }
        Ok(None)
    }

    /// Ends the file and returns its last batch, which may have no rows.
    pub fn finish(mut self) -> Result<Batch, FileError> {
        if let Some(record) = self.records.finish() {
            add_record(&self.format, &mut self.header, &mut self.batch, &mut self.errors_left, &record)?;
        }
        if self.header.is_none() {
            return Err(FileError::Empty);
        }
        Ok(Batch { header: self.header, end_offset: self.records.offset(), is_last: true, ..self.batch })
    }
}

fn add_record(
    format: &Format,
    header: &mut Option<Arc<Header>>,
    batch: &mut Batch,
    errors_left: &mut usize,
    record: &Record<'_>,
) -> Result<(), FileError> {
    batch.end_offset = record.end_offset;
    batch.end_line_number = record.end_line_number;
    let Some(header) = header else {
        *header = Some(Arc::new(Header::parse(record, format).map_err(FileError::Header)?));
        return Ok(());
    };
    match parse_row(format, header, record) {
        Ok(row) => batch.rows.push(row),
        Err(errors) => {
            batch.rejected_count += 1;
            batch.error_count += errors.len() as u64;
            let held = errors.len().min(*errors_left);
            *errors_left -= held;
            batch.errors.extend(errors.into_iter().take(held));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the file in chunks of this size, from `reader`'s position.
    fn batches(mut reader: BatchReader, file: &[u8], chunk_bytes: usize) -> Vec<Batch> {
        let mut batches = Vec::new();
        for mut chunk in file.chunks(chunk_bytes) {
            while let Some(batch) = reader.read(&mut chunk).unwrap() {
                batches.push(batch);
            }
        }
        batches.push(reader.finish().unwrap());
        batches
    }

    fn ends(batches: &[Batch]) -> Vec<(u64, u64, usize, bool)> {
        batches.iter().map(|batch| (batch.end_offset, batch.end_line_number, batch.rows.len(), batch.is_last)).collect()
    }

    fn titles(count: usize) -> Vec<u8> {
        let rows = (0..count).map(|n| format!("{n:09}\n"));
        ["title\n".to_owned()].into_iter().chain(rows).collect::<String>().into_bytes()
    }

    fn reader() -> BatchReader {
        BatchReader::new(Format::default(), 3)
    }

    #[test]
    fn a_batch_ends_at_its_rows_or_bytes_however_the_file_is_cut() {
        let rows = titles(IMPORT_BATCH_ROWS_MAX + 1);
        let long = format!("title,description\n{}", format!("t,{}\n", "x".repeat(60_000)).repeat(36)).into_bytes();
        for (file, lengths) in [(rows, [IMPORT_BATCH_ROWS_MAX, 1]), (long, [35, 1])] {
            let whole = ends(&batches(reader(), &file, file.len()));
            assert_eq!(whole.iter().map(|end| end.2).collect::<Vec<_>>(), lengths);
            assert_eq!(whole[1].0, file.len() as u64);
            for chunk_bytes in [1, 7, 4_096] {
                assert_eq!(ends(&batches(reader(), &file, chunk_bytes)), whole, "{chunk_bytes}");
            }
        }
    }

    #[test]
    fn a_file_resumed_after_a_batch_has_the_remaining_batches() {
        let file = titles(2 * IMPORT_BATCH_ROWS_MAX + 10);
        let whole = batches(reader(), &file, 10_000);
        let first = &whole[0];
        let position = FilePosition {
            offset: first.end_offset,
            line_number: first.end_line_number,
            row_count: first.rows.len() as u64,
        };
        let header = first.header.clone().unwrap();
        let resumed = BatchReader::resume(Format::default(), header, position, 3);
        let rest = batches(resumed, &file[first.end_offset as usize..], 10_000);
        assert_eq!(ends(&rest), ends(&whole[1..]));
        assert!(rest.iter().zip(&whole[1..]).all(|(resumed, batch)| resumed.rows == batch.rows));
    }

    #[test]
    fn errors_beyond_the_bound_of_the_file_are_counted_and_not_held() {
        let file = [b"title\n".to_vec(), b"\"\"\n".repeat(IMPORT_BATCH_ROWS_MAX + 5)].concat();
        let batches = batches(reader(), &file, 100);
        let counts: Vec<_> = batches.iter().map(|b| (b.errors.len(), b.error_count, b.rejected_count)).collect();
        assert_eq!(counts, [(3, 5_000, 5_000), (0, 5, 5)]);
    }

    #[test]
    fn a_file_without_a_valid_header_has_no_batches() {
        assert_eq!(reader().finish().unwrap_err(), FileError::Empty);
        let mut data = &b"titel\nx\n"[..];
        assert!(matches!(reader().read(&mut data), Err(FileError::Header(errors)) if errors.len() == 2));
    }
}
