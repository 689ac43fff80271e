//! Issues: reading them here, filing and changing them in the files below.

mod change;
mod create;
mod export;

pub use change::{Changed, IssueChange, bulk_update, update_many};
pub use create::{NewIssue, create, explain_create};
pub use export::ExportSession;

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use prost::Message;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{Conn, Page, PageBounds, Params, comments};
use crate::{
    batching::coalescer::Outcome,
    error::{Error, Result},
    filter::{Filter, LabelRef, Term, UserRef},
    pb::{Comment, Issue, IssueView, Label},
    request::{RESPONSE_BYTES_MAX, timestamp},
};

/// What a full view has of an issue's comments.
const COMMENTS_IN_VIEW: PageBounds = PageBounds { rows_max: 1_000, bytes_max: RESPONSE_BYTES_MAX };
/// Comments of each issue that a round of reads fetches: an issue with more is read by itself.
const COMMENTS_IN_ROUND_MAX: i64 = 32;
/// The same for all issues of a round, in bytes of their messages.
const COMMENT_BYTES_IN_ROUND_MAX: usize = 16 * 1024 * 1024;

/// The columns of [`from_base_row`], of an issue `i`.
macro_rules! base_columns {
    () => {
        "i.id, i.title, i.description, i.status, i.priority, i.assignee_id, i.reporter_id, i.version, i.external_id,
        i.create_time, i.update_time, i.close_time, i.delete_time, i.reopen_count"
    };
}
use base_columns;

/// The columns of [`from_row`], of an issue `i` with its labels `l` as [`labels_of`] joins them.
macro_rules! issue_columns {
    () => {
        concat!(
            crate::db::issues::base_columns!(),
            ", (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL),
            l.ids, l.names, l.descriptions"
        )
    };
}
use issue_columns;

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
use labels_of;

/// Columns as in `issue_columns!`.
fn from_row(row: &Row) -> Result<Issue> {
    from_row_at(row, 0)
}

fn from_row_at(row: &Row, at: usize) -> Result<Issue> {
    let label_ids: Vec<Uuid> = row.get::<_, Option<_>>(at + 15).unwrap_or_default();
    let label_names: Vec<String> = row.get::<_, Option<_>>(at + 16).unwrap_or_default();
    let label_descriptions: Vec<String> = row.get::<_, Option<_>>(at + 17).unwrap_or_default();
    let labels = label_ids.iter().zip(label_names).zip(label_descriptions);
    Ok(Issue {
        comment_count: row.get(at + 14),
        labels: labels.map(|((id, name), description)| Label { id: id.to_string(), name, description }).collect(),
        ..from_base_row(row, at)
    })
}

/// Columns as in `base_columns!`.
fn from_base_row(row: &Row, at: usize) -> Issue {
    let id_text = |index: usize| row.get::<_, Option<Uuid>>(at + index).map(|id| id.to_string()).unwrap_or_default();
    let time = |index: usize| row.get::<_, Option<DateTime<Utc>>>(at + index).map(timestamp);
    Issue {
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
        ..Issue::default()
    }
}

pub async fn get(db: &Conn, id: Uuid) -> Result<Issue> {
    const SQL: &str =
        concat!("-- get_issue\nSELECT ", issue_columns!(), " FROM issues i", labels_of!("i.id"), " WHERE i.id = $1");
    let row = db.query_opt(SQL, &[&id]).await?;
    row.as_ref().map_or_else(|| Err(Error::not_found("issue", "id", id)), from_row)
}

/// With its comments, if it is to be seen in full: two statements that go out together.
pub async fn get_in_view(db: &Conn, id: Uuid, view: IssueView) -> Result<Issue> {
    if view != IssueView::Full {
        return get(db, id).await;
    }
    let limit = COMMENTS_IN_VIEW.rows_max as i64 + 1;
    let (issue, comments) = tokio::join!(biased; get(db, id), comments::list(db, id, None, limit, COMMENTS_IN_VIEW));
    let mut issue = issue?;
    issue.comments = comments?.items;
    Ok(issue)
}

