//! Parses and checks the options of an import.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    csv::{Column, Format, column_key},
    db::imports::ImportSpec,
    error::{Result, quote},
    hash::sha256,
    pb::{ImportMode, ImportOptions, OnExisting, Priority, Status},
    request::{Check, USERNAME_CHARS_MAX},
};

/// Bounds of `column_names`.
const COLUMN_NAMES_MAX: usize = 100;
const COLUMN_NAME_CHARS_MAX: usize = 255;

/// Parses the options, or fails with all of their violations.
pub(super) fn parse(caller_id: Uuid, options: ImportOptions) -> Result<ImportSpec> {
    let mut check = Check::default();
    let import_id = check.optional_uuid("options.import_id", &options.import_id);
    let mode = match check.enumeration("options.mode", options.mode) {
        ImportMode::Unspecified => ImportMode::Atomic,
        mode => mode,
    };
    let total_bytes = check.take(
        "options.total_bytes",
        u64::try_from(options.total_bytes)
            .map_err(|_| format!("{} is negative; expected 0 or more", options.total_bytes)),
    );
    let on_existing = match check.enumeration("options.on_existing", options.on_existing) {
        OnExisting::Unspecified => OnExisting::Fail,
        on_existing => on_existing,
    };
    let format = Format {
        title_optional: on_existing == OnExisting::Update,
        ignore_unknown_columns: options.ignore_unknown_columns,
        ..file_format(&mut check, &options)
    };
    let default_priority: Priority = check.enumeration("options.default_priority", options.default_priority);
    let default_assignee =
        check.text("options.default_assignee", options.default_assignee.trim().to_owned(), USERNAME_CHARS_MAX);
    check.done()?;

    let mut spec = ImportSpec {
        import_id: import_id.unwrap_or_else(Uuid::now_v7),
        caller_id,
        mode,
        validate_only: options.validate_only,
        total_bytes,
        on_existing,
        format,
        default_priority,
        default_assignee: (!default_assignee.is_empty()).then_some(default_assignee),
        create_labels: options.create_labels,
        fingerprint: [0; 32],
    };
    spec.fingerprint = fingerprint(&spec);
    Ok(spec)
}

fn file_format(check: &mut Check, options: &ImportOptions) -> Format {
    let separator = check.take("options.separator", separator(&options.separator)).unwrap_or(b',');
    // In files whose fields are separated by semicolons, spreadsheets put commas inside fields.
    let default_label_separator = if separator == b';' { b',' } else { b';' };
    let label_separator = check
        .take("options.label_separator", self::separator(&options.label_separator))
        .unwrap_or(default_label_separator);
    if label_separator == separator {
        check.fail("options.label_separator", "is the same as separator; expected another character");
    }
    let default_status = match check.enumeration("options.default_status", options.default_status) {
        Status::Unspecified => Status::Open,
        status => status,
    };
    let column_names = column_names(check, options);
    Format { separator, label_separator, column_names, default_status, ..Format::default() }
}

/// Parses a separator; empty means the default.
fn separator(text: &str) -> Result<Option<u8>, String> {
    match text.as_bytes() {
        [] => Ok(None),
        [byte] if byte.is_ascii() && !byte.is_ascii_alphanumeric() && !b"\"\r\n".contains(byte) => Ok(Some(*byte)),
        _ => Err(format!(
            "\"{}\" is not a separator; expected one ASCII character other than a quote, letter, digit or line break",
            quote(text)
        )),
    }
}

fn column_names(check: &mut Check, options: &ImportOptions) -> BTreeMap<String, Option<Column>> {
    const FIELD: &str = "options.column_names";
    let mut columns = BTreeMap::new();
    if options.column_names.len() > COLUMN_NAMES_MAX {
        check.fail(FIELD, format!("has {} names; at most {COLUMN_NAMES_MAX} are allowed", options.column_names.len()));
        return columns;
    }
    // Sorted, so that the same options always fail with the same violations.
    let mapped: BTreeMap<&String, &String> = options.column_names.iter().collect();
    for (name, column_name) in mapped {
        let column = Column::from_name(column_name.trim());
        let key = column_key(name);
        let violation = if key.is_empty() {
            Some("has an empty name; expected the name of a column of the file".to_owned())
        } else if name.chars().count() > COLUMN_NAME_CHARS_MAX {
            Some(format!("\"{}\" is too long; at most {COLUMN_NAME_CHARS_MAX} characters are allowed", quote(name)))
        } else if column.is_none() && !column_name.trim().is_empty() {
            let known = Column::ALL.map(Column::name).join(", ");
            Some(format!("\"{}\" is not a column; expected {known}, or empty to ignore", quote(column_name)))
        } else if columns.contains_key(&key) {
            Some(format!("\"{}\" is mapped twice; expected each name once", quote(name)))
        } else if column.is_some() && columns.values().any(|other| *other == column) {
            Some(format!("two names are mapped to \"{}\"; expected at most one", quote(column_name)))
        } else {
            None
        };
        match violation {
            Some(violation) => check.fail(FIELD, violation),
            None => drop(columns.insert(key, column)),
        }
    }
    columns
}

/// Returns the SHA-256 of every option that must be the same when an import is sent again.
fn fingerprint(spec: &ImportSpec) -> [u8; 32] {
    let ImportSpec { mode, on_existing, format, default_priority, default_assignee, create_labels, .. } = spec;
    let numbers = [
        *mode as u8,
        *on_existing as u8,
        format.separator,
        format.label_separator,
        format.default_status as u8,
        *default_priority as u8,
        u8::from(format.ignore_unknown_columns),
        u8::from(*create_labels),
    ];
    let assignee = default_assignee.as_deref().unwrap_or_default().to_lowercase();
    let mut parts = vec![&numbers[..], assignee.as_bytes()];
    for (name, column) in &format.column_names {
        parts.extend([name.as_bytes(), column.map_or("", Column::name).as_bytes()]);
    }
    sha256(&parts)
}
