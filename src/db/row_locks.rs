//! How statements treat locked rows.

/// What a statement does about rows that other transactions have locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowLocks {
    /// Waits for them, up to `lock_timeout`.
    Wait,
    /// Leaves them unchanged (`SKIP LOCKED`), so that the rest of a batch does not wait.
    Skip,
}
