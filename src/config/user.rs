//! The flags of `user create` and `user reset-password`.

use clap::{Args, Subcommand, ValueEnum, value_parser};

use super::Database;
use crate::pb;

#[derive(Debug, Subcommand)]
pub enum UserCommand {
    /// Create a user; prompts for the password, or reads it from standard input
    Create(UserCreateArgs),
    /// Set a new password and end the user's sessions; prompts for it, or reads it from standard input
    ResetPassword(ResetPasswordArgs),
}

#[derive(Debug, Args)]
pub struct UserCreateArgs {
    /// Username of the new user
    pub username: String,
    /// Role of the new user
    #[arg(long, value_enum, default_value_t = RoleName::Member)]
    pub role: RoleName,
    #[command(flatten)]
    pub bcrypt: BcryptCost,
    #[command(flatten)]
    pub database: Database,
}

#[derive(Debug, Args)]
pub struct ResetPasswordArgs {
    /// Username of the user
    pub username: String,
    #[command(flatten)]
    pub bcrypt: BcryptCost,
    #[command(flatten)]
    pub database: Database,
}

/// A hash takes 16 s then. With one more, logins would exceed the default deadline.
const BCRYPT_COST_MAX: i64 = 18;

/// The cost of new password hashes, the same for the service and the `user` commands.
#[derive(Clone, Debug, Args)]
pub struct BcryptCost {
    /// bcrypt cost of new password hashes; each step doubles the time, 12 takes about 250 ms
    #[arg(long = "bcrypt-cost", env = "ISSUE_TRACKER_BCRYPT_COST", default_value_t = 12, value_name = "COST",
        value_parser = value_parser!(u32).range(4..=BCRYPT_COST_MAX))]
    pub cost: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RoleName {
    Viewer,
    Member,
    Admin,
}

impl From<RoleName> for pb::Role {
    fn from(role: RoleName) -> Self {
        match role {
            RoleName::Viewer => Self::Viewer,
            RoleName::Member => Self::Member,
            RoleName::Admin => Self::Admin,
        }
    }
}
