//! CSV files in arbitrary chunks.

mod rows;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use issue_tracker::{
    csv::{
        Column, Format, Header, HeaderError, IMPORT_COLUMNS_MAX, ImportRow, Record, RecordDefect, RecordReader,
        RowError, parse_row,
    },
    pb::Status,
};

use super::memory;

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";
/// Files up to this size are also read byte by byte, and resumed after each record.
const SMALL_FILE_BYTES: usize = 96;
/// The record limit of `import_record`. The limit of real imports, 1 MiB, would make each input too slow.
const RECORD_BYTES_MAX: usize = 16 * 1024;
/// Memory for one record, the excess by which it is too long, the ends of its fields and the tables of csv-core.
const HELD_BYTES_MAX: usize = RECORD_BYTES_MAX + 8 * 1024;

/// A file yields the same records and rows in any chunks, at the correct offsets, and equal to those of the csv crate.
///
/// The first byte selects the format and the second the chunk sizes. The rest is the file.
pub fn import_file(data: &[u8]) {
    let Some((&[options, cuts], file)) = data.split_first_chunk() else { return };
    let format = format_from_byte(options);
    let seen = read(&format, Start::file(), [file]);
    assert_eq!(read(&format, Start::file(), split_into_chunks(file, cuts)), seen);
    if file.len() <= SMALL_FILE_BYTES {
        assert_eq!(read(&format, Start::file(), file.chunks(1)), seen);
    }
    assert_offsets(file, &seen);
    assert_same_as_csv(file, &format, &seen);
    assert_resumes(file, &format, &seen, cuts.into());
    for record in &seen {
        match &record.parsed {
            Parsed::Header(header) => rows::assert_header(&format, header),
            Parsed::Row(row) => rows::assert_row(&format, record, row),
            Parsed::Skipped => {}
        }
    }
}

/// A file that is longer than the record limit is read in bounded memory and yields the records of the csv crate.
///
/// The first byte selects the chunk size. Three parts separated by NUL follow: a beginning, a piece that is repeated
/// until it is too long, and an end.
pub fn import_record(data: &[u8]) {
    let Some((cuts, text)) = data.split_first() else { return };
    let mut parts = text.splitn(3, |byte| *byte == 0);
    let (Some(begin), Some(piece), Some(end)) = (parts.next(), parts.next(), parts.next()) else { return };
    if piece.is_empty() {
        return;
    }
    let long = piece.repeat(RECORD_BYTES_MAX / 64 / piece.len() + 1);
    let whole = |step: usize| {
        let chunks = std::iter::repeat_n(long.chunks(step), 65).flatten();
        std::iter::once(begin).chain(chunks).chain(std::iter::once(end))
    };
    // The csv crate recognises a byte-order mark only within one chunk.
    let file = whole(long.len()).collect::<Vec<_>>().concat();
    let expected = assert_long_same_as_csv(&file);
    let (found, held_bytes) = memory::peak_of(|| digest(whole(usize::from(*cuts) * 16 + 1)));
    assert_eq!(found, expected);
    assert!(held_bytes <= HELD_BYTES_MAX, "{held_bytes} bytes");
}

/// Maps a byte to one of all combinations of format options.
fn format_from_byte(options: u8) -> Format {
    let choice = |shift: u32, of: usize| usize::from(options >> shift) % of;
    let names = [("summary", Some(Column::Title)), ("state", Some(Column::Status)), ("estimate", None)];
    Format {
        separator: [b',', b';', b'\t', b'|'][choice(0, 4)],
        default_status: [Status::Open, Status::InProgress, Status::Closed][choice(2, 4) % 3],
        title_optional: choice(4, 2) == 1,
        ignore_unknown_columns: choice(5, 2) == 1,
        label_separator: [b';', b','][choice(6, 2)],
        column_names: match choice(7, 2) {
            1 => names.map(|(name, column)| (name.to_owned(), column)).into(),
            _ => BTreeMap::new(),
        },
    }
}

/// The state in which a reader starts.
struct Start {
    offset: u64,
    row_number: u64,
    line_number: u64,
    /// The columns of the header. `None` if the header is still to be read.
    columns: Option<Header>,
}

impl Start {
    fn file() -> Self {
        Self { offset: 0, row_number: 0, line_number: 1, columns: None }
    }
}

