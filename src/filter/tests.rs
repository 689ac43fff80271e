use proptest::{prelude::*, string::string_regex};

use super::*;

const ID: &str = "0198c0de-0000-7000-8000-00000000abcd";

fn terms(text: &str) -> Vec<Term> {
    parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}")).terms
}

fn search(text: &str) -> Term {
    Term::Search(text.into())
}

fn label(name: &str) -> Term {
    Term::Label(LabelRef::Name(name.into()))
}

fn assignee(name: &str) -> Term {
    Term::Assignee(UserRef::Username(name.into()))
}

fn id() -> Uuid {
    Uuid::try_parse(ID).unwrap()
}

/// Asserts that `text` is refused at `position`, with all of `parts` in the message.
#[track_caller]
fn refused(text: &str, position: usize, parts: &[&str]) {
    let error = parse(text).expect_err(text);
    assert_eq!(error.position, position, "{text:?}: {error}");
    let prefix = format!("at character {}: ", position + 1);
    assert!(error.message.starts_with(&prefix), "{text:?}: {error}");
    for part in parts {
        assert!(error.message.contains(part), "{text:?}: {part:?} is not in {error}");
    }
}

#[test]
fn empty_or_blank_filter_has_no_terms() {
    assert_eq!(parse(""), Ok(Filter::default()));
    assert_eq!(parse(" \t\r\n\u{a0}"), Ok(Filter::default()));
}

#[test]
fn terms_are_joined_by_and_or_by_whitespace() {
    let expected = vec![Term::Status(Status::Open), label("ui"), search("crash")];
    assert_eq!(terms("status = OPEN AND label = ui AND crash"), expected);
    assert_eq!(terms("status = OPEN label = ui crash"), expected);
    assert_eq!(terms("status=OPEN\nlabel  =\tui   AND crash"), expected);
}

#[test]
fn status_ignores_case_and_accepts_its_full_name() {
    for text in ["status=OPEN", "status = open", "status = Status_Open", "status = \"OPEN\""] {
        assert_eq!(terms(text), [Term::Status(Status::Open)], "{text}");
    }
    assert_eq!(terms("status = in_progress"), [Term::Status(Status::InProgress)]);
    assert_eq!(terms("status = STATUS_CLOSED"), [Term::Status(Status::Closed)]);
    for value in ["done", "STATUS_UNSPECIFIED", "STATUS_", "1", "\"\""] {
        let values = "the values are OPEN, IN_PROGRESS, CLOSED";
        refused(&format!("status = {value}"), 9, &["unknown status", values]);
    }
    refused("status = done", 9, &["`done`"]);
}

#[test]
fn priority_ignores_case_and_includes_none() {
    for (name, priority) in [
        ("LOW", Priority::Low),
        ("medium", Priority::Medium),
        ("High", Priority::High),
        ("PRIORITY_CRITICAL", Priority::Critical),
        ("none", Priority::Unspecified),
        ("PRIORITY_UNSPECIFIED", Priority::Unspecified),
    ] {
        assert_eq!(terms(&format!("priority = {name}")), [Term::Priority(priority)]);
    }
    let values = "the values are NONE, LOW, MEDIUM, HIGH, CRITICAL";
    refused("priority = urgent", 11, &["unknown priority `urgent`", values]);
}

#[test]
fn users_are_names_or_uuids() {
    assert_eq!(terms("assignee = alice"), [assignee("alice")]);
    assert_eq!(terms("assignee = me@example.com"), [assignee("me@example.com")]);
    assert_eq!(terms("assignee = 'Alice B.'"), [assignee("Alice B.")]);
    let reporter = Term::Reporter(UserRef::Username("bob".into()));
    assert_eq!(terms("reporter = bob"), [reporter]);
    for field in ["assignee", "assignee_id"] {
        let expected = [Term::Assignee(UserRef::Id(id()))];
        assert_eq!(terms(&format!("{field} = {ID}")), expected);
        assert_eq!(terms(&format!("{field} = '{}'", ID.to_uppercase())), expected);
    }
    for field in ["reporter", "reporter_id"] {
        assert_eq!(terms(&format!("{field} = {ID}")), [Term::Reporter(UserRef::Id(id()))]);
    }
    refused("assignee_id = alice", 14, &["assignee_id needs a UUID", "alice"]);
    refused("assignee_id = ''", 14, &["assignee_id needs a UUID"]);
    refused("reporter_id = bob", 14, &["reporter_id needs a UUID", "bob"]);
}

