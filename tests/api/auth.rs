//! `AuthService`, and what a token is worth.

mod expiry;
mod floods;
mod proxies;
mod throttle;
mod token_limit;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use futures_util::future::join_all;
use issue_tracker::{
    pb::{
        ApiToken, ChangePasswordRequest, CreateApiTokenRequest, CreateApiTokenResponse, CreateUserRequest,
        ListApiTokensRequest, LoginRequest, LoginResponse, LogoutRequest, RevokeApiTokenRequest, UpdateUserRequest,
        User, WhoAmIRequest, auth_service_client::AuthServiceClient,
    },
    server,
};
use tokio_postgres::NoTls;
use tonic::{Code, Request, Status, transport::Endpoint};
use uuid::Uuid;

use crate::harness::{Client, PASSWORD, Tracker, assert_error, assert_invalid, eventually, limits};

const OTHER_PASSWORD: &str = "battery horse correct";

async fn log_in(tracker: &Tracker, username: &str, password: &str) -> Result<LoginResponse, Status> {
    let request = LoginRequest { username: username.to_owned(), password: password.to_owned(), validate_only: false };
    Ok(tracker.client_with_token(None).auth().login(request).await?.into_inner())
}

/// A client with a session of its own.
async fn session(tracker: &Tracker, username: &str) -> Client {
    tracker.client_with_token(Some(&log_in(tracker, username, PASSWORD).await.unwrap().access_token))
}

async fn who_am_i(client: &Client) -> Result<User, Status> {
    Ok(client.auth().who_am_i(WhoAmIRequest {}).await?.into_inner())
}

#[track_caller]
fn assert_unauthenticated<T: std::fmt::Debug>(result: Result<T, Status>) -> Status {
    assert_error(result, Code::Unauthenticated, "UNAUTHENTICATED")
}

async fn create_token(by: &Client, user_id: &str, name: &str) -> Result<CreateApiTokenResponse, Status> {
    let api_token = ApiToken { user_id: user_id.to_owned(), name: name.to_owned(), ..ApiToken::default() };
    let request = CreateApiTokenRequest { api_token: Some(api_token), validate_only: false };
    Ok(by.auth().create_api_token(request).await?.into_inner())
}

async fn revoke(by: &Client, id: &str) -> Result<ApiToken, Status> {
    let request = RevokeApiTokenRequest { id: id.to_owned(), ..Default::default() };
    Ok(by.auth().revoke_api_token(request).await?.into_inner())
}

async fn disable(tracker: &Tracker, user: &User) {
    let user = Some(User { id: user.id.clone(), disabled: true, ..User::default() });
    tracker.admin.users().update_user(UpdateUserRequest { user, ..Default::default() }).await.unwrap();
}

fn change(current: &str, new: &str) -> ChangePasswordRequest {
    ChangePasswordRequest {
        current_password: current.to_owned(),
        new_password: new.to_owned(),
        ..ChangePasswordRequest::default()
    }
}

async fn change_password(client: &Client, request: ChangePasswordRequest) -> Result<(), Status> {
    client.auth().change_password(request).await.map(drop)
}

#[tokio::test]
async fn login_gives_a_token_that_works_until_it_expires() {
    let tracker = Tracker::start_with(limits(&["--session-hours", "2"])).await;
    let reply = log_in(&tracker, "member", PASSWORD).await.unwrap();
    assert_eq!(reply.user.as_ref(), Some(&tracker.member.user));
    assert_eq!(who_am_i(&tracker.client_with_token(Some(&reply.access_token))).await.unwrap(), tracker.member.user);
    let kept = "SELECT floor(extract(epoch FROM expire_time))::int8, expire_time - create_time = interval '2 hours'
        FROM tokens WHERE expire_time IS NOT NULL";
    let kept = &tracker.sql(kept, &[]).await[0];
    assert_eq!((kept.get(0), kept.get(1)), (reply.expire_time.unwrap().seconds, true));

    let unused = session(&tracker, "member").await;
    tracker.sql("UPDATE tokens SET expire_time = now() - interval '1 second' WHERE name IS NULL", &[]).await;
    assert_unauthenticated(who_am_i(&unused).await);
}

