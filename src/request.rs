//! Parsing and checks that the RPCs share. Past this module there are no raw strings for ids, enums or bounded text.

mod check;
mod idempotency;
mod mask;
mod page;

pub(crate) use self::idempotency::mutation;
pub use self::{check::Check, idempotency::Mutation};
#[cfg(feature = "internals")]
pub use self::{mask::UPDATE_MASK_PATHS_MAX, page::PageRequest};
pub use crate::limits::*;
