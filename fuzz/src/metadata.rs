use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use issue_tracker::{
    auth::{bearer_sha256, token_sha256},
    hash::sha256,
    middleware::deadline::grpc_timeout,
    transport::client_address::TrustedProxies,
};
use tonic::codegen::http::{HeaderMap, HeaderValue};

/// Any text is a valid timeout, a valid token, or rejected. A token has one spelling. Any bytes are read as the value
/// of `authorization`, and as values of `x-forwarded-for`, one per line.
pub fn metadata(data: &[u8]) {
    assert_bearer_or_none(data);
    assert_client(data);
    if let Ok(text) = std::str::from_utf8(data) {
        assert_timeout(text);
        assert_token_or_none(text);
        assert_token_or_none(&format!("itk_{text}"));
    }
    if let Some((bytes, rest)) = data.split_first_chunk::<32>() {
        assert_token(*bytes);
        if let &[place, other, ..] = rest {
            assert_altered_token_differs(*bytes, place.into(), other);
        }
    }
}

/// The timeout format of the gRPC protocol: `TimeoutValue TimeoutUnit`, with a value of one to eight digits.
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
    for bearer in [format!("Bearer {token}"), format!("bEARER \t {token}\t ")] {
        assert_eq!(bearer_of(bearer.as_bytes()), token_sha256(&token), "{bearer:?}");
    }
    for other in [
        token.clone(),
        format!("Bearer{token}"),
        format!("Bearer\t{token}"),
        format!(" Bearer {token}"),
        format!("Basic {token}"),
        format!("Bearer {token} {token}"),
        format!("Bearer {token}, Bearer {token}"),
    ] {
        assert_eq!(bearer_of(other.as_bytes()), None, "{other:?}");
    }
    for other in
        [&token[1..], &token[..token.len() - 1], &format!("{token}A"), &format!("{token}="), &format!(" {token}")]
    {
        assert_eq!(token_sha256(other), None, "{other:?}");
    }
}

fn assert_altered_token_differs(bytes: [u8; 32], place: usize, other: u8) {
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

fn bearer_of(value: &[u8]) -> Option<[u8; 32]> {
    bearer_sha256(&HeaderValue::from_bytes(value).ok()?)
}

/// The value is the scheme in any case, a space, and a token with optional space around it.
fn assert_bearer_or_none(value: &[u8]) {
    let token = value.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
    let expected = token.and_then(|(_, token)| token_sha256(str::from_utf8(token.trim_ascii()).ok()?));
    // A header value cannot contain line ends.
    if HeaderValue::from_bytes(value).is_ok() {
        assert_eq!(bearer_of(value), expected, "{value:?}");
    }
}

const PROXY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 2, 3));
const UNTRUSTED: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
const HOPS_MAX: usize = 16;
const HOP_BYTES_MAX: usize = 64;

/// The client is the rightmost address that is not a trusted proxy. Values sent by the client itself cannot change it,
/// because the first proxy appends the address of the client.
fn assert_client(values: &[u8]) {
    let proxies: TrustedProxies = "10.0.0.0/8,192.0.2.7, 2001:db8::/32".parse().expect("the list of networks is valid");
    let mut headers = HeaderMap::new();
    for value in values.split(|byte| *byte == b'\n').filter_map(|value| HeaderValue::from_bytes(value).ok()) {
        headers.append("x-forwarded-for", value);
    }
    let client = |peer, headers: &HeaderMap| proxies.client(peer, headers).0;
    assert_eq!(client(UNTRUSTED, &headers), UNTRUSTED);
    assert_eq!(client(PROXY, &headers), expected_client(&headers), "{headers:?}");
    for appended in [", 203.0.113.9", ",203.0.113.9:1, 10.9.9.9, [2001:db8::1]:65535, ::ffff:192.0.2.7"] {
        let mut headers = headers.clone();
        let last = headers.get_all("x-forwarded-for").iter().next_back().map_or(&b""[..], HeaderValue::as_bytes);
        let last =
            HeaderValue::from_bytes(&[last, appended.as_bytes()].concat()).expect("both parts are valid header values");
        headers.append("x-forwarded-for", last);
        assert_eq!(client(PROXY, &headers), UNTRUSTED, "{headers:?}");
    }
}

fn expected_client(headers: &HeaderMap) -> IpAddr {
    let values: Vec<&[u8]> = headers.get_all("x-forwarded-for").iter().map(HeaderValue::as_bytes).collect();
    let list = values.join(&b',');
    let mut client = PROXY;
    for hop in list.split(|byte| *byte == b',').rev().take(HOPS_MAX) {
        let Some(address) = expected_address(hop.trim_ascii()) else { break };
        client = address;
        let is_proxy = match client {
            IpAddr::V4(address) => address.octets()[0] == 10 || address.octets() == [192, 0, 2, 7],
            IpAddr::V6(address) => address.segments()[..2] == [0x2001, 0xdb8],
        };
        if !is_proxy {
            break;
        }
    }
    client
}

/// Parses `address`, `v4:port`, `[v6]` or `[v6]:port`. The last may have a numeric zone id after the address.
fn expected_address(hop: &[u8]) -> Option<IpAddr> {
    let hop = str::from_utf8(hop).ok().filter(|hop| hop.len() <= HOP_BYTES_MAX)?;
    let is_number = |text: &str, max: u128| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse().is_ok_and(|n: u128| n <= max)
    };
    let is_port = |text: &str| text.strip_prefix(':').is_some_and(|port| is_number(port, u16::MAX.into()));
    if let Some((address, port)) = hop.strip_prefix('[').and_then(|hop| hop.split_once(']')) {
        let (address, interface) = address.split_once('%').map_or((address, None), |(address, n)| (address, Some(n)));
        let is_whole = match interface {
            Some(interface) => is_number(interface, u32::MAX.into()) && is_port(port),
            None => port.is_empty() || is_port(port),
        };
        return address.parse().ok().filter(|_| is_whole).map(|address: Ipv6Addr| address.to_canonical());
    }
    let address = match hop.find(':') {
        Some(at) if is_port(&hop[at..]) => hop[..at].parse::<Ipv4Addr>().ok()?.into(),
        _ => hop.parse::<IpAddr>().ok()?,
    };
    Some(address.to_canonical())
}
