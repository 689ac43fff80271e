//! `ReportService`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use issue_tracker::{
    pb::{
        BulkUpdateStatusRequest, DeleteIssueRequest, GetResolutionLatencyRequest, GetTopAssigneesRequest,
        GetTopAssigneesResponse, Issue, IssueScope, LatencyGroupBy, Priority, Role,
        Status::{self, Closed, InProgress, Open},
        UndeleteIssueRequest, UpdateIssueRequest,
        get_resolution_latency_response::{Group, group::Key},
    },
    request::timestamp,
};
use proptest::{prelude::*, test_runner::TestRunner};
use prost_types::{Duration, Timestamp};
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_invalid};

const SECOND: i64 = 1_000_000;
const HOUR: i64 = 3_600 * SECOND;
const DAY: i64 = 24 * HOUR;

/// Microseconds behind the time at which a test's story begins.
fn at(offset: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(1_740_000_000 * SECOND + offset).unwrap()
}

fn stamp(offset: i64) -> Option<Timestamp> {
    Some(timestamp(at(offset)))
}

/// An issue of the past.
#[derive(Clone, Debug)]
struct Past {
    status: Status,
    created: i64,
    /// How long it took, when it is closed.
    took: i64,
    priority: Priority,
    assignee: Option<String>,
    labels: Vec<String>,
    deleted: bool,
}

impl Past {
    fn new(status: Status) -> Self {
        let (priority, labels) = (Priority::Unspecified, Vec::new());
        Self { status, created: 0, took: 0, priority, assignee: None, labels, deleted: false }
    }

    fn closed(took: i64) -> Self {
        Self { took, ..Self::new(Closed) }
    }

    fn of(self, client: &Client) -> Self {
        Self { assignee: Some(client.user.id.clone()), ..self }
    }

    fn closed_at(&self) -> Option<i64> {
        (self.status == Closed).then_some(self.created + self.took)
    }
}

