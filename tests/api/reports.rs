//! `ReportService`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use issue_tracker::{
    db::time::timestamp,
    pb::{
        BulkUpdateStatusRequest, DeleteIssueRequest, GetResolutionLatencyRequest, GetTopAssigneesRequest,
        GetTopAssigneesResponse, Issue, IssueScope, LatencyGroupBy, Priority, Role,
        Status::{self, Closed, InProgress, Open},
        UndeleteIssueRequest, UpdateIssueRequest,
        get_resolution_latency_response::{Group, group::Key},
    },
};
use proptest::{prelude::*, test_runner::TestRunner};
use prost_types::{Duration, Timestamp};
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_invalid};

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3_600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// Returns the time `offset` microseconds after a fixed time in 2025.
fn at(offset: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(1_740_000_000 * SECOND + offset).unwrap()
}

fn timestamp_at(offset: i64) -> Option<Timestamp> {
    Some(timestamp(at(offset)))
}

/// An issue with given times. `created` is in microseconds, see [`at`].
#[derive(Clone, Debug)]
struct PastIssue {
    status: Status,
    created: i64,
    /// Microseconds from creation to closing. Used only if the status is `Closed`.
    resolution: i64,
    priority: Priority,
    assignee: Option<String>,
    labels: Vec<String>,
    deleted: bool,
}

impl PastIssue {
    fn new(status: Status) -> Self {
        let (priority, labels) = (Priority::Unspecified, Vec::new());
        Self { status, created: 0, resolution: 0, priority, assignee: None, labels, deleted: false }
    }

    fn closed(resolution: i64) -> Self {
        Self { resolution, ..Self::new(Closed) }
    }

    fn assigned_to(self, client: &Client) -> Self {
        Self { assignee: Some(client.user.id.clone()), ..self }
    }

    fn closed_at(&self) -> Option<i64> {
        (self.status == Closed).then_some(self.created + self.resolution)
    }
}

/// Inserts the issues with SQL and returns their ids.
async fn insert(tracker: &Tracker, issues: &[PastIssue]) -> Vec<String> {
    let sql = "WITH i AS (
            INSERT INTO issues (id, reporter_id, title, description, status, priority, assignee_id, create_time,
                update_time, close_time, delete_time)
            SELECT id, $1, 'past', '', status, priority, assignee_id, created, created, closed, deleted
            FROM unnest($2::uuid[], $3::int2[], $4::int2[], $5::uuid[], $6::timestamptz[], $7::timestamptz[],
                $8::timestamptz[]) AS n (id, status, priority, assignee_id, created, closed, deleted)
        ) INSERT INTO issue_labels SELECT * FROM unnest($9::uuid[], $10::uuid[])";
    let ids: Vec<Uuid> = issues.iter().map(|_| Uuid::now_v7()).collect();
    let uuid = |id: &String| id.parse::<Uuid>().unwrap();
    let (labelled, labels): (Vec<Uuid>, Vec<Uuid>) =
        ids.iter().zip(issues).flat_map(|(id, issue)| issue.labels.iter().map(|label| (*id, uuid(label)))).unzip();
    tracker
        .sql(
            sql,
            &[
                &uuid(&tracker.member.user.id),
                &ids,
                &issues.iter().map(|issue| issue.status as i16).collect::<Vec<_>>(),
                &issues.iter().map(|issue| issue.priority as i16).collect::<Vec<_>>(),
                &issues.iter().map(|issue| issue.assignee.as_ref().map(uuid)).collect::<Vec<_>>(),
                &issues.iter().map(|issue| at(issue.created)).collect::<Vec<_>>(),
                &issues.iter().map(|issue| issue.closed_at().map(at)).collect::<Vec<_>>(),
                &issues.iter().map(|issue| issue.deleted.then(|| at(issue.created))).collect::<Vec<_>>(),
                &labelled,
                &labels,
            ],
        )
        .await;
    ids.iter().map(ToString::to_string).collect()
}

async fn top_assignees(tracker: &Tracker, request: GetTopAssigneesRequest) -> GetTopAssigneesResponse {
    tracker.viewer.reports().get_top_assignees(request).await.unwrap().into_inner()
}

/// Returns usernames and issue counts.
fn issue_counts(response: &GetTopAssigneesResponse) -> Vec<(&str, i64)> {
    let share = |share: &issue_tracker::pb::get_top_assignees_response::Assignee| share.issue_count;
    response.assignees.iter().map(|a| (&*a.user.as_ref().unwrap().username, share(a))).collect()
}

