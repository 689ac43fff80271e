//! Values and lists in error messages: short, printable, and small enough for headers.

use std::fmt;

/// How much of a value an error message quotes.
const QUOTE_CHARS_MAX: usize = 80;
const QUOTE_HEADER_BYTES_MAX: usize = 240;
/// How many items of a batch an error describes individually, and the maximum length of their text. Errors are sent in
/// headers, which most clients limit to 8 KiB; a larger one closes the whole connection.
const ALL_NAMED: NamedBounds = NamedBounds { items_max: 20, header_bytes_max: 2 * 1024 };
/// The same if there are more items: `ErrorInfo.metadata` has the indices of all.
const FIRST_NAMED: NamedBounds = NamedBounds { items_max: 10, header_bytes_max: 1024 };

struct NamedBounds {
    items_max: usize,
    header_bytes_max: usize,
}

/// Returns a value as error messages quote it: shortened, with invisible characters escaped.
pub fn quote(value: &str) -> String {
    let mut quoted = String::new();
    let mut bytes = 0;
    for (index, char) in value.chars().enumerate() {
        let shown = if is_invisible(char) { char.escape_default().to_string() } else { char.to_string() };
        bytes += header_bytes(&shown);
        if index == QUOTE_CHARS_MAX || bytes > QUOTE_HEADER_BYTES_MAX {
            quoted.push('…');
            break;
        }
        quoted.push_str(&shown);
    }
    quoted
}

/// Returns whether a character is a control character or an invisible format character: zero-width characters, changes of
/// direction, line separators and tags. They make different values look the same, or a message unreadable.
pub fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{AD}'
                | '\u{61C}'
                | '\u{180E}'
                | '\u{200B}'..='\u{200F}'
                | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{206F}'
                | '\u{FEFF}'
                | '\u{FFF9}'..='\u{FFFB}'
                | '\u{E0000}'..='\u{E007F}'
        )
}

/// Returns the maximum length of the text in a header, where characters outside printable ASCII, and some inside, are
/// percent-encoded.
fn header_bytes(text: &str) -> usize {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.,:;/[]()=".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { 1 } else { 3 }).sum()
}

/// Returns the items that an error describes individually: all, or at least the first.
pub(super) fn named<T: fmt::Display>(items: &[T]) -> &[T] {
    let fitting = |bounds: NamedBounds| {
        let mut bytes = 0;
        let fits = |item: &&T| {
            bytes += header_bytes(&item.to_string());
            bytes <= bounds.header_bytes_max
        };
        items.iter().take(bounds.items_max).take_while(fits).count()
    };
    match fitting(ALL_NAMED) {
        count if count == items.len() => items,
        _ => &items[..fitting(FIRST_NAMED).max(1)],
    }
}

pub(super) fn join(items: &[impl fmt::Display]) -> String {
    let named = named(items);
    let mut text = named.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    if items.len() > named.len() {
        text += &format!("; and {} more", items.len() - named.len());
    }
    text
}

/// Returns the indices in fields such as `ids[3]` as ranges: `0-4,7`.
pub(super) fn indices(fields: &[&str]) -> String {
    let mut indices: Vec<usize> =
        fields.iter().filter_map(|field| field.split_once('[')?.1.split_once(']')?.0.parse().ok()).collect();
    indices.sort_unstable();
    indices.dedup();
    indices
        .chunk_by(|left, right| left + 1 == *right)
        .filter_map(|run| match run {
            [] => None,
            [only] => Some(only.to_string()),
            [first, .., last] => Some(format!("{first}-{last}")),
        })
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_ranges_of_the_numbers_in_brackets() {
        let fields = ["ids[3]", "ids[0]", "ids[1]", "issues[7].title", "issues[7].assignee_id", "ids[2]", "filter"];
        assert_eq!(indices(&fields), "0-3,7");
    }

    #[test]
    fn quoted_values_are_short_and_printable() {
        assert_eq!(quote("a\0b\nc"), "a\\u{0}b\\nc");
        assert_eq!(quote("\u{202E}a\u{2028}b\u{61C}\u{E0041}"), "\\u{202e}a\\u{2028}b\\u{61c}\\u{e0041}");
        assert_eq!(quote(&"e".repeat(100)), format!("{}…", "e".repeat(80)));
        assert_eq!(quote(&"é".repeat(100)), format!("{}…", "é".repeat(40)));
    }
}
