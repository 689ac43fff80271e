//! Bytes cut anywhere to raw records, in bounded memory.
//!
//! The grammar is csv-core's, which is also the csv crate's: RFC 4180 with any of CRLF, LF and CR as a line end, blank
//! lines skipped, and every input has *a* parse. What csv-core leaves to its caller is done here: a byte-order mark
//! that arrives in pieces, the bound of a record, a quote that never closes, and where each record begins.

use csv_core::ReadRecordResult;

#[cfg(test)]
mod tests;

/// A record's fields, quotes undone, hold at most this many bytes together. The longest valid row stays well below: a
/// description of 65,536 characters takes at most 256 KiB.
pub const IMPORT_RECORD_BYTES_MAX: usize = 1024 * 1024;

/// Fields beyond are counted but not kept. No valid file has even half as many columns.
pub const IMPORT_COLUMNS_MAX: usize = 64;

/// What is beyond a bound is parsed into this much room behind what is kept, again and again.
const OVERFLOW_BYTES: usize = 4096;
const OVERFLOW_ENDS: usize = 64;

const BUFFER_BYTES_INITIAL: usize = 8 * 1024;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Cuts a stream of bytes into records. Where the stream is cut into chunks has no influence on them.
///
/// ```
/// # use issue_tracker::import::RecordReader;
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
    /// How much of a byte-order mark was taken at the start of the file; `None` once that is decided.
    mark_bytes: Option<usize>,
    /// Bytes parsed in all, without those of `mark_bytes`.
    parsed_offset: u64,
    lines: LineCounter,
    /// Between a record's first byte and its line end. Outside, csv-core is never given anything: it stands where it
    /// would skip line ends, which is done here in order to know where the next record begins.
    in_record: bool,
    next_row_number: u64,
    begin_offset: u64,
    begin_line_number: u64,
    /// The record's fields one after the other; the first `record_bytes_max` are kept, the rest is overflow.
    buffer: Vec<u8>,
    /// Where in `buffer` each field ends; the first `IMPORT_COLUMNS_MAX` are kept, the rest is overflow.
    ends: Box<[usize]>,
    /// Bytes of the record's fields, kept or not.
    content_bytes: usize,
    /// Fields of the record that have ended, kept or not.
    field_count: usize,
    /// How many bytes of a record's fields are kept.
    record_bytes_max: usize,
}

/// One line of the file, or several where a quoted field holds line ends. The header is a record too.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// 0 for the file's first record, which is the header, so 1 for the first row of data.
    pub row_number: u64,
    /// The line of the file, from 1, on which the record begins. Each of CRLF, LF and CR ends a line.
    pub line_number: u64,
    /// Where in the file the record's first byte is: behind line ends, blank lines and the byte-order mark.
    pub byte_offset: u64,
    /// Where in the file the record's line end (or the end of the file) is. To go on behind this record, start there
    /// with `end_line_number` and the next row number: the line end is then skipped like a blank line, whether or not
    /// the second half of a CRLF has been seen yet.
    pub end_offset: u64,
    /// The line on which the record ends.
    pub end_line_number: u64,
    /// All fields, also those that were not kept.
    pub field_count: usize,
    /// Why the fields must not be taken at face value.
    pub fault: Option<RecordFault>,
    content: &'a [u8],
    ends: &'a [usize],
}

/// What is wrong with a record as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordFault {
    /// The fields have more than [`IMPORT_RECORD_BYTES_MAX`]; the record has the first of them.
    TooLong,
    /// The file ended inside quotes. Says more than `TooLong`, so it stands also where both are true.
    UnclosedQuote,
}

impl RecordReader {
    /// Starts at the beginning of a file.
    pub fn new() -> Self {
        Self::starting_at(0, 0, 1)
    }

    /// With another character between fields than a comma: an ASCII one that is not a quote or a line end. To be said before
    /// anything is read.
    pub fn separated_by(mut self, separator: u8) -> Self {
        self.core = new_core(separator);
        self
    }

