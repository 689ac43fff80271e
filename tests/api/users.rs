//! `UserService`.

use issue_tracker::pb::{
    CreateUserRequest, GetUserRequest, ListUsersRequest, LoginRequest, Role, UpdateUserRequest, User, WhoAmIRequest,
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

async fn session(tracker: &Tracker, username: &str) -> Result<Client, Status> {
    let request = LoginRequest { username: username.to_owned(), password: PASSWORD.to_owned(), validate_only: false };
    let reply = tracker.client_with_token(None).auth().login(request).await?.into_inner();
    Ok(tracker.client_with_token(Some(&reply.access_token)))
}

async fn is_in(client: &Client) -> bool {
    match client.auth().who_am_i(WhoAmIRequest {}).await {
        Ok(_) => true,
        Err(status) if status.code() == Code::Unauthenticated => false,
        Err(status) => panic!("{status:?}"),
    }
}

#[tokio::test]
async fn a_new_user_has_the_role_that_was_given_or_is_a_member() {
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
        assert!(session(&tracker, &name).await.is_ok());
    }
}

#[tokio::test]
async fn a_user_can_be_made_disabled() {
    let tracker = Tracker::start().await;
    let user = Some(User { username: "ada".into(), disabled: true, ..User::default() });
    let made = create(&tracker.admin, CreateUserRequest { user, ..new_user("", Role::Member) }).await.unwrap();
    assert!(made.disabled);
    assert!(session(&tracker, "ada").await.is_err());
    assert!(!update(&tracker.admin, disabled(&made, false)).await.unwrap().disabled);
    assert!(session(&tracker, "ada").await.is_ok());
}

