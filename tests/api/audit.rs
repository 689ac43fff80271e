//! The audit log: logins, and changes of users, passwords and tokens.

use futures_util::future::join_all;
use issue_tracker::{
    db::audit::prune_audit_events,
    pb::{
        ApiToken, AuditAction, AuditEvent, ChangePasswordRequest, CreateApiTokenRequest, CreateApiTokenResponse,
        CreateUserRequest, ListAuditEventsRequest, ListAuditEventsResponse, LoginRequest, LogoutRequest,
        RevokeApiTokenRequest, Role, UpdateUserRequest, User,
    },
};
use prost_types::FieldMask;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::harness::{Client, PASSWORD, Tracker, assert_error, assert_invalid, limits};

/// The default of `--audit-days`.
const AUDIT_DAYS: i32 = 400;

async fn list(by: &Client, request: ListAuditEventsRequest) -> Result<ListAuditEventsResponse, Status> {
    Ok(by.users().list_audit_events(request).await?.into_inner())
}

/// All events, oldest first.
async fn all_events(tracker: &Tracker) -> Vec<AuditEvent> {
    let request = ListAuditEventsRequest { page_size: 1_000, ..Default::default() };
    let mut events = list(&tracker.admin, request).await.unwrap().audit_events;
    events.reverse();
    events
}

/// Formats an event as `ACTION by actor: user old>new`. The users of [`Tracker`] appear by name, any other as "another".
fn summary(tracker: &Tracker, event: &AuditEvent) -> String {
    let known = [&tracker.admin.user, &tracker.member.user, &tracker.viewer.user];
    let name = |id: &str| match known.iter().find(|user| user.id == id) {
        Some(user) => user.username.clone(),
        None if id.is_empty() => "none".to_owned(),
        None => "another".to_owned(),
    };
    let action = event.action().as_str_name().trim_start_matches("AUDIT_ACTION_");
    let (actor, user) = (name(&event.actor_id), name(&event.user_id));
    format!("{action} by {actor}: {user} {}>{}", event.old_value, event.new_value)
}

/// Summaries of the events that some calls write.
async fn events_of(tracker: &Tracker, calls: impl Future<Output = ()>) -> Vec<String> {
    let before = all_events(tracker).await.len();
    calls.await;
    let events = all_events(tracker).await;
    for event in &events[before..] {
        assert_eq!(event.address, "127.0.0.1");
        assert!(event.create_time.is_some());
    }
    assert!(events.is_sorted_by(|left, right| left.id < right.id));
    events[before..].iter().map(|event| summary(tracker, event)).collect()
}

async fn log_in(tracker: &Tracker, username: &str, password: &str) -> Result<Client, Status> {
    let request = LoginRequest { username: username.into(), password: password.into(), validate_only: false };
    let reply = tracker.client_with_token(None).auth().login(request).await?.into_inner();
    Ok(tracker.client_with_token(Some(&reply.access_token)))
}

async fn make_user(tracker: &Tracker, username: &str, role: Role, disabled: bool) -> User {
    let user = Some(User { username: username.into(), role: role.into(), disabled, ..User::default() });
    let request = CreateUserRequest { user, password: PASSWORD.into(), ..Default::default() };
    tracker.admin.users().create_user(request).await.unwrap().into_inner()
}

fn set(user: &User, role: Role, disabled: bool) -> UpdateUserRequest {
    let user = User { id: user.id.clone(), role: role.into(), disabled, ..User::default() };
    let update_mask = Some(FieldMask { paths: vec!["*".into()] });
    UpdateUserRequest { user: Some(user), update_mask, ..Default::default() }
}

async fn update(tracker: &Tracker, request: UpdateUserRequest) {
    tracker.admin.users().update_user(request).await.unwrap();
}

async fn make_token(by: &Client, user_id: &str, name: &str) -> CreateApiTokenResponse {
    let api_token = ApiToken { user_id: user_id.into(), name: name.into(), ..ApiToken::default() };
    let request = CreateApiTokenRequest { api_token: Some(api_token), validate_only: false };
    by.auth().create_api_token(request).await.unwrap().into_inner()
}

