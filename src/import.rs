//! CSV bytes to rows and row errors.

pub mod reader;
pub mod row;
