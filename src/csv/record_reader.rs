//! Splits bytes, cut into chunks anywhere, into raw records in bounded memory.
//!
//! The grammar is that of csv-core and the csv crate: RFC 4180 with CRLF, LF or CR as a line break, blank lines skipped;
//! every input has a parse. This module adds what csv-core leaves to its caller: a byte-order mark split across chunks,
//! the size limit of a record, unclosed quotes, and the position of each record.

use csv_core::ReadRecordResult;

#[cfg(test)]
mod tests;

/// The maximum size of a record's unquoted fields together. The longest valid row is well below it: a description of
/// 65,536 characters has at most 256 KiB.
pub const IMPORT_RECORD_BYTES_MAX: usize = 1024 * 1024;

/// The number of fields kept per record; further fields are only counted.
pub const IMPORT_COLUMNS_MAX: usize = 64;

/// Space after the kept bytes and fields, into which everything beyond the limits is parsed and overwritten.
const OVERFLOW_BYTES: usize = 4096;
const OVERFLOW_ENDS: usize = 64;

const BUFFER_BYTES_INITIAL: usize = 8 * 1024;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Splits a stream of bytes into records. How the stream is cut into chunks does not change the records.
///
/// ```
/// # use issue_tracker::csv::RecordReader;
/// let mut reader = RecordReader::new();
/// let mut titles = Vec::new();
/// for mut chunk in [b"title\nfi".as_slice(), b"rst\nsecond"] {
///     while let Some(record) = reader.read(&mut chunk) {
///         titles.push(record.field(0).map(<[u8]>::to_vec));
///     }
/// }
/// titles.extend(reader.finish().map(|record| record.field(0).map(<[u8]>::to_vec)));
/// assert_eq!(titles, [Some(b"title".to_vec()), Some(b"first".to_vec()), Some(b"second".to_vec())]);
/// ```
pub struct RecordReader {
    core: csv_core::Reader,
    /// Bytes of a possible byte-order mark taken at the start of the file; `None` once it is complete or ruled out.
    bom_bytes: Option<usize>,
    /// The file offset after the parsed bytes, without `bom_bytes`.
    parsed_offset: u64,
    lines: LineCounter,
    /// Whether the reader is between a record's first byte and its line break. Line breaks between records are skipped
    /// here and not passed to csv-core, so that the offset of the next record is known.
    in_record: bool,
    next_row_number: u64,
    begin_offset: u64,
    begin_line_number: u64,
    /// The record's fields, concatenated. The first `record_bytes_max` bytes are kept; the rest is overflow.
    buffer: Vec<u8>,
    /// The end of each field in `buffer`. The first `IMPORT_COLUMNS_MAX` are kept; the rest is overflow.
    ends: Box<[usize]>,
    /// Bytes of the record's fields, including overflow.
    content_bytes: usize,
    /// Complete fields of the record, including overflow.
    field_count: usize,
    record_bytes_max: usize,
}

/// A line of the file, or several if a quoted field contains line breaks. The header is a record too.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// 0 for the header, 1 for the first data row.
    pub row_number: u64,
    /// The line on which the record begins, counted from 1. CRLF, LF and CR each end a line.
    pub line_number: u64,
    /// The offset of the record's first byte, after line breaks, blank lines and the byte-order mark.
    pub byte_offset: u64,
    /// The offset of the record's line break or of the end of the file. To resume after this record, start there with
    /// `end_line_number` and the next row number: the line break is then skipped like a blank line, even if only half of
    /// a CRLF has been read.
    pub end_offset: u64,
    /// The line on which the record ends.
    pub end_line_number: u64,
    /// The number of fields, including those not kept.
    pub field_count: usize,
    /// Why the fields are incomplete or not reliable.
    pub defect: Option<RecordDefect>,
    content: &'a [u8],
    ends: &'a [usize],
}

/// A defect of a whole record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordDefect {
    /// The fields exceed [`IMPORT_RECORD_BYTES_MAX`]; the record has the bytes up to that limit.
    TooLong,
    /// The file ended inside quotes. Takes precedence over `TooLong`.
    UnclosedQuote,
}

impl RecordReader {
    /// Starts at the beginning of a file.
    pub fn new() -> Self {
        Self::starting_at(0, 0, 1)
    }

