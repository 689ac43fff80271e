//! Certificates and keys in PEM files. Errors name the file and what it was given as, never what is in it.

use std::{fs, path::Path};

use anyhow::{Context, anyhow, bail};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// A whole file; `given_as` is the flag or parameter that names it.
pub fn read(given_as: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {given_as} {}", path.display()))
}

/// All certificates in the bytes of a file, at least one.
pub fn certificates(given_as: &str, path: &Path, bytes: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    // The parser's own errors quote lines.
    let certificates = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| anyhow!("{given_as} {} is not whole PEM", path.display()))?;
    if certificates.is_empty() {
        bail!("{given_as} {} has no certificate in PEM", path.display());
    }
    Ok(certificates)
}

/// The first private key in the bytes of a file.
pub fn private_key(given_as: &str, path: &Path, bytes: &[u8]) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(bytes)
        .map_err(|_| anyhow!("{given_as} {} has no private key in PEM without a passphrase", path.display()))
}
