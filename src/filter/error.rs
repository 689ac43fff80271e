//! Errors of the filter language.

use std::fmt;

use crate::error::is_invisible;

/// Maximum characters of the filter that an error quotes.
const QUOTE_CHARS_MAX: usize = 40;

/// Why a text is not a filter. The message is written for the caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct FilterError {
    /// The position of the error in characters, from 0. At the end of the text, its length.
    pub position: usize,
    /// Starts with the position, from 1: `at character 7: `.
    pub message: String,
}

impl FilterError {
    pub(super) fn new(position: usize, what: impl fmt::Display) -> Self {
        let message = format!("at character {}: {what}", position + 1);
        FilterError { position, message }
    }
}

/// Quotes a part of the filter in backticks, shortened, with invisible characters replaced.
pub(super) fn quote(text: &str) -> String {
    let visible = |c: char| {
        if is_invisible(c) { char::REPLACEMENT_CHARACTER } else { c }
    };
    let mut shown: String = text.chars().map(visible).take(QUOTE_CHARS_MAX).collect();
    if text.chars().nth(QUOTE_CHARS_MAX).is_some() {
        shown.pop();
        shown.push('…');
    }
    format!("`{shown}`")
}
