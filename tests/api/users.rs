//! `UserService`.

use issue_tracker::pb::{
    CreateUserRequest, GetUserRequest, ListUsersRequest, LoginRequest, ResetPasswordRequest, Role, UpdateUserRequest,
    User, WhoAmIRequest,
};
use prost_types::FieldMask;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::harness::{Client, PASSWORD, Tracker, assert_error, assert_invalid, bad_fields};

fn new_user(username: &str, role: Role) -> CreateUserRequest {
    let user = Some(User { username: username.to_owned(), role: role.into(), ..User::default() });
    CreateUserRequest { user, password: PASSWORD.to_owned(), ..CreateUserRequest::default() }
}

async fn create(by: &Client, request: CreateUserRequest) -> Result<User, Status> {
    Ok(by.users().create_user(request).await?.into_inner())
}

async fn get(by: &Client, id: &str, username: &str) -> Result<User, Status> {
    let request = GetUserRequest { id: id.to_owned(), username: username.to_owned() };
    Ok(by.users().get_user(request).await?.into_inner())
}

async fn update(by: &Client, request: UpdateUserRequest) -> Result<User, Status> {
    Ok(by.users().update_user(request).await?.into_inner())
}

/// An update of a user with these paths in the mask.
fn change(user: User, paths: &[&str]) -> UpdateUserRequest {
    let update_mask = FieldMask { paths: paths.iter().map(ToString::to_string).collect() };
    UpdateUserRequest { user: Some(user), update_mask: Some(update_mask), ..UpdateUserRequest::default() }
}

fn role(user: &User, role: Role) -> UpdateUserRequest {
    change(User { id: user.id.clone(), role: role.into(), ..User::default() }, &["role"])
}

fn disabled(user: &User, disabled: bool) -> UpdateUserRequest {
    change(User { id: user.id.clone(), disabled, ..User::default() }, &["disabled"])
}

async fn log_in(tracker: &Tracker, username: &str) -> Result<Client, Status> {
    let request = LoginRequest { username: username.to_owned(), password: PASSWORD.to_owned(), validate_only: false };
    let response = tracker.client_with_token(None).auth().login(request).await?.into_inner();
    Ok(tracker.client_with_token(Some(&response.access_token)))
}

async fn is_authenticated(client: &Client) -> bool {
    match client.auth().who_am_i(WhoAmIRequest {}).await {
        Ok(_) => true,
        Err(status) if status.code() == Code::Unauthenticated => false,
        Err(status) => panic!("{status:?}"),
    }
}

#[tokio::test]
async fn new_user_has_the_given_role_or_is_a_member() {
    let tracker = Tracker::start().await;
    let cases = [
        (Role::Unspecified, Role::Member),
        (Role::Viewer, Role::Viewer),
        (Role::Member, Role::Member),
        (Role::Admin, Role::Admin),
    ];
    for (index, (given, expected)) in cases.into_iter().enumerate() {
        let name = format!("user-{index}");
        let user = create(&tracker.admin, new_user(&name, given)).await.unwrap();
        assert_eq!((&*user.username, user.role(), user.disabled), (&*name, expected, false));
        assert!(user.create_time.is_some() && user.create_time == user.update_time);
        assert_eq!(get(&tracker.viewer, &user.id, "").await.unwrap(), user);
        assert!(log_in(&tracker, &name).await.is_ok());
    }
}

#[tokio::test]
async fn user_can_be_created_disabled() {
    let tracker = Tracker::start().await;
    let user = Some(User { username: "ada".into(), disabled: true, ..User::default() });
    let created = create(&tracker.admin, CreateUserRequest { user, ..new_user("", Role::Member) }).await.unwrap();
    assert!(created.disabled);
    assert!(log_in(&tracker, "ada").await.is_err());
    assert!(!update(&tracker.admin, disabled(&created, false)).await.unwrap().disabled);
    assert!(log_in(&tracker, "ada").await.is_ok());
}

