//! Issues: one file per kind of statement.

mod change;
mod create;
mod export;
mod get;
mod list;
mod row;

pub use change::{Changed, IssueChange, bulk_update, update_many};
pub use create::{NewIssue, create, explain_create};
pub use export::ExportSession;
pub use get::{get, get_in_view, get_many};
#[cfg(feature = "internals")]
pub use list::list_statement;
pub use list::{IssueList, add_comments, batch_get, list};
