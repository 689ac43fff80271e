//! `CommentService`.

use issue_tracker::{
    db::{PageBounds, comments},
    pb::{
        Comment, CreateCommentRequest, DeleteCommentRequest, DeleteIssueRequest, ListCommentsRequest,
        ListCommentsResponse, Role, UpdateCommentRequest,
    },
};
use prost::Message;
use prost_types::FieldMask;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::harness::{Client, Tracker, assert_error, assert_invalid};

/// The largest response that gRPC clients accept by default, in bytes.
const CLIENT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Builds a top-level comment.
fn on(issue_id: &str, content: &str) -> Comment {
    Comment { issue_id: issue_id.to_owned(), content: content.to_owned(), ..Comment::default() }
}

fn reply_to(parent: &Comment, content: &str) -> Comment {
    Comment { parent_id: parent.id.clone(), ..on(&parent.issue_id, content) }
}

async fn add(client: &Client, comment: Comment) -> Result<Comment, Status> {
    let request = CreateCommentRequest { comment: Some(comment), ..Default::default() };
    client.comments().create_comment(request).await.map(tonic::Response::into_inner)
}

/// Builds an update of a comment's content, without a mask.
fn edit(id: &str, content: &str) -> UpdateCommentRequest {
    let comment = Comment { id: id.to_owned(), content: content.to_owned(), ..Comment::default() };
    UpdateCommentRequest { comment: Some(comment), ..Default::default() }
}

async fn update(client: &Client, request: UpdateCommentRequest) -> Result<Comment, Status> {
    client.comments().update_comment(request).await.map(tonic::Response::into_inner)
}

async fn delete(client: &Client, id: &str) -> Result<Comment, Status> {
    let request = DeleteCommentRequest { id: id.to_owned(), ..Default::default() };
    client.comments().delete_comment(request).await.map(tonic::Response::into_inner)
}

async fn list(client: &Client, issue_id: &str, size: i32, token: &str) -> Result<ListCommentsResponse, Status> {
    let request = ListCommentsRequest { issue_id: issue_id.to_owned(), page_size: size, page_token: token.to_owned() };
    client.comments().list_comments(request).await.map(tonic::Response::into_inner)
}

/// All comments, page by page.
async fn list_all(client: &Client, issue_id: &str, size: i32) -> Vec<Comment> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(client, issue_id, size, &token).await.unwrap();
        assert!(!page.comments.is_empty() || token.is_empty(), "the page of a token is empty");
        all.extend(page.comments);
        token = page.next_page_token;
        if token.is_empty() {
            return all;
        }
    }
}

async fn delete_issue(client: &Client, id: &str) {
    let request = DeleteIssueRequest { id: id.to_owned(), ..Default::default() };
    client.issues().delete_issue(request).await.unwrap();
}

fn contents(comments: &[Comment]) -> Vec<&str> {
    comments.iter().map(|comment| &*comment.content).collect()
}

/// Reads the content of a comment from the table.
async fn stored_content(tracker: &Tracker, id: &str) -> String {
    let id: Uuid = id.parse().unwrap();
    tracker.sql("SELECT content FROM comments WHERE id = $1", &[&id]).await[0].get(0)
}

#[tokio::test]
async fn output_only_fields_of_a_new_comment_are_ignored() {
    let tracker = Tracker::start().await;
    let issue = tracker.admin.file("crash").await;
    let forged = Comment {
        id: Uuid::now_v7().to_string(),
        author_id: tracker.admin.user.id.clone(),
        author_username: "admin".to_owned(),
        delete_time: Some(prost_types::Timestamp::default()),
        ..on(&issue.id, "me too")
    };

    let comment = add(&tracker.member, forged.clone()).await.unwrap();

    assert_eq!((&*comment.author_username, &comment.author_id), ("member", &tracker.member.user.id));
    assert_eq!((&*comment.content, &comment.issue_id, &*comment.parent_id), ("me too", &issue.id, ""));
    assert_ne!(comment.id, forged.id);
    assert_eq!((comment.update_time, comment.delete_time), (comment.create_time, None));
    assert_eq!(tracker.viewer.get(&issue.id).await.comments, [comment]);
}

#[tokio::test]
async fn comments_change_only_the_comment_count_of_an_issue() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let first = tracker.member.comment(&issue.id, "one").await;
    tracker.member.comment(&issue.id, "two").await;
    update(&tracker.member, edit(&first.id, "uno")).await.unwrap();
    assert_eq!(tracker.member.get(&issue.id).await.comment_count, 2);

    delete(&tracker.member, &first.id).await.unwrap();

    let mut now = tracker.member.get(&issue.id).await;
    assert_eq!((now.comment_count, now.comments.len()), (1, 2));
    (now.comment_count, now.comments) = (0, Vec::new());
    assert_eq!(now, issue);
    assert_eq!(tracker.count("SELECT count(*) FROM issue_events").await, 0);
}