#[tokio::test]
async fn usernames_are_unique_case_insensitively() {
    let tracker = Tracker::start().await;
    create(&tracker.admin, new_user("Grace.Hopper", Role::Member)).await.unwrap();
    let before = tracker.contents().await;
    for taken in ["Grace.Hopper", "grace.hopper", "GRACE.HOPPER"] {
        let status = assert_error(
            create(&tracker.admin, new_user(taken, Role::Viewer)).await,
            Code::AlreadyExists,
            "ALREADY_EXISTS",
        );
        assert_eq!(bad_fields(&status), ["user.username"]);
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn usernames_have_1_to_50_allowed_characters() {
    let tracker = Tracker::start().await;
    let long = "x".repeat(51);
    for bad in ["", " ", "a b", ".a", "-a", "_a", "@a", "é", "aé", "a\0", "a\n", "a/b", "a;b", "\u{212a}elvin", &long]
    {
        assert_invalid(create(&tracker.admin, new_user(bad, Role::Member)).await, &["user.username"]);
    }
    for good in ["x", "0", "a.b_c-d@e+f", &"x".repeat(50)] {
        assert_eq!(create(&tracker.admin, new_user(good, Role::Member)).await.unwrap().username, good);
    }
}

#[tokio::test]
async fn passwords_have_8_to_72_bytes_and_no_nul() {
    let tracker = Tracker::start().await;
    for bad in ["", "7 bytes", "ééé7", &"x".repeat(73), &("é".repeat(36) + "x"), "with a \0 in it"] {
        let request = CreateUserRequest { password: bad.to_owned(), ..new_user("ada", Role::Member) };
        assert_invalid(create(&tracker.admin, request).await, &["password"]);
    }
    for (name, good) in [("a", "8 bytes!".to_owned()), ("b", "é".repeat(36))] {
        create(&tracker.admin, CreateUserRequest { password: good, ..new_user(name, Role::Member) }).await.unwrap();
    }
}

#[tokio::test]
async fn all_violations_of_a_new_user_are_reported() {
    let tracker = Tracker::start().await;
    let user = Some(User { username: "a b".into(), role: 9, ..User::default() });
    let request =
        CreateUserRequest { user, password: "short".into(), request_id: "not a uuid".into(), validate_only: false };
    let before = tracker.contents().await;
    assert_invalid(create(&tracker.admin, request).await, &["request_id", "user.username", "user.role", "password"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn only_administrators_create_and_update_users() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for client in [&tracker.member, &tracker.viewer] {
        let created = create(client, new_user("", Role::Admin)).await;
        assert_error(created, Code::PermissionDenied, "PERMISSION_DENIED");
        let promoted = update(client, role(&client.user, Role::Admin)).await;
        assert_error(promoted, Code::PermissionDenied, "PERMISSION_DENIED");
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn get_user_takes_an_id_or_a_username() {
    let tracker = Tracker::start().await;
    let member = &tracker.member.user;
    assert_eq!(get(&tracker.viewer, &member.id, "").await.as_ref().unwrap(), member);
    assert_eq!(get(&tracker.viewer, "", "MEMBER").await.as_ref().unwrap(), member);

    assert_error(get(&tracker.viewer, &Uuid::now_v7().to_string(), "").await, Code::NotFound, "NOT_FOUND");
    assert_error(get(&tracker.viewer, "", "absent").await, Code::NotFound, "NOT_FOUND");
    assert_error(get(&tracker.viewer, "", "membe_").await, Code::NotFound, "NOT_FOUND");
    assert_invalid(get(&tracker.viewer, "", "").await, &["id"]);
    assert_invalid(get(&tracker.viewer, &member.id, "member").await, &["id"]);
    assert_invalid(get(&tracker.viewer, "member", "").await, &["id"]);
    assert_invalid(get(&tracker.viewer, "", &"x".repeat(51)).await, &["username"]);
    assert_invalid(get(&tracker.viewer, "", "a\0b").await, &["username"]);
}

#[tokio::test]
async fn users_are_listed_by_username_in_pages() {
    let tracker = Tracker::start().await;
    for name in ["Zoe", "bob", "Alice", "yann"] {
        tracker.user(name, Role::Viewer).await;
    }
    update(&tracker.admin, disabled(&get(&tracker.admin, "", "bob").await.unwrap(), true)).await.unwrap();
    let mut users = tracker.viewer.users();
    let (mut names, mut sizes, mut page_token) = (Vec::new(), Vec::new(), String::new());
    loop {
        let page = users.list_users(ListUsersRequest { page_size: 3, page_token }).await.unwrap().into_inner();
        sizes.push(page.users.len());
        names.extend(page.users.into_iter().map(|user| user.username));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["admin", "Alice", "bob", "member", "viewer", "yann", "Zoe"]);
    assert_eq!(sizes, [3, 3, 1]);
    let page = |page_size, page_token: &str| ListUsersRequest { page_size, page_token: page_token.to_owned() };
    assert_eq!(users.list_users(page(7, "")).await.unwrap().into_inner().next_page_token, "");
    assert_invalid(users.list_users(page(-1, "x")).await, &["page_size", "page_token"]);
}

#[tokio::test]
async fn update_sets_the_masked_fields() {
    let tracker = Tracker::start().await;
    let id = tracker.viewer.user.id.clone();
    let all = User { id: id.clone(), role: Role::Member.into(), disabled: true, ..User::default() };

    let updated = update(&tracker.admin, change(all.clone(), &["role"])).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, false));
    assert!(updated.update_time.unwrap().seconds >= updated.create_time.unwrap().seconds);
    assert_ne!(updated.update_time, tracker.viewer.user.update_time);
    let viewer = User { role: Role::Viewer.into(), ..all.clone() };
    let updated = update(&tracker.admin, change(viewer, &["disabled"])).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, true));
    let enabled = User { role: Role::Viewer.into(), disabled: false, ..all.clone() };
    let updated = update(&tracker.admin, change(enabled, &["*"])).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Viewer, false));

    // Without a mask, or with an empty one, the populated fields are set.
    let request = UpdateUserRequest { user: Some(all.clone()), ..Default::default() };
    let updated = update(&tracker.admin, request).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, true));
    let updated = update(&tracker.admin, change(User { disabled: false, ..all }, &[])).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, true));
    assert_eq!(get(&tracker.admin, &id, "").await.unwrap(), updated, "update_time did not change either");
}