    /// Sets the field separator, an ASCII character other than a quote or a line break. Default: a comma. Must be called
    /// before the first read.
    pub fn separated_by(mut self, separator: u8) -> Self {
        self.core = new_core(separator);
        self
    }

    /// Starts between two records of a file: at a record's `byte_offset` with its row and line number, or at its
    /// `end_offset` with the next row number and its `end_line_number`.
    pub fn starting_at(byte_offset: u64, row_number: u64, line_number: u64) -> Self {
        Self {
            core: new_core(b','),
            bom_bytes: (byte_offset == 0).then_some(0),
            parsed_offset: byte_offset,
            lines: LineCounter { line_number, after_cr: false },
            in_record: false,
            next_row_number: row_number,
            begin_offset: byte_offset,
            begin_line_number: line_number,
            buffer: vec![0; BUFFER_BYTES_INITIAL],
            ends: vec![0; IMPORT_COLUMNS_MAX + OVERFLOW_ENDS].into(),
            content_bytes: 0,
            field_count: 0,
            record_bytes_max: IMPORT_RECORD_BYTES_MAX,
        }
    }

    /// Sets another limit than [`IMPORT_RECORD_BYTES_MAX`], at least 8 KiB, so that fuzzing reaches it quickly. Must be
    /// called before the first read.
    #[cfg(feature = "internals")]
    pub fn with_record_bytes_max(mut self, record_bytes_max: usize) -> Self {
        self.record_bytes_max = record_bytes_max;
        self
    }

