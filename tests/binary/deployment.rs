//! Tests what the files in `deploy/` rely on.

use std::collections::BTreeSet;

use super::*;

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy");

/// Returns the name and the text of each file below a directory.
fn files(dir: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push((path.display().to_string(), fs::read_to_string(&path).unwrap())),
        }
    }
    found
}

/// Returns the words of a text that begin with `prefix` and consist of these characters.
fn words<'a>(text: &'a str, prefix: &str, is_part: fn(char) -> bool) -> BTreeSet<&'a str> {
    text.match_indices(prefix)
        .map(|(at, _)| &text[at..])
        .map(|word| &word[..word.find(|letter| !is_part(letter)).unwrap_or(word.len())])
        .collect()
}

#[test]
fn deployment_files_set_only_variables_that_exist() {
    let variables = |text| words(text, "ISSUE_TRACKER_", |letter| letter.is_ascii_uppercase() || letter == '_');
    let help: Vec<String> = ["serve", "migrate", "health", "import"]
        .map(|command| String::from_utf8(run(&[command, "--help"]).stdout).unwrap())
        .into();
    let known: BTreeSet<&str> = help.iter().flat_map(|help| variables(help)).collect();
    let files = files(Path::new(DEPLOY));
    let mut set_count = 0;
    for (name, text) in &files {
        let set = variables(text);
        let unknown: Vec<_> = set.difference(&known).collect();
        assert!(unknown.is_empty(), "{name}: no such variables: {unknown:?}");
        set_count += set.len();
    }
    assert!(set_count > 0, "{DEPLOY} sets no variables");
}

#[test]
fn deployment_files_name_this_version() {
    const BEFORE_VERSION: [&str; 4] =
        ["issue-tracker:", "issue-tracker-migrate-", "app.kubernetes.io/version: ", "image.version=\""];
    let is_part = |letter: char| letter.is_ascii_alphanumeric() || ".-:/_=\" ".contains(letter);
    let files = files(Path::new(DEPLOY));
    for prefix in BEFORE_VERSION {
        let mut count = 0;
        for (name, text) in &files {
            for word in words(text, prefix, is_part) {
                let rest = &word[prefix.len()..];
                let version = &rest[..rest
                    .find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '.')
                    .unwrap_or(rest.len())];
                // The key of a YAML mapping has no version.
                if !version.is_empty() {
                    assert_eq!(version, env!("CARGO_PKG_VERSION"), "{name}: {word}");
                    count += 1;
                }
            }
        }
        assert!(count > 0, "no version after {prefix:?}");
    }
}

/// Returns the exit code and the output of a health check of a name.
fn health(address: &str, name: &str) -> (Option<i32>, String) {
    let output = run(&["health", "--listen", address, "--service", name]);
    (output.status.code(), text(&output.stdout).to_owned())
}

#[test]
fn liveness_is_serving_without_a_database_and_readiness_is_not() {
    let dir = Dir::new();
    let service = Service::start(&dir, program(&["--database-url", "postgresql://127.0.0.1:1/absent"]));

    assert_eq!(health(&service.address, "issuetracker.liveness"), (Some(0), "SERVING\n".to_owned()));
    for name in ["", "issuetracker.reads", "issuetracker.writes"] {
        assert_eq!(health(&service.address, name), (Some(1), "NOT_SERVING\n".to_owned()), "{name}");
    }
}
