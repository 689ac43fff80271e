//! Parsing and bounds that the RPCs share. Past here there are no raw strings for ids, enums or bounded text.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use prost_types::{FieldMask, Timestamp};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    db::{PageBounds, idempotency::RequestKey},
    error::{Error, Result, Violation, quote},
};

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

/// Collects what is wrong with a request, so that the caller is told all of it at once. The values that it returns are
/// only good after [`Check::done`].
#[derive(Debug, Default)]
pub struct Check {
    violations: Vec<Violation>,
}

impl Check {
    pub fn done(self) -> Result<()> {
        if self.violations.is_empty() { Ok(()) } else { Err(Error::Invalid(self.violations)) }
    }

    pub fn fail(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.violations.push(Violation::new(field, message));
    }

    /// Takes the value, or notes the violation and goes on with the default.
    pub fn take<T: Default>(&mut self, field: impl Into<String>, value: Result<T, String>) -> T {
        value.unwrap_or_else(|message| {
            self.fail(field, message);
            T::default()
        })
    }

    /// A message that must be there.
    pub fn required<T: Default>(&mut self, field: &str, message: Option<T>) -> T {
        self.take(field, message.ok_or_else(|| "is required".to_owned()))
    }

    pub fn uuid(&mut self, field: impl Into<String>, value: &str) -> Uuid {
        self.take(field, uuid(value))
    }

    /// Empty is none.
    pub fn optional_uuid(&mut self, field: impl Into<String>, value: &str) -> Option<Uuid> {
        if value.is_empty() { None } else { self.take(field, uuid(value).map(Some)) }
    }

    /// A batch of ids, each once.
    pub fn uuids(&mut self, field: &str, values: &[String], min: usize, max: usize) -> Vec<Uuid> {
        if values.len() < min || values.len() > max {
            self.fail(field, format!("takes {min} to {max} ids, not {}", values.len()));
            return Vec::new();
        }
        let mut seen = std::collections::HashMap::new();
        let mut ids = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            let id = uuid(value).and_then(|id| match seen.insert(id, index) {
                Some(first) => Err(format!("\"{}\" is {field}[{first}] already", quote(value))),
                None => Ok(id),
            });
            let id = self.take(format!("{field}[{index}]"), id);
            ids.push(id);
        }
        ids
    }

    pub fn text(&mut self, field: impl Into<String>, value: String, chars_max: usize) -> String {
        self.take(field, text(value, chars_max))
    }

    /// Text with something in it.
    pub fn required_text(&mut self, field: impl Into<String>, value: String, chars_max: usize) -> String {
        let value = text(value, chars_max).and_then(|value| match value.trim().is_empty() {
            true => Err("must not be empty or only whitespace".to_owned()),
            false => Ok(value),
        });
        self.take(field, value)
    }

    /// The number of a known value; 0 is whatever its caller makes of unspecified.
    pub fn enumeration<E: TryFrom<i32> + Default>(&mut self, field: impl Into<String>, value: i32) -> E {
        self.take(field, E::try_from(value).map_err(|_| format!("{value} is not a known value")))
    }

    /// 0 is any version.
    pub fn expected_version(&mut self, field: impl Into<String>, value: i64) -> i64 {
        self.take(field, if value < 0 { Err(format!("must not be negative, is {value}")) } else { Ok(value) })
    }

    pub fn time(&mut self, field: &str, value: Option<Timestamp>) -> Option<DateTime<Utc>> {
        let value = value?;
        let time = u32::try_from(value.nanos)
            .ok()
            // chrono would take more as a leap second.
            .filter(|nanos| *nanos < 1_000_000_000)
            .and_then(|nanos| DateTime::from_timestamp(value.seconds, nanos))
            // What both PostgreSQL and RFC 3339 can hold.
            .filter(|time| (1..=9999).contains(&chrono::Datelike::year(time)));
        self.take(field, time.map(Some).ok_or_else(|| "is not a time of the years 1 to 9999".to_owned()))
    }

    /// A half-open window: from `start_time`, before `end_time`.
    pub fn window(&mut self, start: Option<Timestamp>, end: Option<Timestamp>) -> TimeWindow {
        let window = TimeWindow { start: self.time("start_time", start), end: self.time("end_time", end) };
        if let (Some(start), Some(end)) = (window.start, window.end)
            && start > end
        {
            self.fail("end_time", "must not be before start_time");
        }
        window
    }

    /// The paths of a mask, `*` standing for all; without a mask those that are populated.
    pub fn mask(
        &mut self,
        mask: Option<FieldMask>,
        known: &'static [&'static str],
        populated: impl Fn(&str) -> bool,
    ) -> Vec<&'static str> {
        let Some(mask) = mask.filter(|mask| !mask.paths.is_empty()) else {
            return known.iter().copied().filter(|path| populated(path)).collect();
        };
        // Also bounds what is said of the unknown ones.
        if mask.paths.len() > UPDATE_MASK_PATHS_MAX {
            let count = mask.paths.len();
            self.fail("update_mask", format!("has {count} paths, at most {UPDATE_MASK_PATHS_MAX} are read"));
            return Vec::new();
        }
        if mask.paths == ["*"] {
            return known.to_vec();
        }
        let mut paths = Vec::new();
        for (index, path) in mask.paths.iter().enumerate() {
            match known.iter().find(|known| *known == path) {
                Some(path) if paths.contains(path) => {}
                Some(path) => paths.push(*path),
                None => self.fail(
                    format!("update_mask.paths[{index}]"),
                    format!("\"{}\" cannot be updated; known are {}, and * for all", quote(path), known.join(", ")),
                ),
            }
        }
        paths
    }

    /// Whether a mutation is to be remembered, or only tried.
    pub fn mutation(&mut self, request: &impl Mutation) -> RequestKey {
        let request_id = self.optional_uuid("request_id", request.request_id());
        RequestKey {
            request_id: request_id.map(|id| (id, request.fingerprint())),
            validate_only: request.validate_only(),
        }
    }

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

