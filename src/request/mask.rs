//! Update masks (AIP-134).

use prost_types::FieldMask;

use super::Check;
use crate::error::quote;

/// Maximum paths of an update mask. Bounds the work and the size of the error; each field once is far fewer.
pub const UPDATE_MASK_PATHS_MAX: usize = 100;

impl Check {
    /// Returns the fields to update: those of the mask, all for `*`, and without a mask those that are populated.
    pub fn mask(
        &mut self,
        mask: Option<FieldMask>,
        known: &'static [&'static str],
        is_populated: impl Fn(&str) -> bool,
    ) -> Vec<&'static str> {
        let Some(mask) = mask.filter(|mask| !mask.paths.is_empty()) else {
            return known.iter().copied().filter(|path| is_populated(path)).collect();
        };
        if mask.paths.len() > UPDATE_MASK_PATHS_MAX {
            let count = mask.paths.len();
            self.fail("update_mask", format!("has {count} paths; expected at most {UPDATE_MASK_PATHS_MAX}"));
            return Vec::new();
        }
        if mask.paths == ["*"] {
            return known.to_vec();
        }
        let mut paths = Vec::new();
        for (index, path) in mask.paths.iter().enumerate() {
            match known.iter().find(|known| *known == path) {
                Some(path) if paths.contains(path) => {}
                Some(path) => paths.push(*path),
                None => self.fail(format!("update_mask.paths[{index}]"), unknown_path(path, known)),
            }
        }
        paths
    }
}

fn unknown_path(path: &str, known: &[&str]) -> String {
    match path {
        "*" => "\"*\" stands for all fields; send it as the only path".to_owned(),
        _ => format!("unknown path \"{}\"; expected {}, or \"*\" alone", quote(path), known.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;

    fn mask(paths: impl IntoIterator<Item = &'static str>) -> Result<Vec<&'static str>> {
        let paths = paths.into_iter().map(str::to_owned).collect();
        let mut check = Check::default();
        let found = check.mask(Some(FieldMask { paths }), &["title", "status"], |_| false);
        check.done().map(|()| found)
    }

    #[test]
    fn mask_and_its_error_are_bounded() {
        assert_eq!(mask(["title"; UPDATE_MASK_PATHS_MAX]).unwrap(), ["title"]);
        let error = mask(["title"; UPDATE_MASK_PATHS_MAX + 1]).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 101 paths; expected at most 100");
        let error = mask(["x", "title"].into_iter().cycle().take(100_000)).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 100000 paths; expected at most 100");
    }

    #[test]
    fn star_beside_other_paths_is_refused_as_such() {
        for paths in [["*", "title"], ["title", "*"], ["*", "*"]] {
            let error = mask(paths).unwrap_err().to_string();
            assert!(error.contains("\"*\" stands for all fields; send it as the only path"), "{error}");
        }
    }

    #[test]
    fn unknown_path_is_refused_with_the_known_ones() {
        let error = mask(["status", "x"]).unwrap_err().to_string();
        assert_eq!(error, "update_mask.paths[1]: unknown path \"x\"; expected title, status, or \"*\" alone");
    }
}