#[tokio::test]
async fn replies_have_parents_at_any_depth() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let thread = tracker.member.comment(&issue.id, "why?").await;
    let reply = add(&tracker.admin, reply_to(&thread, "because")).await.unwrap();
    let deeper = add(&tracker.member, reply_to(&reply, "why?")).await.unwrap();
    let later = add(&tracker.member, reply_to(&thread, "still why?")).await.unwrap();

    let parents = [&reply, &deeper, &later].map(|comment| &comment.parent_id);
    assert_eq!(parents, [&thread.id, &reply.id, &thread.id]);
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [thread, reply, deeper, later]);
}

#[tokio::test]
async fn parent_on_another_issue_is_invalid() {
    let tracker = Tracker::start().await;
    let (here, there) = (tracker.member.file("here").await, tracker.member.file("there").await);
    let parent = tracker.member.comment(&there.id, "over there").await;

    let misplaced = add(&tracker.member, Comment { issue_id: here.id, ..reply_to(&parent, "hello?") }).await;

    let status = assert_invalid(misplaced, &["comment.parent_id"]);
    assert!(status.message().contains(&parent.id), "{status:?}");
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 1);
}

#[tokio::test]
async fn missing_issue_or_parent_is_not_found() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let missing_id = Uuid::now_v7().to_string();

    let no_issue = add(&tracker.member, on(&missing_id, "hello?")).await;
    assert_error(no_issue, Code::NotFound, "NOT_FOUND");
    let no_parent = add(&tracker.member, Comment { parent_id: missing_id, ..on(&issue.id, "hello?") }).await;
    let status = assert_error(no_parent, Code::NotFound, "NOT_FOUND");
    assert!(status.message().starts_with("comment.parent_id"), "{status:?}");
    // The id of an issue, where the id of a comment is expected.
    let not_a_comment = add(&tracker.member, Comment { parent_id: issue.id.clone(), ..on(&issue.id, "hello?") }).await;
    assert_error(not_a_comment, Code::NotFound, "NOT_FOUND");
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 0);
}

#[tokio::test]
async fn all_invalid_fields_of_a_comment_are_named() {
    let tracker = Tracker::start().await;
    let comment = Comment { issue_id: "7".into(), parent_id: "8".into(), ..Comment::default() };

    let all = ["comment.issue_id", "comment.parent_id", "comment.content"];
    assert_invalid(add(&tracker.member, comment).await, &all);
    let empty = tracker.member.comments().create_comment(CreateCommentRequest::default()).await;
    assert_eq!(crate::harness::bad_fields(&empty.unwrap_err())[0], "comment");
}

#[tokio::test]
async fn comment_on_a_deleted_parent_or_issue_is_rejected() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let parent = tracker.member.comment(&issue.id, "why?").await;
    delete(&tracker.member, &parent.id).await.unwrap();
    let reply = add(&tracker.member, reply_to(&parent, "because")).await;
    assert_error(reply, Code::FailedPrecondition, "COMMENT_DELETED");

    delete_issue(&tracker.member, &issue.id).await;
    let comment = add(&tracker.member, on(&issue.id, "too late")).await;
    assert_error(comment, Code::FailedPrecondition, "ISSUE_STATE");
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 1);
}

#[tokio::test]
async fn content_has_1_to_16384_characters_and_is_stored_unchanged() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    for bad in ["", " \t\r\n\u{a0}\u{3000}", "nul\0", &"é".repeat(16_385)] {
        assert_invalid(add(&tracker.member, on(&issue.id, bad)).await, &["comment.content"]);
    }
    assert_eq!(tracker.count("SELECT count(*) FROM comments").await, 0);

    let good = ["'); DROP TABLE comments; --", " spaces around \r\n", "$1 \\ %s 😀 \u{202e}", &"😀".repeat(16_384)];
    for content in good {
        let comment = add(&tracker.member, on(&issue.id, content)).await.unwrap();
        assert_eq!(comment.content, content);
    }
    assert_eq!(contents(&list_all(&tracker.viewer, &issue.id, 0).await), good);
}

