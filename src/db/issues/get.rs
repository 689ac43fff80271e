//! Reading issues by id.

use std::collections::HashMap;

use prost::Message;
use uuid::Uuid;

use super::row::{IssueColumns, issue_with_labels};
use crate::{
    batching::coalescer::Outcome,
    db::{
        comments,
        conn::{Conn, Params},
        labels,
        page::PageBounds,
    },
    error::{Error, Result},
    limits::RESPONSE_BYTES_MAX,
    pb::{Issue, IssueView},
};

/// Maximum comments in the full view of an issue.
pub(super) const VIEW_COMMENT_BOUNDS: PageBounds = PageBounds { rows_max: 1_000, bytes_max: RESPONSE_BYTES_MAX };
/// Maximum comments per issue that a batch of reads fetches. An issue with more is read individually.
const BATCH_COMMENTS_PER_ISSUE_MAX: i64 = 32;
/// Maximum size of all comments of a batch of reads, in bytes of their messages.
const BATCH_COMMENT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Maximum size of the issues that a batch of reads returns more than once, in bytes of their messages. Further ones are read
/// individually.
const BATCH_REPEATED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Returns an issue with its labels. `NotFound` names `id`.
pub async fn get(db: &Conn, id: Uuid) -> Result<Issue> {
    const SQL: &str = "-- get_issue
        SELECT
            issue.id, issue.title, issue.description, issue.status, issue.priority, issue.assignee_id,
            issue.reporter_id, issue.version, issue.external_id, issue.create_time, issue.update_time, issue.close_time,
            issue.delete_time, issue.reopen_count,
            (SELECT count(*)::int4 FROM comments comment
                WHERE comment.issue_id = issue.id AND comment.delete_time IS NULL) AS comment_count,
            carried.label_ids, carried.label_names, carried.label_descriptions
        FROM issues issue
        LEFT JOIN LATERAL (
            SELECT
                array_agg(label.id ORDER BY lower(label.name)) AS label_ids,
                array_agg(label.name ORDER BY lower(label.name)) AS label_names,
                array_agg(label.description ORDER BY lower(label.name)) AS label_descriptions
            FROM issue_labels issue_label JOIN labels label ON label.id = issue_label.label_id
            WHERE issue_label.issue_id = issue.id
        ) carried ON true
        WHERE issue.id = $1";
    let row = db.query_opt(SQL, &[&id]).await?;
    row.as_ref().map_or_else(|| Err(Error::not_found("issue", "id", id)), issue_with_labels)
}

/// Returns an issue, with its first comments in the full view: two pipelined statements.
pub async fn get_in_view(db: &Conn, id: Uuid, view: IssueView) -> Result<Issue> {
    if view != IssueView::Full {
        return get(db, id).await;
    }
    let limit = VIEW_COMMENT_BOUNDS.rows_max as i64 + 1;
    let (issue, comments) = tokio::join!(biased; get(db, id), comments::list(db, id, None, limit, VIEW_COMMENT_BOUNDS));
    let mut issue = issue?;
    issue.comments = comments?.items;
    Ok(issue)
}

