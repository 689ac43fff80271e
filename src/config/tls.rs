//! Certificates on the command line.

use std::path::PathBuf;

use clap::{Args, builder::BoolishValueParser};

use crate::transport::tls;

/// The service's own TLS.
#[derive(Debug, Args)]
pub struct ServerTls {
    /// A PEM file with the service's certificate and those that lead to its authority. New contents are taken within
    /// seconds.
    #[arg(long, env = "ISSUE_TRACKER_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// A PEM file with the private key of --tls-cert.
    #[arg(long, env = "ISSUE_TRACKER_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// A PEM file with authorities: clients must show a certificate that one of them has signed.
    #[arg(long, env = "ISSUE_TRACKER_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Listen beyond this machine without TLS.
    #[arg(long, env = "ISSUE_TRACKER_INSECURE_PLAINTEXT", value_parser = BoolishValueParser::new())]
    pub insecure_plaintext: bool,
}

impl ServerTls {
    /// The files of a certificate, if there is one.
    pub fn files(&self) -> Option<tls::Files> {
        Some(tls::Files {
            certificate: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_authorities: self.tls_client_ca.clone(),
        })
    }
}

/// What a client wants of a service's certificate, and shows of its own.
#[derive(Debug, Args)]
pub struct ClientTls {
    /// A PEM file with the authorities that may have signed the service's certificate. Default: this machine's.
    #[arg(long, env = "ISSUE_TRACKER_CA_CERT", value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// A PEM file with the certificate that is shown to the service, and its chain.
    #[arg(long, env = "ISSUE_TRACKER_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    pub client_cert: Option<PathBuf>,
    /// A PEM file with the private key of --client-cert.
    #[arg(long, env = "ISSUE_TRACKER_CLIENT_KEY", value_name = "FILE", requires = "client_cert")]
    pub client_key: Option<PathBuf>,
    /// The name that the service's certificate must be made out to. Default: the host of --server.
    #[arg(long, env = "ISSUE_TRACKER_SERVER_NAME", value_name = "NAME")]
    pub server_name: Option<String>,
}