#[tokio::test]
async fn whatever_is_wrong_with_credentials_is_told_in_the_same_bytes() {
    let tracker = Tracker::start().await;
    disable(&tracker, &tracker.viewer.user).await;
    let long = "x".repeat(10_000);
    let wrong = [
        ("nobody", PASSWORD),
        ("member", "not the password"),
        ("viewer", PASSWORD),
        ("viewer", "not the password"),
        ("", PASSWORD),
        ("member", ""),
        ("", ""),
        ("member ", PASSWORD),
        (&long, PASSWORD),
        ("member", &long),
        ("member\0", PASSWORD),
        ("\0", PASSWORD),
        ("member", "correct horse battery\0"),
        ("%", PASSWORD),
        ("' OR true --", PASSWORD),
    ];
    let mut told = Vec::new();
    for (username, password) in wrong {
        let status = assert_unauthenticated(log_in(&tracker, username, password).await);
        told.push((status.message().to_owned(), status.details().to_vec()));
    }
    told.dedup();
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE expire_time IS NOT NULL").await, 0);
}

#[tokio::test]
async fn only_the_whole_password_is_the_password() {
    let tracker = Tracker::start().await;
    let longest = "x".repeat(72);
    for (name, password) in [("long", &*longest), ("short", "eight888")] {
        let user = Some(User { username: name.to_owned(), ..User::default() });
        let request = CreateUserRequest { user, password: password.to_owned(), ..Default::default() };
        tracker.admin.users().create_user(request).await.unwrap();
        log_in(&tracker, name, password).await.unwrap();
    }
    // bcrypt stops reading at 72 bytes, and reads a shorter password again and again with a NUL between.
    assert_unauthenticated(log_in(&tracker, "long", &format!("{longest}y")).await);
    assert_unauthenticated(log_in(&tracker, "long", &longest[1..]).await);
    assert_unauthenticated(log_in(&tracker, "short", "eight888\0eight888").await);
    let short = tracker.client_with_token(Some(&log_in(&tracker, "short", "eight888").await.unwrap().access_token));
    let repeated = change_password(&short, change("eight888\0eight888", OTHER_PASSWORD)).await;
    assert_invalid(repeated, &["current_password"]);
}

#[tokio::test]
async fn a_username_is_the_same_in_whatever_case() {
    let tracker = Tracker::start().await;
    let reply = log_in(&tracker, "mEmBeR", PASSWORD).await.unwrap();
    assert_eq!(reply.user, Some(tracker.member.user.clone()));
    assert_unauthenticated(log_in(&tracker, "member", &PASSWORD.to_uppercase()).await);
}

#[tokio::test]
async fn a_client_that_still_sends_its_old_token_can_sign_in() {
    let tracker = Tracker::start().await;
    tracker.member.auth().logout(LogoutRequest::default()).await.unwrap();
    let request = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };
    tracker.member.auth().login(request).await.unwrap();
}

#[tokio::test]
async fn who_is_disabled_while_he_signs_in_gets_no_session() {
    let tracker = Tracker::start().await;
    // The password is right when it is checked; then keeping the session has to wait.
    let (locker, connection) = tracker.config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    locker.batch_execute("BEGIN; LOCK TABLE tokens IN SHARE ROW EXCLUSIVE MODE").await.unwrap();
    let anybody = tracker.client_with_token(None);
    let login = tokio::spawn(async move {
        let request = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };
        anybody.auth().login(request).await
    });
    tracker
        .wait_until(
            "SELECT count(*) = 1 FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '-- create_session%'",
        )
        .await;
    locker.batch_execute("UPDATE users SET disabled = true WHERE username = 'member'; COMMIT").await.unwrap();

    let late = assert_unauthenticated(login.await.unwrap());

    let usual = assert_unauthenticated(log_in(&tracker, "member", PASSWORD).await);
    assert_eq!((late.message(), late.details()), (usual.message(), usual.details()));
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE expire_time IS NOT NULL").await, 0);
}

