//! The subcommands that run, administer and check the service, one per file. `import` and `export` are in [`crate::client`].

mod bootstrap;
mod health;
mod migrate;
mod serve;
mod user;

pub use self::{health::health, migrate::migrate, serve::serve, user::create_user};
