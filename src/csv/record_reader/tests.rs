use proptest::{prelude::*, string::string_regex};

use super::*;

/// An owned record, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    row_number: u64,
    line_number: u64,
    byte_offset: u64,
    end_offset: u64,
    end_line_number: u64,
    field_count: usize,
    defect: Option<RecordDefect>,
    fields: Vec<Vec<u8>>,
}

impl From<Record<'_>> for Seen {
    fn from(record: Record<'_>) -> Self {
        Self {
            row_number: record.row_number,
            line_number: record.line_number,
            byte_offset: record.byte_offset,
            end_offset: record.end_offset,
            end_line_number: record.end_line_number,
            field_count: record.field_count,
            defect: record.defect,
            fields: record.fields().map(<[u8]>::to_vec).collect(),
        }
    }
}

fn read_chunks<'a>(mut reader: RecordReader, chunks: impl IntoIterator<Item = &'a [u8]>) -> Vec<Seen> {
    let mut seen: Vec<Seen> = Vec::new();
    let mut given = reader.offset();
    for mut chunk in chunks {
        given += chunk.len() as u64;
        while let Some(record) = reader.read(&mut chunk) {
            seen.push(record.into());
        }
        assert!(chunk.is_empty());
        assert_eq!(reader.offset(), given);
    }
    seen.extend(reader.finish().map(Seen::from));
    assert_eq!(reader.offset(), given);
    assert!(reader.finish().is_none());
    seen
}

/// Reads the file's records, and checks that they do not depend on how it is cut.
fn read(file: &[u8]) -> Vec<Seen> {
    let whole = read_chunks(RecordReader::new(), [file]);
    for size in [1, 2, 3, 5] {
        assert_eq!(read_chunks(RecordReader::new(), file.chunks(size)), whole, "cut every {size} bytes");
    }
    whole
}

fn fields(file: &[u8]) -> Vec<Vec<String>> {
    let text = |field: Vec<u8>| String::from_utf8(field).unwrap();
    read(file).into_iter().map(|record| record.fields.into_iter().map(text).collect()).collect()
}

/// Row number, line number, byte offset and end offset of each record.
fn positions(file: &[u8]) -> Vec<(u64, u64, u64, u64)> {
    read(file).iter().map(|seen| (seen.row_number, seen.line_number, seen.byte_offset, seen.end_offset)).collect()
}

#[test]
fn an_empty_file_has_no_record() {
    for file in [b"".as_slice(), b"\n", b"\r\n\r\n", b"\xEF\xBB\xBF", b"\xEF\xBB\xBF\r\n"] {
        assert_eq!(read(file), []);
    }
}

#[test]
fn lines_end_with_lf_crlf_or_cr() {
    for line_end in ["\n", "\r\n", "\r"] {
        let file = ["a,b", "c,d", ""].join(line_end);
        assert_eq!(fields(file.as_bytes()), [["a", "b"], ["c", "d"]]);
        let second = 3 + line_end.len() as u64;
        assert_eq!(positions(file.as_bytes()), [(0, 1, 0, 3), (1, 2, second, second + 3)]);
    }
}

#[test]
fn the_last_record_needs_no_line_break() {
    assert_eq!(fields(b"a\nb"), [["a"], ["b"]]);
    assert_eq!(positions(b"a\nb"), [(0, 1, 0, 1), (1, 2, 2, 3)]);
    assert_eq!(fields(b"a,"), [["a", ""]]);
    assert_eq!(fields(b"\"\""), [[""]]);
}

#[test]
fn blank_lines_are_skipped_and_counted_as_lines() {
    assert_eq!(positions(b"\n\r\na\n\n\r\n\r\rb"), [(0, 3, 3, 4), (1, 8, 10, 11)]);
}

#[test]
fn a_line_of_spaces_is_a_record() {
    assert_eq!(fields(b"a\n  \nb"), [["a"], ["  "], ["b"]]);
}

#[test]
fn quoted_fields_keep_commas_quotes_and_line_breaks() {
    assert_eq!(fields(b"\"a,\"\"b\"\"\r\nc\",d\ne"), [vec!["a,\"b\"\r\nc", "d"], vec!["e"]]);
}