#[tokio::test]
async fn logout_ends_this_session_at_once_and_no_other() {
    let tracker = Tracker::start().await;
    let (here, elsewhere) = (session(&tracker, "member").await, session(&tracker, "member").await);
    who_am_i(&here).await.unwrap();

    here.auth().logout(LogoutRequest::default()).await.unwrap();

    assert_unauthenticated(who_am_i(&here).await);
    assert_unauthenticated(here.auth().logout(LogoutRequest::default()).await);
    who_am_i(&elsewhere).await.unwrap();
    who_am_i(&tracker.member).await.unwrap();
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE revoke_time IS NOT NULL").await, 1);
}

#[tokio::test]
async fn logout_with_an_api_token_revokes_it() {
    let tracker = Tracker::start().await;
    tracker.member.auth().logout(LogoutRequest::default()).await.unwrap();
    assert_unauthenticated(who_am_i(&tracker.member).await);
    assert_eq!(
        tracker.count("SELECT count(*) FROM tokens WHERE name IS NOT NULL AND revoke_time IS NOT NULL").await,
        1
    );
}

/// Calls that find the token valid just before it ends must not make it believed for longer.
#[tokio::test]
async fn calls_under_way_do_not_keep_an_ended_session_alive() {
    let tracker = Tracker::start().await;
    for _ in 0..60 {
        let session = session(&tracker, "member").await;
        let calls: Vec<_> = (0..8).map(|_| who_am_i(&session)).collect();
        let mut auth = session.auth();
        let (logout, _) = tokio::join!(auth.logout(LogoutRequest::default()), join_all(calls));
        logout.unwrap();
        assert_unauthenticated(who_am_i(&session).await);
    }
}

#[tokio::test]
async fn a_token_that_is_revoked_here_ends_on_other_replicas_too() {
    let tracker = Tracker::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let replica = Endpoint::try_from(format!("http://{}", listener.local_addr().unwrap())).unwrap().connect_lazy();
    let db = tracker.db.clone();
    tokio::spawn(async move { server::run(listener, db, &limits(&[]), std::future::pending()).await });
    let on_replica = Tracker::client_on(replica, &tracker.member.token);
    who_am_i(&on_replica).await.unwrap();

    tracker.member.auth().logout(LogoutRequest::default()).await.unwrap();

    eventually("the token has ended on the replica", move || {
        let on_replica = on_replica.clone();
        Box::pin(async move { who_am_i(&on_replica).await.is_err_and(|status| status.code() == Code::Unauthenticated) })
    })
    .await;
}

#[tokio::test]
async fn credentials_that_are_no_token_of_ours_are_refused() {
    let tracker = Tracker::start().await;
    let token = &tracker.member.token;
    let values = [
        String::new(),
        "Bearer".into(),
        "Bearer ".into(),
        token.clone(),
        format!("Basic {token}"),
        format!("Bearer{token}"),
        format!("Bearer {}", token.replacen("itk_", "abc_", 1)),
        format!("Bearer {}", token.trim_start_matches("itk_")),
        format!("Bearer {}", &token[..token.len() - 1]),
        format!("Bearer {token}A"),
        format!("Bearer itk_{}", "A".repeat(43)),
        format!("Bearer {token} {token}"),
        format!("Bearer itk_{}", "A".repeat(8_000)),
    ];
    for value in values {
        let mut request = Request::new(WhoAmIRequest {});
        request.metadata_mut().insert("authorization", value.parse().unwrap());
        assert_unauthenticated(AuthServiceClient::new(tracker.channel.clone()).who_am_i(request).await);
    }
    let mut request = Request::new(WhoAmIRequest {});
    request.metadata_mut().insert("authorization", format!("bearer {token}").parse().unwrap());
    AuthServiceClient::new(tracker.channel.clone()).who_am_i(request).await.expect("the scheme has no case");
}

