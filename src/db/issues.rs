//! Issues: reading, filing, changing.

use chrono::{DateTime, Utc};
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{Conn, Page, PageBounds, Params};
use crate::{
    error::{Error, Resource, Result, StaleVersion, Violation},
    filter::{Filter, LabelRef, Term, UserRef},
    pb::{Issue, Label, Priority, Status},
    request::timestamp,
};

/// The columns of [`from_row`], of an issue `i` with its labels `l` as [`labels_of`] joins them.
macro_rules! issue_columns {
    () => {
        "i.id, i.title, i.description, i.status, i.priority, i.assignee_id, i.reporter_id, i.version, i.external_id,
        i.create_time, i.update_time, i.close_time, i.delete_time, i.reopen_count,
        (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL),
        l.ids, l.names, l.descriptions"
    };
}

/// Joins the labels of each issue `i`, by name.
macro_rules! labels_of {
    ($issue_id:literal) => {
        concat!(
            " LEFT JOIN LATERAL (
            SELECT array_agg(l.id ORDER BY lower(l.name)) AS ids, array_agg(l.name ORDER BY lower(l.name)) AS names,
                array_agg(l.description ORDER BY lower(l.name)) AS descriptions
            FROM issue_labels il JOIN labels l ON l.id = il.label_id WHERE il.issue_id = ",
            $issue_id,
            ") l ON true"
        )
    };
}

/// Columns as in `issue_columns!`.
fn from_row(row: &Row) -> Result<Issue> {
    from_row_at(row, 0)
}

fn from_row_at(row: &Row, at: usize) -> Result<Issue> {
    let id_text = |index: usize| row.get::<_, Option<Uuid>>(at + index).map(|id| id.to_string()).unwrap_or_default();
    let time = |index: usize| row.get::<_, Option<DateTime<Utc>>>(at + index).map(timestamp);
    let label_ids: Vec<Uuid> = row.get::<_, Option<_>>(at + 15).unwrap_or_default();
    let label_names: Vec<String> = row.get::<_, Option<_>>(at + 16).unwrap_or_default();
    let label_descriptions: Vec<String> = row.get::<_, Option<_>>(at + 17).unwrap_or_default();
    let labels = label_ids.iter().zip(label_names).zip(label_descriptions);
    Ok(Issue {
        id: id_text(0),
        title: row.get(at + 1),
        description: row.get(at + 2),
        status: i32::from(row.get::<_, i16>(at + 3)),
        priority: i32::from(row.get::<_, i16>(at + 4)),
        assignee_id: id_text(5),
        reporter_id: id_text(6),
        version: row.get(at + 7),
        external_id: row.get::<_, Option<_>>(at + 8).unwrap_or_default(),
        create_time: time(9),
        update_time: time(10),
        close_time: time(11),
        delete_time: time(12),
        reopen_count: row.get(at + 13),
        comment_count: row.get(at + 14),
        labels: labels.map(|((id, name), description)| Label { id: id.to_string(), name, description }).collect(),
        comments: Vec::new(),
        label_ids: Vec::new(),
    })
}

pub async fn get(db: &Conn, id: Uuid) -> Result<Issue> {
    const SQL: &str =
        concat!("-- get_issue\nSELECT ", issue_columns!(), " FROM issues i", labels_of!("i.id"), " WHERE i.id = $1");
    let row = db.query_opt(SQL, &[&id]).await?;
    row.as_ref().map_or_else(|| Err(Error::not_found("issue", "id", id)), from_row)
}

/// The issues that there are of these, in the order of the ids; `more` if they do not fit the bounds.
pub async fn batch_get(db: &Conn, ids: &[Uuid], bounds: PageBounds) -> Result<Page<Issue>> {
    const SQL: &str = concat!(
        "-- batch_get_issues\nSELECT ",
        issue_columns!(),
        " FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, nth) JOIN issues i ON i.id = wanted.id",
        labels_of!("i.id"),
        " ORDER BY wanted.nth"
    );
    db.query_page(SQL, &[&ids], bounds, from_row, prost::Message::encoded_len).await
}

