//! Tests TLS between the service and its clients: trust, client certificates, certificate reload and plaintext.

use tonic::transport::{Certificate, ClientTlsConfig, Identity};

use super::{
    support::certificates::{Authority, Pair},
    *,
};

/// Longer than two intervals at which the service checks its certificate files.
const RELOADED_AFTER_MAX: Duration = Duration::from_secs(30);

fn serve(dir: &Dir, [certificate, key]: &[String; 2], args: &[&str]) -> Service {
    let tls = ["--data-dir", &dir.data(), "--tls-cert", certificate, "--tls-key", key];
    Service::start(dir, program(&[&tls, args].concat()))
}

fn endpoint(service: &Service, authority: &Authority, client: Option<&Pair>) -> Endpoint {
    let mut config = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(&authority.certificate))
        .domain_name("tracker.example");
    if let Some(client) = client {
        config = config.identity(Identity::from_pem(&client.certificate, &client.key));
    }
    Endpoint::try_from(format!("https://{}", service.address)).unwrap().tls_config(config).unwrap()
}

async fn count_issues(channel: Channel, token: &str) -> Result<usize, tonic::Status> {
    let request = with_token(token, ListIssuesRequest::default());
    Ok(IssueServiceClient::new(channel).list_issues(request).await?.into_inner().issues.len())
}

/// Lists issues over a new connection.
async fn call(endpoint: Endpoint, token: &str) -> Result<usize, String> {
    let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
    count_issues(channel, token).await.map_err(|status| format!("{status:?}"))
}

/// Runs a client subcommand of the binary against a service.
fn run_client(service: &Service, dir: &Dir, subcommand: &str, args: &[&str]) -> Output {
    let server = format!("https://{}", service.address);
    let mut all = vec![subcommand, "--server", &server, "--server-name", "tracker.example"];
    let token_file = dir.text(TOKEN_FILE);
    if subcommand != "health" {
        all.extend(["--token-file", &token_file]);
    }
    run(&[&all, args].concat())
}

#[test]
fn listening_beyond_loopback_without_tls_requires_insecure_plaintext() {
    let dir = Dir::new();
    for listen in ["0.0.0.0:0", "[::]:0", "192.0.2.1:50051", "[::ffff:192.0.2.1]:50051"] {
        let refused = run(&["--listen", listen, "--data-dir", &dir.data()]);
        assert_refused(&refused, &format!("--listen {listen}: other machines can connect"));
        assert_refused(&refused, "--tls-cert");
        assert_refused(&refused, "--insecure-plaintext");
        assert!(!dir.path("data").exists(), "{listen}");
    }
    // These are allowed: startup proceeds until the database connection fails.
    let nowhere = format!("host={} user=x", dir.path("nowhere").display());
    for listen in ["0.0.0.0:0", "127.0.0.1:0", "127.8.8.8:0"] {
        let mut command = program(&["--listen", listen, "--database-url", &nowhere, "--wait-for-database", "0"]);
        command.env("ISSUE_TRACKER_INSECURE_PLAINTEXT", if listen == "0.0.0.0:0" { "1" } else { "0" });
        let output = finished(command.spawn().unwrap());
        assert_refused(&output, "cannot connect to the database");
    }
}