fn change_password(new_password: &str) -> ChangePasswordRequest {
    let new_password = new_password.to_owned();
    ChangePasswordRequest { current_password: PASSWORD.into(), new_password, ..Default::default() }
}

#[tokio::test]
async fn login_and_logout_are_logged_without_typed_credentials() {
    let tracker = Tracker::start().await;
    let events = events_of(&tracker, async {
        let session = log_in(&tracker, "MEMBER", PASSWORD).await.unwrap();
        for (username, password) in
            [("member", "guessed-password"), ("password-as-a-name", PASSWORD), ("pässword-as-a-name", PASSWORD)]
        {
            assert!(log_in(&tracker, username, password).await.is_err());
        }
        session.auth().logout(LogoutRequest::default()).await.unwrap();
    });
    assert_eq!(
        events.await,
        [
            "LOGIN by member: member >",
            "LOGIN_FAILED by none: member >",
            "LOGIN_FAILED by none: none >",
            "LOGIN_FAILED by none: none >",
            "LOGOUT by member: member >",
        ]
    );
    let sessions: Vec<Uuid> =
        tracker.sql("SELECT id FROM tokens WHERE name IS NULL", &[]).await.iter().map(|row| row.get(0)).collect();
    let summary = all_events(&tracker).await;
    let summary = summary.iter().filter(|event| [AuditAction::Login, AuditAction::Logout].contains(&event.action()));
    assert_eq!(summary.map(|event| event.token_id.clone()).collect::<Vec<_>>(), vec![sessions[0].to_string(); 2]);
    let contents = tracker.contents().await.join("\n");
    for secret in ["guessed", "ssword-as-a-name", PASSWORD] {
        assert!(!contents.contains(secret), "{secret} is in the database");
    }
}

#[tokio::test]
async fn failed_login_of_a_disabled_user_is_logged() {
    let tracker = Tracker::start().await;
    let user = make_user(&tracker, "ada", Role::Viewer, true).await;
    assert!(log_in(&tracker, "ada", PASSWORD).await.is_err());
    let last = all_events(&tracker).await.pop().unwrap();
    assert_eq!((last.action(), last.user_id, last.token_id), (AuditAction::LoginFailed, user.id, String::new()));
}

#[tokio::test]
async fn user_changes_are_logged_with_old_and_new_values() {
    let tracker = Tracker::start().await;
    let events = events_of(&tracker, async {
        make_user(&tracker, "ada", Role::Unspecified, false).await;
        make_user(&tracker, "alan", Role::Admin, true).await;
        let member = &tracker.member.user;
        let sessions = [log_in(&tracker, "member", PASSWORD).await, log_in(&tracker, "member", PASSWORD).await];
        sessions[0].as_ref().unwrap().auth().logout(LogoutRequest::default()).await.unwrap();
        update(&tracker, set(member, Role::Viewer, true)).await;
        // The same values again: no change, no event.
        update(&tracker, set(member, Role::Viewer, true)).await;
        update(&tracker, set(member, Role::Viewer, false)).await;
        update(&tracker, set(member, Role::Member, false)).await;
    });
    assert_eq!(
        events.await,
        [
            "USER_CREATED by admin: another >MEMBER",
            "USER_CREATED by admin: another >ADMIN",
            "USER_DISABLED by admin: another >",
            "LOGIN by member: member >",
            "LOGIN by member: member >",
            "LOGOUT by member: member >",
            "ROLE_CHANGED by admin: member MEMBER>VIEWER",
            "USER_DISABLED by admin: member >",
            "SESSION_ENDED by admin: member >",
            "USER_ENABLED by admin: member >",
            "ROLE_CHANGED by admin: member VIEWER>MEMBER",
        ]
    );
}