/// An owned record, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OwnedRecord {
    row_number: u64,
    line_number: u64,
    byte_offset: u64,
    end_offset: u64,
    end_line_number: u64,
    field_count: usize,
    defect: Option<RecordDefect>,
    fields: Vec<Vec<u8>>,
    parsed: Parsed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Parsed {
    Header(Result<Header, Vec<HeaderError>>),
    Row(Result<ImportRow, Vec<RowError>>),
    /// The header was invalid, so rows are not parsed.
    Skipped,
}

fn read<'a>(format: &Format, start: Start, chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<OwnedRecord> {
    let mut reader = RecordReader::starting_at(start.offset, start.row_number, start.line_number);
    reader = reader.separated_by(format.separator);
    let mut columns = start.columns;
    let mut seen: Vec<OwnedRecord> = Vec::new();
    let mut given = start.offset;
    for mut chunk in chunks {
        given += chunk.len() as u64;
        while let Some(record) = reader.read(&mut chunk) {
            seen.push(to_owned_record(format, &mut columns, &record));
        }
        assert!(chunk.is_empty());
        assert_eq!(reader.offset(), given);
    }
    seen.extend(reader.finish().map(|record| to_owned_record(format, &mut columns, &record)));
    assert_eq!(reader.offset(), given);
    assert!(reader.finish().is_none());
    seen
}

fn to_owned_record(format: &Format, columns: &mut Option<Header>, record: &Record<'_>) -> OwnedRecord {
    let parsed = if record.row_number == 0 {
        let header = Header::parse(record, format);
        *columns = header.clone().ok();
        Parsed::Header(header)
    } else {
        columns.as_ref().map_or(Parsed::Skipped, |columns| Parsed::Row(parse_row(format, columns, record)))
    };
    OwnedRecord {
        row_number: record.row_number,
        line_number: record.line_number,
        byte_offset: record.byte_offset,
        end_offset: record.end_offset,
        end_line_number: record.end_line_number,
        field_count: record.field_count,
        defect: record.defect,
        fields: record.fields().map(<[u8]>::to_vec).collect(),
        parsed,
    }
}

/// Splits a file into random chunks of up to 16 bytes, or of up to 256 bytes, depending on `seed`. Some are empty.
fn split_into_chunks(file: &[u8], seed: u8) -> Vec<&[u8]> {
    let mut state = u32::from(seed) + 1;
    let longest = if seed < 128 { 16 } else { 256 };
    let mut chunks = Vec::new();
    let mut rest = file;
    while !rest.is_empty() {
        // xorshift32
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        let (chunk, later) = rest.split_at((state as usize % (longest + 1)).min(rest.len()));
        chunks.push(chunk);
        rest = later;
    }
    chunks
}

/// Counts line ends. CRLF, LF and CR are one each.
fn count_lines(bytes: &[u8]) -> u64 {
    let ends = |(nth, byte): (usize, &u8)| match byte {
        b'\r' => true,
        b'\n' => nth == 0 || bytes[nth - 1] != b'\r',
        _ => false,
    };
    bytes.iter().enumerate().filter(|(nth, byte)| ends((*nth, byte))).count() as u64
}

/// Records are consecutive, with only line ends between them.
fn assert_offsets(file: &[u8], seen: &[OwnedRecord]) {
    let mut end = if file.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
    let is_line_ends = |bytes: &[u8]| bytes.iter().all(|byte| matches!(byte, b'\r' | b'\n'));
    for (nth, record) in seen.iter().enumerate() {
        let (begin, next_end) = (record.byte_offset as usize, record.end_offset as usize);
        assert!(end <= begin && begin < next_end && next_end <= file.len(), "{record:?}");
        assert!(nth == 0 || end < begin, "{record:?}");
        assert!(is_line_ends(&file[end..begin]), "{record:?}");
        assert!(next_end == file.len() || is_line_ends(&file[next_end..=next_end]), "{record:?}");
        assert_eq!(record.row_number, nth as u64);
        assert_eq!(record.line_number, 1 + count_lines(&file[..begin]), "{record:?}");
        assert_eq!(record.end_line_number, 1 + count_lines(&file[..next_end]), "{record:?}");
        assert_eq!(record.fields.len(), record.field_count.min(IMPORT_COLUMNS_MAX));
        end = next_end;
    }
    assert!(is_line_ends(&file[end..]));
}

