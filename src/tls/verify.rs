//! Verification of server certificates by clients: of this server, or of PostgreSQL.

use std::{path::Path, sync::Arc};

use anyhow::{Context, bail};
use rustls::{
    CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{self, WebPkiSupportedAlgorithms},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::ParsedCertificate,
};

use super::pem;

/// The certificate authorities that a client trusts.
#[derive(Debug)]
pub struct Roots {
    store: RootCertStore,
    /// The certificates of a file that the operator has chosen.
    chosen: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// Returns the authorities that this machine trusts.
    pub fn system() -> anyhow::Result<Self> {
        let mut store = RootCertStore::empty();
        store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if store.is_empty() {
            bail!("this machine has no certificate authorities (apt-get install ca-certificates)");
        }
        Ok(Self { store, chosen: Vec::new() })
    }

    /// Returns the authorities in a PEM file. `given_as`: the flag or parameter that names it.
    pub fn file(given_as: &str, path: &Path) -> anyhow::Result<Self> {
        let chosen = pem::certificates(given_as, path, &pem::read(given_as, path)?)?;
        let mut store = RootCertStore::empty();
        for certificate in &chosen {
            store
                .add(certificate.clone())
                .with_context(|| format!("{given_as} {} contains a malformed certificate", path.display()))?;
        }
        Ok(Self { store, chosen })
    }
}

/// Verifies servers' certificates.
#[derive(Debug)]
pub struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    roots: Option<Roots>,
    checks_name: bool,
}

impl Verifier {
    /// Returns a verifier that requires a certificate signed by one of `roots` for the server's name.
    pub fn full(roots: Roots) -> Arc<Self> {
        Arc::new(Self { algorithms: algorithms(), roots: Some(roots), checks_name: true })
    }

    /// Returns a verifier that requires a certificate signed by one of `roots`, for any name.
    pub fn authority(roots: Roots) -> Arc<Self> {
        Arc::new(Self { algorithms: algorithms(), roots: Some(roots), checks_name: false })
    }

    /// Returns a verifier that accepts any certificate.
    pub fn nothing() -> Arc<Self> {
        Arc::new(Self { algorithms: algorithms(), roots: None, checks_name: false })
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    crypto::ring::default_provider().signature_verification_algorithms
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
        let Some(Roots { store, chosen }) = &self.roots else {
            return Ok(ServerCertVerified::assertion());
        };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        match verify_server_cert_signed_by_trust_anchor(&certificate, store, intermediates, now, self.algorithms.all) {
            // `openssl req -x509` makes certificates that are their own authority. The library rejects these as server
            // certificates, after it has checked the dates.
            Err(Error::InvalidCertificate(CertificateError::Other(_))) if chosen.contains(end_entity) => {}
            verified => verified?,
        }
        if self.checks_name {
            verify_server_name(&certificate, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // Even an unverified server must have the certificate's key: PostgreSQL's channel binding relies on it.
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
