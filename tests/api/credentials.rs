//! How the credentials of a client end while it has a stream.

use std::time::Duration;

use issue_tracker::pb::{
    ListApiTokensRequest, LoginRequest, LogoutRequest, RevokeApiTokenRequest, Role, UpdateUserRequest, User,
};
use prost_types::FieldMask;
use tonic::Code;

use crate::harness::{Client, PASSWORD, Tracker};

/// Time within which a stream ends after its credentials, on every replica.
pub const ENDS_WITHIN: Duration = Duration::from_secs(5);

/// Why credentials no longer suffice for a method that requires a member.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum End {
    TokenRevoked,
    TokenExpired,
    SessionLoggedOut,
    UserDisabled,
    Demoted,
}

impl End {
    pub const ALL: [Self; 5] =
        [Self::TokenRevoked, Self::TokenExpired, Self::SessionLoggedOut, Self::UserDisabled, Self::Demoted];

    /// Creates a member with a token of its own.
    pub async fn member(self, tracker: &Tracker, username: &str) -> Client {
        let member = tracker.user(username, Role::Member).await;
        if self != Self::SessionLoggedOut {
            return member;
        }
        let login = LoginRequest { username: username.to_owned(), password: PASSWORD.to_owned(), validate_only: false };
        let token = tracker.client_with_token(None).auth().login(login).await.unwrap().into_inner().access_token;
        let mut session = tracker.client_with_token(Some(&token));
        session.user = member.user;
        session
    }

    /// Ends the credentials of a client that [`End::member`] has returned.
    pub async fn apply(self, tracker: &Tracker, client: &Client) {
        match self {
            Self::TokenRevoked => {
                let list = client.auth().list_api_tokens(ListApiTokensRequest::default()).await.unwrap().into_inner();
                let request = RevokeApiTokenRequest { id: list.api_tokens[0].id.clone(), ..Default::default() };
                tracker.admin.auth().revoke_api_token(request).await.unwrap();
            }
            Self::TokenExpired => {
                // Services may have cached the token without an end. They look it up again for a stream.
                let sql = "UPDATE tokens SET expire_time = now() + interval '0.5 s' WHERE user_id = $1::text::uuid";
                tracker.sql(sql, &[&client.user.id]).await;
            }
            Self::SessionLoggedOut => {
                client.auth().logout(LogoutRequest::default()).await.unwrap();
            }
            Self::UserDisabled => {
                update(tracker, User { id: client.user.id.clone(), disabled: true, ..User::default() }, "disabled")
                    .await;
            }
            Self::Demoted => {
                let role = Role::Viewer.into();
                update(tracker, User { id: client.user.id.clone(), role, ..User::default() }, "role").await;
            }
        }
    }

    /// Returns the code and the reason of a stream that requires a member and ends so.
    pub fn error(self) -> (Code, &'static str) {
        match self {
            Self::TokenRevoked | Self::TokenExpired | Self::SessionLoggedOut | Self::UserDisabled => {
                (Code::Unauthenticated, "UNAUTHENTICATED")
            }
            Self::Demoted => (Code::PermissionDenied, "PERMISSION_DENIED"),
        }
    }
}

async fn update(tracker: &Tracker, user: User, path: &str) {
    let update_mask = Some(FieldMask { paths: vec![path.to_owned()] });
    let request = UpdateUserRequest { user: Some(user), update_mask, ..Default::default() };
    tracker.admin.users().update_user(request).await.unwrap();
}