/// Newest first, behind the issue with id `after`. `limit` is one more than the rows that are wanted.
pub async fn list(
    db: &Conn,
    filter: &Filter,
    show_deleted: bool,
    after: Option<Uuid>,
    limit: i64,
    bounds: PageBounds,
) -> Result<Page<Issue>> {
    let mut query = ListQuery::new(filter, show_deleted);
    if let Some(after) = after {
        query.and(|n| format!("i.id < ${n}"), after);
    }
    let limit_n = query.bind(limit);
    // The page is cut before labels and comments are looked up.
    let sql = format!(
        "-- list_issues\nSELECT {} FROM (SELECT i.* FROM issues i{} WHERE {} ORDER BY i.id DESC LIMIT ${limit_n}) i{} \
         ORDER BY i.id DESC",
        issue_columns!(),
        query.joins,
        query.conditions.join(" AND "),
        labels_of!("i.id"),
    );
    let params: Vec<&(dyn ToSql + Sync)> = query.params.iter().map(|param| &**param as _).collect();
    db.query_page(&sql, &params, bounds, from_row, prost::Message::encoded_len).await
}

/// The selection of a list as SQL: the text depends on the filter's shape alone, its values are parameters.
struct ListQuery {
    joins: String,
    conditions: Vec<String>,
    params: Vec<Box<dyn ToSql + Sync + Send>>,
}

impl ListQuery {
    fn new(filter: &Filter, show_deleted: bool) -> Self {
        let mut query = Self { joins: String::new(), conditions: Vec::new(), params: Vec::new() };
        query.conditions.push(if show_deleted { "true" } else { "i.delete_time IS NULL" }.to_owned());
        for term in &filter.terms {
            query.term(term);
        }
        query
    }

    fn term(&mut self, term: &Term) {
        match term {
            Term::Status(status) => self.and(|n| format!("i.status = ${n}"), *status as i16),
            Term::Priority(priority) => self.and(|n| format!("i.priority = ${n}"), *priority as i16),
            Term::Assignee(user) => self.user("i.assignee_id", user),
            Term::Reporter(user) => self.user("i.reporter_id", user),
            // Joined, so that a rare label's issues are found by its index in the list's order.
            Term::Label(label) => {
                let joined = format!("il{}", self.params.len());
                self.joins += &format!(" JOIN issue_labels {joined} ON {joined}.issue_id = i.id");
                match label {
                    LabelRef::Id(id) => self.and(|n| format!("{joined}.label_id = ${n}"), *id),
                    LabelRef::Name(name) => self.and(
                        |n| format!("{joined}.label_id = (SELECT id FROM labels WHERE lower(name) = lower(${n}))"),
                        name.clone(),
                    ),
                }
            }
            Term::Search(text) => {
                self.and(|n| format!("(i.title ILIKE ${n} OR i.description ILIKE ${n})"), like_pattern(text));
            }
        }
    }

    fn user(&mut self, column: &str, user: &UserRef) {
        match user {
            UserRef::Nobody => self.conditions.push(format!("{column} IS NULL")),
            UserRef::Id(id) => self.and(|n| format!("{column} = ${n}"), *id),
            UserRef::Username(username) => self.and(
                |n| format!("{column} = (SELECT id FROM users WHERE lower(username) = lower(${n}))"),
                username.clone(),
            ),
        }
    }

    fn and(&mut self, condition: impl FnOnce(usize) -> String, value: impl ToSql + Sync + Send + 'static) {
        let n = self.bind(value);
        self.conditions.push(condition(n));
    }

    /// The parameter's number.
    fn bind(&mut self, value: impl ToSql + Sync + Send + 'static) -> usize {
        self.params.push(Box::new(value));
        self.params.len()
    }
}

