//! The address of the client that makes a call, also where proxies stand in front of the server.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

use http::{HeaderMap, HeaderName};
use ipnet::{IpNet, Ipv6Net};

/// The header to which each proxy appends the address that it was called from.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The maximum number of hops that are read: more than proxies stand in a row.
const HOPS_MAX: usize = 16;
/// Longer than the text of any address with a port.
const HOP_BYTES_MAX: usize = 64;
/// The network of the IPv4-mapped IPv6 addresses.
const ALL_IPV4: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);
/// The network prefix that one IPv6 subscriber has.
const IPV6_SUBSCRIBER_PREFIX_BITS: u32 = 64;

/// The address of the client that makes a call, in its canonical form. The extensions of each request contain one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

impl ClientAddress {
    /// Returns what limits per client count by: the IPv4 address, or the /64 network of the IPv6 address, whose addresses
    /// all belong to one subscriber.
    pub fn network(self) -> IpAddr {
        match self.0.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => {
                let prefix = u128::MAX << (u128::BITS - IPV6_SUBSCRIBER_PREFIX_BITS);
                Ipv6Addr::from_bits(address.to_bits() & prefix).into()
            }
        }
    }
}

/// The proxies whose `x-forwarded-for` is trusted. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct TrustedProxies(Arc<[IpNet]>);

impl TrustedProxies {
    /// Returns the address of the client of a request that came from `peer` with these headers.
    ///
    /// If the peer is a trusted proxy, this is the rightmost address in `x-forwarded-for` that is not a trusted proxy.
    /// What clients write into the header stands to the left of what the first trusted proxy appends, and is never read.
    /// Where the header ends or contains something else than an address, it is the last trusted proxy that was found.
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
        self.0.iter().any(|network| network.contains(&address))
    }
}

/// Parses addresses and networks separated by commas. An empty list trusts no proxy.
impl FromStr for TrustedProxies {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        text.split(',').map(|entry| parse_network(entry.trim())).collect::<Result<_, _>>().map(Self)
    }
}

/// Returns the hops of all values of the header as if they were one list; `None` for a hop that is not an address.
fn hops_from_the_right(headers: &HeaderMap) -> impl Iterator<Item = Option<IpAddr>> {
    let values = headers.get_all(FORWARDED_FOR).into_iter().rev();
    values.flat_map(|value| value.as_bytes().rsplit(|byte| *byte == b',')).map(hop_address)
}

/// Parses an address as proxies write it: with or without a port, an IPv6 address with or without brackets.
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

/// Parses an address or a network in CIDR notation. An IPv4-mapped IPv6 network becomes an IPv4 network.
///
/// Networks of all IPv4 addresses are refused, as are networks with bits set after the prefix.
fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address.to_canonical()),
        Err(_) => text.parse::<IpNet>().map_err(|_| {
            format!("\"{text}\" is neither an IP address nor a network; expected for example 10.0.0.7 or 10.0.0.0/8")
        })?,
    };
    // If every client were a trusted proxy, each could claim any address.
    if network.prefix_len() == 0 || network.contains(&IpNet::V6(ALL_IPV4)) {
        return Err(format!("\"{text}\" contains all IPv4 addresses; expected only trusted proxies"));
    }
    // A single address may have been meant.
    if network.addr() != network.network() {
        return Err(format!("\"{text}\" has bits set after its prefix; expected {}", network.trunc()));
    }
    let mapped = network.addr().to_canonical();
    match network {
        IpNet::V6(v6) if mapped.is_ipv4() && v6.prefix_len() >= ALL_IPV4.prefix_len() => {
            IpNet::new(mapped, v6.prefix_len() - ALL_IPV4.prefix_len()).map_err(|error| error.to_string())
        }
        network => Ok(network),
    }
}

#[cfg(test)]
mod tests;
