//! The middleware: what happens to a request before a handler sees it, and to the response after.
//!
//! Most files are one layer, a [`tower::Layer`]; the others are what layers share. `server.rs` composes them in this order,
//! from the outside in:
//!
//! 1. [`early_response`] reads the rest of a request before a response that was made without it, so that its stream is not
//!    reset.
//! 2. [`method_policy`] looks up what `proto/` declares about the method. All layers below decide by it.
//! 3. [`call_metrics`] records the call, with the status that the client receives: also calls that a layer below refuses.
//! 4. [`protocol`] refuses what is not gRPC with an HTTP status.
//! 5. [`error_mapping`] turns the errors of all layers below, and those of tonic, into the statuses of the contract.
//! 6. [`call_log`] logs the call at the level debug.
//! 7. [`metadata_limit`] refuses calls with too much metadata.
//! 8. [`deadline`] limits the time of everything below, waiting included.
//! 9. [`draining`] refuses new calls while the server stops. This works even if nothing else in the server does.
//! 10. [`unauthenticated_limits`] limits calls without credentials per client and per connection. They take no request slot,
//!     so that health checks and logins work under load, and unauthenticated load takes no slots from callers.
//! 11. [`admission::LoadSheddingLayer`] refuses calls while there is no free request slot, before they cost a token look-up.
//! 12. [`authentication`] identifies the caller. It comes before a slot is taken: invalid tokens take no slot.
//! 13. [`authorization`] compares the caller's role with the required one: after authentication, before the message is read,
//!     let alone validated.
//! 14. [`reauthentication`] repeats 12 and 13 for streams, every second, and ends streams that would fail now.
//! 15. [`buffering`] buffers the request message and the response within a memory budget, which callers share.
//! 16. [`admission::AdmissionLayer`] takes a request slot, of which callers have shares: once the message is complete, so that
//!     a slow client holds none, and until the response is buffered or its stream ends.
//! 17. [`retry`] repeats calls that failed for a transient reason. It needs the buffered message.
//!
//! A new RPC, streaming or not, needs no change here: everything about it is declared in `proto/`.
//!
//! All services are always ready: the server refuses requests instead of queueing them. What a request holds until its
//! response has been read is a guard in the response body.

pub mod admission;
pub mod authentication;
pub mod authorization;
mod body;
pub mod buffering;
pub mod call_log;
pub mod call_metrics;
mod compression;
pub mod deadline;
pub mod draining;
pub mod early_response;
pub mod error_mapping;
mod memory_budget;
pub mod metadata_limit;
pub mod method_policy;
pub mod method_table;
pub mod protocol;
pub mod reauthentication;
pub mod retry;
pub mod unauthenticated_limits;
mod unread;

use std::time::Duration;

use crate::fairness::SharePercent;

/// The limits of requests.
#[derive(Clone, Copy, Debug)]
pub struct RequestLimits {
    /// Maximum number of concurrent requests, without unauthenticated ones.
    pub requests_max: u32,
    /// The part of the requests, and of the memory for messages, that one user may take.
    pub share: SharePercent,
    /// Maximum size of a call's metadata.
    pub metadata_bytes_max: usize,
    /// Maximum size of one message, also after decompression.
    pub message_bytes_max: usize,
    /// The deadline of calls whose client sets none.
    pub deadline_default: Duration,
}
