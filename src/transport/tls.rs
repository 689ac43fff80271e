//! TLS of the server: its certificate, reloaded when the files change, and the client certificates that it accepts.

use std::{
    convert::Infallible,
    fmt, io,
    net::IpAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, anyhow};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use crate::tls::pem;

/// How often the files are checked for changes.
const RELOAD_INTERVAL: Duration = Duration::from_secs(3);
/// How many failed reloads in a row are logged once: those of an hour.
const FAILURES_PER_WARNING: u32 = 1_200;
/// How long the server reads what a refused client has sent already.
const CLOSE_GRACE: Duration = Duration::from_secs(1);
/// The ALPN protocol: gRPC is HTTP/2.
const ALPN: &[u8] = b"h2";

/// The PEM files that the server is configured with.
#[derive(Clone, Debug)]
pub struct Files {
    /// The server's certificate, followed by its intermediate certificates.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// If set, clients must have a certificate that one of these authorities has signed.
    pub client_authorities: Option<PathBuf>,
}

impl Files {
    async fn read(&self) -> anyhow::Result<Contents> {
        let files = self.clone();
        tokio::task::spawn_blocking(move || files.read_blocking()).await?
    }

    /// Reads all files. Fails if they change meanwhile: half of a change is not a usable state.
    fn read_blocking(&self) -> anyhow::Result<Contents> {
        let read = || {
            anyhow::Ok(Contents {
                certificate: pem::read("--tls-cert", &self.certificate)?,
                key: pem::read("--tls-key", &self.key)?,
                client_authorities: self
                    .client_authorities
                    .as_ref()
                    .map(|path| pem::read("--tls-client-ca", path))
                    .transpose()?,
            })
        };
        let contents = read()?;
        if contents != read()? {
            return Err(anyhow!("the files of the certificate changed while they were read"));
        }
        Ok(contents)
    }

    fn config(&self, contents: &Contents) -> anyhow::Result<ServerConfig> {
        let chain = pem::certificates("--tls-cert", &self.certificate, &contents.certificate)?;
        let key = pem::private_key("--tls-key", &self.key, &contents.key)?;
        let builder = match (&self.client_authorities, &contents.client_authorities) {
            (Some(path), Some(bytes)) => {
                let mut roots = RootCertStore::empty();
                for certificate in pem::certificates("--tls-client-ca", path, bytes)? {
                    roots
                        .add(certificate)
                        .map_err(|_| anyhow!("--tls-client-ca {} contains a malformed certificate", path.display()))?;
                }
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
                ServerConfig::builder().with_client_cert_verifier(verifier.context("--tls-client-ca cannot be used")?)
            }
            _ => ServerConfig::builder().with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|_| {
            let (certificate, key) = (self.certificate.display(), self.key.display());
            anyhow!("--tls-key {key} is not the key of the first certificate in --tls-cert {certificate}")
        })?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_authorities: Option<Vec<u8>>,
}

/// Performs TLS handshakes with clients. Cheap to clone.
#[derive(Clone)]
pub struct Acceptor {
    state: Arc<AcceptorState>,
}

struct AcceptorState {
    files: Files,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    config: Arc<ServerConfig>,
    contents: Contents,
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").field("files", &self.state.files).finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Loads the files. Errors name the flag and the file, never its contents.
    pub async fn new(files: Files) -> anyhow::Result<Self> {
        let contents = files.read().await?;
        let config = Arc::new(files.config(&contents)?);
        Ok(Self { state: Arc::new(AcceptorState { files, loaded: Mutex::new(Loaded { config, contents }) }) })
    }

    /// Performs the handshake with the certificate loaded last. Has no time limit.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = Arc::clone(&self.loaded().config);
        match TlsAcceptor::from(config).accept(stream).into_fallible().await {
            Ok(stream) => Ok(stream),
            Err((error, stream)) => {
                let _ = timeout(CLOSE_GRACE, drain(stream)).await;
                Err(error)
            }
        }
    }

    /// Reloads the files when they change. Malformed files are logged, and the previous certificate stays in use.
    pub async fn reload_on_change(&self) -> Infallible {
        let mut failures = ReloadFailures::default();
        loop {
            tokio::time::sleep(RELOAD_INTERVAL).await;
            match self.reload().await {
                Reload::Unchanged => failures = ReloadFailures::default(),
                Reload::Loaded => {
                    failures = ReloadFailures::default();
                    tracing::info!("certificate reloaded");
                }
                // Files that are replaced one after the other do not match for a moment.
                Reload::Failed(error) if failures.count(&error) => {
                    tracing::warn!(error, "certificate reload failed; the previous certificate stays in use");
                }
                Reload::Failed(_) => {}
            }
        }
    }

    /// Returns the first DNS name of the certificate, or `None` if the certificate contains `address`.
    pub fn name_instead_of(&self, address: IpAddr) -> Option<String> {
        let leaf = CertificateDer::pem_slice_iter(&self.loaded().contents.certificate).next()?.ok()?;
        let certificate = webpki::EndEntityCert::try_from(&leaf).ok()?;
        if certificate.verify_is_valid_for_subject_name(&ServerName::from(address)).is_ok() {
            return None;
        }
        let name = certificate.valid_dns_names().next()?;
        Some(name.replacen('*', "issue-tracker", 1))
    }

    pub fn files(&self) -> &Files {
        &self.state.files
    }

    async fn reload(&self) -> Reload {
        let files = &self.state.files;
        let contents = match files.read().await {
            Ok(contents) => contents,
            Err(error) => return Reload::Failed(format!("{error:#}")),
        };
        if contents == self.loaded().contents {
            return Reload::Unchanged;
        }
        match files.config(&contents) {
            Ok(config) => {
                *self.loaded() = Loaded { config: Arc::new(config), contents };
                Reload::Loaded
            }
            Err(error) => Reload::Failed(format!("{error:#}")),
        }
    }

    fn loaded(&self) -> std::sync::MutexGuard<'_, Loaded> {
        // The value is replaced as a whole, so it is consistent even if a holder of the lock has panicked.
        self.state.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what a refused client has sent already. Closing the connection with unread data would discard the TLS alert.
async fn drain(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut unread = [0; 4096];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

/// The result of one check of the files.
enum Reload {
    Unchanged,
    Loaded,
    Failed(String),
}

/// How often the same error occurred in a row.
#[derive(Default)]
struct ReloadFailures {
    error: String,
    count: u32,
}

impl ReloadFailures {
    /// Counts a failure. Returns whether to log it: the second one in a row, and then one per hour.
    fn count(&mut self, error: &str) -> bool {
        if self.error != error {
            *self = Self { error: error.to_owned(), count: 0 };
        }
        self.count += 1;
        self.count == 2 || self.count.is_multiple_of(FAILURES_PER_WARNING)
    }
}
