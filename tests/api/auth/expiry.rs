//! Expiry of API tokens and sessions.

use std::time::{Duration, SystemTime};

use issue_tracker::db::tokens::prune_tokens;
use prost_types::Timestamp;

use super::*;

async fn create_until(by: &Client, expire_time: Timestamp) -> Result<CreateApiTokenResponse, Status> {
    let api_token = ApiToken { name: "for a while".into(), expire_time: Some(expire_time), ..ApiToken::default() };
    let request = CreateApiTokenRequest { api_token: Some(api_token), validate_only: false };
    Ok(by.auth().create_api_token(request).await?.into_inner())
}

fn seconds_from_now(seconds: i64) -> Timestamp {
    let mut time = Timestamp::from(SystemTime::now());
    time.seconds += seconds;
    // The database stores microseconds.
    time.nanos -= time.nanos % 1_000;
    time
}

#[tokio::test]
async fn cached_api_token_is_rejected_from_its_expiry() {
    let tracker = Tracker::start().await;
    let expire_time = seconds_from_now(2);
    let created = create_until(&tracker.member, expire_time).await.unwrap();
    assert_eq!(created.api_token.unwrap().expire_time, Some(expire_time));
    let robot = tracker.client_with_token(Some(&created.access_token));
    let end = SystemTime::try_from(expire_time).unwrap();

    // Calls without a pause keep the token in the cache, whose entries live for 5 s.
    let mut worked = 0;
    loop {
        let began = SystemTime::now();
        let result = who_am_i(&robot).await;
        if began >= end {
            assert_unauthenticated(result);
            break;
        }
        // In the last 20 ms either outcome is correct.
        if SystemTime::now() + Duration::from_millis(20) < end {
            result.unwrap();
            worked += 1;
        }
    }
    assert!(worked > 0, "no call succeeded before the expiry");
    who_am_i(&tracker.member).await.expect("other tokens stay valid");
}

#[tokio::test]
async fn expire_time_must_be_in_the_future_and_is_listed() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    let bad = [
        seconds_from_now(-1),
        Timestamp::default(),
        Timestamp { seconds: 253_402_300_800, nanos: 0 },
        Timestamp { nanos: -1, ..seconds_from_now(9) },
    ];
    for bad in bad {
        assert_invalid(create_until(&tracker.member, bad).await, &["api_token.expire_time"]);
    }
    assert_eq!(tracker.contents().await, before);

    let last = Timestamp { seconds: 253_402_300_799, nanos: 0 };
    let created = create_until(&tracker.member, last).await.unwrap();
    who_am_i(&tracker.client_with_token(Some(&created.access_token))).await.unwrap();
    let list = tracker.member.auth().list_api_tokens(ListApiTokensRequest::default()).await.unwrap().into_inner();
    let listed: Vec<_> = list.api_tokens.iter().map(|token| token.expire_time).collect();
    assert_eq!(listed, [Some(last), None]);
    let revoked = revoke(&tracker.member, &created.api_token.unwrap().id).await.unwrap();
    assert_eq!(revoked.expire_time, Some(last));
}

#[tokio::test]
async fn password_change_does_not_revoke_api_tokens_that_expire() {
    let tracker = Tracker::start().await;
    let created = create_until(&tracker.member, seconds_from_now(600)).await.unwrap();
    let robot = tracker.client_with_token(Some(&created.access_token));
    session(&tracker, "member").await;
    change_password(&tracker.member, change(PASSWORD, OTHER_PASSWORD)).await.unwrap();
    who_am_i(&robot).await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE revoke_time IS NOT NULL").await, 1);
}

#[tokio::test]
async fn expired_sessions_are_pruned_after_1_day_and_api_tokens_after_30_days() {
    let tracker = Tracker::start().await;
    for (name, ago) in [("old", "31 days"), ("young", "29 days"), ("valid", "-1 hours")] {
        create_token(&tracker.member, "", name).await.unwrap();
        let age = format!("UPDATE tokens SET expire_time = now() - interval '{ago}' WHERE name = $1");
        tracker.sql(&age, &[&name]).await;
    }
    for ago in ["25 hours", "23 hours"] {
        session(&tracker, "viewer").await;
        let age = format!(
            "UPDATE tokens SET expire_time = now() - interval '{ago}' WHERE name IS NULL AND expire_time > now()"
        );
        tracker.sql(&age, &[]).await;
    }

    // The service may have pruned them already.
    prune_tokens(&tracker.db.conn().await.unwrap()).await.unwrap();

    let names = "SELECT string_agg(coalesce(name, 'session'), ' ' ORDER BY name, id) FROM tokens WHERE name <> 'test'
        OR name IS NULL";
    assert_eq!(tracker.sql(names, &[]).await[0].get::<_, String>(0), "valid young session");
}
