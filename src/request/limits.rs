//! Bounds of request fields.

pub const BATCH_ITEMS_MAX: usize = 1_000;
/// Each of the known paths once is far fewer.
pub const UPDATE_MASK_PATHS_MAX: usize = 100;
pub const PAGE_ROWS_DEFAULT: usize = 50;
pub const PAGE_ROWS_MAX: usize = 1_000;
/// What one answer may hold: clients take 4 MiB by default.
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
/// bcrypt reads no more.
pub const PASSWORD_BYTES_MAX: usize = 72;
