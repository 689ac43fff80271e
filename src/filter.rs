//! The `filter` of a list of issues: a subset of AIP-160 (<https://google.aip.dev/160>). Parses text to terms, which must
//! all hold.
//!
//! # The language
//!
//! A filter is a list of terms, joined by `AND` or by whitespace, which mean the same. It matches an issue if every term
//! holds. An empty filter matches every issue.
//!
//! ```text
//! status = OPEN AND priority = CRITICAL
//! assignee = alice label = ui label = "needs triage" crash "login page"
//! ```
//!
//! | term | holds for |
//! |---|---|
//! | `status = OPEN` | issues of that status: `OPEN`, `IN_PROGRESS`, `CLOSED` |
//! | `priority = HIGH` | issues of that priority: `NONE`, `LOW`, `MEDIUM`, `HIGH`, `CRITICAL` |
//! | `assignee = alice` | issues assigned to the user of that name or UUID; `assignee = ""`: unassigned issues |
//! | `reporter = alice` | issues reported by the user of that name or UUID |
//! | `label = bug` | issues with the label of that name or UUID; several such terms require all of the labels |
//! | `crash`, `"login page"` | issues whose title or description contains the text |
//!
//! Statuses and priorities are case-insensitive, and also accepted under their full names (`STATUS_OPEN`,
//! `PRIORITY_UNSPECIFIED`). `labels` is an alias of `label`; `assignee_id`, `reporter_id` and `label_id` accept only a
//! UUID. A UUID has hyphens; a name in the form of a UUID is parsed as a UUID. Names of fields are lower case.
//!
//! **Words.** A word ends before whitespace or one of `( ) , = < > ! :`; text with these must be quoted. It does not
//! start with `"`, `'` or `-`, and contains no `"`. All other characters stand for themselves, so `don't`, `foo.bar`,
//! `re-open`, `C++`, `#42`, `100%`, `a/b`, `x_y`, `a;b`, `\d` and `me@example.com` are words. Whitespace around `=` is
//! optional. A value is one word or one phrase: `assignee = alice bob` is a field and a search for `bob`.
//!
//! **Phrases.** Any other text is written between `"` and `"` or between `'` and `'`.
//! Inside, `\"`, `\'` and `\\` stand for the second character; any other character after a backslash is an error. After
//! the closing quote comes whitespace, an operator or the end. A phrase is not blank, except in `assignee = ""`.
//!
//! **Keywords.** `AND`, `OR` and `NOT` are keywords in capitals only; in lower case or in quotes they are text.
//!
//! **Not supported**, and refused rather than taken as words: `OR` and `||`, `NOT`, `-` and `!` before a term, `&&` (write
//! `AND`), parentheses, functions, the operators `!= < <= > >= : == <>`, curly quotes before a word, and `*` in a value
//! without quotes. In quotes and in search words `*` stands for itself.
//!
//! A filter has at most 2,000 characters, at most 32 terms, of which 8 with labels, and no NUL character.

use std::fmt;

use uuid::Uuid;

pub use self::error::FilterError;
use self::{
    error::quote,
    lexer::{Kind, Lexer, Token},
};
use crate::pb::{Priority, Status};

mod error;
mod lexer;
#[cfg(test)]
mod tests;

/// Maximum length of a filter in characters.
pub const FILTER_CHARS_MAX: usize = 2_000;

/// Maximum terms of a filter.
pub const FILTER_TERMS_MAX: usize = 32;

/// Maximum terms with labels. Each is a join, and planning many joins takes longer than reading the issues.
pub const FILTER_LABELS_MAX: usize = 8;

/// A filter: matches the issues for which all terms hold.
///
/// `Display` writes canonical text, which [`parse`] parses to an equal filter. Its spaces, `AND`s and escapes can exceed
/// [`FILTER_CHARS_MAX`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    pub terms: Vec<Term>,
}

/// One condition on an issue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Term {
    /// Never `Unspecified` when parsed.
    Status(Status),
    /// `Unspecified` is no priority.
    Priority(Priority),
    Assignee(UserRef),
    /// Never [`UserRef::None`] when parsed.
    Reporter(UserRef),
    Label(LabelRef),
    /// A word or phrase to search for; not blank.
    Search(String),
}

/// The user in a term, who may not exist.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UserRef {
    /// No user: unassigned issues.
    None,
    Id(Uuid),
    /// Not blank, and not in the form of a UUID.
    Username(String),
}

/// The label in a term, which may not exist.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LabelRef {
    Id(Uuid),
    /// Not blank, and not in the form of a UUID.
    Name(String),
}

/// Parses a filter. The module documentation describes the language.
///
/// Returns the leftmost error. A text that is too long or contains NUL is refused before it is parsed.
pub fn parse(text: &str) -> Result<Filter, FilterError> {
    if text.chars().nth(FILTER_CHARS_MAX).is_some() {
        let what = format!("the filter is longer than {FILTER_CHARS_MAX} characters");
        return Err(FilterError::new(FILTER_CHARS_MAX, what));
    }
    let characters: Vec<char> = text.chars().collect();
    if let Some(position) = characters.iter().position(|&c| c == '\0') {
        return Err(FilterError::new(position, "a filter cannot contain a NUL character"));
    }
    Parser { lexer: Lexer::new(&characters), peeked: None }.filter()
}

