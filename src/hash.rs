//! SHA-256 of several parts.

use sha2::{Digest, Sha256};

/// Returns the SHA-256 of the parts, each preceded by its length, so that no two lists of parts have the same input.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}
