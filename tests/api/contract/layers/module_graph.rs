//! The imports between the files of `src/`.
//!
//! Reads `use` declarations and paths in code, outside of tests. A name that a file re-exports belongs to the file that
//! declares it, so a module file that only lists and re-exports its children depends on none of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// The path of a module from the crate's root: `["db", "issues"]`.
type Module = Vec<String>;

struct File {
    module: Module,
    /// The code without comments, strings and tests.
    code: String,
    /// Names that the file imports or re-exports, each with its path.
    names: BTreeMap<String, Vec<String>>,
    /// The paths that the file depends on.
    paths: Vec<Vec<String>>,
}

/// The files of `src/`, each with the files that it imports from.
#[derive(Debug)]
pub struct ModuleGraph {
    /// By path from `src/`, such as `db/issues.rs`.
    pub imports: BTreeMap<String, BTreeSet<String>>,
}

impl ModuleGraph {
    pub fn of(src: &Path) -> Self {
        let mut files = BTreeMap::new();
        read_dir(src, src, &mut files);
        let by_module: BTreeMap<Module, String> =
            files.iter().map(|(name, file): (&String, &File)| (file.module.clone(), name.clone())).collect();
        let imports = files.iter().map(|(name, file)| {
            let imported = file.paths.iter().filter_map(|path| owner(&files, &by_module, path, 0));
            (name.clone(), imported.filter(|imported| imported != name).collect())
        });
        Self { imports: imports.collect() }
    }

    /// Returns the groups of files that import each other, directly or not.
    pub fn cycles(&self) -> Vec<BTreeSet<String>> {
        let reachable: BTreeMap<&String, BTreeSet<&String>> =
            self.imports.keys().map(|file| (file, self.reachable(file))).collect();
        let mut cycles = BTreeSet::new();
        for file in self.imports.keys() {
            let cycle: BTreeSet<String> = reachable[file]
                .iter()
                .filter(|other| reachable[**other].contains(file))
                .map(|f| (*f).clone())
                .collect();
            if !cycle.is_empty() {
                cycles.insert(cycle);
            }
        }
        cycles.into_iter().collect()
    }

    fn reachable<'a>(&'a self, from: &'a String) -> BTreeSet<&'a String> {
        let mut found = BTreeSet::new();
        let mut pending: Vec<&String> = self.imports[from].iter().collect();
        while let Some(file) = pending.pop() {
            if found.insert(file) {
                pending.extend(&self.imports[file]);
            }
        }
        found
    }
}

fn read_dir(src: &Path, dir: &Path, files: &mut BTreeMap<String, File>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_dir(src, &path, files);
            continue;
        }
        let name = path.strip_prefix(src).unwrap().to_str().unwrap().to_owned();
        let Some(module) = name.strip_suffix(".rs") else { continue };
        if module == "main" || module.ends_with("/tests") || module.contains("/tests/") {
            continue;
        }
        let module = if module == "lib" { Vec::new() } else { module.split('/').map(str::to_owned).collect() };
        files.insert(name, parse(module, &fs::read_to_string(&path).unwrap()));
    }
}

fn parse(module: Module, text: &str) -> File {
    let code = strip(text);
    let code = code.split("#[cfg(test)]\nmod tests").next().unwrap().to_owned();
    let mut file = File { module, code: String::new(), names: BTreeMap::new(), paths: Vec::new() };
    let mut body = String::new();
    let mut rest = &*code;
    while let Some((before, declaration, after)) = next_use(rest) {
        body.push_str(before);
        let is_public = declaration.starts_with("pub");
        let tree = declaration.split_once("use ").unwrap().1;
        for path in flatten(tree) {
            let (path, alias) = match path.split_once(" as ") {
                Some((path, alias)) => (path.trim().to_owned(), alias.trim().to_owned()),
                None => (path.clone(), path.rsplit("::").next().unwrap().to_owned()),
            };
            let Some(path) = absolute(&file.module, &path) else { continue };
            if !is_public {
                file.paths.push(path.clone());
            }
            file.names.insert(alias, path);
        }
        rest = after;
    }
    body.push_str(rest);
    for path in inline_paths(&file.module, &body) {
        file.paths.push(path);
    }
    file.code = body;
    file
}