#[test]
fn uuid_needs_hyphens() {
    let simple = ID.replace('-', "");
    assert_eq!(terms(&format!("assignee = {simple}")), [assignee(&simple)]);
    assert_eq!(terms(&format!("label = {{{ID}}}")), [label(&format!("{{{ID}}}"))]);
}

#[test]
fn empty_assignee_is_unassigned_and_no_other_value_may_be_blank() {
    assert_eq!(terms("assignee = \"\""), [Term::Assignee(UserRef::None)]);
    assert_eq!(terms("assignee=''"), [Term::Assignee(UserRef::None)]);
    refused("assignee = \" \"", 11, &["assignee needs a username", "unassigned"]);
    refused("reporter = \"\"", 11, &["reporter needs a username", "unassigned"]);
    refused("label = \"\"", 8, &["label needs a name"]);
    refused("label = '\t'", 8, &["label needs a name"]);
    refused("a \"\"", 2, &["blank phrase"]);
    refused("''", 0, &["blank phrase"]);
    refused("\"  \"", 0, &["blank phrase"]);
}

#[test]
fn several_labels_are_names_or_uuids() {
    let both = [label("bug"), label("needs triage")];
    assert_eq!(terms("label = bug label = \"needs triage\""), both);
    assert_eq!(terms("labels = bug AND labels = 'needs triage'"), both);
    for field in ["label", "labels", "label_id"] {
        assert_eq!(terms(&format!("{field} = {ID}")), [Term::Label(LabelRef::Id(id()))]);
    }
    refused("label_id = bug", 11, &["label_id needs a UUID", "bug"]);
}

#[test]
fn unknown_field_is_refused_with_the_known_ones() {
    refused("a title = x", 2, &["unknown field `title`", "status, priority, assignee"]);
    refused("title = ", 0, &["unknown field `title`"]);
    refused("Status = OPEN", 0, &["unknown field `Status`"]);
    refused("issue.status = OPEN", 0, &["unknown field `issue.status`"]);
    refused("\"status\" = OPEN", 0, &["quoted field name", "`status`"]);
}

#[test]
fn words_may_contain_punctuation() {
    for word in [
        "don't",
        "users'",
        "foo.bar",
        "re-open",
        "C++",
        "#42",
        "100%",
        "x_y",
        "a/b",
        "a;b",
        ";",
        "a&b",
        "a|b",
        "me@example.com",
        "日本語",
        "naïve",
        "🦀",
        r"\d+",
        "char*",
        "*",
        "[x]",
        "{y}",
        "$HOME",
        "a?b",
        "~",
        "`",
        "don’t",
    ] {
        assert_eq!(terms(word), [search(word)], "{word}");
    }
    assert_eq!(terms("#42 don't"), [search("#42"), search("don't")]);
}

#[test]
fn value_is_one_word() {
    assert_eq!(terms("assignee = alice bob"), [assignee("alice"), search("bob")]);
}

#[test]
fn field_name_without_operator_is_a_word() {
    assert_eq!(terms("status OPEN"), [search("status"), search("OPEN")]);
}

