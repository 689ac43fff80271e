//! The limit of valid API tokens per user.

use super::*;
use crate::lock_waiters;

const API_TOKENS_MAX: i64 = 100;
const VALID: &str = "SELECT count(*) FROM tokens JOIN users u ON u.id = user_id
    WHERE username = 'member' AND name IS NOT NULL AND revoke_time IS NULL AND coalesce(expire_time > now(), true)";

/// Inserts API tokens of the member, with SQL expressions for the times of revocation and expiry.
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
async fn user_has_at_most_100_valid_api_tokens() {
    let tracker = Tracker::start().await;
    let member = &tracker.member;
    add_tokens(&tracker, API_TOKENS_MAX, "now()", "NULL").await;
    add_tokens(&tracker, API_TOKENS_MAX, "NULL", "now()").await;
    session(&tracker, "member").await;
    // Neither revoked tokens, expired tokens nor sessions count. The member has one token already.
    add_tokens(&tracker, API_TOKENS_MAX - 2, "NULL", "now() + interval '1 hour'").await;
    let last = create_token(member, "", "the last").await.unwrap().api_token.unwrap();
    assert_eq!(tracker.count(VALID).await, API_TOKENS_MAX);

    let before = tracker.contents().await;
    assert_too_many(create_token(member, "", "one too many").await);
    assert_too_many(create_token(&tracker.admin, &member.user.id, "one too many").await);
    let api_token = Some(ApiToken { name: "one too many".into(), ..ApiToken::default() });
    let dry_run = CreateApiTokenRequest { api_token, validate_only: true };
    assert_too_many(member.auth().create_api_token(dry_run).await.map(tonic::Response::into_inner));
    assert_eq!(tracker.contents().await, before);
    create_token(&tracker.viewer, "", "of another user").await.unwrap();

    // A revocation or an expiry makes room for one token.
    revoke(member, &last.id).await.unwrap();
    create_token(member, "", "instead").await.unwrap();
    assert_too_many(create_token(member, "", "one too many").await);
    tracker.sql("UPDATE tokens SET expire_time = now() WHERE name = 'instead'", &[]).await;
    create_token(member, "", "instead of that").await.unwrap();
    assert_too_many(create_token(member, "", "one too many").await);
}

#[tokio::test]
async fn concurrent_creations_do_not_exceed_the_limit() {
    let tracker = Tracker::start().await;
    add_tokens(&tracker, API_TOKENS_MAX - 2, "NULL", "NULL").await;
    let session = tracker.session().await;
    session.batch_execute("BEGIN; SELECT FROM users WHERE username = 'member' FOR UPDATE").await.unwrap();
    let [one, other] = [tracker.member.clone(), tracker.admin.clone()].map(|by| {
        let user_id = tracker.member.user.id.clone();
        tokio::spawn(async move { create_token(&by, &user_id, "concurrent").await })
    });
    tracker.wait_until(lock_waiters!("= 2")).await;
    session.batch_execute("COMMIT").await.unwrap();

    let (one, other) = (one.await.unwrap(), other.await.unwrap());

    let (created, refused) = if one.is_ok() { (one, other) } else { (other, one) };
    created.unwrap();
    assert_too_many(refused);
    assert_eq!(tracker.count(VALID).await, API_TOKENS_MAX);
}
