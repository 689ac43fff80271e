//! Creating issues.

use std::collections::HashSet;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    db::{
        conn::{Conn, Params},
        labels,
        pool::Db,
        time::timestamp,
    },
    error::{Error, Resource, Result},
    pb::{Issue, Label, Priority, Status},
};

/// An issue to create.
#[derive(Clone, Debug)]
pub struct NewIssue {
    pub reporter_id: Uuid,
    pub title: String,
    pub description: String,
    pub status: Status,
    pub priority: Priority,
    pub assignee_id: Option<Uuid>,
    pub external_id: Option<String>,
    pub label_ids: Vec<Uuid>,
}

/// Creates issues, all or none, in one statement. Returns them in order.
///
/// A missing assignee or label, or a taken external id, fails the call: [`explain_create`] explains the error.
pub async fn create(db: &Conn, issues: &[NewIssue]) -> Result<Vec<Issue>> {
    // Returns only what is not known yet.
    const SQL: &str = "-- create_issues
        WITH created AS (
            INSERT INTO issues (id, reporter_id, title, description, status, priority, assignee_id, external_id, close_time)
            SELECT new.id, new.reporter_id, new.title, new.description, new.status, new.priority, new.assignee_id,
                new.external_id, CASE WHEN new.status = 3 THEN now() END
            FROM unnest(
                /* id */ $1::uuid[],
                /* reporter_id */ $2::uuid[],
                /* title */ $3::text[],
                /* description */ $4::text[],
                /* status */ $5::int2[],
                /* priority */ $6::int2[],
                /* assignee_id */ $7::uuid[],
                /* external_id */ $8::text[]
            ) AS new (id, reporter_id, title, description, status, priority, assignee_id, external_id)
            RETURNING id, version, create_time, close_time
        ), labelled AS (
            INSERT INTO issue_labels (issue_id, label_id)
            SELECT issue_id, label_id
            FROM unnest(/* issue_id */ $9::uuid[], /* label_id */ $10::uuid[]) AS new (issue_id, label_id)
        )
        SELECT id, version, create_time, close_time FROM created ORDER BY id";
    // Read before the issues are created, so that nothing can fail afterwards. A label that is deleted meanwhile fails the
    // statement.
    let labels = labels_by_name(db, issues).await?;
    // Ids of one process ascend: the order of ids is the order of the request.
    let ids: Vec<Uuid> = issues.iter().map(|_| Uuid::now_v7()).collect();
    let reporter_ids: Vec<Uuid> = issues.iter().map(|issue| issue.reporter_id).collect();
    let titles: Vec<&str> = issues.iter().map(|issue| &*issue.title).collect();
    let descriptions: Vec<&str> = issues.iter().map(|issue| &*issue.description).collect();
    let statuses: Vec<i16> = issues.iter().map(|issue| issue.status as i16).collect();
    let priorities: Vec<i16> = issues.iter().map(|issue| issue.priority as i16).collect();
    let assignee_ids: Vec<Option<Uuid>> = issues.iter().map(|issue| issue.assignee_id).collect();
    let external_ids: Vec<Option<&str>> = issues.iter().map(|issue| issue.external_id.as_deref()).collect();
    let (labelled, label_ids): (Vec<Uuid>, Vec<Uuid>) =
        ids.iter().zip(issues).flat_map(|(id, issue)| issue.label_ids.iter().map(|label_id| (*id, *label_id))).unzip();
    let params: Params = &[
        &ids,
        &reporter_ids,
        &titles,
        &descriptions,
        &statuses,
        &priorities,
        &assignee_ids,
        &external_ids,
        &labelled,
        &label_ids,
    ];
    let rows = db.query(SQL, params).await?;
    Ok(rows.iter().zip(issues).map(|(row, issue)| created(row, issue, &labels)).collect())
}

fn created(row: &Row, issue: &NewIssue, labels: &[(Uuid, Label)]) -> Issue {
    let create_time = Some(timestamp(row.get("create_time")));
    let of_issue = labels.iter().filter(|(id, _)| issue.label_ids.contains(id));
    Issue {
        id: row.get::<_, Uuid>("id").to_string(),
        title: issue.title.clone(),
        description: issue.description.clone(),
        status: issue.status.into(),
        priority: issue.priority.into(),
        assignee_id: issue.assignee_id.map(|id| id.to_string()).unwrap_or_default(),
        reporter_id: issue.reporter_id.to_string(),
        labels: of_issue.map(|(_, label)| label.clone()).collect(),
        version: row.get("version"),
        external_id: issue.external_id.clone().unwrap_or_default(),
        create_time,
        update_time: create_time,
        close_time: row.get::<_, Option<_>>("close_time").map(timestamp),
        ..Issue::default()
    }
}

