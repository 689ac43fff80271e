//! Checks of request fields, which collect every violation.

use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use uuid::Uuid;

use crate::error::{Error, Result, Violation, quote};

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
}

#[derive(Clone, Copy, Debug)]
pub struct TimeWindow {
    pub start: Option<DateTime<Utc>>,
    pub end: Option<DateTime<Utc>>,
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
