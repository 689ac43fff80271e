//! Changing issues: one statement judges and applies, the trigger on issues keeps version, times and history.

use tokio_postgres::Row;
use uuid::Uuid;

use super::{from_row_at, get, issue_columns, labels_of};
use crate::{
    batching::coalescer::Outcome,
    db::{Conn, Params, batchers::Locked},
    error::{Error, Resource, Result, StaleVersion, Violation},
    pb::{Issue, Priority, Status},
};

/// A change of one issue: what is none stays as it is.
#[derive(Clone, Debug, Default)]
pub struct IssueChange {
    /// Who makes it.
    pub actor_id: Uuid,
    pub id: Uuid,
    /// 0: any.
    pub expected_version: i64,
    pub title: Option<String>,
    pub description: Option<String>,
    pub status: Option<Status>,
    pub priority: Option<Priority>,
    pub assignee_id: Option<Option<Uuid>>,
    /// Empty: none.
    pub external_id: Option<String>,
    /// True deletes the issue, false brings it back; everything else takes an issue that is not deleted.
    pub delete: Option<bool>,
}

/// What became of one issue.
#[derive(Clone, Copy, Debug)]
pub struct Changed {
    pub id: Uuid,
    pub version: i64,
    pub changed: bool,
}

/// The beginning of every statement that changes columns of issues: judges each change, and applies those that
/// have no problem, or all or none. No issue may be in it twice.
///
/// Changes are judged by `locked`, which has the rows as they are once the locks are held; `issues` itself is seen as it
/// was before the statement waited for them.
macro_rules! change_issues {
    ($name:literal, $lock:literal, $select:expr) => {
        concat!(
            "-- ",
            $name,
            "
        WITH wanted AS (
            SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::int8[], $4::text[], $5::text[], $6::int2[], $7::int2[], $8::bool[],
                $9::uuid[], $10::text[], $11::bool[]) WITH ORDINALITY AS n (actor_id, id, expected_version, title, description,
                status, priority, sets_assignee, assignee_id, external_id, delete, nth)
        ), locked AS (
            SELECT i.* FROM issues i WHERE i.id = ANY($2) ORDER BY i.id FOR NO KEY UPDATE",
            $lock,
            "
        ), judged AS (
            SELECT n.*, o.version, CASE
                WHEN o.id IS NULL AND EXISTS (SELECT FROM issues i WHERE i.id = n.id) THEN 'busy'
                WHEN o.id IS NULL THEN 'missing'
                WHEN n.expected_version NOT IN (0, o.version) THEN 'stale'
                WHEN n.delete IS NOT FALSE AND o.delete_time IS NOT NULL THEN 'deleted'
                WHEN n.delete IS FALSE AND o.delete_time IS NULL THEN 'not deleted'
            END AS problem,
            n.title <> o.title OR n.description <> o.description OR n.status <> o.status OR n.priority <> o.priority
                OR n.sets_assignee AND n.assignee_id IS DISTINCT FROM o.assignee_id
                OR n.external_id <> coalesce(o.external_id, '') OR n.delete IS NOT NULL AS differs
            FROM wanted n LEFT JOIN locked o ON o.id = n.id
        ), changed AS (
            UPDATE issues i SET
                change_actor_id = n.actor_id,
                title = coalesce(n.title, i.title),
                description = coalesce(n.description, i.description),
                status = coalesce(n.status, i.status),
                priority = coalesce(n.priority, i.priority),
                assignee_id = CASE WHEN n.sets_assignee THEN n.assignee_id ELSE i.assignee_id END,
                external_id = CASE WHEN n.external_id IS NULL THEN i.external_id ELSE nullif(n.external_id, '') END,
                delete_time = CASE WHEN n.delete IS NULL THEN i.delete_time WHEN n.delete THEN now() END
            FROM judged n
            WHERE i.id = n.id AND n.differs AND n.problem IS NULL
                AND NOT ($12 AND EXISTS (SELECT FROM judged WHERE problem IS NOT NULL))
            RETURNING i.*
        )
        ",
            $select
        )
    };
}

