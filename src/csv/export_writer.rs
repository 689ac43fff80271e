//! Writes issues as CSV that the import reads back.

use chrono::{DateTime, SecondsFormat, Timelike, Utc};

use super::column::Column;
use crate::{
    error::{Error, Result},
    pb::{Priority, Status},
};

/// The minimum size of every chunk but the last. A chunk ends with the row that reaches it.
pub const EXPORT_CHUNK_BYTES_MIN: usize = 64 * 1024;
/// The csv crate's buffer, from which it appends to the chunk.
const CSV_BUFFER_BYTES: usize = 8 * 1024;

/// The columns, in the file's order.
const COLUMNS: [Column; 9] = [
    Column::ExternalId,
    Column::Title,
    Column::Description,
    Column::Priority,
    Column::Status,
    Column::Assignee,
    Column::Labels,
    Column::CreateTime,
    Column::CloseTime,
];

/// The characters with which spreadsheets recognise a formula.
const FORMULA_STARTS: [char; 6] = ['=', '+', '-', '@', '\t', '\r'];

/// A row of the file.
#[derive(Clone, Copy, Debug)]
pub struct ExportRow<'a> {
    /// Empty means none.
    pub external_id: &'a str,
    pub title: &'a str,
    pub description: &'a str,
    pub priority: Priority,
    pub status: Status,
    /// A username; empty means none.
    pub assignee: &'a str,
    /// Names separated by `;`.
    pub labels: &'a str,
    pub create_time: DateTime<Utc>,
    pub close_time: Option<DateTime<Utc>>,
}

/// Writes rows into chunks of a file. The first chunk begins with the header.
pub struct ExportWriter {
    csv: csv::Writer<Vec<u8>>,
    escape_formulas: bool,
    row_count: u64,
}

/// Bytes of a file, cut between rows.
#[derive(Debug)]
pub struct ExportChunk {
    pub data: Vec<u8>,
    /// Rows of the file up to the end of this chunk.
    pub row_count: u64,
}

impl ExportWriter {
    /// Starts a file. `escape_formulas` puts `'` before values that spreadsheets would run as formulas.
    pub fn new(escape_formulas: bool) -> Result<Self> {
        let mut csv = empty_chunk();
        csv.write_record(COLUMNS.map(Column::name)).map_err(|_| unwritable())?;
        Ok(Self { csv, escape_formulas, row_count: 0 })
    }

    /// Writes a row; returns a chunk once it has [`EXPORT_CHUNK_BYTES_MIN`].
    pub fn write(&mut self, row: &ExportRow<'_>) -> Result<Option<ExportChunk>> {
        self.field(row.external_id)?;
        self.field(row.title)?;
        self.field(row.description)?;
        self.field(priority_name(row.priority))?;
        self.field(status_name(row.status))?;
        self.field(row.assignee)?;
        self.field(row.labels)?;
        self.field(&time_text(row.create_time))?;
        self.field(&row.close_time.map(time_text).unwrap_or_default())?;
        self.csv.write_record(None::<&[u8]>).map_err(|_| unwritable())?;
        self.row_count += 1;
        if self.csv.get_ref().len() < EXPORT_CHUNK_BYTES_MIN { Ok(None) } else { self.take().map(Some) }
    }

    /// Returns the last chunk, which may be empty.
    pub fn finish(mut self) -> Result<ExportChunk> {
        self.take()
    }

    fn field(&mut self, value: &str) -> Result<()> {
        let written = match self.escape_formulas && value.starts_with(FORMULA_STARTS) {
            true => self.csv.write_field(format!("'{value}")),
            false => self.csv.write_field(value),
        };
        written.map_err(|_| unwritable())
    }

    fn take(&mut self) -> Result<ExportChunk> {
        let full = std::mem::replace(&mut self.csv, empty_chunk());
        let data = full.into_inner().map_err(|_| unwritable())?;
        Ok(ExportChunk { data, row_count: self.row_count })
    }
}

fn empty_chunk() -> csv::Writer<Vec<u8>> {
    let data = Vec::with_capacity(EXPORT_CHUNK_BYTES_MIN + 2 * CSV_BUFFER_BYTES);
    csv::WriterBuilder::new().buffer_capacity(CSV_BUFFER_BYTES).from_writer(data)
}

/// Cannot happen: writing to memory does not fail.
fn unwritable() -> Error {
    Error::Internal("a row could not be written as CSV")
}

fn priority_name(priority: Priority) -> &'static str {
    match priority {
        Priority::Unspecified => "",
        Priority::Low => "low",
        Priority::Medium => "medium",
        Priority::High => "high",
        Priority::Critical => "critical",
    }
}

fn status_name(status: Status) -> &'static str {
    match status {
        // An import gives the issue its default status.
        Status::Unspecified => "",
        Status::Open => "open",
        Status::InProgress => "in_progress",
        Status::Closed => "closed",
    }
}

/// Formats a time as RFC 3339 in UTC, with six fractional digits or none.
fn time_text(time: DateTime<Utc>) -> String {
    let format = if time.nanosecond() == 0 { SecondsFormat::Secs } else { SecondsFormat::Micros };
    time.to_rfc3339_opts(format, true)
}