/// A recursive-descent parser with one function per production of AIP-160. The token of lookahead is read only when it is
/// needed, so that the leftmost error is found first.
struct Parser<'a> {
    lexer: Lexer<'a>,
    peeked: Option<Token>,
}

impl Parser<'_> {
    /// `filter: [expression]`
    fn filter(mut self) -> Result<Filter, FilterError> {
        let mut terms = Vec::new();
        if self.peek()?.kind != Kind::End {
            self.expression(&mut terms)?;
        }
        Ok(Filter { terms })
    }

    /// `expression: sequence {AND sequence}`
    fn expression(&mut self, terms: &mut Vec<Term>) -> Result<(), FilterError> {
        self.sequence(terms)?;
        while self.peek()?.kind == Kind::And {
            let and = self.take()?;
            if self.peek()?.kind == Kind::End {
                return Err(FilterError::new(and.start, "AND needs a term after it"));
            }
            self.sequence(terms)?;
        }
        Ok(())
    }

    /// `sequence: term {term}`
    fn sequence(&mut self, terms: &mut Vec<Term>) -> Result<(), FilterError> {
        loop {
            if terms.len() == FILTER_TERMS_MAX {
                let what = format!("the filter has more than {FILTER_TERMS_MAX} terms");
                return Err(FilterError::new(self.peek()?.start, what));
            }
            let start = self.peek()?.start;
            terms.push(self.term()?);
            let labels = terms.iter().filter(|term| matches!(term, Term::Label(_))).count();
            if labels > FILTER_LABELS_MAX {
                let what = format!("the filter has more than {FILTER_LABELS_MAX} terms with labels");
                return Err(FilterError::new(start, what));
            }
            if matches!(self.peek()?.kind, Kind::And | Kind::End) {
                return Ok(());
            }
        }
    }

    /// `term: field "=" value | word | phrase`
    fn term(&mut self) -> Result<Term, FilterError> {
        let Token { kind, start } = self.take()?;
        let fail = |what: String| Err(FilterError::new(start, what));
        match kind {
            Kind::Word(name) if self.peek()?.kind == Kind::Equals => {
                let field = Field::named(&name).map_err(|what| FilterError::new(start, what))?;
                self.take()?;
                let (value, start) = self.value()?;
                field.term(value).map_err(|what| FilterError::new(start, what))
            }
            Kind::Phrase(name) if self.peek()?.kind == Kind::Equals => {
                fail(format!("quoted field name {}; expected it without quotes", quote(&name)))
            }
            Kind::Word(text) => Ok(Term::Search(text)),
            Kind::Phrase(text) if is_blank(&text) => {
                fail(format!("blank phrase {}; expected text to search for", quote(&quoted(&text))))
            }
            Kind::Phrase(text) => Ok(Term::Search(text)),
            Kind::And => fail("AND needs a term before it".into()),
            Kind::Equals => fail("`=` needs a field before it; put text with `=` in quotes".into()),
            Kind::End => fail("expected a term, found the end of the filter".into()),
            Kind::Unsupported(what) => fail(what),
        }
    }

    /// Returns the value of a field and its position.
    fn value(&mut self) -> Result<(String, usize), FilterError> {
        let Token { kind, start } = self.take()?;
        let found = match kind {
            Kind::Word(text) if text.contains('*') => {
                let what = "wildcards (`*`) are not supported";
                format!("{what}: {}; put text with `*` in quotes", quote(&text))
            }
            Kind::Word(text) | Kind::Phrase(text) => return Ok((text, start)),
            Kind::And => "expected a value after `=`, found AND".into(),
            Kind::Equals => "expected a value after `=`, found another `=`".into(),
            Kind::End => "expected a value after `=`, found the end of the filter".into(),
            Kind::Unsupported(what) => what,
        };
        Err(FilterError::new(start, found))
    }

    fn peek(&mut self) -> Result<&Token, FilterError> {
        let token = self.take()?;
        Ok(self.peeked.insert(token))
    }

    fn take(&mut self) -> Result<Token, FilterError> {
        match self.peeked.take() {
            Some(token) => Ok(token),
            None => self.lexer.token(),
        }
    }
}

#[derive(Clone, Copy)]
enum Field {
    Status,
    Priority,
    Assignee,
    AssigneeId,
    Reporter,
    ReporterId,
    Label,
    LabelId,
}

const FIELDS: [(&str, Field); 9] = [
    ("status", Field::Status),
    ("priority", Field::Priority),
    ("assignee", Field::Assignee),
    ("assignee_id", Field::AssigneeId),
    ("reporter", Field::Reporter),
    ("reporter_id", Field::ReporterId),
    ("label", Field::Label),
    ("labels", Field::Label),
    ("label_id", Field::LabelId),
];

