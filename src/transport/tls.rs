//! TLS of the service: its certificate, taken anew when the files change, and whose clients it takes.

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

/// How often the files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);
/// An hour of them.
const LOOKS_UNTIL_REMINDED: u32 = 1_200;
/// How long a client that is refused is heard out.
const GOODBYE_MAX: Duration = Duration::from_secs(1);
/// gRPC is HTTP/2.
const ALPN: &[u8] = b"h2";

/// PEM files.
#[derive(Clone, Debug)]
pub struct Files {
    /// The service's certificate, and those between it and its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// If given, clients must show a certificate that one of these authorities has signed.
    pub client_authorities: Option<PathBuf>,
}

impl Files {
    async fn read(&self) -> anyhow::Result<Contents> {
        let files = self.clone();
        tokio::task::spawn_blocking(move || files.read_blocking()).await?
    }

    /// All of one moment: a change that is seen half-way is an error.
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
            return Err(anyhow!("the files of the certificate are being changed"));
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
                    roots.add(certificate).map_err(|_| {
                        anyhow!("--tls-client-ca {} has a certificate that cannot be read", path.display())
                    })?;
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

/// Takes clients' connections. Cheap to clone.
#[derive(Clone)]
pub struct Acceptor {
    shared: Arc<Shared>,
}

struct Shared {
    files: Files,
    current: Mutex<Current>,
}

struct Current {
    config: Arc<ServerConfig>,
    contents: Contents,
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Acceptor").field("files", &self.shared.files).finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Errors name the flag and the file, never what is in it.
    pub async fn new(files: Files) -> anyhow::Result<Self> {
        let contents = files.read().await?;
        let config = Arc::new(files.config(&contents)?);
        Ok(Self { shared: Arc::new(Shared { files, current: Mutex::new(Current { config, contents }) }) })
    }

    /// The handshake, with the certificate of now. Takes as long as the client does.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let config = Arc::clone(&self.current().config);
        match TlsAcceptor::from(config).accept(stream).into_fallible().await {
            Ok(stream) => Ok(stream),
            Err((error, stream)) => {
                let _ = timeout(GOODBYE_MAX, hear_out(stream)).await;
                Err(error)
            }
        }
    }

    /// Looks at the files again and again. What is wrong with new ones is logged now and then, and the old ones go on.
    pub async fn follow_files(&self) -> Infallible {
        let mut seen = Seen::default();
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            match self.look().await {
                Look::Same => seen = Seen::default(),
                Look::Taken => {
                    seen = Seen::default();
                    tracing::info!("new connections get the new certificate");
                }
                // Files that are replaced one after the other do not fit for a moment.
                Look::Refused(why) if seen.is_worth_a_word(&why) => {
                    tracing::warn!("the new certificate is not taken, and the old one goes on: {why}");
                }
                Look::Refused(_) => {}
            }
        }
    }

    /// The name by which the service must be called where `address` is not in the certificate: the first that is.
    pub fn name_instead_of(&self, address: IpAddr) -> Option<String> {
        let leaf = CertificateDer::pem_slice_iter(&self.current().contents.certificate).next()?.ok()?;
        let certificate = webpki::EndEntityCert::try_from(&leaf).ok()?;
        if certificate.verify_is_valid_for_subject_name(&ServerName::from(address)).is_ok() {
            return None;
        }
        let name = certificate.valid_dns_names().next()?;
        Some(name.replacen('*', "issue-tracker", 1))
    }

    pub fn files(&self) -> &Files {
        &self.shared.files
    }

    async fn look(&self) -> Look {
        let files = &self.shared.files;
        let contents = match files.read().await {
            Ok(contents) => contents,
            Err(error) => return Look::Refused(format!("{error:#}")),
        };
        if contents == self.current().contents {
            return Look::Same;
        }
        match files.config(&contents) {
            Ok(config) => {
                *self.current() = Current { config: Arc::new(config), contents };
                Look::Taken
            }
            Err(error) => Look::Refused(format!("{error:#}")),
        }
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Current> {
        // It is replaced as a whole.
        self.shared.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads what a refused client has sent already: closing a connection with that unread would take back what it was told.
async fn hear_out(mut stream: TcpStream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut unread = [0; 4096];
    while stream.read(&mut unread).await? > 0 {}
    Ok(())
}

enum Look {
    Same,
    Taken,
    Refused(String),
}

/// What is wrong, and how often it was seen in a row.
#[derive(Default)]
struct Seen {
    why: String,
    times: u32,
}

impl Seen {
    /// Whether it is seen for the second time, or has been seen for long.
    fn is_worth_a_word(&mut self, why: &str) -> bool {
        if self.why != why {
            *self = Self { why: why.to_owned(), times: 0 };
        }
        self.times += 1;
        self.times == 2 || self.times.is_multiple_of(LOOKS_UNTIL_REMINDED)
    }
}
