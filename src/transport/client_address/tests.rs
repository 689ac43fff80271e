use clap::Parser;
use http::HeaderValue;
use proptest::prelude::*;

use super::*;
use crate::config::Cli;

const PROXIES: &str = "10.0.0.0/8, 192.0.2.7,2001:db8:1::/48";
const PROXY: &str = "10.1.2.3";

fn headers(values: &[&[u8]]) -> HeaderMap {
    let values = values.iter().map(|value| (FORWARDED_FOR, HeaderValue::from_bytes(value).unwrap()));
    values.collect()
}

/// Returns the client when the proxy at 10.1.2.3 sends these values.
fn client(values: &[&[u8]]) -> String {
    client_of(PROXY, values)
}

fn client_of(peer: &str, values: &[&[u8]]) -> String {
    let proxies: TrustedProxies = PROXIES.parse().unwrap();
    proxies.client(peer.parse().unwrap(), &headers(values)).0.to_string()
}

#[test]
fn the_client_is_the_rightmost_address_that_is_not_a_trusted_proxy() {
    for (values, wanted) in [
        (&["203.0.113.9"][..], "203.0.113.9"),
        // What the client itself has sent is ignored.
        (&["198.51.100.1, 203.0.113.9"], "203.0.113.9"),
        (&["10.0.0.1, 203.0.113.9"], "203.0.113.9"),
        (&["nonsense, 203.0.113.9"], "203.0.113.9"),
        (&["\",203.0.113.9"], "203.0.113.9"),
        (&["198.51.100.1, 203.0.113.9, 192.0.2.7, 10.9.9.9"], "203.0.113.9"),
        (&["198.51.100.1, 2001:db8:2::1, 2001:db8:1::5"], "2001:db8:2::1"),
        // Several headers are one list.
        (&["198.51.100.1", "203.0.113.9"], "203.0.113.9"),
        (&["198.51.100.1, 203.0.113.9", "10.0.0.1", "10.0.0.2,10.0.0.3"], "203.0.113.9"),
        // Addresses next to trusted ones are not trusted.
        (&["198.51.100.1, 192.0.2.6"], "192.0.2.6"),
        (&["198.51.100.1, 11.0.0.0"], "11.0.0.0"),
    ] {
        let values: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
        assert_eq!(client(&values), wanted, "{values:?}");
    }
}

#[test]
fn the_header_is_ignored_unless_a_trusted_proxy_sends_it() {
    for peer in ["203.0.113.9", "9.255.255.255", "2001:db8:2::1", "127.0.0.1"] {
        assert_eq!(client_of(peer, &[b"198.51.100.1"]), peer);
        assert_eq!(client_of(peer, &[b"198.51.100.1, 10.0.0.1"]), peer);
    }
    let none = TrustedProxies::default();
    let forwarded = headers(&[b"198.51.100.1"]);
    assert_eq!(none.client(PROXY.parse().unwrap(), &forwarded).0.to_string(), PROXY);
}

#[test]
fn addresses_are_parsed_in_the_forms_that_proxies_write() {
    for (hop, wanted) in [
        ("203.0.113.9:567", "203.0.113.9"),
        ("  203.0.113.9\t", "203.0.113.9"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:DB8:0::1]:567", "2001:db8::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("[::ffff:203.0.113.9]:567", "203.0.113.9"),
        ("::1:567", "::1:567"),
    ] {
        assert_eq!(client(&[hop.as_bytes()]), wanted, "{hop:?}");
    }
    // The addresses of trusted proxies as well.
    for proxy in ["::ffff:10.1.2.3", "::ffff:192.0.2.7", "2001:db8:1::"] {
        assert_eq!(client_of(proxy, &[b"198.51.100.1, 203.0.113.9, [::ffff:10.0.0.1]:80"]), "203.0.113.9", "{proxy}");
    }
}

#[test]
fn a_hop_that_is_not_an_address_ends_the_list_at_the_last_trusted_proxy() {
    for hop in [
        &b""[..],
        b" ",
        b"unknown",
        b"_hidden",
        b"client.example",
        b"203.0.113",
        b"203.0.113.256",
        b"203.0.113.009",
        b"0xcb.0.113.9",
        b"3405803785",
        b"203.0.113.9:",
        b"203.0.113.9:65536",
        b"203.0.113.9:-1",
        b"203.0.113.9 198.51.100.2",
        b"203.0.113.9/32",
        b"\"203.0.113.9\"",
        b"for=203.0.113.9",
        b"[203.0.113.9]",
        b"[2001:db8::1",
        b"2001:db8::1]",
        b"[[2001:db8::1]]",
        b"[2001:db8::1]567",
        b"[2001:db8::1]:",
        b"2001:db8::1::",
        b"fe80::1%eth0",
        "２０３.0.113.9".as_bytes(),
        b"\xff\xfe",
        &[b'1'; 10_000],
    ] {
        assert_eq!(client(&[hop]), PROXY, "{hop:?}");
        assert_eq!(client(&[&[b"203.0.113.9, ", hop].concat()]), PROXY, "{hop:?}");
        assert_eq!(client(&[b"203.0.113.9", &[hop, b", 192.0.2.7"].concat()]), "192.0.2.7", "{hop:?}");
    }
    assert_eq!(client(&[]), PROXY);
    // A chain of trusted proxies only.
    assert_eq!(client(&[b"10.0.0.1, 10.0.0.2"]), "10.0.0.1");
}