async fn latency(tracker: &Tracker, request: GetResolutionLatencyRequest) -> Vec<Group> {
    tracker.viewer.reports().get_resolution_latency(request).await.unwrap().into_inner().groups
}

async fn latency_by(tracker: &Tracker, group_by: LatencyGroupBy) -> Vec<Group> {
    latency(tracker, GetResolutionLatencyRequest { group_by: group_by.into(), ..Default::default() }).await
}

/// Returns the only group of the ungrouped report over all issues.
async fn ungrouped(tracker: &Tracker) -> Group {
    let groups = latency_by(tracker, LatencyGroupBy::Unspecified).await;
    let [group] = &groups[..] else { panic!("expected one group, got {groups:?}") };
    assert_eq!(group.key, None);
    group.clone()
}

fn micros(duration: Option<Duration>) -> i64 {
    let duration = duration.expect("a duration");
    duration.seconds * SECOND + i64::from(duration.nanos) / 1_000
}

async fn set_status(tracker: &Tracker, id: &str, status: Status) -> Issue {
    let ids = vec![id.to_owned()];
    let request = BulkUpdateStatusRequest { ids, status: status.into(), ..Default::default() };
    tracker.member.issues().bulk_update_status(request).await.unwrap();
    tracker.member.get(id).await
}

#[tokio::test]
async fn top_assignees_are_ordered_by_count_then_username() {
    let tracker = Tracker::start().await;
    let mut users = Vec::new();
    for name in ["Zoe", "anna", "Bert", "carl", "Dora", "emil"] {
        users.push(tracker.user(name, Role::Member).await);
    }
    let [zoe, anna, bert, carl, dora, emil] = &users[..] else { unreachable!("six") };
    for user in [zoe, zoe, zoe, dora, bert, anna, emil, carl, carl] {
        insert(&tracker, &[PastIssue::new(Open).assigned_to(user)]).await;
    }
    insert(&tracker, &[PastIssue::new(Open)]).await;

    let response = top_assignees(&tracker, GetTopAssigneesRequest::default()).await;

    assert_eq!(
        issue_counts(&response),
        [("Zoe", 3), ("carl", 2), ("anna", 1), ("Bert", 1), ("Dora", 1)],
        "the default limit is 5"
    );
    assert_eq!(response.assignees[0].user.as_ref(), Some(&zoe.user));
    let two = top_assignees(&tracker, GetTopAssigneesRequest { limit: 2, ..Default::default() }).await;
    assert_eq!(issue_counts(&two), [("Zoe", 3), ("carl", 2)]);
}

#[tokio::test]
async fn limit_is_capped_at_100_and_invalid_when_negative() {
    let tracker = Tracker::start().await;
    let users = "INSERT INTO users (id, username, password_hash, role)
        SELECT gen_random_uuid(), 'user' || n, '', 2 FROM generate_series(1, 101) n RETURNING id";
    let users = tracker.sql(users, &[]).await;
    let assigned = |id: Uuid| PastIssue { assignee: Some(id.to_string()), ..PastIssue::new(Open) };
    insert(&tracker, &users.iter().map(|row| assigned(row.get(0))).collect::<Vec<_>>()).await;

    for (limit, count) in [(101, 100), (i32::MAX, 100), (99, 99)] {
        let response = top_assignees(&tracker, GetTopAssigneesRequest { limit, ..Default::default() }).await;
        assert_eq!(response.assignees.len(), count);
    }
    let request = GetTopAssigneesRequest { limit: -1, ..Default::default() };
    assert_invalid(tracker.viewer.reports().get_top_assignees(request).await, &["limit"]);
}

#[tokio::test]
async fn scope_selects_whether_closed_issues_count() {
    let tracker = Tracker::start().await;
    let assigned = |status| PastIssue::new(status).assigned_to(&tracker.member);
    insert(&tracker, &[Open, Open, InProgress, InProgress, InProgress, Closed].map(assigned)).await;
    insert(
        &tracker,
        &[PastIssue { deleted: true, ..assigned(Open) }, PastIssue::closed(1).assigned_to(&tracker.admin)],
    )
    .await;
    let counts = |response: GetTopAssigneesResponse| {
        let counts = |a: &issue_tracker::pb::get_top_assignees_response::Assignee| {
            [a.issue_count, a.open_count, a.in_progress_count, a.closed_count]
        };
        response.assignees.iter().map(counts).collect::<Vec<_>>()
    };

    for scope in [IssueScope::Unspecified, IssueScope::Open] {
        let request = GetTopAssigneesRequest { scope: scope.into(), ..Default::default() };
        assert_eq!(counts(top_assignees(&tracker, request).await), [[5, 2, 3, 0]]);
    }
    let request = GetTopAssigneesRequest { scope: IssueScope::All.into(), ..Default::default() };
    assert_eq!(counts(top_assignees(&tracker, request).await), [[6, 2, 3, 1], [1, 0, 0, 1]]);
}

