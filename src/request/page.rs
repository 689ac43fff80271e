//! Page sizes and page tokens.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use uuid::Uuid;

use super::{Check, PAGE_ROWS_DEFAULT, PAGE_ROWS_MAX, RESPONSE_BYTES_MAX, sha256};
use crate::{
    db::PageBounds,
    error::{Error, Result},
};

impl Check {
    /// How many rows a page has, and what it goes on from. `bound_to` is everything that the page's order and selection
    /// depend on.
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

/// One page of a list.
#[derive(Debug)]
pub struct PageRequest {
    rows_max: usize,
    /// The key of the last row of the page before.
    after: Option<Vec<u8>>,
    binding: [u8; BINDING_BYTES],
}

const BINDING_BYTES: usize = 8;
/// The first byte of a page token: another layout gets another number.
const PAGE_TOKEN_VERSION: u8 = 1;
/// The longest key is a name of 50 characters in lower case.
const PAGE_TOKEN_CHARS_MAX: usize = 400;

impl PageRequest {
    pub fn bounds(&self) -> PageBounds {
        PageBounds { rows_max: self.rows_max, bytes_max: RESPONSE_BYTES_MAX }
    }

    /// For LIMIT: one more row tells whether there is another page.
    pub fn limit(&self) -> i64 {
        self.rows_max as i64 + 1
    }

    /// The last id of the page before, in lists by id.
    pub fn after_id(&self) -> Result<Option<Uuid>> {
        let Some(key) = &self.after else { return Ok(None) };
        Uuid::from_slice(key).map(Some).map_err(|_| Error::invalid("page_token", PAGE_TOKEN_GARBAGE))
    }

    /// The last name of the page before, in lists by name.
    pub fn after_name(&self) -> Result<Option<&str>> {
        let Some(key) = &self.after else { return Ok(None) };
        match std::str::from_utf8(key) {
            Ok(name) if !name.contains('\0') => Ok(Some(name)),
            _ => Err(Error::invalid("page_token", PAGE_TOKEN_GARBAGE)),
        }
    }

    /// The last position of the page before, in lists by position; before the first page 0.
    pub fn after_position(&self) -> Result<i32> {
        let Some(key) = &self.after else { return Ok(0) };
        let key = <[u8; 4]>::try_from(&**key).map_err(|_| Error::invalid("page_token", PAGE_TOKEN_GARBAGE))?;
        Ok(i32::from_be_bytes(key))
    }

    /// The last number of the page before, in lists by a growing number.
    pub fn after_number(&self) -> Result<Option<i64>> {
        let Some(key) = &self.after else { return Ok(None) };
        let key = <[u8; 8]>::try_from(&**key).map_err(|_| Error::invalid("page_token", PAGE_TOKEN_GARBAGE))?;
        Ok(Some(i64::from_be_bytes(key)))
    }

    /// The token of the next page, which begins behind the row with this key.
    pub fn next_token(&self, more: bool, last_key: Option<&[u8]>) -> String {
        let Some(key) = last_key.filter(|_| more) else { return String::new() };
        let mut token = vec![PAGE_TOKEN_VERSION];
        token.extend_from_slice(&self.binding);
        token.extend_from_slice(key);
        BASE64_URL_SAFE_NO_PAD.encode(token)
    }
}

const PAGE_TOKEN_GARBAGE: &str = "is not a token that this service has given; begin again without one";

fn page_rows(page_size: i32) -> Result<usize, String> {
    match usize::try_from(page_size) {
        Err(_) => Err(format!("must not be negative, is {page_size}")),
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
    let garbage = || PAGE_TOKEN_GARBAGE.to_owned();
    if token.len() > PAGE_TOKEN_CHARS_MAX {
        return Err(garbage());
    }
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(token).map_err(|_| garbage())?;
    let (version, rest) = bytes.split_first().ok_or_else(garbage)?;
    let (bound_to, key) = rest.split_first_chunk::<BINDING_BYTES>().ok_or_else(garbage)?;
    if *version != PAGE_TOKEN_VERSION || key.is_empty() {
        return Err(garbage());
    }
    if *bound_to != binding {
        return Err("is of a list with another filter or other options; begin again without one".to_owned());
    }
    Ok(key.to_vec())
}
