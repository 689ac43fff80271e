//! TLS to the database: what of the server's certificate is verified, and the client's own certificate.

use std::{path::PathBuf, sync::Arc};

use anyhow::{Context, bail};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        WantsClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{self, WebPkiSupportedAlgorithms},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

use crate::pem;

/// What makes TLS connections to the database. Cheap to clone.
pub type Connector = tokio_postgres_rustls::MakeRustlsConnect;

/// What is known of the server beforehand.
#[derive(Debug)]
pub(super) enum Verify {
    Nothing,
    /// Its certificate is signed by one of these.
    Authority(Roots),
    /// And made out to the name by which it is reached.
    Full(Roots),
}

#[derive(Debug)]
pub(super) enum Roots {
    System,
    File(PathBuf),
}

/// The client's own certificate, for servers that ask for one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    pub(super) certificate: Option<PathBuf>,
    pub(super) key: Option<PathBuf>,
}

/// TLS with whoever answers.
pub(super) fn unverified() -> Connector {
    let verifier = Verifier { algorithms: algorithms(), trusted: None };
    finish(verifying(verifier).with_no_client_auth())
}

pub(super) fn connector(verify: &Verify, files: Files) -> anyhow::Result<Connector> {
    let trusted = match verify {
        Verify::Nothing => None,
        Verify::Authority(roots) => Some(Trusted { checks_name: false, ..Trusted::load(roots)? }),
        Verify::Full(roots) => Some(Trusted::load(roots)?),
    };
    let config = verifying(Verifier { algorithms: algorithms(), trusted });
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

fn verifying(verifier: Verifier) -> rustls::ConfigBuilder<ClientConfig, WantsClientCert> {
    ClientConfig::builder().dangerous().with_custom_certificate_verifier(Arc::new(verifier))
}

fn finish(mut config: ClientConfig) -> Connector {
    // sslnegotiation=direct asks for it; servers before PostgreSQL 17 do not look.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Connector::new(config)
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    crypto::ring::default_provider().signature_verification_algorithms
}

#[derive(Debug)]
struct Trusted {
    roots: RootCertStore,
    /// Those of `roots` that an operator has chosen one by one.
    chosen: Vec<CertificateDer<'static>>,
    checks_name: bool,
}

impl Trusted {
    fn load(roots: &Roots) -> anyhow::Result<Self> {
        let mut store = RootCertStore::empty();
        let chosen = match roots {
            Roots::File(path) => {
                let certificates = pem::certificates("sslrootcert", path, &pem::read("sslrootcert", path)?)?;
                for certificate in &certificates {
                    store
                        .add(certificate.clone())
                        .with_context(|| format!("sslrootcert {} has a certificate that is none", path.display()))?;
                }
                certificates
            }
            Roots::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                if store.is_empty() {
                    bail!("sslrootcert=system: this machine has no authorities (apt-get install ca-certificates)");
                }
                Vec::new()
            }
        };
        Ok(Self { roots: store, chosen, checks_name: true })
    }
}

#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    trusted: Option<Trusted>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(Trusted { roots, chosen, checks_name }) = &self.trusted else {
            return Ok(ServerCertVerified::assertion());
        };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let all = self.algorithms.all;
        match verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, all) {
            // PostgreSQL's documentation makes a server's certificate that is its own authority, which the library takes
            // for an authority only, after it has looked at everything else.
            Err(Error::InvalidCertificate(CertificateError::Other(_))) if chosen.contains(end_entity) => {}
            verified => verified?,
        }
        if *checks_name {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // Whoever it is, it has the certificate's key: channel binding relies on it.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
