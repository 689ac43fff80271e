//! The TLS flags of the service and of its clients.

use std::path::PathBuf;

use clap::{Args, builder::BoolishValueParser};

use crate::transport::tls;

/// The TLS of the service.
#[derive(Debug, Args)]
pub struct ServerTls {
    /// PEM file with the certificate chain of the service; reloaded when it changes
    #[arg(long, env = "ISSUE_TRACKER_TLS_CERT", value_name = "FILE", requires = "tls_key", help_heading = "TLS")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the private key of --tls-cert
    #[arg(long, env = "ISSUE_TRACKER_TLS_KEY", value_name = "FILE", requires = "tls_cert", help_heading = "TLS")]
    pub tls_key: Option<PathBuf>,
    /// PEM file with the authorities that must have signed client certificates (mutual TLS)
    #[arg(long, env = "ISSUE_TRACKER_TLS_CLIENT_CA", value_name = "FILE", requires = "tls_cert", help_heading = "TLS")]
    pub tls_client_ca: Option<PathBuf>,
    /// Accept plaintext connections from other machines
    #[arg(long, env = "ISSUE_TRACKER_INSECURE_PLAINTEXT", value_parser = BoolishValueParser::new(), help_heading = "TLS")]
    pub insecure_plaintext: bool,
}

impl ServerTls {
    /// Returns the files of the certificate. `None` without TLS.
    pub fn files(&self) -> Option<tls::Files> {
        Some(tls::Files {
            certificate: self.tls_cert.clone()?,
            key: self.tls_key.clone()?,
            client_authorities: self.tls_client_ca.clone(),
        })
    }
}

/// The TLS of a client of the service.
#[derive(Debug, Args)]
pub struct ClientTls {
    /// PEM file with trusted authorities [default: those of the operating system]
    #[arg(long, env = "ISSUE_TRACKER_CA_CERT", value_name = "FILE", help_heading = "TLS")]
    pub ca_cert: Option<PathBuf>,
    /// PEM file with the client's certificate chain (mutual TLS)
    #[arg(long, env = "ISSUE_TRACKER_CLIENT_CERT", value_name = "FILE", requires = "client_key", help_heading = "TLS")]
    pub client_cert: Option<PathBuf>,
    /// PEM file with the private key of --client-cert
    #[arg(long, env = "ISSUE_TRACKER_CLIENT_KEY", value_name = "FILE", requires = "client_cert", help_heading = "TLS")]
    pub client_key: Option<PathBuf>,
    /// Name that the service's certificate must contain [default: the host of --server]
    #[arg(long, env = "ISSUE_TRACKER_SERVER_NAME", value_name = "NAME", help_heading = "TLS")]
    pub server_name: Option<String>,
}
