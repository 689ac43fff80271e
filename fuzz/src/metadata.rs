use std::time::Duration;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use issue_tracker::{auth::token_sha256, gate::grpc_timeout, request::sha256};

/// Any text is a timeout, a token, or neither, and each of these has one spelling.
pub fn metadata(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        assert_timeout(text);
        assert_token_or_none(text);
        assert_token_or_none(&format!("itk_{text}"));
    }
    if let Some((bytes, rest)) = data.split_first_chunk::<32>() {
        assert_token(*bytes);
        if let &[place, other, ..] = rest {
            assert_altered_is_another(*bytes, place.into(), other);
        }
    }
}

/// As the protocol has it: `TimeoutValue TimeoutUnit`, where the value has one to eight digits.
fn assert_timeout(text: &str) {
    let units = [("H", 3_600_000_000_000), ("M", 60_000_000_000), ("S", 1_000_000_000), ("m", 1_000_000), ("u", 1_000)];
    let mut units = units.into_iter().chain([("n", 1)]);
    let expected = units.find_map(|(unit, nanos)| {
        let digits = text.strip_suffix(unit)?;
        let is_value = (1..=8).contains(&digits.len()) && digits.chars().all(|digit| digit.is_ascii_digit());
        is_value.then(|| digits.chars().fold(0_u128, |value, digit| value * 10 + digit as u128 - '0' as u128) * nanos)
    });
    assert_eq!(grpc_timeout(text).as_ref().map(Duration::as_nanos), expected, "{text:?}");
}

fn assert_token_or_none(text: &str) {
    if let Some(sha256_of_token) = token_sha256(text) {
        let encoded = text.strip_prefix("itk_").expect("a token has its prefix");
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(encoded).expect("a token is base64");
        assert_eq!(bytes.len(), 32);
        assert_eq!(sha256_of_token, sha256(&[&bytes]));
        assert_eq!(BASE64_URL_SAFE_NO_PAD.encode(bytes), encoded, "a token has one spelling");
    }
}

fn token_of(bytes: [u8; 32]) -> String {
    format!("itk_{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

fn assert_token(bytes: [u8; 32]) {
    let token = token_of(bytes);
    assert_eq!(token_sha256(&token), Some(sha256(&[&bytes])));
    for other in
        [&token[1..], &token[..token.len() - 1], &format!("{token}A"), &format!("{token}="), &format!(" {token}")]
    {
        assert_eq!(token_sha256(other), None, "{other:?}");
    }
}

fn assert_altered_is_another(bytes: [u8; 32], place: usize, other: u8) {
    let token = token_of(bytes);
    let mut altered = token.clone().into_bytes();
    let place = place % altered.len();
    altered[place] = other;
    if let Ok(altered) = std::str::from_utf8(&altered)
        && altered != token
    {
        assert_token_or_none(altered);
        assert_ne!(token_sha256(altered), token_sha256(&token), "{altered} for {token}");
    }
}
