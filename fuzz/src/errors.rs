//! Properties of the errors that callers receive.

use issue_tracker::{
    error::{Error, Result},
    request::Check,
};
use tonic::{Status, codegen::http::HeaderMap};

/// The header list size that HTTP/2 clients usually accept per response.
const HEADERS_BYTES_MAX: usize = 8 * 1024;

/// Asserts that a text is not too long and contains no control or invisible characters.
#[track_caller]
pub fn assert_readable(text: &str, chars_max: usize) {
    let chars = text.chars().count();
    assert!(chars <= chars_max, "{chars} characters: {text:?}");
    assert!(!text.contains(is_unreadable), "{text:?}");
}

/// Returns whether a character is a control character or an invisible format character (Unicode Cf, Zl and Zp).
fn is_unreadable(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    let invisible = "\u{AD}\u{61C}\u{180E}\u{200B}\u{200C}\u{200D}\u{200E}\u{200F}\u{2028}\u{2029}\u{202A}\u{202B}\u{202C}\
                     \u{202D}\u{202E}\u{2060}\u{2061}\u{2062}\u{2063}\u{2064}\u{2066}\u{2067}\u{2068}\u{2069}\u{206A}\
                     \u{206B}\u{206C}\u{206D}\u{206E}\u{206F}\u{FEFF}\u{FFF9}\u{FFFA}\u{FFFB}\u{E0001}\u{E0041}\u{E007F}";
    c.is_control() || invisible.contains(c)
}

/// Asserts that an error is readable and fits the response headers. A larger one would break the connection.
#[track_caller]
pub fn assert_valid_error(error: Error) {
    assert_readable(&error.to_string(), HEADERS_BYTES_MAX);
    let mut headers = HeaderMap::new();
    Status::from(error).add_header(&mut headers).expect("a status is made of header values");
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
    assert!(bytes < HEADERS_BYTES_MAX, "{bytes} bytes of headers");
}

/// Returns the value that `read` accepts, or `None` if it reports a valid error.
#[track_caller]
pub fn run_check<T>(read: impl FnOnce(&mut Check) -> T) -> Option<T> {
    let mut check = Check::default();
    let value = read(&mut check);
    ok_or_valid_error(check.done()).map(|()| value)
}

/// Returns the value, or `None` if there is an error, which must be valid.
#[track_caller]
pub fn ok_or_valid_error<T>(result: Result<T>) -> Option<T> {
    result.map_err(assert_valid_error).ok()
}