#[tokio::test]
async fn time_window_includes_its_start_and_excludes_its_end() {
    let tracker = Tracker::start().await;
    let created =
        |created| PastIssue { created, resolution: HOUR, ..PastIssue::closed(0) }.assigned_to(&tracker.member);
    insert(&tracker, &[created(0), created(1), created(DAY - 1), created(DAY)]).await;

    for (start, end, count) in [
        (Some(0), Some(DAY), 3),
        (Some(1), Some(DAY + 1), 3),
        (None, Some(0), 0),
        (Some(DAY), None, 1),
        (None, None, 4),
    ] {
        // The first report selects by create_time, the second by close_time, which is an hour later.
        let window = [start, end].map(|offset| offset.and_then(timestamp_at));
        let [start_time, end_time] = window;
        let scope = IssueScope::All.into();
        let request = GetTopAssigneesRequest { start_time, end_time, scope, ..Default::default() };
        let counted: i64 = issue_counts(&top_assignees(&tracker, request).await).iter().map(|(_, count)| count).sum();
        let [start_time, end_time] = [start, end].map(|offset| offset.and_then(|offset| timestamp_at(offset + HOUR)));
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_eq!((counted, latency(&tracker, request).await[0].count), (count, count), "{start:?}, {end:?}");
    }
}

#[tokio::test]
async fn reversed_windows_and_invalid_timestamps_are_rejected() {
    let tracker = Tracker::start().await;
    let seconds = |seconds, nanos| Some(Timestamp { seconds, nanos });
    for (start_time, end_time, fields) in [
        (timestamp_at(1), timestamp_at(0), &["end_time"][..]),
        (seconds(i64::MAX, 0), seconds(i64::MIN, 0), &["start_time", "end_time"]),
        (seconds(253_402_300_800, 0), None, &["start_time"]),
        (seconds(-62_135_596_801, 999_999_999), None, &["start_time"]),
        (None, seconds(0, -1), &["end_time"]),
        (None, seconds(0, 1_000_000_000), &["end_time"]),
        // Timestamps have no leap seconds.
        (None, seconds(59, 1_000_000_000), &["end_time"]),
    ] {
        let request = GetTopAssigneesRequest { start_time, end_time, ..Default::default() };
        assert_invalid(tracker.viewer.reports().get_top_assignees(request).await, fields);
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_invalid(tracker.viewer.reports().get_resolution_latency(request).await, fields);
    }
    // The minimum and maximum timestamps are valid, and so is an empty window.
    for (start_time, end_time) in
        [(seconds(-62_135_596_800, 0), seconds(253_402_300_799, 999_999_999)), (timestamp_at(0), timestamp_at(0))]
    {
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_eq!(latency(&tracker, request).await[0].count, 0);
        let request = GetTopAssigneesRequest { start_time, end_time, ..Default::default() };
        assert_eq!(issue_counts(&top_assignees(&tracker, request).await), []);
    }
}

#[tokio::test]
async fn unknown_scopes_and_groupings_are_invalid() {
    let tracker = Tracker::start().await;
    let request = GetTopAssigneesRequest { limit: -7, scope: 3, ..Default::default() };
    assert_invalid(tracker.viewer.reports().get_top_assignees(request).await, &["limit", "scope"]);
    for group_by in [5, -1] {
        let request = GetResolutionLatencyRequest { group_by, ..Default::default() };
        assert_invalid(tracker.viewer.reports().get_resolution_latency(request).await, &["group_by"]);
    }
}