/// Executes many calls of [`get_in_view`] in three pipelined statements. Returns their outcomes in order.
pub async fn get_many(db: &Conn, requested: &[(Uuid, IssueView)]) -> Result<Vec<Outcome<Issue>>> {
    // Issues are read first: labels and comments are never older than the version of their issue.
    const ISSUES: &str = "-- get_issues
        SELECT
            issue.id, issue.title, issue.description, issue.status, issue.priority, issue.assignee_id,
            issue.reporter_id, issue.version, issue.external_id, issue.create_time, issue.update_time, issue.close_time,
            issue.delete_time, issue.reopen_count,
            CASE WHEN issue.id <> ALL ($2) THEN
                (SELECT count(*)::int4 FROM comments comment
                    WHERE comment.issue_id = issue.id AND comment.delete_time IS NULL)
            END AS comment_count
        FROM issues issue WHERE issue.id = ANY ($1)";
    const LABELS: &str = "-- get_labels_of_issues
        SELECT issue_label.issue_id, label.id, label.name, label.description
        FROM issue_labels issue_label JOIN labels label ON label.id = issue_label.label_id
        WHERE issue_label.issue_id = ANY ($1) ORDER BY lower(label.name)";

    let ids: Vec<Uuid> = requested.iter().map(|(id, _)| *id).collect();
    let full_views = requested.iter().filter(|(_, view)| *view == IssueView::Full);
    let mut full_ids: Vec<Uuid> = full_views.map(|(id, _)| *id).collect();
    full_ids.sort_unstable();
    full_ids.dedup();
    let (issue_params, label_params): (Params, Params) = (&[&ids, &full_ids], &[&ids]);
    let (issues, label_rows, comments) = tokio::join!(
        biased;
        db.query(ISSUES, issue_params),
        db.query(LABELS, label_params),
        comments::first_of_each(db, &full_ids, BATCH_COMMENTS_PER_ISSUE_MAX + 1, BATCH_COMMENT_BYTES_MAX)
    );
    let (label_rows, comments) = (label_rows?, comments?);

    let mut found: HashMap<Uuid, Issue> = HashMap::with_capacity(ids.len());
    let issues = issues?;
    let columns = issues.first().map(IssueColumns::of).transpose()?;
    for (row, columns) in issues.iter().zip(columns.iter().cycle()) {
        let mut issue = columns.issue(row);
        issue.comment_count = row.get::<_, Option<i32>>("comment_count").unwrap_or_default();
        found.insert(row.get("id"), issue);
    }
    for row in label_rows {
        if let Some(issue) = found.get_mut(&row.get("issue_id")) {
            issue.labels.push(labels::from_row(&row));
        }
    }
    for (id, comment) in comments.items {
        if let Some(issue) = found.get_mut(&id) {
            issue.comment_count += i32::from(comment.delete_time.is_none());
            issue.comments.push(comment);
        }
    }
    // If comments were cut off, any of the full views can be incomplete.
    let incomplete_ids = if comments.more { &full_ids[..] } else { &[] };
    Ok(outcomes(requested, found, incomplete_ids))
}

/// Returns the outcomes of [`get_many`]. `incomplete_ids` are sorted.
fn outcomes(
    requested: &[(Uuid, IssueView)],
    mut found: HashMap<Uuid, Issue>,
    incomplete_ids: &[Uuid],
) -> Vec<Outcome<Issue>> {
    let mut outcomes: Vec<Outcome<Issue>> = Vec::with_capacity(requested.len());
    let mut repeated_bytes = 0;
    for (index, (id, view)) in requested.iter().enumerate() {
        let comment_count = found.get(id).map_or(0, |issue| issue.comments.len() as i64);
        if comment_count > BATCH_COMMENTS_PER_ISSUE_MAX || incomplete_ids.binary_search(id).is_ok() {
            outcomes.push(Outcome::Individual);
            continue;
        }
        // Cloned only if a later call requests the same issue.
        let is_requested_again = requested[index + 1..].iter().any(|(other, _)| other == id);
        if is_requested_again && let Some(issue) = found.get(id) {
            let bytes = issue.encoded_len();
            if repeated_bytes + bytes > BATCH_REPEATED_BYTES_MAX {
                outcomes.push(Outcome::Individual);
                continue;
            }
            repeated_bytes += bytes;
        }
        let issue = if is_requested_again { found.get(id).cloned() } else { found.remove(id) };
        outcomes.push(Outcome::Done(match issue {
            Some(issue) if *view == IssueView::Full => Ok(issue),
            Some(issue) => Ok(Issue { comments: Vec::new(), ..issue }),
            None => Err(Error::not_found("issue", "id", id)),
        }));
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::Comment;

    #[test]
    fn issue_that_many_calls_request_is_cloned_up_to_a_size() {
        let id = Uuid::from_u128(1);
        let comment = Comment { content: "x".repeat(64 * 1024), ..Comment::default() };
        let issue = Issue { id: id.to_string(), comments: vec![comment; 32], ..Issue::default() };
        let bytes = issue.encoded_len();
        let requested = [(id, IssueView::Full); 64];
        let outcomes = outcomes(&requested, HashMap::from([(id, issue.clone())]), &[]);
        let is_done = |outcome: &&Outcome<Issue>| match outcome {
            Outcome::Done(found) => *found.as_ref().unwrap() == issue,
            Outcome::Individual => false,
        };
        // The last call gets the issue itself.
        assert_eq!(outcomes.iter().filter(is_done).count(), 1 + BATCH_REPEATED_BYTES_MAX / bytes);
        assert!(matches!(outcomes[63], Outcome::Done(_)));
    }
}
