//! gzip for calls with one message: decompresses requests within the memory budget, and compresses responses.
//!
//! tonic would decompress requests without counting their size, and would compress even the smallest responses, which takes
//! longer than sending them. It still does both for streams, whose messages are bounded by the message limit.

use std::io::{Read, Write};

use bytes::{BufMut, Bytes, BytesMut};
use flate2::{Compression, bufread::GzDecoder, write::GzEncoder};
use http::{HeaderMap, HeaderName};
use tokio::task::yield_now;

use super::memory_budget::{CallMemory, MemoryBudget};
use crate::error::{Error, Result};

/// The flag and the length before each message.
pub const MESSAGE_PREFIX_BYTES: usize = 5;
/// The flag of a compressed message.
const COMPRESSED: u8 = 1;
/// Size from which a response is compressed.
const ZIP_BYTES_MIN: usize = 1024;
pub const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
/// How much is decompressed before it is counted.
const STEP_BYTES: usize = 16 * 1024;

/// Returns whether the messages of a request may be compressed with gzip.
pub fn is_gzip(headers: &HeaderMap) -> bool {
    headers.get(ENCODING).is_some_and(|encoding| encoding == "gzip")
}

/// Decompresses a message with its prefix, if it is flagged as compressed.
///
/// Fails if the message has more than `bytes_max` bytes, without decompressing the rest, or exceeds the budget, or is not
/// the only message of the request. Other tasks run after each step.
pub async fn unzip(message: Bytes, bytes_max: usize, budget: &MemoryBudget, memory: &mut CallMemory) -> Result<Bytes> {
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
    let mut step = vec![0; STEP_BYTES];
    loop {
        let count = decoder.read(&mut step).map_err(|_| Error::undecodable())?;
        if count == 0 {
            break;
        }
        let before = unzipped.len() - MESSAGE_PREFIX_BYTES;
        if before + count > bytes_max {
            return Err(Error::too_large(bytes_max));
        }
        budget.add(memory, count)?;
        unzipped.extend_from_slice(&step[..count]);
        if before > 0 {
            yield_now().await;
        }
    }
    let length = u32::try_from(unzipped.len() - MESSAGE_PREFIX_BYTES).map_err(|_| Error::too_large(bytes_max))?;
    unzipped[1..MESSAGE_PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(unzipped.freeze())
}

/// Removes the encodings that the client accepts, so that tonic does not compress. Returns whether gzip is one of them.
pub fn take_accepts_gzip(headers: &mut HeaderMap) -> bool {
    let accepted = headers.remove(ACCEPT_ENCODING);
    let accepted = accepted.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
    accepted.split(',').any(|encoding| encoding.trim() == "gzip")
}

/// Compresses a response message with its prefix. `None` if it is too small or would not get smaller.
pub fn zip(message: &[u8]) -> Option<Bytes> {
    let (prefix, content) = message.split_first_chunk::<MESSAGE_PREFIX_BYTES>()?;
    if content.len() < ZIP_BYTES_MIN || prefix[0] == COMPRESSED {
        return None;
    }
    let mut encoder = GzEncoder::new(vec![0; MESSAGE_PREFIX_BYTES], Compression::fast());
    // Writing to a vector cannot fail.
    encoder.write_all(content).ok()?;
    let mut zipped = encoder.finish().ok()?;
    let length = u32::try_from(zipped.len() - MESSAGE_PREFIX_BYTES).ok()?;
    zipped[0] = COMPRESSED;
    zipped[1..MESSAGE_PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    (zipped.len() < message.len()).then(|| zipped.into())
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;
    use crate::fairness::{Flow, SharePercent};

    const BYTES_MAX: usize = 1024 * 1024;

    fn zipped(message: &[u8]) -> Bytes {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(message).unwrap();
        let compressed = encoder.finish().unwrap();
        let length = u32::try_from(compressed.len()).unwrap().to_be_bytes();
        [&[COMPRESSED][..], &length, &compressed].concat().into()
    }

    fn unzip_within(kib: u32, message: &Bytes) -> (Result<Bytes>, usize) {
        let budget = MemoryBudget::new("memory", 0, kib, SharePercent(100));
        let mut memory = CallMemory::of(Flow::Internal);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let unzipped = runtime.block_on(unzip(message.clone(), BYTES_MAX, &budget, &mut memory));
        (unzipped, memory.kib() as usize)
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

    #[tokio::test]
    async fn other_tasks_run_while_a_message_is_decompressed() {
        let turns = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&turns);
        let other = tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                yield_now().await;
            }
        });
        let budget = MemoryBudget::new("memory", 0, 2_000, SharePercent(100));
        let mut memory = CallMemory::of(Flow::Internal);
        unzip(zipped(&[7; BYTES_MAX]), BYTES_MAX, &budget, &mut memory).await.unwrap();
        assert!(turns.load(Ordering::Relaxed) >= BYTES_MAX / STEP_BYTES / 2);
        other.abort();
    }

    #[test]
    fn responses_are_compressed_from_one_kib_if_they_get_smaller() {
        let message = |content: &[u8]| {
            let length = u32::try_from(content.len()).unwrap().to_be_bytes();
            [&[0][..], &length, content].concat()
        };
        let large = message(&[7; ZIP_BYTES_MIN]);
        let zipped = zip(&large).unwrap();
        assert!(zipped.len() < large.len());
        assert_eq!(unzip_within(2, &zipped).0.unwrap(), large);
        let random: Vec<u8> = (0..ZIP_BYTES_MIN).map(|_| fastrand::u8(..)).collect();
        for unchanged in [message(&[7; ZIP_BYTES_MIN - 1]), message(&random), zipped.to_vec(), vec![]] {
            assert!(zip(&unchanged).is_none());
        }
    }

    #[test]
    fn accepted_encodings_are_read_and_removed() {
        for (value, accepts) in
            [("gzip", true), ("identity, deflate, gzip", true), ("identity", false), ("gzipped", false)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT_ENCODING, value.parse().unwrap());
            assert_eq!(take_accepts_gzip(&mut headers), accepts, "{value}");
            assert!(headers.is_empty());
        }
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
