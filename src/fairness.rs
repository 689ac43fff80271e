//! Fair shares: permits and queues that callers share, so that none of them uses up what the others need.
//!
//! The terms are those of API Priority and Fairness in Kubernetes: requests of one [`Flow`] compete with each other, and
//! flows compete as equals, however many requests each has.

mod flow;
mod queue;
mod refusals;
mod semaphore;

pub use self::{
    flow::{Flow, SharePercent},
    queue::FairQueue,
    refusals::{Refusal, RefusalCounters},
    semaphore::{FairPermit, FairSemaphore},
};