#[test]
fn phrases_accept_both_quotes_and_three_escapes() {
    assert_eq!(terms(r#""login page""#), [search("login page")]);
    assert_eq!(terms("'login page'"), [search("login page")]);
    assert_eq!(terms(r#""it's" 'a "b"'"#), [search("it's"), search("a \"b\"")]);
    assert_eq!(terms(r#""\"\'\\" '\"\'\\'"#), [search(r#""'\"#), search(r#""'\"#)]);
    assert_eq!(terms("\"a\nb\""), [search("a\nb")]);
    assert_eq!(terms(r#""(a) = b, c: -d! <e>""#), [search("(a) = b, c: -d! <e>")]);
    refused(r#""a\nb""#, 2, &[r"unknown escape `\n`"]);
    refused(r#"'\*'"#, 1, &[r"unknown escape `\*`"]);
}

#[test]
fn quotes_must_be_closed_and_followed_by_a_separator() {
    refused("\"unclosed", 0, &["this \" is not closed", "`\"unclosed`"]);
    refused("a '", 2, &["this ' is not closed"]);
    refused("'", 0, &["this ' is not closed"]);
    refused(r#""a\"#, 0, &["is not closed"]);
    refused(r#""a\""#, 0, &["is not closed"]);
    refused("'; DROP TABLE issues; --", 0, &["this ' is not closed", "DROP TABLE"]);
    refused("'don''t'", 5, &["a space is missing", r"\'"]);
    refused("\"a\"b", 3, &["a space is missing"]);
    refused("a \"b\"\"c\"", 5, &["a space is missing"]);
    refused("foo\"bar baz\"", 3, &["no \" inside", "foo"]);
    refused("label = “needs triage”", 8, &["curly quotes"]);
}

#[test]
fn keywords_are_unquoted_capitals() {
    let words = [search("and"), search("Or"), search("not"), search("ANDROID"), search("NOTE")];
    assert_eq!(terms("and Or not ANDROID NOTE"), words);
    assert_eq!(terms("\"AND\" 'OR' \"NOT\""), [search("AND"), search("OR"), search("NOT")]);
    assert_eq!(terms("label = \"OR\""), [label("OR")]);
}

#[test]
fn and_needs_a_term_on_both_sides() {
    refused("a AND", 2, &["AND needs a term after it"]);
    refused("AND a", 0, &["AND needs a term before it"]);
    refused("AND", 0, &["AND needs a term before it"]);
    refused("a AND AND b", 6, &["AND needs a term before it"]);
}

#[test]
fn equals_needs_a_field_and_a_value() {
    refused("= OPEN", 0, &["`=` needs a field before it"]);
    refused("=", 0, &["`=` needs a field before it"]);
    refused("status = ", 9, &["expected a value after `=`", "the end"]);
    refused("status =", 8, &["expected a value after `=`", "the end"]);
    refused("status = AND a", 9, &["expected a value after `=`, found AND"]);
    refused("status = = OPEN", 9, &["expected a value after `=`, found another `=`"]);
    refused("status = OPEN = x", 14, &["`=` needs a field before it"]);
}

#[test]
fn unsupported_syntax_is_named_in_the_error() {
    refused("status = OPEN OR status = CLOSED", 14, &["OR is not supported"]);
    refused("OR", 0, &["OR is not supported"]);
    refused("a AND OR b", 6, &["OR is not supported"]);
    refused("label = OR", 8, &["OR is not supported", "in quotes"]);
    refused("NOT crash", 0, &["NOT is not supported"]);
    refused("NOT(crash)", 0, &["NOT is not supported"]);
    refused("-crash", 0, &["`-` before a term (not) is not supported"]);
    refused("a - b", 2, &["`-`"]);
    refused("a --", 2, &["`-`"]);
    refused("label = -x", 8, &["`-`"]);
    refused("a && b", 2, &["`&&` is not supported, write AND"]);
    refused("a || b", 2, &["`||` (OR) is not supported"]);
    refused("(status = OPEN)", 0, &["parentheses are not supported"]);
    refused("a )", 2, &["parentheses are not supported"]);
    refused("status IN (OPEN)", 10, &["parentheses are not supported"]);
    refused("status = (OPEN)", 9, &["parentheses are not supported"]);
    refused("a regex(title, 'x')", 2, &["functions are not supported", "`regex(`"]);
    refused("status = f()", 9, &["functions are not supported", "`f(`"]);
    refused("label = bug*", 8, &["wildcards (`*`) are not supported", "`bug*`"]);
    assert_eq!(terms("label = 'bug*'"), [label("bug*")]);
}

#[test]
fn unsupported_operators_are_named_in_the_error() {
    for operator in ["==", "!=", "<", "<=", ">", ">=", "<>", ":"] {
        let named = format!("`{operator}` is not supported");
        refused(&format!("priority {operator} LOW"), 9, &[&named]);
        refused(&format!("priority{operator}LOW"), 8, &[&named]);
    }
    refused("status: open", 6, &["`:` is not supported", "`=`"]);
    refused("status = OPEN,CLOSED", 13, &["`,` is not supported", "one value"]);
    refused("wow!", 3, &["`!` is not supported", "in quotes"]);
    refused("!crash", 0, &["`!` is not supported"]);
    refused("http://example.com", 4, &["`:` is not supported", "in quotes"]);
    refused("priority => LOW", 10, &["`>` is not supported"]);
}

#[test]
fn leftmost_error_is_returned() {
    refused("status = done OR \"unclosed", 9, &["unknown status"]);
    refused("OR \"unclosed", 0, &["OR is not supported"]);
    refused("title = \"unclosed", 0, &["unknown field"]);
}

#[test]
fn positions_count_characters_not_bytes() {
    refused("日本語 🦀 OR x", 6, &["OR is not supported"]);
}

#[test]
fn quoted_parts_are_shortened_and_on_one_line() {
    let word = "é".repeat(41);
    let shown = format!("`{}…`", "é".repeat(39));
    refused(&format!("{word} = x"), 0, &[&shown]);
    let word = "é".repeat(40);
    refused(&format!("{word} = x"), 0, &[&format!("`{word}`")]);
    refused("status = 'a\nb'", 9, &["`a\u{fffd}b`"]);
    refused("status = 'a\u{2028}b'", 9, &["`a\u{fffd}b`"]);
    refused("\u{202e}sutats = OPEN", 0, &["`\u{fffd}sutats`"]);
    refused("'\\\u{202e}'", 1, &["`\\\u{fffd}`"]);
}

#[test]
fn long_filters_many_terms_and_nul_are_refused() {
    let longest = "é".repeat(FILTER_CHARS_MAX);
    assert_eq!(terms(&longest), [search(&longest)]);
    refused(&format!("{longest}é"), FILTER_CHARS_MAX, &["longer than 2000 characters"]);
    let most = "a ".repeat(FILTER_TERMS_MAX);
    assert_eq!(terms(&most).len(), FILTER_TERMS_MAX);
    refused(&format!("{most}b"), most.len(), &["more than 32 terms"]);
    refused(&format!("{most}AND b"), most.len() + 4, &["more than 32 terms"]);
    let most_labels = "label = a ".repeat(FILTER_LABELS_MAX);
    assert_eq!(terms(&most_labels).len(), FILTER_LABELS_MAX);
    refused(&format!("{most_labels}label = b"), most_labels.len(), &["more than 8 terms with labels"]);
    refused("a \"b\0\"", 4, &["NUL"]);
}

#[test]
fn canonical_text_quotes_where_necessary() {
    for (text, canonical) in [
        ("", ""),
        ("status=open crash", "status = OPEN AND crash"),
        ("priority=priority_unspecified", "priority = NONE"),
        ("assignee='' reporter='bob'", "assignee = \"\" AND reporter = bob"),
        ("labels='needs triage'", "label = \"needs triage\""),
        (r#"'a "b" \\ \'c\''"#, r#""a \"b\" \\ 'c'""#),
        ("\"OR\" '-x' '&&' 'f(' 'x*'", r#""OR" AND "-x" AND "&&" AND "f(" AND "x*""#),
        ("\"don't\" \"C++\"", "don't AND C++"),
    ] {
        let printed = parse(text).unwrap().to_string();
        assert_eq!(printed, canonical);
        assert_eq!(parse(&printed), parse(text));
    }
}

/// Generates text from the characters with a meaning and from any others.
fn text() -> impl Strategy<Value = String> {
    let special = r#"[ab \t\n"'\\()=<>!:,.*&|“’;-]{1,8}"#;
    // As plain strings, the strategies would parse these expressions for every text.
    let [special, printable, keyword] =
        [special, "\\PC{1,8}", "AND|OR|NOT|&&|\\|\\|"].map(|expression| string_regex(expression).unwrap());
    let texts = prop_oneof![special, printable, keyword, any::<String>()];
    texts.prop_filter("blank, has a NUL or is too long", |text| {
        !is_blank(text) && !text.contains('\0') && text.chars().count() <= 40
    })
}

fn term() -> impl Strategy<Value = Term> {
    let id = || any::<u128>().prop_map(Uuid::from_u128);
    let user = || prop_oneof![id().prop_map(UserRef::Id), text().prop_map(UserRef::Username)];
    prop_oneof![
        prop::sample::select(STATUSES.map(|(_, status)| status).to_vec()).prop_map(Term::Status),
        prop::sample::select(PRIORITIES.map(|(_, it)| it).to_vec()).prop_map(Term::Priority),
        Just(Term::Assignee(UserRef::None)),
        user().prop_map(Term::Assignee),
        user().prop_map(Term::Reporter),
        id().prop_map(|id| Term::Label(LabelRef::Id(id))),
        text().prop_map(|name| Term::Label(LabelRef::Name(name))),
        text().prop_map(Term::Search),
    ]
}

/// Generates text that resembles a filter, which the parser accepts further than arbitrary text.
fn nearly_a_filter() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "status", "priority", "assignee", "labels", "label_id", "OPEN", "none", "AND", "OR", "NOT", "=", "==", "\"\"",
        "'a b'", "\"", "'", "\\", "-", "(", ")", ",", "x", "é", "*", ID,
    ]);
    let space = prop::sample::select(vec!["", " "]);
    let part = (prop_oneof![4 => known.prop_map(str::to_owned), 1 => text()], space);
    let part = part.prop_map(|(part, space)| part + space);
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

/// Checks that text is a filter that survives printing, or is refused at a position in it.
fn holds_for(text: &str) -> Result<(), TestCaseError> {
    match parse(text) {
        Ok(filter) => {
            prop_assert!(filter.terms.len() <= FILTER_TERMS_MAX);
            let printed = filter.to_string();
            if printed.chars().count() <= FILTER_CHARS_MAX {
                prop_assert_eq!(parse(&printed), Ok(filter));
            }
        }
        Err(error) => {
            prop_assert!(error.position <= text.chars().count());
            let prefix = format!("at character {}: ", error.position + 1);
            prop_assert!(error.message.starts_with(&prefix));
            prop_assert!(!error.message.contains(char::is_control));
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn arbitrary_text_is_a_filter_or_refused_at_a_position(text in any::<String>()) {
        holds_for(&text)?;
    }

    #[test]
    fn long_text_is_a_filter_or_refused_at_a_position(text in "(?s:.{1900,2100})") {
        holds_for(&text)?;
    }

    #[test]
    fn filter_like_text_is_a_filter_or_refused_at_a_position(text in nearly_a_filter()) {
        holds_for(&text)?;
    }

    #[test]
    fn printed_filter_parses_to_the_same_filter(
        terms in prop::collection::vec(term(), 0..=16),
    ) {
        let mut labels = 0..FILTER_LABELS_MAX;
        let terms = terms.into_iter().filter(|term| !matches!(term, Term::Label(_)) || labels.next().is_some());
        let filter = Filter { terms: terms.collect() };
        prop_assert_eq!(parse(&filter.to_string()), Ok(filter));
    }
}