#[tokio::test]
async fn pages_are_oldest_first_despite_concurrent_writes() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let other = tracker.member.file("other").await;
    let mut comments = Vec::new();
    for n in 0..6 {
        comments.push(tracker.member.comment(&issue.id, &n.to_string()).await);
        tracker.member.comment(&other.id, "elsewhere").await;
    }

    let first = list(&tracker.viewer, &issue.id, 3, "").await.unwrap();
    assert_eq!(first.comments, comments[..3]);
    // The last comment of the first page, and the first of the second page.
    for index in [2, 3] {
        delete(&tracker.member, &comments[index].id).await.unwrap();
    }
    let second = list(&tracker.viewer, &issue.id, 3, &first.next_page_token).await.unwrap();
    assert_eq!(contents(&second.comments), ["", "4", "5"]);
    assert_eq!(second.next_page_token, "", "a full last page has no token");
    tracker.member.comment(&issue.id, "6").await;
    assert_eq!(contents(&list_all(&tracker.viewer, &issue.id, 3).await), ["0", "1", "", "", "4", "5", "6"]);
}

#[tokio::test]
async fn deleted_comment_keeps_its_place_and_loses_its_content() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let secret = tracker.member.comment(&issue.id, "my password is hunter2").await;
    let reply = add(&tracker.admin, reply_to(&secret, "oh")).await.unwrap();

    let deleted = delete(&tracker.member, &secret.id).await.unwrap();

    assert!(deleted.delete_time.is_some());
    let expected = Comment {
        content: String::new(),
        update_time: deleted.update_time,
        delete_time: deleted.delete_time,
        ..secret.clone()
    };
    assert_eq!(deleted, expected);
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [deleted.clone(), reply.clone()]);
    assert_eq!(tracker.viewer.get(&issue.id).await.comments, [deleted, reply]);
    let stored = "SELECT count(*) FROM comments c WHERE c::text LIKE '%hunter2%'";
    assert_eq!(tracker.count(stored).await, 0);
}

#[tokio::test]
async fn page_token_is_bound_to_its_issue() {
    let tracker = Tracker::start().await;
    let (one, other) = (tracker.member.file("one").await, tracker.member.file("other").await);
    for issue in [&one, &other, &one, &other] {
        tracker.member.comment(&issue.id, "text").await;
    }
    let token = list(&tracker.viewer, &one.id, 1, "").await.unwrap().next_page_token;

    assert_invalid(list(&tracker.viewer, &other.id, 1, &token).await, &["page_token"]);
    assert_invalid(list(&tracker.viewer, &one.id, 1, &format!("{token}A")).await, &["page_token"]);
    assert_invalid(list(&tracker.viewer, &one.id, -1, "1").await, &["page_size", "page_token"]);
    assert_eq!(list(&tracker.viewer, &one.id, 1, &token).await.unwrap().comments.len(), 1);
}

#[tokio::test]
async fn list_of_an_issue_without_comments_is_empty_and_of_a_missing_issue_not_found() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("quiet").await;

    assert_eq!(list(&tracker.viewer, &issue.id, 0, "").await.unwrap(), ListCommentsResponse::default());
    let missing = list(&tracker.viewer, &Uuid::now_v7().to_string(), 0, "").await;
    assert_error(missing, Code::NotFound, "NOT_FOUND");
    assert_invalid(list(&tracker.viewer, "", 0, "").await, &["issue_id"]);
}

#[tokio::test]
async fn comments_of_a_deleted_issue_are_read_only() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let comment = tracker.member.comment(&issue.id, "text").await;
    delete_issue(&tracker.member, &issue.id).await;

    let edited = update(&tracker.admin, edit(&comment.id, "changed")).await;
    assert_error(edited, Code::FailedPrecondition, "ISSUE_STATE");
    assert_error(delete(&tracker.member, &comment.id).await, Code::FailedPrecondition, "ISSUE_STATE");
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [comment]);
}

#[tokio::test]
async fn author_and_administrator_may_change_a_comment() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let written = tracker.member.comment(&issue.id, "teh").await;

    let by_author = update(&tracker.member, edit(&written.id, "the")).await.unwrap();
    let expected = Comment { content: "the".into(), update_time: by_author.update_time, ..written.clone() };
    assert_eq!(by_author, expected);
    assert_ne!(by_author.update_time, written.update_time);
    let unchanged = update(&tracker.member, edit(&written.id, "the")).await.unwrap();
    assert_eq!(unchanged, by_author, "an update with the same content changes nothing");
    let by_admin = update(&tracker.admin, edit(&written.id, "[moderated]")).await.unwrap();
    assert_eq!((&*by_admin.author_username, &*by_admin.content), ("member", "[moderated]"));
    assert_eq!(stored_content(&tracker, &written.id).await, "[moderated]");
    delete(&tracker.admin, &written.id).await.unwrap();
    assert_eq!(stored_content(&tracker, &written.id).await, "");
}

