//! Limits of requests and responses, and of their fields.

/// Maximum items of a batch.
pub const BATCH_ITEMS_MAX: usize = 1_000;
/// Rows of a page if the request does not specify `page_size`.
pub const PAGE_ROWS_DEFAULT: usize = 50;
/// Maximum rows of a page. A larger `page_size` is reduced to this.
pub const PAGE_ROWS_MAX: usize = 1_000;
/// Maximum size of a response in bytes. gRPC clients accept 4 MiB by default.
pub const RESPONSE_BYTES_MAX: usize = 3 * 1024 * 1024;

pub const TITLE_CHARS_MAX: usize = 255;
pub const DESCRIPTION_CHARS_MAX: usize = 65_536;
pub const EXTERNAL_ID_CHARS_MAX: usize = 255;
pub const COMMENT_CHARS_MAX: usize = 16_384;
pub const USERNAME_CHARS_MAX: usize = 50;
pub const LABEL_NAME_CHARS_MAX: usize = 50;
pub const LABEL_DESCRIPTION_CHARS_MAX: usize = 255;
pub const TOKEN_NAME_CHARS_MAX: usize = 100;
pub const LABELS_PER_ISSUE_MAX: usize = 100;
pub const PASSWORD_BYTES_MIN: usize = 8;
/// bcrypt ignores all bytes after these.
pub const PASSWORD_BYTES_MAX: usize = 72;
