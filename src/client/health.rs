//! Health checks of a running service.

use std::time::Duration;

use anyhow::bail;
use http::Uri;
use tokio::time::timeout;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::connection::{Failure, ServerEndpoint, failure};
use crate::config::ClientTls;

/// Time allowed for the connection and the response together.
const HEALTH_CHECK_MAX: Duration = Duration::from_secs(10);

/// Returns the status of a name of the service; the empty name is the service as a whole. Fails, without retries, if it
/// cannot be reached or does not respond within 10 s.
pub async fn check_health(server: &Uri, tls: &ClientTls, name: String) -> anyhow::Result<ServingStatus> {
    let endpoint = ServerEndpoint::new(server, tls)?;
    let Ok(status) = timeout(HEALTH_CHECK_MAX, check(&endpoint, name)).await else {
        bail!("{} does not respond within {} s", endpoint.address(), HEALTH_CHECK_MAX.as_secs());
    };
    Ok(status?)
}

async fn check(endpoint: &ServerEndpoint, service: String) -> Result<ServingStatus, Failure> {
    let mut client = HealthClient::new(endpoint.connect().await?);
    let response = client.check(HealthCheckRequest { service }).await;
    Ok(response.map_err(|status| failure(&status))?.into_inner().status())
}
