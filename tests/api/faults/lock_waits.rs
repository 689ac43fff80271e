//! Mutations that wait for locks, and those that do not.

use futures_util::future::join_all;
use issue_tracker::pb::{
    AddIssueLabelsRequest, Comment, CreateCommentRequest, DeleteIssueRequest, ListCommentsRequest, Role,
};

use super::*;

/// Locks the issues with this title until the session is dropped or committed.
async fn lock(tracker: &Tracker, title: &str) -> Lock {
    let client = tracker.session().await;
    client.batch_execute("BEGIN").await.unwrap();
    client.query("SELECT FROM issues WHERE title = $1 FOR UPDATE", &[&title]).await.unwrap();
    Lock(client)
}

/// What a user changes while others wait for locks.
struct Unlocked {
    client: Client,
    name: String,
    labeled: Issue,
    deleted: Issue,
    label_id: String,
}

impl Unlocked {
    async fn prepare(client: Client) -> Self {
        let name = client.user.username.clone();
        let (labeled, deleted) = (client.file("labeled").await, client.file("deleted").await);
        let label_id = client.label(&name).await.id;
        Self { client, name, labeled, deleted, label_id }
    }

    /// Makes one call of each kind that could wait for a lock, but does not.
    async fn change(&self) -> Result<(), Status> {
        let (mut issues, mut labels, mut comments) =
            (self.client.issues(), self.client.labels(), self.client.comments());
        let label_ids = vec![self.label_id.clone()];
        let issue = Issue { title: "new".into(), external_id: self.name.clone(), ..Issue::default() };
        let issue = Issue { label_ids: label_ids.clone(), ..issue };
        let request_id = Uuid::now_v7().to_string();
        let create = CreateIssueRequest { issue: Some(issue), request_id, ..Default::default() };
        issues.create_issue(create).await?;
        let issue_id = self.labeled.id.clone();
        labels.add_issue_labels(AddIssueLabelsRequest { issue_id, label_ids, ..Default::default() }).await?;
        let comment = Comment { issue_id: self.labeled.id.clone(), content: "done".into(), ..Comment::default() };
        comments.create_comment(CreateCommentRequest { comment: Some(comment), ..Default::default() }).await?;
        issues.delete_issue(DeleteIssueRequest { id: self.deleted.id.clone(), ..Default::default() }).await?;
        Ok(())
    }
}

/// Starts 24 updates of locked issues by these users, which take the permits for lock waits: `waiting` of them. Then makes
/// calls that do not wait.
async fn change_while_updates_wait(tracker: &Tracker, users: &[&Client], waiting: &str) {
    let locked = tracker.member.file("locked").await;
    let other = tracker.user("other", Role::Member).await;
    let unlocked = [Unlocked::prepare(tracker.member.clone()).await, Unlocked::prepare(other).await];
    let lock = lock(tracker, "locked").await;
    let updates: Vec<_> = (0..24)
        .zip(users.iter().cycle())
        .map(|(nth, user)| {
            // Both kinds of mutations: of one statement and of several.
            let comment = if nth % 2 == 0 { String::new() } else { "why".into() };
            spawn_update(user, UpdateIssueRequest { comment, ..retitle(&locked, "changed") })
        })
        .collect();
    tracker.wait_until(waiting).await;

    for changed in join_all(unlocked.iter().map(Unlocked::change)).await {
        changed.expect("a call that needs no locked row succeeds");
    }

    let last = spawn_update(&tracker.member, retitle(&locked, "changed last"));
    tracker.wait_until_blocked().await;
    lock.release().await;
    assert_eq!(last.await.unwrap().expect("a call that waits succeeds").title, "changed last");
    for update in updates {
        if let Err(status) = update.await.unwrap() {
            assert!(matches!(status.code(), Code::ResourceExhausted | Code::Aborted), "{status:?}");
        }
    }
}

const WAITERS_ARGS: [&str; 6] = ["--pool-connections", "8", "--imports", "1", "--pool-wait-ms", "2000"];