#[test]
fn a_record_over_several_lines_begins_on_its_first_and_ends_on_its_last() {
    let seen = read(b"a\n\"b\r\nc\rd\ne\"\r\nf\n");
    let lines: Vec<_> = seen.iter().map(|seen| (seen.line_number, seen.end_line_number)).collect();
    assert_eq!(lines, [(1, 1), (2, 5), (6, 6)]);
}

#[test]
fn a_trailing_comma_is_an_empty_field() {
    assert_eq!(fields(b"a,b,\n,\n"), [vec!["a", "b", ""], vec!["", ""]]);
}

#[test]
fn records_may_have_different_field_counts() {
    assert_eq!(fields(b"a,b\nc\nd,e,f\n"), [vec!["a", "b"], vec!["c"], vec!["d", "e", "f"]]);
}

#[test]
fn quotes_inside_an_unquoted_field_are_content() {
    assert_eq!(fields(b"a\"b\",c\n\"d\"e,f"), [["a\"b\"", "c"], ["de", "f"]]);
}

#[test]
fn a_byte_order_mark_is_dropped_at_the_start_only() {
    assert_eq!(fields(b"\xEF\xBB\xBF\"a\",b\n\xEF\xBB\xBFc"), [vec!["a", "b"], vec!["\u{FEFF}c"]]);
    assert_eq!(positions(b"\xEF\xBB\xBFa"), [(0, 1, 3, 4)]);
    assert_eq!(fields(b"\xEF\xBB\xBF\xEF\xBB\xBFa"), [["\u{FEFF}a"]]);
    assert_eq!(positions(b"\n\xEF\xBB\xBFa"), [(0, 2, 1, 5)]);
}

#[test]
fn part_of_a_byte_order_mark_is_content() {
    assert_eq!(read(b"\xEF")[0].fields, [b"\xEF"]);
    assert_eq!(read(b"\xEF\xBB")[0].fields, [b"\xEF\xBB"]);
    assert_eq!(read(b"\xEF\xBB,a\nb")[0].fields, [b"\xEF\xBB".as_slice(), b"a"]);
    assert_eq!(positions(b"\xEF\xBB\nb"), [(0, 1, 0, 2), (1, 2, 3, 4)]);
}

#[test]
fn bytes_that_are_not_utf_8_are_content() {
    assert_eq!(read(b"caf\xE9,\xFF\n")[0].fields, [b"caf\xE9".as_slice(), b"\xFF"]);
}

#[test]
fn an_unclosed_quote_is_a_defect_of_the_last_record() {
    let seen = read(b"a,b\nc,\"d\ne,f\n");
    assert_eq!(seen[1].defect, Some(RecordDefect::UnclosedQuote));
    assert_eq!(seen[1].fields, [b"c".as_slice(), b"d\ne,f\n"]);
    assert_eq!((seen[1].line_number, seen[1].byte_offset, seen[1].end_offset), (2, 4, 13));
    assert_eq!(read(b"\"")[0].defect, Some(RecordDefect::UnclosedQuote));
    assert_eq!(read(b"\"a\"\"")[0].defect, Some(RecordDefect::UnclosedQuote));
}

#[test]
fn a_quote_closed_at_the_end_of_the_file_is_no_defect() {
    for file in [b"a,\"b\"".as_slice(), b"\"a\"\"\"", b"a\"b", b"\"a\"b", b"\"\""] {
        assert_eq!(read(file)[0].defect, None);
    }
}

