//! The memory that messages of requests and responses may take together.

use crate::{
    error::{Error, Result},
    fairness::{FairPermit, FairSemaphore, Flow, SharePercent},
};

/// The memory that messages may take together, of which one flow may take a share.
pub(super) struct MemoryBudget {
    /// The first bytes of each message, which are not counted.
    uncounted_bytes: usize,
    kib: FairSemaphore,
}

impl MemoryBudget {
    /// `name`: the name of the budget in log lines.
    pub fn new(name: &'static str, uncounted_bytes: usize, kib: u32, share: SharePercent) -> Self {
        Self { uncounted_bytes, kib: FairSemaphore::new(name, kib, share) }
    }

    /// Counts `bytes` more of a message that has `before` bytes already, in KiB, until `memory` is dropped.
    pub fn add(&self, memory: &mut MessageMemory, before: usize, bytes: usize) -> Result<()> {
        match self.counted_kib(before + bytes) - self.counted_kib(before) {
            0 => {}
            kib => memory.hold(self.kib.try_acquire(memory.flow, kib).map_err(|_| {
                Error::Exhausted("the memory for requests and responses in flight is used up; try again".to_owned())
            })?),
        }
        Ok(())
    }

    /// As [`MemoryBudget::add`], for a message that cannot be refused: others are refused instead until it is dropped.
    pub fn add_beyond(&self, memory: &mut MessageMemory, bytes: usize) {
        memory.hold(self.kib.overdraw(memory.flow, self.counted_kib(bytes)));
    }

    fn counted_kib(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.saturating_sub(self.uncounted_bytes).div_ceil(1024)).unwrap_or(u32::MAX)
    }
}

/// What the messages of a call hold of a budget.
pub(super) struct MessageMemory {
    flow: Flow,
    held: Option<FairPermit>,
}

impl MessageMemory {
    pub fn of(flow: Flow) -> Self {
        Self { flow, held: None }
    }

    fn hold(&mut self, permit: FairPermit) {
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
    }

    #[cfg(test)]
    pub fn kib(&self) -> u32 {
        self.held.as_ref().map_or(0, FairPermit::count)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn bytes_are_counted_until_the_memory_is_dropped() {
        let budget = MemoryBudget::new("memory", 0, 100, SharePercent(75));
        let [one, two] = [1, 2].map(|id| Flow::User(Uuid::from_u128(id)));
        let mut first = MessageMemory::of(one);
        budget.add(&mut first, 0, 1).unwrap();
        budget.add(&mut first, 1, 1023).unwrap();
        assert_eq!(first.kib(), 1);
        budget.add(&mut first, 1024, 74 * 1024).unwrap();
        assert_eq!(first.kib(), 75);
        // The share of one flow, and then the whole.
        assert!(matches!(budget.add(&mut first, 75 * 1024, 1), Err(Error::Exhausted(_))));
        let mut second = MessageMemory::of(two);
        assert!(matches!(budget.add(&mut second, 0, 25 * 1024 + 1), Err(Error::Exhausted(_))));
        budget.add(&mut second, 0, 25 * 1024).unwrap();
        drop(first);
        budget.add(&mut second, 25 * 1024, 50 * 1024).unwrap();
        budget.add_beyond(&mut second, 100 * 1024);
        assert!(matches!(budget.add(&mut MessageMemory::of(one), 0, 1), Err(Error::Exhausted(_))));
        drop(second);
        budget.add(&mut MessageMemory::of(one), 0, 1).unwrap();
    }

    #[test]
    fn first_bytes_can_be_free() {
        let budget = MemoryBudget::new("memory", 1024, 4, SharePercent(75));
        let mut memory = MessageMemory::of(Flow::Internal);
        budget.add(&mut memory, 0, 4 * 1024).unwrap();
        let mut other = MessageMemory::of(Flow::Internal);
        assert!(matches!(budget.add(&mut other, 0, 1025), Err(Error::Exhausted(_))));
        budget.add(&mut other, 0, 1024).unwrap();
        assert_eq!((memory.kib(), other.kib()), (3, 0));
    }
}
