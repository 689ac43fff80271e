//! Labels, and which issues carry them.
//!
//! A label that is being deleted counts as missing, except that its name is taken: see `deletion`.

mod deletion;

use std::collections::HashSet;

use tokio_postgres::Row;
use uuid::Uuid;

pub use self::deletion::{delete, resume_deletion};
use super::{
    conn::{Conn, Params},
    page::{Page, PageBounds},
};
use crate::{
    error::{Error, Resource, Result, StaleVersion},
    limits::LABELS_PER_ISSUE_MAX,
    pb::Label,
};

/// Returns the label in a row with `id`, `name` and `description`.
pub(super) fn from_row(row: &Row) -> Label {
    Label { id: row.get::<_, Uuid>("id").to_string(), name: row.get("name"), description: row.get("description") }
}

/// Creates a label. `AlreadyExists` names `label.name`. The transaction must end with [`check_count`].
pub async fn create(db: &Conn, name: &str, description: &str) -> Result<Label> {
    const SQL: &str = "-- create_label
        INSERT INTO labels (id, name, description) VALUES ($1, $2, $3) RETURNING id, name, description";
    let row = db.query_one(SQL, &[&Uuid::now_v7(), &name, &description]).await;
    row.map(|row| from_row(&row)).map_err(|error| name_taken(error, name))
}

const COUNT_LABELS: &str = "-- count_labels
    SELECT count(*) AS label_count FROM (SELECT FROM labels LIMIT $1) AS counted";

/// Fails with `QuotaExceeded` if there are more than `labels_max` labels, with those of this transaction. Transactions that
/// check concurrently wait until this one has ended: call it last before the commit.
pub async fn check_count(db: &Conn, labels_max: i64) -> Result<()> {
    const LOCK: &str = "-- lock_label_count\nSELECT pg_advisory_xact_lock(hashtextextended('label count', 0))";
    let counted_max = labels_max + 1;
    // Pipelined: the second statement takes its snapshot when the first one has the lock.
    db.prepare(&[LOCK, COUNT_LABELS]).await?;
    let count_params: Params = &[&counted_max];
    let (locked, counted) = tokio::join!(biased; db.execute(LOCK, &[]), db.query_one(COUNT_LABELS, count_params));
    locked?;
    check_counted(counted?.get("label_count"), labels_max)
}

/// As [`check_count`], without waiting: labels of other transactions in progress are not counted.
pub async fn check_visible_count(db: &Conn, labels_max: i64) -> Result<()> {
    check_counted(db.query_one(COUNT_LABELS, &[&(labels_max + 1)]).await?.get("label_count"), labels_max)
}

fn check_counted(label_count: i64, labels_max: i64) -> Result<()> {
    if label_count <= labels_max {
        return Ok(());
    }
    Err(Error::QuotaExceeded {
        reason: "LABELS_EXCEEDED",
        message: format!("label: there would be more than {labels_max} labels; delete labels that are not used"),
        metadata: vec![("labels_max", labels_max)],
    })
}

fn name_taken(error: Error, name: &str) -> Error {
    error.on_constraint("labels_name_key", || Error::already_exists("label", "name", "label.name", name))
}

