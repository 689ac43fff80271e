//! `AuthService`: logins, sessions, API tokens, passwords.

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

use crate::harness::{
    Client, PASSWORD, Tracker, advance_clock, assert_error, assert_invalid, bad_fields, eventually, limits,
};

const OTHER_PASSWORD: &str = "battery horse correct";

async fn log_in(tracker: &Tracker, username: &str, password: &str) -> Result<LoginResponse, Status> {
    let request = LoginRequest { username: username.to_owned(), password: password.to_owned(), validate_only: false };
    Ok(tracker.client_with_token(None).auth().login(request).await?.into_inner())
}

/// Logs in and returns a client with the new session.
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
async fn login_returns_a_token_that_works_until_it_expires() {
    let tracker = Tracker::start_with(limits(&["--session-hours", "2"])).await;
    let response = log_in(&tracker, "member", PASSWORD).await.unwrap();
    assert_eq!(response.user.as_ref(), Some(&tracker.member.user));
    assert_eq!(who_am_i(&tracker.client_with_token(Some(&response.access_token))).await.unwrap(), tracker.member.user);
    let stored = "SELECT floor(extract(epoch FROM expire_time))::int8, expire_time - create_time = interval '2 hours'
        FROM tokens WHERE expire_time IS NOT NULL";
    let stored = &tracker.sql(stored, &[]).await[0];
    assert_eq!((stored.get(0), stored.get(1)), (response.expire_time.unwrap().seconds, true));

    // A session whose token is not cached.
    let unused = session(&tracker, "member").await;
    tracker.sql("UPDATE tokens SET expire_time = now() - interval '1 second' WHERE name IS NULL", &[]).await;
    assert_unauthenticated(who_am_i(&unused).await);
}

#[tokio::test]
async fn all_wrong_credentials_return_the_same_error_byte_for_byte() {
    let tracker = Tracker::start().await;
    disable(&tracker, &tracker.viewer.user).await;
    let long = "x".repeat(10_000);
    let wrong = [
        ("no-such-user", PASSWORD),
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
    let mut errors = Vec::new();
    for (username, password) in wrong {
        let status = assert_unauthenticated(log_in(&tracker, username, password).await);
        errors.push((status.message().to_owned(), status.details().to_vec()));
    }
    errors.dedup();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE expire_time IS NOT NULL").await, 0);
}

#[tokio::test]
async fn login_requires_the_exact_password() {
    let tracker = Tracker::start().await;
    let longest = "x".repeat(72);
    for (name, password) in [("long", &*longest), ("short", "eight888")] {
        let user = Some(User { username: name.to_owned(), ..User::default() });
        let request = CreateUserRequest { user, password: password.to_owned(), ..Default::default() };
        tracker.admin.users().create_user(request).await.unwrap();
        log_in(&tracker, name, password).await.unwrap();
    }
    // bcrypt ignores bytes after the 72nd, and repeats a shorter password with a NUL between.
    assert_unauthenticated(log_in(&tracker, "long", &format!("{longest}y")).await);
    assert_unauthenticated(log_in(&tracker, "long", &longest[1..]).await);
    assert_unauthenticated(log_in(&tracker, "short", "eight888\0eight888").await);
    let short = tracker.client_with_token(Some(&log_in(&tracker, "short", "eight888").await.unwrap().access_token));
    let repeated = change_password(&short, change("eight888\0eight888", OTHER_PASSWORD)).await;
    assert_invalid(repeated, &["current_password"]);
}

#[tokio::test]
async fn usernames_are_case_insensitive_and_passwords_are_not() {
    let tracker = Tracker::start().await;
    let response = log_in(&tracker, "mEmBeR", PASSWORD).await.unwrap();
    assert_eq!(response.user, Some(tracker.member.user.clone()));
    assert_unauthenticated(log_in(&tracker, "member", &PASSWORD.to_uppercase()).await);
}

#[tokio::test]
async fn login_with_a_revoked_token_in_the_metadata_succeeds() {
    let tracker = Tracker::start().await;
    tracker.member.auth().logout(LogoutRequest::default()).await.unwrap();
    let request = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };
    tracker.member.auth().login(request).await.unwrap();
}

