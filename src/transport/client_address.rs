//! Who a client is where proxies stand in front of the service.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use http::{HeaderMap, HeaderName};

/// Where each proxy appends the address that it was called from.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// How many hops are looked at: more proxies than stand in a row anywhere.
const HOPS_MAX: usize = 16;
/// The longest text of an address with a port has fewer.
const HOP_BYTES_MAX: usize = 64;
/// An IPv4 address is the last 32 bits of an IPv6 one.
const IPV4_PREFIX_BITS: u32 = 96;

/// Who has made a request; the gate puts it into the request's extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

/// The proxies that are believed. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(Arc<[Network]>);

impl TrustedProxies {
    /// Who has made a request that came from `peer` with these headers.
    ///
    /// From a trusted proxy, that is the rightmost address in `x-forwarded-for` that is none itself: what clients write
    /// into the header stands to the left of what the first trusted proxy has appended, and is never read. Where the header
    /// ends, or has something else than an address, it is the trusted proxy that was found last.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> ClientAddress {
        let mut client = peer.to_canonical();
        let mut hops = hops_from_the_right(headers).take(HOPS_MAX);
        while self.trusts(client)
            && let Some(hop) = hops.next().flatten()
        {
            client = hop;
        }
        ClientAddress(client)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(address))
    }
}

/// Addresses and networks with commas between them; empty: none.
impl FromStr for TrustedProxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        text.split(',').map(|entry| entry.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

/// What the values say, all of them one after the other as if they were one; none: it is no address.
fn hops_from_the_right(headers: &HeaderMap) -> impl Iterator<Item = Option<IpAddr>> {
    let values = headers.get_all(FORWARDED_FOR).into_iter().rev();
    values.flat_map(|value| value.as_bytes().rsplit(|byte| *byte == b',')).map(hop_address)
}

/// An address as proxies write it: with a port or without, an IPv6 one in brackets or not.
fn hop_address(hop: &[u8]) -> Option<IpAddr> {
    let hop = hop.trim_ascii();
    if hop.len() > HOP_BYTES_MAX {
        return None;
    }
    let hop = str::from_utf8(hop).ok()?;
    let in_brackets = || hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || hop.parse().ok().map(|address: SocketAddr| address.ip());
    let address = hop.parse().ok().or_else(with_port).or_else(in_brackets)?;
    Some(address.to_canonical())
}

/// Some first bits that addresses have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    first: u128,
    prefix_bits: u32,
}

impl Network {
    fn contains(self, address: IpAddr) -> bool {
        (self.first ^ bits(address)).leading_zeros() >= self.prefix_bits
    }
}

/// An address, or one with the length of its prefix.
impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is neither an address nor a network; they are like 10.0.0.7 and 10.0.0.0/8");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let bits_before = if address.is_ipv4() { IPV4_PREFIX_BITS } else { 0 };
        let prefix_bits = match prefix {
            Some(prefix) => bits_before + u32::from(prefix.parse::<u8>().map_err(|_| wrong())?),
            None => u128::BITS,
        };
        if prefix_bits > u128::BITS {
            return Err(wrong());
        }
        let network = Self { first: bits(address), prefix_bits };
        // Where all clients are proxies, each can say to be somebody else.
        if prefix_bits <= IPV4_PREFIX_BITS && network.contains(Ipv4Addr::UNSPECIFIED.into()) {
            return Err(format!("\"{text}\" has all IPv4 addresses in it; only proxies are to be trusted"));
        }
        // One address may have been meant.
        if network.first.checked_shl(prefix_bits).is_some_and(|behind| behind != 0) {
            return Err(format!("\"{text}\" is more than its network; there are only zeros behind a network's prefix"));
        }
        Ok(network)
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests;
