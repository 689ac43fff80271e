use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use issue_tracker::request::{Check, PAGE_ROWS_MAX, PageRequest, UPDATE_MASK_PATHS_MAX};
use prost_types::FieldMask;
use uuid::Uuid;

use super::errors::{ok_or_valid_error, run_check};

/// The list to which the tokens of these checks are bound.
const BOUND_TO: &[&[u8]] = &[b"seeds", b"status = OPEN"];
/// Longer than any key of a list, which is at most a name of 50 characters.
const KEY_BYTES_MAX: usize = 256;

/// An issued token decodes to its key, in its own list only. Any other text is rejected or equals an issued token.
///
/// The first byte is a position in the token and the second byte replaces the byte there. The rest is used as a token
/// and as a key.
pub fn page_token(data: &[u8]) {
    let Some((&[place, other], rest)) = data.split_first_chunk() else { return };
    if let Ok(token) = std::str::from_utf8(rest) {
        assert_issued_or_rejected(token);
    }
    let key = &rest[..rest.len().min(KEY_BYTES_MAX)];
    if !key.is_empty() {
        assert_key_decodes_back(key);
        assert_altered_token_differs(key, place.into(), other);
        assert_bound_to_list(key, place.into());
    }
    if let Some(bytes) = rest.first_chunk() {
        assert_rows_are_bounded(i32::from_le_bytes(*bytes));
    }
}

fn page_of(token: &str) -> Option<PageRequest> {
    run_check(|check| check.page(0, token, BOUND_TO))
}

fn token_of(key: &[u8]) -> String {
    let page = page_of("").expect("the first page needs no token");
    assert_eq!(page.next_token(false, Some(key)), "");
    assert_eq!(page.next_token(true, None), "");
    page.next_token(true, Some(key))
}

fn assert_issued_or_rejected(token: &str) {
    let Some(page) = page_of(token) else { return };
    let id = ok_or_valid_error(page.after_id()).flatten().map(|id| id.as_bytes().to_vec());
    let name = ok_or_valid_error(page.after_name()).flatten().map(|name| name.as_bytes().to_vec());
    let position = ok_or_valid_error(page.after_position()).map(|position| position.to_be_bytes().to_vec());
    if token.is_empty() {
        assert_eq!((id, name, position), (None, None, Some(vec![0; 4])));
        return;
    }
    for key in [id, name, position].into_iter().flatten() {
        assert_eq!(page.next_token(true, Some(&key)), token, "one key has one token");
    }
}

/// A token decodes to its key, whichever of the three types the key has.
fn assert_key_decodes_back(key: &[u8]) {
    let page = page_of(&token_of(key)).expect("an issued token is accepted");
    assert_eq!(ok_or_valid_error(page.after_id()).flatten(), Uuid::from_slice(key).ok());
    let name = std::str::from_utf8(key).ok().filter(|name| !name.contains('\0'));
    assert_eq!(ok_or_valid_error(page.after_name()).flatten(), name);
    let position = <[u8; 4]>::try_from(key).ok().map(i32::from_be_bytes);
    assert_eq!(ok_or_valid_error(page.after_position()), position);
}

/// A token with a changed byte outside the key is rejected.
fn assert_altered_token_differs(key: &[u8], place: usize, other: u8) {
    let token = token_of(key);
    let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(&token).expect("a token is base64");
    let before_key = bytes.len() - key.len();
    let place = place % bytes.len();
    if bytes[place] != other {
        bytes[place] = other;
        let altered = BASE64_URL_SAFE_NO_PAD.encode(bytes);
        assert_eq!(page_of(&altered).is_some(), place >= before_key, "{token} altered to {altered}");
        assert_issued_or_rejected(&altered);
    }
    // A changed character of the encoded text is rejected outside the key. The encoding of the last character is
    // canonical.
    let mut text = token.clone().into_bytes();
    let place = place % text.len();
    text[place] = other;
    match std::str::from_utf8(&text) {
        Ok(altered) if altered != token => {
            let refused = page_of(altered).is_none();
            assert!(refused || (place + 1) * 6 > before_key * 8, "{token} altered to {altered}");
            assert_issued_or_rejected(altered);
        }
        _ => {}
    }
    for (begin, end) in [(0, token.len() - 1), (1, token.len())] {
        assert_issued_or_rejected(&token[begin..end]);
    }
    for longer in [format!("{token}="), format!("{token}A"), format!(" {token}"), format!("{token}\n")] {
        assert_issued_or_rejected(&longer);
    }
}

/// A token is valid in one list only: the parts that identify a list are not concatenated.
fn assert_bound_to_list(key: &[u8], place: usize) {
    let (left, right) = key.split_at(place % (key.len() + 1));
    let token_for = |bound_to: &[&[u8]]| {
        let page = run_check(|check| check.page(1, "", bound_to)).expect("the first page needs no token");
        page.next_token(true, Some(key))
    };
    let lists: [&[&[u8]]; 4] = [&[left, right], &[key], &[left, right, b""], &[b"", left, right]];
    let nth = place % lists.len();
    let token = token_for(lists[nth]);
    for (other, list) in lists.iter().enumerate() {
        let page = run_check(|check| check.page(1, &token, list));
        assert_eq!(page.is_some(), nth == other, "{list:?} with a token of {:?}", lists[nth]);
    }
}

fn assert_rows_are_bounded(page_size: i32) {
    match run_check(|check| check.page(page_size, "", BOUND_TO)) {
        Some(page) => {
            let rows_max = page.bounds().rows_max;
            assert!(page_size >= 0 && (1..=PAGE_ROWS_MAX).contains(&rows_max));
            assert_eq!(page.limit(), rows_max as i64 + 1);
        }
        None => assert!(page_size < 0),
    }
}

const KNOWN: &[&str] = &["title", "description", "status", "priority", "assignee_id", "label_ids"];

/// A mask is read as its known paths, each once and in order. Unknown paths are reported in the error.
///
/// The bits of the first byte select the populated known paths. The rest is the paths, one per line.
pub fn update_mask(data: &[u8]) {
    let Some((populated, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let paths: Vec<String> = text.lines().map(str::to_owned).collect();
    let is_populated =
        |path: &str| KNOWN.iter().position(|known| *known == path).is_some_and(|nth| populated >> nth & 1 == 1);
    let read = |paths: Vec<String>| run_check(|check| check.mask(Some(FieldMask { paths }), KNOWN, is_populated));

    let found = read(paths.clone());
    let all_known = paths.iter().all(|path| KNOWN.contains(&&**path));
    if paths.is_empty() {
        let populated: Vec<&str> = KNOWN.iter().copied().filter(|path| is_populated(path)).collect();
        assert_eq!(found.as_ref(), Some(&populated));
        assert_eq!(run_check(|check| check.mask(None, KNOWN, is_populated)), Some(populated));
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

/// The error names at least the first unknown path.
fn assert_unknown_are_named(paths: &[String]) {
    let mut check = Check::default();
    check.mask(Some(FieldMask { paths: paths.to_vec() }), KNOWN, |_| false);
    let error = check.done().expect_err("there are unknown paths").to_string();
    if let Some(first) = paths.iter().position(|path| !KNOWN.contains(&&**path)) {
        assert!(error.contains(&format!("update_mask.paths[{first}]: ")), "{error}");
    }
}
