//! `docs/errors.md` lists the reasons of all errors, and no other.

use std::collections::BTreeSet;

use super::layers::sources;

/// The modules that make errors of calls.
const MODULES: [&str; 6] = ["auth", "db", "error", "middleware", "request", "rpc"];

fn is_upper_case(text: &str) -> bool {
    text.len() > 3 && text.chars().all(|char| char.is_ascii_uppercase() || char == '_')
}

/// Returns the reasons in the source text of a file: string literals in upper case that have an underscore, or that are a
/// value of a field `reason` or of a match.
fn reasons_in(text: &str) -> impl Iterator<Item = &str> {
    let text = text.split("#[cfg(test)]").next().unwrap();
    let quotes: Vec<usize> = text.match_indices('"').map(|(at, _)| at).collect();
    // Not only every other quote: text may have quotes that are escaped, or in characters.
    quotes.into_iter().filter_map(move |at| {
        let (before, after) = (&text[..at], &text[at + 1..]);
        let literal = after.split('"').next().unwrap();
        let is_reason = before.ends_with("reason: ") || before.ends_with("=> ") || literal.contains('_');
        (is_upper_case(literal) && is_reason && !before.ends_with("env!(")).then_some(literal)
    })
}

#[test]
fn errors_md_lists_exactly_the_reasons_of_the_source() {
    let sources = sources();
    let of_calls = sources.iter().filter(|(name, _)| {
        let module = name.split(['/', '.']).next().unwrap();
        MODULES.contains(&module) && !name.ends_with("tests.rs")
    });
    let used: BTreeSet<&str> = of_calls.flat_map(|(_, text)| reasons_in(text)).collect();
    let section =
        include_str!("../../../docs/errors.md").split("\n## ").find(|text| text.starts_with("Codes and reasons"));
    let cells = section.unwrap().lines().filter_map(|row| row.split('|').nth(2)).map(str::trim);
    let listed: BTreeSet<&str> = cells.filter(|cell| is_upper_case(cell)).collect();

    for known in ["VERSION_MISMATCH", "DEADLINE", "IMPORT_TIMEOUT", "LABEL_IN_USE"] {
        assert!(used.contains(known), "{known} was not found in src/");
    }
    let undocumented: Vec<_> = used.difference(&listed).collect();
    let unused: Vec<_> = listed.difference(&used).collect();
    assert!(undocumented.is_empty() && unused.is_empty(), "undocumented: {undocumented:?}; unused: {unused:?}");
}
