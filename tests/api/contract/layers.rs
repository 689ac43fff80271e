//! The dependency rules between layers, checked against the source text.

mod module_graph;

use std::{fs, path::Path};

use module_graph::ModuleGraph;

/// The modules of `src/`. Each imports only from the modules before it.
const LAYERS: [&str; 22] = [
    "pb",
    "hash",
    "limits",
    "backoff",
    "metrics",
    "fairness",
    "error",
    "tls",
    "transport",
    "batching",
    "csv",
    "filter",
    "db",
    "auth",
    "request",
    "middleware",
    "rpc",
    "postgres",
    "config",
    "server",
    "client",
    "commands",
];

/// The only file that constructs a gRPC status from a code and a message.
const STATUS_FILE: &str = "error/status.rs";

#[test]
fn no_files_import_each_other() {
    let graph = ModuleGraph::of(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")));
    assert!(graph.imports["rpc/issues.rs"].contains("db/issues/change.rs"), "imports are not resolved: {graph:?}");
    let cycles = graph.cycles();
    assert!(cycles.is_empty(), "files that import each other: {cycles:#?}");
}

#[test]
fn modules_import_only_from_the_layers_below() {
    let graph = ModuleGraph::of(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")));
    let layer = |file: &str| {
        let module = file.split(['/', '.']).next().unwrap().to_owned();
        LAYERS.iter().position(|layer| *layer == module)
    };
    for (file, imports) in graph.imports.iter().filter(|(file, _)| *file != "lib.rs") {
        let from = layer(file).unwrap_or_else(|| panic!("{file} is in no layer"));
        for import in imports {
            // What is declared in lib.rs itself has no imports.
            let Some(to) = layer(import) else { continue };
            assert!(to <= from, "{file} imports from {import}, which is in a higher layer");
        }
    }
}

/// Returns the path relative to `src/` and the text of each source file.
pub fn sources() -> Vec<(String, String)> {
    fn read(dir: &Path, files: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, files);
            } else {
                let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                files.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    fn root() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))
    }
    let mut files = Vec::new();
    read(root(), &mut files);
    files
}

fn is_db(name: &str) -> bool {
    name == "db.rs" || name.starts_with("db/")
}

#[test]
fn database_code_does_not_depend_on_tonic_or_http() {
    let (db, rest): (Vec<_>, Vec<_>) = sources().into_iter().partition(|(name, _)| is_db(name));
    assert!(db.len() > 5 && rest.iter().any(|(_, text)| text.contains("tonic")), "the source files were not found");
    for (name, text) in db {
        assert!(!text.contains("tonic") && !text.contains("http::"), "{name} names tonic or http");
    }
}

#[test]
fn only_one_file_constructs_statuses() {
    // The command line is a client: it receives statuses.
    for (name, text) in sources().into_iter().filter(|(name, _)| !name.starts_with("client/")) {
        let edge = name == STATUS_FILE || name.starts_with("middleware") || name.starts_with("rpc");
        let imports = text.split("use tonic::").skip(1).filter_map(|rest| rest.split(';').next());
        let words = imports.flat_map(|import| import.split(|char: char| !char.is_alphanumeric()));
        let knows = words.into_iter().any(|word| word == "Status") || text.contains("tonic::Status");
        assert!(edge || !knows, "{name} names tonic's Status");

        // Other files convert an error into a status; they never construct one from a code and a message.
        let known = ["from", "from_header_map", "as_str_name", "try_from", "default"];
        for constructor in text.split("Status::").skip(1).filter(|_| name != STATUS_FILE) {
            let function =
                constructor.split(|char: char| !char.is_alphanumeric() && char != '_').next().unwrap_or_default();
            let variant = function.starts_with(char::is_uppercase);
            assert!(variant || known.contains(&function), "{name} calls Status::{function}");
        }
    }
}

/// A statement lists its columns, so that a new column of a table changes no result.
#[test]
fn no_statement_returns_all_columns() {
    let mut statements = 0;
    for (name, text) in sources().into_iter().filter(|(name, _)| is_db(name)) {
        // Each statement begins with its name in a comment. `*` in a subquery is fine, as the outer query lists columns.
        let in_code = || text.split("\"-- ").skip(1).collect::<Vec<_>>();
        for statement in if name.ends_with(".sql") { vec![&*text] } else { in_code() } {
            statements += 1;
            for (at, _) in statement.match_indices("SELECT *").chain(statement.match_indices("RETURNING *")) {
                let before = &statement[..at];
                let depth = before.matches('(').count() as i64 - before.matches(')').count() as i64;
                assert!(depth > 0, "{name}: {} returns *", statement.lines().next().unwrap_or_default());
            }
        }
    }
    assert!(statements > 30, "the statements were not found");
}
