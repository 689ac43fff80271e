//! The lexer: characters to tokens. Unsupported syntax of AIP-160 is a token with the message that refuses it, so that it
//! is never parsed as a word.

use super::error::{FilterError, quote as quoted};

pub(super) struct Token {
    pub kind: Kind,
    /// The position of the token in characters, from 0.
    pub start: usize,
}

#[derive(Debug, PartialEq)]
pub(super) enum Kind {
    Word(String),
    /// The text of a quoted phrase, unescaped.
    Phrase(String),
    And,
    Equals,
    /// Syntax of AIP-160 or of a similar language that is not supported, with the reason.
    Unsupported(String),
    End,
}

/// Operators that start with another operator come before it.
const OPERATORS: [&str; 11] = ["==", "!=", "<=", ">=", "<>", "=", "<", ">", "!", ":", ","];

pub(super) struct Lexer<'a> {
    characters: &'a [char],
    /// The position of the next character, at most the number of characters.
    at: usize,
}

impl<'a> Lexer<'a> {
    pub fn new(characters: &'a [char]) -> Self {
        Lexer { characters, at: 0 }
    }

    /// Returns the next token. At the end, always `End`.
    pub fn token(&mut self) -> Result<Token, FilterError> {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
        let start = self.at;
        let kind = match self.peek() {
            None => Kind::End,
            Some(quote @ ('"' | '\'')) => self.phrase(quote)?,
            Some('“' | '”' | '„' | '‘') => {
                let what = "curly quotes are not supported, only \" and '";
                let what = format!("{what}: {}", self.quote_from(start));
                return Err(FilterError::new(start, what));
            }
            Some('(' | ')') => {
                self.at += 1;
                Kind::Unsupported("parentheses are not supported; put text with parentheses in quotes".into())
            }
            Some('-') => {
                self.at += 1;
                let what = "`-` before a term (not) is not supported";
                Kind::Unsupported(format!("{what}; put text that begins with it in quotes"))
            }
            Some(_) => match self.operator() {
                Some(operator) => operator_kind(operator),
                None => self.word()?,
            },
        };
        Ok(Token { kind, start })
    }

    fn peek(&self) -> Option<char> {
        self.characters.get(self.at).copied()
    }

    fn operator(&mut self) -> Option<&'static str> {
        let rest = &self.characters[self.at..];
        let stands_here = |operator: &&str| {
            let length = operator.len(); // They are ASCII.
            rest.len() >= length && operator.chars().eq(rest[..length].iter().copied())
        };
        let operator = OPERATORS.into_iter().find(stands_here)?;
        self.at += operator.len();
        Some(operator)
    }

    /// Reads a word, a keyword, or the name of a function with its parenthesis.
    fn word(&mut self) -> Result<Kind, FilterError> {
        let start = self.at;
        while self.peek().is_some_and(is_word_character) {
            self.at += 1;
        }
        let text: String = self.characters[start..self.at].iter().collect();
        if self.peek() == Some('"') {
            let what = "a word has no \" inside; put a space before it, or all of it in quotes";
            let what = format!("{what}: {}", self.quote_from(start));
            return Err(FilterError::new(self.at, what));
        }
        Ok(match keyword(&text) {
            Some(kind) => kind,
            None if self.peek() == Some('(') => {
                self.at += 1;
                let call = quoted(&format!("{text}("));
                Kind::Unsupported(format!("functions are not supported; put text with parentheses in quotes: {call}"))
            }
            None => Kind::Word(text),
        })
    }

    /// Reads a phrase, from its opening quote to its closing one.
    fn phrase(&mut self, quote: char) -> Result<Kind, FilterError> {
        let start = self.at;
        let mut text = String::new();
        self.at += 1;
        loop {
            let character = self.peek().ok_or_else(|| self.unclosed(quote, start))?;
            self.at += 1;
            match character {
                '\\' => match self.peek().ok_or_else(|| self.unclosed(quote, start))? {
                    escaped @ ('"' | '\'' | '\\') => {
                        self.at += 1;
                        text.push(escaped);
                    }
                    other => {
                        let escape = quoted(&format!("\\{other}"));
                        let known = r#"in quotes only \", \' and \\ are escapes"#;
                        let what = format!("unknown escape {escape}; {known}");
                        return Err(FilterError::new(self.at - 1, what));
                    }
                },
                closing if closing == quote => break,
                other => text.push(other),
            }
        }
        match self.peek() {
            Some(next) if is_word_character(next) || next == '"' => {
                let what = format!("a space is missing after the closing {quote}");
                let inside = format!("inside, a quote is written \\{quote}");
                let what = format!("{what}, or {inside}: {}", self.quote_from(start));
                Err(FilterError::new(self.at, what))
            }
            _ => Ok(Kind::Phrase(text)),
        }
    }

    fn unclosed(&self, quote: char, start: usize) -> FilterError {
        let what = format!("this {quote} is not closed by another {quote}");
        FilterError::new(start, format!("{what}: {}", self.quote_from(start)))
    }

    /// Quotes the rest of the filter, shortened.
    fn quote_from(&self, start: usize) -> String {
        quoted(&self.characters[start..].iter().collect::<String>())
    }
}

/// Returns whether `text` is one word and needs no quotes.
pub(super) fn is_word(text: &str) -> bool {
    let characters: Vec<char> = text.chars().collect();
    let mut lexer = Lexer::new(&characters);
    lexer.token().is_ok_and(|token| token.kind == Kind::Word(text.to_owned()))
}

/// Returns whether a word can contain the character. `'`, `-` and curly quotes cannot start one.
fn is_word_character(c: char) -> bool {
    !c.is_whitespace() && !matches!(c, '(' | ')' | ',' | '=' | '<' | '>' | '!' | ':' | '"')
}

fn keyword(text: &str) -> Option<Kind> {
    let unsupported = match text {
        "AND" => return Some(Kind::And),
        "OR" => "OR is not supported, only AND; in quotes it is text",
        "NOT" => "NOT is not supported; in quotes it is text",
        "&&" => "`&&` is not supported, write AND; in quotes it is text",
        "||" => "`||` (OR) is not supported; in quotes it is text",
        _ => return None,
    };
    Some(Kind::Unsupported(unsupported.into()))
}

fn operator_kind(operator: &str) -> Kind {
    let instead = match operator {
        "=" => return Kind::Equals,
        "," => "a field has one value, and terms are joined by AND",
        _ => "fields are compared with `=`",
    };
    let text = format!("put text with `{operator}` in quotes");
    Kind::Unsupported(format!("`{operator}` is not supported: {instead}; {text}"))
}