#[tokio::test]
async fn latency_has_the_average_and_interpolated_percentiles() {
    let tracker = Tracker::start().await;
    insert(&tracker, &[30, 10, 100, 20, 40].map(|seconds| PastIssue::closed(seconds * SECOND))).await;
    insert(
        &tracker,
        &[PastIssue::new(Open), PastIssue::new(InProgress), PastIssue { deleted: true, ..PastIssue::closed(DAY) }],
    )
    .await;

    let group = ungrouped(&tracker).await;

    let statistics = [group.average, group.p50, group.p90, group.p95, group.p99].map(micros);
    assert_eq!((group.count, statistics), (5, [40_000_000, 30_000_000, 76_000_000, 88_000_000, 97_600_000]));
}

#[tokio::test]
async fn sum_of_durations_may_exceed_64_bit_microseconds() {
    let tracker = Tracker::start().await;
    // The longest duration that an import accepts. Ten million issues of a year each have the same sum.
    let forever = "INSERT INTO issues (id, reporter_id, title, description, status, priority, create_time, close_time)
        SELECT gen_random_uuid(), $1, 'old', '', 3, 0, '0001-01-01 00:00Z', '9999-12-31 00:00Z'
        FROM generate_series(1, 1000)";
    tracker.sql(forever, &[&tracker.member.user.id.parse::<Uuid>().unwrap()]).await;

    let group = ungrouped(&tracker).await;

    let days = [group.average, group.p50, group.p99].map(|time| time.unwrap().seconds / 86_400);
    assert_eq!((group.count, days), (1_000, [3_652_058; 3]));
}

#[tokio::test]
async fn without_closed_issues_the_ungrouped_report_has_one_empty_group_and_others_none() {
    let tracker = Tracker::start().await;
    insert(&tracker, &[PastIssue::new(Open), PastIssue { deleted: true, ..PastIssue::closed(1) }]).await;

    assert_eq!(ungrouped(&tracker).await, Group::default());
    for group_by in [LatencyGroupBy::Priority, LatencyGroupBy::Assignee, LatencyGroupBy::Label] {
        assert_eq!(latency_by(&tracker, group_by).await, []);
    }
}

#[tokio::test]
async fn changes_to_a_closed_issue_do_not_change_its_latency() {
    let tracker = Tracker::start().await;
    let id = &insert(&tracker, &[PastIssue::new(Open)]).await[0];
    let closed = set_status(&tracker, id, Closed).await;
    let report = ungrouped(&tracker).await;
    let resolution = closed.close_time.unwrap().seconds - closed.create_time.unwrap().seconds;
    assert!((micros(report.p50) / SECOND - resolution).abs() <= 1, "{report:?}");

    let edited = Issue { title: "edited".into(), priority: Priority::High.into(), ..closed };
    let request = UpdateIssueRequest { issue: Some(edited), comment: "done, really".into(), ..Default::default() };
    tracker.member.issues().update_issue(request).await.unwrap();
    tracker.member.comment(id, "thanks").await;
    set_status(&tracker, id, Closed).await;

    assert_eq!(ungrouped(&tracker).await, report);
}

#[tokio::test]
async fn reopened_issue_counts_from_its_creation_to_its_last_closing() {
    let tracker = Tracker::start().await;
    let id = &insert(&tracker, &[PastIssue::closed(HOUR)]).await[0];
    assert_eq!(micros(ungrouped(&tracker).await.p50), HOUR);

    let reopened = set_status(&tracker, id, InProgress).await;
    assert_eq!((reopened.reopen_count, reopened.close_time), (1, None));
    assert_eq!(ungrouped(&tracker).await, Group::default());
    let closed = set_status(&tracker, id, Closed).await;

    let (last, group) = (closed.close_time.unwrap(), ungrouped(&tracker).await);
    let last = last.seconds * SECOND + i64::from(last.nanos) / 1_000;
    assert_eq!((group.count, micros(group.p50)), (1, last - at(0).timestamp_micros()));
}