#[test]
fn a_record_is_too_long_from_the_first_byte_over_the_limit() {
    for (length, defect) in
        [(0, None), (1, Some(RecordDefect::TooLong)), (OVERFLOW_BYTES + 2, Some(RecordDefect::TooLong))]
    {
        let content = b"x".repeat(IMPORT_RECORD_BYTES_MAX - 1 + length);
        let file = [b"h\n1,", content.as_slice(), b"\n2,y\n"].concat();
        let seen = read_chunks(RecordReader::new(), [file.as_slice()]);
        assert_eq!(seen[1].defect, defect);
        assert_eq!((seen[1].field_count, seen[1].byte_offset), (2, 2));
        assert_eq!(seen[1].end_offset, 4 + content.len() as u64);
        assert_eq!(seen[1].fields[1].len(), IMPORT_RECORD_BYTES_MAX - 1);
        assert_eq!(seen[2].fields, [b"2", b"y"]);
        assert_eq!((seen[2].defect, seen[2].row_number, seen[2].line_number), (None, 2, 3));
        for size in [1, 4095, 65_536] {
            assert_eq!(read_chunks(RecordReader::new(), file.chunks(size)), seen, "cut every {size} bytes");
        }
    }
}

#[test]
fn a_field_of_50_mb_takes_bounded_memory_and_the_next_record_is_read() {
    let mut reader = RecordReader::new();
    let line = b"all work and no play, makes \"\"Jack\"\" a dull boy\n".repeat(1024);
    let mut opening = b"h\n\"".as_slice();
    assert!(reader.read(&mut opening).is_some_and(|record| record.row_number == 0));
    assert!(reader.read(&mut opening).is_none());
    let mut lines = 0;
    while reader.offset() < 50_000_000 {
        assert!(reader.read(&mut line.as_slice()).is_none());
        lines += 1024;
    }
    assert!(reader.buffer.capacity() <= IMPORT_RECORD_BYTES_MAX + OVERFLOW_BYTES);
    let mut closing = b"\",b\nc\n".as_slice();
    let record = reader.read(&mut closing).unwrap();
    assert_eq!((record.defect, record.field_count), (Some(RecordDefect::TooLong), 2));
    assert_eq!(record.field(0).map(<[u8]>::len), Some(IMPORT_RECORD_BYTES_MAX));
    assert_eq!(record.field(1), Some(b"".as_slice()));
    let next = reader.read(&mut closing).unwrap();
    assert_eq!((next.field(0), next.defect), (Some(b"c".as_slice()), None));
    assert_eq!((next.row_number, next.line_number), (2, lines + 3));
}

#[test]
fn an_unclosed_quote_takes_precedence_over_too_long() {
    let file = [b"h\n\"".to_vec(), b"x\n".repeat(IMPORT_RECORD_BYTES_MAX)].concat();
    let seen = read_chunks(RecordReader::new(), file.chunks(65_536));
    assert_eq!(seen[1].defect, Some(RecordDefect::UnclosedQuote));
    assert_eq!(seen[1].fields[0].len(), IMPORT_RECORD_BYTES_MAX);
}

#[test]
fn fields_over_the_limit_are_counted_and_not_kept() {
    for count in [IMPORT_COLUMNS_MAX, IMPORT_COLUMNS_MAX + 1, IMPORT_COLUMNS_MAX + OVERFLOW_ENDS, 1000] {
        let file = ["x"].repeat(count).join(",") + "\ny,z\n";
        let seen = read(file.as_bytes());
        assert_eq!(seen[0].field_count, count);
        assert_eq!(seen[0].fields, vec![b"x".to_vec(); IMPORT_COLUMNS_MAX]);
        assert_eq!(seen[0].defect, None);
        assert_eq!(seen[1].fields, [b"y", b"z"]);
    }
}

#[test]
fn a_file_may_end_wherever_the_buffer_is_full() {
    let file = ["x"].repeat(IMPORT_COLUMNS_MAX + OVERFLOW_ENDS + 1).join(",");
    assert_eq!(read(file.as_bytes())[0].field_count, IMPORT_COLUMNS_MAX + OVERFLOW_ENDS + 1);
    let file = b"x".repeat(BUFFER_BYTES_INITIAL);
    assert_eq!(read_chunks(RecordReader::new(), [file.as_slice()])[0].fields, [file]);
}

