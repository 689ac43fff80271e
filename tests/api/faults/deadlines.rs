//! Deadlines of the client and of the server, and the cancellation of statements.

use std::collections::BTreeSet;

use issue_tracker::pb::Comment;
use issue_tracker::pb::CreateCommentRequest;

use super::{
    connections::{H2Client, framed},
    *,
};
use crate::{h2_client::request, support::bounds::HANG};

#[tokio::test]
async fn call_without_a_deadline_gets_the_default_one_and_writes_nothing() {
    let tracker = Tracker::start_with(limits(&["--deadline-ms", "400"])).await;
    let issue = tracker.member.file("locked").await;
    let lock = Lock::all_issues(&tracker).await;

    let update = spawn_update(&tracker.member, retitle(&issue, "changed")).await.unwrap();

    assert_error(update, Code::DeadlineExceeded, "DEADLINE");
    tracker.wait_until_no_locks().await;
    lock.release().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

#[tokio::test]
async fn client_deadline_overrides_the_default() {
    let tracker = Tracker::start_with(limits(&["--deadline-ms", "300"])).await;
    let issue = tracker.member.file("locked").await;
    let lock = Lock::all_issues(&tracker).await;
    let mut request = Request::new(retitle(&issue, "changed"));
    request.set_timeout(Duration::from_secs(30));
    let update = spawn_update(&tracker.member, request);
    tracker.wait_until_blocked().await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    lock.release().await;
    assert_eq!(update.await.unwrap().unwrap().title, "changed");
}

#[tokio::test]
async fn incomplete_request_message_fails_at_the_default_deadline() {
    let tracker = Tracker::start_with(limits(&["--deadline-ms", "300", "--requests", "1"])).await;
    let issue = tracker.member.file("first").await;
    let mut raw = H2Client::open(&tracker).await;
    let (response, mut stream) = raw.begin(&tracker, "IssueService/GetIssue").await.unwrap();
    let request = framed(&GetIssueRequest { id: issue.id.clone(), ..Default::default() });
    stream.send_data(request.slice(..8), false).unwrap();

    let response = response.await.unwrap();

    assert_eq!(response.headers()["grpc-status"], (Code::DeadlineExceeded as i32).to_string());
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

#[tokio::test]
async fn missing_request_message_fails_at_the_default_deadline_despite_a_longer_client_deadline() {
    let tracker = Tracker::start_with(limits(&["--requests", "1", "--deadline-ms", "1000"])).await;
    let issue = tracker.member.file("first").await;
    let raw = H2Client::open(&tracker).await;
    let mut head = request(&tracker, "/issuetracker.v1.IssueService/UpdateIssue");
    head.headers_mut().insert("grpc-timeout", "600S".parse().unwrap());
    let (response, _unsent_body) = raw.requests.clone().ready().await.unwrap().send_request(head, false).unwrap();

    let response = tokio::time::timeout(HANG, response).await.expect("the call has not ended").unwrap();

    assert_eq!(response.headers()["grpc-status"], (Code::DeadlineExceeded as i32).to_string());
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

#[tokio::test]
async fn waiting_for_a_connection_counts_towards_the_deadline() {
    let args = ["--pool-connections", "3", "--imports", "1", "--pool-wait-ms", "30000", "--deadline-ms", "400"];
    let tracker = Tracker::start_with(limits(&args)).await;
    let issue = tracker.member.file("locked").await;
    let held = tracker.hold_connections(3).await;

    assert_error(try_get(&tracker.member, &issue).await, Code::DeadlineExceeded, "DEADLINE");

    drop(held);
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

#[tokio::test]
async fn cancelled_calls_leave_no_statement_and_return_usable_connections() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "3", "--imports", "1"])).await;
    let issue = tracker.member.file("locked").await;
    let lock = Lock::all_issues(&tracker).await;
    for n in 0..6 {
        let request = UpdateIssueRequest { comment: format!("attempt {n}"), ..retitle(&issue, "changed") };
        let update = spawn_update(&tracker.member, request);
        tracker.wait_until(lock_waiters!(">= 1")).await;
        update.abort();
        tracker.wait_until_no_locks().await;
    }
    lock.release().await;
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
    let comment = Comment { issue_id: issue.id.clone(), content: "after".to_owned(), ..Comment::default() };
    for _ in 0..6 {
        let request = CreateCommentRequest { comment: Some(comment.clone()), ..Default::default() };
        tracker.member.comments().create_comment(request).await.unwrap();
    }
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 6);
}