const STATUSES: [(&str, Status); 3] =
    [("OPEN", Status::Open), ("IN_PROGRESS", Status::InProgress), ("CLOSED", Status::Closed)];

const PRIORITIES: [(&str, Priority); 5] = [
    ("NONE", Priority::Unspecified),
    ("LOW", Priority::Low),
    ("MEDIUM", Priority::Medium),
    ("HIGH", Priority::High),
    ("CRITICAL", Priority::Critical),
];

impl Field {
    fn named(name: &str) -> Result<Field, String> {
        let known = FIELDS.iter().find(|(known, _)| *known == name);
        known
            .map(|&(_, field)| field)
            .ok_or_else(|| format!("unknown field {}; the fields are {}", quote(name), names(&FIELDS)))
    }

    /// Returns the term `self = value`, or what is wrong with the value.
    fn term(self, value: String) -> Result<Term, String> {
        match self {
            Field::Status => one_of("status", &STATUSES, Status::as_str_name, &value).map(Term::Status),
            Field::Priority => one_of("priority", &PRIORITIES, Priority::as_str_name, &value).map(Term::Priority),
            Field::Assignee if value.is_empty() => Ok(Term::Assignee(UserRef::None)),
            Field::Assignee => user("assignee", value).map(Term::Assignee),
            Field::AssigneeId => id("assignee_id", &value).map(UserRef::Id).map(Term::Assignee),
            Field::Reporter => user("reporter", value).map(Term::Reporter),
            Field::ReporterId => id("reporter_id", &value).map(UserRef::Id).map(Term::Reporter),
            Field::Label if is_blank(&value) => {
                Err(format!("label needs a name or a UUID, not {}", quote(&quoted(&value))))
            }
            Field::Label => Ok(Term::Label(uuid(&value).map_or_else(|| LabelRef::Name(value), LabelRef::Id))),
            Field::LabelId => id("label_id", &value).map(LabelRef::Id).map(Term::Label),
        }
    }
}

/// Returns the choice whose short name or full name in the proto equals `value`, ignoring case.
fn one_of<E: Copy>(
    field: &str,
    choices: &[(&'static str, E)],
    full_name: fn(&E) -> &'static str,
    value: &str,
) -> Result<E, String> {
    let is_value = |name: &str| name.eq_ignore_ascii_case(value);
    let choice = choices.iter().find(|(name, choice)| is_value(name) || is_value(full_name(choice)));
    choice
        .map(|&(_, choice)| choice)
        .ok_or_else(|| format!("unknown {field} {}; the values are {}", quote(value), names(choices)))
}

fn names<T>(choices: &[(&'static str, T)]) -> String {
    choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn user(field: &str, value: String) -> Result<UserRef, String> {
    if is_blank(&value) {
        let value = quote(&quoted(&value));
        return Err(format!(
            "{field} needs a username or a UUID, not {value}; assignee = \"\" finds unassigned issues"
        ));
    }
    Ok(uuid(&value).map_or_else(|| UserRef::Username(value), UserRef::Id))
}

fn id(field: &str, value: &str) -> Result<Uuid, String> {
    uuid(value).ok_or_else(|| format!("{field} needs a UUID, not {}", quote(&quoted(value))))
}

/// Parses only the form with hyphens: 32 hexadecimal digits without hyphens may be a name.
fn uuid(value: &str) -> Option<Uuid> {
    const HYPHENATED_BYTES: usize = 36;
    if value.len() != HYPHENATED_BYTES {
        return None;
    }
    Uuid::try_parse(value).ok()
}

fn is_blank(text: &str) -> bool {
    text.trim().is_empty()
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, term) in self.terms.iter().enumerate() {
            let joint = if index == 0 { "" } else { " AND " };
            write!(f, "{joint}{term}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Term::Status(status) => write!(f, "status = {}", name_of(&STATUSES, *status)),
            Term::Priority(priority) => write!(f, "priority = {}", name_of(&PRIORITIES, *priority)),
            Term::Assignee(user) => write!(f, "assignee = {user}"),
            Term::Reporter(user) => write!(f, "reporter = {user}"),
            Term::Label(LabelRef::Id(id)) => write!(f, "label = {id}"),
            Term::Label(LabelRef::Name(name)) => write!(f, "label = {}", word_or_phrase(name)),
            Term::Search(text) => f.write_str(&word_or_phrase(text)),
        }
    }
}

impl fmt::Display for UserRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UserRef::None => f.write_str("\"\""),
            UserRef::Id(id) => write!(f, "{id}"),
            UserRef::Username(name) => f.write_str(&word_or_phrase(name)),
        }
    }
}

fn name_of<E: PartialEq>(choices: &[(&'static str, E)], wanted: E) -> &'static str {
    choices.iter().find(|(_, choice)| *choice == wanted).map_or("UNSPECIFIED", |(name, _)| name)
}

fn word_or_phrase(text: &str) -> String {
    // A `*` is plain in a search word only; quoting it everywhere keeps one rule for both places.
    if lexer::is_word(text) && !text.contains('*') { text.to_owned() } else { quoted(text) }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