#[tokio::test]
async fn api_tokens_are_listed_newest_first_in_pages_until_they_are_revoked() {
    let tracker = Tracker::start().await;
    for name in ["one", "two", "three"] {
        create_token(&tracker.member, "", name).await.unwrap();
    }
    create_token(&tracker.viewer, "", "of somebody else").await.unwrap();
    session(&tracker, "member").await;
    let page = |page_size, page_token| ListApiTokensRequest { page_size, page_token, ..Default::default() };
    let mut auth = tracker.member.auth();

    let first = auth.list_api_tokens(page(3, String::new())).await.unwrap().into_inner();
    let second = auth.list_api_tokens(page(3, first.next_page_token.clone())).await.unwrap().into_inner();

    let names = |tokens: &[ApiToken]| tokens.iter().map(|token| token.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&first.api_tokens), ["three", "two", "one"]);
    assert_eq!((names(&second.api_tokens), &*second.next_page_token), (vec!["test".to_owned()], ""));
    revoke(&tracker.member, &first.api_tokens[1].id).await.unwrap();
    let left = auth.list_api_tokens(page(0, String::new())).await.unwrap().into_inner();
    assert_eq!(names(&left.api_tokens), ["three", "one", "test"]);
    // A page token is of one user's list.
    let request = ListApiTokensRequest { user_id: tracker.viewer.user.id.clone(), ..page(3, first.next_page_token) };
    assert_invalid(tracker.admin.auth().list_api_tokens(request).await, &["page_token"]);
}

#[tokio::test]
async fn a_revoked_api_token_stops_at_once_and_can_be_revoked_again() {
    let tracker = Tracker::start().await;
    let made = create_token(&tracker.member, "", "of a robot").await.unwrap();
    let (robot, api_token) = (tracker.client_with_token(Some(&made.access_token)), made.api_token.unwrap());
    assert_eq!((&*api_token.user_id, api_token.revoke_time), (&*tracker.member.user.id, None));
    who_am_i(&robot).await.unwrap();

    let revoked = revoke(&tracker.member, &api_token.id).await.unwrap();

    assert_unauthenticated(who_am_i(&robot).await);
    assert_eq!(ApiToken { revoke_time: None, ..revoked.clone() }, api_token);
    assert!(revoked.revoke_time.is_some());
    assert_eq!(revoke(&tracker.member, &api_token.id).await.unwrap(), revoked);
    who_am_i(&tracker.member).await.unwrap();
}

#[tokio::test]
async fn only_administrators_revoke_tokens_of_others() {
    let tracker = Tracker::start().await;
    let made = create_token(&tracker.viewer, "", "of a robot").await.unwrap();
    let (robot, id) = (tracker.client_with_token(Some(&made.access_token)), made.api_token.unwrap().id);

    assert_error(revoke(&tracker.member, &id).await, Code::NotFound, "NOT_FOUND");
    who_am_i(&robot).await.unwrap();
    revoke(&tracker.admin, &id).await.unwrap();
    assert_unauthenticated(who_am_i(&robot).await);

    // A session is no API token.
    session(&tracker, "member").await;
    let session_id: Uuid = tracker.sql("SELECT id FROM tokens WHERE name IS NULL", &[]).await[0].get(0);
    assert_error(revoke(&tracker.admin, &session_id.to_string()).await, Code::NotFound, "NOT_FOUND");
    assert_error(revoke(&tracker.admin, &Uuid::now_v7().to_string()).await, Code::NotFound, "NOT_FOUND");
    assert_invalid(revoke(&tracker.admin, "1").await, &["id"]);
}

#[tokio::test]
async fn only_administrators_make_and_list_tokens_of_others() {
    let tracker = Tracker::start().await;
    let viewer = &tracker.viewer.user;
    let before = tracker.contents().await;
    let list = ListApiTokensRequest { user_id: viewer.id.clone(), ..Default::default() };
    let denied = (Code::PermissionDenied, "PERMISSION_DENIED");
    // Denied, not invalid, though the name is.
    assert_error(create_token(&tracker.member, &viewer.id, "").await, denied.0, denied.1);
    assert_error(tracker.member.auth().list_api_tokens(list.clone()).await, denied.0, denied.1);
    assert_eq!(tracker.contents().await, before);

    let made = create_token(&tracker.admin, &viewer.id, "made by the admin").await.unwrap();
    assert_eq!(who_am_i(&tracker.client_with_token(Some(&made.access_token))).await.unwrap(), *viewer);
    let listed = tracker.admin.auth().list_api_tokens(list).await.unwrap().into_inner();
    assert_eq!(listed.api_tokens.first(), made.api_token.as_ref());
}

