//! The memory that calls may take together.

use crate::{
    error::{Error, Result},
    fairness::{FairPermit, FairSemaphore, Flow, SharePercent},
};

/// The memory that calls may take together, of which one flow may take a share.
pub(super) struct MemoryBudget {
    /// The first bytes of each call, which are not counted.
    uncounted_bytes: usize,
    kib: FairSemaphore,
}

impl MemoryBudget {
    /// `name`: the name of the budget in log lines.
    pub fn new(name: &'static str, uncounted_bytes: usize, kib: u32, share: SharePercent) -> Self {
        Self { uncounted_bytes, kib: FairSemaphore::new(name, kib, share) }
    }

    /// Counts `bytes` more of a call, in KiB, until `memory` is dropped.
    pub fn add(&self, memory: &mut CallMemory, bytes: usize) -> Result<()> {
        self.set(memory, memory.bytes + bytes)
    }

    /// Counts `bytes` of a call instead of what was counted before. Cannot fail if that was as much.
    pub fn set(&self, memory: &mut CallMemory, bytes: usize) -> Result<()> {
        let (held, kib) = (memory.kib(), self.counted_kib(bytes));
        if kib > held {
            memory.hold(self.kib.try_acquire(memory.flow, kib - held).map_err(|_| {
                Error::Exhausted("the memory for requests and responses in flight is used up; try again".to_owned())
            })?);
        } else if let Some(permit) = &mut memory.held {
            permit.give_back(held - kib);
        }
        memory.bytes = bytes;
        Ok(())
    }

    fn counted_kib(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.saturating_sub(self.uncounted_bytes).div_ceil(1024)).unwrap_or(u32::MAX)
    }
}

/// What a call holds of a budget.
pub(super) struct CallMemory {
    flow: Flow,
    bytes: usize,
    held: Option<FairPermit>,
}

impl CallMemory {
    pub fn of(flow: Flow) -> Self {
        Self { flow, bytes: 0, held: None }
    }

    /// Returns how many bytes are counted, with those that are free.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns whose messages these are.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    fn hold(&mut self, permit: FairPermit) {
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
    }

    pub fn kib(&self) -> u32 {
        self.held.as_ref().map_or(0, FairPermit::count)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn bytes_are_counted_until_the_memory_is_dropped() {
        let budget = MemoryBudget::new("memory", 0, 100, SharePercent(75));
        let [one, two] = [1, 2].map(|id| Flow::User(Uuid::from_u128(id)));
        let mut first = CallMemory::of(one);
        budget.add(&mut first, 1).unwrap();
        budget.add(&mut first, 1023).unwrap();
        assert_eq!(first.kib(), 1);
        budget.add(&mut first, 74 * 1024).unwrap();
        assert_eq!(first.kib(), 75);
        // The share of one flow, and then the whole.
        assert!(matches!(budget.add(&mut first, 1), Err(Error::Exhausted(_))));
        let mut second = CallMemory::of(two);
        assert!(matches!(budget.add(&mut second, 25 * 1024 + 1), Err(Error::Exhausted(_))));
        budget.add(&mut second, 25 * 1024).unwrap();
        drop(first);
        budget.add(&mut second, 50 * 1024).unwrap();
        assert_eq!(second.kib(), 75);
    }

    #[tokio::test]
    async fn bytes_replace_others_and_return_the_rest() {
        let budget = MemoryBudget::new("memory", 0, 100, SharePercent(75));
        let mut memory = CallMemory::of(Flow::Internal);
        budget.set(&mut memory, 99 * 1024).unwrap();
        assert!(matches!(budget.set(&mut memory, 100 * 1024), Err(Error::Exhausted(_))));
        assert_eq!((memory.kib(), memory.bytes()), (99, 99 * 1024));
        budget.set(&mut memory, 1025).unwrap();
        assert_eq!(memory.kib(), 2);
        let mut other = CallMemory::of(Flow::User(Uuid::nil()));
        budget.add(&mut other, 75 * 1024).unwrap();
    }

    #[tokio::test]
    async fn first_bytes_can_be_free() {
        let budget = MemoryBudget::new("memory", 1024, 4, SharePercent(75));
        let mut memory = CallMemory::of(Flow::Internal);
        budget.add(&mut memory, 512).unwrap();
        assert_eq!(memory.kib(), 0);
        budget.add(&mut memory, 3584).unwrap();
        let mut other = CallMemory::of(Flow::Internal);
        assert!(matches!(budget.add(&mut other, 1025), Err(Error::Exhausted(_))));
        budget.add(&mut other, 1024).unwrap();
        assert_eq!((memory.kib(), other.kib()), (3, 0));
    }
}
