//! Changing issues: one statement judges and applies the changes. The trigger on `issues` maintains version, times and
//! history.

use tokio_postgres::Row;
use uuid::Uuid;

use super::{get::get, row::issue_with_labels};
use crate::{
    batching::coalescer::Outcome,
    db::{
        conn::{Conn, Params},
        row_locks::RowLocks,
    },
    error::{Error, Resource, Result, StaleVersion, Violation},
    pb::{Issue, Priority, Status},
};

/// A change of one issue. Fields that are `None` stay unchanged.
#[derive(Clone, Debug, Default)]
pub struct IssueChange {
    /// The user who changes the issue.
    pub actor_id: Uuid,
    pub id: Uuid,
    /// 0: any version.
    pub expected_version: i64,
    pub title: Option<String>,
    pub description: Option<String>,
    pub status: Option<Status>,
    pub priority: Option<Priority>,
    pub assignee_id: Option<Option<Uuid>>,
    /// Empty removes the external id.
    pub external_id: Option<String>,
    /// True deletes the issue, false undeletes it. Without it, the issue must not be deleted.
    pub delete: Option<bool>,
}

/// The result of a change in [`bulk_update`].
#[derive(Clone, Copy, Debug)]
pub struct Changed {
    pub id: Uuid,
    pub version: i64,
    pub changed: bool,
}

/// Issues that are locked by another transaction are waited for.
const UPDATE_ISSUES: &str = include_str!("update_issues.sql");
/// As [`UPDATE_ISSUES`]. Issues that are locked by another transaction are `busy`.
const UPDATE_ISSUES_NOT_LOCKED: &str = include_str!("update_issues_not_locked.sql");
const BULK_UPDATE_ISSUES: &str = include_str!("bulk_update_issues.sql");

/// Runs one of the statements above. Returns a row for each change, in order.
async fn query_changes(db: &Conn, sql: &str, changes: &[IssueChange]) -> Result<Vec<Row>> {
    let actor_ids: Vec<Uuid> = changes.iter().map(|change| change.actor_id).collect();
    let ids: Vec<Uuid> = changes.iter().map(|change| change.id).collect();
    let expected_versions: Vec<i64> = changes.iter().map(|change| change.expected_version).collect();
    let titles: Vec<Option<&str>> = changes.iter().map(|change| change.title.as_deref()).collect();
    let descriptions: Vec<Option<&str>> = changes.iter().map(|change| change.description.as_deref()).collect();
    let statuses: Vec<Option<i16>> = changes.iter().map(|change| change.status.map(|status| status as i16)).collect();
    let priorities: Vec<Option<i16>> = changes.iter().map(|c| c.priority.map(|priority| priority as i16)).collect();
    let sets_assignee: Vec<bool> = changes.iter().map(|change| change.assignee_id.is_some()).collect();
    let assignee_ids: Vec<Option<Uuid>> = changes.iter().map(|change| change.assignee_id.flatten()).collect();
    let external_ids: Vec<Option<&str>> = changes.iter().map(|change| change.external_id.as_deref()).collect();
    let deletes: Vec<Option<bool>> = changes.iter().map(|change| change.delete).collect();
    let params: Params = &[
        &actor_ids,
        &ids,
        &expected_versions,
        &titles,
        &descriptions,
        &statuses,
        &priorities,
        &sets_assignee,
        &assignee_ids,
        &external_ids,
        &deletes,
    ];
    db.query(sql, params).await
}

/// Changes issues independently of each other, each at most once. Returns the outcome of each, in order. `field` names the
/// id of an issue in errors.
///
/// A missing assignee or a taken external id fails the whole statement, and is only explained if there is one change.
pub async fn update_many(
    db: &Conn,
    changes: &[IssueChange],
    field: &str,
    row_locks: RowLocks,
) -> Result<Vec<Outcome<Issue>>> {
    let sql = match row_locks {
        RowLocks::Wait => UPDATE_ISSUES,
        RowLocks::Skip => UPDATE_ISSUES_NOT_LOCKED,
    };
    let rows = query_changes(db, sql, changes).await.map_err(|error| match changes {
        [change] => explain_update(error, change),
        _ => error,
    })?;
    let mut outcomes = Vec::with_capacity(changes.len());
    for (row, change) in rows.iter().zip(changes) {
        let problem: Option<&str> = row.get("problem");
        if problem == Some("busy") && row_locks == RowLocks::Skip {
            outcomes.push(Outcome::Individual);
            continue;
        }
        let judged = check_problems([(problem, row.get("judged_version"), change, field.to_owned())]);
        outcomes.push(Outcome::Done(match judged {
            Ok(()) if row.get("was_changed_meanwhile") => reread(db, change.id, issue_with_labels(row)?).await,
            Ok(()) => issue_with_labels(row),
            Err(error) => Err(error),
        }));
    }
    Ok(outcomes)
}