/// Removes comments and the contents of strings.
fn strip(text: &str) -> String {
    let mut code = String::new();
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '/' if chars.peek() == Some(&'/') => {
                chars.by_ref().find(|char| *char == '\n');
                code.push('\n');
            }
            '"' => {
                while let Some(char) = chars.next() {
                    match char {
                        '\\' => drop(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
                code.push_str("\"\"");
            }
            // A quote or a backslash as a character literal.
            '\'' if matches!(chars.peek(), Some('"' | '\\')) => {
                let escaped = chars.next() == Some('\\');
                if escaped {
                    chars.next();
                }
            }
            char => code.push(char),
        }
    }
    code
}

/// Returns the code before the next `use` declaration, the declaration without its semicolon, and the code after it.
fn next_use(code: &str) -> Option<(&str, &str, &str)> {
    let mut from = 0;
    loop {
        let at = from + code[from..].find("use ")?;
        let line_start = code[..at].rfind('\n').map_or(0, |newline| newline + 1);
        let before = code[line_start..at].trim();
        if before.is_empty() || before == "pub" || (before.starts_with("pub(") && before.ends_with(')')) {
            let end = at + code[at..].find(';')?;
            return Some((&code[..line_start], code[line_start..end].trim(), &code[end + 1..]));
        }
        from = at + 4;
    }
}

/// Returns the paths of a `use` tree.
fn flatten(tree: &str) -> Vec<String> {
    let tree = tree.trim();
    let Some((prefix, rest)) = tree.split_once('{') else { return vec![tree.to_owned()] };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let (mut depth, mut item, mut items) = (0, String::new(), Vec::new());
    for char in inner.chars().chain([',']) {
        match char {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                if !item.trim().is_empty() {
                    items.push(std::mem::take(&mut item));
                }
                item.clear();
                continue;
            }
            _ => {}
        }
        item.push(char);
    }
    let path = |item: String| match item.as_str() {
        "self" => prefix.trim_end_matches("::").to_owned(),
        _ => format!("{prefix}{item}"),
    };
    items.iter().flat_map(|item| flatten(item)).map(path).collect()
}

/// Returns a path from the crate's root, or `None` for a path into another crate.
fn absolute(module: &[String], path: &str) -> Option<Vec<String>> {
    let mut segments = path.split("::").map(|segment| segment.trim().to_owned());
    let mut absolute = match segments.next()?.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len().checked_sub(1)?].to_vec(),
        // A child module, if there is one: other crates have no file.
        name => [module, &[name.to_owned()]].concat(),
    };
    for segment in segments {
        match segment.as_str() {
            "super" => drop(absolute.pop()),
            _ => absolute.push(segment),
        }
    }
    Some(absolute)
}

/// Returns the paths in code that start with `crate::`, `super::`, `self::` or the name of a child module.
fn inline_paths(module: &[String], code: &str) -> Vec<Vec<String>> {
    let is_path = |char: char| char.is_alphanumeric() || char == '_' || char == ':';
    let children: BTreeSet<&str> = code
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';')?.rsplit_once("mod ").map(|(_, child)| child.trim()))
        .collect();
    let words = code.split(|char: char| !is_path(char));
    let paths = words.filter(|word| word.contains("::")).filter(|word| {
        let first = word.split("::").next().unwrap();
        ["crate", "super", "self"].contains(&first) || children.contains(first)
    });
    paths.filter_map(|path| absolute(module, path.trim_end_matches(':'))).collect()
}

/// Returns the file that declares what a path names, or `None` for a path into another crate.
fn owner(
    files: &BTreeMap<String, File>,
    by_module: &BTreeMap<Module, String>,
    path: &[String],
    depth: usize,
) -> Option<String> {
    let modules = (0..=path.len()).rev().find(|length| by_module.contains_key(&path[..*length]))?;
    let name = &by_module[&path[..modules]];
    let Some(item) = path.get(modules) else { return Some(name.clone()) };
    let file = &files[name];
    match file.names.get(item).filter(|_| depth < 8) {
        Some(target) => {
            let target = [&target[..], &path[modules + 1..]].concat();
            owner(files, by_module, &target, depth + 1).or_else(|| Some(name.clone()))
        }
        None if modules > 0 || file.code.contains(&format!(" {item}")) => Some(name.clone()),
        None => None,
    }
}
