//! The memory that messages of requests and responses may take together.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// The memory that messages may take together.
pub(super) struct MemoryBudget {
    /// The first bytes of each message, which are not counted.
    uncounted_bytes: usize,
    kib: Arc<Semaphore>,
}

impl MemoryBudget {
    pub fn new(uncounted_bytes: usize, kib: usize) -> Self {
        Self { uncounted_bytes, kib: Arc::new(Semaphore::new(kib)) }
    }

    /// Counts `bytes` more of a message that has `before` bytes already. Returns `None` if they are among the uncounted
    /// ones.
    pub fn acquire(&self, before: usize, bytes: usize) -> Result<Option<OwnedSemaphorePermit>> {
        let counted_kib = |bytes: usize| bytes.saturating_sub(self.uncounted_bytes).div_ceil(1024);
        let kib = counted_kib(before + bytes) - counted_kib(before);
        if kib == 0 {
            return Ok(None);
        }
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.kib).try_acquire_many_owned(kib);
        permit.map(Some).map_err(|_| {
            Error::Exhausted("the memory for large requests and responses in flight is used up; try again".to_owned())
        })
    }
}

/// The permits that the messages of a call hold.
#[derive(Default)]
pub(super) struct Permits(pub Vec<OwnedSemaphorePermit>);

#[cfg(test)]
mod tests {
    use super::*;

    const UNCOUNTED_BYTES: usize = 64 * 1024;

    #[test]
    fn bytes_beyond_the_uncounted_ones_are_counted_until_the_permit_is_dropped() {
        let budget = MemoryBudget::new(UNCOUNTED_BYTES, 100);
        assert!(budget.acquire(0, UNCOUNTED_BYTES).unwrap().is_none());
        let first = budget.acquire(UNCOUNTED_BYTES, 60 * 1024).unwrap();
        let second = budget.acquire(0, UNCOUNTED_BYTES + 40 * 1024).unwrap();
        assert!(first.is_some() && second.is_some());
        assert!(matches!(budget.acquire(0, UNCOUNTED_BYTES + 1), Err(Error::Exhausted(_))));
        assert!(budget.acquire(0, UNCOUNTED_BYTES).unwrap().is_none());
        drop(first);
        assert!(budget.acquire(0, UNCOUNTED_BYTES + 60 * 1024).unwrap().is_some());
    }
}
