//! A queue that takes its flows in turns.

use std::collections::{HashMap, HashSet, VecDeque};

use super::flow::Flow;

/// A queue in order of arrival within each flow, which takes one item of each flow in turn.
pub struct FairQueue<T> {
    items: HashMap<Flow, VecDeque<T>>,
    /// The flows that have items, the next one first.
    turns: VecDeque<Flow>,
    len: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self { items: HashMap::new(), turns: VecDeque::new(), len: 0 }
    }
}

impl<T> FairQueue<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn len_of(&self, flow: Flow) -> usize {
        self.items.get(&flow).map_or(0, VecDeque::len)
    }

    pub fn push_back(&mut self, flow: Flow, item: T) {
        let items = self.items.entry(flow).or_default();
        if items.is_empty() {
            self.turns.push_back(flow);
        }
        items.push_back(item);
        self.len += 1;
    }

    /// Puts back items in the order in which [`FairQueue::pop_front`] has returned them: they are the first of their flows,
    /// whose turns are next.
    pub fn put_back(&mut self, items: Vec<(Flow, T)>) {
        if items.is_empty() {
            return;
        }
        self.len += items.len();
        let (mut flows, mut turns) = (HashSet::new(), VecDeque::new());
        turns.extend(items.iter().map(|(flow, _)| *flow).filter(|flow| flows.insert(*flow)));
        turns.extend(self.turns.drain(..).filter(|flow| !flows.contains(flow)));
        self.turns = turns;
        for (flow, item) in items.into_iter().rev() {
            self.items.entry(flow).or_default().push_front(item);
        }
    }

    /// Returns the first item of the flow whose turn it is.
    pub fn pop_front(&mut self) -> Option<T> {
        let flow = self.turns.pop_front()?;
        let items = self.items.get_mut(&flow)?;
        let item = items.pop_front()?;
        self.len -= 1;
        if items.is_empty() {
            self.items.remove(&flow);
        } else {
            self.turns.push_back(flow);
        }
        Some(item)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn flows_are_taken_in_turns_and_each_in_order_of_arrival() {
        let [one, two] = [1, 2].map(|id| Flow::User(Uuid::from_u128(id)));
        let mut queue = FairQueue::default();
        (0..3).for_each(|nth| queue.push_back(one, ("one", nth)));
        queue.push_back(two, ("two", 0));
        assert_eq!((queue.len(), queue.len_of(one), queue.len_of(two)), (4, 3, 1));
        let all: Vec<_> = std::iter::from_fn(|| queue.pop_front()).collect();
        assert_eq!(all, [("one", 0), ("two", 0), ("one", 1), ("one", 2)]);
        assert!(queue.is_empty() && queue.items.is_empty());
    }

    #[test]
    fn items_that_are_put_back_are_the_next_ones() {
        let [one, two, three] = [1, 2, 3].map(|id| Flow::User(Uuid::from_u128(id)));
        let mut queue = FairQueue::default();
        (0..3).for_each(|nth| queue.push_back(one, (one, nth)));
        queue.push_back(two, (two, 10));
        queue.push_back(three, (three, 20));
        let popped: Vec<_> = (0..4).map_while(|_| queue.pop_front()).collect();
        assert_eq!(popped, [(one, 0), (two, 10), (three, 20), (one, 1)]);
        queue.put_back([popped[0], popped[1], popped[3]].map(|item| (item.0, item)).into());
        assert_eq!((queue.len(), queue.len_of(one)), (4, 3));
        let all: Vec<_> = std::iter::from_fn(|| queue.pop_front()).collect();
        assert_eq!(all, [(one, 0), (two, 10), (one, 1), (one, 2)]);
        assert!(queue.is_empty() && queue.items.is_empty() && queue.turns.is_empty());
    }
}