#[tokio::test]
async fn tokens_are_made_for_users_who_exist_and_are_enabled() {
    let tracker = Tracker::start().await;
    disable(&tracker, &tracker.viewer.user).await;
    let before = tracker.contents().await;
    let disabled = create_token(&tracker.admin, &tracker.viewer.user.id, "x").await;
    assert_error(disabled, Code::FailedPrecondition, "USER_DISABLED");
    let unknown = create_token(&tracker.admin, &Uuid::now_v7().to_string(), "x").await;
    assert_error(unknown, Code::NotFound, "NOT_FOUND");
    assert_invalid(create_token(&tracker.admin, "viewer", "x").await, &["api_token.user_id"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn a_tokens_name_has_1_to_100_characters() {
    let tracker = Tracker::start().await;
    for name in ["", " ", "a\0b", &"é".repeat(101)] {
        assert_invalid(create_token(&tracker.member, "", name).await, &["api_token.name"]);
    }
    let longest = "é".repeat(100);
    assert_eq!(create_token(&tracker.member, "", &longest).await.unwrap().api_token.unwrap().name, longest);
}

#[tokio::test]
async fn no_secret_is_in_the_database() {
    let tracker = Tracker::start().await;
    let login = log_in(&tracker, "member", PASSWORD).await.unwrap();
    let made = create_token(&tracker.member, "", "named in clear").await.unwrap();
    let user = Some(User { username: "another".into(), ..User::default() });
    let create = CreateUserRequest {
        user,
        password: "the first password".into(),
        request_id: Uuid::now_v7().to_string(),
        validate_only: false,
    };
    tracker.admin.users().create_user(create).await.unwrap();
    let request_id = Uuid::now_v7().to_string();
    let change = ChangePasswordRequest { request_id, ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, change).await.unwrap();

    let contents = tracker.contents().await.join("\n").to_lowercase();

    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let contains = |secret: &str| {
        let key = secret.trim_start_matches("itk_");
        let decoded = BASE64_URL_SAFE_NO_PAD.decode(key).unwrap_or(key.into());
        [key.to_lowercase(), hex(key.as_bytes()), hex(&decoded)].iter().any(|form| contents.contains(form))
    };
    assert!(contains("named in clear") && contains("another"), "the search finds what is there");
    for secret in [&*login.access_token, &*made.access_token, PASSWORD, OTHER_PASSWORD, "the first password"] {
        assert!(!contains(secret), "{secret} is in the database");
    }
}

#[tokio::test]
async fn a_new_password_ends_the_other_sessions_and_nothing_else() {
    let tracker = Tracker::start().await;
    let (here, elsewhere) = (session(&tracker, "member").await, session(&tracker, "member").await);
    let somebody = session(&tracker, "viewer").await;
    who_am_i(&elsewhere).await.unwrap();

    change_password(&here, change(PASSWORD, OTHER_PASSWORD)).await.unwrap();

    assert_unauthenticated(who_am_i(&elsewhere).await);
    for client in [&here, &tracker.member, &somebody] {
        who_am_i(client).await.unwrap();
    }
    assert_unauthenticated(log_in(&tracker, "member", PASSWORD).await);
    log_in(&tracker, "member", OTHER_PASSWORD).await.unwrap();
}

#[tokio::test]
async fn the_current_password_must_be_right() {
    let tracker = Tracker::start().await;
    let contents = async || {
        // Wrong ones are told in the audit trail.
        let rows = tracker.contents().await.into_iter();
        rows.filter(|row| !row.starts_with("audit_events")).collect::<Vec<_>>()
    };
    let before = contents().await;
    for wrong in ["", "wrong password", "correct horse battery "] {
        assert_invalid(change_password(&tracker.member, change(wrong, OTHER_PASSWORD)).await, &["current_password"]);
    }
    assert_eq!(contents().await, before);
}

#[tokio::test]
async fn a_new_password_has_8_to_72_bytes_and_no_nul() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for bad in ["", "7 bytes", "ééé7", &"x".repeat(73), &("é".repeat(36) + "x"), "with a \0 in it"] {
        assert_invalid(change_password(&tracker.member, change(PASSWORD, bad)).await, &["new_password"]);
    }
    assert_eq!(tracker.contents().await, before);

    let mut current = PASSWORD.to_owned();
    for good in ["8 bytes!".to_owned(), "é".repeat(4), "x".repeat(72), "é".repeat(36)] {
        change_password(&tracker.member, change(&current, &good)).await.unwrap();
        log_in(&tracker, "member", &good).await.unwrap();
        current = good;
    }
}

#[tokio::test]
async fn a_repeated_change_of_password_succeeds_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, request.clone()).await.unwrap();
    let before = tracker.contents().await;

    change_password(&tracker.member, request.clone()).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    let anew = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..request };
    assert_invalid(change_password(&tracker.member, anew).await, &["current_password"]);
}

