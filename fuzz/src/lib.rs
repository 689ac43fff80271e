//! Properties that hold for any input: one function per decoder of external bytes, which panics when a property is
//! violated.
//!
//! The fuzz targets call them with generated inputs. `tests/fuzz_seeds.rs` of the main package calls them with
//! `seeds/`, so that inputs found earlier are tested without a nightly toolchain.

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
