//! Update masks.

use prost_types::FieldMask;

use super::{Check, UPDATE_MASK_PATHS_MAX};
use crate::error::quote;

impl Check {
    /// The paths of a mask, `*` standing for all; without a mask those that are populated.
    pub fn mask(
        &mut self,
        mask: Option<FieldMask>,
        known: &'static [&'static str],
        populated: impl Fn(&str) -> bool,
    ) -> Vec<&'static str> {
        let Some(mask) = mask.filter(|mask| !mask.paths.is_empty()) else {
            return known.iter().copied().filter(|path| populated(path)).collect();
        };
        // Also bounds what is said of the unknown ones.
        if mask.paths.len() > UPDATE_MASK_PATHS_MAX {
            let count = mask.paths.len();
            self.fail("update_mask", format!("has {count} paths, at most {UPDATE_MASK_PATHS_MAX} are read"));
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
                None => self.fail(
                    format!("update_mask.paths[{index}]"),
                    format!("\"{}\" cannot be updated; known are {}, and * for all", quote(path), known.join(", ")),
                ),
            }
        }
        paths
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
    fn a_mask_is_bounded_and_so_is_what_is_said_of_it() {
        assert_eq!(mask(["title"; UPDATE_MASK_PATHS_MAX]).unwrap(), ["title"]);
        let error = mask(["title"; UPDATE_MASK_PATHS_MAX + 1]).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 101 paths, at most 100 are read");
        let error = mask(["x", "title"].into_iter().cycle().take(100_000)).unwrap_err().to_string();
        assert_eq!(error, "update_mask: has 100000 paths, at most 100 are read");
    }
}