/// Answers each issue as it is then.
macro_rules! update_issues {
    ($name:literal, $lock:literal) => {
        change_issues!(
            $name,
            $lock,
            concat!(
                "SELECT n.problem, n.version, n.version <> (SELECT version FROM issues WHERE id = n.id), ",
                issue_columns!(),
                " FROM judged n LEFT JOIN (
                    SELECT * FROM changed
                    UNION ALL SELECT * FROM locked o WHERE NOT EXISTS (SELECT FROM changed c WHERE c.id = o.id)
                ) i ON i.id = n.id",
                labels_of!("n.id"),
                " ORDER BY n.nth"
            )
        )
    };
}

/// Runs a statement of `change_issues!`.
async fn run_change(db: &Conn, sql: &str, changes: &[IssueChange], all_or_none: bool) -> Result<Vec<Row>> {
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
        &all_or_none,
    ];
    db.query(sql, params).await
}

/// Changes issues independently of each other, each at most once; answers them as they are then. `field` names an
/// issue's id in errors.
///
/// An unknown assignee or a taken external id fails all: it is only explained where there is one change.
pub async fn update_many(
    db: &Conn,
    changes: &[IssueChange],
    field: &str,
    locked: Locked,
) -> Result<Vec<Outcome<Issue>>> {
    let sql = match locked {
        Locked::Wait => update_issues!("update_issues", ""),
        Locked::Skip => update_issues!("update_issues_not_locked", " SKIP LOCKED"),
    };
    let rows = run_change(db, sql, changes, false).await.map_err(|error| match changes {
        [change] => explain_update(error, change),
        _ => error,
    })?;
    let mut outcomes = Vec::with_capacity(changes.len());
    for (row, change) in rows.iter().zip(changes) {
        let problem: Option<&str> = row.get(0);
        if problem == Some("busy") {
            outcomes.push(Outcome::Alone);
            continue;
        }
        let judged = check_problems([(problem, row.get(1), change, field.to_owned())]);
        outcomes.push(Outcome::Done(match judged {
            Ok(()) if row.get(2) => reread(db, change.id, from_row_at(row, 3)?).await,
            Ok(()) => from_row_at(row, 3),
            Err(error) => Err(error),
        }));
    }
    Ok(outcomes)
}

/// The issue was changed while the statement waited for it, and its labels are seen as they were before. The change is
/// made by now: whatever becomes of the reading, it is told.
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

/// Changes issues, all or none; answers in order. `field(n)` names the nth id in errors.
pub async fn bulk_update(db: &Conn, changes: &[IssueChange], field: impl Fn(usize) -> String) -> Result<Vec<Changed>> {
    const SQL: &str = change_issues!(
        "bulk_update_issues",
        "",
        "SELECT n.problem, coalesce(i.version, n.version), i.id IS NOT NULL
         FROM judged n LEFT JOIN changed i ON i.id = n.id ORDER BY n.nth"
    );
    let rows = run_change(db, SQL, changes, true).await?;
    check_problems(
        rows.iter()
            .zip(changes)
            .enumerate()
            .map(|(index, (row, change))| (row.get(0), row.get(1), change, field(index))),
    )?;
    let changed = rows.iter().zip(changes);
    Ok(changed.map(|(row, change)| Changed { id: change.id, version: row.get(1), changed: row.get(2) }).collect())
}

/// Tells everything of the gravest kind that is wrong: missing before stale before deleted.
fn check_problems<'a>(
    judged: impl IntoIterator<Item = (Option<&'a str>, Option<i64>, &'a IssueChange, String)>,
) -> Result<()> {
    let (mut missing, mut stale, mut misplaced) = (Vec::new(), Vec::new(), Vec::new());
    for (problem, version, change, field) in judged {
        match problem {
            None => {}
            Some("missing") => missing.push(Resource::missing("issue", field, change.id)),
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
