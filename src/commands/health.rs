//! `issue-tracker health`.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{client, config::HealthArgs};

/// Maximum time to connect to the service.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks the health of a running service and prints `SERVING`. Fails unless it is.
pub async fn health(args: HealthArgs) -> anyhow::Result<()> {
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
    match response.into_inner().status() {
        ServingStatus::Serving => {
            println!("SERVING");
            Ok(())
        }
        status => bail!("{}", status.as_str_name()),
    }
}
