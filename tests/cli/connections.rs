//! Tests `--server` addresses where another server than the service listens.

use std::net::TcpListener;

use super::*;

/// A ClientHello or another handshake record (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;
/// A fatal alert, decode_error.
const TLS_ALERT: &[u8] = b"\x15\x03\x01\x00\x02\x02\x32";
const HTTP1_ERROR: &[u8] = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
/// The error of nginx on a port for HTTPS, shortened.
const NGINX_ERROR: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n400 The plain HTTP request was sent to HTTPS port";

/// Starts a server that responds once per connection, to TLS and to any other first byte, and closes the connection. An
/// empty response closes the connection only.
fn respond(to_tls: &'static [u8], to_plaintext: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut received = [0; 1_024];
            let mut connection = connection.unwrap();
            // Errors are the client's: it closes connections too.
            let _ = connection.read(&mut received);
            let _ = connection.write_all(if received[0] == TLS_HANDSHAKE { to_tls } else { to_plaintext });
        }
    });
    address
}

/// Runs each command of the client against the address.
async fn outputs(address: SocketAddr) -> Vec<ProgramOutput> {
    let mut fixture = Fixture::new(FakeServer::new()).await;
    fixture.address = address;
    let path = fixture.dir.write("issues.csv", GOOD);
    let mut outputs = Vec::new();
    for args in [&["import", &path, "--retry-seconds", "30"][..], &["export", "--retry-seconds", "30"], &["health"]] {
        outputs.push(fixture.run(args).await.assert_code(2));
    }
    outputs
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_client_names_a_tls_server_and_does_not_retry() {
    for to_plaintext in [TLS_ALERT, NGINX_ERROR, b""] {
        let address = respond(TLS_ALERT, to_plaintext);
        for output in outputs(address).await {
            output.assert_prints(&format!("--server: {address} requires TLS; use https://{address}"));
            assert!(!output.stderr.contains("retrying"), "{output:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_client_names_a_server_of_another_protocol_and_does_not_retry() {
    for (response, protocol) in [
        (HTTP1_ERROR, "HTTP/1.1"),
        (b"HTTP/1.0 505 HTTP Version Not Supported\r\n\r\n", "HTTP/1.0"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "an unknown protocol"),
    ] {
        for to_tls in [response, b""] {
            let address = respond(to_tls, response);
            for output in outputs(address).await {
                output.assert_prints(&format!("--server: {address} speaks {protocol}, not gRPC; expected"));
                assert!(!output.stderr.contains("retrying"), "{output:#?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_that_closes_connections_without_a_response_is_retried_for_5_s_only() {
    let [import, export, health] = outputs(respond(b"", b"")).await.try_into().unwrap();
    for output in [import, export] {
        output.assert_prints("closed the connection without a response");
        output.assert_prints("retrying in");
        output.assert_prints("gave up after 5 s without progress");
    }
    health.assert_prints("closed the connection without a response");
}