    /// Takes bytes from the front of `input` until a record is complete. Returns `None` once `input` is empty: pass the
    /// next chunk then, or call [`finish`](Self::finish).
    pub fn read(&mut self, input: &mut &[u8]) -> Option<Record<'_>> {
        self.take_byte_order_mark(input);
        if !self.in_record {
            self.skip_line_ends(input);
            if input.is_empty() {
                return None;
            }
            self.begin_record();
        }
        let end_line_number = self.parse(input)?;
        self.in_record = false;
        let defect = (self.content_bytes > self.record_bytes_max).then_some(RecordDefect::TooLong);
        // A record ends with the first byte of its line break.
        Some(self.record(self.parsed_offset - 1, end_line_number, defect))
    }

    /// Ends the file, and returns the last record if it has no line break. Nothing can be read afterwards.
    pub fn finish(&mut self) -> Option<Record<'_>> {
        self.put_back_byte_order_mark();
        if !self.in_record {
            return None;
        }
        self.in_record = false;
        let defect = if self.end_last_field() {
            (self.content_bytes > self.record_bytes_max).then_some(RecordDefect::TooLong)
        } else {
            Some(RecordDefect::UnclosedQuote)
        };
        Some(self.record(self.parsed_offset, self.lines.line_number, defect))
    }

    /// Returns the file offset after the bytes read.
    pub fn offset(&self) -> u64 {
        self.parsed_offset + self.bom_bytes.unwrap_or(0) as u64
    }

    fn take_byte_order_mark(&mut self, input: &mut &[u8]) {
        while let Some(taken) = self.bom_bytes {
            let Some((byte, rest)) = input.split_first() else {
                return;
            };
            if *byte != BYTE_ORDER_MARK[taken] {
                self.put_back_byte_order_mark();
                return;
            }
            *input = rest;
            self.bom_bytes = Some(taken + 1);
            if taken + 1 == BYTE_ORDER_MARK.len() {
                self.bom_bytes = None;
                self.parsed_offset += BYTE_ORDER_MARK.len() as u64;
            }
        }
    }

    /// Parses bytes that began like a byte-order mark but belong to the first record.
    fn put_back_byte_order_mark(&mut self) {
        if let Some(taken @ 1..) = self.bom_bytes {
            self.begin_record();
            // Bytes of a byte-order mark cannot end a record.
            self.parse(&mut &BYTE_ORDER_MARK[..taken]);
        }
        self.bom_bytes = None;
    }

    fn skip_line_ends(&mut self, input: &mut &[u8]) {
        let count = input.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        let (line_ends, rest) = input.split_at(count);
        self.lines.pass(line_ends);
        self.parsed_offset += count as u64;
        *input = rest;
    }

    fn begin_record(&mut self) {
        self.in_record = true;
        self.begin_offset = self.parsed_offset;
        self.begin_line_number = self.lines.line_number;
        self.content_bytes = 0;
        self.field_count = 0;
    }

    /// Parses until the record ends, and returns the line of its end; `None` if the input ends first.
    fn parse(&mut self, input: &mut &[u8]) -> Option<u64> {
        while !input.is_empty() {
            let (result, count) = self.parse_some(input);
            let (parsed, rest) = input.split_at(count);
            *input = rest;
            self.parsed_offset += count as u64;
            if let (ReadRecordResult::Record, Some((line_end, content))) = (result, parsed.split_last()) {
                self.lines.pass(content);
                let end_line_number = self.lines.line_number;
                self.lines.pass(std::slice::from_ref(line_end));
                return Some(end_line_number);
            }
            self.lines.pass(parsed);
        }
        None
    }

    /// Calls csv-core once, which stops early if the buffer is full. Returns how many bytes it read.
    fn parse_some(&mut self, input: &[u8]) -> (ReadRecordResult, usize) {
        let kept_bytes = self.content_bytes.min(self.record_bytes_max);
        if kept_bytes == self.buffer.len() {
            self.grow_buffer();
        }
        let kept_ends = self.field_count.min(IMPORT_COLUMNS_MAX);
        let (result, bytes_in, bytes_out, ends_out) =
            self.core.read_record(input, &mut self.buffer[kept_bytes..], &mut self.ends[kept_ends..]);
        self.content_bytes += bytes_out;
        self.field_count += ends_out;
        (result, bytes_in)
    }

    fn grow_buffer(&mut self) {
        let bytes = (self.buffer.len() * 2).min(self.record_bytes_max + OVERFLOW_BYTES);
        self.buffer.reserve_exact(bytes - self.buffer.len());
        self.buffer.resize(bytes, 0);
    }

    /// Ends the last field at the end of the file; returns whether that is outside quotes. csv-core would end the record
    /// silently in both cases. A line break ends it only outside quotes. (A clone of the reader cannot be used for this:
    /// csv-core 0.1.13 clones only part of its tables.)
    fn end_last_field(&mut self) -> bool {
        let last_end = &mut self.ends[self.field_count.min(IMPORT_COLUMNS_MAX)..];
        let (result, ..) = self.core.read_record(b"\n", &mut [0], last_end);
        last_end[0] = self.content_bytes;
        self.field_count += 1;
        result == ReadRecordResult::Record
    }

    fn record(&mut self, end_offset: u64, end_line_number: u64, defect: Option<RecordDefect>) -> Record<'_> {
        let row_number = self.next_row_number;
        self.next_row_number += 1;
        Record {
            row_number,
            line_number: self.begin_line_number,
            byte_offset: self.begin_offset,
            end_offset,
            end_line_number,
            field_count: self.field_count,
            defect,
            content: &self.buffer[..self.content_bytes.min(self.record_bytes_max)],
            ends: &self.ends[..self.field_count.min(IMPORT_COLUMNS_MAX)],
        }
    }
}

fn new_core(separator: u8) -> csv_core::Reader {
    let mut core = csv_core::ReaderBuilder::new().delimiter(separator).build();
    // csv-core strips a byte-order mark that is complete in its first input. That would depend on the chunks, and be wrong
    // in the middle of a file. This first input has no effect, as there is no room for output.
    core.read_record(b"-", &mut [], &mut []);
    core
}

impl Default for RecordReader {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Record<'a> {
    /// Returns a field's unquoted bytes; `None` if the record has no such field or it was not kept.
    pub fn field(&self, index: usize) -> Option<&'a [u8]> {
        let end = *self.ends.get(index)?;
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        // In a record that is too long, fields can end after the kept bytes.
        let kept = self.content.len();
        Some(&self.content[begin.min(kept)..end.min(kept)])
    }

    /// Returns the kept fields, in the file's order.
    pub fn fields(&self) -> impl Iterator<Item = &'a [u8]> {
        let record = *self;
        (0..self.ends.len()).filter_map(move |index| record.field(index))
    }
}

/// Counts lines as editors do; csv-core counts LF only.
struct LineCounter {
    line_number: u64,
    after_cr: bool,
}

impl LineCounter {
    fn pass(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.line_number += u64::from(*byte == b'\r' || (*byte == b'\n' && !self.after_cr));
            self.after_cr = *byte == b'\r';
        }
    }
}
