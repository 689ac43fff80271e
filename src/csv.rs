//! CSV bytes ↔ rows. Pure code without I/O: how a file is cut into chunks never changes the result.
//!
//! Import: [`record_reader`] splits bytes into records, [`header`] maps fields to [columns](mod@column), [`row`] parses a
//! record into a typed row or the list of its [errors](error), and [`batch`] groups rows, as the
//! [`format`](mod@format) says. Export: [`export_writer`] turns issues into bytes.

pub mod batch;
pub mod column;
pub mod error;
pub mod export_writer;
pub mod format;
pub mod header;
pub mod record_reader;
pub mod row;

pub use batch::{Batch, BatchReader, FileError, FilePosition};
pub use column::Column;
pub use error::{HeaderError, RowError, RowErrorCode, shorten};
pub use export_writer::{ExportChunk, ExportWriter};
pub use format::{Format, column_key};
pub use header::Header;
pub use row::ImportRow;

// Tests and fuzz targets check each step by itself; the service calls `BatchReader` and `ExportWriter`.
#[cfg(feature = "internals")]
pub use self::{
    error::{HeaderErrorCode, IMPORT_ERROR_VALUE_CHARS_MAX},
    export_writer::{EXPORT_CHUNK_BYTES_MIN, ExportRow},
    record_reader::{IMPORT_COLUMNS_MAX, IMPORT_RECORD_BYTES_MAX, Record, RecordDefect, RecordReader},
    row::parse_row,
};