/// Returns the labels of the new issues, by name. Fails with `NotFound` for a label that does not exist or is being deleted:
/// the latter violates no constraint.
async fn labels_by_name(db: &Conn, issues: &[NewIssue]) -> Result<Vec<(Uuid, Label)>> {
    const SQL: &str = "-- labels_by_name
        SELECT id, name, description FROM labels
        WHERE id = ANY($1) AND delete_actor_id IS NULL ORDER BY lower(name)";
    let ids: Vec<Uuid> = issues.iter().flat_map(|issue| issue.label_ids.iter().copied()).collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let label = |row: &Row| (row.get("id"), labels::from_row(row));
    let labels: Vec<(Uuid, Label)> = db.query(SQL, &[&ids]).await?.iter().map(label).collect();
    let known: HashSet<Uuid> = labels.iter().map(|(id, _)| *id).collect();
    match ids.iter().find(|id| !known.contains(id)) {
        Some(missing) => Err(Error::not_found("label", "label_ids", missing)),
        None => Ok(labels),
    }
}

/// Explains an error of [`create`]: returns one that names everything that is missing or taken, by the fields of
/// `field(n)`. `NotFound` if anything is missing, else `AlreadyExists`.
///
/// Queries the database outside of the failed transaction.
pub async fn explain_create(db: &Db, error: Error, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Error {
    match error.constraint() {
        Some("issues_assignee_id_fkey" | "issue_labels_label_id_fkey" | "issues_external_id_key") => {}
        None if matches!(error, Error::NotFound(_)) => {}
        _ => return error,
    }
    let conflicts = match db.conn().await {
        Ok(conn) => find_conflicts(&conn, issues, field).await,
        Err(error) => Err(error),
    };
    match conflicts {
        Ok(conflicts) if conflicts.is_empty() => Error::Aborted {
            reason: "CONFLICT",
            message: "an assignee, label or external id was changed concurrently; try again".to_owned(),
        },
        Ok(conflicts) if conflicts.iter().any(Resource::is_missing) => Error::NotFound(conflicts),
        Ok(conflicts) => Error::AlreadyExists(conflicts),
        Err(error) => error,
    }
}

/// Returns the missing assignees and labels and the taken external ids of new issues, in order.
async fn find_conflicts(db: &Conn, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Result<Vec<Resource>> {
    const USERS: &str = "-- known_users\nSELECT id FROM users WHERE id = ANY($1)";
    const LABELS: &str = "-- known_labels\nSELECT id FROM labels WHERE id = ANY($1) AND delete_actor_id IS NULL";
    const EXTERNAL_IDS: &str = "-- taken_external_ids\nSELECT external_id FROM issues WHERE external_id = ANY($1)";
    let assignee_ids: Vec<Uuid> = issues.iter().filter_map(|issue| issue.assignee_id).collect();
    let label_ids: Vec<Uuid> = issues.iter().flat_map(|issue| issue.label_ids.iter().copied()).collect();
    let external_ids: Vec<&str> = issues.iter().filter_map(|issue| issue.external_id.as_deref()).collect();
    let (users, labels, taken): (Params, Params, Params) = (&[&assignee_ids], &[&label_ids], &[&external_ids]);
    let (users, labels, taken) =
        tokio::try_join!(db.query(USERS, users), db.query(LABELS, labels), db.query(EXTERNAL_IDS, taken))?;
    let users: HashSet<Uuid> = users.iter().map(|row| row.get("id")).collect();
    let labels: HashSet<Uuid> = labels.iter().map(|row| row.get("id")).collect();
    // External ids of earlier issues of the batch are added below.
    let mut taken: HashSet<String> = taken.iter().map(|row| row.get("external_id")).collect();

    let mut conflicts = Vec::new();
    for (index, issue) in issues.iter().enumerate() {
        let field = field(index);
        if let Some(id) = issue.assignee_id.filter(|id| !users.contains(id)) {
            conflicts.push(Resource::missing("user", format!("{field}.assignee_id"), id));
        }
        for (nth, id) in issue.label_ids.iter().enumerate().filter(|(_, id)| !labels.contains(id)) {
            conflicts.push(Resource::missing("label", format!("{field}.label_ids[{nth}]"), id));
        }
        if let Some(external_id) = &issue.external_id
            && !taken.insert(external_id.clone())
        {
            conflicts.push(Resource::taken("issue", "external id", format!("{field}.external_id"), external_id));
        }
    }
    Ok(conflicts)
}