/// Reads an issue again that was changed while the statement waited for its lock: the statement has read its labels as
/// they were before. The change is applied, so an error of this read is not returned.
async fn reread(db: &Conn, id: Uuid, changed: Issue) -> Result<Issue> {
    match get(db, id).await {
        Ok(read) if read.version == changed.version => Ok(read),
        _ => Ok(changed),
    }
}

fn explain_update(error: Error, change: &IssueChange) -> Error {
    let assignee = change.assignee_id.flatten().unwrap_or_default();
    let external_id = change.external_id.clone().unwrap_or_default();
    error
        .on_constraint("issues_assignee_id_fkey", || Error::not_found("user", "issue.assignee_id", assignee))
        .on_constraint("issues_external_id_key", || {
            Error::already_exists("issue", "external id", "issue.external_id", external_id)
        })
}

/// Changes issues, all or none. Returns the results in order. `field(n)` names the id of the nth issue in errors.
pub async fn bulk_update(db: &Conn, changes: &[IssueChange], field: impl Fn(usize) -> String) -> Result<Vec<Changed>> {
    let rows = query_changes(db, BULK_UPDATE_ISSUES, changes).await?;
    let judged = rows.iter().zip(changes).enumerate();
    check_problems(
        judged.map(|(index, (row, change))| (row.get("problem"), row.get("version"), change, field(index))),
    )?;
    let result = |(row, change): (&Row, &IssueChange)| Changed {
        id: change.id,
        version: row.get("version"),
        changed: row.get("is_changed"),
    };
    Ok(rows.iter().zip(changes).map(result).collect())
}

/// Returns an error with all problems of the most severe kind: missing before stale before deleted.
fn check_problems<'a>(
    judged: impl IntoIterator<Item = (Option<&'a str>, Option<i64>, &'a IssueChange, String)>,
) -> Result<()> {
    let (mut missing, mut stale, mut misplaced) = (Vec::new(), Vec::new(), Vec::new());
    for (problem, version, change, field) in judged {
        match problem {
            None => {}
            // Busy, although the statement waited for its lock: the issue was removed meanwhile, by RevertImport.
            Some("missing" | "busy") => missing.push(Resource::missing("issue", field, change.id)),
            Some("stale") => stale.push(StaleVersion {
                field,
                id: change.id,
                expected: change.expected_version,
                current: version.unwrap_or_default(),
            }),
            Some("not deleted") => {
                misplaced.push(Violation::new(field, format!("issue \"{}\" is not deleted", change.id)))
            }
            Some(_) => misplaced.push(Violation::new(field, format!("issue \"{}\" is deleted", change.id))),
        }
    }
    if !missing.is_empty() {
        return Err(Error::NotFound(missing));
    }
    if !stale.is_empty() {
        return Err(Error::VersionMismatch(stale));
    }
    if !misplaced.is_empty() {
        return Err(Error::Precondition { reason: "ISSUE_STATE", violations: misplaced });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn update_statements_differ_only_in_whether_they_wait_for_locked_rows() {
        let waiting = UPDATE_ISSUES_NOT_LOCKED
            .replace("-- update_issues_not_locked", "-- update_issues")
            .replace("FOR NO KEY UPDATE SKIP LOCKED", "FOR NO KEY UPDATE");
        assert_eq!(waiting, UPDATE_ISSUES);
        let judged =
            |sql: &'static str| sql.split_once("WITH requested").unwrap().1.split_once("), changed AS").unwrap().0;
        assert_eq!(judged(BULK_UPDATE_ISSUES), judged(UPDATE_ISSUES));
    }
}
