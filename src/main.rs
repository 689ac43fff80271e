//! The `issue-tracker` binary. [`issue_tracker::run`] does the work.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[tokio::main]
async fn main() -> ExitCode {
    issue_tracker::run().await
}
