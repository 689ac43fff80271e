use std::collections::BTreeSet;

use bytes::BytesMut;
use issue_tracker::{
    db::{
        PageBounds,
        issues::{IssueList, list_statement},
    },
    error::Error,
    filter::{FILTER_CHARS_MAX, FILTER_TERMS_MAX, Filter, FilterError, LabelRef, Term, UserRef, parse},
    pb::{Priority, Status},
};
use tokio_postgres::types::{ToSql, Type};
use uuid::Uuid;

use super::errors::{assert_readable, assert_valid_error};

/// Any text is either a filter that can be printed and parsed back and whose values are SQL parameters, or an error
/// with a position.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match parse(text) {
        Ok(filter) => {
            assert_terms_are_valid(&filter);
            assert_ids_are_hyphenated(text, &filter);
            assert_parses_back(&filter);
            assert_surrounding_space_is_ignored(text, &filter);
            assert_values_are_parameters(&filter);
        }
        Err(error) => assert_error_has_position(text, error),
    }
}

fn assert_error_has_position(text: &str, error: FilterError) {
    assert!(error.position <= text.chars().count(), "{error:?}");
    assert!(error.message.starts_with(&format!("at character {}: ", error.position + 1)), "{error:?}");
    assert_readable(&error.message, 300);
    assert_valid_error(Error::invalid("filter", error.message));
}

fn assert_terms_are_valid(filter: &Filter) {
    assert!(filter.terms.len() <= FILTER_TERMS_MAX);
    let assert_name = |name: &str| {
        assert!(!name.trim().is_empty() && !name.contains('\0'), "{name:?}");
        assert!(name.len() != 36 || Uuid::try_parse(name).is_err(), "{name:?} is an id");
    };
    for term in &filter.terms {
        match term {
            Term::Status(status) => assert_ne!(*status, Status::Unspecified),
            Term::Reporter(UserRef::None) => panic!("every issue has a reporter"),
            Term::Assignee(UserRef::Username(name)) | Term::Reporter(UserRef::Username(name)) => assert_name(name),
            Term::Label(LabelRef::Name(name)) => assert_name(name),
            Term::Search(text) => assert!(!text.trim().is_empty() && !text.contains('\0'), "{text:?}"),
            Term::Priority(_) | Term::Assignee(_) | Term::Reporter(_) | Term::Label(_) => {}
        }
    }
}

/// Ids are parsed only with hyphens, because other spellings may be usernames.
fn assert_ids_are_hyphenated(text: &str, filter: &Filter) {
    let text = text.to_ascii_lowercase();
    for term in &filter.terms {
        if let Term::Assignee(UserRef::Id(id)) | Term::Reporter(UserRef::Id(id)) | Term::Label(LabelRef::Id(id)) = term
        {
            assert!(text.contains(&id.to_string()), "{id} in {text:?}");
        }
    }
}

/// The printed filter parses back: with and without `AND`, and repeated.
fn assert_parses_back(filter: &Filter) {
    let terms: Vec<String> = filter.terms.iter().map(Term::to_string).collect();
    let twice = Filter { terms: [&*filter.terms, &*filter.terms].concat() };
    for (printed, expected) in [(filter.to_string(), filter), (terms.join("\n"), filter), (twice.to_string(), &twice)] {
        if printed.chars().count() <= FILTER_CHARS_MAX && expected.terms.len() <= FILTER_TERMS_MAX {
            assert_eq!(parse(&printed).as_ref(), Ok(expected), "{printed:?}");
        }
    }
}

fn assert_surrounding_space_is_ignored(text: &str, filter: &Filter) {
    if text.chars().count() + 2 <= FILTER_CHARS_MAX {
        assert_eq!(parse(&format!("\t{text}\u{3000}")).as_ref(), Ok(filter));
    }
}

/// The SQL depends only on the kinds of the terms, and the values are its parameters.
fn assert_values_are_parameters(filter: &Filter) {
    let (sql, params) = list_statement(&list(filter.clone()));
    let shape = Filter { terms: filter.terms.iter().map(with_another_value).collect() };
    assert_eq!(sql, list_statement(&list(shape)).0);
    assert!(sql.is_ascii() && !sql.contains(['\'', '"', '\\', ';']), "{sql}");
    assert_eq!(sql.matches("--").count(), 1, "{sql}");

    let numbers: BTreeSet<usize> = sql.split('$').skip(1).map(number_at_start).collect();
    assert!(numbers.into_iter().eq(1..=params.len()), "{} parameters: {sql}", params.len());

    let texts: Vec<String> = params.iter().filter_map(|param| text_of(&**param)).collect();
    let expected: Vec<String> = filter.terms.iter().filter_map(text_for).collect();
    assert_eq!(texts, expected);
}

fn list(filter: Filter) -> IssueList {
    IssueList { filter, show_deleted: false, after: None, bounds: PageBounds { rows_max: 50, bytes_max: 1024 } }
}

fn with_another_value(term: &Term) -> Term {
    let user = |user: &UserRef| match user {
        UserRef::None => UserRef::None,
        UserRef::Id(_) => UserRef::Id(Uuid::nil()),
        UserRef::Username(_) => UserRef::Username("another".to_owned()),
    };
    match term {
        // The status is a literal in the SQL.
        Term::Status(status) => Term::Status(*status),
        Term::Priority(_) => Term::Priority(Priority::Low),
        Term::Assignee(assignee) => Term::Assignee(user(assignee)),
        Term::Reporter(reporter) => Term::Reporter(user(reporter)),
        Term::Label(LabelRef::Id(_)) => Term::Label(LabelRef::Id(Uuid::nil())),
        Term::Label(LabelRef::Name(_)) => Term::Label(LabelRef::Name("another".to_owned())),
        Term::Search(_) => Term::Search("another".to_owned()),
    }
}

fn number_at_start(text: &str) -> usize {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    text[..digits].parse().expect("a parameter has a number")
}

/// Returns the value of a text parameter, or `None` if it has another type.
fn text_of(param: &(dyn ToSql + Sync)) -> Option<String> {
    let mut bytes = BytesMut::new();
    param.to_sql_checked(&Type::TEXT, &mut bytes).ok()?;
    Some(String::from_utf8(bytes.to_vec()).expect("text is UTF-8"))
}

/// Returns the expected text parameter of a term.
fn text_for(term: &Term) -> Option<String> {
    match term {
        Term::Assignee(UserRef::Username(name)) | Term::Reporter(UserRef::Username(name)) => Some(name.clone()),
        Term::Label(LabelRef::Name(name)) => Some(name.clone()),
        Term::Search(text) => {
            let plain = text.replace('\\', r"\\").replace('%', r"\%").replace('_', r"\_");
            Some(format!("%{plain}%"))
        }
        _ => None,
    }
}
