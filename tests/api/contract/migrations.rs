//! The rule that a migration only expands the schema: replicas of the previous release run on it.

use std::fs;

const MIGRATIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations");
/// The last migration of the first release, before which there are no replicas of a previous one.
const FIRST_RELEASE: u32 = 3;
/// Statements that break replicas of the previous release, if these use what they change.
const CONTRACTS: [&str; 8] = [
    "DROP TABLE",
    "DROP COLUMN",
    "DROP FUNCTION",
    "DROP DEFAULT",
    "RENAME",
    "SET DATA TYPE",
    "SET NOT NULL",
    "TRUNCATE",
];
/// What a line that contracts ends with, before the version since which nothing uses it.
const MARK: &str = "-- contract: unused since ";

/// Returns the lines of a migration that contract the schema without the mark.
fn unmarked_contractions(sql: &str) -> Vec<&str> {
    let contracts = |line: &str| {
        let statement = line.split("--").next().unwrap_or_default().to_uppercase();
        CONTRACTS.iter().any(|words| statement.contains(words))
    };
    sql.lines().filter(|line| contracts(line) && !line.contains(MARK)).collect()
}

#[test]
fn migrations_contract_only_what_is_marked_as_unused() {
    let mut checked = 0;
    for entry in fs::read_dir(MIGRATIONS).unwrap() {
        let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
        let (version, _) = name.strip_prefix('V').and_then(|name| name.split_once("__")).unwrap();
        if version.parse::<u32>().unwrap() > FIRST_RELEASE {
            let sql = fs::read_to_string(entry.unwrap().path()).unwrap();
            let found = unmarked_contractions(&sql);
            assert!(found.is_empty(), "{name}: CONTRIBUTING.md says how to contract the schema: {found:#?}");
            checked += 1;
        }
    }
    assert!(checked > 0);
}

#[test]
fn contractions_are_recognized() {
    let sql = "ALTER TABLE issues DROP COLUMN a;\nALTER TABLE issues\n    rename TO tickets; -- RENAME\n-- DROP TABLE x\n\
        DROP TABLE y; -- contract: unused since 0.3.0\n    DROP INDEX z;";
    assert_eq!(unmarked_contractions(sql), ["ALTER TABLE issues DROP COLUMN a;", "    rename TO tickets; -- RENAME"]);
}