/// Puts issues of the past into the database; their ids.
async fn put(tracker: &Tracker, issues: &[Past]) -> Vec<String> {
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

async fn top(tracker: &Tracker, request: GetTopAssigneesRequest) -> GetTopAssigneesResponse {
    tracker.viewer.reports().get_top_assignees(request).await.unwrap().into_inner()
}

/// Usernames and counts.
fn shares(response: &GetTopAssigneesResponse) -> Vec<(&str, i64)> {
    let share = |share: &issue_tracker::pb::get_top_assignees_response::Assignee| share.issue_count;
    response.assignees.iter().map(|a| (&*a.user.as_ref().unwrap().username, share(a))).collect()
}

async fn latency(tracker: &Tracker, request: GetResolutionLatencyRequest) -> Vec<Group> {
    tracker.viewer.reports().get_resolution_latency(request).await.unwrap().into_inner().groups
}

async fn latency_by(tracker: &Tracker, group_by: LatencyGroupBy) -> Vec<Group> {
    latency(tracker, GetResolutionLatencyRequest { group_by: group_by.into(), ..Default::default() }).await
}

/// The one line of the report over everything.
async fn total(tracker: &Tracker) -> Group {
    let groups = latency_by(tracker, LatencyGroupBy::Unspecified).await;
    let [group] = &groups[..] else { panic!("one line, not {groups:?}") };
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
async fn top_assignees_have_most_issues_first_and_equals_by_username() {
    let tracker = Tracker::start().await;
    let mut users = Vec::new();
    for name in ["Zoe", "anna", "Bert", "carl", "Dora", "emil"] {
        users.push(tracker.user(name, Role::Member).await);
    }
    let [zoe, anna, bert, carl, dora, emil] = &users[..] else { unreachable!("six") };
    for user in [zoe, zoe, zoe, dora, bert, anna, emil, carl, carl] {
        put(&tracker, &[Past::new(Open).of(user)]).await;
    }
    put(&tracker, &[Past::new(Open)]).await;

    let response = top(&tracker, GetTopAssigneesRequest::default()).await;

    assert_eq!(shares(&response), [("Zoe", 3), ("carl", 2), ("anna", 1), ("Bert", 1), ("Dora", 1)], "5 by default");
    assert_eq!(response.assignees[0].user.as_ref(), Some(&zoe.user));
    let two = top(&tracker, GetTopAssigneesRequest { limit: 2, ..Default::default() }).await;
    assert_eq!(shares(&two), [("Zoe", 3), ("carl", 2)]);
}

#[tokio::test]
async fn a_limit_over_100_is_taken_as_100_and_a_negative_one_is_invalid() {
    let tracker = Tracker::start().await;
    let users = "INSERT INTO users (id, username, password_hash, role)
        SELECT gen_random_uuid(), 'user' || n, '', 2 FROM generate_series(1, 101) n RETURNING id";
    let users = tracker.sql(users, &[]).await;
    let assigned = |id: Uuid| Past { assignee: Some(id.to_string()), ..Past::new(Open) };
    put(&tracker, &users.iter().map(|row| assigned(row.get(0))).collect::<Vec<_>>()).await;

    for (limit, lines) in [(101, 100), (i32::MAX, 100), (99, 99)] {
        let response = top(&tracker, GetTopAssigneesRequest { limit, ..Default::default() }).await;
        assert_eq!(response.assignees.len(), lines);
    }
    let request = GetTopAssigneesRequest { limit: -1, ..Default::default() };
    assert_invalid(tracker.viewer.reports().get_top_assignees(request).await, &["limit"]);
}

#[tokio::test]
async fn the_scope_says_whether_closed_issues_count() {
    let tracker = Tracker::start().await;
    let mine = |status| Past::new(status).of(&tracker.member);
    put(&tracker, &[Open, Open, InProgress, InProgress, InProgress, Closed].map(mine)).await;
    put(&tracker, &[Past { deleted: true, ..mine(Open) }, Past::closed(1).of(&tracker.admin)]).await;
    let counts = |response: GetTopAssigneesResponse| {
        let counts = |a: &issue_tracker::pb::get_top_assignees_response::Assignee| {
            [a.issue_count, a.open_count, a.in_progress_count, a.closed_count]
        };
        response.assignees.iter().map(counts).collect::<Vec<_>>()
    };

    for scope in [IssueScope::Unspecified, IssueScope::Open] {
        let request = GetTopAssigneesRequest { scope: scope.into(), ..Default::default() };
        assert_eq!(counts(top(&tracker, request).await), [[5, 2, 3, 0]]);
    }
    let request = GetTopAssigneesRequest { scope: IssueScope::All.into(), ..Default::default() };
    assert_eq!(counts(top(&tracker, request).await), [[6, 2, 3, 1], [1, 0, 0, 1]]);
}

#[tokio::test]
async fn windows_take_their_start_and_leave_out_their_end() {
    let tracker = Tracker::start().await;
    let created = |created| Past { created, took: HOUR, ..Past::closed(0) }.of(&tracker.member);
    put(&tracker, &[created(0), created(1), created(DAY - 1), created(DAY)]).await;

    for (start, end, count) in [
        (Some(0), Some(DAY), 3),
        (Some(1), Some(DAY + 1), 3),
        (None, Some(0), 0),
        (Some(DAY), None, 1),
        (None, None, 4),
    ] {
        // The first report goes by the time of filing, the other by that of closing, an hour later.
        let window = [start, end].map(|offset| offset.and_then(stamp));
        let [start_time, end_time] = window;
        let scope = IssueScope::All.into();
        let request = GetTopAssigneesRequest { start_time, end_time, scope, ..Default::default() };
        let counted: i64 = shares(&top(&tracker, request).await).iter().map(|(_, count)| count).sum();
        let [start_time, end_time] = [start, end].map(|offset| offset.and_then(|offset| stamp(offset + HOUR)));
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_eq!((counted, latency(&tracker, request).await[0].count), (count, count), "{start:?}, {end:?}");
    }
}

#[tokio::test]
async fn windows_that_end_before_they_start_and_times_that_are_none_are_invalid() {
    let tracker = Tracker::start().await;
    let seconds = |seconds, nanos| Some(Timestamp { seconds, nanos });
    for (start_time, end_time, fields) in [
        (stamp(1), stamp(0), &["end_time"][..]),
        (seconds(i64::MAX, 0), seconds(i64::MIN, 0), &["start_time", "end_time"]),
        (seconds(253_402_300_800, 0), None, &["start_time"]),
        (seconds(-62_135_596_801, 999_999_999), None, &["start_time"]),
        (None, seconds(0, -1), &["end_time"]),
        (None, seconds(0, 1_000_000_000), &["end_time"]),
        // What would be a leap second, which timestamps don't have.
        (None, seconds(59, 1_000_000_000), &["end_time"]),
    ] {
        let request = GetTopAssigneesRequest { start_time, end_time, ..Default::default() };
        assert_invalid(tracker.viewer.reports().get_top_assignees(request).await, fields);
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_invalid(tracker.viewer.reports().get_resolution_latency(request).await, fields);
    }
    // The ends of time themselves are times, and so is a window without length.
    for (start_time, end_time) in
        [(seconds(-62_135_596_800, 0), seconds(253_402_300_799, 999_999_999)), (stamp(0), stamp(0))]
    {
        let request = GetResolutionLatencyRequest { start_time, end_time, ..Default::default() };
        assert_eq!(latency(&tracker, request).await[0].count, 0);
        let request = GetTopAssigneesRequest { start_time, end_time, ..Default::default() };
        assert_eq!(shares(&top(&tracker, request).await), []);
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
    put(&tracker, &[30, 10, 100, 20, 40].map(|seconds| Past::closed(seconds * SECOND))).await;
    put(&tracker, &[Past::new(Open), Past::new(InProgress), Past { deleted: true, ..Past::closed(DAY) }]).await;

    let group = total(&tracker).await;

    let figures = [group.average, group.p50, group.p90, group.p95, group.p99].map(micros);
    assert_eq!((group.count, figures), (5, [40_000_000, 30_000_000, 76_000_000, 88_000_000, 97_600_000]));
}

#[tokio::test]
async fn the_sum_of_all_times_may_be_longer_than_any_time() {
    let tracker = Tracker::start().await;
    // As long as an import can say; ten million issues of a year each come to as much.
    let forever = "INSERT INTO issues (id, reporter_id, title, description, status, priority, create_time, close_time)
        SELECT gen_random_uuid(), $1, 'old', '', 3, 0, '0001-01-01 00:00Z', '9999-12-31 00:00Z'
        FROM generate_series(1, 1000)";
    tracker.sql(forever, &[&tracker.member.user.id.parse::<Uuid>().unwrap()]).await;

    let group = total(&tracker).await;

    let days = [group.average, group.p50, group.p99].map(|time| time.unwrap().seconds / 86_400);
    assert_eq!((group.count, days), (1_000, [3_652_058; 3]));
}

#[tokio::test]
async fn nothing_closed_is_one_line_without_durations_and_no_line_of_a_group() {
    let tracker = Tracker::start().await;
    put(&tracker, &[Past::new(Open), Past { deleted: true, ..Past::closed(1) }]).await;

    assert_eq!(total(&tracker).await, Group::default());
    for group_by in [LatencyGroupBy::Priority, LatencyGroupBy::Assignee, LatencyGroupBy::Label] {
        assert_eq!(latency_by(&tracker, group_by).await, []);
    }
}

#[tokio::test]
async fn later_changes_of_a_closed_issue_change_no_figure() {
    let tracker = Tracker::start().await;
    let id = &put(&tracker, &[Past::new(Open)]).await[0];
    let closed = set_status(&tracker, id, Closed).await;
    let report = total(&tracker).await;
    let took = closed.close_time.unwrap().seconds - closed.create_time.unwrap().seconds;
    assert!((micros(report.p50) / SECOND - took).abs() <= 1, "{report:?}");

    let edited = Issue { title: "edited".into(), priority: Priority::High.into(), ..closed };
    let request = UpdateIssueRequest { issue: Some(edited), comment: "done, really".into(), ..Default::default() };
    tracker.member.issues().update_issue(request).await.unwrap();
    tracker.member.comment(id, "thanks").await;
    set_status(&tracker, id, Closed).await;

    assert_eq!(total(&tracker).await, report);
}

#[tokio::test]
async fn a_reopened_issue_counts_when_it_is_closed_again_from_its_last_closing() {
    let tracker = Tracker::start().await;
    let id = &put(&tracker, &[Past::closed(HOUR)]).await[0];
    assert_eq!(micros(total(&tracker).await.p50), HOUR);

    let reopened = set_status(&tracker, id, InProgress).await;
    assert_eq!((reopened.reopen_count, reopened.close_time), (1, None));
    assert_eq!(total(&tracker).await, Group::default());
    let closed = set_status(&tracker, id, Closed).await;

    let (last, group) = (closed.close_time.unwrap(), total(&tracker).await);
    let last = last.seconds * SECOND + i64::from(last.nanos) / 1_000;
    assert_eq!((group.count, micros(group.p50)), (1, last - at(0).timestamp_micros()));
}

#[tokio::test]
async fn a_deleted_issue_counts_again_when_it_is_undeleted() {
    let tracker = Tracker::start().await;
    let id = &put(&tracker, &[Past::closed(HOUR).of(&tracker.member)]).await[0];
    let report = total(&tracker).await;
    let all = GetTopAssigneesRequest { scope: IssueScope::All.into(), ..Default::default() };

    let request = DeleteIssueRequest { id: id.clone(), ..Default::default() };
    tracker.member.issues().delete_issue(request).await.unwrap();
    assert_eq!((total(&tracker).await.count, shares(&top(&tracker, all).await)), (0, vec![]));
    let request = UndeleteIssueRequest { id: id.clone(), ..Default::default() };
    tracker.member.issues().undelete_issue(request).await.unwrap();

    assert_eq!(total(&tracker).await, report);
    assert_eq!(shares(&top(&tracker, all).await), [("member", 1)]);
}

#[tokio::test]
async fn groups_have_most_issues_first_and_whole_users_and_labels_for_keys() {
    let tracker = Tracker::start().await;
    let (bug, ui) = (tracker.member.label("bug").await, tracker.member.label("ui").await);
    let both = vec![bug.id.clone(), ui.id.clone()];
    let high = Past { priority: Priority::High, ..Past::closed(HOUR) };
    let issues = [
        Past { labels: both, ..high.clone().of(&tracker.member) },
        Past { labels: vec![ui.id.clone()], ..high.of(&tracker.member) },
        Past { labels: vec![ui.id.clone()], ..Past::closed(3 * HOUR) },
        Past::closed(5 * HOUR).of(&tracker.member),
        Past { priority: Priority::Low, ..Past::closed(7 * HOUR) },
        Past { priority: Priority::Unspecified, ..Past::closed(9 * HOUR) },
    ];
    put(&tracker, &issues).await;
    let line = |group: &Group| (group.key.clone(), group.count, micros(group.average) / HOUR);
    let lines = async |group_by| latency_by(&tracker, group_by).await.iter().map(line).collect::<Vec<_>>();

    let priority = |priority: Priority| Some(Key::Priority(priority.into()));
    let by_priority =
        [(priority(Priority::Unspecified), 3, 5), (priority(Priority::High), 2, 1), (priority(Priority::Low), 1, 7)];
    assert_eq!(lines(LatencyGroupBy::Priority).await, by_priority);
    let mut by_assignee = lines(LatencyGroupBy::Assignee).await;
    by_assignee.sort_by_key(|(key, ..)| key.is_none());
    assert_eq!(by_assignee, [(Some(Key::Assignee(tracker.member.user.clone())), 3, 2), (None, 3, 6)]);
    let mut by_label = lines(LatencyGroupBy::Label).await;
    assert!(by_label.is_sorted_by_key(|(_, count, _)| -count), "{by_label:?}");
    by_label.sort_by_key(|(key, ..)| key.is_none());
    assert_eq!(by_label, [(Some(Key::Label(ui)), 3, 1), (Some(Key::Label(bug)), 1, 1), (None, 3, 7)]);
}

#[tokio::test]
async fn a_grouped_report_has_its_first_thousand_lines() {
    let tracker = Tracker::start().await;
    let sql = "INSERT INTO labels (id, name) SELECT gen_random_uuid(), 'label ' || n FROM generate_series(1, 1005) n
        RETURNING id::text";
    let labels: Vec<String> = tracker.sql(sql, &[]).await.iter().map(|row| row.get(0)).collect();
    let popular = vec![labels[1_004].clone()];
    put(&tracker, &[Past { labels, ..Past::closed(1) }, Past { labels: popular.clone(), ..Past::closed(1) }]).await;

    let groups = latency_by(&tracker, LatencyGroupBy::Label).await;

    assert_eq!((groups.len(), groups[0].count), (1_000, 2));
    assert!(matches!(&groups[0].key, Some(Key::Label(label)) if label.id == popular[0]));
}

/// What a line of a report is for, in an order.
type KeyText = Option<String>;

fn key_text(key: &Option<Key>) -> KeyText {
    key.as_ref().map(|key| match key {
        Key::Priority(priority) => priority.to_string(),
        Key::Assignee(user) => user.id.clone(),
        Key::Label(label) => label.id.clone(),
    })
}

fn keys(issue: &Past, group_by: LatencyGroupBy) -> Vec<KeyText> {
    match group_by {
        LatencyGroupBy::Unspecified | LatencyGroupBy::None => vec![None],
        LatencyGroupBy::Priority => vec![Some((issue.priority as i32).to_string())],
        LatencyGroupBy::Assignee => vec![issue.assignee.clone()],
        LatencyGroupBy::Label if issue.labels.is_empty() => vec![None],
        LatencyGroupBy::Label => issue.labels.iter().cloned().map(Some).collect(),
    }
}

/// Count, average and percentiles in microseconds, by the book.
fn figures(mut took: Vec<i64>) -> (i64, [f64; 5]) {
    took.sort_unstable();
    let average = took.iter().sum::<i64>() as f64 / took.len() as f64;
    let percentile = |p: f64| {
        let rank = p * (took.len() - 1) as f64;
        let (low, high) = (took[rank.floor() as usize] as f64, took[rank.ceil() as usize] as f64);
        low + (high - low) * rank.fract()
    };
    (took.len() as i64, [average, percentile(0.5), percentile(0.9), percentile(0.95), percentile(0.99)])
}

fn past(assignees: Vec<String>, labels: Vec<String>) -> impl Strategy<Value = Past> {
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
        .prop_map(|(status, created, took, priority, assignee, labels, deleted)| Past {
            status,
            created,
            took,
            priority,
            assignee,
            labels,
            deleted,
        })
}

#[tokio::test(flavor = "multi_thread")]
async fn latency_is_what_a_naive_computation_gives() {
    let tracker = Tracker::start().await;
    let mut labels = Vec::new();
    for name in ["a", "b", "c"] {
        labels.push(tracker.member.label(name).await.id);
    }
    let assignees = [&tracker.admin, &tracker.member, &tracker.viewer].map(|client| client.user.id.clone());
    let bound = || proptest::option::of(0..30 * DAY);
    let cases = (proptest::collection::vec(past(assignees.to_vec(), labels), 0..60), bound(), bound());

    let mut runner = TestRunner::new(ProptestConfig { cases: 20, failure_persistence: None, ..Default::default() });
    let runtime = tokio::runtime::Handle::current();
    let compare = |(issues, start, end): (Vec<Past>, Option<i64>, Option<i64>)| {
        let (start, end) = if end.is_some_and(|end| start > Some(end)) { (end, start) } else { (start, end) };
        tokio::task::block_in_place(|| runtime.block_on(compare_with_naive(&tracker, &issues, start, end)))
    };
    runner.run(&cases, compare).unwrap();
}

async fn compare_with_naive(
    tracker: &Tracker,
    issues: &[Past],
    start: Option<i64>,
    end: Option<i64>,
) -> Result<(), TestCaseError> {
    tracker.sql("WITH links AS (DELETE FROM issue_labels) DELETE FROM issues", &[]).await;
    put(tracker, issues).await;
    let in_window = |closed: i64| start.is_none_or(|start| closed >= start) && end.is_none_or(|end| closed < end);
    for group_by in [LatencyGroupBy::None, LatencyGroupBy::Priority, LatencyGroupBy::Assignee, LatencyGroupBy::Label] {
        let mut expected: BTreeMap<KeyText, Vec<i64>> = BTreeMap::new();
        for issue in issues.iter().filter(|issue| !issue.deleted && issue.closed_at().is_some_and(in_window)) {
            for key in keys(issue, group_by) {
                expected.entry(key).or_default().push(issue.took);
            }
        }
        let (start_time, end_time) = (start.and_then(stamp), end.and_then(stamp));
        let request = GetResolutionLatencyRequest { start_time, end_time, group_by: group_by.into() };
        let groups = latency(tracker, request).await;
        prop_assert!(groups.is_sorted_by_key(|group| -group.count), "{groups:?}");
        for group in groups.iter().filter(|group| group.count > 0) {
            let (count, figures) = figures(expected.remove(&key_text(&group.key)).unwrap_or_else(|| vec![-1]));
            prop_assert_eq!(group.count, count);
            let told = [group.average, group.p50, group.p90, group.p95, group.p99].map(micros);
            let close = told.iter().zip(figures).all(|(told, figure)| (*told as f64 - figure).abs() <= 2.0);
            prop_assert!(close, "{:?}: told {:?}, computed {:?}", group_by, told, figures);
        }
        prop_assert!(expected.is_empty(), "{:?} left out {:?}", group_by, expected);
    }
    Ok(())
}
