//! Decompresses the one message of a request, bounded and counted by the memory budget.
//!
//! tonic would decompress messages as well, but their size would not be counted. It still decompresses the messages of
//! request streams, each bounded by the message limit, and compresses responses.

use std::io::Read;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::bufread::GzDecoder;
use http::HeaderMap;

use super::memory_budget::{MemoryBudget, Permits};
use crate::error::{Error, Result};

/// The flag and the length before each message.
pub const MESSAGE_PREFIX_BYTES: usize = 5;
/// The flag of a compressed message.
const COMPRESSED: u8 = 1;
/// How much is decompressed before it is counted.
const STEP_BYTES: usize = 16 * 1024;

/// Returns whether the messages of a request may be compressed with gzip.
pub fn is_gzip(headers: &HeaderMap) -> bool {
    headers.get("grpc-encoding").is_some_and(|encoding| encoding == "gzip")
}

/// Decompresses a message with its prefix, if it is flagged as compressed.
///
/// Fails if the message has more than `bytes_max` bytes, without decompressing the rest, or exceeds the budget, or is not
/// the only message of the request.
pub fn unzip(message: Bytes, bytes_max: usize, budget: &MemoryBudget, permits: &mut Permits) -> Result<Bytes> {
    let Some((prefix, compressed)) = message.split_first_chunk::<MESSAGE_PREFIX_BYTES>() else { return Ok(message) };
    let [flag, length @ ..] = *prefix;
    match compressed.len().checked_sub(u32::from_be_bytes(length) as usize) {
        Some(0) if flag == COMPRESSED => {}
        // tonic would decompress further messages, which nothing counts.
        Some(1..) => return Err(Error::undecodable()),
        // Not compressed, or incomplete, which tonic reports.
        Some(0) | None => return Ok(message),
    }
    let mut unzipped = BytesMut::new();
    unzipped.put_bytes(0, MESSAGE_PREFIX_BYTES);
    let mut decoder = GzDecoder::new(compressed);
    let mut step = [0; STEP_BYTES];
    loop {
        let count = decoder.read(&mut step).map_err(|_| Error::undecodable())?;
        if count == 0 {
            break;
        }
        let before = unzipped.len() - MESSAGE_PREFIX_BYTES;
        if before + count > bytes_max {
            return Err(Error::too_large(bytes_max));
        }
        permits.0.extend(budget.acquire(before, count)?);
        unzipped.extend_from_slice(&step[..count]);
    }
    let length = u32::try_from(unzipped.len() - MESSAGE_PREFIX_BYTES).map_err(|_| Error::too_large(bytes_max))?;
    unzipped[1..MESSAGE_PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(unzipped.freeze())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    const BYTES_MAX: usize = 1024 * 1024;

    fn zipped(message: &[u8]) -> Bytes {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(message).unwrap();
        let compressed = encoder.finish().unwrap();
        let length = u32::try_from(compressed.len()).unwrap().to_be_bytes();
        [&[COMPRESSED][..], &length, &compressed].concat().into()
    }

    fn unzip_within(kib: usize, message: &Bytes) -> (Result<Bytes>, usize) {
        let budget = MemoryBudget::new(0, kib);
        let mut permits = Permits::default();
        let unzipped = unzip(message.clone(), BYTES_MAX, &budget, &mut permits);
        (unzipped, permits.0.iter().map(tokio::sync::OwnedSemaphorePermit::num_permits).sum())
    }

    #[test]
    fn a_compressed_message_is_counted_by_its_decompressed_size() {
        let (unzipped, kib) = unzip_within(2_000, &zipped(&[7; BYTES_MAX]));
        let unzipped = unzipped.unwrap();
        assert_eq!(unzipped[..MESSAGE_PREFIX_BYTES], [0, 0, 16, 0, 0]);
        assert!(unzipped.len() == BYTES_MAX + MESSAGE_PREFIX_BYTES && kib == BYTES_MAX / 1024);
        let (refused, _) = unzip_within(500, &zipped(&[7; BYTES_MAX]));
        assert!(matches!(refused, Err(Error::Exhausted(_))));
    }

    #[test]
    fn a_message_beyond_the_limit_is_refused_after_the_limit_is_decompressed() {
        let bomb = zipped(&vec![0; 64 * BYTES_MAX]);
        assert!(bomb.len() < 100 * 1024);
        let (refused, kib) = unzip_within(2_000, &bomb);
        assert_eq!(refused.unwrap_err().to_string(), Error::too_large(BYTES_MAX).to_string());
        assert!(kib <= BYTES_MAX / 1024);
    }

    #[test]
    fn malformed_and_uncompressed_messages_are_recognised() {
        let whole = zipped(b"a message");
        let mut corrupt = whole.to_vec();
        corrupt[20] ^= 0xff;
        let more = [&whole[..], &whole[..]].concat();
        for refused in [corrupt, more] {
            assert!(unzip_within(1, &refused.clone().into()).0.is_err(), "{refused:?}");
        }
        // tonic reports the incomplete ones.
        for unchanged in [&b""[..], b"\x01\0\0", b"\0\0\0\0\x01a", &whole[..whole.len() - 1]] {
            let unchanged = Bytes::copy_from_slice(unchanged);
            assert_eq!(unzip_within(1, &unchanged).0.unwrap(), unchanged);
        }
    }
}
