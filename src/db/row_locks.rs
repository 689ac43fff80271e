//! How statements treat locked rows.

/// What a statement does about rows that other transactions have locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowLocks {
    /// Waits for them, up to `lock_timeout`.
    Wait,
    /// Leaves them unchanged (`SKIP LOCKED`), so that the rest of a batch does not wait.
    Skip,
}

/// How long the statements of a mutation wait for locks of any kind: of rows, index entries and advisory locks.
///
/// `NOWAIT` would cover rows only, and not those that a foreign key locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockWait {
    /// Hardly: at the first lock that another transaction holds, the mutation fails with `LockTimeout`. It needs no permit for
    /// lock waits.
    Brief,
    /// Up to `lock_timeout` of the session. The mutation has a permit for lock waits.
    Full,
}
