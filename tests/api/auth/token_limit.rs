//! How many API tokens a user may have.

use super::*;
use crate::lock_waiters;

const API_TOKENS_MAX: i64 = 100;
const VALID: &str = "SELECT count(*) FROM tokens JOIN users u ON u.id = user_id
    WHERE username = 'member' AND name IS NOT NULL AND revoke_time IS NULL AND coalesce(expire_time > now(), true)";

/// Gives the member more tokens, that were or are to be revoked or expire at these times.
async fn add_tokens(tracker: &Tracker, count: i64, revoke_time: &str, expire_time: &str) {
    let sql = format!(
        "INSERT INTO tokens (id, user_id, sha256, name, revoke_time, expire_time)
        SELECT id, $1, sha256(uuid_send(id)), 'one of many', {revoke_time}, {expire_time}
        FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, $2::int8)) AS new"
    );
    tracker.sql(&sql, &[&tracker.member.user.id.parse::<Uuid>().unwrap(), &count]).await;
}

#[track_caller]
fn assert_too_many(result: Result<CreateApiTokenResponse, Status>) {
    assert_error(result, Code::FailedPrecondition, "TOO_MANY_API_TOKENS");
}

#[tokio::test]
async fn a_user_has_100_valid_api_tokens_at_most_and_what_has_ended_does_not_count() {
    let tracker = Tracker::start().await;
    let member = &tracker.member;
    add_tokens(&tracker, API_TOKENS_MAX, "now()", "NULL").await;
    add_tokens(&tracker, API_TOKENS_MAX, "NULL", "now()").await;
    session(&tracker, "member").await;
    // He has one already.
    add_tokens(&tracker, API_TOKENS_MAX - 2, "NULL", "now() + interval '1 hour'").await;
    let last = create_token(member, "", "the last").await.unwrap().api_token.unwrap();
    assert_eq!(tracker.count(VALID).await, API_TOKENS_MAX);

    let before = tracker.contents().await;
    assert_too_many(create_token(member, "", "one too many").await);
    assert_too_many(create_token(&tracker.admin, &member.user.id, "one too many").await);
    let api_token = Some(ApiToken { name: "one too many".into(), ..ApiToken::default() });
    let trial = CreateApiTokenRequest { api_token, validate_only: true };
    assert_too_many(member.auth().create_api_token(trial).await.map(tonic::Response::into_inner));
    assert_eq!(tracker.contents().await, before);
    create_token(&tracker.viewer, "", "of somebody else").await.unwrap();

    // One that is revoked makes room for one, and so does one that expires.
    revoke(member, &last.id).await.unwrap();
    create_token(member, "", "instead").await.unwrap();
    assert_too_many(create_token(member, "", "one too many").await);
    tracker.sql("UPDATE tokens SET expire_time = now() WHERE name = 'instead'", &[]).await;
    create_token(member, "", "instead of that").await.unwrap();
    assert_too_many(create_token(member, "", "one too many").await);
}

#[tokio::test]
async fn of_two_api_tokens_that_are_made_at_once_only_as_many_are_as_there_is_room_for() {
    let tracker = Tracker::start().await;
    add_tokens(&tracker, API_TOKENS_MAX - 2, "NULL", "NULL").await;
    let session = tracker.session().await;
    session.batch_execute("BEGIN; SELECT FROM users WHERE username = 'member' FOR UPDATE").await.unwrap();
    let [one, other] = [tracker.member.clone(), tracker.admin.clone()].map(|by| {
        let user_id = tracker.member.user.id.clone();
        tokio::spawn(async move { create_token(&by, &user_id, "at once").await })
    });
    tracker.wait_until(lock_waiters!("= 2")).await;
    session.batch_execute("COMMIT").await.unwrap();

    let (one, other) = (one.await.unwrap(), other.await.unwrap());

    let (made, refused) = if one.is_ok() { (one, other) } else { (other, one) };
    made.unwrap();
    assert_too_many(refused);
    assert_eq!(tracker.count(VALID).await, API_TOKENS_MAX);
}
