//! Labels, and which issues carry them.

use std::collections::HashSet;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Conn, Page, PageBounds, Params};
use crate::{
    error::{Error, Resource, Result, StaleVersion},
    pb::Label,
    request::LABELS_PER_ISSUE_MAX,
};

fn from_row(row: &Row) -> Label {
    Label { id: row.get::<_, Uuid>(0).to_string(), name: row.get(1), description: row.get(2) }
}

pub async fn create(db: &Conn, name: &str, description: &str) -> Result<Label> {
    const SQL: &str = "-- create_label
        INSERT INTO labels (id, name, description) VALUES ($1, $2, $3) RETURNING id, name, description";
    let row = db.query_one(SQL, &[&Uuid::now_v7(), &name, &description]).await;
    row.map(|row| from_row(&row)).map_err(|error| name_taken(error, name))
}

fn name_taken(error: Error, name: &str) -> Error {
    error.on_constraint("labels_name_key", || Error::already_exists("label", "name", "label.name", name))
}

/// By name, behind the label named `after`.
pub async fn list(db: &Conn, after: Option<&str>, limit: i64, bounds: PageBounds) -> Result<Page<Label>> {
    const SQL: &str = "-- list_labels
        SELECT id, name, description FROM labels
        WHERE $1::text IS NULL OR lower(name) > lower($1) ORDER BY lower(name) LIMIT $2";
    db.query_page(SQL, &[&after, &limit], bounds, |row| Ok(from_row(row)), prost::Message::encoded_len).await
}

/// Sets what is given.
pub async fn update(db: &Conn, id: Uuid, name: Option<&str>, description: Option<&str>) -> Result<Label> {
    const SQL: &str = "-- update_label
        UPDATE labels SET name = coalesce($2, name), description = coalesce($3, description) WHERE id = $1
        RETURNING id, name, description";
    let row = db.query_opt(SQL, &[&id, &name, &description]).await;
    let row = row.map_err(|error| name_taken(error, name.unwrap_or_default()))?;
    row.map(|row| from_row(&row)).ok_or_else(|| Error::not_found("label", "label.id", id))
}

/// Deletes a label and, if it is forced, takes it off the issues that carry it; answers how many these were.
///
/// Takes more than one statement: call it in a transaction.
pub async fn delete(db: &Conn, id: Uuid, actor_id: Uuid, force: bool) -> Result<i64> {
    // Nobody can put the label on an issue from here on.
    const LOCK: &str = "-- lock_label\nSELECT name FROM labels WHERE id = $1 FOR UPDATE";
    const COUNT: &str = "-- count_labelled\nSELECT count(*) FROM issue_labels WHERE label_id = $1";
    const LOCK_ISSUES: &str = "-- lock_labelled
        SELECT count(*) FROM (
            SELECT FROM issues WHERE id IN (SELECT issue_id FROM issue_labels WHERE label_id = $1)
            ORDER BY id FOR NO KEY UPDATE) locked";
    const TAKE_OFF: &str = "-- take_label_off
        WITH removed AS (DELETE FROM issue_labels WHERE label_id = $1 RETURNING issue_id),
        changed AS (
            UPDATE issues i SET change_actor_id = $2 FROM removed r WHERE i.id = r.issue_id RETURNING i.id, i.version
        )
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value)
        SELECT id, version, $2, 'label', $1 FROM changed";
    const DELETE: &str = "-- delete_label\nDELETE FROM labels WHERE id = $1";

    let row = db.query_opt(LOCK, &[&id]).await?;
    let name: String = row.map(|row| row.get(0)).ok_or_else(|| Error::not_found("label", "id", id))?;
    let count: i64 = db.query_one(COUNT, &[&id]).await?.get(0);
    if count > 0 {
        if !force {
            return Err(Error::precondition(
                "LABEL_IN_USE",
                "id",
                format!("{count} issues carry label \"{name}\"; set force to take it off them"),
            ));
        }
        db.query_one(LOCK_ISSUES, &[&id]).await?;
        db.execute(TAKE_OFF, &[&id, &actor_id]).await?;
    }
    db.execute(DELETE, &[&id]).await?;
    Ok(count)
}

