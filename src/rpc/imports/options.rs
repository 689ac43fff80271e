//! An import's options, checked before anything is read.

use std::collections::BTreeMap;

use uuid::Uuid;

use crate::{
    csv::{Column, Format, column_key},
    db::imports::ImportTask,
    error::{Result, quote},
    pb::{ImportMode, ImportOptions, OnExisting, Priority, Status},
    request::{Check, USERNAME_CHARS_MAX, sha256},
};

const COLUMN_NAMES_MAX: usize = 100;
const COLUMN_NAME_CHARS_MAX: usize = 255;

/// What the options say, or all that is wrong with them.
pub(super) fn read(caller_id: Uuid, options: ImportOptions) -> Result<ImportTask> {
    let mut check = Check::default();
    let import_id = check.optional_uuid("options.import_id", &options.import_id);
    let mode = match check.enumeration("options.mode", options.mode) {
        ImportMode::Unspecified => ImportMode::Atomic,
        mode => mode,
    };
    let total_bytes = check.take(
        "options.total_bytes",
        u64::try_from(options.total_bytes).map_err(|_| format!("must not be negative, is {}", options.total_bytes)),
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

    let mut task = ImportTask {
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
    task.fingerprint = fingerprint(&task);
    Ok(task)
}

fn file_format(check: &mut Check, options: &ImportOptions) -> Format {
    let separator = check.take("options.separator", separator(&options.separator)).unwrap_or(b',');
    // The comma and the semicolon stand in for each other, as spreadsheets have it.
    let default_label_separator = if separator == b';' { b',' } else { b';' };
    let label_separator = check
        .take("options.label_separator", self::separator(&options.label_separator))
        .unwrap_or(default_label_separator);
    if label_separator == separator {
        check.fail("options.label_separator", "must be another character than separator");
    }
    let default_status = match check.enumeration("options.default_status", options.default_status) {
        Status::Unspecified => Status::Open,
        status => status,
    };
    let column_names = column_names(check, options);
    Format { separator, label_separator, column_names, default_status, ..Format::default() }
}

/// Empty is none.
fn separator(text: &str) -> Result<Option<u8>, String> {
    match text.as_bytes() {
        [] => Ok(None),
        [byte] if byte.is_ascii() && !byte.is_ascii_alphanumeric() && !b"\"\r\n".contains(byte) => Ok(Some(*byte)),
        _ => Err(format!(
            "\"{}\" is not one ASCII character other than quotes, letters, digits and line ends",
            quote(text)
        )),
    }
}

fn column_names(check: &mut Check, options: &ImportOptions) -> BTreeMap<String, Option<Column>> {
    const FIELD: &str = "options.column_names";
    let mut columns = BTreeMap::new();
    if options.column_names.len() > COLUMN_NAMES_MAX {
        check.fail(FIELD, format!("has {} names, at most {COLUMN_NAMES_MAX} are taken", options.column_names.len()));
        return columns;
    }
    // In an order, so that the same options always get the same answer.
    let named: BTreeMap<&String, &String> = options.column_names.iter().collect();
    for (name, ours) in named {
        let column = Column::from_name(ours.trim());
        let key = column_key(name);
        let fault = if key.is_empty() {
            Some("has an empty name".to_owned())
        } else if name.chars().count() > COLUMN_NAME_CHARS_MAX {
            Some(format!("\"{}\" has more than {COLUMN_NAME_CHARS_MAX} characters", quote(name)))
        } else if column.is_none() && !ours.trim().is_empty() {
            let known = Column::ALL.map(Column::name).join(", ");
            Some(format!("\"{}\" is not a column: the columns are {known}, or empty for none", quote(ours)))
        } else if columns.contains_key(&key) {
            Some(format!("\"{}\" is named twice", quote(name)))
        } else if column.is_some() && columns.values().any(|other| *other == column) {
            Some(format!("\"{}\" is the name of two columns", quote(ours)))
        } else {
            None
        };
        match fault {
            Some(fault) => check.fail(FIELD, fault),
            None => drop(columns.insert(key, column)),
        }
    }
    columns
}

/// Over all that has to be the same when the import is sent again.
fn fingerprint(task: &ImportTask) -> [u8; 32] {
    let ImportTask { mode, on_existing, format, default_priority, default_assignee, create_labels, .. } = task;
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