#[tokio::test]
async fn calls_of_one_user_that_wait_for_a_locked_issue_do_not_hold_up_other_mutations() {
    let tracker = Tracker::start_with(limits(&WAITERS_ARGS)).await;
    change_while_updates_wait(&tracker, &[&tracker.member], lock_waiters!("= 3")).await;
}

#[tokio::test]
async fn calls_of_several_users_that_wait_for_a_locked_issue_do_not_hold_up_other_mutations() {
    let tracker = Tracker::start_with(limits(&WAITERS_ARGS)).await;
    let users = [&tracker.member, &tracker.admin, &tracker.user("third", Role::Member).await];
    change_while_updates_wait(&tracker, &users, lock_waiters!("= 4")).await;
}

#[tokio::test]
async fn calls_with_the_same_request_id_that_wait_for_locks_are_executed_once() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("locked").await;
    let lock = lock(&tracker, "locked").await;
    let request = UpdateIssueRequest {
        comment: "why".into(),
        request_id: Uuid::now_v7().to_string(),
        ..retitle(&issue, "changed")
    };
    let calls = [(); 2].map(|()| spawn_update(&tracker.member, request.clone()));
    // One waits for the issue, the other for the idempotency key.
    tracker.wait_until(lock_waiters!("= 2")).await;

    lock.release().await;

    let [first, second] = calls.map(async |call| call.await.unwrap().unwrap());
    let (first, second) = (first.await, second.await);
    assert_eq!((&first, first.version), (&second, 2));
    assert_eq!(tracker.member.get(&issue.id).await.comments.len(), 1);
    assert_eq!(spawn_update(&tracker.member, request).await.unwrap().unwrap(), first);
}

/// Waits for locks on every connection of the pool, and asserts that the calls succeed.
async fn assert_connections_wait_for_locks(tracker: &Tracker, issue: &Issue) {
    let blocker = tracker.session().await;
    blocker.batch_execute("BEGIN; LOCK TABLE comments IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let lists = [&tracker.member, &tracker.admin].map(|client| {
        let (mut comments, issue_id) = (client.comments(), issue.id.clone());
        tokio::spawn(
            async move { comments.list_comments(ListCommentsRequest { issue_id, ..Default::default() }).await },
        )
    });
    tracker.wait_until(lock_waiters!("= 2")).await;
    blocker.batch_execute("COMMIT").await.unwrap();
    for list in lists {
        list.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn connections_wait_for_locks_as_usual_after_completed_and_cancelled_mutations() {
    let tracker = Tracker::start_with(limits(&["--pool-connections", "3", "--imports", "1"])).await;
    let _held = tracker.hold_connections(1).await;
    let mut issues = Vec::new();
    for _ in 0..5 {
        issues.push(tracker.member.file("crash").await);
    }
    // Two deletions need both of the other connections.
    let slow = "CREATE FUNCTION sleep() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN PERFORM pg_sleep(0.08); RETURN new; END $$;
        CREATE TRIGGER sleep BEFORE UPDATE ON issues FOR EACH ROW EXECUTE FUNCTION sleep()";
    tracker.session().await.batch_execute(slow).await.unwrap();
    let delete = async |client: &Client, issue: &Issue, deadline_ms| {
        let mut request = Request::new(DeleteIssueRequest { id: issue.id.clone(), ..Default::default() });
        request.set_timeout(Duration::from_millis(deadline_ms));
        client.issues().delete_issue(request).await
    };

    let deleted = tokio::join!(delete(&tracker.member, &issues[0], 60_000), delete(&tracker.admin, &issues[1], 60_000));
    assert!(deleted.0.is_ok() && deleted.1.is_ok(), "{deleted:?}");
    assert_connections_wait_for_locks(&tracker, &issues[0]).await;

    // The statements end soon after the deadline, and their connections are kept.
    let abandoned = tokio::join!(delete(&tracker.member, &issues[2], 40), delete(&tracker.admin, &issues[3], 40));
    assert!(abandoned.0.is_err() && abandoned.1.is_err(), "{abandoned:?}");
    assert_connections_wait_for_locks(&tracker, &issues[4]).await;
}