#[tokio::test]
async fn each_token_creation_and_revocation_is_logged_once() {
    let tracker = Tracker::start().await;
    let events = events_of(&tracker, async {
        let own = make_token(&tracker.member, "", "own").await;
        let created = make_token(&tracker.admin, &tracker.member.user.id, "robot").await.api_token.unwrap();
        let revoke = |id: &str| RevokeApiTokenRequest { id: id.to_owned(), ..Default::default() };
        // Concurrently, and once more by another caller.
        let calls = (0..8).map(|_| {
            let (mut auth, request) = (tracker.admin.auth(), revoke(&created.id));
            async move { auth.revoke_api_token(request).await.unwrap().into_inner() }
        });
        let responses = join_all(calls).await;
        assert!(responses.iter().all(|response| response.revoke_time.is_some() && *response == responses[0]));
        tracker.member.auth().revoke_api_token(revoke(&created.id)).await.unwrap();
        let robot = tracker.client_with_token(Some(&own.access_token));
        robot.auth().logout(LogoutRequest::default()).await.unwrap();
    });
    assert_eq!(
        events.await,
        [
            "API_TOKEN_CREATED by member: member >own",
            "API_TOKEN_CREATED by admin: member >robot",
            "API_TOKEN_REVOKED by admin: member robot>",
            "API_TOKEN_REVOKED by member: member own>",
        ]
    );
}

#[tokio::test]
async fn password_change_is_logged_with_every_session_that_it_ends() {
    let tracker = Tracker::start().await;
    let here = log_in(&tracker, "member", PASSWORD).await.unwrap();
    for _ in 0..2 {
        log_in(&tracker, "member", PASSWORD).await.unwrap();
    }
    log_in(&tracker, "viewer", PASSWORD).await.unwrap();
    let events = events_of(&tracker, async {
        let wrong = ChangePasswordRequest { current_password: "wrong".into(), ..change_password("another password") };
        here.auth().change_password(wrong).await.unwrap_err();
        here.auth().change_password(change_password("another password")).await.unwrap();
    });
    assert_eq!(
        events.await,
        [
            "LOGIN_FAILED by member: member >",
            "PASSWORD_CHANGED by member: member >",
            "SESSION_ENDED by member: member >",
            "SESSION_ENDED by member: member >",
        ]
    );
}

#[tokio::test]
async fn events_from_the_command_line_have_no_actor_and_no_address() {
    let tracker = Tracker::start().await;
    let events = all_events(&tracker).await;
    let created: Vec<_> = events.iter().filter(|event| event.user_id == tracker.admin.user.id).collect();
    assert_eq!(created.len(), 2);
    for event in created {
        assert!([AuditAction::UserCreated, AuditAction::ApiTokenCreated].contains(&event.action()));
        assert_eq!((&*event.actor_id, &*event.address), ("", ""));
    }
}