#[derive(Clone, Copy, Debug)]
pub struct TimeWindow {
    pub start: Option<DateTime<Utc>>,
    pub end: Option<DateTime<Utc>>,
}

/// A request that changes something.
pub trait Mutation {
    fn request_id(&self) -> &str;
    fn validate_only(&self) -> bool;
    /// SHA-256 over the method's name and the payload, without request id, `validate_only` and secrets.
    fn fingerprint(&self) -> [u8; 32];
}

/// Implements [`Mutation`] for a request message; the fields after `without` are secrets.
macro_rules! mutation {
    ($($request:ident $(without $($secret:ident),+)?;)+) => {$(
        impl $crate::request::Mutation for $crate::pb::$request {
            fn request_id(&self) -> &str {
                &self.request_id
            }
            fn validate_only(&self) -> bool {
                self.validate_only
            }
            fn fingerprint(&self) -> [u8; 32] {
                let mut payload = self.clone();
                payload.request_id.clear();
                payload.validate_only = false;
                $($(payload.$secret.clear();)+)?
                $crate::request::sha256(&[stringify!($request).as_bytes(), &prost::Message::encode_to_vec(&payload)])
            }
        }
    )+};
}
pub(crate) use mutation;

/// SHA-256 over parts, each with its length.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// The canonical spelling only, so that an id has one.
fn uuid(value: &str) -> Result<Uuid, String> {
    match Uuid::try_parse(value) {
        Ok(id) if value.len() == 36 => Ok(id),
        _ if value.is_empty() => Err("is required: a UUID".to_owned()),
        _ => Err(format!("\"{}\" is not a UUID such as 01980a3e-7c1a-7bbb-8000-2f6f0e0f3c55", quote(value))),
    }
}

fn text(value: String, chars_max: usize) -> Result<String, String> {
    if value.contains('\0') {
        return Err("must not contain a NUL character".to_owned());
    }
    // Counting characters is only needed where there are more bytes.
    if value.len() > chars_max {
        let chars = value.chars().count();
        if chars > chars_max {
            return Err(format!("has {chars} characters, at most {chars_max} are allowed"));
        }
    }
    Ok(value)
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

/// A time as messages have it, kept at microseconds by the database.
pub fn timestamp(time: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: time.timestamp(), nanos: time.timestamp_subsec_nanos() as i32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(paths: impl IntoIterator<Item = &'static str>) -> Result<Vec<&'static str>> {
        let paths = paths.into_iter().map(str::to_owned).collect();
        let mut check = Check::default();
        let found = check.mask(Some(FieldMask { paths }), &["title", "status"], |_| false);
        check.done().map(|()| found)
    }

    #[test]
    fn a_mask_is_bounded_and_so_is_what_is_said_of_it() {
        assert_eq!(mask(["title"; UPDATE_MASK_PATHS_MAX]).unwrap(), ["title"]);
        let error = mask(["title"; UPDATE_MASK_PATHS_MAX + 1]).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 101 paths, at most 100 are read");
        let error = mask(["x", "title"].into_iter().cycle().take(100_000)).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 100000 paths, at most 100 are read");
    }
}
