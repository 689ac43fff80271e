//! The memory that messages of requests and responses may take together.

use crate::{
    error::{Error, Result},
    fairness::{FairPermit, FairSemaphore, Flow, SharePercent},
};

/// The memory that messages may take together, of which one flow may take a share.
pub(super) struct MemoryBudget {
    kib: FairSemaphore,
}

impl MemoryBudget {
    /// `name`: the name of the budget in log lines.
    pub fn new(name: &'static str, kib: u32, share: SharePercent) -> Self {
        Self { kib: FairSemaphore::new(name, kib, share) }
    }

    /// Counts `bytes` more of a message that has `before` bytes already, in KiB, until `memory` is dropped.
    pub fn add(&self, memory: &mut MessageMemory, before: usize, bytes: usize) -> Result<()> {
        let kib = (before + bytes).div_ceil(1024) - before.div_ceil(1024);
        if kib == 0 {
            return Ok(());
        }
        let permit = self.kib.try_acquire(memory.flow, u32::try_from(kib).unwrap_or(u32::MAX)).map_err(|_| {
            Error::Exhausted("the memory for requests and responses in flight is used up; try again".to_owned())
        })?;
        match &mut memory.held {
            Some(held) => held.merge(permit),
            None => memory.held = Some(permit),
        }
        Ok(())
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
        let budget = MemoryBudget::new("memory", 100, SharePercent(75));
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
    }
}