#[test]
fn unusable_certificate_is_reported_before_anything_starts() {
    let dir = Dir::new();
    let our_authority = Authority::new("ours");
    let [certificate, key] = our_authority.server(&["localhost"]).write(&dir, "one");
    let [_, other_key] = our_authority.server(&["localhost"]).write(&dir, "two");
    let garbage = dir.text("garbage");
    fs::write(&garbage, format!("-----BEGIN CERTIFICATE-----\n{SECRET}\n-----BEGIN")).unwrap();
    let missing = dir.text("missing");
    for (args, why) in [
        (vec!["--tls-cert", &certificate], "--tls-key".to_owned()),
        (vec!["--tls-key", &key], "--tls-cert".to_owned()),
        (vec!["--tls-client-ca", &certificate], "--tls-cert".to_owned()),
        (vec!["--tls-cert", &missing, "--tls-key", &key], format!("cannot read --tls-cert {missing}")),
        (vec!["--tls-cert", &certificate, "--tls-key", &missing], format!("cannot read --tls-key {missing}")),
        (vec!["--tls-cert", &garbage, "--tls-key", &key], format!("--tls-cert {garbage} is not valid PEM")),
        (vec!["--tls-cert", &key, "--tls-key", &key], format!("--tls-cert {key} contains no PEM certificate")),
        (vec!["--tls-cert", &certificate, "--tls-key", &certificate], "contains no PEM private key".to_owned()),
        (vec!["--tls-cert", &certificate, "--tls-key", &other_key], "is not the key of".to_owned()),
        (
            vec!["--tls-cert", &certificate, "--tls-key", &key, "--tls-client-ca", &key],
            format!("--tls-client-ca {key} contains no PEM certificate"),
        ),
    ] {
        let output = run(&[&["--listen", "127.0.0.1:0", "--data-dir", &dir.data()], &args[..]].concat());
        assert_refused(&output, &why);
        assert!(!text(&output.stderr).contains(SECRET), "{output:?}");
        assert!(!dir.path("data").exists(), "{args:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_a_tls_service_only_if_they_trust_its_certificate() {
    let (our_authority, other_authority) = (Authority::new("ours"), Authority::new("theirs"));
    let dir = Dir::new();
    let pair = our_authority.server(&["tracker.example"]).write(&dir, "server");
    let our_ca = our_authority.write(&dir, "ours.crt");
    let their_ca = other_authority.write(&dir, "theirs.crt");
    let mut service = serve(&dir, &pair, &[]);
    for line in &service.stdout[service.stdout.len() - 2..] {
        assert!(line.starts_with(&format!("grpcurl -cacert {} -authority tracker.example -H ", pair[0])), "{line}");
    }
    let token = service.admin_token();

    assert_eq!(call(endpoint(&service, &our_authority, None), &token).await, Ok(0));
    let error = call(endpoint(&service, &other_authority, None), &token).await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert!(count_issues(service.channel(), &token).await.is_err(), "without TLS");

    let csv = dir.text("issues.csv");
    fs::write(&csv, "title\nfirst\n").unwrap();
    let imported = run_client(&service, &dir, "import", &[&csv, "--ca-cert", &our_ca]);
    assert!(imported.status.success(), "{imported:?}");
    let exported = run_client(&service, &dir, "export", &["--ca-cert", &our_ca]);
    assert!(text(&exported.stdout).contains("first"), "{exported:?}");
    let health = run_client(&service, &dir, "health", &["--ca-cert", &our_ca]);
    assert_eq!(text(&health.stdout), "SERVING\n", "{health:?}");
    // A certificate error is not retried.
    for args in [&[&csv, "--ca-cert", &their_ca][..], &[&csv]] {
        assert_refused(&run_client(&service, &dir, "import", args), "UnknownIssuer");
    }
    assert_refused(&run_client(&service, &dir, "health", &["--ca-cert", &their_ca]), "UnknownIssuer");
    let wrong_name = run(&["health", "--server", &format!("https://{}", service.address), "--ca-cert", &our_ca]);
    assert_refused(&wrong_name, "not valid for name");
    assert_eq!(service.stop().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn client_certificate_is_required_with_tls_client_ca() {
    let (our_authority, other_authority) = (Authority::new("ours"), Authority::new("theirs"));
    let dir = Dir::new();
    let pair = our_authority.server(&["tracker.example"]).write(&dir, "server");
    let our_ca = our_authority.write(&dir, "ours.crt");
    let (known, unknown) = (our_authority.client("known"), other_authority.client("unknown"));
    let service = serve(&dir, &pair, &["--tls-client-ca", &our_ca]);
    for line in &service.stdout[service.stdout.len() - 2..] {
        assert!(line.contains(" -cert client.crt -key client.key "), "{line}");
    }
    let token = service.admin_token();

    assert_eq!(call(endpoint(&service, &our_authority, Some(&known)), &token).await, Ok(0));
    assert!(call(endpoint(&service, &our_authority, None), &token).await.is_err());
    assert!(call(endpoint(&service, &our_authority, Some(&unknown)), &token).await.is_err());

    let [certificate, key] = known.write(&dir, "known");
    let [other_certificate, other_key] = unknown.write(&dir, "unknown");
    let known_args = ["--ca-cert", &our_ca, "--client-cert", &certificate, "--client-key", &key];
    let health = run_client(&service, &dir, "health", &known_args);
    assert_eq!(text(&health.stdout), "SERVING\n", "{health:?}");
    assert!(run_client(&service, &dir, "export", &known_args).status.success());
    let unknown_args = ["--ca-cert", &our_ca, "--client-cert", &other_certificate, "--client-key", &other_key];
    for args in [&unknown_args[..], &["--ca-cert", &our_ca]] {
        let refused = run_client(&service, &dir, "export", args);
        assert_refused(&refused, "received fatal alert");
        // A connection that closes before the alert arrives is retried, but not until the retries are used up.
        assert!(!text(&refused.stderr).contains("gave up"), "{refused:?}");
        assert!(!run_client(&service, &dir, "health", args).status.success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_names_a_tls_mismatch_and_does_not_retry() {
    let authority = Authority::new("ours");
    let (encrypted_dir, plaintext_dir) = (Dir::new(), Dir::new());
    let pair = authority.server(&["tracker.example"]).write(&encrypted_dir, "server");
    let ca = authority.write(&encrypted_dir, "ours.crt");
    let encrypted = serve(&encrypted_dir, &pair, &[]);
    let plaintext =
        Service::start(&plaintext_dir, program(&["--listen", "127.0.0.1:0", "--data-dir", &plaintext_dir.data()]));
    let csv = plaintext_dir.text("issues.csv");
    fs::write(&csv, "title\nfirst\n").unwrap();
    let token_file = plaintext_dir.text(TOKEN_FILE);

    for (server, why) in [
        (format!("http://{}", encrypted.address), format!("requires TLS; use https://{}", encrypted.address)),
        (format!("https://{}", plaintext.address), format!("does not speak TLS; use http://{}", plaintext.address)),
    ] {
        let tls = if server.starts_with("https") { &["--ca-cert", &*ca][..] } else { &[] };
        for command in
            [&["import", &*csv, "--token-file", &token_file][..], &["export", "--token-file", &token_file], &["health"]]
        {
            let output = run(&[command, &["--server", &server], tls].concat());
            assert_refused(&output, &why);
            assert!(!text(&output.stderr).contains("retrying"), "{output:?}");
        }
    }
}

#[test]
fn client_sends_no_token_unencrypted_to_another_machine() {
    let dir = Dir::new();
    let token = dir.text("token");
    fs::write(&token, format!("itk_{SECRET}")).unwrap();
    for server in ["http://192.0.2.1:50051", "192.0.2.1:50051", "http://tracker.example:50051"] {
        let refused = run(&["export", "--server", server, "--token-file", &token]);
        assert_refused(&refused, "would be sent the token unencrypted");
        assert_refused(&refused, "--insecure-plaintext");
        assert!(!text(&refused.stderr).contains(SECRET));
    }
    let unreachable = ["export", "--server", "http://127.0.0.1:1", "--token-file", &token, "--retry-seconds", "0"];
    assert_refused(&run(&unreachable), "cannot connect to 127.0.0.1:1");
    let useless = ["export", "--server", "http://127.0.0.1:1", "--token-file", &token, "--ca-cert", &token];
    assert_refused(&run(&useless), "certificates are for https:// only");
}

/// Waits until new connections receive a certificate that `authority` has signed.
async fn wait_until_served(service: &Service, authority: &Authority, token: &str) {
    let began = Instant::now();
    while let Err(error) = call(endpoint(service, authority, None), token).await {
        assert!(began.elapsed() < RELOADED_AFTER_MAX, "{error}; {}", service.log());
        tokio::time::sleep(TICK).await;
    }
}

/// Replaces the files as Kubernetes updates a mounted secret: they are behind a symlink to a directory, and the symlink
/// is replaced.
fn mount_secret(dir: &Dir, version: &str, pair: &Pair) {
    let versioned = dir.path(version);
    fs::create_dir(&versioned).unwrap();
    pair.write(&versioned, "tls");
    let (new, live) = (dir.path("new"), dir.path("live"));
    std::os::unix::fs::symlink(&versioned, &new).unwrap();
    fs::rename(new, live).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn valid_new_certificate_is_reloaded_an_invalid_one_is_not_and_open_connections_continue() {
    let [first, second, third] = ["first", "second", "third"].map(Authority::new);
    let dir = Dir::new();
    mount_secret(&dir, "v1", &first.server(&["tracker.example"]));
    let live = ["crt", "key"].map(|kind| dir.text(&format!("live/tls.{kind}")));
    let mut service = serve(&dir, &live, &[]);
    let mut silent = std::net::TcpStream::connect(&service.address).unwrap();
    let token = service.admin_token();
    let old = endpoint(&service, &first, None).connect().await.unwrap();
    assert_eq!(count_issues(old.clone(), &token).await.unwrap(), 0);

    // Replaced through the symlink.
    mount_secret(&dir, "v2", &second.server(&["tracker.example"]));
    wait_until_served(&service, &second, &token).await;
    assert!(call(endpoint(&service, &first, None), &token).await.is_err(), "the old certificate is still sent");

    // A key that does not match the certificate, by a rename, then a truncated certificate, written in place.
    let other = third.server(&["tracker.example"]);
    fs::write(dir.path("v2/new"), &other.key).unwrap();
    fs::rename(dir.path("v2/new"), dir.path("v2/tls.key")).unwrap();
    wait_until("the key mismatch is logged", || service.log().contains("is not the key of"));
    fs::write(dir.path("v2/tls.crt"), &other.certificate[..other.certificate.len() / 2]).unwrap();
    wait_until("the truncated certificate is logged", || service.log().contains("is not valid PEM"));
    assert_eq!(call(endpoint(&service, &second, None), &token).await, Ok(0));

    fs::write(dir.path("v2/tls.crt"), &other.certificate).unwrap();
    wait_until_served(&service, &third, &token).await;

    assert_eq!(count_issues(old, &token).await.unwrap(), 0, "the first connection must stay usable");
    silent.set_read_timeout(Some(RELOADED_AFTER_MAX)).unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0, "a connection without a handshake must be closed");
    let log = service.log();
    assert_eq!(log.matches("certificate reload failed").count(), 2, "{log}");
    assert_eq!(log.matches("certificate reloaded").count(), 2, "{log}");
    assert!(!log.contains("BEGIN"), "{log}");
    assert_eq!(service.stop().code(), Some(0));
}