#[tokio::test]
async fn unknown_and_read_only_mask_paths_are_named() {
    let tracker = Tracker::start().await;
    let user = User { id: tracker.viewer.user.id.clone(), role: Role::Member.into(), ..User::default() };
    let before = tracker.contents().await;
    for path in ["username", "id", "create_time", "Role", "user.role", "password", ""] {
        let status = assert_invalid(
            update(&tracker.admin, change(user.clone(), &["role", path])).await,
            &["update_mask.paths[1]"],
        );
        assert!(status.message().contains(&format!("\"{path}\"")), "{status:?}");
        assert_invalid(update(&tracker.admin, change(user.clone(), &[path])).await, &["update_mask.paths[0]"]);
    }
    let empty = User { role: 0, ..user.clone() };
    assert_invalid(update(&tracker.admin, change(empty.clone(), &[])).await, &["update_mask"]);
    assert_invalid(update(&tracker.admin, change(empty, &["role"])).await, &["user.role"]);
    assert_invalid(update(&tracker.admin, change(User { role: 9, ..user.clone() }, &["*"])).await, &["user.role"]);
    let bad_id = User { id: "viewer".into(), ..user };
    assert_invalid(update(&tracker.admin, change(bad_id, &["role"])).await, &["user.id"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn updating_a_missing_user_is_not_found() {
    let tracker = Tracker::start().await;
    let missing = User { id: Uuid::now_v7().to_string(), ..User::default() };
    let status = assert_error(update(&tracker.admin, role(&missing, Role::Member)).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["user.id"]);
}

#[tokio::test]
async fn changed_role_applies_to_the_next_call() {
    let tracker = Tracker::start().await;
    assert!(is_authenticated(&tracker.viewer).await);
    update(&tracker.admin, role(&tracker.viewer.user, Role::Member)).await.unwrap();
    tracker.viewer.file("created as a member").await;

    update(&tracker.admin, role(&tracker.viewer.user, Role::Viewer)).await.unwrap();
    let denied = tracker.viewer.issues().create_issue(issue_tracker::pb::CreateIssueRequest::default()).await;
    assert_error(denied, Code::PermissionDenied, "PERMISSION_DENIED");
}

#[tokio::test]
async fn disabling_a_user_ends_sessions_and_suspends_api_tokens() {
    let tracker = Tracker::start().await;
    let session = log_in(&tracker, "member").await.unwrap();
    assert!(is_authenticated(&session).await && is_authenticated(&tracker.member).await);

    update(&tracker.admin, disabled(&tracker.member.user, true)).await.unwrap();
    assert!(!is_authenticated(&session).await && !is_authenticated(&tracker.member).await);
    assert!(log_in(&tracker, "member").await.is_err());
    assert!(is_authenticated(&tracker.viewer).await);

    let enabled = update(&tracker.admin, disabled(&tracker.member.user, false)).await.unwrap();
    assert!(!enabled.disabled);
    assert!(is_authenticated(&tracker.member).await, "the API token is valid again");
    assert!(!is_authenticated(&session).await, "the session is over");
    assert!(is_authenticated(&log_in(&tracker, "member").await.unwrap()).await);
}

#[tokio::test]
async fn last_enabled_administrator_cannot_be_demoted_or_disabled() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Admin).await;
    update(&tracker.admin, disabled(&other.user, true)).await.unwrap();
    let before = tracker.contents().await;
    let last = &tracker.admin.user;
    // The other administrator is disabled and does not count.
    for request in [
        role(last, Role::Member),
        disabled(last, true),
        UpdateUserRequest { validate_only: true, ..disabled(last, true) },
    ] {
        let refused = update(&tracker.admin, request).await;
        assert_error(refused, Code::FailedPrecondition, "LAST_ADMINISTRATOR");
    }
    assert_eq!(tracker.contents().await, before);

    update(&tracker.admin, disabled(&other.user, false)).await.unwrap();
    update(&tracker.admin, role(last, Role::Viewer)).await.expect("another administrator is enabled");
    let own = update(&tracker.admin, role(last, Role::Admin)).await;
    assert_error(own, Code::PermissionDenied, "PERMISSION_DENIED");
}

#[tokio::test]
async fn concurrent_demotions_leave_one_administrator() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Admin).await;
    for iteration in 0..40 {
        let demote = |user: &User| if iteration % 2 == 0 { role(user, Role::Member) } else { disabled(user, true) };
        // Each demotes or disables the other, or each itself.
        let (by_admin, by_other) =
            if iteration % 4 < 2 { (&other.user, &tracker.admin.user) } else { (&tracker.admin.user, &other.user) };
        let (left, right) = tokio::join!(update(&tracker.admin, demote(by_admin)), update(&other, demote(by_other)));
        assert_eq!(u8::from(left.is_ok()) + u8::from(right.is_ok()), 1, "{left:?} {right:?}");
        let refused = left.err().or(right.err()).unwrap();
        // The later call comes from the last administrator, or from a caller who no longer is one.
        let codes = [Code::FailedPrecondition, Code::PermissionDenied, Code::Unauthenticated];
        assert!(codes.contains(&refused.code()), "{refused:?}");
        assert_eq!(tracker.count("SELECT count(*) FROM users WHERE role = 3 AND NOT disabled").await, 1);

        let remaining = if is_authenticated(&tracker.admin).await
            && get(&tracker.admin, &tracker.admin.user.id, "").await.unwrap().role() == Role::Admin
        {
            (&tracker.admin, &other)
        } else {
            (&other, &tracker.admin)
        };
        let restored = User { id: remaining.1.user.id.clone(), role: Role::Admin.into(), ..User::default() };
        update(remaining.0, change(restored, &["*"])).await.unwrap();
    }
}