#[tokio::test]
async fn a_change_of_password_that_is_repeated_while_it_is_under_way_succeeds() {
    let tracker = Tracker::start().await;
    for round in 0..20 {
        let words = [format!("the password {round}"), format!("the password {}", round + 1)];
        let current = if round == 0 { PASSWORD } else { &words[0] };
        let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(current, &words[1]) };
        let calls = (0..2).map(|_| change_password(&tracker.member, request.clone()));
        for result in join_all(calls).await {
            result.unwrap();
        }
    }
}

#[tokio::test]
async fn of_two_changes_of_one_password_at_once_one_is_made() {
    let tracker = Tracker::start().await;
    let mut current = PASSWORD.to_owned();
    for round in 0..20 {
        let new = [format!("left password {round}"), format!("right password {round}")];
        let (left, right) = tokio::join!(
            change_password(&tracker.member, change(&current, &new[0])),
            change_password(&tracker.member, change(&current, &new[1]))
        );
        let (made, refused) = if left.is_ok() { (&new[0], right) } else { (&new[1], left) };
        assert_invalid(refused, &["current_password"]);
        log_in(&tracker, "member", made).await.unwrap();
        current = made.clone();
    }
}

#[tokio::test]
async fn a_trial_of_any_mutation_writes_nothing_and_shows_no_token() {
    let tracker = Tracker::start().await;
    let session = session(&tracker, "member").await;
    let made = create_token(&tracker.member, "", "stays").await.unwrap().api_token.unwrap();
    let before = tracker.contents().await;
    let mut auth = session.auth();

    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: true };
    let login = auth.login(login).await.unwrap().into_inner();
    assert_eq!(login, LoginResponse { user: Some(tracker.member.user.clone()), ..LoginResponse::default() });
    let api_token = Some(ApiToken { name: "tried".into(), ..ApiToken::default() });
    let create = CreateApiTokenRequest { api_token, validate_only: true };
    let create = auth.create_api_token(create).await.unwrap().into_inner();
    assert_eq!((&*create.api_token.unwrap().name, &*create.access_token), ("tried", ""));
    let request = RevokeApiTokenRequest { id: made.id, validate_only: true, ..Default::default() };
    assert!(auth.revoke_api_token(request).await.unwrap().into_inner().revoke_time.is_some());
    let request = ChangePasswordRequest { validate_only: true, ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&session, request).await.unwrap();
    auth.logout(LogoutRequest { validate_only: true, ..Default::default() }).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    who_am_i(&session).await.expect("the session goes on");
}

#[tokio::test]
async fn a_trial_fails_as_the_real_call_would() {
    let tracker = Tracker::start().await;
    let request = LoginRequest { username: "member".into(), password: "wrong".into(), validate_only: true };
    assert_unauthenticated(tracker.client_with_token(None).auth().login(request).await);
    let request = ChangePasswordRequest { validate_only: true, ..change("wrong", OTHER_PASSWORD) };
    assert_invalid(change_password(&tracker.member, request).await, &["current_password"]);
    let id = Uuid::now_v7().to_string();
    let request = RevokeApiTokenRequest { id, validate_only: true, ..Default::default() };
    assert_error(tracker.member.auth().revoke_api_token(request).await, Code::NotFound, "NOT_FOUND");
}
