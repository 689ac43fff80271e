//! Certificates and keys in PEM files. Errors name the flag or parameter and the file, never its contents.

use std::{fs, path::Path};

use anyhow::{Context, anyhow, bail};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// Reads a file. `given_as`: the flag or parameter that names it.
pub fn read(given_as: &str, path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {given_as} {}", path.display()))
}

/// Returns all certificates in the bytes of a file, at least one.
pub fn certificates(given_as: &str, path: &Path, bytes: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    // The parser's errors quote lines of the file.
    let certificates = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| anyhow!("{given_as} {} is not valid PEM", path.display()))?;
    if certificates.is_empty() {
        bail!("{given_as} {} contains no PEM certificate", path.display());
    }
    Ok(certificates)
}

/// Returns the first private key in the bytes of a file.
pub fn private_key(given_as: &str, path: &Path, bytes: &[u8]) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(bytes)
        .map_err(|_| anyhow!("{given_as} {} contains no PEM private key without a passphrase", path.display()))
}