#[tokio::test]
async fn a_taken_username_is_taken_in_whatever_case() {
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
async fn usernames_have_1_to_50_known_characters() {
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
async fn passwords_of_new_users_have_8_to_72_bytes_and_no_nul() {
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
async fn everything_wrong_with_a_new_user_is_told_at_once() {
    let tracker = Tracker::start().await;
    let user = Some(User { username: "a b".into(), role: 9, ..User::default() });
    let request =
        CreateUserRequest { user, password: "short".into(), request_id: "not a uuid".into(), validate_only: false };
    let before = tracker.contents().await;
    assert_invalid(create(&tracker.admin, request).await, &["request_id", "user.username", "user.role", "password"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn only_administrators_make_and_change_users() {
    let tracker = Tracker::start().await;
    let before = tracker.contents().await;
    for client in [&tracker.member, &tracker.viewer] {
        let made = create(client, new_user("", Role::Admin)).await;
        assert_error(made, Code::PermissionDenied, "PERMISSION_DENIED");
        let promoted = update(client, role(&client.user, Role::Admin)).await;
        assert_error(promoted, Code::PermissionDenied, "PERMISSION_DENIED");
    }
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn a_user_is_found_by_id_or_by_username() {
    let tracker = Tracker::start().await;
    let member = &tracker.member.user;
    assert_eq!(get(&tracker.viewer, &member.id, "").await.as_ref().unwrap(), member);
    assert_eq!(get(&tracker.viewer, "", "MEMBER").await.as_ref().unwrap(), member);

    assert_error(get(&tracker.viewer, &Uuid::now_v7().to_string(), "").await, Code::NotFound, "NOT_FOUND");
    assert_error(get(&tracker.viewer, "", "nobody").await, Code::NotFound, "NOT_FOUND");
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
async fn an_update_sets_what_its_mask_names() {
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

    // Without a mask, or with an empty one: what is populated.
    let request = UpdateUserRequest { user: Some(all.clone()), ..Default::default() };
    let updated = update(&tracker.admin, request).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, true));
    let updated = update(&tracker.admin, change(User { disabled: false, ..all }, &[])).await.unwrap();
    assert_eq!((updated.role(), updated.disabled), (Role::Member, true));
    assert_eq!(get(&tracker.admin, &id, "").await.unwrap(), updated, "nothing changed, the time neither");
}

#[tokio::test]
async fn what_an_update_cannot_set_is_named() {
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
    let nothing = User { role: 0, ..user.clone() };
    assert_invalid(update(&tracker.admin, change(nothing.clone(), &[])).await, &["update_mask"]);
    assert_invalid(update(&tracker.admin, change(nothing, &["role"])).await, &["user.role"]);
    assert_invalid(update(&tracker.admin, change(User { role: 9, ..user.clone() }, &["*"])).await, &["user.role"]);
    let bad_id = User { id: "viewer".into(), ..user };
    assert_invalid(update(&tracker.admin, change(bad_id, &["role"])).await, &["user.id"]);
    assert_eq!(tracker.contents().await, before);
}

#[tokio::test]
async fn an_unknown_user_is_not_found() {
    let tracker = Tracker::start().await;
    let nobody = User { id: Uuid::now_v7().to_string(), ..User::default() };
    let status = assert_error(update(&tracker.admin, role(&nobody, Role::Member)).await, Code::NotFound, "NOT_FOUND");
    assert_eq!(bad_fields(&status), ["user.id"]);
}

#[tokio::test]
async fn a_new_role_counts_from_the_next_call() {
    let tracker = Tracker::start().await;
    assert!(is_in(&tracker.viewer).await);
    update(&tracker.admin, role(&tracker.viewer.user, Role::Member)).await.unwrap();
    tracker.viewer.file("filed by a viewer no longer").await;

    update(&tracker.admin, role(&tracker.viewer.user, Role::Viewer)).await.unwrap();
    let denied = tracker.viewer.issues().create_issue(issue_tracker::pb::CreateIssueRequest::default()).await;
    assert_error(denied, Code::PermissionDenied, "PERMISSION_DENIED");
}

#[tokio::test]
async fn a_disabled_user_is_out_at_once_and_comes_back_without_his_sessions() {
    let tracker = Tracker::start().await;
    let ended = session(&tracker, "member").await.unwrap();
    assert!(is_in(&ended).await && is_in(&tracker.member).await);

    update(&tracker.admin, disabled(&tracker.member.user, true)).await.unwrap();
    assert!(!is_in(&ended).await && !is_in(&tracker.member).await);
    assert!(session(&tracker, "member").await.is_err());
    assert!(is_in(&tracker.viewer).await);

    let enabled = update(&tracker.admin, disabled(&tracker.member.user, false)).await.unwrap();
    assert!(!enabled.disabled);
    assert!(is_in(&tracker.member).await, "his API token works again");
    assert!(!is_in(&ended).await, "his session has ended");
    assert!(is_in(&session(&tracker, "member").await.unwrap()).await);
}

#[tokio::test]
async fn the_last_administrator_stays() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Admin).await;
    update(&tracker.admin, disabled(&other.user, true)).await.unwrap();
    let before = tracker.contents().await;
    let last = &tracker.admin.user;
    // Another administrator who is disabled does not count.
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
    update(&tracker.admin, role(last, Role::Viewer)).await.expect("another one is left");
    let own = update(&tracker.admin, role(last, Role::Admin)).await;
    assert_error(own, Code::PermissionDenied, "PERMISSION_DENIED");
}

#[tokio::test]
async fn two_administrators_cannot_demote_each_other_at_once() {
    let tracker = Tracker::start().await;
    let other = tracker.user("other", Role::Admin).await;
    for round in 0..40 {
        let lower = |user: &User| if round % 2 == 0 { role(user, Role::Member) } else { disabled(user, true) };
        // Each lowers the other, or both themselves.
        let (by_admin, by_other) =
            if round % 4 < 2 { (&other.user, &tracker.admin.user) } else { (&tracker.admin.user, &other.user) };
        let (left, right) = tokio::join!(update(&tracker.admin, lower(by_admin)), update(&other, lower(by_other)));
        assert_eq!(u8::from(left.is_ok()) + u8::from(right.is_ok()), 1, "{left:?} {right:?}");
        let refused = left.err().or(right.err()).unwrap();
        // The slower one finds himself the last one, or no administrator any more.
        let codes = [Code::FailedPrecondition, Code::PermissionDenied, Code::Unauthenticated];
        assert!(codes.contains(&refused.code()), "{refused:?}");
        assert_eq!(tracker.count("SELECT count(*) FROM users WHERE role = 3 AND NOT disabled").await, 1);

        let stayed = if is_in(&tracker.admin).await
            && get(&tracker.admin, &tracker.admin.user.id, "").await.unwrap().role() == Role::Admin
        {
            (&tracker.admin, &other)
        } else {
            (&other, &tracker.admin)
        };
        let restored = User { id: stayed.1.user.id.clone(), role: Role::Admin.into(), ..User::default() };
        update(stayed.0, change(restored, &["*"])).await.unwrap();
    }
}

#[tokio::test]
async fn a_trial_answers_like_the_real_call_and_writes_nothing() {
    let tracker = Tracker::start().await;
    assert!(is_in(&tracker.member).await);
    let before = tracker.contents().await;
    let user = create(&tracker.admin, CreateUserRequest { validate_only: true, ..new_user("ada", Role::Viewer) }).await;
    assert_eq!(user.unwrap().username, "ada");
    let taken =
        create(&tracker.admin, CreateUserRequest { validate_only: true, ..new_user("VIEWER", Role::Viewer) }).await;
    assert_error(taken, Code::AlreadyExists, "ALREADY_EXISTS");
    let request = UpdateUserRequest { validate_only: true, ..disabled(&tracker.member.user, true) };
    assert!(update(&tracker.admin, request).await.unwrap().disabled);
    assert_eq!(tracker.contents().await, before);
    assert!(is_in(&tracker.member).await);
}

#[tokio::test]
async fn repeated_calls_answer_the_same_and_write_nothing() {
    let tracker = Tracker::start().await;
    let request_id = || Uuid::now_v7().to_string();
    let make = CreateUserRequest { request_id: request_id(), ..new_user("ada", Role::Viewer) };
    let shut_out = UpdateUserRequest { request_id: request_id(), ..disabled(&tracker.member.user, true) };
    let made = create(&tracker.admin, make.clone()).await.unwrap();
    let out = update(&tracker.admin, shut_out.clone()).await.unwrap();
    update(&tracker.admin, disabled(&tracker.member.user, false)).await.unwrap();
    let before = tracker.contents().await;

    assert_eq!(create(&tracker.admin, make.clone()).await.unwrap(), made);
    assert_eq!(update(&tracker.admin, shut_out).await.unwrap(), out);

    // The password is not part of the comparison, the role is.
    let other_password = CreateUserRequest { password: "another password".into(), ..make.clone() };
    assert_eq!(create(&tracker.admin, other_password).await.unwrap(), made);
    let other_role = CreateUserRequest { request_id: make.request_id, ..new_user("ada", Role::Admin) };
    assert_error(create(&tracker.admin, other_role).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(tracker.contents().await, before);
    assert!(is_in(&tracker.member).await, "a replay disables nobody");
}