#[tokio::test]
async fn another_member_may_not_change_or_delete_a_comment() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let comment = tracker.member.comment(&issue.id, "mine").await;
    let other = tracker.user("other", Role::Member).await;

    let edited = update(&other, edit(&comment.id, "yours")).await;
    assert_error(edited, Code::PermissionDenied, "PERMISSION_DENIED");
    assert_error(delete(&other, &comment.id).await, Code::PermissionDenied, "PERMISSION_DENIED");
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [comment]);
}

#[tokio::test]
async fn deleted_comment_cannot_be_changed_or_deleted() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let comment = tracker.member.comment(&issue.id, "text").await;
    let deleted = delete(&tracker.member, &comment.id).await.unwrap();

    let edited = update(&tracker.admin, edit(&comment.id, "back")).await;
    assert_error(edited, Code::FailedPrecondition, "COMMENT_DELETED");
    assert_error(delete(&tracker.member, &comment.id).await, Code::FailedPrecondition, "COMMENT_DELETED");
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [deleted]);
    let missing_id = Uuid::now_v7().to_string();
    assert_error(update(&tracker.member, edit(&missing_id, "x")).await, Code::NotFound, "NOT_FOUND");
    assert_error(delete(&tracker.member, &missing_id).await, Code::NotFound, "NOT_FOUND");
}

#[tokio::test]
async fn update_mask_accepts_only_content() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let comment = tracker.member.comment(&issue.id, "text").await;
    let masked = |paths: &[&str], content: &str| UpdateCommentRequest {
        update_mask: Some(FieldMask { paths: paths.iter().map(|path| (*path).to_owned()).collect() }),
        ..edit(&comment.id, content)
    };

    let bad = update(&tracker.member, masked(&["content", "author_id", "Content"], "changed")).await;
    let status = assert_invalid(bad, &["update_mask.paths[1]", "update_mask.paths[2]"]);
    assert!(status.message().contains("\"author_id\""), "{status:?}");
    assert_invalid(update(&tracker.member, masked(&["content"], "")).await, &["comment.content"]);
    assert_invalid(update(&tracker.member, edit(&comment.id, "")).await, &["comment.content"]);
    assert_eq!(stored_content(&tracker, &comment.id).await, "text");
    for (paths, content) in [(&["content"], "one"), (&["*"], "two")] {
        assert_eq!(update(&tracker.member, masked(paths, content)).await.unwrap().content, content);
    }
}

/// Inserts many comments by `member`; their content is a number from 1, then `content`.
async fn insert_comments(tracker: &Tracker, issue_id: &str, count: i64, content: &str) {
    let (issue, author): (Uuid, Uuid) = (issue_id.parse().unwrap(), tracker.member.user.id.parse().unwrap());
    let sql = "INSERT INTO comments (id, issue_id, author_id, content)
        SELECT ('01980a3e-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, $1, $2, n || $4::text
        FROM generate_series(1, $3::int8) n";
    tracker.sql(sql, &[&issue, &author, &count, &content]).await;
}

#[tokio::test]
async fn full_view_has_the_first_1000_comments_and_lists_have_all() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("flame war").await;
    insert_comments(&tracker, &issue.id, 1_003, "!").await;

    let issue = tracker.viewer.get(&issue.id).await;
    let all = list_all(&tracker.viewer, &issue.id, 5_000).await;

    assert_eq!((issue.comment_count, all.len()), (1_003, 1_003));
    assert_eq!(issue.comments, all[..1_000]);
    assert_eq!((&*all[0].content, &*all[1_002].content), ("1!", "1003!"));
    assert_eq!(list(&tracker.viewer, &issue.id, 5_000, "").await.unwrap().comments.len(), 1_000);
    assert_eq!(list(&tracker.viewer, &issue.id, 0, "").await.unwrap().comments.len(), 50);
}

#[tokio::test]
async fn pages_of_long_comments_fit_in_a_default_client_response() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("essays").await;
    insert_comments(&tracker, &issue.id, 70, &"😀".repeat(16_380)).await;

    let page = list(&tracker.viewer, &issue.id, 1_000, "").await.unwrap();
    assert!(page.encoded_len() < CLIENT_BYTES_MAX && page.comments.len() > 40, "{}", page.comments.len());
    let all = list_all(&tracker.viewer, &issue.id, 1_000).await;
    let numbers: Vec<usize> = all.iter().map(|c| c.content.trim_end_matches('😀').parse().unwrap()).collect();
    assert_eq!(numbers, (1..=70).collect::<Vec<_>>());
    let issue = tracker.viewer.get(&issue.id).await;
    assert!(issue.encoded_len() < CLIENT_BYTES_MAX);
    assert_eq!((issue.comments.len(), issue.comment_count), (page.comments.len(), 70));
}