/// What [`change_issue_labels`] does with the labels that it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LabelChange {
    Add,
    Remove,
    /// Exactly these.
    Replace,
}

/// Changes which labels an issue carries; its version grows by one if that is any change.
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
    // The labels are read by a statement of its own behind the lock: one statement would see them as they were before it
    // waited for the lock.
    const LOCK: &str = "-- lock_issue
        SELECT version, delete_time IS NOT NULL FROM issues WHERE id = $1 FOR NO KEY UPDATE";
    const KNOWN: &str = "-- known_labels_locked\nSELECT id FROM labels WHERE id = ANY($1) ORDER BY id FOR KEY SHARE";
    const CARRIED: &str = "-- carried_labels\nSELECT label_id FROM issue_labels WHERE issue_id = $1";
    const WRITE: &str = "-- write_issue_labels
        WITH removed AS (DELETE FROM issue_labels WHERE issue_id = $1 AND label_id = ANY($3)),
        added AS (INSERT INTO issue_labels (issue_id, label_id) SELECT $1, unnest($4::uuid[])),
        changed AS (UPDATE issues SET change_actor_id = $2 WHERE id = $1 RETURNING version)
        INSERT INTO issue_events (issue_id, version, actor_id, field, old_value, new_value)
        SELECT $1, version, $2, 'label', old_value, new_value
        FROM changed, (SELECT unnest($3::uuid[])::text, NULL UNION ALL SELECT NULL, unnest($4::uuid[])::text)
            AS n (old_value, new_value)";

    // Labels before issues, as a deletion of a label locks them: the other order would deadlock with it.
    db.prepare(&[KNOWN, LOCK, CARRIED]).await?;
    let (of_issue, of_labels): (Params, Params) = (&[&issue_id], &[&label_ids]);
    let (known, issue, carried) = tokio::join!(
        biased;
        db.query(KNOWN, of_labels),
        db.query_opt(LOCK, of_issue),
        db.query(CARRIED, of_issue)
    );
    // The first that fails is why the others do.
    let known: HashSet<Uuid> = known?.iter().map(|row| row.get(0)).collect();
    let issue = issue?.ok_or_else(|| Error::not_found("issue", "issue_id", issue_id))?;
    check_issue(issue_id, issue.get(0), issue.get(1), expected_version)?;
    let missing: Vec<Resource> = (label_ids.iter().enumerate())
        .filter(|(_, id)| !known.contains(id))
        .map(|(nth, id)| Resource::missing("label", format!("label_ids[{nth}]"), id))
        .collect();
    if !missing.is_empty() {
        return Err(Error::NotFound(missing));
    }

    let carried: HashSet<Uuid> = carried?.iter().map(|row| row.get(0)).collect();
    let added: Vec<Uuid> = match change {
        LabelChange::Add | LabelChange::Replace => known.difference(&carried).copied().collect(),
        LabelChange::Remove => Vec::new(),
    };
    let removed: Vec<Uuid> = match change {
        LabelChange::Add => Vec::new(),
        LabelChange::Remove => carried.intersection(&known).copied().collect(),
        LabelChange::Replace => carried.difference(&known).copied().collect(),
    };
    let labels = carried.len() + added.len() - removed.len();
    if labels > LABELS_PER_ISSUE_MAX {
        return Err(Error::precondition(
            "TOO_MANY_LABELS",
            "label_ids",
            format!("the issue would carry {labels} labels, at most {LABELS_PER_ISSUE_MAX} are allowed"),
        ));
    }
    if !added.is_empty() || !removed.is_empty() {
        db.execute(WRITE, &[&issue_id, &actor_id, &removed, &added]).await?;
    }
    Ok(())
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