#[tokio::test]
async fn statement_of_a_batch_is_cancelled_when_all_its_callers_cancelled() {
    let tracker = Arc::new(Tracker::start().await);
    let session = tracker.session().await;
    session.batch_execute("BEGIN; LOCK TABLE issues").await.unwrap();
    let calls: Vec<_> = (0..20)
        .map(|n| {
            let tracker = Arc::clone(&tracker);
            tokio::spawn(async move { try_file(&tracker.member, &format!("issue {n}")).await })
        })
        .collect();
    tracker.wait_until_blocked().await;
    calls.iter().for_each(JoinHandle::abort);

    tracker.wait_until_no_locks().await;

    session.batch_execute("COMMIT").await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM issues").await, 0);
}

/// Returns the process ids of the service's database sessions.
async fn sessions(tracker: &Tracker) -> BTreeSet<i32> {
    let sql = "SELECT pid FROM pg_stat_activity
        WHERE application_name = 'issue-tracker' AND datname = current_database()";
    tracker.sql(sql, &[]).await.iter().map(|row| row.get(0)).collect()
}

#[tokio::test]
async fn cancelled_statements_keep_their_sessions() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "3", "--imports", "1"])).await;
    let issue = tracker.member.file("locked").await;
    drop(tracker.hold_connections(3).await);
    let before = sessions(&tracker).await;
    // A statement waits for a row in its transaction, or for the table before it is prepared.
    for locked in ["SELECT FROM issues FOR UPDATE", "LOCK TABLE issues IN ACCESS EXCLUSIVE MODE"] {
        let session = tracker.session().await;
        session.batch_execute(&format!("BEGIN; {locked}")).await.unwrap();
        for nth in 0..6 {
            let request = UpdateIssueRequest { comment: format!("attempt {nth}"), ..retitle(&issue, "changed") };
            let update = spawn_update(&tracker.member, request);
            tracker.wait_until(lock_waiters!(">= 1")).await;
            update.abort();
            tracker.wait_until_no_locks().await;
        }
        session.batch_execute("COMMIT").await.unwrap();
    }
    let after = sessions(&tracker).await;
    assert!(after.is_superset(&before), "sessions of {before:?} were closed; now there are {after:?}");
    // No session is in a transaction.
    for conn in tracker.hold_connections(3).await {
        conn.execute("INSERT INTO expired_imports (import_id) VALUES (gen_random_uuid())", &[]).await.unwrap();
    }
    assert_eq!(tracker.count("SELECT count(*) FROM expired_imports").await, 3);
    assert_eq!(try_get(&tracker.member, &issue).await.unwrap(), issue);
}

#[tokio::test]
async fn cancellation_does_not_reach_the_next_statement_of_the_session() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "3", "--imports", "1"])).await;
    // The statement ends shortly before or after it is cancelled.
    for milliseconds in (90..120).cycle().take(60) {
        let conn = tracker.db.conn().await.unwrap();
        let abandoned = format!("SELECT pg_sleep({milliseconds} / 1000.0)");
        let began = tokio::time::timeout(Duration::from_millis(1), conn.query(&abandoned, &[])).await;
        assert!(began.is_err());
        drop(conn);

        for conn in tracker.hold_connections(3).await {
            conn.query("SELECT pg_sleep(0.01)", &[]).await.unwrap();
        }
    }
}