    /// Starts in the middle of a file, between two records: at a record's `byte_offset` with its row and line number, or
    /// at its `end_offset` with the number of the row after it and its `end_line_number`.
    pub fn starting_at(byte_offset: u64, row_number: u64, line_number: u64) -> Self {
        Self {
            core: new_core(b','),
            mark_bytes: (byte_offset == 0).then_some(0),
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

    /// With another bound than [`IMPORT_RECORD_BYTES_MAX`], of 8 KiB or more, so that what happens beyond it takes less to
    /// find. To be said before anything is read.
    #[doc(hidden)]
    pub fn keeping(mut self, record_bytes_max: usize) -> Self {
        self.record_bytes_max = record_bytes_max;
        self
    }

    /// Takes bytes from the front of `input` until a record is complete. `None` once `input` is empty: give the next
    /// chunk then, or call [`finish`](Self::finish).
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
        let fault = (self.content_bytes > self.record_bytes_max).then_some(RecordFault::TooLong);
        // A record always ends with the first byte of its line end.
        Some(self.record(self.parsed_offset - 1, end_line_number, fault))
    }

    /// Says that the file ends here, and gives the last record if it has no line end. There is nothing to read after.
    pub fn finish(&mut self) -> Option<Record<'_>> {
        self.put_back_byte_order_mark();
        if !self.in_record {
            return None;
        }
        self.in_record = false;
        let fault = if self.end_last_field() {
            (self.content_bytes > self.record_bytes_max).then_some(RecordFault::TooLong)
        } else {
            Some(RecordFault::UnclosedQuote)
        };
        Some(self.record(self.parsed_offset, self.lines.line_number, fault))
    }

    /// Bytes taken in all, from the start of the file.
    pub fn offset(&self) -> u64 {
        self.parsed_offset + self.mark_bytes.unwrap_or(0) as u64
    }

    fn take_byte_order_mark(&mut self, input: &mut &[u8]) {
        while let Some(taken) = self.mark_bytes {
            let Some((byte, rest)) = input.split_first() else {
                return;
            };
            if *byte != BYTE_ORDER_MARK[taken] {
                self.put_back_byte_order_mark();
                return;
            }
            *input = rest;
            self.mark_bytes = Some(taken + 1);
            if taken + 1 == BYTE_ORDER_MARK.len() {
                self.mark_bytes = None;
                self.parsed_offset += BYTE_ORDER_MARK.len() as u64;
            }
        }
    }

    /// Parses the bytes that were taken for a byte-order mark and, as it turns out, belong to the first record.
    fn put_back_byte_order_mark(&mut self) {
        if let Some(taken @ 1..) = self.mark_bytes {
            self.begin_record();
            // They are ordinary bytes, which cannot end a record.
            self.parse(&mut &BYTE_ORDER_MARK[..taken]);
        }
        self.mark_bytes = None;
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

    /// Parses until the record ends, and returns the line on which it does; `None` when the input ends first.
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

    /// One call of csv-core, which stops early when the buffer is full; returns how many bytes it took.
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

    /// Ends the record where the file does; returns whether that is outside quotes. csv-core would end it silently in
    /// both cases, so it is given a line end, which only inside quotes ends nothing. (On a clone of it this wouldn't do:
    /// csv-core 0.1.13 clones only part of its tables.)
    fn end_last_field(&mut self) -> bool {
        let last_end = &mut self.ends[self.field_count.min(IMPORT_COLUMNS_MAX)..];
        let (result, ..) = self.core.read_record(b"\n", &mut [0], last_end);
        last_end[0] = self.content_bytes;
        self.field_count += 1;
        result == ReadRecordResult::Record
    }

    fn record(&mut self, end_offset: u64, end_line_number: u64, fault: Option<RecordFault>) -> Record<'_> {
        let row_number = self.next_row_number;
        self.next_row_number += 1;
        Record {
            row_number,
            line_number: self.begin_line_number,
            byte_offset: self.begin_offset,
            end_offset,
            end_line_number,
            field_count: self.field_count,
            fault,
            content: &self.buffer[..self.content_bytes.min(self.record_bytes_max)],
            ends: &self.ends[..self.field_count.min(IMPORT_COLUMNS_MAX)],
        }
    }
}

fn new_core(separator: u8) -> csv_core::Reader {
    let mut core = csv_core::ReaderBuilder::new().delimiter(separator).build();
    // csv-core takes a byte-order mark out of its first input if it is whole there. That would depend on the cut (and be
    // wrong in the middle of a file), so its first input is this one, which it has no room to read.
    core.read_record(b"-", &mut [], &mut []);
    core
}

impl Default for RecordReader {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Record<'a> {
    /// A field's bytes, quotes undone; `None` if the record has no such field or it was not kept.
    pub fn field(&self, index: usize) -> Option<&'a [u8]> {
        let end = *self.ends.get(index)?;
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        // In a record that is too long, fields end behind what was kept.
        let kept = self.content.len();
        Some(&self.content[begin.min(kept)..end.min(kept)])
    }

    /// The fields that were kept, in the file's order.
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
