//! Flows: the units between which resources are shared, and how much of a resource one may take.

use std::net::IpAddr;

use uuid::Uuid;

/// The user or client that a request is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flow {
    /// The service itself: batches of many callers, and maintenance. Served first, and may hold all permits but one, because
    /// the service bounds this work itself.
    Internal,
    User(Uuid),
    /// A client that has not been authenticated.
    Address(IpAddr),
}

/// The part of a resource that one flow may hold, in percent. The rest stays free for other flows, even if there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharePercent(pub u32);

impl SharePercent {
    /// Returns how many of `total` one flow may hold: at least one, and not all if there are two.
    pub fn of(self, total: u32) -> u32 {
        let share = u64::from(total) * u64::from(self.0) / 100;
        u32::try_from(share).unwrap_or(total).min(total.saturating_sub(1)).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn share_is_at_least_one_and_leaves_one_where_there_are_two() {
        let shares = [1, 2, 3, 4, 20, 1_024].map(|total| SharePercent(75).of(total));
        assert_eq!(shares, [1, 1, 2, 3, 15, 768]);
        assert_eq!([1, 2, 20].map(|total| SharePercent(100).of(total)), [1, 1, 19]);
        assert_eq!(SharePercent(1).of(20), 1);
    }
}