#[tokio::test]
async fn deleted_issue_does_not_count_until_it_is_undeleted() {
    let tracker = Tracker::start().await;
    let id = &insert(&tracker, &[PastIssue::closed(HOUR).assigned_to(&tracker.member)]).await[0];
    let report = ungrouped(&tracker).await;
    let all = GetTopAssigneesRequest { scope: IssueScope::All.into(), ..Default::default() };

    let request = DeleteIssueRequest { id: id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(request).await.unwrap();
    assert_eq!((ungrouped(&tracker).await.count, issue_counts(&top_assignees(&tracker, all).await)), (0, vec![]));
    let request = UndeleteIssueRequest { id: id.clone(), ..Default::default() };
    tracker.member.issues().undelete_issue(request).await.unwrap();

    assert_eq!(ungrouped(&tracker).await, report);
    assert_eq!(issue_counts(&top_assignees(&tracker, all).await), [("member", 1)]);
}

#[tokio::test]
async fn groups_are_ordered_by_count_and_keyed_by_user_label_or_priority() {
    let tracker = Tracker::start().await;
    let (bug, ui) = (tracker.member.label("bug").await, tracker.member.label("ui").await);
    let both = vec![bug.id.clone(), ui.id.clone()];
    let high = PastIssue { priority: Priority::High, ..PastIssue::closed(HOUR) };
    let issues = [
        PastIssue { labels: both, ..high.clone().assigned_to(&tracker.member) },
        PastIssue { labels: vec![ui.id.clone()], ..high.assigned_to(&tracker.member) },
        PastIssue { labels: vec![ui.id.clone()], ..PastIssue::closed(3 * HOUR) },
        PastIssue::closed(5 * HOUR).assigned_to(&tracker.member),
        PastIssue { priority: Priority::Low, ..PastIssue::closed(7 * HOUR) },
        PastIssue { priority: Priority::Unspecified, ..PastIssue::closed(9 * HOUR) },
    ];
    insert(&tracker, &issues).await;
    let row = |group: &Group| (group.key.clone(), group.count, micros(group.average) / HOUR);
    let rows = async |group_by| latency_by(&tracker, group_by).await.iter().map(row).collect::<Vec<_>>();

    let priority = |priority: Priority| Some(Key::Priority(priority.into()));
    let by_priority =
        [(priority(Priority::Unspecified), 3, 5), (priority(Priority::High), 2, 1), (priority(Priority::Low), 1, 7)];
    assert_eq!(rows(LatencyGroupBy::Priority).await, by_priority);
    let mut by_assignee = rows(LatencyGroupBy::Assignee).await;
    by_assignee.sort_by_key(|(key, ..)| key.is_none());
    assert_eq!(by_assignee, [(Some(Key::Assignee(tracker.member.user.clone())), 3, 2), (None, 3, 6)]);
    let mut by_label = rows(LatencyGroupBy::Label).await;
    assert!(by_label.is_sorted_by_key(|(_, count, _)| -count), "{by_label:?}");
    by_label.sort_by_key(|(key, ..)| key.is_none());
    assert_eq!(by_label, [(Some(Key::Label(ui)), 3, 1), (Some(Key::Label(bug)), 1, 1), (None, 3, 7)]);
}

#[tokio::test]
async fn grouped_report_returns_the_first_1000_groups() {
    let tracker = Tracker::start().await;
    let sql = "INSERT INTO labels (id, name) SELECT gen_random_uuid(), 'label ' || n FROM generate_series(1, 1005) n
        RETURNING id::text";
    let labels: Vec<String> = tracker.sql(sql, &[]).await.iter().map(|row| row.get(0)).collect();
    let popular = vec![labels[1_004].clone()];
    insert(
        &tracker,
        &[PastIssue { labels, ..PastIssue::closed(1) }, PastIssue { labels: popular.clone(), ..PastIssue::closed(1) }],
    )
    .await;

    let groups = latency_by(&tracker, LatencyGroupBy::Label).await;

    assert_eq!((groups.len(), groups[0].count), (1_000, 2));
    assert!(matches!(&groups[0].key, Some(Key::Label(label)) if label.id == popular[0]));
}

/// The key of a group as an ordered value.
type KeyText = Option<String>;

fn key_text(key: &Option<Key>) -> KeyText {
    key.as_ref().map(|key| match key {
        Key::Priority(priority) => priority.to_string(),
        Key::Assignee(user) => user.id.clone(),
        Key::Label(label) => label.id.clone(),
    })
}

fn keys(issue: &PastIssue, group_by: LatencyGroupBy) -> Vec<KeyText> {
    match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => vec![None],
        LatencyGroupBy::Priority => vec![Some((issue.priority as i32).to_string())],
        LatencyGroupBy::Assignee => vec![issue.assignee.clone()],
        LatencyGroupBy::Label if issue.labels.is_empty() => vec![None],
        LatencyGroupBy::Label => issue.labels.iter().cloned().map(Some).collect(),
    }
}