/// Returns a page of labels by name, after the label named `after`.
pub async fn list(db: &Conn, after: Option<&str>, limit: i64, bounds: PageBounds) -> Result<Page<Label>> {
    const SQL: &str = "-- list_labels
        SELECT id, name, description FROM labels
        WHERE delete_actor_id IS NULL AND ($1::text IS NULL OR lower(name) > lower($1)) ORDER BY lower(name) LIMIT $2";
    db.query_page(SQL, &[&after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Changes the given values. `NotFound` names `label.id`, `AlreadyExists` `label.name`.
pub async fn update(db: &Conn, id: Uuid, name: Option<&str>, description: Option<&str>) -> Result<Label> {
    const SQL: &str = "-- update_label
        UPDATE labels SET name = coalesce($2, name), description = coalesce($3, description)
        WHERE id = $1 AND delete_actor_id IS NULL
        RETURNING id, name, description";
    let row = db.query_opt(SQL, &[&id, &name, &description]).await;
    let row = row.map_err(|error| name_taken(error, name.unwrap_or_default()))?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("label", "label.id", id))
}

/// What [`change_issue_labels`] does with the given labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Add,
    Remove,
    /// The issue carries exactly these labels afterwards.
    Replace,
}

/// Changes the labels of an issue. Its version grows by one if its labels change.
///
/// Takes more than one statement: call it in a transaction.
pub async fn change_issue_labels(
    db: &Conn,
    actor_id: Uuid,
    issue_id: Uuid,
    expected_version: i64,
    change: LabelChange,
    label_ids: &[Uuid],
) -> Result<()> {
    const LOCK_LABELS: &str = "-- lock_labels
        SELECT id FROM labels WHERE id = ANY($1) AND delete_actor_id IS NULL ORDER BY id FOR KEY SHARE";
    const LOCK_ISSUE: &str = "-- lock_issue
        SELECT version, delete_time IS NOT NULL AS is_deleted FROM issues WHERE id = $1 FOR NO KEY UPDATE";
    // A statement of its own, after the lock: a statement that waits for a lock reads other rows as they were before.
    const CARRIED_LABELS: &str = "-- carried_labels\nSELECT label_id FROM issue_labels WHERE issue_id = $1";
    const WRITE_LABELS: &str = "-- write_issue_labels
        WITH removed AS (
            DELETE FROM issue_labels WHERE issue_id = /* issue_id */ $1 AND label_id = ANY(/* removed */ $3)
        ), added AS (
            INSERT INTO issue_labels (issue_id, label_id) SELECT /* issue_id */ $1, unnest(/* added */ $4::uuid[])
        ), changed AS (
            UPDATE issues SET change_actor_id = /* actor_id */ $2 WHERE id = /* issue_id */ $1 RETURNING id, version
        ), label_changes (removed_label_id, added_label_id) AS (
            SELECT unnest(/* removed */ $3::uuid[]), NULL
            UNION ALL SELECT NULL, unnest(/* added */ $4::uuid[])
        )
        SELECT insert_label_events(/* actor_id */ $2, array_agg(id), array_agg(version),
            array_agg(removed_label_id), array_agg(added_label_id))
        FROM changed CROSS JOIN label_changes";

    // Labels are locked before issues, as in the deletion of a label: the other order could deadlock with it.
    db.prepare(&[LOCK_LABELS, LOCK_ISSUE, CARRIED_LABELS]).await?;
    let (issue_params, label_params): (Params, Params) = (&[&issue_id], &[&label_ids]);
    let (known, issue, carried) = tokio::join!(
        biased;
        db.query(LOCK_LABELS, label_params),
        db.query_opt(LOCK_ISSUE, issue_params),
        db.query(CARRIED_LABELS, issue_params)
    );
    // The first error is the reason for those that follow.
    let known: HashSet<Uuid> = known?.iter().map(|row| row.get("id")).collect();
    let issue = issue?.ok_or_else(|| Error::not_found("issue", "issue_id", issue_id))?;
    check_issue(issue_id, issue.get("version"), issue.get("is_deleted"), expected_version)?;
    let missing: Vec<Resource> = (label_ids.iter().enumerate())
        .filter(|(_, id)| !known.contains(id))
        .map(|(index, id)| Resource::missing("label", format!("label_ids[{index}]"), id))
        .collect();
    if !missing.is_empty() {
        return Err(Error::NotFound(missing));
    }

    let carried: HashSet<Uuid> = carried?.iter().map(|row| row.get("label_id")).collect();
    let (added, removed) = difference(change, &carried, &known);
    let labels = carried.len() + added.len() - removed.len();
    if labels > LABELS_PER_ISSUE_MAX {
        return Err(Error::precondition(
            "TOO_MANY_LABELS",
            "label_ids",
            format!("the issue would carry {labels} labels; at most {LABELS_PER_ISSUE_MAX} are allowed"),
        ));
    }
    if !added.is_empty() || !removed.is_empty() {
        db.execute(WRITE_LABELS, &[&issue_id, &actor_id, &removed, &added]).await?;
    }
    Ok(())
}

/// Returns the labels to add to an issue and those to remove from it.
fn difference(change: LabelChange, carried: &HashSet<Uuid>, given: &HashSet<Uuid>) -> (Vec<Uuid>, Vec<Uuid>) {
    let new = || given.difference(carried).copied().collect();
    match change {
        LabelChange::Add => (new(), Vec::new()),
        LabelChange::Remove => (Vec::new(), carried.intersection(given).copied().collect()),
        LabelChange::Replace => (new(), carried.difference(given).copied().collect()),
    }
}

fn check_issue(issue_id: Uuid, version: i64, deleted: bool, expected_version: i64) -> Result<()> {
    if expected_version != 0 && expected_version != version {
        let stale =
            StaleVersion { field: "issue_id".into(), id: issue_id, expected: expected_version, current: version };
        return Err(Error::VersionMismatch(vec![stale]));
    }
    if deleted {
        return Err(Error::precondition("ISSUE_STATE", "issue_id", format!("issue \"{issue_id}\" is deleted")));
    }
    Ok(())
}
