//! Listing issues.

use std::{collections::HashMap, sync::OnceLock};

use prost::Message;
use tokio_postgres::{Row, types::ToSql};
use uuid::Uuid;

use super::{get::VIEW_COMMENT_BOUNDS, row::IssueColumns};
use crate::{
    db::{
        comments,
        conn::{Conn, Params},
        labels,
        page::{Page, PageBounds},
        session::PreparedStatement,
    },
    error::Result,
    filter::{Filter, LabelRef, Term, UserRef},
    pb::{Comment, Issue, Label},
};

/// A page of a list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct IssueList {
    pub filter: Filter,
    pub show_deleted: bool,
    /// The last issue of the previous page.
    pub after: Option<Uuid>,
    pub bounds: PageBounds,
}

impl IssueList {
    /// Returns whether reading a page can take long: only lists that one index serves, newest first, read little more than
    /// they return.
    pub fn is_heavy(&self) -> bool {
        match &self.filter.terms[..] {
            [] => false,
            // The indexes by status leave deleted issues out.
            [Term::Status(_)] => self.show_deleted,
            [Term::Assignee(user)] => *user == UserRef::None,
            [Term::Reporter(_) | Term::Label(_)] => false,
            [Term::Priority(_) | Term::Search(_)] | [_, _, ..] => true,
        }
    }
}

/// Returns the issues with these ids, in the order of the ids, without those that do not exist. `more` if they exceed the
/// bounds.
pub async fn batch_get(db: &Conn, ids: &[Uuid], bounds: PageBounds) -> Result<Page<Issue>> {
    const SQL: &str = "-- batch_get_issues
        SELECT
            issue.id, issue.title, issue.description, issue.status, issue.priority, issue.assignee_id,
            issue.reporter_id, issue.version, issue.external_id, issue.create_time, issue.update_time, issue.close_time,
            issue.delete_time, issue.reopen_count,
            (SELECT count(*)::int4 FROM comments comment
                WHERE comment.issue_id = issue.id AND comment.delete_time IS NULL) AS comment_count,
            ARRAY(SELECT label_id FROM issue_labels issue_label WHERE issue_label.issue_id = issue.id) AS label_ids
        FROM unnest($1::uuid[]) WITH ORDINALITY AS requested (id, ordinal) JOIN issues issue ON issue.id = requested.id
        ORDER BY requested.ordinal";
    query_issues(db, &db.statement(SQL).await?, &[&ids], bounds).await
}

/// Returns a page of issues, newest first.
pub async fn list(db: &Conn, list: &IssueList) -> Result<Page<Issue>> {
    let (sql, params) = list_statement(list);
    let params: Vec<&(dyn ToSql + Sync)> = params.iter().map(|param| &**param as _).collect();
    // Heavy lists have many shapes, each of which would take memory on every connection.
    let statement = if list.is_heavy() { db.statement_once(&sql).await? } else { db.statement(&sql).await? };
    query_issues(db, &statement, &params, list.bounds).await
}

/// Returns the statement of [`list`] and its parameters. What the caller typed is only in the parameters.
pub fn list_statement(list: &IssueList) -> (String, Vec<Box<dyn ToSql + Sync + Send>>) {
    let mut query = FilterQuery::new(&list.filter, list.show_deleted);
    if let Some(after) = list.after {
        query.and(|n| format!("issue.id < ${n}"), after);
    }
    // One row more than the page shows whether there are more.
    let limit_n = query.bind(list.bounds.rows_max as i64 + 1);
    let FilterQuery { joins, conditions, params } = query;
    let conditions = conditions.join(" AND ");
    // The page is cut before labels and comments are looked up.
    let sql = format!(
        "-- list_issues
        SELECT
            issue.id, issue.title, issue.description, issue.status, issue.priority, issue.assignee_id,
            issue.reporter_id, issue.version, issue.external_id, issue.create_time, issue.update_time, issue.close_time,
            issue.delete_time, issue.reopen_count,
            (SELECT count(*)::int4 FROM comments comment
                WHERE comment.issue_id = issue.id AND comment.delete_time IS NULL) AS comment_count,
            ARRAY(SELECT label_id FROM issue_labels issue_label WHERE issue_label.issue_id = issue.id) AS label_ids
        FROM (
            SELECT issue.* FROM issues issue{joins} WHERE {conditions} ORDER BY issue.id DESC LIMIT ${limit_n}
        ) issue
        ORDER BY issue.id DESC"
    );
    (sql, params)
}

/// Adds to each issue its comments as in the full view. Returns false if all comments together exceed `bytes_max`.
pub async fn add_comments(db: &Conn, issues: &mut [Issue], ids: &[Uuid], bytes_max: usize) -> Result<bool> {
    let comments = comments::first_of_each(db, ids, VIEW_COMMENT_BOUNDS.rows_max as i64, bytes_max).await?;
    let mut by_issue: HashMap<Uuid, Vec<Comment>> = HashMap::new();
    for (id, comment) in comments.items {
        by_issue.entry(id).or_default().push(comment);
    }
    for (issue, id) in issues.iter_mut().zip(ids) {
        issue.comments = by_issue.remove(id).unwrap_or_default();
    }
    Ok(!comments.more)
}