/// Generates files of the bytes that the grammar distinguishes, and a little text.
fn any_file() -> impl Strategy<Value = Vec<u8>> {
    // As a plain string, the strategy would parse the expression for every piece.
    let text = string_regex("[a-zé ]{0,6}").unwrap();
    let piece = prop_oneof![
        8 => proptest::sample::select(b"\",\r\n;".to_vec()).prop_map(|byte| vec![byte]),
        3 => text.prop_map(String::into_bytes),
        1 => Just(b"\r\n".to_vec()),
        1 => Just(b"\"\"".to_vec()),
        1 => Just(BYTE_ORDER_MARK.to_vec()),
        1 => any::<u8>().prop_map(|byte| vec![byte]),
    ];
    let marked = proptest::sample::select(vec![b"".as_slice(), b"\xEF\xBB\xBF", b"\xEF\xBB", b"\xEF"]);
    (marked, proptest::collection::vec(piece, 0..60))
        .prop_map(|(mark, pieces)| [mark.to_vec(), pieces.concat()].concat())
}

/// Generates files as a spreadsheet writes them, in which up to three bytes are replaced, inserted or removed.
fn nearly_valid_file() -> impl Strategy<Value = Vec<u8>> {
    let (unquoted, quoted) = ("[a-z ]{0,8}", "\"([a-z,\r\n;]|\"\"){0,8}\"");
    let field = prop_oneof![string_regex(unquoted).unwrap(), string_regex(quoted).unwrap(), Just(String::new())];
    let row = proptest::collection::vec(field, 4..5).prop_map(|fields| fields.join(","));
    let rows = proptest::collection::vec(row, 0..12);
    let line_end = proptest::sample::select(vec!["\n", "\r\n", "\r"]);
    let file = (rows, line_end, any::<bool>()).prop_map(|(rows, line_end, ended)| {
        let mut file = format!("title,description,status,labels{line_end}{}", rows.join(line_end));
        if ended {
            file.push_str(line_end);
        }
        file.into_bytes()
    });
    let byte = prop_oneof![proptest::sample::select(b"\",\r\n;".to_vec()), any::<u8>()];
    let mutation = (any::<proptest::sample::Index>(), byte, 0..3);
    (file, proptest::collection::vec(mutation, 0..4)).prop_map(|(mut file, mutations)| {
        for (at, byte, kind) in mutations {
            let at = at.index(file.len());
            match kind {
                0 => file[at] = byte,
                1 => file.insert(at, byte),
                _ => drop(file.remove(at)),
            }
        }
        file
    })
}

fn cut(file: &[u8], cuts: &[proptest::sample::Index]) -> Vec<Vec<u8>> {
    let mut borders: Vec<usize> = cuts.iter().map(|cut| cut.index(file.len() + 1)).collect();
    borders.extend([0, file.len()]);
    borders.sort_unstable();
    borders.windows(2).map(|border| file[border[0]..border[1]].to_vec()).collect()
}

/// Parses a file with the csv crate. Returns the position and the fields of each record.
fn csv_records(file: &[u8]) -> Vec<(csv::Position, Vec<Vec<u8>>)> {
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(file);
    let record =
        |record: csv::ByteRecord| (record.position().unwrap().clone(), record.iter().map(<[u8]>::to_vec).collect());
    reader.byte_records().map(|result| record(result.unwrap())).collect()
}

/// Counts line breaks by their definition: each of CRLF, LF and CR is one.
fn count_lines(bytes: &[u8]) -> u64 {
    String::from_utf8_lossy(bytes).replace("\r\n", "\n").replace('\r', "\n").matches('\n').count() as u64
}

/// Asserts that a record has the position that the csv crate reports, as far as the two are comparable.
///
/// The csv crate's position is directly after the first byte of the previous line break. The second byte of a CRLF, blank
/// lines and, in the first record, the byte-order mark follow it; `RecordReader` skips them. The csv crate counts only LFs
/// up to its position, so the LFs that are skipped are added here, and files in which a CR alone ends a line are not compared.
fn assert_same_place(file: &[u8], ours: &Seen, theirs: &csv::Position) {
    let mut skipped_from = theirs.byte() as usize;
    if skipped_from == 0 && file.starts_with(BYTE_ORDER_MARK) {
        skipped_from = BYTE_ORDER_MARK.len();
    }
    let skipped = file[skipped_from..].iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let begin = skipped_from + skipped;
    assert_eq!(ours.byte_offset, begin as u64);
    assert_eq!(ours.row_number, theirs.record());
    assert_eq!(ours.line_number, 1 + count_lines(&file[..begin]));
    assert_eq!(ours.end_line_number, 1 + count_lines(&file[..ours.end_offset as usize]));
    let only_crlf_and_lf = !String::from_utf8_lossy(file).replace("\r\n", "").contains('\r');
    if only_crlf_and_lf {
        let skipped_lfs = file[skipped_from..begin].iter().filter(|byte| **byte == b'\n').count();
        assert_eq!(ours.line_number, theirs.line() + skipped_lfs as u64);
    }
}

