use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use issue_tracker::request::{Check, PAGE_ROWS_MAX, PageRequest, UPDATE_MASK_PATHS_MAX};
use prost_types::FieldMask;
use uuid::Uuid;

use super::errors::{checked, told};

/// What the tokens of these checks are bound to.
const BOUND_TO: &[&[u8]] = &[b"seeds", b"status = OPEN"];
/// Longer than any key of a list, which is a name of 50 characters at most.
const KEY_BYTES_MAX: usize = 256;

/// A token that was given reads back as its key, in its own list only; any other is refused, or would have been given.
///
/// The first byte is a place in the token and the second is put there; the rest is a token and, by turns, a key.
pub fn page_token(data: &[u8]) {
    let Some((&[place, other], rest)) = data.split_first_chunk() else { return };
    if let Ok(token) = std::str::from_utf8(rest) {
        assert_given_or_refused(token);
    }
    let key = &rest[..rest.len().min(KEY_BYTES_MAX)];
    if !key.is_empty() {
        assert_key_comes_back(key);
        assert_altered_is_another(key, place.into(), other);
        assert_bound(key, place.into());
    }
    if let Some(bytes) = rest.first_chunk() {
        assert_rows_are_bounded(i32::from_le_bytes(*bytes));
    }
}

fn page_of(token: &str) -> Option<PageRequest> {
    checked(|check| check.page(0, token, BOUND_TO))
}

fn token_of(key: &[u8]) -> String {
    let page = page_of("").expect("the first page needs no token");
    assert_eq!(page.next_token(false, Some(key)), "");
    assert_eq!(page.next_token(true, None), "");
    page.next_token(true, Some(key))
}

fn assert_given_or_refused(token: &str) {
    let Some(page) = page_of(token) else { return };
    let id = told(page.after_id()).flatten().map(|id| id.as_bytes().to_vec());
    let name = told(page.after_name()).flatten().map(|name| name.as_bytes().to_vec());
    let position = told(page.after_position()).map(|position| position.to_be_bytes().to_vec());
    if token.is_empty() {
        assert_eq!((id, name, position), (None, None, Some(vec![0; 4])));
        return;
    }
    for key in [id, name, position].into_iter().flatten() {
        assert_eq!(page.next_token(true, Some(&key)), token, "one key has one token");
    }
}

/// By whichever of the three ways the key is read.
fn assert_key_comes_back(key: &[u8]) {
    let page = page_of(&token_of(key)).expect("a token that was given is taken");
    assert_eq!(told(page.after_id()).flatten(), Uuid::from_slice(key).ok());
    let name = std::str::from_utf8(key).ok().filter(|name| !name.contains('\0'));
    assert_eq!(told(page.after_name()).flatten(), name);
    let position = <[u8; 4]>::try_from(key).ok().map(i32::from_be_bytes);
    assert_eq!(told(page.after_position()), position);
}

/// Nothing but the key can be another without the token being refused.
fn assert_altered_is_another(key: &[u8], place: usize, other: u8) {
    let token = token_of(key);
    let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(&token).expect("a token is base64");
    let before_key = bytes.len() - key.len();
    let place = place % bytes.len();
    if bytes[place] != other {
        bytes[place] = other;
        let altered = BASE64_URL_SAFE_NO_PAD.encode(bytes);
        assert_eq!(page_of(&altered).is_some(), place >= before_key, "{token} altered to {altered}");
        assert_given_or_refused(&altered);
    }
    // The text itself: other than in the key's characters it is refused, and the last one has but one spelling.
    let mut text = token.clone().into_bytes();
    let place = place % text.len();
    text[place] = other;
    match std::str::from_utf8(&text) {
        Ok(altered) if altered != token => {
            let refused = page_of(altered).is_none();
            assert!(refused || (place + 1) * 6 > before_key * 8, "{token} altered to {altered}");
            assert_given_or_refused(altered);
        }
        _ => {}
    }
    for (begin, end) in [(0, token.len() - 1), (1, token.len())] {
        assert_given_or_refused(&token[begin..end]);
    }
    for longer in [format!("{token}="), format!("{token}A"), format!(" {token}"), format!("{token}\n")] {
        assert_given_or_refused(&longer);
    }
}

/// A token is of one list: what that is bound to does not run together.
fn assert_bound(key: &[u8], place: usize) {
    let (left, right) = key.split_at(place % (key.len() + 1));
    let token_for = |bound_to: &[&[u8]]| {
        let page = checked(|check| check.page(1, "", bound_to)).expect("the first page needs no token");
        page.next_token(true, Some(key))
    };
    let lists: [&[&[u8]]; 4] = [&[left, right], &[key], &[left, right, b""], &[b"", left, right]];
    let nth = place % lists.len();
    let token = token_for(lists[nth]);
    for (other, list) in lists.iter().enumerate() {
        let page = checked(|check| check.page(1, &token, list));
        assert_eq!(page.is_some(), nth == other, "{list:?} with a token of {:?}", lists[nth]);
    }
}

fn assert_rows_are_bounded(page_size: i32) {
    match checked(|check| check.page(page_size, "", BOUND_TO)) {
        Some(page) => {
            let rows_max = page.bounds().rows_max;
            assert!(page_size >= 0 && (1..=PAGE_ROWS_MAX).contains(&rows_max));
            assert_eq!(page.limit(), rows_max as i64 + 1);
        }
        None => assert!(page_size < 0),
    }
}

const KNOWN: &[&str] = &["title", "description", "status", "priority", "assignee_id", "label_ids"];

/// A mask is the known paths that it names, each once and in its order, or all others are named in the error.
///
/// The bits of the first byte say which of the known are populated; the rest is the paths, a line each.
pub fn update_mask(data: &[u8]) {
    let Some((populated, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let paths: Vec<String> = text.lines().map(str::to_owned).collect();
    let is_populated =
        |path: &str| KNOWN.iter().position(|known| *known == path).is_some_and(|nth| populated >> nth & 1 == 1);
    let read = |paths: Vec<String>| checked(|check| check.mask(Some(FieldMask { paths }), KNOWN, is_populated));

    let found = read(paths.clone());
    let all_known = paths.iter().all(|path| KNOWN.contains(&&**path));
    if paths.is_empty() {
        let populated: Vec<&str> = KNOWN.iter().copied().filter(|path| is_populated(path)).collect();
        assert_eq!(found.as_ref(), Some(&populated));
        assert_eq!(checked(|check| check.mask(None, KNOWN, is_populated)), Some(populated));
    } else if paths == ["*"] {
        assert_eq!(found.as_deref(), Some(KNOWN));
    } else if paths.len() > UPDATE_MASK_PATHS_MAX {
        assert_eq!(found, None);
    } else if all_known && let Some(found) = found {
        let mut expected: Vec<&str> = Vec::new();
        for path in &paths {
            if !expected.contains(&&**path) {
                expected.push(path);
            }
        }
        assert_eq!(found, expected);
        let again: Vec<String> = found.iter().map(|path| (*path).to_owned()).collect();
        assert_eq!(read(again), Some(found));
    } else {
        assert_eq!(found, None, "{paths:?}");
        assert_unknown_are_named(&paths);
    }
}

/// The first of them, at least.
fn assert_unknown_are_named(paths: &[String]) {
    let mut check = Check::default();
    check.mask(Some(FieldMask { paths: paths.to_vec() }), KNOWN, |_| false);
    let error = check.done().expect_err("there are unknown paths").to_string();
    if let Some(first) = paths.iter().position(|path| !KNOWN.contains(&&**path)) {
        assert!(error.contains(&format!("update_mask.paths[{first}]: ")), "{error}");
    }
}