#[tokio::test]
async fn user_disabled_during_login_gets_no_session() {
    let tracker = Tracker::start().await;
    // The lock blocks the login between the check of the password and the creation of the session.
    let (locker, connection) = tracker.config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    locker.batch_execute("BEGIN; LOCK TABLE tokens IN SHARE ROW EXCLUSIVE MODE").await.unwrap();
    let client = tracker.client_with_token(None);
    let login = tokio::spawn(async move {
        let request = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };
        client.auth().login(request).await
    });
    tracker
        .wait_until(
            "SELECT count(*) = 1 FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND datname = current_database() AND query LIKE '-- create_session%'",
        )
        .await;
    locker.batch_execute("UPDATE users SET disabled = true WHERE username = 'member'; COMMIT").await.unwrap();

    let during_login = assert_unauthenticated(login.await.unwrap());

    let before_login = assert_unauthenticated(log_in(&tracker, "member", PASSWORD).await);
    assert_eq!((during_login.message(), during_login.details()), (before_login.message(), before_login.details()));
    assert_eq!(tracker.count("SELECT count(*) FROM tokens WHERE expire_time IS NOT NULL").await, 0);
}

#[tokio::test]
async fn logout_ends_only_its_own_session_immediately() {
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

/// A look-up that starts before the logout must not put the token back into the cache after it.
#[tokio::test]
async fn concurrent_calls_do_not_keep_an_ended_session_alive() {
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
async fn token_revoked_on_one_replica_ends_on_the_others() {
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
async fn malformed_and_unknown_credentials_are_unauthenticated() {
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
    AuthServiceClient::new(tracker.channel.clone()).who_am_i(request).await.expect("the scheme is case-insensitive");
}

#[tokio::test]
async fn valid_api_tokens_are_listed_newest_first_in_pages() {
    let tracker = Tracker::start().await;
    for name in ["one", "two", "three"] {
        create_token(&tracker.member, "", name).await.unwrap();
    }
    create_token(&tracker.viewer, "", "of another user").await.unwrap();
    session(&tracker, "member").await;
    let page = |page_size, page_token| ListApiTokensRequest { page_size, page_token, ..Default::default() };
    let mut auth = tracker.member.auth();

    let first = auth.list_api_tokens(page(3, String::new())).await.unwrap().into_inner();
    let second = auth.list_api_tokens(page(3, first.next_page_token.clone())).await.unwrap().into_inner();

    let names = |tokens: &[ApiToken]| tokens.iter().map(|token| token.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&first.api_tokens), ["three", "two", "one"]);
    assert_eq!((names(&second.api_tokens), &*second.next_page_token), (vec!["test".to_owned()], ""));
    revoke(&tracker.member, &first.api_tokens[1].id).await.unwrap();
    let remaining = auth.list_api_tokens(page(0, String::new())).await.unwrap().into_inner();
    assert_eq!(names(&remaining.api_tokens), ["three", "one", "test"]);
    // A page token is bound to the user whose tokens are listed.
    let request = ListApiTokensRequest { user_id: tracker.viewer.user.id.clone(), ..page(3, first.next_page_token) };
    assert_invalid(tracker.admin.auth().list_api_tokens(request).await, &["page_token"]);
}

#[tokio::test]
async fn api_token_revocation_takes_effect_immediately_and_is_idempotent() {
    let tracker = Tracker::start().await;
    let created = create_token(&tracker.member, "", "of a robot").await.unwrap();
    let (robot, api_token) = (tracker.client_with_token(Some(&created.access_token)), created.api_token.unwrap());
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
async fn only_administrators_may_revoke_tokens_of_others() {
    let tracker = Tracker::start().await;
    let created = create_token(&tracker.viewer, "", "of a robot").await.unwrap();
    let (robot, id) = (tracker.client_with_token(Some(&created.access_token)), created.api_token.unwrap().id);

    assert_error(revoke(&tracker.member, &id).await, Code::NotFound, "NOT_FOUND");
    who_am_i(&robot).await.unwrap();
    revoke(&tracker.admin, &id).await.unwrap();
    assert_unauthenticated(who_am_i(&robot).await);

    // A session's token is not an API token.
    session(&tracker, "member").await;
    let session_id: Uuid = tracker.sql("SELECT id FROM tokens WHERE name IS NULL", &[]).await[0].get(0);
    assert_error(revoke(&tracker.admin, &session_id.to_string()).await, Code::NotFound, "NOT_FOUND");
    assert_error(revoke(&tracker.admin, &Uuid::now_v7().to_string()).await, Code::NotFound, "NOT_FOUND");
    assert_invalid(revoke(&tracker.admin, "1").await, &["id"]);
}

#[tokio::test]
async fn only_administrators_may_create_and_list_tokens_of_others() {
    let tracker = Tracker::start().await;
    let viewer = &tracker.viewer.user;
    let before = tracker.contents().await;
    let list = ListApiTokensRequest { user_id: viewer.id.clone(), ..Default::default() };
    let denied = (Code::PermissionDenied, "PERMISSION_DENIED");
    // The name is invalid too: authorization is checked before validation.
    assert_error(create_token(&tracker.member, &viewer.id, "").await, denied.0, denied.1);
    assert_error(tracker.member.auth().list_api_tokens(list.clone()).await, denied.0, denied.1);
    assert_eq!(tracker.contents().await, before);

    let created = create_token(&tracker.admin, &viewer.id, "created by the admin").await.unwrap();
    assert_eq!(who_am_i(&tracker.client_with_token(Some(&created.access_token))).await.unwrap(), *viewer);
    let listed = tracker.admin.auth().list_api_tokens(list).await.unwrap().into_inner();
    assert_eq!(listed.api_tokens.first(), created.api_token.as_ref());
}

#[tokio::test]
async fn api_token_requires_an_existing_enabled_user() {
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
async fn api_token_name_has_1_to_100_characters() {
    let tracker = Tracker::start().await;
    for name in ["", " ", "a\0b", &"é".repeat(101)] {
        assert_invalid(create_token(&tracker.member, "", name).await, &["api_token.name"]);
    }
    let longest = "é".repeat(100);
    assert_eq!(create_token(&tracker.member, "", &longest).await.unwrap().api_token.unwrap().name, longest);
}

#[tokio::test]
async fn no_secret_is_stored_in_plain_text() {
    let tracker = Tracker::start().await;
    let login = log_in(&tracker, "member", PASSWORD).await.unwrap();
    let created = create_token(&tracker.member, "", "named in clear").await.unwrap();
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
    assert!(contains("named in clear") && contains("another"), "the search does not find what is stored in clear");
    for secret in [&*login.access_token, &*created.access_token, PASSWORD, OTHER_PASSWORD, "the first password"] {
        assert!(!contains(secret), "{secret} is in the database");
    }
}

#[tokio::test]
async fn password_change_ends_only_the_other_sessions_of_the_user() {
    let tracker = Tracker::start().await;
    let (here, elsewhere) = (session(&tracker, "member").await, session(&tracker, "member").await);
    let other_user = session(&tracker, "viewer").await;
    who_am_i(&elsewhere).await.unwrap();

    change_password(&here, change(PASSWORD, OTHER_PASSWORD)).await.unwrap();

    assert_unauthenticated(who_am_i(&elsewhere).await);
    for client in [&here, &tracker.member, &other_user] {
        who_am_i(client).await.unwrap();
    }
    assert_unauthenticated(log_in(&tracker, "member", PASSWORD).await);
    log_in(&tracker, "member", OTHER_PASSWORD).await.unwrap();
}

#[tokio::test]
async fn password_change_with_a_wrong_current_password_is_invalid() {
    let tracker = Tracker::start().await;
    let contents = async || {
        // The failures are in the audit log.
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
async fn new_password_has_8_to_72_bytes_and_no_nul() {
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
async fn repeated_password_change_succeeds_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, request.clone()).await.unwrap();
    let before = tracker.contents().await;

    change_password(&tracker.member, request.clone()).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    let new_request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..request };
    assert_invalid(change_password(&tracker.member, new_request).await, &["current_password"]);
}

#[tokio::test]
async fn used_request_id_with_another_new_password_is_refused_and_counts_as_a_wrong_password() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "4"])).await;
    let request = ChangePasswordRequest { request_id: Uuid::now_v7().to_string(), ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&tracker.member, request.clone()).await.unwrap();

    for current in [PASSWORD, OTHER_PASSWORD, "wrong password", PASSWORD] {
        let current_password = current.to_owned();
        let new_password = "a third password".to_owned();
        let reused = ChangePasswordRequest { current_password, new_password, ..request.clone() };
        let status =
            assert_error(change_password(&tracker.member, reused).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
        assert_eq!(bad_fields(&status), ["request_id"]);
    }

    assert_error(change_password(&tracker.member, request).await, Code::ResourceExhausted, "TOO_MANY_TRIES");
    log_in(&tracker, "member", OTHER_PASSWORD).await.unwrap();
}

#[tokio::test]
async fn password_change_retried_while_in_flight_succeeds() {
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
async fn one_of_two_concurrent_password_changes_succeeds() {
    let tracker = Tracker::start().await;
    let mut current = PASSWORD.to_owned();
    for round in 0..20 {
        let new = [format!("left password {round}"), format!("right password {round}")];
        let (left, right) = tokio::join!(
            change_password(&tracker.member, change(&current, &new[0])),
            change_password(&tracker.member, change(&current, &new[1]))
        );
        let (stored, refused) = if left.is_ok() { (&new[0], right) } else { (&new[1], left) };
        assert_invalid(refused, &["current_password"]);
        log_in(&tracker, "member", stored).await.unwrap();
        current = stored.clone();
    }
}

#[tokio::test]
async fn dry_runs_write_nothing_and_return_no_token() {
    let tracker = Tracker::start().await;
    let session = session(&tracker, "member").await;
    let created = create_token(&tracker.member, "", "stays").await.unwrap().api_token.unwrap();
    let before = tracker.contents().await;
    let mut auth = session.auth();

    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: true };
    let login = auth.login(login).await.unwrap().into_inner();
    assert_eq!(login, LoginResponse { user: Some(tracker.member.user.clone()), ..LoginResponse::default() });
    let api_token = Some(ApiToken { name: "dry run".into(), ..ApiToken::default() });
    let create = CreateApiTokenRequest { api_token, validate_only: true };
    let create = auth.create_api_token(create).await.unwrap().into_inner();
    assert_eq!((&*create.api_token.unwrap().name, &*create.access_token), ("dry run", ""));
    let request = RevokeApiTokenRequest { id: created.id, validate_only: true, ..Default::default() };
    assert!(auth.revoke_api_token(request).await.unwrap().into_inner().revoke_time.is_some());
    let request = ChangePasswordRequest { validate_only: true, ..change(PASSWORD, OTHER_PASSWORD) };
    change_password(&session, request).await.unwrap();
    auth.logout(LogoutRequest { validate_only: true, ..Default::default() }).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    who_am_i(&session).await.expect("the session is still valid");
}

#[tokio::test]
async fn dry_run_fails_as_the_real_call_would() {
    let tracker = Tracker::start().await;
    let request = LoginRequest { username: "member".into(), password: "wrong".into(), validate_only: true };
    assert_unauthenticated(tracker.client_with_token(None).auth().login(request).await);
    let request = ChangePasswordRequest { validate_only: true, ..change("wrong", OTHER_PASSWORD) };
    assert_invalid(change_password(&tracker.member, request).await, &["current_password"]);
    let id = Uuid::now_v7().to_string();
    let request = RevokeApiTokenRequest { id, validate_only: true, ..Default::default() };
    assert_error(tracker.member.auth().revoke_api_token(request).await, Code::NotFound, "NOT_FOUND");
}
