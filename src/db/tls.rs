//! TLS connections to the database.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, bail};
use rustls::{ClientConfig, client::WantsClientCert};

use crate::tls::{
    pem,
    verify::{Roots, Verifier},
};

/// Makes TLS connections to the database. Clones share its configuration.
pub type Connector = tokio_postgres_rustls::MakeRustlsConnect;

/// What to verify of the server's certificate.
#[derive(Debug)]
pub(super) enum Verify {
    Nothing,
    /// It is signed by one of these authorities.
    Authority(RootsFrom),
    /// It is signed by one of these authorities, and names the host.
    Full(RootsFrom),
}

#[derive(Debug)]
pub(super) enum RootsFrom {
    System,
    File(PathBuf),
}

impl RootsFrom {
    fn load(&self) -> anyhow::Result<Roots> {
        match self {
            Self::System => Roots::system().context("sslrootcert=system"),
            Self::File(path) => Roots::file("sslrootcert", path),
        }
    }
}

/// The files of the client certificate, for servers that request one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
}

/// Returns a connector that verifies nothing.
pub(super) fn unverified() -> Connector {
    finish(verifying(Verifier::nothing()).with_no_client_auth())
}

/// Returns a connector. Reads the files.
pub(super) fn connector(verify: &Verify, files: Files) -> anyhow::Result<Connector> {
    let config = verifying(match verify {
        Verify::Nothing => Verifier::nothing(),
        Verify::Authority(roots) => Verifier::authority(roots.load()?),
        Verify::Full(roots) => Verifier::full(roots.load()?),
    });
    let (certificate, key) = match files {
        Files { certificate: Some(certificate), key: Some(key) } => (certificate, key),
        Files { certificate: None, key: None } => return Ok(finish(config.with_no_client_auth())),
        Files { certificate: Some(_), .. } => bail!("sslcert needs sslkey, the private key of the certificate"),
        Files { key: Some(_), .. } => bail!("sslkey needs sslcert, the certificate of the key"),
    };
    let chain = pem::certificates("sslcert", &certificate, &pem::read("sslcert", &certificate)?)?;
    let private_key = pem::private_key("sslkey", &key, &pem::read("sslkey", &key)?)?;
    let config = config.with_client_auth_cert(chain, private_key).with_context(|| {
        format!("sslcert {} and sslkey {} cannot be used together", certificate.display(), key.display())
    })?;
    Ok(finish(config))
}

fn verifying(verifier: Arc<Verifier>) -> rustls::ConfigBuilder<ClientConfig, WantsClientCert> {
    ClientConfig::builder().dangerous().with_custom_certificate_verifier(verifier)
}

fn finish(mut config: ClientConfig) -> Connector {
    // Required by sslnegotiation=direct. Servers before PostgreSQL 17 ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Connector::new(config)
}
