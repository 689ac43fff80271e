//! Black-box tests of the service with a real server, generated clients and a real database. Each test has a database of
//! its own, and its name states a rule.

mod credentials;
mod h2_client;
mod harness;
#[path = "../support"]
mod support {
    pub mod bounds;
    pub mod certificates;
    pub mod codec;
    pub mod database;
    pub mod eventually;
    pub mod ports;
    pub mod scratch;
}

mod abuse;
mod audit;
mod auth;
mod batches;
mod batching;
mod comments;
mod conformance;
mod contract;
mod database_tls;
mod exports;
mod faults;
mod history;
mod imports;
mod issues;
mod labels;
mod lists;
mod privileges;
mod reports;
mod users;
