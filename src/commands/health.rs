//! `issue-tracker health`.

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, anyhow};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::exit_code;
use crate::{client, config::HealthArgs};

/// Maximum time to connect to the service.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks the health of a running service and prints its status. Fails if the service cannot be reached.
pub async fn health(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let server = match args.server {
        Some(server) => server,
        None => format!("http://{}", args.listen).parse()?,
    };
    let connected = client::endpoint(&server, &args.tls)?.connect_timeout(CONNECT_TIMEOUT).connect().await;
    let channel = connected.with_context(|| format!("cannot connect to {server}"))?;
    let response = HealthClient::new(channel)
        .check(HealthCheckRequest::default())
        .await
        .map_err(|status| anyhow!(client::why(&status)))?;
    let status = response.into_inner().status();
    println!("{}", status.as_str_name());
    Ok(match status {
        ServingStatus::Serving => ExitCode::SUCCESS,
        _ => ExitCode::from(exit_code::NEGATIVE),
    })
}
