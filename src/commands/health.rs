//! `issue-tracker health`.

use std::process::ExitCode;

use tonic_health::pb::health_check_response::ServingStatus;

use crate::{
    client::check_health,
    config::{HealthArgs, exit_code},
};

/// Checks the health of a running service and prints its status. Fails if the service cannot be reached.
pub async fn health(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let server = match args.server {
        Some(server) => server,
        None => format!("http://{}", args.listen).parse()?,
    };
    let status = check_health(&server, &args.tls, args.service).await?;
    println!("{}", status.as_str_name());
    Ok(match status {
        ServingStatus::Serving => ExitCode::SUCCESS,
        _ => ExitCode::from(exit_code::NEGATIVE),
    })
}