/// Returns the issues of a statement that selects the columns of issues, `comment_count` and `label_ids`.
///
/// Many issues have few different labels: these are read once, after the issues, so that labels are never older than the
/// version of their issue.
async fn query_issues(
    db: &Conn,
    statement: &PreparedStatement,
    params: Params<'_>,
    bounds: PageBounds,
) -> Result<Page<Issue>> {
    const LABELS: &str = "-- labels_of_page
        SELECT id, name, description FROM labels WHERE id = ANY ($1) ORDER BY lower(name)";
    let columns: OnceLock<IssueColumns> = OnceLock::new();
    let from_row = |row: &Row| {
        let columns = match columns.get() {
            Some(columns) => columns,
            None => {
                let resolved = IssueColumns::of(row)?;
                columns.get_or_init(|| resolved)
            }
        };
        let issue = Issue { comment_count: row.get("comment_count"), ..columns.issue(row) };
        Ok((issue, row.get::<_, Vec<Uuid>>("label_ids")))
    };
    let page = db.query_prepared_page(statement, params, bounds, from_row, |(issue, _)| issue.encoded_len()).await?;
    let mut label_ids: Vec<Uuid> = page.items.iter().flat_map(|(_, label_ids)| label_ids).copied().collect();
    label_ids.sort_unstable();
    label_ids.dedup();
    let label_rows = if label_ids.is_empty() { Vec::new() } else { db.query(LABELS, &[&label_ids]).await? };
    let index_of: HashMap<Uuid, usize> =
        label_rows.iter().enumerate().map(|(index, row)| (row.get("id"), index)).collect();
    let labels: Vec<Label> = label_rows.iter().map(labels::from_row).collect();

    let mut issues = Vec::with_capacity(page.items.len());
    let mut bytes = 0;
    for (mut issue, label_ids) in page.items {
        let mut indexes: Vec<usize> = label_ids.iter().filter_map(|id| index_of.get(id).copied()).collect();
        indexes.sort_unstable();
        issue.labels = indexes.into_iter().map(|index| labels[index].clone()).collect();
        bytes += issue.encoded_len();
        if bytes > bounds.bytes_max && !issues.is_empty() {
            return Ok(Page { items: issues, more: true });
        }
        issues.push(issue);
    }
    Ok(Page { items: issues, more: page.more })
}

/// A filter as SQL on the table `issues issue`. The text depends only on the shape of the filter; its values are
/// parameters.
pub(super) struct FilterQuery {
    /// Follows `FROM issues issue`.
    pub joins: String,
    pub conditions: Vec<String>,
    pub params: Vec<Box<dyn ToSql + Sync + Send>>,
}

impl FilterQuery {
    pub fn new(filter: &Filter, show_deleted: bool) -> Self {
        let mut query = Self { joins: String::new(), conditions: Vec::new(), params: Vec::new() };
        query.conditions.push(if show_deleted { "true" } else { "issue.delete_time IS NULL" }.to_owned());
        for term in &filter.terms {
            query.term(term);
        }
        query
    }

    fn term(&mut self, term: &Term) {
        match term {
            // Not a parameter: the planner must see that a partial index by status contains all matches.
            Term::Status(status) => self.conditions.push(format!("issue.status = {}", *status as i16)),
            Term::Priority(priority) => self.and(|n| format!("issue.priority = ${n}"), *priority as i16),
            Term::Assignee(user) => self.user("issue.assignee_id", user),
            Term::Reporter(user) => self.user("issue.reporter_id", user),
            // Joined, so that the issues of a rare label are found by its index, in the order of the list.
            Term::Label(label) => {
                let joined = format!("issue_label_{}", self.params.len());
                self.joins += &format!(" JOIN issue_labels {joined} ON {joined}.issue_id = issue.id");
                match label {
                    LabelRef::Id(id) => self.and(|n| format!("{joined}.label_id = ${n}"), *id),
                    LabelRef::Name(name) => self.and(
                        |n| format!("{joined}.label_id = (SELECT id FROM labels WHERE lower(name) = lower(${n}))"),
                        name.clone(),
                    ),
                }
            }
            Term::Search(text) => {
                self.and(|n| format!("(issue.title ILIKE ${n} OR issue.description ILIKE ${n})"), like_pattern(text));
            }
        }
    }

    fn user(&mut self, column: &str, user: &UserRef) {
        match user {
            UserRef::None => self.conditions.push(format!("{column} IS NULL")),
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

    /// Adds a parameter. Returns its number.
    fn bind(&mut self, value: impl ToSql + Sync + Send + 'static) -> usize {
        self.params.push(Box::new(value));
        self.params.len()
    }
}

/// Returns a pattern for ILIKE that matches the text anywhere. Its wildcards are escaped.
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
    fn wildcards_in_a_search_text_are_escaped() {
        assert_eq!(like_pattern(r"100%_\"), r"%100\%\_\\%");
    }
}
