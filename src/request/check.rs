//! Checks of request fields, which collect every violation.

use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use uuid::Uuid;

use crate::{
    db::reports::TimeWindow,
    error::{Error, Result, Violation, quote},
};

/// Collects all violations of a request. The values that its functions return are only valid if [`Check::done`] succeeds.
#[derive(Debug, Default)]
pub struct Check {
    violations: Vec<Violation>,
}

impl Check {
    /// Returns an error with all violations, if there are any.
    pub fn done(self) -> Result<()> {
        if self.violations.is_empty() { Ok(()) } else { Err(Error::Invalid(self.violations)) }
    }

    /// Adds a violation.
    pub fn fail(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.violations.push(Violation::new(field, message));
    }

    /// Returns the value, or adds the violation and returns the default.
    pub fn take<T: Default>(&mut self, field: impl Into<String>, value: Result<T, String>) -> T {
        value.unwrap_or_else(|message| {
            self.fail(field, message);
            T::default()
        })
    }

    /// Returns a message that is required.
    pub fn required<T: Default>(&mut self, field: &str, message: Option<T>) -> T {
        self.take(field, message.ok_or_else(|| "required".to_owned()))
    }

    /// Parses a UUID.
    pub fn uuid(&mut self, field: impl Into<String>, value: &str) -> Uuid {
        self.take(field, uuid(value))
    }

    /// Parses a UUID. An empty one is `None`.
    pub fn optional_uuid(&mut self, field: impl Into<String>, value: &str) -> Option<Uuid> {
        if value.is_empty() { None } else { self.take(field, uuid(value).map(Some)) }
    }

    /// Parses `min` to `max` different UUIDs.
    pub fn uuids(&mut self, field: &str, values: &[String], min: usize, max: usize) -> Vec<Uuid> {
        if values.len() < min || values.len() > max {
            self.fail(field, format!("has {} ids; expected {min} to {max}", values.len()));
            return Vec::new();
        }
        let mut seen = std::collections::HashMap::new();
        let mut ids = Vec::with_capacity(values.len());
        for (index, value) in values.iter().enumerate() {
            let id = uuid(value).and_then(|id| match seen.insert(id, index) {
                Some(first) => {
                    Err(format!("\"{}\" is a duplicate of {field}[{first}]; expected each id once", quote(value)))
                }
                None => Ok(id),
            });
            let id = self.take(format!("{field}[{index}]"), id);
            ids.push(id);
        }
        ids
    }

    /// Checks the length of a text in characters, and that it has no NUL character.
    pub fn text(&mut self, field: impl Into<String>, value: String, chars_max: usize) -> String {
        self.take(field, text(value, chars_max))
    }

    /// As [`Check::text`]. The text must not be empty or only whitespace.
    pub fn required_text(&mut self, field: impl Into<String>, value: String, chars_max: usize) -> String {
        let value = text(value, chars_max).and_then(|value| match value.trim().is_empty() {
            true => Err("required; expected more than whitespace".to_owned()),
            false => Ok(value),
        });
        self.take(field, value)
    }

    /// Parses a value of an enum. 0 is its unspecified value.
    pub fn enumeration<E: TryFrom<i32> + Default>(&mut self, field: impl Into<String>, value: i32) -> E {
        self.take(field, E::try_from(value).map_err(|_| format!("{value} is unknown; expected a value of the enum")))
    }

    /// Checks an expected version. 0 is any version.
    pub fn expected_version(&mut self, field: impl Into<String>, value: i64) -> i64 {
        self.take(
            field,
            if value < 0 { Err(format!("{value} is negative; expected a version, or 0 for any")) } else { Ok(value) },
        )
    }

    /// Parses a time of the years 1 to 9999, which both PostgreSQL and RFC 3339 can represent.
    pub fn time(&mut self, field: &str, value: Option<Timestamp>) -> Option<DateTime<Utc>> {
        let value = value?;
        let time = u32::try_from(value.nanos)
            .ok()
            // chrono accepts more, as a leap second.
            .filter(|nanos| *nanos < 1_000_000_000)
            .and_then(|nanos| DateTime::from_timestamp(value.seconds, nanos))
            .filter(|time| (1..=9999).contains(&chrono::Datelike::year(time)));
        self.take(
            field,
            time.map(Some).ok_or_else(|| "is out of range; expected a time in the years 1 to 9999".to_owned()),
        )
    }

    /// Parses `start_time` and `end_time`.
    pub fn window(&mut self, start: Option<Timestamp>, end: Option<Timestamp>) -> TimeWindow {
        let window = TimeWindow { start: self.time("start_time", start), end: self.time("end_time", end) };
        if let (Some(start), Some(end)) = (window.start, window.end)
            && start > end
        {
            self.fail("end_time", "is before start_time; expected the same time or a later one");
        }
        window
    }
}

/// Parses the canonical spelling only, so that an id has one spelling.
fn uuid(value: &str) -> Result<Uuid, String> {
    match Uuid::try_parse(value) {
        Ok(id) if value.len() == 36 => Ok(id),
        _ if value.is_empty() => Err("required; expected a UUID".to_owned()),
        _ => Err(format!(
            "\"{}\" is not a UUID; expected one such as 01980a3e-7c1a-7bbb-8000-2f6f0e0f3c55",
            quote(value)
        )),
    }
}

fn text(value: String, chars_max: usize) -> Result<String, String> {
    if value.contains('\0') {
        return Err("contains a NUL character; expected none".to_owned());
    }
    // A text has at most as many characters as bytes, which are cheaper to count.
    if value.len() > chars_max {
        let chars = value.chars().count();
        if chars > chars_max {
            return Err(format!("has {chars} characters; expected at most {chars_max}"));
        }
    }
    Ok(value)
}
