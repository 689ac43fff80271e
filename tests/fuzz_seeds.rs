//! Runs the check of each fuzz target on its seeds.

use std::{fs, path::Path};

#[path = "../fuzz/src/lib.rs"]
mod checks;

type Check = fn(&[u8]);

/// The names of the files in `fuzz/fuzz_targets/`, with their checks.
const TARGETS: [(&str, Check); 6] = [
    ("filter", checks::filter),
    ("import_file", checks::import_file),
    ("import_record", checks::import_record),
    ("metadata", checks::metadata),
    ("page_token", checks::page_token),
    ("update_mask", checks::update_mask),
];

/// Returns the sorted names of the files in a folder of `fuzz/`.
fn names_in(folder: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = fs::read_dir(path).unwrap().map(name).collect();
    names.sort_unstable();
    names
}

#[test]
fn each_seed_passes_the_check_of_its_target() {
    for (target, check) in TARGETS {
        let folder = format!("seeds/{target}");
        let seeds = names_in(&folder);
        assert!(seeds.len() >= 12, "{target} has {} seeds", seeds.len());
        for seed in seeds {
            // The test harness prints this if the check fails.
            println!("{folder}/{seed}");
            check(&fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(&folder).join(&seed)).unwrap());
        }
    }
}

#[test]
fn each_target_has_seeds() {
    let targets: Vec<String> = TARGETS.iter().map(|(target, _)| (*target).to_owned()).collect();
    assert_eq!(names_in("fuzz_targets"), targets.iter().map(|target| format!("{target}.rs")).collect::<Vec<_>>());
    assert_eq!(names_in("seeds"), targets);
}