fn assert_same_as_csv(file: &[u8], format: &Format, seen: &[OwnedRecord]) {
    let mut csv =
        csv::ReaderBuilder::new().has_headers(false).flexible(true).delimiter(format.separator).from_reader(file);
    let mut expected = csv.byte_records();
    for record in seen {
        let theirs = expected.next().expect("the csv crate has as many records").expect("any bytes are CSV");
        assert_eq!(record.field_count, theirs.len(), "{record:?}");
        assert!(record.fields.iter().map(Vec::as_slice).eq(theirs.iter().take(IMPORT_COLUMNS_MAX)), "{record:?}");
    }
    assert!(expected.next().is_none());
    // Only the last record can have an unclosed quote. One more quote closes it.
    let Some((last, others)) = seen.split_last() else { return };
    assert!(others.iter().all(|record| record.defect.is_none()));
    if last.defect.is_some() {
        let closed = read(format, Start::file(), [file, b"\""]);
        let last_closed = closed.last().map(|record| (record.defect, &record.fields, record.end_offset));
        assert_eq!(last_closed, Some((None, &last.fields, last.end_offset + 1)));
    }
}

/// A reader that starts at a record, or after one, yields the remaining records.
fn assert_resumes(file: &[u8], format: &Format, seen: &[OwnedRecord], nth: usize) {
    let Some((header, rows)) = seen.split_first() else { return };
    let Parsed::Header(Ok(columns)) = &header.parsed else { return };
    let names: Vec<String> = columns.names().into_iter().map(str::to_owned).collect();
    assert_eq!(&Header::from_names(&names), columns);
    let all = file.len() <= SMALL_FILE_BYTES;
    for (index, row) in rows.iter().enumerate().filter(|(index, _)| all || *index == nth % rows.len()) {
        let from = |offset: u64, row_number: u64, line_number: u64| {
            let start = Start { offset, row_number, line_number, columns: Some(columns.clone()) };
            read(format, start, [&file[offset as usize..]])
        };
        assert_eq!(from(row.byte_offset, row.row_number, row.line_number), rows[index..]);
        assert_eq!(from(row.end_offset, row.row_number + 1, row.end_line_number), rows[index + 1..]);
    }
}

/// A hash of the records of a long file.
#[derive(Default)]
struct Digest {
    hasher: DefaultHasher,
    record_count: u64,
}

impl Digest {
    fn add(&mut self, record: &Record<'_>) {
        assert_eq!(record.row_number, self.record_count);
        self.record_count += 1;
        (record.line_number, record.byte_offset, record.end_offset, record.end_line_number).hash(&mut self.hasher);
        (record.field_count, record.defect.map(|defect| defect == RecordDefect::TooLong)).hash(&mut self.hasher);
        record.fields().for_each(|field| field.hash(&mut self.hasher));
    }

    fn read<'a>(chunks: impl Iterator<Item = &'a [u8]>, mut each: impl FnMut(&Record<'_>)) -> u64 {
        let mut digest = Self::default();
        let mut reader = RecordReader::new().with_record_bytes_max(RECORD_BYTES_MAX);
        for mut chunk in chunks {
            while let Some(record) = reader.read(&mut chunk) {
                digest.add(&record);
                each(&record);
            }
        }
        if let Some(record) = reader.finish() {
            digest.add(&record);
            each(&record);
        }
        digest.hasher.finish()
    }
}

fn digest<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> u64 {
    Digest::read(chunks, |_| {})
}

/// The records equal those of the csv crate. Of a record that is too long, the kept bytes are a prefix.
fn assert_long_same_as_csv(file: &[u8]) -> u64 {
    let mut csv = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(file);
    let mut theirs = csv::ByteRecord::new();
    let digest = Digest::read([file].into_iter(), |record| {
        assert!(csv.read_byte_record(&mut theirs).expect("any bytes are CSV"), "the csv crate has as many records");
        assert_eq!(record.field_count, theirs.len());
        let too_long = theirs.as_slice().len() > RECORD_BYTES_MAX;
        assert!(record.defect != Some(RecordDefect::TooLong) || too_long);
        assert!(record.defect.is_some() || !too_long);
        let kept: usize = record.fields().map(<[u8]>::len).sum();
        assert!(kept <= RECORD_BYTES_MAX);
        for (ours, theirs) in record.fields().zip(theirs.iter()) {
            assert!(if too_long { theirs.starts_with(ours) } else { theirs == ours });
        }
    });
    assert!(!csv.read_byte_record(&mut theirs).expect("any bytes are CSV"));
    digest
}