#[test]
fn at_most_sixteen_hops_are_read() {
    let proxies = |count| format!("203.0.113.9{}", ", 10.0.0.1".repeat(count));
    assert_eq!(client(&[proxies(HOPS_MAX - 1).as_bytes()]), "203.0.113.9");
    assert_eq!(client(&[proxies(HOPS_MAX).as_bytes()]), "10.0.0.1");
    assert_eq!(client(&[b"203.0.113.9", &b"10.0.0.1,".repeat(1_000)]), PROXY);
}

#[test]
fn a_network_contains_the_addresses_with_its_prefix_and_no_others() {
    for (network, within, outside) in [
        ("10.0.0.7", &["10.0.0.7", "::ffff:10.0.0.7"][..], &["10.0.0.6", "10.0.0.8", "::10.0.0.7"][..]),
        ("10.0.0.7/32", &["10.0.0.7"], &["10.0.0.6"]),
        ("10.0.0.4/31", &["10.0.0.4", "10.0.0.5"], &["10.0.0.3", "10.0.0.6"]),
        ("10.0.0.0/8", &["10.0.0.0", "10.255.255.255"], &["9.255.255.255", "11.0.0.0"]),
        ("128.0.0.0/1", &["128.0.0.0", "255.255.255.255"], &["127.255.255.255", "8000::"]),
        ("::ffff:10.0.0.0/104", &["10.0.0.0", "10.255.255.255"], &["11.0.0.0"]),
        ("::1", &["::1"], &["::", "::2", "127.0.0.1"]),
        ("2001:db8::/32", &["2001:db8::", "2001:db8:ffff::1"], &["2001:db9::", "2001:db7:ffff::"]),
        ("8000::/1", &["8000::", "ffff::"], &["7fff::", "128.0.0.1"]),
    ] {
        let proxies: TrustedProxies = network.parse().unwrap();
        let has = |address: &&str| proxies.trusts(address.parse::<IpAddr>().unwrap().to_canonical());
        assert!(within.iter().all(has) && !outside.iter().any(has), "{network:?}");
    }
}

#[test]
fn lists_with_anything_but_addresses_and_networks_of_proxies_are_refused() {
    for none in ["", " "] {
        assert!(none.parse::<TrustedProxies>().unwrap().0.is_empty());
        Cli::try_parse_from(["issue-tracker", "--trusted-proxies", none]).unwrap();
    }
    for (list, why) in [
        ("localhost", "\"localhost\" is neither an IP address nor a network"),
        ("10.0.0.1,", "\"\" is neither"),
        ("10.0.0.1,,10.0.0.2", "\"\" is neither"),
        ("10.0.0.1;10.0.0.2", "\"10.0.0.1;10.0.0.2\" is neither"),
        ("10.0.0.0/33", "\"10.0.0.0/33\" is neither"),
        ("::/129", "\"::/129\" is neither"),
        ("10.0.0.0/300", "\"10.0.0.0/300\" is neither"),
        ("10.0.0.0/", "\"10.0.0.0/\" is neither"),
        ("10.0.0.0/8/8", "\"10.0.0.0/8/8\" is neither"),
        ("10.0.0.0/255.0.0.0", "\"10.0.0.0/255.0.0.0\" is neither"),
        ("10.0.0.1:80", "\"10.0.0.1:80\" is neither"),
        ("[::1]", "\"[::1]\" is neither"),
        ("10.0.0.0/8, 10.0.0.7/8", "\"10.0.0.7/8\" has bits set after its prefix"),
        ("2001:db8::1/32", "\"2001:db8::1/32\" has bits set after its prefix"),
        ("0.0.0.0/0", "\"0.0.0.0/0\" contains all IPv4 addresses"),
        ("::/0", "\"::/0\" contains all IPv4 addresses"),
        ("::/80", "\"::/80\" contains all IPv4 addresses"),
        ("::ffff:0:0/96", "\"::ffff:0:0/96\" contains all IPv4 addresses"),
    ] {
        let error = list.parse::<TrustedProxies>().unwrap_err();
        assert!(error.contains(why), "{list:?}: {error}");
        let error = Cli::try_parse_from(["issue-tracker", "--trusted-proxies", list]).unwrap_err().to_string();
        assert!(error.contains("--trusted-proxies") && error.contains(why), "{list:?}: {error}");
    }
}

proptest! {
    #[test]
    fn headers_that_a_client_sends_do_not_change_its_address(
        sent in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..4),
        chosen in "(10\\.0\\.0\\.[1-9]|203\\.0\\.113\\.[1-9]|::1|,| |:80){0,20}",
        address in any::<IpAddr>(),
    ) {
        let proxies: TrustedProxies = PROXIES.parse().unwrap();
        prop_assume!(!proxies.trusts(address.to_canonical()));
        let mut headers = HeaderMap::new();
        for value in sent.iter().map(Vec::as_slice).chain([chosen.as_bytes()]) {
            if let Ok(value) = HeaderValue::from_bytes(value) {
                headers.append(FORWARDED_FOR, value);
            }
        }
        // The first proxy appends to the last value, or adds a value.
        let last = HeaderValue::try_from(format!("{chosen}, {address}")).unwrap();
        for value in [last, HeaderValue::try_from(address.to_string()).unwrap()] {
            let mut headers = headers.clone();
            headers.append(FORWARDED_FOR, value);
            prop_assert_eq!(proxies.client(PROXY.parse().unwrap(), &headers).0, address.to_canonical());
            headers.append(FORWARDED_FOR, HeaderValue::from_static("192.0.2.7:8080, 10.7.7.7"));
            prop_assert_eq!(proxies.client(PROXY.parse().unwrap(), &headers).0, address.to_canonical());
        }
        prop_assert_eq!(proxies.client(address, &headers).0, address.to_canonical());
    }
}
