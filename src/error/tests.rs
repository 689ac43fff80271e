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

fn assert_fits_a_header(error: Error) {
    let mut headers = http::HeaderMap::new();
    Status::from(error).add_header(&mut headers).unwrap();
    let bytes: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
    assert!(bytes < 8 * 1024, "{bytes} bytes");
}

#[test]
fn error_about_100_changed_issues_fits_in_the_trailers() {
    let ids = (0..100).map(|_| Uuid::now_v7()).collect();
    assert_fits_a_header(Error::ChangedSince { count: 1_000_000, ids });
}

#[test]
fn error_about_1000_items_fits_in_the_trailers() {
    // Twenty are described one by one, and the indices of every other are the longest.
    for indices in [(0..20).collect(), (0..1_000).step_by(2).collect::<Vec<_>>()] {
        let indices = || indices.iter();
        let missing = indices().map(|i| Resource::missing("issue", format!("ids[{i}]"), Uuid::now_v7()));
        assert_fits_a_header(Error::NotFound(missing.collect()));
        for char in ["x", "é", "漢", "😀", "\u{7f}"] {
            let name = char.repeat(255);
            let field = |i: &usize| format!("issues[{i}].external_id");
            let taken = indices().map(|i| Resource::taken("issue", "external id", field(i), &name));
            assert_fits_a_header(Error::AlreadyExists(taken.collect()));
            let message = format!("\"{}\" is not a UUID such as {}", quote(&name), Uuid::nil());
            let invalid = indices().map(|i| Violation::new(field(i), &message));
            assert_fits_a_header(Error::Invalid(invalid.collect()));
        }
    }
}
