//! TLS to the database: what makes its connections.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, bail};
use rustls::{ClientConfig, client::WantsClientCert};

use crate::transport::tls::{
    pem,
    verify::{Roots, Verifier},
};

/// What makes TLS connections to the database. Cheap to clone.
pub type Connector = tokio_postgres_rustls::MakeRustlsConnect;

/// What is known of the server beforehand.
#[derive(Debug)]
pub(super) enum Verify {
    Nothing,
    /// Its certificate is signed by one of these.
    Authority(RootsFrom),
    /// And made out to the name by which it is reached.
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

/// The client's own certificate, for servers that ask for one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
}

/// TLS with whoever answers.
pub(super) fn unverified() -> Connector {
    finish(verifying(Verifier::nothing()).with_no_client_auth())
}

pub(super) fn connector(verify: &Verify, files: Files) -> anyhow::Result<Connector> {
    let config = verifying(match verify {
        Verify::Nothing => Verifier::nothing(),
        Verify::Authority(roots) => Verifier::authority(roots.load()?),
        Verify::Full(roots) => Verifier::full(roots.load()?),
    });
    let (certificate, key) = match files {
        Files { certificate: Some(certificate), key: Some(key) } => (certificate, key),
        Files { certificate: None, key: None } => return Ok(finish(config.with_no_client_auth())),
        Files { certificate: Some(_), .. } => bail!("sslcert needs sslkey, the certificate's private key"),
        Files { key: Some(_), .. } => bail!("sslkey needs sslcert, the key's certificate"),
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
    // sslnegotiation=direct asks for it; servers before PostgreSQL 17 do not look.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Connector::new(config)
}
