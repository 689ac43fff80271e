//! Idempotency keys and dry runs of mutations.

use super::Check;
use crate::db::idempotency::{IdempotencyKey, MutationOptions};

impl Check {
    /// Parses `request_id` and `validate_only`.
    pub fn mutation_options(&mut self, request: &impl Mutation) -> MutationOptions {
        let request_id = self.optional_uuid("request_id", request.request_id());
        MutationOptions {
            key: request_id.map(|request_id| IdempotencyKey { request_id, fingerprint: request.fingerprint() }),
            validate_only: request.validate_only(),
        }
    }
}

/// A request that changes data.
pub trait Mutation {
    fn request_id(&self) -> &str;
    fn validate_only(&self) -> bool;
    /// Returns the SHA-256 of the name of the message and its payload, without `request_id`, `validate_only` and secrets.
    fn fingerprint(&self) -> [u8; 32];
}

/// Implements [`Mutation`] for request messages. The fields after `without` are secrets.
macro_rules! mutation {
    ($($request:ident $(without $($secret:ident),+)?;)+) => {$(
        impl $crate::request::Mutation for $crate::pb::$request {
            fn request_id(&self) -> &str {
                &self.request_id
            }
            fn validate_only(&self) -> bool {
                self.validate_only
            }
            fn fingerprint(&self) -> [u8; 32] {
                let mut payload = self.clone();
                payload.request_id.clear();
                payload.validate_only = false;
                $($(payload.$secret.clear();)+)?
                $crate::hash::sha256(&[stringify!($request).as_bytes(), &prost::Message::encode_to_vec(&payload)])
            }
        }
    )+};
}
pub(crate) use mutation;
