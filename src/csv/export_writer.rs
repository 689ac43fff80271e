//! Issues to the CSV that [`crate::import`] reads back: pure, without I/O.

use chrono::{DateTime, SecondsFormat, Timelike, Utc};

use crate::{
    csv::Column,
    error::{Error, Result},
    pb::{Priority, Status},
};

/// How large a piece is at least, the last one aside; the row that reaches it is still in it.
pub const EXPORT_PIECE_BYTES: usize = 64 * 1024;
/// What the csv crate gathers before it adds it to the piece.
const CSV_BUFFER_BYTES: usize = 8 * 1024;

/// The columns, in the order of the file.
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

/// What a spreadsheet takes for the beginning of a formula.
const FORMULA_STARTS: [char; 6] = ['=', '+', '-', '@', '\t', '\r'];

/// An issue as the file has it.
#[derive(Clone, Copy, Debug)]
pub struct ExportRow<'a> {
    /// Empty: none.
    pub external_id: &'a str,
    pub title: &'a str,
    pub description: &'a str,
    pub priority: Priority,
    pub status: Status,
    /// A username; empty: nobody.
    pub assignee: &'a str,
    /// Names, with `;` between them.
    pub labels: &'a str,
    pub create_time: DateTime<Utc>,
    pub close_time: Option<DateTime<Utc>>,
}

/// Rows to pieces of a file. Its first piece begins with the header.
pub struct ExportWriter {
    csv: csv::Writer<Vec<u8>>,
    escape_formulas: bool,
    row_count: u64,
}

/// Bytes of a file, cut between rows.
#[derive(Debug)]
pub struct ExportPiece {
    pub data: Vec<u8>,
    /// Rows of the file up to the end of this piece.
    pub row_count: u64,
}

impl ExportWriter {
    pub fn new(escape_formulas: bool) -> Result<Self> {
        let mut csv = empty_piece();
        csv.write_record(COLUMNS.map(Column::name)).map_err(|_| unwritable())?;
        Ok(Self { csv, escape_formulas, row_count: 0 })
    }

    /// Adds a row; a piece when it is large enough.
    pub fn write(&mut self, row: &ExportRow<'_>) -> Result<Option<ExportPiece>> {
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
        if self.csv.get_ref().len() < EXPORT_PIECE_BYTES { Ok(None) } else { self.take().map(Some) }
    }

    /// What is left at the end; it may be empty.
    pub fn finish(mut self) -> Result<ExportPiece> {
        self.take()
    }

    fn field(&mut self, value: &str) -> Result<()> {
        let written = match self.escape_formulas && value.starts_with(FORMULA_STARTS) {
            true => self.csv.write_field(format!("'{value}")),
            false => self.csv.write_field(value),
        };
        written.map_err(|_| unwritable())
    }

    fn take(&mut self) -> Result<ExportPiece> {
        let full = std::mem::replace(&mut self.csv, empty_piece());
        let data = full.into_inner().map_err(|_| unwritable())?;
        Ok(ExportPiece { data, row_count: self.row_count })
    }
}

fn empty_piece() -> csv::Writer<Vec<u8>> {
    let data = Vec::with_capacity(EXPORT_PIECE_BYTES + 2 * CSV_BUFFER_BYTES);
    csv::WriterBuilder::new().buffer_capacity(CSV_BUFFER_BYTES).from_writer(data)
}

/// Memory takes whatever is written to it.
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
        // What an import takes the empty field for.
        Status::Unspecified => "",
        Status::Open => "open",
        Status::InProgress => "in_progress",
        Status::Closed => "closed",
    }
}

/// One text for each time: in UTC, with six digits of a second's fraction or none.
fn time_text(time: DateTime<Utc>) -> String {
    let format = if time.nanosecond() == 0 { SecondsFormat::Secs } else { SecondsFormat::Micros };
    time.to_rfc3339_opts(format, true)
}
