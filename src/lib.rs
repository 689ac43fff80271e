//! An issue tracker: gRPC outside, PostgreSQL underneath, raw SQL in transactions in between.

pub mod db;
pub mod filter;
pub mod import;

/// The messages, clients and service traits generated from `proto/`.
pub mod pb {
    tonic::include_proto!("issuetracker.v1");
}

/// The descriptors of `proto/`, with comments, as reflection serves them.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");
