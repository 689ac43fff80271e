//! What holds for any bytes from outside, whatever they are: a function for each decoder, which panics where it does not.
//!
//! The fuzz targets call these with what libFuzzer makes up, and `tests/fuzz_seeds.rs` of the main package with `seeds/`, so that
//! what was found once stays found without a nightly toolchain.

mod errors;
mod filter;
mod import;
mod memory;
mod metadata;
mod request;

pub use filter::filter;
pub use import::{import_file, import_record};
pub use metadata::metadata;
pub use request::{page_token, update_mask};