/// Many calls of [`get_in_view`] in three statements that go out together.
pub async fn get_many(db: &Conn, wanted: &[(Uuid, IssueView)]) -> Result<Vec<Outcome<Issue>>> {
    // First, so that an issue never has labels or comments that are older than its version.
    const ISSUES: &str = concat!(
        "-- get_issues\nSELECT ",
        base_columns!(),
        ", CASE WHEN i.id <> ALL ($2) THEN
            (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL) END
        FROM issues i WHERE i.id = ANY ($1)"
    );
    const LABELS: &str = "-- get_labels_of_issues
        SELECT il.issue_id, l.id, l.name, l.description FROM issue_labels il JOIN labels l ON l.id = il.label_id
        WHERE il.issue_id = ANY ($1) ORDER BY lower(l.name)";

    let ids: Vec<Uuid> = wanted.iter().map(|(id, _)| *id).collect();
    let mut full: Vec<Uuid> = wanted.iter().filter(|(_, view)| *view == IssueView::Full).map(|(id, _)| *id).collect();
    full.sort_unstable();
    full.dedup();
    let (of_issues, of_labels): (Params, Params) = (&[&ids, &full], &[&ids]);
    let (issues, labels, comments) = tokio::join!(
        biased;
        db.query(ISSUES, of_issues),
        db.query(LABELS, of_labels),
        comments::first_of_each(db, &full, COMMENTS_IN_ROUND_MAX + 1, COMMENT_BYTES_IN_ROUND_MAX)
    );
    let (labels, comments) = (labels?, comments?);

    let mut found: HashMap<Uuid, Issue> = HashMap::with_capacity(ids.len());
    for row in issues? {
        let mut issue = from_base_row(&row, 0);
        issue.comment_count = row.get::<_, Option<i32>>(14).unwrap_or_default();
        found.insert(row.get(0), issue);
    }
    for row in labels {
        if let Some(issue) = found.get_mut(&row.get(0)) {
            let id: Uuid = row.get(1);
            issue.labels.push(Label { id: id.to_string(), name: row.get(2), description: row.get(3) });
        }
    }
    // If there are more, nobody knows whose are missing.
    let some_are_missing = comments.more;
    for (id, comment) in comments.items {
        if let Some(issue) = found.get_mut(&id) {
            issue.comment_count += i32::from(comment.delete_time.is_none());
            issue.comments.push(comment);
        }
    }
    let mut answers: Vec<Outcome<Issue>> = Vec::with_capacity(wanted.len());
    for (nth, (id, view)) in wanted.iter().enumerate() {
        let count = found.get(id).map_or(0, |issue| issue.comments.len() as i64);
        if count > COMMENTS_IN_ROUND_MAX || (some_are_missing && full.binary_search(id).is_ok()) {
            answers.push(Outcome::Alone);
            continue;
        }
        // Taken, unless somebody else wants the same.
        let wanted_again = wanted[nth + 1..].iter().any(|(other, _)| other == id);
        let issue = if wanted_again { found.get(id).cloned() } else { found.remove(id) };
        answers.push(Outcome::Done(match issue {
            Some(issue) if *view == IssueView::Full => Ok(issue),
            Some(issue) => Ok(Issue { comments: Vec::new(), ..issue }),
            None => Err(Error::not_found("issue", "id", id)),
        }));
    }
    Ok(answers)
}

/// The columns of [`listed_page`], of an issue `i`.
macro_rules! listed_columns {
    () => {
        concat!(
            crate::db::issues::base_columns!(),
            ", (SELECT count(*)::int4 FROM comments c WHERE c.issue_id = i.id AND c.delete_time IS NULL),
            ARRAY(SELECT label_id FROM issue_labels il WHERE il.issue_id = i.id)"
        )
    };
}

/// The issues that there are of these, in the order of the ids; `more` if they do not fit the bounds.
pub async fn batch_get(db: &Conn, ids: &[Uuid], bounds: PageBounds) -> Result<Page<Issue>> {
    const SQL: &str = concat!(
        "-- batch_get_issues\nSELECT ",
        listed_columns!(),
        " FROM unnest($1::uuid[]) WITH ORDINALITY AS wanted (id, nth) JOIN issues i ON i.id = wanted.id
        ORDER BY wanted.nth"
    );
    listed_page(db, SQL, &[&ids], bounds).await
}

/// Newest first.
pub async fn list(db: &Conn, wanted: &IssueList) -> Result<Page<Issue>> {
    let (sql, params) = list_statement(wanted);
    let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|param| &**param as _).collect();
    listed_page(db, &sql, &params, wanted.bounds).await
}

