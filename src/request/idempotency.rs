//! Idempotency keys of mutations.

use super::Check;
use crate::db::idempotency::RequestKey;

impl Check {
    /// Whether a mutation is to be remembered, or only tried.
    pub fn mutation(&mut self, request: &impl Mutation) -> RequestKey {
        let request_id = self.optional_uuid("request_id", request.request_id());
        RequestKey {
            request_id: request_id.map(|id| (id, request.fingerprint())),
            validate_only: request.validate_only(),
        }
    }
}

/// A request that changes something.
pub trait Mutation {
    fn request_id(&self) -> &str;
    fn validate_only(&self) -> bool;
    /// SHA-256 over the method's name and the payload, without request id, `validate_only` and secrets.
    fn fingerprint(&self) -> [u8; 32];
}

/// Implements [`Mutation`] for a request message; the fields after `without` are secrets.
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
                $crate::request::sha256(&[stringify!($request).as_bytes(), &prost::Message::encode_to_vec(&payload)])
            }
        }
    )+};
}
pub(crate) use mutation;