#[tokio::test]
async fn dry_run_has_the_outcome_of_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    assert!(is_authenticated(&tracker.member).await);
    let before = tracker.contents().await;
    let user = create(&tracker.admin, CreateUserRequest { validate_only: true, ..new_user("ada", Role::Viewer) }).await;
    assert_eq!(user.unwrap().username, "ada");
    let taken =
        create(&tracker.admin, CreateUserRequest { validate_only: true, ..new_user("VIEWER", Role::Viewer) }).await;
    assert_error(taken, Code::AlreadyExists, "ALREADY_EXISTS");
    let request = UpdateUserRequest { validate_only: true, ..disabled(&tracker.member.user, true) };
    assert!(update(&tracker.admin, request).await.unwrap().disabled);
    assert_eq!(tracker.contents().await, before);
    assert!(is_authenticated(&tracker.member).await);
}

#[tokio::test]
async fn retry_with_the_request_id_returns_the_stored_response_and_writes_nothing() {
    let tracker = Tracker::start().await;
    let request_id = || Uuid::now_v7().to_string();
    let create_ada = CreateUserRequest { request_id: request_id(), ..new_user("ada", Role::Viewer) };
    let disable_member = UpdateUserRequest { request_id: request_id(), ..disabled(&tracker.member.user, true) };
    let created = create(&tracker.admin, create_ada.clone()).await.unwrap();
    let disabled_member = update(&tracker.admin, disable_member.clone()).await.unwrap();
    update(&tracker.admin, disabled(&tracker.member.user, false)).await.unwrap();
    let before = tracker.contents().await;

    assert_eq!(create(&tracker.admin, create_ada.clone()).await.unwrap(), created);
    assert_eq!(update(&tracker.admin, disable_member).await.unwrap(), disabled_member);

    // The password is not part of the compared payload; the role is.
    let other_password = CreateUserRequest { password: "another password".into(), ..create_ada.clone() };
    assert_eq!(create(&tracker.admin, other_password).await.unwrap(), created);
    let other_role = CreateUserRequest { request_id: create_ada.request_id, ..new_user("ada", Role::Admin) };
    assert_error(create(&tracker.admin, other_role).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(tracker.contents().await, before);
    assert!(is_authenticated(&tracker.member).await, "the retry disabled no user");
}

const NEW_PASSWORD: &str = "battery horse correct";

fn reset(user: &User) -> ResetPasswordRequest {
    ResetPasswordRequest { user_id: user.id.clone(), new_password: NEW_PASSWORD.to_owned(), ..Default::default() }
}

async fn reset_password(by: &Client, request: ResetPasswordRequest) -> Result<(), Status> {
    by.users().reset_password(request).await.map(drop)
}

#[tokio::test]
async fn password_reset_revokes_every_session_of_the_user_and_no_api_token() {
    let tracker = Tracker::start().await;
    let (session, other_user) = (log_in(&tracker, "member").await.unwrap(), log_in(&tracker, "viewer").await.unwrap());
    assert!(is_authenticated(&session).await);

    reset_password(&tracker.admin, reset(&tracker.member.user)).await.unwrap();

    assert!(!is_authenticated(&session).await);
    assert!(is_authenticated(&other_user).await && is_authenticated(&tracker.member).await);
    assert_error(log_in(&tracker, "member").await.map(drop), Code::Unauthenticated, "UNAUTHENTICATED");
    let login = LoginRequest { username: "member".into(), password: NEW_PASSWORD.into(), validate_only: true };
    tracker.client_with_token(None).auth().login(login).await.unwrap();
    let events = tracker
        .sql(
            "SELECT action, actor_id::text, user_id::text FROM audit_events
             WHERE action IN ('PASSWORD_CHANGED', 'SESSION_ENDED') ORDER BY id",
            &[],
        )
        .await;
    let events: Vec<(String, String, String)> = events.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let event = |action: &str| (action.to_owned(), tracker.admin.user.id.clone(), tracker.member.user.id.clone());
    assert_eq!(events, [event("PASSWORD_CHANGED"), event("SESSION_ENDED")]);
}

#[tokio::test]
async fn invalid_password_resets_and_dry_runs_write_nothing() {
    let tracker = Tracker::start().await;
    let session = log_in(&tracker, "member").await.unwrap();
    let before = tracker.contents().await;
    let request = reset(&tracker.member.user);

    let invalid = ResetPasswordRequest { user_id: "member".into(), new_password: "7 bytes".into(), ..request.clone() };
    assert_invalid(reset_password(&tracker.admin, invalid).await, &["user_id", "new_password"]);
    let missing = ResetPasswordRequest { user_id: Uuid::now_v7().to_string(), ..request.clone() };
    let status = assert_error(reset_password(&tracker.admin, missing).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["user_id"]);
    let dry_run = ResetPasswordRequest { validate_only: true, ..request };
    reset_password(&tracker.admin, dry_run).await.unwrap();

    assert_eq!(tracker.contents().await, before);
    assert!(is_authenticated(&session).await);
}

#[tokio::test]
async fn password_reset_with_a_used_request_id_and_another_password_is_refused() {
    let tracker = Tracker::start().await;
    let request = ResetPasswordRequest { request_id: Uuid::now_v7().to_string(), ..reset(&tracker.member.user) };
    reset_password(&tracker.admin, request.clone()).await.unwrap();
    reset_password(&tracker.admin, request.clone()).await.unwrap();

    let reused = ResetPasswordRequest { new_password: "a third password".into(), ..request };
    let status = assert_error(reset_password(&tracker.admin, reused).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(bad_fields(&status), ["request_id"]);
}
