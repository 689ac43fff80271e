//! Replays the history of every issue backwards, from its row to its creation, and compares each version with the responses
//! that clients received.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use issue_tracker::pb::{BatchCreateIssuesResponse, Issue};
use prost::Message;
use tokio_postgres::{Client, Row};

use crate::load::{CompletedMutation, Kind};

/// The fields that the history records, by their names in it; `label` is a set.
const FIELDS: [&str; 7] = ["title", "description", "status", "priority", "assignee_id", "external_id", "deleted"];

/// What the history records of an issue at a version.
#[derive(Clone, Debug, PartialEq)]
struct Version {
    fields: BTreeMap<&'static str, Option<String>>,
    label_ids: BTreeSet<String>,
    /// How often the status changed from CLOSED to another.
    reopen_count: i32,
}

impl Version {
    fn of_response(issue: &Issue) -> Self {
        let set = |value: &str| (!value.is_empty()).then(|| value.to_owned());
        let priority = issue.priority().as_str_name().trim_start_matches("PRIORITY_").replace("UNSPECIFIED", "NONE");
        let fields = [
            ("title", Some(issue.title.clone())),
            ("description", Some(issue.description.clone())),
            ("status", set(issue.status().as_str_name().trim_start_matches("STATUS_"))),
            ("priority", Some(priority)),
            ("assignee_id", set(&issue.assignee_id)),
            ("external_id", set(&issue.external_id)),
            ("deleted", Some(issue.delete_time.is_some().to_string())),
        ];
        Self {
            fields: fields.into(),
            label_ids: issue.labels.iter().map(|label| label.id.clone()).collect(),
            reopen_count: issue.reopen_count,
        }
    }

    fn of_row(row: &Row) -> Self {
        Self {
            fields: FIELDS.map(|field| (field, row.get(field))).into(),
            label_ids: row.get::<_, Vec<String>>("label_ids").into_iter().collect(),
            reopen_count: row.get("reopen_count"),
        }
    }

    /// Undoes a change. Panics if the new value is not the current one.
    fn undo(&mut self, event: &Event) {
        let Event { field, old_value, new_value, .. } = event;
        if field == "label" {
            let is_undone = match (old_value, new_value) {
                (None, Some(added)) => self.label_ids.remove(added),
                (Some(removed), None) => self.label_ids.insert(removed.clone()),
                _ => panic!("a label is neither added nor removed: {event:?}"),
            };
            assert!(is_undone, "{event:?}, but then the labels were {:?}", self.label_ids);
            return;
        }
        let value = self.fields.get_mut(&**field).unwrap_or_else(|| panic!("an unknown field: {event:?}"));
        assert!(*value == *new_value && old_value != new_value, "{event:?}, but then the value was {value:?}");
        self.reopen_count -= i32::from(field == "status" && old_value.as_deref() == Some("CLOSED"));
        value.clone_from(old_value);
    }
}

#[derive(Debug)]
struct Event {
    version: i64,
    field: String,
    old_value: Option<String>,
    new_value: Option<String>,
}

/// Returns the events of each issue, the latest first.
async fn events(rows: &Client) -> HashMap<String, Vec<Event>> {
    const SQL: &str = "SELECT issue_id::text, version, field, old_value, new_value FROM issue_events
        ORDER BY version DESC, id DESC";
    let mut events: HashMap<String, Vec<Event>> = HashMap::new();
    for row in rows.query(SQL, &[]).await.unwrap() {
        events.entry(row.get("issue_id")).or_default().push(Event {
            version: row.get("version"),
            field: row.get("field"),
            old_value: row.get("old_value"),
            new_value: row.get("new_value"),
        });
    }
    events
}

/// Returns the issues in the responses, by id and version.
fn responses(mutations: &[CompletedMutation]) -> HashMap<(String, i64), Vec<Version>> {
    let mut versions: HashMap<(String, i64), Vec<Version>> = HashMap::new();
    for mutation in mutations {
        let Some(response) = mutation.response.as_deref() else { continue };
        let issues = match mutation.kind {
            Kind::Create | Kind::Update | Kind::Labels | Kind::Delete | Kind::Undelete => {
                vec![Issue::decode(response).unwrap()]
            }
            Kind::BatchCreate => BatchCreateIssuesResponse::decode(response).unwrap().issues,
            Kind::Bulk | Kind::Comment => Vec::new(),
        };
        for issue in issues {
            versions.entry((issue.id.clone(), issue.version)).or_default().push(Version::of_response(&issue));
        }
    }
    versions
}

/// Asserts that the history of each issue leads to its row, through all versions in responses.
pub async fn assert_rows_follow_from_history(rows: &Client, mutations: &[CompletedMutation]) {
    const SQL: &str = "SELECT id::text, version, title, description, external_id, reopen_count,
            assignee_id::text, (delete_time IS NOT NULL)::text AS deleted,
            (ARRAY['OPEN', 'IN_PROGRESS', 'CLOSED'])[status] AS status,
            (ARRAY['NONE', 'LOW', 'MEDIUM', 'HIGH', 'CRITICAL'])[priority + 1] AS priority,
            ARRAY(SELECT label_id::text FROM issue_labels WHERE issue_id = issues.id) AS label_ids
        FROM issues";
    let (responses, mut events) = (responses(mutations), events(rows).await);
    for row in rows.query(SQL, &[]).await.unwrap() {
        let (id, mut version, mut issue): (String, i64, _) = (row.get("id"), row.get("version"), Version::of_row(&row));
        let mut events = events.remove(&id).unwrap_or_default().into_iter().peekable();
        while version > 0 {
            for response in responses.get(&(id.clone(), version)).into_iter().flatten() {
                assert_eq!(&issue, response, "{id} at version {version}, according to its history, and in a response");
            }
            while let Some(event) = events.next_if(|event| event.version == version) {
                issue.undo(&event);
            }
            version -= 1;
        }
        assert!(events.peek().is_none(), "{id} has never had the version of {:?}", events.peek());
    }
    assert!(events.is_empty(), "events of issues that do not exist: {:?}", events.keys());
}