#[tokio::test]
async fn retries_dry_runs_and_throttled_logins_are_not_logged() {
    let tracker = Tracker::start_with(limits(&["--login-failures", "1"])).await;
    let (member, viewer) = (&tracker.member.user, &tracker.viewer.user);
    let request_id = || Uuid::now_v7().to_string();
    let token = make_token(&tracker.member, "", "own").await.api_token.unwrap();
    log_in(&tracker, "viewer", PASSWORD).await.unwrap();
    let user = Some(User { username: "ada".into(), ..User::default() });
    let create = CreateUserRequest { user, password: PASSWORD.into(), request_id: request_id(), ..Default::default() };
    let change = UpdateUserRequest { request_id: request_id(), ..set(viewer, Role::Member, true) };
    let revoke = RevokeApiTokenRequest { id: token.id, request_id: request_id(), validate_only: false };
    let password = ChangePasswordRequest { request_id: request_id(), ..change_password("another password") };
    let (mut users, mut admin, mut auth) = (tracker.admin.users(), tracker.admin.auth(), tracker.member.auth());

    let dry_runs = events_of(&tracker, async {
        users.create_user(CreateUserRequest { validate_only: true, ..create.clone() }).await.unwrap();
        users.update_user(UpdateUserRequest { validate_only: true, ..change.clone() }).await.unwrap();
        admin.revoke_api_token(RevokeApiTokenRequest { validate_only: true, ..revoke.clone() }).await.unwrap();
        auth.change_password(ChangePasswordRequest { validate_only: true, ..password.clone() }).await.unwrap();
        auth.logout(LogoutRequest { validate_only: true, ..Default::default() }).await.unwrap();
        let api_token = Some(ApiToken { name: "dry run".into(), ..ApiToken::default() });
        auth.create_api_token(CreateApiTokenRequest { api_token, validate_only: true }).await.unwrap();
        let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: true };
        auth.login(login).await.unwrap();
    });
    assert_eq!(dry_runs.await, [""; 0]);
    // A wrong password is logged in a dry run too.
    let guesses = events_of(&tracker, async {
        let login = LoginRequest { username: "member".into(), password: "wrong".into(), validate_only: true };
        tracker.viewer.auth().login(login).await.unwrap_err();
        let wrong = ChangePasswordRequest {
            current_password: "wrong".into(),
            new_password: PASSWORD.into(),
            validate_only: true,
            ..Default::default()
        };
        tracker.viewer.auth().change_password(wrong).await.unwrap_err();
    });
    assert_eq!(guesses.await.len(), 2);
    let refused = log_in(&tracker, "member", PASSWORD).await.map(drop);
    let events = events_of(&tracker, async {
        users.create_user(create.clone()).await.unwrap();
        users.update_user(change.clone()).await.unwrap();
        admin.revoke_api_token(revoke.clone()).await.unwrap();
        auth.change_password(password.clone()).await.unwrap();
    });
    assert_eq!(events.await.len(), 6);
    let retries = events_of(&tracker, async {
        users.create_user(create).await.unwrap();
        users.update_user(change).await.unwrap();
        admin.revoke_api_token(revoke).await.unwrap();
        auth.change_password(password).await.unwrap();
    });
    assert_eq!(retries.await, [""; 0]);
    // The login right after the failure is throttled, unless the machine was so slow that the delay had passed.
    let was_accepted = refused.is_ok();
    if !was_accepted {
        assert_error(refused, Code::ResourceExhausted, "TOO_MANY_TRIES");
    }
    let of_member = ListAuditEventsRequest { user_id: member.id.clone(), ..Default::default() };
    let logged = list(&tracker.admin, of_member).await.unwrap().audit_events;
    let count = |action| logged.iter().filter(|event| event.action() == action).count();
    assert_eq!((count(AuditAction::Login), count(AuditAction::LoginFailed)), (usize::from(was_accepted), 1));
}

