//! The `filter` of a list of issues: text to terms that must all hold, after AIP-160
//! (<https://google.aip.dev/160> and its EBNF).
//!
//! # The language
//!
//! A filter is a list of terms, joined by `AND` or just by whitespace, which mean the same: an issue is listed if every
//! term holds for it. An empty filter lists everything.
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
//! | `assignee = alice` | issues assigned to the user of that name or UUID; `assignee = ""`: to nobody |
//! | `reporter = alice` | issues filed by the user of that name or UUID |
//! | `label = bug` | issues with the label of that name or UUID; several such terms want all of the labels |
//! | `crash`, `"login page"` | issues whose text has the word or the phrase |
//!
//! Statuses and priorities are read in any case and under their full names too (`STATUS_OPEN`, `PRIORITY_UNSPECIFIED`).
//! `labels` is another name for `label`; `assignee_id`, `reporter_id` and `label_id` take only a UUID. A UUID is written
//! with its hyphens; a name that has the form of one is read as one. Names of fields are lower case.
//!
//! **Words.** A word runs up to whitespace or one of `( ) , = < > ! :`, which have to be quoted to be searched for. It
//! doesn't begin with `"`, `'` or `-` and has no `"` inside. Everything else stands for itself, so `don't`, `foo.bar`,
//! `re-open`, `C++`, `#42`, `100%`, `a/b`, `x_y`, `a;b`, `\d` and `me@example.com` are words. Whitespace around `=` is
//! optional. A value is one word or one phrase: `assignee = alice bob` is a field and a search for `bob`.
//!
//! **Phrases.** Whatever else is to be searched for or compared with goes between `"` and `"` or between `'` and `'`.
//! Inside, `\"`, `\'` and `\\` stand for the second character; any other character after a backslash is an error. After
//! the closing quote comes whitespace, an operator or the end. A phrase is not blank, except in `assignee = ""`.
//!
//! **Keywords.** `AND`, `OR` and `NOT` are keywords in capitals only; in lower case or in quotes they are text.
//!
//! **Not supported**, and refused rather than taken as words: `OR` and `||`, `NOT`, `-` and `!` before a term, `&&` (write
//! `AND`), parentheses, functions, the operators `!= < <= > >= : == <>`, curly quotes before a word, and `*` in a value
//! without quotes. In quotes and in search words `*` stands for itself.
//!
//! A filter has at most 2,000 characters, at most 32 terms, and no NUL character.

use std::fmt;

use uuid::Uuid;

use self::lexer::{Kind, Lexer, Token};
use crate::{
    error::is_invisible,
    pb::{Priority, Status},
};

mod lexer;
#[cfg(test)]
mod tests;

/// The longest filter that is read, in characters.
pub const FILTER_CHARS_MAX: usize = 2_000;

/// The most terms that a filter may have.
pub const FILTER_TERMS_MAX: usize = 32;

/// How much of the filter an error quotes, in characters.
const PIECE_CHARS_MAX: usize = 40;

/// What an issue has to satisfy: all of the terms. Without terms, every issue does.
///
/// `Display` writes canonical text: `parse` reads it back as an equal filter if this one came from `parse` and the text
/// stays within [`FILTER_CHARS_MAX`], which added spaces, `AND`s and escapes can push it past.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    pub terms: Vec<Term>,
}

impl Filter {
    /// Whether the text of issues has to be looked through, for which there is no index.
    pub fn searches(&self) -> bool {
        self.terms.iter().any(|term| matches!(term, Term::Search(_)))
    }
}

/// One condition on an issue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Term {
    /// Never `Unspecified` when parsed.
    Status(Status),
    /// `Unspecified` is no priority.
    Priority(Priority),
    Assignee(UserRef),
    /// Never `Nobody` when parsed.
    Reporter(UserRef),
    Label(LabelRef),
    /// A word or phrase to look for; not blank.
    Search(String),
}

/// The user that a term speaks of. Whether there is one is for the database to say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UserRef {
    Nobody,
    Id(Uuid),
    /// Not blank, and not in the form of a UUID.
    Username(String),
}

/// The label that a term speaks of. Whether there is one is for the database to say.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum LabelRef {
    Id(Uuid),
    /// Not blank, and not in the form of a UUID.
    Name(String),
}

/// Why a text is not a filter, fit to be shown to whoever wrote it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FilterError {
    /// In characters from 0; the number of characters in the text if the trouble is at its end.
    pub position: usize,
    /// Begins with the place, `at character 7: `, where the first character is 1, as people count.
    pub message: String,
}