/// Returns the count, and the average, p50, p90, p95 and p99 in microseconds, with linear interpolation.
fn statistics(mut resolution: Vec<i64>) -> (i64, [f64; 5]) {
    resolution.sort_unstable();
    let average = resolution.iter().sum::<i64>() as f64 / resolution.len() as f64;
    let percentile = |p: f64| {
        let rank = p * (resolution.len() - 1) as f64;
        let (low, high) = (resolution[rank.floor() as usize] as f64, resolution[rank.ceil() as usize] as f64);
        low + (high - low) * rank.fract()
    };
    (resolution.len() as i64, [average, percentile(0.5), percentile(0.9), percentile(0.95), percentile(0.99)])
}

fn past_issue(assignees: Vec<String>, labels: Vec<String>) -> impl Strategy<Value = PastIssue> {
    let priorities = vec![Priority::Unspecified, Priority::Low, Priority::Medium, Priority::High, Priority::Critical];
    (
        prop_oneof![1 => Just(Open), 1 => Just(InProgress), 6 => Just(Closed)],
        0..20 * DAY,
        prop_oneof![Just(0), 0..SECOND, 0..40 * DAY, 0..4_000 * DAY],
        proptest::sample::select(priorities),
        proptest::option::of(proptest::sample::select(assignees)),
        proptest::sample::subsequence(labels, 0..=3),
        proptest::bool::weighted(0.1),
    )
        .prop_map(|(status, created, resolution, priority, assignee, labels, deleted)| PastIssue {
            status,
            created,
            resolution,
            priority,
            assignee,
            labels,
            deleted,
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn latency_equals_a_naive_computation() {
    let tracker = Tracker::start().await;
    let mut labels = Vec::new();
    for name in ["a", "b", "c"] {
        labels.push(tracker.member.label(name).await.id);
    }
    let assignees = [&tracker.admin, &tracker.member, &tracker.viewer].map(|client| client.user.id.clone());
    let bound = || proptest::option::of(0..30 * DAY);
    let cases = (proptest::collection::vec(past_issue(assignees.to_vec(), labels), 0..60), bound(), bound());

    let mut runner = TestRunner::new(ProptestConfig { cases: 20, failure_persistence: None, ..Default::default() });
    let runtime = tokio::runtime::Handle::current();
    let compare = |(issues, start, end): (Vec<PastIssue>, Option<i64>, Option<i64>)| {
        let (start, end) = if end.is_some_and(|end| start > Some(end)) { (end, start) } else { (start, end) };
        tokio::task::block_in_place(|| runtime.block_on(compare_with_naive(&tracker, &issues, start, end)))
    };
    runner.run(&cases, compare).unwrap();
}

async fn compare_with_naive(
    tracker: &Tracker,
    issues: &[PastIssue],
    start: Option<i64>,
    end: Option<i64>,
) -> Result<(), TestCaseError> {
    tracker.sql("WITH links AS (DELETE FROM issue_labels) DELETE FROM issues", &[]).await;
    insert(tracker, issues).await;
    let in_window = |closed: i64| start.is_none_or(|start| closed >= start) && end.is_none_or(|end| closed < end);
    for group_by in [LatencyGroupBy::None, LatencyGroupBy::Priority, LatencyGroupBy::Assignee, LatencyGroupBy::Label] {
        let mut expected: BTreeMap<KeyText, Vec<i64>> = BTreeMap::new();
        for issue in issues.iter().filter(|issue| !issue.deleted && issue.closed_at().is_some_and(in_window)) {
            for key in keys(issue, group_by) {
                expected.entry(key).or_default().push(issue.resolution);
            }
        }
        let (start_time, end_time) = (start.and_then(timestamp_at), end.and_then(timestamp_at));
        let request = GetResolutionLatencyRequest { start_time, end_time, group_by: group_by.into() };
        let groups = latency(tracker, request).await;
        prop_assert!(groups.is_sorted_by_key(|group| -group.count), "{groups:?}");
        for group in groups.iter().filter(|group| group.count > 0) {
            let (count, statistics) = statistics(expected.remove(&key_text(&group.key)).unwrap_or_else(|| vec![-1]));
            prop_assert_eq!(group.count, count);
            let reported = [group.average, group.p50, group.p90, group.p95, group.p99].map(micros);
            let close =
                reported.iter().zip(statistics).all(|(reported, computed)| (*reported as f64 - computed).abs() <= 2.0);
            prop_assert!(close, "{:?}: reported {:?}, computed {:?}", group_by, reported, statistics);
        }
        prop_assert!(expected.is_empty(), "{:?} lacks {:?}", group_by, expected);
    }
    Ok(())
}
