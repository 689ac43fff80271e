//! The TLS flags of the service and of its clients.

use std::path::PathBuf;

use clap::{ArgAction, Args, builder::BoolishValueParser};

use crate::transport::tls;

/// The TLS of the service.
#[derive(Debug, Args)]
pub struct ServerTls {
    /// PEM file with the certificate chain of the service; reloaded when it changes
    #[arg(long, env = "ISSUE_TRACKER_TLS_CERT", value_name = "FILE", help_heading = "TLS")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the private key of --tls-cert
    #[arg(long, env = "ISSUE_TRACKER_TLS_KEY", value_name = "FILE", help_heading = "TLS")]
    pub tls_key: Option<PathBuf>,
    /// PEM file with the authorities that must have signed client certificates (mutual TLS)
    #[arg(long, env = "ISSUE_TRACKER_TLS_CLIENT_CA", value_name = "FILE", help_heading = "TLS")]
    pub tls_client_ca: Option<PathBuf>,
    /// Accept plaintext connections from other machines
    #[arg(long, env = "ISSUE_TRACKER_INSECURE_PLAINTEXT", value_name = "BOOL", default_value = "false",
        default_missing_value = "true", num_args = 0..=1, require_equals = true, action = ArgAction::Set,
        value_parser = BoolishValueParser::new(), help_heading = "TLS")]
    pub insecure_plaintext: bool,
}

impl ServerTls {
    /// Returns which files are missing, each with a remedy.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let (has_certificate, has_key) = (self.tls_cert.is_some(), self.tls_key.is_some());
        if has_certificate && !has_key {
            problems.push("--tls-cert: has no private key; set --tls-key too".to_owned());
        }
        if has_key && !has_certificate {
            problems.push("--tls-key: has no certificate; set --tls-cert too".to_owned());
        }
        if self.tls_client_ca.is_some() && !has_certificate {
            problems.push("--tls-client-ca: requires TLS; set --tls-cert and --tls-key too".to_owned());
        }
        problems
    }

    /// Returns whether a file for TLS is set, even if another one is missing.
    pub fn is_wanted(&self) -> bool {
        self.tls_cert.is_some() || self.tls_key.is_some()
    }

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