/// The statement of [`list`] and its parameters, which have all that a caller has written.
pub fn list_statement(wanted: &IssueList) -> (String, Vec<Box<dyn ToSql + Sync + Send>>) {
    let mut query = ListQuery::new(&wanted.filter, wanted.show_deleted);
    if let Some(after) = wanted.after {
        query.and(|n| format!("i.id < ${n}"), after);
    }
    // One more tells whether there are more.
    let limit_n = query.bind(wanted.bounds.rows_max as i64 + 1);
    // The page is cut before labels and comments are looked up.
    let sql = format!(
        "-- list_issues\nSELECT {} FROM (SELECT i.* FROM issues i{} WHERE {} ORDER BY i.id DESC LIMIT ${limit_n}) i \
         ORDER BY i.id DESC",
        listed_columns!(),
        query.joins,
        query.conditions.join(" AND "),
    );
    (sql, query.params)
}

/// Adds to each issue what a full view has of its comments. False: all of them together are more than `bytes_max`.
pub async fn add_comments(db: &Conn, issues: &mut [Issue], ids: &[Uuid], bytes_max: usize) -> Result<bool> {
    let comments = comments::first_of_each(db, ids, COMMENTS_IN_VIEW.rows_max as i64, bytes_max).await?;
    let mut by_issue: HashMap<Uuid, Vec<Comment>> = HashMap::new();
    for (id, comment) in comments.items {
        by_issue.entry(id).or_default().push(comment);
    }
    for (issue, id) in issues.iter_mut().zip(ids) {
        issue.comments = by_issue.remove(id).unwrap_or_default();
    }
    Ok(!comments.more)
}

/// Issues of `listed_columns!`. Few labels are on many issues: they are read once, behind the issues, so that an issue
/// never has labels that are older than its version.
async fn listed_page(db: &Conn, sql: &str, params: Params<'_>, bounds: PageBounds) -> Result<Page<Issue>> {
    const LABELS: &str = "-- labels_of_page
        SELECT id, name, description FROM labels WHERE id = ANY ($1) ORDER BY lower(name)";
    let from_row = |row: &Row| {
        let issue = Issue { comment_count: row.get(14), ..from_base_row(row, 0) };
        Ok((issue, row.get::<_, Vec<Uuid>>(15)))
    };
    let page = db.query_page(sql, params, bounds, from_row, |(issue, _)| issue.encoded_len()).await?;
    let mut label_ids: Vec<Uuid> = page.items.iter().flat_map(|(_, label_ids)| label_ids).copied().collect();
    label_ids.sort_unstable();
    label_ids.dedup();
    let labels = if label_ids.is_empty() { Vec::new() } else { db.query(LABELS, &[&label_ids]).await? };
    let label = |row: &Row| {
        let id: Uuid = row.get(0);
        Label { id: id.to_string(), name: row.get(1), description: row.get(2) }
    };
    let nth_of: HashMap<Uuid, usize> = labels.iter().enumerate().map(|(nth, row)| (row.get(0), nth)).collect();
    let labels: Vec<Label> = labels.iter().map(label).collect();

    let mut issues = Vec::with_capacity(page.items.len());
    let mut bytes = 0;
    for (mut issue, label_ids) in page.items {
        let mut nths: Vec<usize> = label_ids.iter().filter_map(|id| nth_of.get(id).copied()).collect();
        nths.sort_unstable();
        issue.labels = nths.into_iter().map(|nth| labels[nth].clone()).collect();
        bytes += issue.encoded_len();
        if bytes > bounds.bytes_max && !issues.is_empty() {
            return Ok(Page { items: issues, more: true });
        }
        issues.push(issue);
    }
    Ok(Page { items: issues, more: page.more })
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IssueList {
    pub filter: Filter,
    pub show_deleted: bool,
    /// The last issue of the page before.
    pub after: Option<Uuid>,
    pub bounds: PageBounds,
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
            // Not a parameter: it has to be seen that one of the indexes by status has all that is wanted.
            Term::Status(status) => self.conditions.push(format!("i.status = {}", *status as i16)),
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

#[cfg(test)]
mod tests {
    use super::like_pattern;

    #[test]
    fn wildcards_of_a_search_text_stand_for_themselves() {
        assert_eq!(like_pattern(r"100%_\"), r"%100\%\_\\%");
    }
}
