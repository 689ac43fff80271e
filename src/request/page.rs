//! Page sizes and page tokens.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use uuid::Uuid;

use super::Check;
use crate::{
    db::PageBounds,
    error::{Error, Result},
    hash::sha256,
    limits::{PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX, RESPONSE_BYTES_MAX},
};

impl Check {
    /// Parses `page_size` and `page_token`. `bound_to` is everything that determines which rows the list has and in which
    /// order: a token is only valid for the same values.
    pub fn page(&mut self, page_size: i32, page_token: &str, bound_to: &[&[u8]]) -> PageRequest {
        let rows_max = self.take("page_size", page_rows(page_size));
        let binding = page_binding(bound_to);
        let after = if page_token.is_empty() {
            None
        } else {
            self.take("page_token", read_page_token(page_token, binding).map(Some))
        };
        PageRequest { rows_max, after, binding }
    }
}

/// The requested page of a list.
#[derive(Debug)]
pub struct PageRequest {
    rows_max: usize,
    /// The key of the last row of the previous page.
    after: Option<Vec<u8>>,
    binding: [u8; BINDING_BYTES],
}

const BINDING_BYTES: usize = 8;
/// The first byte of a page token: the version of its layout.
const PAGE_TOKEN_VERSION: u8 = 1;
/// Maximum length of a page token. The longest key is a name of 50 characters.
const PAGE_TOKEN_CHARS_MAX: usize = 400;

impl PageRequest {
    /// Returns the maximum size of the page.
    pub fn bounds(&self) -> PageBounds {
        PageBounds { rows_max: self.rows_max, bytes_max: RESPONSE_BYTES_MAX }
    }

    /// Returns the LIMIT of the statement: one row more than the page shows whether another page follows.
    pub fn limit(&self) -> i64 {
        self.rows_max as i64 + 1
    }

    /// Returns the last id of the previous page, for lists by id.
    pub fn after_id(&self) -> Result<Option<Uuid>> {
        let Some(key) = &self.after else { return Ok(None) };
        Uuid::from_slice(key).map(Some).map_err(|_| Error::invalid("page_token", INVALID_PAGE_TOKEN))
    }

    /// Returns the last name of the previous page, for lists by name.
    pub fn after_name(&self) -> Result<Option<&str>> {
        let Some(key) = &self.after else { return Ok(None) };
        match std::str::from_utf8(key) {
            Ok(name) if !name.contains('\0') => Ok(Some(name)),
            _ => Err(Error::invalid("page_token", INVALID_PAGE_TOKEN)),
        }
    }

    /// Returns the last position of the previous page, for lists by position. 0 for the first page.
    pub fn after_position(&self) -> Result<i32> {
        let Some(key) = &self.after else { return Ok(0) };
        let key = <[u8; 4]>::try_from(&**key).map_err(|_| Error::invalid("page_token", INVALID_PAGE_TOKEN))?;
        Ok(i32::from_be_bytes(key))
    }

    /// Returns the last number of the previous page, for lists by number.
    pub fn after_number(&self) -> Result<Option<i64>> {
        let Some(key) = &self.after else { return Ok(None) };
        let key = <[u8; 8]>::try_from(&**key).map_err(|_| Error::invalid("page_token", INVALID_PAGE_TOKEN))?;
        Ok(Some(i64::from_be_bytes(key)))
    }

    /// Returns the token of the next page, which starts after the row with this key. Empty on the last page.
    pub fn next_token(&self, more: bool, last_key: Option<&[u8]>) -> String {
        let Some(key) = last_key.filter(|_| more) else { return String::new() };
        let mut token = vec![PAGE_TOKEN_VERSION];
        token.extend_from_slice(&self.binding);
        token.extend_from_slice(key);
        BASE64_URL_SAFE_NO_PAD.encode(token)
    }
}

const INVALID_PAGE_TOKEN: &str = "is malformed; expected a next_page_token of this service, or none for the first page";

fn page_rows(page_size: i32) -> Result<usize, String> {
    match usize::try_from(page_size) {
        Err(_) => Err(format!("{page_size} is negative; expected 0 to {PAGE_ROWS_MAX}")),
        Ok(0) => Ok(PAGE_ROWS_DEFAULT),
        Ok(rows) => Ok(rows.min(PAGE_ROWS_MAX)),
    }
}

fn page_binding(bound_to: &[&[u8]]) -> [u8; BINDING_BYTES] {
    let mut binding = [0; BINDING_BYTES];
    binding.copy_from_slice(&sha256(bound_to)[..BINDING_BYTES]);
    binding
}

fn read_page_token(token: &str, binding: [u8; BINDING_BYTES]) -> Result<Vec<u8>, String> {
    let malformed = || INVALID_PAGE_TOKEN.to_owned();
    if token.len() > PAGE_TOKEN_CHARS_MAX {
        return Err(malformed());
    }
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).map_err(|_| malformed())?;
    let (version, rest) = bytes.split_first().ok_or_else(malformed)?;
    let (bound_to, key) = rest.split_first_chunk::<BINDING_BYTES>().ok_or_else(malformed)?;
    if *version != PAGE_TOKEN_VERSION || key.is_empty() {
        return Err(malformed());
    }
    if *bound_to != binding {
        return Err("belongs to a list with another filter or other options; send none for the first page".to_owned());
    }
    Ok(key.to_vec())
}