impl FilterError {
    fn new(position: usize, what: impl fmt::Display) -> Self {
        let message = format!("at character {}: {what}", position + 1);
        FilterError { position, message }
    }
}

/// Reads a filter; the language is described at the top of this module.
///
/// The error is the first one from the left, except that too long a text and a NUL are found before anything is read.
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

/// Recursive descent, a function for a production of AIP-160. One token of lookahead, read only when it is needed, so
/// that errors come from left to right.
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
            terms.push(self.term()?);
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
                fail(format!("the name of a field is not quoted: {}", piece(&name)))
            }
            Kind::Word(text) => Ok(Term::Search(text)),
            Kind::Phrase(text) if is_blank(&text) => {
                fail(format!("a phrase to search for is not blank: {}", piece(&quoted(&text))))
            }
            Kind::Phrase(text) => Ok(Term::Search(text)),
            Kind::And => fail("AND needs a term before it".into()),
            Kind::Equals => fail("`=` needs a field before it; put text with `=` in quotes".into()),
            Kind::End => fail("expected a term, found the end of the filter".into()),
            Kind::Unsupported(what) => fail(what),
        }
    }

    /// The value of a field, and where it begins.
    fn value(&mut self) -> Result<(String, usize), FilterError> {
        let Token { kind, start } = self.take()?;
        let found = match kind {
            Kind::Word(text) if text.contains('*') => {
                let what = "wildcards (`*`) are not supported";
                format!("{what}, in quotes `*` stands for itself: {}", piece(&text))
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
            .ok_or_else(|| format!("unknown field {}; the fields are {}", piece(name), names(&FIELDS)))
    }

    /// The term `self = value`; the error says what is wrong with the value.
    fn term(self, value: String) -> Result<Term, String> {
        match self {
            Field::Status => one_of("status", &STATUSES, Status::as_str_name, &value).map(Term::Status),
            Field::Priority => one_of("priority", &PRIORITIES, Priority::as_str_name, &value).map(Term::Priority),
            Field::Assignee if value.is_empty() => Ok(Term::Assignee(UserRef::Nobody)),
            Field::Assignee => user("assignee", value).map(Term::Assignee),
            Field::AssigneeId => id("assignee_id", &value).map(UserRef::Id).map(Term::Assignee),
            Field::Reporter => user("reporter", value).map(Term::Reporter),
            Field::ReporterId => id("reporter_id", &value).map(UserRef::Id).map(Term::Reporter),
            Field::Label if is_blank(&value) => {
                Err(format!("label needs a name or a UUID, not {}", piece(&quoted(&value))))
            }
            Field::Label => Ok(Term::Label(uuid(&value).map_or_else(|| LabelRef::Name(value), LabelRef::Id))),
            Field::LabelId => id("label_id", &value).map(LabelRef::Id).map(Term::Label),
        }
    }
}

/// The choice whose short name or full name in the proto is `value`, in any case.
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
        .ok_or_else(|| format!("unknown {field} {}; the values are {}", piece(value), names(choices)))
}

fn names<T>(choices: &[(&'static str, T)]) -> String {
    choices.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

fn user(field: &str, value: String) -> Result<UserRef, String> {
    if is_blank(&value) {
        let nobody = "only assignee = \"\" has a meaning (nobody)";
        let value = piece(&quoted(&value));
        return Err(format!("{field} needs a username or a UUID, not {value}; {nobody}"));
    }
    Ok(uuid(&value).map_or_else(|| UserRef::Username(value), UserRef::Id))
}

fn id(field: &str, value: &str) -> Result<Uuid, String> {
    uuid(value).ok_or_else(|| format!("{field} needs a UUID, not {}", piece(&quoted(value))))
}

/// Only the form with hyphens: 32 hexadecimal digits in a row may be somebody's name.
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

/// Text from the filter as an error shows it: in backticks, on one line, not too long.
fn piece(text: &str) -> String {
    let visible = |c: char| {
        if is_invisible(c) { char::REPLACEMENT_CHARACTER } else { c }
    };
    let mut shown: String = text.chars().map(visible).take(PIECE_CHARS_MAX).collect();
    if text.chars().nth(PIECE_CHARS_MAX).is_some() {
        shown.pop();
        shown.push('…');
    }
    format!("`{shown}`")
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
            UserRef::Nobody => f.write_str("\"\""),
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
