//! Filing issues.

use std::collections::HashSet;

use tokio_postgres::Row;
use uuid::Uuid;

use crate::{
    db::{Conn, Db, Params},
    error::{Error, Resource, Result},
    pb::{Issue, Label, Priority, Status},
    request::timestamp,
};

/// An issue to file.
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

/// Files issues, all or none, in one statement; answers them in order.
///
/// A missing assignee or label and a taken external id are told by the constraint that they violate:
/// [`explain_create`] turns it into what a caller is told.
pub async fn create(db: &Conn, issues: &[NewIssue]) -> Result<Vec<Issue>> {
    // What is known of them already is not sent back.
    const SQL: &str = "-- create_issues
        WITH created AS (
            INSERT INTO issues (id, reporter_id, title, description, status, priority, assignee_id, external_id, close_time)
            SELECT n.id, n.reporter_id, n.title, n.description, n.status, n.priority, n.assignee_id, n.external_id,
                CASE WHEN n.status = 3 THEN now() END
            FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::int2[], $6::int2[], $7::uuid[], $8::text[])
                AS n (id, reporter_id, title, description, status, priority, assignee_id, external_id)
            RETURNING id, version, create_time, close_time
        ), labelled AS (
            INSERT INTO issue_labels (issue_id, label_id)
            SELECT issue_id, label_id FROM unnest($9::uuid[], $10::uuid[]) AS n (issue_id, label_id)
        )
        SELECT id, version, create_time, close_time FROM created ORDER BY id";
    // Before the issues are filed, so that nothing can fail behind it. A missing label fails the statement.
    let labels = labels_by_name(db, issues).await?;
    // Ids of one process ascend, so ordering by id is the order of the request.
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
    Ok(rows.iter().zip(issues).map(|(row, issue)| filed(row, issue, &labels)).collect())
}

fn filed(row: &Row, issue: &NewIssue, labels: &[(Uuid, Label)]) -> Issue {
    let create_time = Some(timestamp(row.get(2)));
    let of_issue = labels.iter().filter(|(id, _)| issue.label_ids.contains(id));
    Issue {
        id: row.get::<_, Uuid>(0).to_string(),
        title: issue.title.clone(),
        description: issue.description.clone(),
        status: issue.status.into(),
        priority: issue.priority.into(),
        assignee_id: issue.assignee_id.map(|id| id.to_string()).unwrap_or_default(),
        reporter_id: issue.reporter_id.to_string(),
        labels: of_issue.map(|(_, label)| label.clone()).collect(),
        version: row.get(1),
        external_id: issue.external_id.clone().unwrap_or_default(),
        create_time,
        update_time: create_time,
        close_time: row.get::<_, Option<_>>(3).map(timestamp),
        ..Issue::default()
    }
}

/// The labels that the issues are to carry.
async fn labels_by_name(db: &Conn, issues: &[NewIssue]) -> Result<Vec<(Uuid, Label)>> {
    const SQL: &str = "-- labels_by_name
        SELECT id, name, description FROM labels WHERE id = ANY($1) ORDER BY lower(name)";
    let ids: Vec<Uuid> = issues.iter().flat_map(|issue| issue.label_ids.iter().copied()).collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let label = |row: &Row| {
        let id: Uuid = row.get(0);
        (id, Label { id: id.to_string(), name: row.get(1), description: row.get(2) })
    };
    Ok(db.query(SQL, &[&ids]).await?.iter().map(label).collect())
}

/// What a caller is told when [`create`] fails: everything that is missing or taken, named by the fields of `field(n)`.
///
/// Asks the database, outside of the transaction that has failed.
pub async fn explain_create(db: &Db, error: Error, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Error {
    let constraint = error.constraint().unwrap_or_default();
    let explained = match constraint {
        "issues_assignee_id_fkey" | "issue_labels_label_id_fkey" | "issues_external_id_key" => match db.conn().await {
            Ok(conn) if constraint == "issues_external_id_key" => taken_external_ids(&conn, issues, field).await,
            Ok(conn) => missing_references(&conn, issues, field).await,
            Err(error) => Err(error),
        },
        _ => return error,
    };
    match explained {
        Ok(Some(explained)) => explained,
        // What was missing or taken is there or free by now.
        Ok(None) => Error::Aborted {
            reason: "CONFLICT",
            message: "an assignee, label or external id was changed at this moment; try again".to_owned(),
        },
        Err(error) => error,
    }
}

async fn missing_references(db: &Conn, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Result<Option<Error>> {
    let assignees: Vec<Uuid> = issues.iter().filter_map(|issue| issue.assignee_id).collect();
    let labels: Vec<Uuid> = issues.iter().flat_map(|issue| issue.label_ids.iter().copied()).collect();
    let known_users = known_ids(db, "-- known_users\nSELECT id FROM users WHERE id = ANY($1)", &assignees).await?;
    let known_labels = known_ids(db, "-- known_labels\nSELECT id FROM labels WHERE id = ANY($1)", &labels).await?;
    let mut missing = Vec::new();
    for (index, issue) in issues.iter().enumerate() {
        if let Some(id) = issue.assignee_id.filter(|id| !known_users.contains(id)) {
            missing.push(Resource::missing("user", format!("{}.assignee_id", field(index)), id));
        }
        for (nth, id) in issue.label_ids.iter().enumerate().filter(|(_, id)| !known_labels.contains(id)) {
            missing.push(Resource::missing("label", format!("{}.label_ids[{nth}]", field(index)), id));
        }
    }
    Ok(if missing.is_empty() { None } else { Some(Error::NotFound(missing)) })
}

async fn known_ids(db: &Conn, sql: &str, ids: &[Uuid]) -> Result<HashSet<Uuid>> {
    Ok(db.query(sql, &[&ids]).await?.iter().map(|row| row.get(0)).collect())
}

async fn taken_external_ids(db: &Conn, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Result<Option<Error>> {
    const SQL: &str = "-- taken_external_ids
        SELECT external_id FROM issues WHERE external_id = ANY($1)";
    let wanted: Vec<&str> = issues.iter().filter_map(|issue| issue.external_id.as_deref()).collect();
    let rows = db.query(SQL, &[&wanted]).await?;
    // Those of the batch itself count too.
    let mut taken: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let mut clashes = Vec::new();
    for (index, issue) in issues.iter().enumerate() {
        if let Some(external_id) = &issue.external_id
            && !taken.insert(external_id.clone())
        {
            let field = format!("{}.external_id", field(index));
            clashes.push(Resource::taken("issue", "external id", field, external_id));
        }
    }
    Ok(if clashes.is_empty() { None } else { Some(Error::AlreadyExists(clashes)) })
}
