//! CSV bytes to rows and row errors: pure, without I/O, so that a file cut anywhere gives the same rows.
//!
//! [`record_reader`] cuts bytes into records, [`header`] finds the columns, [`row`] makes a record a typed row or the list of
//! its errors, all as the [`format`](mod@format) says.

pub mod error;
pub mod export_writer;
pub mod format;
pub mod header;
pub mod record_reader;
pub mod row;

pub use error::{HeaderFault, HeaderFaultCode, IMPORT_ERROR_VALUE_CHARS_MAX, RowError, RowErrorCode, shorten};
pub use format::{Format, column_key};
pub use header::{Column, Columns};
pub use record_reader::{IMPORT_COLUMNS_MAX, IMPORT_RECORD_BYTES_MAX, Record, RecordFault, RecordReader};
pub use row::{ImportRow, parse_row};