#[tokio::test]
async fn call_whose_event_cannot_be_written_fails_and_changes_nothing() {
    let tracker = Tracker::start().await;
    let session = log_in(&tracker, "member", PASSWORD).await.unwrap();
    let token = make_token(&tracker.member, "", "own").await.api_token.unwrap();
    tracker.sql("ALTER TABLE audit_events ADD CONSTRAINT no_inserts CHECK (false) NOT VALID", &[]).await;
    let before = tracker.contents().await;
    let (mut users, mut auth) = (tracker.admin.users(), session.auth());
    let user = Some(User { username: "ada".into(), ..User::default() });
    let api_token = Some(ApiToken { name: "one".into(), ..ApiToken::default() });
    let login = LoginRequest { username: "member".into(), password: PASSWORD.into(), validate_only: false };

    let results = [
        auth.login(login.clone()).await.map(drop),
        auth.login(LoginRequest { password: "wrong".into(), ..login }).await.map(drop),
        auth.logout(LogoutRequest::default()).await.map(drop),
        auth.change_password(change_password("another password")).await.map(drop),
        auth.create_api_token(CreateApiTokenRequest { api_token, validate_only: false }).await.map(drop),
        auth.revoke_api_token(RevokeApiTokenRequest { id: token.id, ..Default::default() }).await.map(drop),
        users.create_user(CreateUserRequest { user, password: PASSWORD.into(), ..Default::default() }).await.map(drop),
        users.update_user(set(&tracker.viewer.user, Role::Member, false)).await.map(drop),
        users.update_user(set(&tracker.viewer.user, Role::Viewer, true)).await.map(drop),
    ];
    for result in results {
        assert_error(result, Code::Internal, "INTERNAL");
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn concurrent_changes_are_logged_each_with_the_value_before_it() {
    let tracker = Tracker::start().await;
    let roles = [Role::Viewer, Role::Member, Role::Admin];
    let user = make_user(&tracker, "ada", Role::Viewer, false).await;
    join_all((0..30).map(|nth| update(&tracker, set(&user, roles[nth % 3], false)))).await;

    let mut role = "VIEWER".to_owned();
    for event in all_events(&tracker).await.iter().filter(|event| event.user_id == user.id) {
        if event.action() == AuditAction::RoleChanged {
            assert_eq!(event.old_value, role);
            assert_ne!(event.new_value, role);
            role = event.new_value.clone();
        }
    }
    let last: i16 = tracker.sql("SELECT role FROM users WHERE username = 'ada'", &[]).await[0].get(0);
    assert_eq!(role, ["VIEWER", "MEMBER", "ADMIN"][last as usize - 1]);
}

#[tokio::test]
async fn events_are_immutable_for_400_days_and_then_pruned() {
    let mut tracker = Tracker::start().await;
    // A running service prunes soon after its start, which would race with this test.
    tracker.stop();
    tracker.wait_until_stopped().await;
    let session = tracker.session().await;
    let age = "INSERT INTO audit_events (action, create_time) VALUES ('LOGIN_FAILED', now() - interval '401 days'),
        ('LOGIN_FAILED', now() - interval '399 days')";
    session.execute(age, &[]).await.unwrap();
    let before = tracker.contents().await;
    for change in [
        "UPDATE audit_events SET new_value = 'x'",
        "UPDATE audit_events SET create_time = now() - interval '500 days'",
        "UPDATE audit_events SET action = action WHERE create_time < now() - interval '400 days'",
        "DELETE FROM audit_events",
        "DELETE FROM audit_events WHERE create_time > now() - interval '400 days'",
        "TRUNCATE audit_events",
    ] {
        let error = session.execute(change, &[]).await.expect_err(change);
        assert!(error.as_db_error().unwrap().message().contains("kept for 400 days"), "{change}: {error:?}");
    }
    assert_eq!(tracker.contents().await, before);

    assert_eq!(prune_audit_events(&tracker.db.conn().await.unwrap(), AUDIT_DAYS).await.unwrap(), 1);
    assert_eq!(tracker.count("SELECT count(*) FROM audit_events WHERE action = 'LOGIN_FAILED'").await, 1);
}

#[tokio::test]
async fn events_are_listed_newest_first_in_pages_for_all_or_one_user() {
    let tracker = Tracker::start().await;
    for nth in 0..5 {
        make_token(&tracker.member, "", &format!("token {nth}")).await;
        make_token(&tracker.viewer, "", "of another user").await;
    }
    let of_member = |page_size, page_token| ListAuditEventsRequest {
        user_id: tracker.member.user.id.clone(),
        page_size,
        page_token,
    };
    let (mut names, mut sizes, mut page_token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = list(&tracker.admin, of_member(3, page_token)).await.unwrap();
        // Newer than the first page, so it appears on none of the following pages.
        make_token(&tracker.member, "", "newer").await;
        sizes.push(page.audit_events.len());
        names.extend(page.audit_events.into_iter().map(|event| event.new_value));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["token 4", "token 3", "token 2", "token 1", "token 0", "test", "MEMBER"]);
    assert_eq!(sizes, [3, 3, 1]);

    let all = list(&tracker.admin, ListAuditEventsRequest { page_size: 2, ..Default::default() }).await.unwrap();
    assert_eq!(all.audit_events.len(), 2);
    assert_invalid(list(&tracker.admin, of_member(2, all.next_page_token)).await, &["page_token"]);
    assert_invalid(list(&tracker.admin, of_member(-1, "x".into())).await, &["page_size", "page_token"]);
    let unknown_user = ListAuditEventsRequest { user_id: Uuid::now_v7().to_string(), ..Default::default() };
    assert_eq!(list(&tracker.admin, unknown_user).await.unwrap(), ListAuditEventsResponse::default());
    let malformed = ListAuditEventsRequest { user_id: "member".into(), ..Default::default() };
    assert_invalid(list(&tracker.admin, malformed).await, &["user_id"]);
    for client in [&tracker.member, &tracker.viewer] {
        let refused = list(client, of_member(0, String::new())).await;
        assert_error(refused, Code::PermissionDenied, "PERMISSION_DENIED");
    }
}