#[tokio::test]
async fn dry_run_responds_as_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let comment = tracker.member.comment(&issue.id, "text").await;
    let mut client = tracker.member.comments();

    let create =
        CreateCommentRequest { comment: Some(reply_to(&comment, "re")), validate_only: true, ..Default::default() };
    let created = client.create_comment(create.clone()).await.unwrap().into_inner();
    assert_eq!((&*created.content, &created.parent_id), ("re", &comment.id));
    let dry_run = UpdateCommentRequest { validate_only: true, ..edit(&comment.id, "new") };
    assert_eq!(update(&tracker.member, dry_run).await.unwrap().content, "new");
    let delete = DeleteCommentRequest { id: comment.id.clone(), validate_only: true, ..Default::default() };
    assert!(client.delete_comment(delete).await.unwrap().into_inner().delete_time.is_some());
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [comment]);

    delete_issue(&tracker.member, &issue.id).await;
    assert_error(client.create_comment(create).await, Code::FailedPrecondition, "ISSUE_STATE");
}

#[tokio::test]
async fn retry_with_a_request_id_returns_the_stored_response_and_writes_once() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    let id = || Uuid::new_v4().to_string();
    let mut client = tracker.member.comments();

    let create = CreateCommentRequest { comment: Some(on(&issue.id, "once")), request_id: id(), ..Default::default() };
    let created = client.create_comment(create.clone()).await.unwrap().into_inner();
    let edit = UpdateCommentRequest { request_id: id(), ..edit(&created.id, "twice") };
    let edited = update(&tracker.member, edit.clone()).await.unwrap();
    let delete = DeleteCommentRequest { id: created.id.clone(), request_id: id(), ..Default::default() };
    let deleted = client.delete_comment(delete.clone()).await.unwrap().into_inner();

    assert_eq!(client.create_comment(create.clone()).await.unwrap().into_inner(), created);
    assert_eq!(update(&tracker.member, edit).await.unwrap(), edited);
    assert_eq!(client.delete_comment(delete).await.unwrap().into_inner(), deleted);
    let other = CreateCommentRequest { comment: Some(on(&issue.id, "other")), ..create };
    assert_error(client.create_comment(other).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(list_all(&tracker.viewer, &issue.id, 0).await, [deleted]);
}

#[tokio::test]
async fn update_concurrent_with_a_deletion_never_restores_content() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("crash").await;
    for round in 0..25 {
        let comment = tracker.member.comment(&issue.id, "text").await;
        let edits = async { update(&tracker.admin, edit(&comment.id, "edited")).await };
        let (edited, deleted) = match round % 2 {
            0 => tokio::join!(edits, delete(&tracker.member, &comment.id)),
            _ => {
                let (deleted, edited) = tokio::join!(delete(&tracker.member, &comment.id), edits);
                (edited, deleted)
            }
        };
        deleted.unwrap();
        if let Err(status) = edited {
            assert_error(Err::<(), _>(status), Code::FailedPrecondition, "COMMENT_DELETED");
        }
        assert_eq!(stored_content(&tracker, &comment.id).await, "");
    }
}

#[tokio::test]
async fn rows_that_a_page_leaves_unread_disturb_no_later_query() {
    let tracker = Tracker::start().await;
    let issue = tracker.member.file("long thread").await;
    // 13 MiB: more than the socket buffers hold.
    let sql = "INSERT INTO comments (id, issue_id, author_id, content)
        SELECT gen_random_uuid(), i.id, i.reporter_id, repeat('😀', 16384) FROM issues i, generate_series(1, 200)";
    tracker.sql(sql, &[]).await;
    let id = issue.id.parse().unwrap();
    let page = async |bounds: PageBounds| {
        let conn = tracker.db.conn().await.unwrap();
        let page = comments::list(&conn, id, None, bounds.rows_max as i64 + 1, bounds).await.unwrap();
        (page.items.len(), page.more)
    };

    for _ in 0..5 {
        assert_eq!(page(PageBounds { rows_max: 199, bytes_max: 200_000 }).await, (3, true));
        assert_eq!(page(PageBounds { rows_max: 2, bytes_max: 1_000_000 }).await, (2, true));
    }
}