/// Asserts that only the last record can have an unclosed quote, and that a quote at the end of the file then only closes
/// it.
fn assert_defects(file: &[u8], seen: &[Seen]) {
    let Some((last, others)) = seen.split_last() else {
        return;
    };
    assert!(others.iter().all(|record| record.defect.is_none()));
    if last.defect.is_some() {
        let closed = read_chunks(RecordReader::new(), [file, b"\""]);
        let expected = Seen { defect: None, end_offset: last.end_offset + 1, ..last.clone() };
        assert_eq!(closed.last(), Some(&expected));
    } else {
        // Outside quotes, a line break and one more record can be added.
        assert_eq!(read_chunks(RecordReader::new(), [file, b"\nz"]).len(), seen.len() + 1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn any_file_in_any_chunks_has_the_records_that_the_csv_crate_reads(
        file in prop_oneof![any_file(), nearly_valid_file()],
        cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
    ) {
        let seen = read_chunks(RecordReader::new(), [file.as_slice()]);
        let chunks = cut(&file, &cuts);
        prop_assert_eq!(&read_chunks(RecordReader::new(), chunks.iter().map(Vec::as_slice)), &seen);
        prop_assert_eq!(&read_chunks(RecordReader::new(), file.chunks(1)), &seen);

        let theirs = csv_records(&file);
        prop_assert_eq!(seen.len(), theirs.len());
        for (ours, (position, fields)) in seen.iter().zip(&theirs) {
            // The csv crate keeps every field, `RecordReader` only the first ones.
            prop_assert_eq!(ours.field_count, fields.len());
            prop_assert_eq!(&ours.fields[..], &fields[..fields.len().min(IMPORT_COLUMNS_MAX)]);
            assert_same_place(&file, ours, position);
        }
        assert_defects(&file, &seen);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn any_separator_splits_fields_as_a_comma_does(
        file in prop_oneof![any_file(), nearly_valid_file()],
        separator in proptest::sample::select(b";\t| -:'\x1f".to_vec()),
    ) {
        let swap = |bytes: &[u8]| -> Vec<u8> {
            let swap = |byte: &u8| match *byte {
                b',' => separator,
                byte if byte == separator => b',',
                byte => byte,
            };
            bytes.iter().map(swap).collect()
        };
        let mut seen = read_chunks(RecordReader::new().separated_by(separator), swap(&file).chunks(3));
        for field in seen.iter_mut().flat_map(|record| &mut record.fields) {
            *field = swap(field);
        }
        prop_assert_eq!(seen, read_chunks(RecordReader::new(), [file.as_slice()]));
    }

    #[test]
    fn a_reader_that_starts_at_or_after_any_record_reads_the_remaining_records(
        file in prop_oneof![any_file(), nearly_valid_file()],
    ) {
        let seen = read_chunks(RecordReader::new(), [file.as_slice()]);
        for (index, record) in seen.iter().enumerate() {
            let at = RecordReader::starting_at(record.byte_offset, record.row_number, record.line_number);
            let rest = read_chunks(at, [&file[record.byte_offset as usize..]]);
            prop_assert_eq!(&rest[..], &seen[index..]);
            let after = RecordReader::starting_at(record.end_offset, record.row_number + 1, record.end_line_number);
            let rest = read_chunks(after, [&file[record.end_offset as usize..]]);
            prop_assert_eq!(&rest[..], &seen[index + 1..]);
        }
    }
}