/// A pattern for ILIKE that finds the text anywhere, whatever characters it has.
fn like_pattern(text: &str) -> String {
    let mut pattern = String::from("%");
    for char in text.chars() {
        if matches!(char, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern.push('%');
    pattern
}

/// An issue to file.
#[derive(Clone, Debug)]
pub struct NewIssue {
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
pub async fn create(db: &Conn, reporter_id: Uuid, issues: &[NewIssue]) -> Result<Vec<Issue>> {
    const SQL: &str = concat!(
        "-- create_issues
        WITH i AS (
            INSERT INTO issues (id, reporter_id, title, description, status, priority, assignee_id, external_id, close_time)
            SELECT n.id, $1, n.title, n.description, n.status, n.priority, n.assignee_id, n.external_id,
                CASE WHEN n.status = 3 THEN now() END
            FROM unnest($2::uuid[], $3::text[], $4::text[], $5::int2[], $6::int2[], $7::uuid[], $8::text[])
                AS n (id, title, description, status, priority, assignee_id, external_id)
            RETURNING *
        ), il AS (
            INSERT INTO issue_labels (issue_id, label_id) SELECT * FROM unnest($9::uuid[], $10::uuid[])
        )
        SELECT ",
        issue_columns!(),
        " FROM i LEFT JOIN LATERAL (
            SELECT array_agg(l.id ORDER BY lower(l.name)) AS ids, array_agg(l.name ORDER BY lower(l.name)) AS names,
                array_agg(l.description ORDER BY lower(l.name)) AS descriptions
            FROM unnest($9::uuid[], $10::uuid[]) AS il (issue_id, label_id) JOIN labels l ON l.id = il.label_id
            WHERE il.issue_id = i.id) l ON true
        ORDER BY i.id"
    );
    // Ids of one process ascend, so ordering by id is the order of the request.
    let ids: Vec<Uuid> = issues.iter().map(|_| Uuid::now_v7()).collect();
    let titles: Vec<&str> = issues.iter().map(|issue| &*issue.title).collect();
    let descriptions: Vec<&str> = issues.iter().map(|issue| &*issue.description).collect();
    let statuses: Vec<i16> = issues.iter().map(|issue| issue.status as i16).collect();
    let priorities: Vec<i16> = issues.iter().map(|issue| issue.priority as i16).collect();
    let assignee_ids: Vec<Option<Uuid>> = issues.iter().map(|issue| issue.assignee_id).collect();
    let external_ids: Vec<Option<&str>> = issues.iter().map(|issue| issue.external_id.as_deref()).collect();
    let (labelled, label_ids): (Vec<Uuid>, Vec<Uuid>) =
        ids.iter().zip(issues).flat_map(|(id, issue)| issue.label_ids.iter().map(|label_id| (*id, *label_id))).unzip();
    let params: Params = &[
        &reporter_id,
        &ids,
        &titles,
        &descriptions,
        &statuses,
        &priorities,
        &assignee_ids,
        &external_ids,
        &labelled,
        &label_ids,
    ];
    db.query(SQL, params).await?.iter().map(from_row).collect()
}

/// What a caller is told when [`create`] fails: everything that is missing or taken, named by the fields of `field(n)`.
///
/// Asks the database, outside of the transaction that has failed.
pub async fn explain_create(db: &Conn, error: Error, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Error {
    let explained = match error.constraint() {
        Some("issues_assignee_id_fkey" | "issue_labels_label_id_fkey") => missing_references(db, issues, field).await,
        Some("issues_external_id_key") => taken_external_ids(db, issues, field).await,
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

async fn known_ids(db: &Conn, sql: &str, ids: &[Uuid]) -> Result<std::collections::HashSet<Uuid>> {
    Ok(db.query(sql, &[&ids]).await?.iter().map(|row| row.get(0)).collect())
}

async fn taken_external_ids(db: &Conn, issues: &[NewIssue], field: impl Fn(usize) -> String) -> Result<Option<Error>> {
    const SQL: &str = "-- taken_external_ids
        SELECT external_id FROM issues WHERE external_id = ANY($1)";
    let wanted: Vec<&str> = issues.iter().filter_map(|issue| issue.external_id.as_deref()).collect();
    let rows = db.query(SQL, &[&wanted]).await?;
    // Those of the batch itself count too.
    let mut taken: std::collections::HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
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

/// A change of one issue: what is none stays as it is.
#[derive(Clone, Debug, Default)]
pub struct IssueChange {
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

/// The beginning of every statement that changes columns of issues: judges each change, and applies all or none. The
/// trigger on issues does the rest: version, times, history.
///
/// Changes are judged by `locked`, which has the rows as they are once the locks are held; `issues` itself is seen as it
/// was before the statement waited for them.
macro_rules! change_issues {
    ($name:literal, $select:expr) => {
        concat!(
            "-- ",
            $name,
            "
        WITH wanted AS (
            SELECT * FROM unnest($2::uuid[], $3::int8[], $4::text[], $5::text[], $6::int2[], $7::int2[], $8::bool[],
                $9::uuid[], $10::text[], $11::bool[]) WITH ORDINALITY AS n (id, expected_version, title, description,
                status, priority, sets_assignee, assignee_id, external_id, delete, nth)
        ), locked AS (
            SELECT i.* FROM issues i WHERE i.id = ANY($2) ORDER BY i.id FOR NO KEY UPDATE
        ), judged AS (
            SELECT n.*, o.version, CASE
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
                change_actor_id = $1,
                title = coalesce(n.title, i.title),
                description = coalesce(n.description, i.description),
                status = coalesce(n.status, i.status),
                priority = coalesce(n.priority, i.priority),
                assignee_id = CASE WHEN n.sets_assignee THEN n.assignee_id ELSE i.assignee_id END,
                external_id = CASE WHEN n.external_id IS NULL THEN i.external_id ELSE nullif(n.external_id, '') END,
                delete_time = CASE WHEN n.delete IS NULL THEN i.delete_time WHEN n.delete THEN now() END
            FROM judged n
            WHERE i.id = n.id AND n.differs AND NOT EXISTS (SELECT FROM judged WHERE problem IS NOT NULL)
            RETURNING i.*
        )
        ",
            $select
        )
    };
}

/// Runs a statement of `change_issues!`.
async fn run_change(db: &Conn, sql: &str, actor_id: Uuid, changes: &[IssueChange]) -> Result<Vec<Row>> {
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
        &actor_id,
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

/// Changes one issue, and answers it as it is then. `field` names its id in errors.
pub async fn update(db: &Conn, actor_id: Uuid, change: &IssueChange, field: &str) -> Result<Issue> {
    const SQL: &str = change_issues!(
        "update_issue",
        concat!(
            "SELECT n.problem, n.version, n.version <> (SELECT version FROM issues WHERE id = n.id), ",
            issue_columns!(),
            " FROM judged n LEFT JOIN LATERAL (
                SELECT * FROM changed UNION ALL SELECT * FROM locked WHERE NOT EXISTS (SELECT FROM changed)
            ) i ON true",
            labels_of!("n.id")
        )
    );
    let rows = run_change(db, SQL, actor_id, std::slice::from_ref(change)).await.map_err(|error| {
        let assignee = change.assignee_id.flatten().unwrap_or_default();
        let external_id = change.external_id.clone().unwrap_or_default();
        error
            .on_constraint("issues_assignee_id_fkey", || Error::not_found("user", "issue.assignee_id", assignee))
            .on_constraint("issues_external_id_key", || {
                Error::already_exists("issue", "external id", "issue.external_id", external_id)
            })
    })?;
    let [row] = &rows[..] else { return Err(Error::Internal("a change of one issue gave no row")) };
    check_problems([(row.get(0), row.get(1), change, field.to_owned())])?;
    if row.get(2) {
        // It was changed while the statement waited for it, and its labels are seen as they were before.
        return get(db, change.id).await;
    }
    from_row_at(row, 3)
}

/// Changes issues, all or none; answers in order. `field(n)` names the nth id in errors.
pub async fn bulk_update(
    db: &Conn,
    actor_id: Uuid,
    changes: &[IssueChange],
    field: impl Fn(usize) -> String,
) -> Result<Vec<Changed>> {
    const SQL: &str = change_issues!(
        "bulk_update_issues",
        "SELECT n.problem, coalesce(i.version, n.version), i.id IS NOT NULL
         FROM judged n LEFT JOIN changed i ON i.id = n.id ORDER BY n.nth"
    );
    let rows = run_change(db, SQL, actor_id, changes).await?;
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

#[cfg(test)]
mod tests {
    use super::like_pattern;

    #[test]
    fn wildcards_of_a_search_text_stand_for_themselves() {
        assert_eq!(like_pattern(r"100%_\"), r"%100\%\_\\%");
    }
}
